//! Error responses that the sidecar generates: one JSON object, `Cache-Control: no-store`, a fitting status.

use bytes::Bytes;
use http::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use http::{Request, Response, StatusCode};
use serde_json::json;

use super::fields::{TimingLabel, cache_status};
use super::{Responder, remove_body_of_head};
use crate::body::{Body, BodyError};
use crate::policy::http::hop_by_hop::add_date;
use crate::policy::http::request_view::RequestView;
use crate::policy::outcome::{Failure, Outcome};
use crate::policy::rejection::Rejection;
use crate::proxy::exchange::{Exchange, ResponseContext};

/// `Retry-After` where nothing better is known: the fetch goes on after a timeout, and may be a hit soon. Seconds.
const DEFAULT_RETRY_AFTER: u64 = 2;

/// The id of a request in an error response, for the log.
#[derive(Debug, Clone)]
pub(super) struct RequestId(pub(super) String);

impl Responder {
    /// Responds with a JSON error in place of an upstream's response.
    pub(crate) fn failure(
        &self,
        context: &ResponseContext<'_>,
        outcome: &Outcome,
        failure: Failure,
    ) -> Response<Body> {
        let (status, message) = match failure {
            Failure::Timeout => (
                StatusCode::GATEWAY_TIMEOUT,
                "The upstream did not answer in time. A retry may find its response cached.",
            ),
            Failure::Connect => (
                StatusCode::BAD_GATEWAY,
                "The upstream can't be reached, or closed the connection before its response ended.",
            ),
            Failure::Malformed => (StatusCode::BAD_GATEWAY, "The upstream's response is not valid HTTP."),
            Failure::Status(_) => (StatusCode::BAD_GATEWAY, "The upstream answered with an error."),
            Failure::Throttled => (StatusCode::SERVICE_UNAVAILABLE, "The upstream's rate limit is used up."),
            Failure::Empty => (StatusCode::BAD_GATEWAY, "The upstream's response is empty where it must not be."),
            Failure::Unavailable => (
                StatusCode::SERVICE_UNAVAILABLE,
                "The circuit breaker of the upstream is open: it did not answer lately.",
            ),
            Failure::Internal => (StatusCode::INTERNAL_SERVER_ERROR, "The request failed inside the sidecar."),
        };
        let mut response = self.error(status, failure.code(), message);
        if status == StatusCode::GATEWAY_TIMEOUT || status == StatusCode::SERVICE_UNAVAILABLE {
            let seconds = self.retry_after(context.request, failure);
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        self.generated(context, response, outcome)
    }

    /// Returns the `Retry-After` of an error, in seconds.
    fn retry_after(&self, request: RequestView<'_>, failure: Failure) -> u64 {
        let Ok(destination) = self.upstream.locate(request.uri, request.headers) else { return DEFAULT_RETRY_AFTER };
        let (upstream, host) = (&self.upstream, destination.authority.as_str());
        let wait = if failure == Failure::Unavailable {
            upstream.breakers.refuses_for(host, &upstream.breaker_config, self.clock.now())
        } else {
            upstream.budget_closed_for(&destination, request.headers)
        };
        wait.map_or(DEFAULT_RETRY_AFTER, |wait| wait.as_secs() + 1)
    }

    /// Responds with 504 to `only-if-cached` (RFC 9111 §5.2.1.7).
    pub(crate) fn not_cached(&self, context: &ResponseContext<'_>) -> Response<Body> {
        let message = "The request says only-if-cached, and nothing usable is stored.";
        let response = self.error(StatusCode::GATEWAY_TIMEOUT, "not_cached", message);
        self.generated(context, response, &Outcome::NotCached)
    }

    /// Responds with 421 (RFC 9110 §15.5.20).
    pub(crate) fn misdirected(&self, request: &Request<Body>, exchange: &Exchange) -> Response<Body> {
        let message = "This host is not on the upstream's list of hosts.";
        let response = self.error(StatusCode::MISDIRECTED_REQUEST, "misdirected", message);
        let context = ResponseContext::new(request, None, exchange);
        self.generated(&context, response, &Outcome::Rejected { code: "misdirected" })
    }

    /// Responds to a rejected request.
    pub(crate) fn rejected<'r>(&self, request: impl Into<RequestView<'r>>, rejection: &Rejection) -> Response<Body> {
        let exchange = Exchange::begin(&self.clock);
        let mut response = self.error(rejection.status, rejection.code, rejection.message);
        if rejection.status == StatusCode::METHOD_NOT_ALLOWED {
            let allowed = HeaderValue::from_static("GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS");
            response.headers_mut().insert(ALLOW, allowed);
        }
        let request = request.into();
        let context = ResponseContext::new(request, None, &exchange);
        self.generated(&context, response, &Outcome::Rejected { code: rejection.code })
    }

    /// Finishes a response that no upstream gave: caches downstream must not store it.
    pub(super) fn generated(
        &self,
        context: &ResponseContext<'_>,
        mut response: Response<Body>,
        outcome: &Outcome,
    ) -> Response<Body> {
        let headers = response.headers_mut();
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        add_date(headers, self.clock.wall());
        remove_body_of_head(context.request.method, &mut response);
        self.finish(response, &cache_status(outcome), outcome, TimingLabel::Upstream, context)
    }

    fn error(&self, status: StatusCode, code: &str, message: &str) -> Response<Body> {
        let request_id = self.telemetry.next_request_id();
        let error = json!({"error": {"code": code, "message": message, "request_id": request_id}});
        let mut response = Response::new(Body::Full(Bytes::from(error.to_string())));
        *response.status_mut() = status;
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        response.extensions_mut().insert(RequestId(request_id));
        response
    }
}

/// Returns the rejection of a request whose body failed.
pub(crate) fn body_rejection(error: BodyError) -> Rejection {
    match error {
        BodyError::TooLarge => Rejection {
            status: StatusCode::PAYLOAD_TOO_LARGE,
            code: "body_too_large",
            message: "The request body is larger than limits.request_body.",
        },
        BodyError::TooSlow | BodyError::Stalled => Rejection {
            status: StatusCode::REQUEST_TIMEOUT,
            code: "body_too_slow",
            message: "The request body arrives too slowly.",
        },
        BodyError::Client | BodyError::Upstream(_) => Rejection {
            status: StatusCode::BAD_REQUEST,
            code: "bad_body",
            message: "The request body is malformed or ended early.",
        },
    }
}
