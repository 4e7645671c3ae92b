//! Which status does the client get, and which headers? Every answer leaves through here.

use bytes::Bytes;
use http::header::{
    AGE, ALLOW, CACHE_CONTROL, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, EXPIRES, HeaderMap,
    HeaderValue, LINK, LOCATION, RETRY_AFTER,
};
use http::uri::Scheme;
use http::{Method, Request, Response, StatusCode};
use serde_json::json;

use super::Proxy;
use super::flights::{Arrival, Content};
use super::site::Misdirected;
use super::texts::{Text, Timing, append, stored_status, text};
use super::visit::{Quest, Visit};
use crate::body::{Body, BodyError};
use crate::policy::asked::Asked;
use crate::policy::entry::Entry;
use crate::policy::head::Head;
use crate::policy::headers::{CACHE_STATUS, SERVER_TIMING, add_date};
use crate::policy::links;
use crate::policy::outcome::{Failure, Fetched, Outcome, StaleReason};
use crate::policy::plan::{Payload, Plan};
use crate::policy::ranges::{Part, asks_for_part, content_range, multipart, part};
use crate::policy::revalidate::{not_modified, without_content};
use crate::policy::target::client_authority;
use crate::telemetry::Answered;

/// After a timeout the fetch goes on: soon there may be a hit.
const RETRY_SOON: u64 = 2;

impl Proxy {
    /// A fresh entry.
    pub(super) fn hit<'r>(
        &self,
        asked: impl Into<Asked<'r>>,
        entry: &Entry,
        plan: &Plan,
        visit: &Visit,
    ) -> Response<Body> {
        let outcome = Outcome::Hit { ttl: entry.ttl(visit.now) };
        self.stored(asked.into(), entry, &outcome, plan, visit)
    }

    /// A stale entry, and why.
    pub(super) fn stale<'r>(
        &self,
        asked: impl Into<Asked<'r>>,
        entry: &Entry,
        reason: StaleReason,
        plan: &Plan,
        visit: &Visit,
    ) -> Response<Body> {
        // Softly purged, it is stale before its time.
        let ttl = entry.ttl(visit.now).min(-1);
        self.stored(asked.into(), entry, &Outcome::Stale { ttl, reason }, plan, visit)
    }

    fn stored(
        &self,
        asked: Asked<'_>,
        entry: &Entry,
        outcome: &Outcome,
        plan: &Plan,
        visit: &Visit,
    ) -> Response<Body> {
        let body = Body::Full(entry.body.clone());
        let mut response = self.with_head(asked, &entry.head, body);
        response.headers_mut().insert(AGE, HeaderValue::from(entry.age(visit.now)));
        self.cut(&mut response, asked, entry);
        let status = stored_status(outcome, entry.key_name.as_str());
        self.finish(response, &status, outcome, Timing::Cache, asked, Some(plan), visit)
    }

    /// The answer of a fetch that was (or is being) stored.
    pub(super) fn arrived(
        &self,
        quest: &Quest<'_>,
        arrival: &Arrival,
        body: Body,
        collapsed: bool,
    ) -> Response<Body> {
        let fetched = Fetched {
            forward: quest.miss.forward,
            status: Some(arrival.status),
            collapsed,
            stored: arrival.stored.map_err(Some),
        };
        let outcome = Outcome::Relayed { fetched, failure: None };
        self.shared(&*quest.asked, arrival, body, &outcome, quest.plan, quest.visit)
    }

    /// A shared answer, good or bad.
    pub(super) fn shared<'r>(
        &self,
        asked: impl Into<Asked<'r>>,
        arrival: &Arrival,
        body: Body,
        outcome: &Outcome,
        plan: &Plan,
        visit: &Visit,
    ) -> Response<Body> {
        let asked = asked.into();
        let mut response = self.with_head(asked, &arrival.head, body);
        if let Content::Stored(entry) = &arrival.content {
            self.cut(&mut response, asked, entry);
        }
        let headers = response.headers_mut();
        // First hand it has no age, and everything that is not stored.
        let collapsed = matches!(outcome, Outcome::Relayed { fetched, .. } if fetched.collapsed);
        match arrival.initial_age.or(collapsed.then_some(0)) {
            Some(age) => {
                let age = (age + visit.later().since(arrival.born)) / 1000;
                headers.insert(AGE, HeaderValue::from(age));
            }
            None => drop(headers.remove(AGE)),
        }
        if !collapsed {
            for (name, value) in &arrival.first_hand {
                headers.append(name, value.clone());
            }
        }
        self.finish(response, &text(outcome), outcome, Timing::Upstream, asked, Some(plan), visit)
    }

    /// An answer handed through: byte for byte, but for `Link` and `Location` that name the upstream.
    pub(super) fn relayed<'r>(
        &self,
        asked: impl Into<Asked<'r>>,
        mut response: Response<Body>,
        outcome: &Outcome,
        plan: Option<&Plan>,
        visit: &Visit,
    ) -> Response<Body> {
        let asked = asked.into();
        let headers = response.headers_mut();
        if (headers.contains_key(LINK) || headers.contains_key(LOCATION))
            && let Ok(place) = self.site.locate(asked.uri, asked.headers)
        {
            let patches = links::find(headers, &place.host);
            rewrite_links(&patches, headers, asked, &self.site.listens);
        }
        add_date(headers, self.commons.clock.wall());
        self.finish(response, &text(outcome), outcome, Timing::Upstream, asked, plan, visit)
    }

    /// The configured payload.
    pub(super) fn payload<'r>(
        &self,
        asked: impl Into<Asked<'r>>,
        payload: &Payload,
        outcome: &Outcome,
        plan: &Plan,
        visit: &Visit,
    ) -> Response<Body> {
        let mut response = Response::new(Body::Full(payload.body.clone()));
        *response.status_mut() = payload.status;
        response.headers_mut().insert(CONTENT_TYPE, payload.content_type.clone());
        self.of_ours(asked.into(), response, outcome, Some(plan), visit)
    }

    /// A JSON error in place of an answer that did not come.
    pub(super) fn failure<'r>(
        &self,
        asked: impl Into<Asked<'r>>,
        outcome: &Outcome,
        failure: Failure,
        plan: Option<&Plan>,
        visit: &Visit,
    ) -> Response<Body> {
        let (status, message) = match failure {
            Failure::Timeout => (
                StatusCode::GATEWAY_TIMEOUT,
                "The upstream did not answer in time. A retry may find its answer cached.",
            ),
            Failure::Connect => (StatusCode::BAD_GATEWAY, "The upstream can't be reached, or broke off its answer."),
            Failure::Malformed => (StatusCode::BAD_GATEWAY, "The upstream's answer is not valid HTTP."),
            Failure::Status(_) => (StatusCode::BAD_GATEWAY, "The upstream answered with an error."),
            Failure::Throttled => (StatusCode::SERVICE_UNAVAILABLE, "The upstream's rate limit is used up."),
            Failure::Empty => (StatusCode::BAD_GATEWAY, "The upstream's answer is empty where it must not be."),
            Failure::Unavailable => {
                (StatusCode::SERVICE_UNAVAILABLE, "The upstream did not answer lately, and is not asked for a while.")
            }
            Failure::Internal => (StatusCode::INTERNAL_SERVER_ERROR, "The request failed inside the proxy."),
        };
        let asked = asked.into();
        let mut response = self.error(status, failure.code(), message);
        if status == StatusCode::GATEWAY_TIMEOUT || status == StatusCode::SERVICE_UNAVAILABLE {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(self.retry_in(asked, failure)));
        }
        self.of_ours(asked, response, outcome, plan, visit)
    }

    /// Seconds after which it is worth to come again.
    fn retry_in(&self, asked: Asked<'_>, failure: Failure) -> u64 {
        let Ok(place) = self.site.locate(asked.uri, asked.headers) else { return RETRY_SOON };
        let closed = if failure == Failure::Unavailable {
            self.site.breakers.opens_in(place.connect.as_str(), self.commons.clock.now())
        } else {
            self.closed_for(&place, asked.headers)
        };
        closed.map_or(RETRY_SOON, |left| left.as_secs() + 1)
    }

    /// 504 to `only-if-cached`: RFC 9111 §5.2.1.7.
    pub(super) fn not_cached<'r>(&self, asked: impl Into<Asked<'r>>, plan: &Plan, visit: &Visit) -> Response<Body> {
        let message = "The request says only-if-cached, and nothing usable is stored.";
        let response = self.error(StatusCode::GATEWAY_TIMEOUT, "not_cached", message);
        self.of_ours(asked.into(), response, &Outcome::NotCached, Some(plan), visit)
    }

    /// 421: RFC 9110 §15.5.20.
    pub(super) fn misdirected(&self, request: &Request<Body>, visit: &Visit, _: Misdirected) -> Response<Body> {
        let message = "This host is not on the upstream's list of hosts.";
        let response = self.error(StatusCode::MISDIRECTED_REQUEST, "misdirected", message);
        self.of_ours(request.into(), response, &Outcome::Rejected { code: "misdirected" }, None, visit)
    }

    /// A request that the guard refused.
    pub fn rejected<'r>(&self, asked: impl Into<Asked<'r>>, rejection: &Rejection) -> Response<Body> {
        let visit = Visit::begin(&self.commons.clock);
        let mut response = self.error(rejection.status, rejection.code, rejection.message);
        if rejection.status == StatusCode::METHOD_NOT_ALLOWED {
            let allowed = HeaderValue::from_static("GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS");
            response.headers_mut().insert(ALLOW, allowed);
        }
        let outcome = Outcome::Rejected { code: rejection.code };
        self.of_ours(asked.into(), response, &outcome, None, &visit)
    }

    /// An answer that no upstream gave: never stored by anyone further down.
    fn of_ours(
        &self,
        asked: Asked<'_>,
        mut response: Response<Body>,
        outcome: &Outcome,
        plan: Option<&Plan>,
        visit: &Visit,
    ) -> Response<Body> {
        let headers = response.headers_mut();
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        add_date(headers, self.commons.clock.wall());
        without_body_for_head(asked.method, &mut response);
        self.finish(response, &text(outcome), outcome, Timing::Upstream, asked, plan, visit)
    }

    fn error(&self, status: StatusCode, code: &str, message: &str) -> Response<Body> {
        let request_id = self.commons.telemetry.next_request_id();
        let error = json!({"error": {"code": code, "message": message, "request_id": request_id}});
        let mut response = Response::new(Body::Full(Bytes::from(error.to_string())));
        *response.status_mut() = status;
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        response.extensions_mut().insert(RequestId(request_id));
        response
    }

    /// Makes of an answer with a whole body one with the part that is asked for.
    fn cut(&self, response: &mut Response<Body>, asked: Asked<'_>, entry: &Entry) {
        if asks_for_part(asked.method, asked.headers) && response.status() == StatusCode::OK {
            let part = part(asked.headers, &entry.head, entry.body.len(), || self.commons.clock.wall());
            take_part(response, entry, part);
        }
    }

    /// A head that is sent many times, to this client.
    fn with_head(&self, asked: Asked<'_>, head: &Head, body: Body) -> Response<Body> {
        let mut response = Response::new(body);
        *response.status_mut() = head.status;
        head.write_to(response.headers_mut());
        if let Some(casing) = head.casing() {
            response.extensions_mut().clone_from(&casing.record);
        }
        if !head.links().is_empty() {
            rewrite_links(head.links(), response.headers_mut(), asked, &self.site.listens);
        }
        if not_modified(asked.method, asked.headers, head, || self.commons.clock.wall()) {
            *response.status_mut() = StatusCode::NOT_MODIFIED;
            *response.body_mut() = Body::Empty;
            without_content(response.headers_mut());
        }
        without_body_for_head(asked.method, &mut response);
        response
    }

    #[allow(clippy::too_many_arguments)] // the one door: everything that is said about an answer is said here
    fn finish(
        &self,
        mut response: Response<Body>,
        cache_status: &Text,
        outcome: &Outcome,
        timing: Timing,
        asked: Asked<'_>,
        plan: Option<&Plan>,
        visit: &Visit,
    ) -> Response<Body> {
        let elapsed = visit.elapsed();
        let headers = response.headers_mut();
        append(headers, CACHE_STATUS, cache_status);
        append(headers, SERVER_TIMING, &timing.text(elapsed));
        let answered = Answered {
            upstream: &self.site.name,
            plan,
            asked,
            status: response.status(),
            now: visit.now,
            took: elapsed,
            request_id: response.extensions().get::<RequestId>().map(|id| id.0.as_str()),
            identity: (timing == Timing::Upstream).then(|| self.site.identity(asked)),
        };
        self.commons.telemetry.record(outcome, &answered);
        self.site.meter.answered(outcome, elapsed);
        plan.map_or(&self.site.meter.no_rule, |plan| &plan.tally).count(outcome);
        response
    }
}

/// The name of a request that an error of ours shows: on its way to the log.
#[derive(Debug, Clone)]
struct RequestId(String);

/// Why the guard refused a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rejection {
    /// The status to answer with.
    pub status: StatusCode,
    /// The code in the JSON error and in `Cache-Status`.
    pub code: &'static str,
    /// What is wrong.
    pub message: &'static str,
}

/// What to say of a request body that failed.
pub fn body_rejection(fault: BodyError) -> Rejection {
    match fault {
        BodyError::TooLarge => Rejection {
            status: StatusCode::PAYLOAD_TOO_LARGE,
            code: "body_too_large",
            message: "The request body is larger than limits.request_body.",
        },
        BodyError::TooSlow | BodyError::Stalled => Rejection {
            status: StatusCode::REQUEST_TIMEOUT,
            code: "body_too_slow",
            message: "The request body comes too slowly.",
        },
        BodyError::Client | BodyError::Upstream(_) => Rejection {
            status: StatusCode::BAD_REQUEST,
            code: "bad_body",
            message: "The request body is broken or ended early.",
        },
    }
}

fn take_part(response: &mut Response<Body>, entry: &Entry, part: Part) {
    let length = entry.body.len();
    let (status, body, field, value) = match part {
        Part::Whole => return,
        Part::One(range) => {
            let value = content_range(&range, length);
            (StatusCode::PARTIAL_CONTENT, entry.body.slice(range), CONTENT_RANGE, value)
        }
        Part::Several(ranges) => {
            let boundary = format!("sidecache-{}", entry.key_name.as_str());
            let Some(body) = multipart(&entry.head, &entry.body, &ranges, &boundary) else { return };
            (StatusCode::PARTIAL_CONTENT, body, CONTENT_TYPE, format!("multipart/byteranges; boundary={boundary}"))
        }
        Part::Nowhere => {
            // What was said of the whole is not true of this.
            for name in [CACHE_CONTROL, EXPIRES, CONTENT_TYPE, CONTENT_ENCODING] {
                response.headers_mut().remove(name);
            }
            (StatusCode::RANGE_NOT_SATISFIABLE, Bytes::new(), CONTENT_RANGE, format!("bytes */{length}"))
        }
    };
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_LENGTH, HeaderValue::from(body.len()));
    if let Ok(value) = HeaderValue::try_from(value) {
        headers.insert(field, value);
    }
    *response.body_mut() = Body::Full(body);
}

fn without_body_for_head(method: &Method, response: &mut Response<Body>) {
    if *method == Method::HEAD {
        let body = std::mem::replace(response.body_mut(), Body::Empty);
        if let Body::Full(bytes) = body
            && response.status() != StatusCode::NOT_MODIFIED
        {
            response.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(bytes.len()));
        }
    }
}

fn rewrite_links(patches: &[links::LinkPatch], headers: &mut HeaderMap, asked: Asked<'_>, listens: &Scheme) {
    if let Some(authority) = client_authority(asked.uri, asked.headers) {
        links::apply(patches, headers, &format!("{listens}://{authority}"));
    }
}
