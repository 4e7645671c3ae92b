//! Opportunistic storing of pass-through responses: incomplete responses (RFC 9111 §3.3), to be completed when the whole
//! is requested, and responses to POST that name their own URL (RFC 9110 §9.3.3).

use std::sync::Arc;

use bytes::Bytes;
use http::header::CONTENT_LOCATION;
use http::request::Parts;
use http::{Method, Request, Response, StatusCode};

use super::spec::FetchSpec;
use super::store::{ResponseStore, UpstreamResponse, as_complete, declared_length};
use crate::body::Body;
use crate::body::fanout::InflightBudget;
use crate::body::tee::tee;
use crate::policy::http::freshness::RequestDirectives;
use crate::policy::http::incomplete::{IncompleteResponse, is_first_part};
use crate::policy::http::request_view::RequestView;
use crate::policy::http::storage::{StorePlan, decide, has_explicit_lifetime};
use crate::policy::invalidation::ledger::Position;
use crate::policy::routing::router::Route;
use crate::policy::routing::rule::CacheMode;
use crate::policy::routing::target::target;
use crate::proxy::admission::Admission;
use crate::proxy::exchange::{CacheRequest, Exchange};
use crate::proxy::send::UpstreamRequest;
use crate::proxy::upstream_state::UpstreamState;
use crate::proxy::write::named_target;
use crate::store::IncompleteResponses;

/// Larger responses are not stored, in bytes.
const MAX_OPPORTUNISTIC_BYTES: u64 = 256 << 10;

/// Stores responses that were passed through.
#[derive(Debug)]
pub(crate) struct OpportunisticStore {
    pub(crate) upstream: Arc<UpstreamState>,
    pub(crate) admission: Arc<Admission>,
    pub(crate) store: Arc<ResponseStore>,
    pub(crate) incomplete: Arc<IncompleteResponses>,
    pub(crate) inflight: Arc<InflightBudget>,
    pub(crate) max_entry_bytes: u64,
}

/// What a passed-through response may be stored as.
enum StorableAs {
    /// The first `received` bytes of a representation of `length` bytes.
    FirstPart { received: u64, length: u64 },
    /// The response to a GET of the same URL.
    Get,
}

impl OpportunisticStore {
    /// Returns the response, with a copy of its body on the way into the store if it may be stored.
    ///
    /// `position`: the ledger's position before the request was sent.
    pub(crate) fn observe(
        self: &Arc<Self>,
        request: UpstreamRequest<'_>,
        position: Position,
        exchange: &Exchange,
        response: Response<Body>,
    ) -> Response<Body> {
        let Some(storable) = storable_as(request, &response) else { return response };
        let Some(spec) = self.spec(request, position) else { return response };
        let (parts, body) = response.into_parts();
        let received = self.store.received(Response::from_parts(parts.clone(), Body::Empty), exchange.elapsed());
        let max = MAX_OPPORTUNISTIC_BYTES.min(self.max_entry_bytes);
        let Some(plan) = plan(&spec, &received).filter(|_| declared_length(&parts.headers) <= Some(max)) else {
            return Response::from_parts(parts, body);
        };
        let (store, max) = (self.clone(), usize::try_from(max).unwrap_or(0));
        let on_complete = move |body| store.store(&spec, &plan, &received, &storable, body);
        Response::from_parts(parts, tee(body, max, &self.inflight, on_complete))
    }

    /// Returns the specification of a GET of the same URL, if its response could be stored under the upstream's headers.
    fn spec(&self, request: UpstreamRequest<'_>, position: Position) -> Option<FetchSpec> {
        let (uri, headers) = (&request.parts.uri, &request.parts.headers);
        let Route::Cache(rule) = self.upstream.router.route(&Method::GET, uri.path(), uri.query(), headers) else {
            return None;
        };
        let excluded = RequestDirectives::from_request(rule, headers).no_store() || rule.reject_empty.is_some();
        if rule.mode != CacheMode::Http || excluded {
            return None;
        }
        let key = self.admission.cache_key(RequestView::from(request.parts), request.destination, rule).ok()?;
        let parts = get_of(request.parts);
        let request = CacheRequest { parts, destination: request.destination.clone(), rule: rule.clone(), key };
        Some(FetchSpec::for_copy(&self.upstream, request, position))
    }

    fn store(
        &self,
        spec: &FetchSpec,
        plan: &StorePlan,
        received: &UpstreamResponse,
        storable: &StorableAs,
        body: Bytes,
    ) {
        let copied = body.len() as u64;
        let head = received.head(spec, plan);
        let entry = self.store.entry(spec, plan, (head, body), received.received_at);
        match storable {
            StorableAs::FirstPart { received, length } => {
                if copied == *received {
                    let first_part = IncompleteResponse { start: entry, length: *length };
                    self.incomplete.put(&spec.request.key, first_part);
                }
            }
            StorableAs::Get => self.store.store_if_valid(spec, &entry),
        }
    }
}

/// Returns how a passed-through response is stored, if it has a freshness lifetime of its own: RFC 9110 §9.3.3 asks that
/// of a POST's response, and without one a first part would not be used.
fn plan(spec: &FetchSpec, received: &UpstreamResponse) -> Option<StorePlan> {
    let view = received.view();
    let complete = as_complete(&view);
    let plan = decide(&spec.view(), &complete, &spec.request.rule).ok()?;
    (plan.lifetimes.fresh_for > 0 && has_explicit_lifetime(&complete)).then_some(plan)
}

/// Returns the GET of the same target with the same headers.
pub(crate) fn get_of(parts: &Parts) -> Arc<Parts> {
    let mut get = Request::new(());
    get.uri_mut().clone_from(&parts.uri);
    get.headers_mut().clone_from(&parts.headers);
    Arc::new(get.into_parts().0)
}

fn storable_as(request: UpstreamRequest<'_>, response: &Response<Body>) -> Option<StorableAs> {
    let (status, headers) = (response.status(), response.headers());
    if request.parts.method == Method::GET {
        let (received, length) = is_first_part(status, headers)?;
        return Some(StorableAs::FirstPart { received, length });
    }
    let named = || named_target(request.destination, headers.get(CONTENT_LOCATION)?);
    let names_itself = || named().as_deref() == Some(target(&request.parts.uri));
    (request.parts.method == Method::POST && status == StatusCode::OK && names_itself()).then_some(StorableAs::Get)
}
