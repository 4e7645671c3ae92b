//! Request coalescing: one upstream fetch per cache key, leaders and followers.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use http::{Request, Response};
use sidecache::body::Body;
use sidecache::upstream::{Sending, UpstreamClient};
use tokio::task::JoinSet;

use crate::support::{Client, Gate, Origin, Reply, Sidecar, get, until};

/// Starts `count` GETs concurrently.
fn burst(sidecar: &Sidecar, count: usize, target: &'static str) -> JoinSet<crate::support::Answer> {
    let mut requests = JoinSet::new();
    for _ in 0..count {
        requests.spawn(get(sidecar.address, target, &[]));
    }
    requests
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_concurrent_misses_make_one_upstream_request() {
    let gate = Gate::new();
    let held = gate.clone();
    let origin = Origin::start(move |_| Reply::fresh(60, "shared").after(&held)).await;
    let sidecar = Sidecar::before(&origin, "");
    let requests = burst(&sidecar, 200, "/");
    origin.wait_for_requests(1).await;
    gate.open();
    let answers = requests.join_all().await;
    assert!(answers.iter().all(|a| a.status == 200 && a.text() == "shared"));
    assert_eq!(origin.count(), 1);
    let collapsed = answers.iter().filter(|a| a.cache_status().contains("collapsed")).count();
    let leaders = answers.iter().filter(|a| a.cache_status() == "sidecache; fwd=uri-miss; stored").count();
    assert_eq!((leaders, collapsed + answers.iter().filter(|a| a.is_hit()).count()), (1, 199));
}

#[tokio::test(flavor = "multi_thread")]
async fn followers_receive_the_body_while_it_is_fetched() {
    let gate = Gate::new();
    let held = gate.clone();
    let origin = Origin::start(move |_| Reply::fresh(60, "first half second half").halfway(&held)).await;
    let sidecar = Sidecar::before(&origin, "");
    let mut clients = Vec::new();
    for _ in 0..2 {
        let mut client = Client::connect(sidecar.address).await;
        client.ask("GET", "/", &[], b"").await;
        let seen = loop {
            let have = client.read_some(0).await.len();
            let bytes = client.read_some(have + 1).await;
            if bytes.windows(10).any(|w| w == b"first half") {
                break true;
            }
        };
        assert!(seen);
        clients.push(client);
    }
    gate.open();
    for mut client in clients {
        assert_eq!(client.answer_to("GET").await.expect("a response").text(), "first half second half");
    }
    assert_eq!(origin.count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn uncacheable_response_releases_followers_at_its_head_and_is_not_coalesced_again() {
    let heads = [Gate::new(), Gate::new(), Gate::new()];
    let gates = heads.clone();
    // The first request alone, then the other 19 together, then all 20 of the second burst together.
    let origin = Origin::start(move |ask| {
        let gate = match ask.number {
            0 => &gates[0],
            1..20 => &gates[1],
            _ => &gates[2],
        };
        Reply::new(200, "mine").header("Cache-Control", "no-store").after(gate)
    })
    .await;
    let sidecar = Sidecar::before(&origin, "[upstream.timeouts]\ndeadline = \"20s\"\n");
    let first = burst(&sidecar, 20, "/");
    origin.wait_for_requests(1).await;
    heads[0].open();
    origin.wait_for_requests(20).await; // the other 19 are sent concurrently
    heads[1].open();
    assert!(first.join_all().await.iter().all(|a| a.status == 200 && a.text() == "mine"));
    let second = burst(&sidecar, 20, "/");
    origin.wait_for_requests(40).await; // all 20 are sent concurrently, without a leader
    heads[2].open();
    assert!(second.join_all().await.iter().all(|a| a.status == 200));
    assert_eq!(origin.count(), 40);
}

#[tokio::test(flavor = "multi_thread")]
async fn disconnected_leader_does_not_fail_its_followers() {
    for reset in [false, true] {
        let gate = Gate::new();
        let held = gate.clone();
        let origin = Origin::start(move |_| Reply::fresh(60, "shared").after(&held)).await;
        let sidecar = Sidecar::before(&origin, "");
        let mut leader = Client::connect(sidecar.address).await;
        leader.ask("GET", "/", &[], b"").await;
        origin.wait_for_requests(1).await;
        let followers = burst(&sidecar, 20, "/");
        if reset {
            leader.reset();
        } else {
            drop(leader);
        }
        gate.open();
        assert!(followers.join_all().await.iter().all(|a| a.text() == "shared"), "reset: {reset}");
        assert_eq!(origin.count(), 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn abandoned_fetch_still_fills_the_cache() {
    let gate = Gate::new();
    let held = gate.clone();
    let origin = Origin::start(move |_| Reply::fresh(60, "late").after(&held)).await;
    let sidecar = Sidecar::before(&origin, "");
    let mut leader = Client::connect(sidecar.address).await;
    leader.ask("GET", "/", &[], b"").await;
    origin.wait_for_requests(1).await;
    drop(leader);
    gate.open();
    until("the response is stored", || (sidecar.shared.memory.usage().entries == 1).then_some(())).await;
    assert!(sidecar.get("/").await.is_hit());
}

/// An upstream client that panics on its first request, when the gate opens.
#[derive(Debug)]
struct PanicsOnce {
    calls: AtomicUsize,
    gate: Gate,
}

impl UpstreamClient for PanicsOnce {
    fn send(&self, _: Request<Body>) -> Sending<'_> {
        let call = self.calls.fetch_add(1, Ordering::SeqCst);
        Box::pin(async move {
            self.gate.wait().await;
            assert!(call > 0, "the first fetch panics, as the test requires");
            let mut response = Response::new(Body::Full("second".into()));
            response.headers_mut().insert("cache-control", http::HeaderValue::from_static("max-age=60"));
            Ok(response)
        })
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn followers_recover_from_a_panicking_leader() {
    let upstream = Arc::new(PanicsOnce { calls: AtomicUsize::new(0), gate: Gate::new() });
    let sidecar = Sidecar::over(upstream.clone(), "");
    let requests = burst(&sidecar, 20, "/");
    until("the first fetch has started", || (upstream.calls.load(Ordering::SeqCst) == 1).then_some(())).await;
    upstream.gate.open();
    assert!(requests.join_all().await.iter().all(|a| a.status == 200 && a.text() == "second"));
    assert_eq!(upstream.calls.load(Ordering::SeqCst), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn upstream_reset_fails_all_followers_once_and_frees_the_key() {
    let gate = Gate::new();
    let held = gate.clone();
    let origin = Origin::start(move |ask| match ask.number {
        0 => Reply::reset().after(&held),
        _ => Reply::fresh(60, "later"),
    })
    .await;
    let sidecar = Sidecar::before(&origin, "");
    let requests = burst(&sidecar, 10, "/");
    origin.wait_for_requests(1).await;
    gate.open();
    let statuses: Vec<u16> = requests.join_all().await.iter().map(|a| a.status).collect();
    assert!(statuses.iter().all(|status| *status == 502 || *status == 200), "{statuses:?}");
    assert_eq!(sidecar.get("/").await.text(), "later");
    assert_eq!(sidecar.shared.coalescer.running(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn followers_of_another_variant_fetch_their_own() {
    let gate = Gate::new();
    let held = gate.clone();
    let origin = Origin::start(move |ask| {
        let language = ask.header("accept-language").unwrap_or("none");
        Reply::fresh(60, language).header("Vary", "Accept-Language").after(&held)
    })
    .await;
    let sidecar = Sidecar::before(&origin, "");
    let mut requests = JoinSet::new();
    for i in 0..30 {
        let (address, language) = (sidecar.address, ["de", "en", "fr"][i % 3]);
        requests.spawn(async move { (language, get(address, "/", &[("Accept-Language", language)]).await) });
    }
    origin.wait_for_requests(1).await;
    gate.open();
    for (language, answer) in requests.join_all().await {
        assert_eq!(answer.text(), language);
    }
    assert_eq!(origin.count(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn truncated_body_fails_for_all_readers_and_is_not_stored() {
    let origin = Origin::start(|ask| match ask.number {
        0 => Reply::fresh(60, vec![b'x'; 1000]).cut_after(500, false),
        _ => Reply::fresh(60, "whole"),
    })
    .await;
    let sidecar = Sidecar::before(&origin, "");
    let mut client = Client::connect(sidecar.address).await;
    client.ask("GET", "/", &[], b"").await;
    let broken = client.answer_to("GET").await;
    assert_eq!(broken.expect("a response").status, 502, "nothing of the truncated body was sent");
    let next = sidecar.get("/").await;
    assert!(next.whole && !next.is_hit() && next.text() == "whole");
}

#[tokio::test(flavor = "multi_thread")]
async fn purge_during_a_fetch_separates_earlier_from_later_requests() {
    let gates = [Gate::new(), Gate::new()];
    let held = gates.clone();
    let origin =
        Origin::start(move |ask| Reply::fresh(60, format!("answer {}", ask.number)).after(&held[ask.number.min(1)]))
            .await;
    let sidecar = Sidecar::before(&origin, "");
    let before = burst(&sidecar, 5, "/");
    origin.wait_for_requests(1).await;
    sidecar.purge(r#"{"all":true}"#).await;
    let after = burst(&sidecar, 5, "/");
    origin.wait_for_requests(2).await;
    gates[0].open();
    gates[1].open();
    assert!(
        after.join_all().await.iter().all(|a| a.text() == "answer 1"),
        "a request after the purge does not join the older fetch"
    );
    assert!(before.join_all().await.len() == 5);
    assert_eq!(sidecar.get("/").await.text(), "answer 1", "the older fetch was not stored");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_variant_is_fetched_while_the_first_body_streams() {
    let gate = Gate::new();
    let held = gate.clone();
    let origin = Origin::start(move |ask| match ask.header("accept-encoding") {
        Some("gzip") => Reply::new(200, "gzip gzip").halfway(&held),
        _ => Reply::new(200, "plain"),
    })
    .await;
    let sidecar = Sidecar::before(&origin, "[[upstream.rule]]\npath = \"/**\"\nttl = \"60s\"\n");
    let mut first = Client::connect(sidecar.address).await;
    first.ask("GET", "/", &[("Accept-Encoding", "gzip")], b"").await;
    first.read_some(100).await;
    let second = sidecar.get("/").await;
    assert_eq!((second.status, second.text().as_str()), (200, "plain"));
    gate.open();
    assert_eq!(first.answer_to("GET").await.expect("a response").text(), "gzip gzip");
    assert_eq!(origin.count(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn responses_stream_unstored_when_buffer_memory_is_used_up() {
    let origin = Origin::start(|_| Reply::fresh(60, vec![b'x'; 300_000])).await;
    for rule in ["", "[[upstream.rule]]\npath = \"/**\"\nttl = \"60s\"\nreject_empty = \"/x\"\n"] {
        let before = origin.count();
        let sidecar = Sidecar::with_tables(&origin, rule, "[memory]\nmax_inflight_bytes = \"1KiB\"\n");
        let answers = burst(&sidecar, 10, "/").join_all().await;
        assert!(answers.iter().all(|a| a.status == 200 && a.whole && a.body.len() == 300_000), "{rule}");
        assert!(origin.count() - before <= 20, "{} calls for 10 requests", origin.count() - before);
        assert_eq!(sidecar.shared.memory.usage().entries, 0);
        until("the in-flight bytes are released", || (sidecar.shared.inflight.held() == 0).then_some(())).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_cache_response_is_not_shared_with_followers() {
    let gate = Gate::new();
    let held = gate.clone();
    let origin = Origin::start(move |ask| {
        let cookie = format!("session={}", ask.number);
        Reply::new(200, "x").header("ETag", "\"1\"").header("Set-Cookie", &cookie).after(&held)
    })
    .await;
    let sidecar = Sidecar::before(&origin, "");
    let requests = burst(&sidecar, 5, "/");
    origin.wait_for_requests(1).await;
    gate.open();
    let mut cookies: Vec<_> =
        requests.join_all().await.iter().map(|a| a.header("set-cookie").expect("a cookie").to_owned()).collect();
    cookies.sort();
    cookies.dedup();
    assert_eq!(cookies.len(), 5, "each client got its own cookie");
}

#[tokio::test(flavor = "multi_thread")]
async fn set_cookie_is_sent_only_to_the_client_that_fetched() {
    let gate = Gate::new();
    let held = gate.clone();
    let origin = Origin::start(move |_| Reply::new(200, "x").header("Set-Cookie", "session=1").after(&held)).await;
    let sidecar = Sidecar::before(&origin, "[[upstream.rule]]\npath = \"/**\"\nttl = \"60s\"\n");
    let requests = burst(&sidecar, 10, "/");
    origin.wait_for_requests(1).await;
    gate.open();
    let answers = requests.join_all().await;
    assert_eq!(answers.iter().filter(|a| a.header("set-cookie").is_some()).count(), 1);
    assert!(sidecar.get("/").await.header("set-cookie").is_none());
    assert_eq!(origin.count(), 1);
}

/// An upstream client whose response body panics after its first bytes.
#[derive(Debug)]
struct PanicsInBody;

impl UpstreamClient for PanicsInBody {
    fn send(&self, _: Request<Body>) -> Sending<'_> {
        Box::pin(async {
            let mut response = Response::new(Body::prefixed(vec!["first".into()], Body::stream(PanickingBody)));
            response.headers_mut().insert("cache-control", http::HeaderValue::from_static("max-age=60"));
            Ok(response)
        })
    }
}

struct PanickingBody;

impl http_body::Body for PanickingBody {
    type Data = bytes::Bytes;
    type Error = sidecache::body::BodyError;

    fn poll_frame(
        self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<http_body::Frame<bytes::Bytes>, Self::Error>>> {
        panic!("the body panics, as the test requires")
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn panic_while_streaming_a_body_fails_its_readers() {
    let sidecar = Sidecar::over(Arc::new(PanicsInBody), "");
    let mut client = Client::connect(sidecar.address).await;
    client.ask("GET", "/", &[], b"").await;
    assert!(client.answer_to("GET").await.is_none_or(|answer| !answer.whole || answer.status >= 500));
    assert_eq!(sidecar.shared.coalescer.running(), 0);
}
