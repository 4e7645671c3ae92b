//! Model-based test: random sequences of requests and upstream responses, compared with a simple model of RFC 9111.
//! The proxy must return the same responses and send the same upstream requests as the model.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use http::{HeaderValue, Request, Response, StatusCode};
use proptest::prelude::*;
use sidecache::body::Body;
use sidecache::clock::Clock;
use sidecache::policy::outcome::Failure;
use sidecache::proxy::Proxy;
use sidecache::upstream::{SendError, Sending, UpstreamClient};
use sidecache::{app, config};

/// Milliseconds added to the whole seconds between two steps, so that the result does not depend on execution time.
const EXTRA_MILLIS: u64 = 40;

/// The upstream's reaction to the next request.
#[derive(Debug, Clone)]
struct Scripted {
    /// `None` means that the connection breaks.
    status: Option<u16>,
    directives: Vec<&'static str>,
    /// Whether the response has an `ETag`, and If-None-Match is evaluated.
    etag: bool,
    varies: bool,
    /// Whether the resource has changed since the last response.
    changed: bool,
}

#[derive(Debug, Clone)]
struct Step {
    seconds_later: u64,
    post: bool,
    url: usize,
    variant: Option<&'static str>,
    directive: Option<&'static str>,
    scripted: Scripted,
}

fn scripted() -> impl Strategy<Value = Scripted> {
    let directives = prop::sample::subsequence(
        vec![
            "max-age=5",
            "s-maxage=3",
            "max-age=0",
            "no-store",
            "private",
            "no-cache",
            "must-revalidate",
            "proxy-revalidate",
            "must-understand",
            "public",
        ],
        0..4,
    );
    let status =
        prop::sample::select(vec![Some(200), Some(200), Some(200), Some(404), Some(302), Some(499), Some(503), None]);
    (status, directives, any::<bool>(), any::<bool>(), any::<bool>()).prop_map(
        |(status, directives, etag, varies, changed)| Scripted { status, directives, etag, varies, changed },
    )
}

fn step() -> impl Strategy<Value = Step> {
    let directive = prop::sample::select(vec![
        None,
        None,
        None,
        Some("no-cache"),
        Some("no-store"),
        Some("max-age=2"),
        Some("max-age=0"),
        Some("min-fresh=2"),
        Some("only-if-cached"),
    ]);
    let variant = prop::sample::select(vec![None, Some("a"), Some("b")]);
    (0u64..4, prop::bool::weighted(0.1), 0usize..2, variant, directive, scripted()).prop_map(
        |(seconds_later, post, url, variant, directive, scripted)| Step {
            seconds_later,
            post,
            url,
            variant,
            directive,
            scripted,
        },
    )
}

// ---------------------------------------------------------------- the upstream

#[derive(Debug, Default)]
struct Origin {
    scripted: Mutex<Option<Scripted>>,
    versions: Mutex<HashMap<String, u32>>,
    requests: Mutex<u32>,
}

impl UpstreamClient for Origin {
    fn send(&self, request: Request<Body>) -> Sending<'_> {
        *self.requests.lock().expect("no panic") += 1;
        let scripted = self.scripted.lock().expect("no panic").clone().expect("a scripted response");
        let mut versions = self.versions.lock().expect("no panic");
        let version = versions.entry(request.uri().path().to_owned()).or_default();
        *version += u32::from(scripted.changed);
        let etag = format!("\"{version}\"");
        let Some(status) = scripted.status else {
            let broken = SendError::unanswered(Failure::Connect, "broken");
            return Box::pin(std::future::ready(Err(broken)));
        };
        let known = request.headers().get("if-none-match").is_some_and(|tag| tag.as_bytes() == etag.as_bytes());
        let not_modified = scripted.etag && known && status == 200;
        let body = if not_modified { Body::Empty } else { Body::Full(format!("{status} {version}").into()) };
        let mut response = Response::new(body);
        *response.status_mut() = StatusCode::from_u16(if not_modified { 304 } else { status }).expect("a status");
        let headers = response.headers_mut();
        if !scripted.directives.is_empty() {
            headers.insert("cache-control", HeaderValue::try_from(scripted.directives.join(", ")).expect("a value"));
        }
        if scripted.etag {
            headers.insert("etag", HeaderValue::try_from(etag).expect("a value"));
        }
        if scripted.varies {
            headers.insert("vary", HeaderValue::from_static("x-v"));
        }
        Box::pin(std::future::ready(Ok(response)))
    }
}

// ---------------------------------------------------------------- the model

/// A stored response.
#[derive(Debug, Clone)]
struct Stored {
    body: String,
    status: u16,
    directives: Vec<&'static str>,
    etag: Option<u32>,
    /// The value of X-V that selects this response, if it has Vary.
    #[allow(clippy::option_option)] // both Vary and X-V are optional
    variant: Option<Option<&'static str>>,
    /// The time of receipt, in milliseconds.
    received: u64,
}

/// The model of the cache: stored responses by URL, the newest first.
#[derive(Debug, Default)]
struct Model {
    now: u64,
    versions: HashMap<usize, u32>,
    stored: HashMap<usize, Vec<Stored>>,
}

/// The response to the client, and whether a request was sent upstream.
#[derive(Debug, PartialEq, Eq)]
struct Outcome {
    status: u16,
    body: Option<String>,
    forwarded: bool,
}

impl Stored {
    /// §4.2.1
    fn lifetime(&self) -> Option<u64> {
        let number = |name: &str| self.directives.iter().filter_map(|d| d.strip_prefix(name)?.parse().ok()).min();
        number("s-maxage=").or_else(|| number("max-age="))
    }

    fn has(&self, directive: &str) -> bool {
        self.directives.contains(&directive)
    }

    /// §3
    fn may_be_stored(&self) -> bool {
        let understood = self.status != 499;
        let forbidden = self.has("no-store") && !self.has("must-understand");
        let explicit = self.lifetime().is_some();
        let by_default = matches!(self.status, 200 | 404);
        (understood || !self.has("must-understand"))
            && !forbidden
            && !self.has("private")
            && (explicit || by_default && self.etag.is_some())
            // A response that is stale at once, has no validator and may not be served stale is not stored.
            && (self.lifetime().is_some_and(|lifetime| lifetime > 0) || self.etag.is_some() || self.may_be_served_stale())
    }

    /// §4.2.4
    fn may_be_served_stale(&self) -> bool {
        !["must-revalidate", "proxy-revalidate", "no-cache"].iter().any(|directive| self.has(directive))
            && !self.directives.iter().any(|directive| directive.starts_with("s-maxage"))
            && self.status < 500
    }

    /// §4
    fn satisfies(&self, request: Option<&str>, now: u64) -> bool {
        let (age, lifetime) = (now - self.received, self.lifetime().unwrap_or(0) * 1000);
        let fresh = age < lifetime && !self.has("no-cache");
        fresh
            && match request {
                None | Some("only-if-cached") => true,
                Some("max-age=2") => age / 1000 <= 2,
                Some("min-fresh=2") => lifetime >= age + 2000,
                Some(_) => false,
            }
    }
}

impl Model {
    fn step(&mut self, step: &Step) -> Outcome {
        self.now += step.seconds_later * 1000 + EXTRA_MILLIS;
        let selects = |stored: &Stored| stored.variant.is_none_or(|value| value == step.variant);
        let selected = self.stored.get(&step.url).and_then(|all| all.iter().find(|one| selects(one))).cloned();
        let directive = step.directive.filter(|_| !step.post);
        let from_store =
            |stored: &Stored| Outcome { status: stored.status, body: Some(stored.body.clone()), forwarded: false };
        if !step.post && directive != Some("no-store") {
            match &selected {
                Some(stored) if stored.satisfies(directive, self.now) => return from_store(stored),
                _ if directive == Some("only-if-cached") => {
                    return Outcome { status: 504, body: None, forwarded: false };
                }
                _ => {}
            }
        }
        let version = self.versions.entry(step.url).or_default();
        *version += u32::from(step.scripted.changed);
        let version = *version;
        let Some(status) = step.scripted.status else {
            // §4.2.4: disconnected.
            let stale =
                selected.filter(|stored| !step.post && directive != Some("no-store") && stored.may_be_served_stale());
            if step.post {
                // The write may have been executed, so the URL is invalidated (RFC 9110 §9.2.1).
                self.stored.remove(&step.url);
            }
            return match stale {
                Some(stored) => Outcome { forwarded: true, ..from_store(&stored) },
                None => Outcome { status: 502, body: None, forwarded: true },
            };
        };
        let received = Stored {
            body: format!("{status} {version}"),
            status,
            directives: step.scripted.directives.clone(),
            etag: step.scripted.etag.then_some(version),
            variant: step.scripted.varies.then_some(step.variant),
            received: self.now,
        };
        let relayed = Outcome { status, body: Some(received.body.clone()), forwarded: true };
        if step.post {
            // §4.4
            if (200..400).contains(&status) {
                self.stored.remove(&step.url);
            }
            return relayed;
        }
        if directive == Some("no-store") {
            return relayed;
        }
        // §4.3.4: a 304 updates the fields of the stored response.
        let validated =
            selected.as_ref().filter(|stored| stored.etag == Some(version) && step.scripted.etag && status == 200);
        let received = match validated {
            Some(stored) => Stored {
                body: stored.body.clone(),
                status: stored.status,
                directives: if received.directives.is_empty() {
                    stored.directives.clone()
                } else {
                    received.directives
                },
                variant: if step.scripted.varies { received.variant } else { stored.variant.map(|_| step.variant) },
                ..received
            },
            None => received,
        };
        let outcome = Outcome { status: received.status, body: Some(received.body.clone()), forwarded: true };
        let failure = status == 503;
        if failure {
            // A 503 without a freshness lifetime changes nothing, nor does one that arrives while the stored response
            // is fresh (the request demanded a fresher one).
            let better = selected.is_some_and(|stored| stored.satisfies(None, self.now));
            if better || !received.may_be_stored() || received.lifetime().unwrap_or(0) == 0 {
                return outcome;
            }
        }
        let all = self.stored.entry(step.url).or_default();
        if received.may_be_stored() {
            all.retain(|one| one.variant != received.variant);
            all.insert(0, received);
        } else {
            // A response that is not stored removes the stored one for this request.
            all.retain(|one| !selects(one));
        }
        outcome
    }
}

// ---------------------------------------------------------------- the comparison

fn request(step: &Step) -> Request<Body> {
    let mut request = Request::builder().uri(format!("/{}", step.url)).header("host", "127.0.0.1:9");
    request = request.method(if step.post { "POST" } else { "GET" });
    if let Some(variant) = step.variant {
        request = request.header("x-v", variant);
    }
    if let Some(directive) = step.directive {
        request = request.header("cache-control", directive);
    }
    request.body(Body::Empty).expect("a request")
}

/// Regression: a 503 with a freshness lifetime arrives while the stored response is fresh.
#[test]
fn cacheable_503_does_not_replace_a_fresh_entry() {
    let scripted = |status, directives: &[&'static str]| Scripted {
        status: Some(status),
        directives: directives.to_vec(),
        etag: false,
        varies: false,
        changed: false,
    };
    let step = |seconds_later, directive, scripted| Step {
        seconds_later,
        post: false,
        url: 0,
        variant: None,
        directive,
        scripted,
    };
    let steps = [
        step(0, None, scripted(200, &["max-age=5"])),
        step(3, Some("max-age=2"), scripted(503, &["s-maxage=3"])),
        step(0, Some("max-age=2"), scripted(200, &[])),
    ];
    compare(&steps).expect("the model and the proxy agree");
}

fn compare(steps: &[Step]) -> Result<(), TestCaseError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(run_steps(steps))
}

async fn run_steps(steps: &[Step]) -> Result<(), TestCaseError> {
    // Without pauses after failures, which RFC 9111 does not know.
    let text = "[[upstream]]\nurl = \"http://127.0.0.1:9\"\n[upstream.backoff]\nbase = \"0s\"\ncap = \"0s\"\n";
    let config = config::from_text("model", text, Path::new(".")).expect("a valid configuration");
    let (clock, origin) = (Clock::start(), Arc::new(Origin::default()));
    let client: Arc<dyn UpstreamClient> = origin.clone();
    let built = app::proxies_with(config, clock.clone(), &|_, _| Ok(client.clone()));
    let proxy: Proxy = built.expect("the configuration is valid").1.remove(0);
    let mut model = Model::default();
    for (number, step) in steps.iter().enumerate() {
        clock.turn(Duration::from_millis(step.seconds_later * 1000 + EXTRA_MILLIS));
        *origin.scripted.lock().expect("no panic") = Some(step.scripted.clone());
        let before = *origin.requests.lock().expect("no panic");
        let response = proxy.handle(request(step), None).response().await;
        let status = response.status().as_u16();
        let mut body = response.into_body();
        let mut whole = Vec::new();
        while let Some(Ok(chunk)) = body.next().await {
            whole.extend_from_slice(&chunk);
        }
        let forwarded = *origin.requests.lock().expect("no panic") > before;
        let expected = model.step(step);
        let body = expected.body.is_some().then(|| String::from_utf8_lossy(&whole).into_owned());
        prop_assert_eq!(Outcome { status, body, forwarded }, expected, "at step {}: {:?}", number, step);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn responses_and_upstream_requests_match_the_rfc_9111_model(steps in prop::collection::vec(step(), 1..20)) {
        compare(&steps)?;
    }
}
