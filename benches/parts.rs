//! Microbenchmarks of a cache hit: request scanner, cache key, memory lookup, freshness evaluation, metrics, and the
//! whole handler. `cargo bench --bench parts`.

use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use http::{HeaderMap, Request, Response};
use sidecache::app;
use sidecache::body::Body;
use sidecache::clock::Clock;
use sidecache::config;
use sidecache::policy::http::freshness::{RequestDirectives, evaluate};
use sidecache::policy::invalidation::ledger::InvalidationState;
use sidecache::policy::outcome::Outcome;
use sidecache::policy::routing::cache_key::{KeyParts, KeySecret};
use sidecache::proxy::{Handled, Proxy, SharedState};
use sidecache::server::framing::RequestScanner;
use sidecache::telemetry::CompletedRequest;
use sidecache::upstream::{Sending, UpstreamClient};

const HEAD: &[u8] =
    b"GET /products/7.json?fields=id HTTP/1.1\r\nHost: 127.0.0.1:18080\r\nAccept: application/json\r\n\
    User-Agent: shop-app/1.2\r\nAccept-Encoding: gzip\r\nAuthorization: Bearer 0123456789abcdef\r\n\r\n";

#[derive(Debug)]
struct FixedResponse;

impl UpstreamClient for FixedResponse {
    fn send(&self, _: Request<Body>) -> Sending<'_> {
        let mut response = Response::new(Body::Full(vec![b'x'; 1024].into()));
        for (name, value) in [("content-type", "application/json"), ("cache-control", "max-age=36000, public")] {
            response.headers_mut().insert(name, http::HeaderValue::from_static(value));
        }
        Box::pin(std::future::ready(Ok(response)))
    }
}

fn request() -> Request<Body> {
    let lines = [
        ("host", "127.0.0.1:18080"),
        ("accept", "application/json"),
        ("user-agent", "shop-app/1.2"),
        ("accept-encoding", "gzip"),
        ("authorization", "Bearer 0123456789abcdef"),
    ];
    let mut request = Request::builder().uri("/products/7.json?fields=id");
    for (name, value) in lines {
        request = request.header(name, value);
    }
    request.body(Body::Empty).expect("a request")
}

/// Returns a proxy that has the response in memory, and its shared state.
fn warm() -> (SharedState, Proxy) {
    let text = "[[upstream]]\nurl = \"http://127.0.0.1:9\"\n";
    let config = config::from_text("bench", text, Path::new(".")).expect("a valid configuration");
    let built = app::proxies_with(config, Clock::start(), &|_, _| Ok(Arc::new(FixedResponse)));
    let (shared, mut proxies) = built.expect("the configuration is valid");
    let proxy = proxies.remove(0);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let mut body = proxy.handle(request(), None).response().await.into_body();
        while body.next().await.is_some() {}
    });
    (shared, proxy)
}

fn parts(criterion: &mut Criterion) {
    let (shared, proxy) = warm();
    criterion.bench_function("scanner: head with 5 fields", |b| {
        let mut scanner = RequestScanner::new(65536);
        b.iter(|| scanner.scan(black_box(HEAD)).passed);
    });
    let minimal = b"GET /1024/p HTTP/1.1\r\nHost: 127.0.0.1:7002\r\n\r\n";
    criterion.bench_function("scanner: minimal GET", |b| {
        let mut scanner = RequestScanner::new(65536);
        b.iter(|| scanner.scan(black_box(minimal)).passed);
    });
    let example = request();
    let rule = proxy.upstream.router.rules()[0].clone();
    let secret = KeySecret([7; 32]);
    let parts = |headers: &'static HeaderMap| KeyParts {
        upstream: proxy.upstream.id,
        authority: None,
        path: "/products/7.json",
        query: Some("fields=id"),
        headers,
    };
    let (with, mut without) = (example.headers().clone(), example.headers().clone());
    without.remove("authorization");
    let (with, without): (&'static HeaderMap, &'static HeaderMap) =
        (Box::leak(with.into()), Box::leak(without.into()));
    criterion.bench_function("cache key without a credential", |b| {
        b.iter(|| rule.key.cache_key(&secret, black_box(&parts(without))).expect("a key"));
    });
    criterion.bench_function("cache key with a credential (keyed digest)", |b| {
        b.iter(|| rule.key.cache_key(&secret, black_box(&parts(with))).expect("a key"));
    });
    let key = rule.key.cache_key(&shared.key_secret.load(), &parts(with)).expect("a key");
    let resource = shared.memory.get(&key).expect("an entry");
    criterion.bench_function("memory lookup", |b| {
        b.iter(|| shared.memory.get(black_box(&key)).expect("an entry"));
    });
    let entry = resource.select(with).expect("a matching variant").clone();
    let now = shared.clock.now();
    criterion.bench_function("freshness evaluation", |b| {
        b.iter(|| evaluate(black_box(&entry), InvalidationState::Valid, &RequestDirectives::default(), now));
    });
    let outcome = Outcome::Hit { ttl: 60 };
    let took = Duration::from_micros(12);
    criterion.bench_function("metrics of a hit: outcome, latency, rule", |b| {
        b.iter(|| {
            proxy.upstream.metrics.record_response(black_box(&outcome), took);
            rule.counters.count(black_box(&outcome));
        });
    });
    let answered = CompletedRequest {
        upstream: &proxy.upstream.name,
        rule: Some(&rule),
        request: (&example).into(),
        status: http::StatusCode::OK,
        now,
        took,
        request_id: None,
        identity: None,
    };
    criterion.bench_function("telemetry of a hit: counters, no access log, recent requests", |b| {
        b.iter(|| shared.telemetry.record(black_box(&outcome), black_box(&answered)));
    });
    criterion.bench_function("handler: a hit with its response", |b| {
        b.iter_batched(
            request,
            |request| match proxy.handle(request, None) {
                Handled::Now(response) => response,
                Handled::Later(_) => unreachable!("it is a hit"),
            },
            criterion::BatchSize::SmallInput,
        );
    });
}

criterion_group!(benches, parts);
criterion_main!(benches);
