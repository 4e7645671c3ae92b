//! Responses to clients: status, fields, body. Every response leaves through `Responder`.

pub(crate) mod error;
mod fields;
mod range;

use std::sync::Arc;

use http::header::{AGE, CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderValue, LINK, LOCATION};
use http::uri::Scheme;
use http::{Method, Response, StatusCode};

use super::exchange::{Exchange, MissContext, ResponseContext};
use super::fetch::coalesce::{SharedBody, SharedResponse};
use super::upstream_state::UpstreamState;
use crate::body::Body;
use crate::clock::Clock;
use crate::policy::entry::Entry;
use crate::policy::http::conditional::{not_modified, strip_content_fields};
use crate::policy::http::hop_by_hop::{CACHE_STATUS, SERVER_TIMING, add_date};
use crate::policy::http::link_rewrite;
use crate::policy::http::range::has_range;
use crate::policy::http::request_view::RequestView;
use crate::policy::outcome::{FetchSummary, Outcome, StaleReason};
use crate::policy::packed_head::PackedHead;
use crate::policy::routing::rule::FallbackPayload;
use crate::policy::routing::target::client_authority;
use crate::telemetry::{CompletedRequest, Telemetry};
use error::RequestId;
use fields::{FieldValue, TimingLabel, append_field, cache_status, stored_cache_status};

/// Builds the responses of one upstream's listener, and records them.
#[derive(Debug)]
pub(crate) struct Responder {
    pub(crate) upstream: Arc<UpstreamState>,
    pub(crate) clock: Clock,
    pub(crate) telemetry: Arc<Telemetry>,
}

impl Responder {
    /// Responds with a fresh entry.
    pub(crate) fn hit(&self, context: &ResponseContext<'_>, entry: &Entry) -> Response<Body> {
        self.stored(context, entry, &Outcome::Hit { ttl: entry.ttl(context.exchange.now) })
    }

    /// Responds with a stale entry.
    pub(crate) fn stale(&self, context: &ResponseContext<'_>, entry: &Entry, reason: StaleReason) -> Response<Body> {
        // A softly purged entry is stale before its lifetime ends.
        let ttl = entry.ttl(context.exchange.now).min(-1);
        self.stored(context, entry, &Outcome::Stale { ttl, reason })
    }

    fn stored(&self, context: &ResponseContext<'_>, entry: &Entry, outcome: &Outcome) -> Response<Body> {
        let mut response = self.with_head(context.request, &entry.head, Body::Full(entry.body.clone()));
        response.headers_mut().insert(AGE, HeaderValue::from(entry.age(context.exchange.now)));
        self.apply_range(&mut response, context.request, entry);
        let status = stored_cache_status(outcome, entry.key_name.as_str());
        self.finish(response, &status, outcome, TimingLabel::Cache, context)
    }

    /// Responds with the response of a fetch that was, or is being, stored.
    pub(crate) fn fetched(
        &self,
        context: &MissContext,
        shared: &SharedResponse,
        body: Body,
        collapsed: bool,
    ) -> Response<Body> {
        let fetched = FetchSummary {
            forward: context.miss.reason,
            status: Some(shared.status),
            collapsed,
            stored: shared.stored.map_err(Some),
        };
        self.shared(&context.response(), shared, body, &Outcome::Relayed { fetched, failure: None })
    }

    /// Responds with a shared response, which may be a failure.
    pub(crate) fn shared(
        &self,
        context: &ResponseContext<'_>,
        shared: &SharedResponse,
        body: Body,
        outcome: &Outcome,
    ) -> Response<Body> {
        let mut response = self.with_head(context.request, &shared.head, body);
        if let SharedBody::Stored(entry) = &shared.body {
            self.apply_range(&mut response, context.request, entry);
        }
        let headers = response.headers_mut();
        // For the request that caused the fetch, it has no age, and the fields that are not stored.
        let collapsed = matches!(outcome, Outcome::Relayed { fetched, .. } if fetched.collapsed);
        match shared.initial_age.or(collapsed.then_some(0)) {
            Some(age) => {
                let age = (age + context.exchange.current_time().since(shared.received_at)) / 1000;
                headers.insert(AGE, HeaderValue::from(age));
            }
            None => drop(headers.remove(AGE)),
        }
        if !collapsed {
            for (name, value) in &shared.unstored_fields {
                headers.append(name, value.clone());
            }
        }
        self.finish(response, &cache_status(outcome), outcome, TimingLabel::Upstream, context)
    }

    /// Responds with the upstream's response: unchanged, but for `Link` and `Location` that name the upstream.
    pub(crate) fn relayed(
        &self,
        context: &ResponseContext<'_>,
        mut response: Response<Body>,
        outcome: &Outcome,
    ) -> Response<Body> {
        let (request, headers) = (context.request, response.headers_mut());
        if (headers.contains_key(LINK) || headers.contains_key(LOCATION))
            && let Ok(destination) = self.upstream.locate(request.uri, request.headers)
        {
            let patches = link_rewrite::find(headers, &destination.host);
            rewrite_links(&patches, headers, request, &self.upstream.client_scheme);
        }
        add_date(headers, self.clock.wall());
        self.finish(response, &cache_status(outcome), outcome, TimingLabel::Upstream, context)
    }

    /// Responds with a configured payload.
    pub(crate) fn payload(
        &self,
        context: &ResponseContext<'_>,
        payload: &FallbackPayload,
        outcome: &Outcome,
    ) -> Response<Body> {
        let mut response = Response::new(Body::Full(payload.body.clone()));
        *response.status_mut() = payload.status;
        response.headers_mut().insert(CONTENT_TYPE, payload.content_type.clone());
        self.generated(context, response, outcome)
    }

    /// Returns a stored head for this client, with the body that goes with it.
    fn with_head(&self, request: RequestView<'_>, head: &PackedHead, body: Body) -> Response<Body> {
        let mut response = Response::new(body);
        *response.status_mut() = head.status;
        head.write_to(response.headers_mut());
        if let Some(case) = head.header_case() {
            response.extensions_mut().clone_from(&case.record);
        }
        if !head.links().is_empty() {
            rewrite_links(head.links(), response.headers_mut(), request, &self.upstream.client_scheme);
        }
        if not_modified(request.method, request.headers, head, || self.clock.wall()) {
            *response.status_mut() = StatusCode::NOT_MODIFIED;
            *response.body_mut() = Body::Empty;
            strip_content_fields(response.headers_mut());
        }
        remove_body_of_head(request.method, &mut response);
        response
    }

    /// Reduces a response to the range that the request asks for.
    fn apply_range(&self, response: &mut Response<Body>, request: RequestView<'_>, entry: &Entry) {
        if has_range(request.method, request.headers) && response.status() == StatusCode::OK {
            range::apply(response, request.headers, entry, || self.clock.wall());
        }
    }

    /// Adds `Cache-Status` and `Server-Timing`, and records the response.
    fn finish(
        &self,
        mut response: Response<Body>,
        cache_status: &FieldValue,
        outcome: &Outcome,
        timing: TimingLabel,
        context: &ResponseContext<'_>,
    ) -> Response<Body> {
        let ResponseContext { request, rule, exchange } = *context;
        let elapsed = Exchange::elapsed(exchange);
        let headers = response.headers_mut();
        append_field(headers, CACHE_STATUS, cache_status);
        append_field(headers, SERVER_TIMING, &timing.text(elapsed));
        let answered = CompletedRequest {
            upstream: &self.upstream.name,
            rule,
            request,
            status: response.status(),
            now: exchange.now,
            took: elapsed,
            request_id: response.extensions().get::<RequestId>().map(|id| id.0.as_str()),
            identity: (timing == TimingLabel::Upstream).then(|| self.upstream.identity(request)),
        };
        self.telemetry.record(outcome, &answered);
        self.upstream.metrics.record_response(outcome, elapsed);
        rule.map_or(&self.upstream.metrics.no_rule, |rule| &rule.counters).count(outcome);
        response
    }
}

fn remove_body_of_head(method: &Method, response: &mut Response<Body>) {
    if *method == Method::HEAD {
        let body = std::mem::replace(response.body_mut(), Body::Empty);
        if let Body::Full(bytes) = body
            && response.status() != StatusCode::NOT_MODIFIED
        {
            response.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(bytes.len()));
        }
    }
}

fn rewrite_links(
    patches: &[link_rewrite::LinkPatch],
    headers: &mut HeaderMap,
    request: RequestView<'_>,
    client_scheme: &Scheme,
) {
    if let Some(authority) = client_authority(request.uri, request.headers) {
        link_rewrite::apply(patches, headers, &format!("{client_scheme}://{authority}"));
    }
}
