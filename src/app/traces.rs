//! Trace export by OTLP over HTTP.
//!
//! The standard variables configure it: `OTEL_EXPORTER_OTLP_ENDPOINT`, `OTEL_EXPORTER_OTLP_HEADERS`,
//! `OTEL_EXPORTER_OTLP_PROTOCOL` (`http/protobuf`, `http/json`), `OTEL_SERVICE_NAME`, `OTEL_RESOURCE_ATTRIBUTES`,
//! `OTEL_TRACES_SAMPLER`, `OTEL_BSP_…`. Without an endpoint, no traces are exported.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Request, Response};
use opentelemetry::trace::TracerProvider;
use opentelemetry_http::{HttpClient, HttpError};
use opentelemetry_otlp::{SpanExporter, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tokio::runtime::Handle;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::{Layer, Registry};

use crate::body::Body;
use crate::clock::Clock;
use crate::telemetry::spans;
use crate::upstream::Timeouts;
use crate::upstream::UpstreamClient;
use crate::upstream::client::PooledClient;

/// Timeout of an export to the collector.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(10);

/// The trace exporter.
#[derive(Debug)]
pub struct Traces(SdkTracerProvider);

/// The subscriber layer that receives spans.
pub type Listener = Box<dyn Layer<Registry> + Send + Sync>;

/// Starts the export. Returns `None` if the environment does not configure it.
pub fn start() -> Result<Option<(Traces, Listener)>, String> {
    let variable = |name: &str| std::env::var(name).unwrap_or_default();
    let named = ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"];
    let wanted = named.iter().any(|name| !variable(name).is_empty()) || variable("OTEL_TRACES_EXPORTER") == "otlp";
    if !wanted
        || variable("OTEL_TRACES_EXPORTER") == "none"
        || variable("OTEL_SDK_DISABLED").eq_ignore_ascii_case("true")
    {
        return Ok(None);
    }
    let timeouts =
        Timeouts { connect: EXPORT_TIMEOUT, first_byte: EXPORT_TIMEOUT, idle: EXPORT_TIMEOUT, fetch: EXPORT_TIMEOUT };
    let http = Arc::new(PooledClient::plain(timeouts, Clock::start())?);
    let sender = Sender { http, runtime: Handle::current() };
    let exporter = SpanExporter::builder().with_http().with_http_client(sender).build();
    let exporter = exporter.map_err(|error| format!("traces: {error}"))?;
    let mut resource = Resource::builder();
    if variable("OTEL_SERVICE_NAME").is_empty() && !variable("OTEL_RESOURCE_ATTRIBUTES").contains("service.name") {
        resource = resource.with_service_name("sidecache");
    }
    let provider = SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource.build()).build();
    let listener = tracing_opentelemetry::layer()
        .with_tracer(provider.tracer("sidecache"))
        .with_location(false)
        .with_target(false)
        .with_tracked_inactivity(false)
        .with_threads(false)
        .with_filter(Targets::new().with_target(spans::TARGET, LevelFilter::TRACE));
    Ok(Some((Traces(provider), Box::new(listener))))
}

impl Traces {
    /// Exports the remaining spans.
    pub async fn finish(self) {
        let _ = tokio::task::spawn_blocking(move || self.0.shutdown()).await;
    }
}

/// Sends exports with the proxy's own HTTP client, on `runtime`: the exporter runs in a thread of its own.
#[derive(Debug)]
struct Sender {
    http: Arc<PooledClient>,
    runtime: Handle,
}

type Sending<'s> = Pin<Box<dyn Future<Output = Result<Response<Bytes>, HttpError>> + Send + 's>>;

impl HttpClient for Sender {
    fn send_bytes<'s, 'f>(&'s self, request: Request<Bytes>) -> Sending<'f>
    where
        's: 'f,
        Self: 'f,
    {
        let http = self.http.clone();
        let sent = self.runtime.spawn(async move {
            let mut request = request.map(|body| if body.is_empty() { Body::Empty } else { Body::Full(body) });
            let host = request.uri().authority().map(|host| host.as_str().to_owned()).unwrap_or_default();
            request.headers_mut().insert(http::header::HOST, HeaderValue::from_str(&host)?);
            let response = http.send(request).await.map_err(|error| error.to_string())?;
            let (parts, mut body) = response.into_parts();
            let mut whole = Vec::new();
            while let Some(chunk) = body.next().await {
                whole.extend_from_slice(&chunk?);
            }
            Ok(Response::from_parts(parts, Bytes::from(whole)))
        });
        Box::pin(async move { sent.await? })
    }
}
