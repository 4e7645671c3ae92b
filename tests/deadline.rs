//! Request deadlines: a client waits no longer than its deadline; the fetch continues and fills the cache.

use crate::support::{Gate, Origin, Reply, Sidecar, until};

const TIMEOUTS: &str = "[upstream.timeouts]\ndeadline = \"150ms\"\n";

#[tokio::test(flavor = "multi_thread")]
async fn request_deadline_answers_504_and_the_fetch_fills_the_cache() {
    let gate = Gate::new();
    let held = gate.clone();
    let origin = Origin::start(move |_| Reply::fresh(60, "slow").after(&held)).await;
    let sidecar = Sidecar::before(&origin, TIMEOUTS);
    let late = sidecar.get("/").await;
    assert_eq!((late.status, late.header("retry-after")), (504, Some("2")));
    assert_eq!(late.cache_status(), "sidecache; fwd=uri-miss; detail=error; cause=\"timeout\"");
    gate.open();
    until("the fetch has filled the cache", || (sidecar.shared.memory.usage().entries == 1).then_some(())).await;
    assert!(sidecar.get("/").await.is_hit());
    assert_eq!(origin.count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn each_follower_has_its_own_deadline() {
    let gate = Gate::new();
    let held = gate.clone();
    let origin = Origin::start(move |_| Reply::fresh(60, "slow").after(&held)).await;
    let rules = "[[upstream.rule]]\npath = \"/**\"\ndeadline = \"150ms\"\n";
    let sidecar = Sidecar::before(&origin, rules);
    for _ in 0..3 {
        assert_eq!(sidecar.get("/").await.status, 504);
    }
    assert_eq!(origin.count(), 1, "all requests joined the same fetch");
    gate.open();
}

#[tokio::test(flavor = "multi_thread")]
async fn stale_response_is_served_at_the_deadline() {
    let gate = Gate::new();
    let held = gate.clone();
    let origin = Origin::start(move |ask| match ask.number {
        0 => Reply::new(200, "old"),
        _ => Reply::new(200, "new").after(&held),
    })
    .await;
    let rules = "[[upstream.rule]]\npath = \"/**\"\nttl = \"10s\"\nstale_if_error = \"1h\"\ndeadline = \"150ms\"\n";
    let sidecar = Sidecar::before(&origin, rules);
    // On a slow machine a request may exceed the deadline: repeat it until the response is stored.
    while sidecar.get("/").await.text() != "old" {}
    sidecar.turn(11);
    let stale = sidecar.get("/").await;
    assert_eq!(stale.text(), "old");
    assert!(stale.cache_status().starts_with("sidecache; hit; ttl=-"), "{}", stale.cache_status());
    assert!(stale.cache_status().ends_with("; detail=stale-if-error; cause=\"timeout\""), "{}", stale.cache_status());
    gate.open();
    until("the fetch has ended", || (sidecar.shared.coalescer.running() == 0).then_some(())).await;
    assert_eq!(sidecar.get("/").await.text(), "new");
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_and_passed_through_requests_have_no_deadline() {
    let gate = Gate::new();
    let held = gate.clone();
    let origin = Origin::start(move |ask| match ask.method.as_str() {
        "GET" => Reply::hang(),
        _ => Reply::new(200, "written").after(&held),
    })
    .await;
    let sidecar = Sidecar::before(&origin, TIMEOUTS);
    let address = sidecar.address;
    let write = tokio::spawn(async move { crate::support::send(address, "POST", "/", &[], b"x").await });
    origin.wait_for_requests(1).await;
    // A GET exceeds its deadline while the write is still running.
    assert_eq!(sidecar.get("/").await.status, 504);
    gate.open();
    assert_eq!(write.await.expect("no panic").text(), "written");
}

#[tokio::test(flavor = "multi_thread")]
async fn upstream_timeouts_apply_to_connect_head_and_body() {
    let origin = Origin::start(|ask| match ask.target.as_str() {
        "/head" => Reply::hang(),
        _ => Reply::fresh(60, "first half second half").halfway(&Gate::new()),
    })
    .await;
    let timeouts = "[upstream.timeouts]\nfirst_byte = \"1s\"\nidle = \"100ms\"\n";
    let sidecar = Sidecar::before(&origin, timeouts);
    let head = sidecar.send("POST", "/head", "x").await;
    assert_eq!((head.status, head.json()["error"]["code"].as_str()), (504, Some("upstream_timeout")));
    let body = sidecar.get("/body").await;
    assert_eq!((body.status, body.whole, body.text().as_str()), (200, false, "first half "));
    assert_eq!(sidecar.shared.memory.usage().entries, 0);
}
