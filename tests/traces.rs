//! OpenTelemetry traces, exported by a sidecar process over OTLP/HTTP.

use std::sync::{Arc, Mutex};

use nix::sys::signal::Signal;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader};

use crate::support::process::command;
use crate::support::redis::folder;
use crate::support::{Origin, Redis, Reply, get, soon, until};

const CALLER: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

/// An exported span.
#[derive(Debug, Clone)]
struct Span {
    name: String,
    id: String,
    parent: String,
    trace: String,
    attributes: String,
}

/// Returns all spans of the exports.
fn spans(exports: &[Value]) -> Vec<Span> {
    let lists = |value: &Value, name: &str| value[name].as_array().cloned().unwrap_or_default();
    let resources = exports.iter().flat_map(|exports| lists(exports, "resourceSpans"));
    let scopes = resources.flat_map(|resource| lists(&resource, "scopeSpans"));
    let field = |span: &Value, name: &str| span[name].as_str().unwrap_or_default().to_owned();
    let span = |span: Value| Span {
        name: field(&span, "name"),
        id: field(&span, "spanId"),
        parent: field(&span, "parentSpanId"),
        trace: field(&span, "traceId"),
        attributes: span["attributes"].to_string(),
    };
    scopes.flat_map(|scope| lists(&scope, "spans")).map(span).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn request_trace_contains_lookup_wait_and_upstream_spans() {
    let exports = Arc::new(Mutex::new(Vec::new()));
    let kept = exports.clone();
    let collector = Origin::start(move |ask| {
        let body: Value = serde_json::from_slice(&ask.body).expect("OTLP as JSON");
        kept.lock().expect("no panic").push(body);
        assert_eq!((ask.method.as_str(), ask.target.as_str()), ("POST", "/v1/traces"));
        Reply::new(200, "{}").header("Content-Type", "application/json")
    })
    .await;
    let redis = Redis::start();
    let origin = Origin::start(|_| Reply::fresh(60, "x")).await;
    let file = folder("traces").join("sidecache.toml");
    let text = crate::support::sidecar::text(origin.address, "", &redis.patient_table());
    std::fs::write(&file, text).expect("writable");
    let mut child = command(&["--config", &file.display().to_string()])
        .env("OTEL_EXPORTER_OTLP_ENDPOINT", format!("http://{}", collector.address))
        .env("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json")
        .env("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
        .env("OTEL_BSP_SCHEDULE_DELAY", "100")
        .spawn()
        .expect("the program starts");
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    let mut address = async |of: &str| loop {
        let line = soon("a line", lines.next_line()).await.expect("readable").expect("another line");
        if let Some((_, rest)) = line.split_once(of) {
            break rest.split(' ').next().and_then(|word| word.parse().ok()).expect("an address");
        }
    };
    let api: std::net::SocketAddr = address("upstream=api addr=").await;
    let admin: std::net::SocketAddr = address("admin addr=").await;
    let in_fleet = async {
        loop {
            let health = get(admin, "/health", &[]).await.json();
            let redis = &health["components"]["redis"];
            if redis["status"] == "ok" && redis["invalidation_lag_ms"].as_u64().is_some_and(|lag| lag < 2000) {
                break;
            }
        }
    };
    soon("the sidecar uses Redis", in_fleet).await;
    get(api, "/x?secret=hidden", &[("traceparent", CALLER)]).await;
    assert!(get(api, "/x?secret=hidden", &[]).await.is_hit());
    let all = until("both requests are exported", || {
        let all = spans(&exports.lock().expect("no panic"));
        (all.iter().filter(|span| span.name == "request").count() == 2).then_some(all)
    })
    .await;
    let of =
        |name: &'static str| all.iter().filter(move |span| span.name == name && span.trace == CALLER[3..35]).cloned();
    let request = of("request").next().expect("the caller's trace");
    assert_eq!(request.parent, CALLER[36..52]);
    assert!(request.attributes.contains("fwd=uri-miss; stored") && request.attributes.contains("/x"), "{request:?}");
    let tiers: Vec<String> = of("lookup").map(|span| span.attributes).collect();
    assert!(tiers.iter().any(|tier| tier.contains("memory")), "{tiers:?}");
    assert!(tiers.iter().any(|tier| tier.contains("redis")), "{tiers:?}");
    assert_eq!(of("wait").next().map(|span| span.parent), Some(request.id.clone()));
    let upstream = of("upstream").next().expect("an upstream span");
    let forwarded = origin.asks()[0].header("traceparent").expect("a traceparent").to_owned();
    assert_eq!(forwarded, format!("00-{}-{}-01", request.trace, upstream.id));
    // The hit has its own trace with a lookup span and no upstream span.
    let hit = all.iter().find(|span| span.name == "request" && span.trace != request.trace).expect("the hit");
    let names: Vec<&str> = all.iter().filter(|span| span.trace == hit.trace).map(|span| span.name.as_str()).collect();
    assert!(names.contains(&"lookup") && !names.contains(&"upstream"), "{names:?}");
    let exported = format!("{:?}", exports.lock().expect("no panic"));
    assert!(
        !exported.contains("hidden") && exported.contains("sidecache") && exported.contains("deployment.environment")
    );
    // The remaining spans are exported before the process exits.
    get(api, "/last", &[]).await;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(child.id().expect("running").cast_signed()), Signal::SIGTERM)
        .expect("our own process");
    soon("the process exits", child.wait()).await.expect("our own process");
    assert!(format!("{:?}", exports.lock().expect("no panic")).contains("/last"));
}
