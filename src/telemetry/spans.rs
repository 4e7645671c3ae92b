//! Tracing spans of a request: the request itself, its lookups, its wait, and its upstream requests.
//!
//! Spans are disabled unless traces are exported (feature `otlp`). A disabled span costs one atomic load; an enabled
//! one costs what the exporter takes.

use http::{HeaderMap, Method, Response};
use tracing::{Span, field::Empty, trace_span};

/// The target of all spans.
pub const TARGET: &str = "sidecache::spans";

/// Returns the span of a request, as part of the trace that its `traceparent` names (W3C Trace Context). The span has
/// no query and no header fields.
pub fn request(method: &Method, path: &str, headers: &HeaderMap) -> Span {
    let span = trace_span!(
        target: TARGET,
        "request",
        otel.kind = "server",
        http.request.method = method.as_str(),
        url.path = path,
        http.response.status_code = Empty,
        sidecache.status = Empty,
    );
    #[cfg(feature = "otlp")]
    context::adopt(&span, headers);
    #[cfg(not(feature = "otlp"))]
    let _ = headers;
    span
}

/// Records the response to a request: its status and `Cache-Status`.
pub fn record_response<B>(span: &Span, response: &Response<B>) {
    if span.is_disabled() {
        return;
    }
    span.record("http.response.status_code", response.status().as_u16());
    let ours = response.headers().get_all("cache-status").iter().filter_map(|value| value.to_str().ok()).next_back();
    span.record("sidecache.status", ours.unwrap_or_default());
}

/// Returns the span of a lookup in a tier of the store.
pub fn lookup(tier: &'static str) -> Span {
    trace_span!(target: TARGET, "lookup", sidecache.tier = tier)
}

/// Returns the span of waiting for a response, of the request's own fetch or another's.
pub fn wait() -> Span {
    trace_span!(target: TARGET, "wait")
}

/// Returns the span of a fetch, which may outlast the request that started it.
pub fn fetch() -> Span {
    trace_span!(target: TARGET, "flight")
}

/// Returns the span of an upstream request, and adds its trace context to the request headers.
pub fn upstream(method: &Method, host: &str, headers: &mut HeaderMap) -> Span {
    let span = trace_span!(
        target: TARGET,
        "upstream",
        otel.kind = "client",
        http.request.method = method.as_str(),
        server.address = host,
        http.response.status_code = Empty,
        error.r#type = Empty,
    );
    #[cfg(feature = "otlp")]
    context::hand_on(&span, headers);
    #[cfg(not(feature = "otlp"))]
    let _ = headers;
    span
}

#[cfg(feature = "otlp")]
mod context {
    use http::HeaderMap;
    use opentelemetry::propagation::TextMapPropagator;
    use opentelemetry_http::{HeaderExtractor, HeaderInjector};
    use opentelemetry_sdk::propagation::TraceContextPropagator;
    use tracing::Span;
    use tracing_opentelemetry::OpenTelemetrySpanExt;

    pub(super) fn adopt(span: &Span, headers: &HeaderMap) {
        if !span.is_disabled() && headers.contains_key("traceparent") {
            let _ = span.set_parent(TraceContextPropagator::new().extract(&HeaderExtractor(headers)));
        }
    }

    pub(super) fn hand_on(span: &Span, headers: &mut HeaderMap) {
        if !span.is_disabled() {
            TraceContextPropagator::new().inject_context(&span.context(), &mut HeaderInjector(headers));
        }
    }
}
