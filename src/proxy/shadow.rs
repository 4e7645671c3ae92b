//! Shadow mode: every request is passed through, and what the cache would have answered is compared with what the
//! upstream did. What a fetch would have stored is stored, so that the next request can be a hit.

use std::sync::Arc;

use bytes::Bytes;
use http::header::{ETAG, HeaderMap};
use http::{Method, Request, Response, StatusCode};
use tracing::warn;

use super::admission::Admission;
use super::exchange::{CacheRequest, Exchange};
use super::fetch::opportunistic::get_of;
use super::fetch::spec::FetchSpec;
use super::fetch::store::{ResponseStore, UpstreamResponse, declared_length};
use super::lookup::{Lookup, LookupResult};
use super::send::UpstreamRequest;
use super::upstream_state::{Destination, UpstreamState};
use crate::body::Body;
use crate::body::fanout::InflightBudget;
use crate::body::tee::tee;
use crate::policy::Tick;
use crate::policy::body_inspection::{ComparedResponse, Comparison, compare, is_empty_at};
use crate::policy::entry::Entry;
use crate::policy::http::storage::decide;
use crate::policy::invalidation::ledger::Position;
use crate::policy::outcome::{Failure, ShadowResult};
use crate::policy::routing::cache_key::CacheKey;
use crate::policy::routing::rule::Rule;

/// Larger responses are not compared, as received or decompressed, in bytes.
const MAX_COMPARED: usize = 1 << 20;

/// Compares, and stores.
#[derive(Debug)]
pub(crate) struct Shadow {
    pub(crate) upstream: Arc<UpstreamState>,
    pub(crate) admission: Arc<Admission>,
    pub(crate) lookup: Arc<Lookup>,
    pub(crate) store: Arc<ResponseStore>,
    pub(crate) inflight: Arc<InflightBudget>,
    pub(crate) max_entry_bytes: u64,
}

/// What the cache would have done with a request.
pub(crate) struct ShadowLookup {
    rule: Arc<Rule>,
    key: CacheKey,
    /// The entry that would have been served.
    served: Option<Arc<Entry>>,
    /// Whether the upstream would have been asked, now or in the background.
    fetches: bool,
    /// The ledger's position before the request was sent.
    position: Position,
}

/// A passed response that is compared with an entry.
struct PassedResponse {
    rule: Arc<Rule>,
    path: String,
    headers: HeaderMap,
    body: Bytes,
    now: Tick,
}

impl Shadow {
    /// Looks up what the cache would do with a request. `None` if it would pass it through.
    pub(crate) fn look_up(
        &self,
        request: &Request<Body>,
        destination: &Destination,
        exchange: &Exchange,
    ) -> Option<ShadowLookup> {
        let admitted = self.admission.admit_in_normal_mode(request, destination).ok()?;
        let position = self.lookup.invalidations.position();
        let found = self.lookup.find(&admitted.key, request.headers(), &admitted.directives, exchange.now);
        let (served, fetches) = match found {
            LookupResult::Fresh(entry) => (Some(entry), false),
            LookupResult::WhileRevalidate(entry) => (Some(entry), true),
            LookupResult::Miss(_) => (None, true),
        };
        Some(ShadowLookup { rule: admitted.rule.clone(), key: admitted.key, served, fetches, position })
    }

    /// Returns the upstream's response, with a copy of its body on the way to being compared and stored.
    pub(crate) fn observe(
        self: &Arc<Self>,
        looked_up: ShadowLookup,
        request: UpstreamRequest<'_>,
        exchange: &Exchange,
        response: Response<Body>,
    ) -> Response<Body> {
        let is_get = request.parts.method == Method::GET;
        let result = match &looked_up.served {
            None => Some(ShadowResult::Miss),
            // The cache would have kept this failure from the client.
            Some(_) if Failure::from_status(response.status()).is_some() => Some(ShadowResult::Hit),
            Some(served) if !is_get || response.status() != StatusCode::OK => Some(compare_heads(served, &response)),
            Some(served) if served.body.len().max(length_of(&response)) > MAX_COMPARED => {
                Some(ShadowResult::NotCompared)
            }
            Some(_) => None,
        };
        if let Some(result) = result {
            self.upstream.metrics.record_shadow(&looked_up.rule.name, result);
        }
        let stores = looked_up.fetches && is_get;
        if result.is_some() && !stores {
            return response;
        }
        let (parts, body) = response.into_parts();
        let compared = looked_up.served.clone().filter(|_| result.is_none());
        let (path, now) = (request.parts.uri.path().to_owned(), exchange.now);
        let passed = PassedResponse {
            rule: looked_up.rule.clone(),
            path,
            headers: parts.headers.clone(),
            body: Bytes::new(),
            now,
        };
        let received = self.store.received(Response::from_parts(parts.clone(), Body::Empty), exchange.elapsed());
        let spec = stores.then(|| self.spec(looked_up, request));
        let max = usize::try_from(self.max_entry_bytes).unwrap_or(usize::MAX);
        let shadow = self.clone();
        let on_complete = move |body: Bytes| {
            if let Some(served) = compared {
                let (shadow, passed) = (shadow.clone(), PassedResponse { body: body.clone(), ..passed });
                // Comparing may take milliseconds, which must not delay requests.
                tokio::task::spawn_blocking(move || shadow.compare(&served, &passed));
            }
            if let Some(spec) = spec {
                shadow.store(&spec, &received, body);
            }
        };
        Response::from_parts(parts, tee(body, max, &self.inflight, on_complete))
    }

    fn spec(&self, looked_up: ShadowLookup, request: UpstreamRequest<'_>) -> FetchSpec {
        let ShadowLookup { rule, key, served, position, .. } = looked_up;
        let parts = get_of(request.parts);
        let request = CacheRequest { parts, destination: request.destination.clone(), rule, key };
        let mut spec = FetchSpec::for_copy(&self.upstream, request, position);
        spec.stale = served;
        spec
    }

    /// Compares a complete response with the entry that would have been served, and counts the result.
    fn compare(&self, served: &Entry, passed: &PassedResponse) {
        let headers = served.head.headers();
        let stored = ComparedResponse { headers: &headers, body: &served.body };
        let fresh = ComparedResponse { headers: &passed.headers, body: &passed.body };
        let result = match compare(stored, fresh, &passed.rule.volatile, MAX_COMPARED) {
            Comparison::Same => ShadowResult::Hit,
            Comparison::Unreadable => ShadowResult::NotCompared,
            Comparison::Differ(pointer) => {
                self.log_wrong_hit(served, passed, &pointer);
                ShadowResult::WrongHit
            }
        };
        self.upstream.metrics.record_shadow(&passed.rule.name, result);
    }

    fn log_wrong_hit(&self, served: &Entry, passed: &PassedResponse, differs_at: &str) {
        if self.upstream.metrics.may_log_wrong_hit(passed.now) {
            let (upstream, rule) = (&*self.upstream.name, &*passed.rule.name);
            let (path, age) = (&passed.path, served.age(passed.now));
            warn!(upstream, rule, path, differs_at, age, "shadow mode: a hit would have differed from the upstream");
        }
    }

    /// Stores a complete response as a fetch would: a failure only if the upstream says for how long and nothing is
    /// better, an empty list never.
    fn store(&self, spec: &FetchSpec, received: &UpstreamResponse, body: Bytes) {
        let (view, rule) = (received.view(), &spec.request.rule);
        let max = usize::try_from(self.max_entry_bytes).unwrap_or(usize::MAX);
        let is_empty = |pointer: &str| view.status.is_success() && is_empty_at(pointer, view.headers, &body, max);
        let failure = Failure::from_status(view.status);
        if failure.is_some_and(|failure| !self.store.may_store_failure(spec, &view, failure))
            || rule.reject_empty.as_deref().is_some_and(is_empty)
        {
            return;
        }
        if let Ok(plan) = decide(&spec.view(), &view, rule) {
            let head = received.head(spec, &plan);
            let entry = self.store.entry(spec, &plan, (head, body), received.received_at);
            self.store.store_if_valid(spec, &entry);
        }
    }
}

/// Returns the Content-Length of a response; 0 if it has none.
fn length_of(response: &Response<Body>) -> usize {
    declared_length(response.headers()).map_or(0, |length| usize::try_from(length).unwrap_or(usize::MAX))
}

/// Compares without a body: by status and entity tags.
fn compare_heads(served: &Entry, response: &Response<Body>) -> ShadowResult {
    let stored = served.head.headers();
    match (stored.get(ETAG), response.headers().get(ETAG)) {
        _ if !response.status().is_redirection() && response.status() != served.head.status => ShadowResult::WrongHit,
        (Some(stored), Some(fresh)) if stored == fresh => ShadowResult::Hit,
        (Some(_), Some(_)) => ShadowResult::WrongHit,
        _ => ShadowResult::NotCompared,
    }
}
