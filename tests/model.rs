//! Any sequence of requests and answers, beside a slow, obvious reading of RFC 9111: the proxy serves what that allows,
//! and asks the upstream exactly when that says so.

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

/// A little more than whole seconds pass between two steps, so that nothing depends on how quick the test is.
const MORE: u64 = 40;

/// What the upstream answers to the next request, should it be asked.
#[derive(Debug, Clone)]
struct Says {
    /// None: it breaks the connection.
    status: Option<u16>,
    directives: Vec<&'static str>,
    /// It names its version, and compares it with the one it is asked about.
    etag: bool,
    varies: bool,
    /// What it is about has changed since the last answer.
    changed: bool,
}

#[derive(Debug, Clone)]
struct Step {
    seconds_later: u64,
    post: bool,
    url: usize,
    variant: Option<&'static str>,
    directive: Option<&'static str>,
    says: Says,
}

fn says() -> impl Strategy<Value = Says> {
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
        prop::sample::select(vec![Some(200), Some(200), Some(200), Some(404), Some(302), Some(599), Some(503), None]);
    (status, directives, any::<bool>(), any::<bool>(), any::<bool>())
        .prop_map(|(status, directives, etag, varies, changed)| Says { status, directives, etag, varies, changed })
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
    (0u64..4, prop::bool::weighted(0.1), 0usize..2, variant, directive, says()).prop_map(
        |(seconds_later, post, url, variant, directive, says)| Step {
            seconds_later,
            post,
            url,
            variant,
            directive,
            says,
        },
    )
}

// ---------------------------------------------------------------- the upstream

#[derive(Debug, Default)]
struct Origin {
    says: Mutex<Option<Says>>,
    versions: Mutex<HashMap<String, u32>>,
    asked: Mutex<u32>,
}

impl UpstreamClient for Origin {
    fn send(&self, request: Request<Body>) -> Sending<'_> {
        *self.asked.lock().expect("no panic") += 1;
        let says = self.says.lock().expect("no panic").clone().expect("a script");
        let mut versions = self.versions.lock().expect("no panic");
        let version = versions.entry(request.uri().path().to_owned()).or_default();
        *version += u32::from(says.changed);
        let etag = format!("\"{version}\"");
        let Some(status) = says.status else {
            let broken = SendError::unanswered(Failure::Connect, "broken");
            return Box::pin(std::future::ready(Err(broken)));
        };
        let known = request.headers().get("if-none-match").is_some_and(|tag| tag.as_bytes() == etag.as_bytes());
        let not_modified = says.etag && known && status == 200;
        let body = if not_modified { Body::Empty } else { Body::Full(format!("{status} {version}").into()) };
        let mut response = Response::new(body);
        *response.status_mut() = StatusCode::from_u16(if not_modified { 304 } else { status }).expect("a status");
        let headers = response.headers_mut();
        if !says.directives.is_empty() {
            headers.insert("cache-control", HeaderValue::try_from(says.directives.join(", ")).expect("a value"));
        }
        if says.etag {
            headers.insert("etag", HeaderValue::try_from(etag).expect("a value"));
        }
        if says.varies {
            headers.insert("vary", HeaderValue::from_static("x-v"));
        }
        Box::pin(std::future::ready(Ok(response)))
    }
}

// ---------------------------------------------------------------- the model

/// One stored answer, as RFC 9111 speaks of it.
#[derive(Debug, Clone)]
struct Stored {
    body: String,
    status: u16,
    directives: Vec<&'static str>,
    etag: Option<u32>,
    /// The value of X-V it is for, if it varies.
    #[allow(clippy::option_option)] // it need not vary, and X-V need not be there
    variant: Option<Option<&'static str>>,
    /// In milliseconds.
    came: u64,
}

/// All that is stored, by URL, the newest first.
#[derive(Debug, Default)]
struct Model {
    now: u64,
    versions: HashMap<usize, u32>,
    stored: HashMap<usize, Vec<Stored>>,
}

/// What a client gets, and whether the upstream is asked for it.
#[derive(Debug, PartialEq, Eq)]
struct Outcome {
    status: u16,
    body: Option<String>,
    asks: bool,
}

impl Stored {
    /// §4.2.1
    fn lifetime(&self) -> Option<u64> {
        let number = |name: &str| self.directives.iter().filter_map(|d| d.strip_prefix(name)?.parse().ok()).min();
        number("s-maxage=").or_else(|| number("max-age="))
    }

    fn says(&self, directive: &str) -> bool {
        self.directives.contains(&directive)
    }

    /// §3
    fn may_be_stored(&self) -> bool {
        let understood = self.status != 599;
        let forbidden = self.says("no-store") && !self.says("must-understand");
        let explicit = self.lifetime().is_some();
        let by_default = matches!(self.status, 200 | 404);
        (understood || !self.says("must-understand"))
            && !forbidden
            && !self.says("private")
            && (explicit || by_default && self.etag.is_some())
            // Without use for anybody it is not kept: stale at once, and neither to be validated nor served stale.
            && (self.lifetime().is_some_and(|lifetime| lifetime > 0) || self.etag.is_some() || self.may_be_served_stale())
    }

    /// §4.2.4
    fn may_be_served_stale(&self) -> bool {
        !["must-revalidate", "proxy-revalidate", "no-cache"].iter().any(|directive| self.says(directive))
            && !self.directives.iter().any(|directive| directive.starts_with("s-maxage"))
            && self.status < 500
    }

    /// §4
    fn satisfies(&self, request: Option<&str>, now: u64) -> bool {
        let (age, lifetime) = (now - self.came, self.lifetime().unwrap_or(0) * 1000);
        let fresh = age < lifetime && !self.says("no-cache");
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
        self.now += step.seconds_later * 1000 + MORE;
        let selects = |stored: &Stored| stored.variant.is_none_or(|value| value == step.variant);
        let selected = self.stored.get(&step.url).and_then(|all| all.iter().find(|one| selects(one))).cloned();
        let directive = step.directive.filter(|_| !step.post);
        let from_store =
            |stored: &Stored| Outcome { status: stored.status, body: Some(stored.body.clone()), asks: false };
        if !step.post && directive != Some("no-store") {
            match &selected {
                Some(stored) if stored.satisfies(directive, self.now) => return from_store(stored),
                _ if directive == Some("only-if-cached") => return Outcome { status: 504, body: None, asks: false },
                _ => {}
            }
        }
        let version = self.versions.entry(step.url).or_default();
        *version += u32::from(step.says.changed);
        let version = *version;
        let Some(status) = step.says.status else {
            // §4.2.4: disconnected.
            let stale =
                selected.filter(|stored| !step.post && directive != Some("no-store") && stored.may_be_served_stale());
            if step.post {
                // Nobody knows what was done: RFC 9110 §9.2.1 lets a cache be careful.
                self.stored.remove(&step.url);
            }
            return match stale {
                Some(stored) => Outcome { asks: true, ..from_store(&stored) },
                None => Outcome { status: 502, body: None, asks: true },
            };
        };
        let came = Stored {
            body: format!("{status} {version}"),
            status,
            directives: step.says.directives.clone(),
            etag: step.says.etag.then_some(version),
            variant: step.says.varies.then_some(step.variant),
            came: self.now,
        };
        let relayed = Outcome { status, body: Some(came.body.clone()), asks: true };
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
        // §4.3.4: a 304 is the stored answer with new fields.
        let validated =
            selected.as_ref().filter(|stored| stored.etag == Some(version) && step.says.etag && status == 200);
        let came = match validated {
            Some(stored) => Stored {
                body: stored.body.clone(),
                status: stored.status,
                directives: if came.directives.is_empty() { stored.directives.clone() } else { came.directives },
                variant: if step.says.varies { came.variant } else { stored.variant.map(|_| step.variant) },
                ..came
            },
            None => came,
        };
        let outcome = Outcome { status: came.status, body: Some(came.body.clone()), asks: true };
        let failure = status == 503;
        if failure {
            // A failure that does not say for how long it is good changes nothing, nor does one while something better is
            // fresh (the client asked for what is fresher still).
            let better = selected.is_some_and(|stored| stored.satisfies(None, self.now));
            if better || !came.may_be_stored() || came.lifetime().unwrap_or(0) == 0 {
                return outcome;
            }
        }
        let all = self.stored.entry(step.url).or_default();
        if came.may_be_stored() {
            all.retain(|one| one.variant != came.variant);
            all.insert(0, came);
        } else {
            // A definitive answer displaces what was stored for this request.
            all.retain(|one| !selects(one));
        }
        outcome
    }
}

// ---------------------------------------------------------------- the two, side by side

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

/// Found by chance: a failure that says how long it is good, while something better is fresh.
#[test]
fn cacheable_503_does_not_replace_a_fresh_entry() {
    let says = |status, directives: &[&'static str]| Says {
        status: Some(status),
        directives: directives.to_vec(),
        etag: false,
        varies: false,
        changed: false,
    };
    let step =
        |seconds_later, directive, says| Step { seconds_later, post: false, url: 0, variant: None, directive, says };
    let steps = [
        step(0, None, says(200, &["max-age=5"])),
        step(3, Some("max-age=2"), says(503, &["s-maxage=3"])),
        step(0, Some("max-age=2"), says(200, &[])),
    ];
    side_by_side(&steps).expect("no difference");
}

fn side_by_side(steps: &[Step]) -> Result<(), TestCaseError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(play(steps))
}

async fn play(steps: &[Step]) -> Result<(), TestCaseError> {
    let text = "[[upstream]]\nurl = \"http://127.0.0.1:9\"\n";
    let config = config::from_text("model", text, Path::new(".")).expect("it is good");
    let (clock, origin) = (Clock::start(), Arc::new(Origin::default()));
    let client: Arc<dyn UpstreamClient> = origin.clone();
    let built = app::proxies_with(config, clock.clone(), &|_, _| Ok(client.clone()));
    let proxy: Proxy = built.expect("the configuration is valid").1.remove(0);
    let mut model = Model::default();
    for (number, step) in steps.iter().enumerate() {
        clock.turn(Duration::from_millis(step.seconds_later * 1000 + MORE));
        *origin.says.lock().expect("no panic") = Some(step.says.clone());
        let before = *origin.asked.lock().expect("no panic");
        let response = proxy.handle(request(step), None).response().await;
        let status = response.status().as_u16();
        let mut body = response.into_body();
        let mut whole = Vec::new();
        while let Some(Ok(chunk)) = body.next().await {
            whole.extend_from_slice(&chunk);
        }
        let asks = *origin.asked.lock().expect("no panic") > before;
        let expected = model.step(step);
        let body = expected.body.is_some().then(|| String::from_utf8_lossy(&whole).into_owned());
        prop_assert_eq!(Outcome { status, body, asks }, expected, "at step {}: {:?}", number, step);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn responses_and_upstream_requests_match_the_rfc_9111_model(steps in prop::collection::vec(step(), 1..20)) {
        side_by_side(&steps)?;
    }
}
