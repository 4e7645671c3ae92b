//! Stale responses: stale-while-revalidate, stale-if-error, last known good, and where serving stale is forbidden.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::support::{Gate, Origin, Reply, Sidecar, until};

const SWR: &str = "[[upstream.rule]]\npath = \"/**\"\nttl = \"10s\"\nkey = { ignore_headers = [\"X-Fail\"] }\nstale_while_revalidate = \"60s\"\n\
                   stale_if_error = \"600s\"\nlast_known_good = \"1h\"\n";

#[tokio::test(flavor = "multi_thread")]
async fn stale_while_revalidate_answers_at_once_and_refreshes_once() {
    let gate = Gate::new();
    let held = gate.clone();
    let origin = Origin::start(move |ask| match ask.number {
        0 => Reply::new(200, "old"),
        _ => Reply::new(200, "new").after(&held),
    })
    .await;
    let sidecar = Sidecar::before(&origin, SWR);
    sidecar.get("/").await;
    sidecar.turn(22);
    for _ in 0..10 {
        let stale = sidecar.get("/").await;
        assert_eq!(stale.text(), "old");
        assert!(stale.cache_status().starts_with("sidecache; hit; ttl=-1"), "{}", stale.cache_status());
        assert!(stale.cache_status().ends_with("detail=stale-while-revalidate"));
    }
    gate.open();
    until("the refresh is stored", || (sidecar.shared.coalescer.running() == 0).then_some(())).await;
    let fresh = sidecar.get("/").await;
    assert!(fresh.is_hit() && fresh.text() == "new");
    assert_eq!(origin.count(), 2, "ten stale hits made one refresh");
}

#[tokio::test(flavor = "multi_thread")]
async fn stale_if_error_then_last_known_good_cover_every_kind_of_failure() {
    let origin = Origin::start(|ask| match (ask.number, ask.target.as_str()) {
        (_, "/5xx") if ask.header("x-fail").is_some() => Reply::new(503, "broken"),
        (_, "/429") if ask.header("x-fail").is_some() => Reply::new(429, "slow down"),
        (_, "/connect") if ask.header("x-fail").is_some() => Reply::close(),
        (_, "/malformed") if ask.header("x-fail").is_some() => Reply::raw("nonsense\r\n\r\n"),
        _ => Reply::new(200, "good"),
    })
    .await;
    let sidecar = Sidecar::before(&origin, SWR);
    for (target, cause) in [("/5xx", "5xx"), ("/429", "429"), ("/connect", "connect"), ("/malformed", "malformed")] {
        sidecar.get(target).await;
        sidecar.turn(100);
        let stale = sidecar.get_with(target, &[("X-Fail", "1")]).await;
        assert_eq!((stale.status, stale.text().as_str()), (200, "good"), "{target}");
        let expected = format!("; detail=stale-if-error; cause=\"{cause}\"");
        assert!(stale.cache_status().ends_with(&expected), "{}", stale.cache_status());
        sidecar.turn(900);
        let last = sidecar.get_with(target, &[("X-Fail", "1")]).await;
        assert!(last.cache_status().contains("detail=last-known-good"), "{}", last.cache_status());
        sidecar.turn(3600);
        assert_ne!(sidecar.get_with(target, &[("X-Fail", "1")]).await.status, 200, "past all stale windows");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn serving_stale_needs_stale_if_error_on_503_but_not_on_disconnect() {
    let origin = Origin::start(|ask| match (ask.header("x-fail"), ask.target.as_str()) {
        (None, "/must") => Reply::new(200, "good").header("Cache-Control", "max-age=10, must-revalidate"),
        (None, "/sie") => Reply::new(200, "good").header("Cache-Control", "max-age=10, stale-if-error=600"),
        (None, _) => Reply::fresh(10, "good"),
        (Some("503"), _) => Reply::new(503, "broken"),
        (Some(_), _) => Reply::close(),
    })
    .await;
    let sidecar = Sidecar::before(&origin, "");
    let table = [
        ("/", "503", 503),
        ("/", "close", 200),
        ("/sie", "503", 200),
        ("/must", "503", 503),
        ("/must", "close", 502),
    ];
    for (target, fault, expected) in table {
        sidecar.purge(r#"{"all":true}"#).await;
        assert_eq!(sidecar.get(target).await.status, 200);
        sidecar.turn(20);
        assert_eq!(sidecar.get_with(target, &[("X-Fail", fault)]).await.status, expected, "{target} {fault}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn failed_background_refresh_keeps_the_stale_entry() {
    let origin = Origin::start(|ask| match ask.number {
        0 => Reply::new(200, "old"),
        _ => Reply::new(500, "broken"),
    })
    .await;
    let sidecar = Sidecar::before(&origin, SWR);
    sidecar.get("/").await;
    sidecar.turn(20);
    for round in 1..4 {
        assert_eq!(sidecar.get("/").await.text(), "old");
        origin.wait_for_requests(1 + round).await;
        until("the refresh has ended", || (sidecar.shared.coalescer.running() == 0).then_some(())).await;
        // The next request after the pause refreshes it again.
        sidecar.turn(1 << round);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn request_no_cache_or_max_age_0_fetches_a_new_response() {
    let origin = Origin::start(|ask| Reply::fresh(60, ask.number.to_string())).await;
    let sidecar = Sidecar::before(&origin, "");
    sidecar.get("/").await;
    for (i, directive) in ["no-cache", "max-age=0"].iter().enumerate() {
        let fetched = sidecar.get_with("/", &[("Cache-Control", directive)]).await;
        assert_eq!(fetched.text(), (i + 1).to_string());
        assert_eq!(fetched.cache_status(), "sidecache; fwd=request; stored");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn refresh_answered_with_401_removes_the_stale_entry() {
    let origin = Origin::start(|ask| match ask.number {
        0 => Reply::new(200, "old"),
        1 => Reply::new(401, "revoked"),
        _ => Reply::close(),
    })
    .await;
    let sidecar = Sidecar::before(&origin, SWR);
    sidecar.get("/").await;
    sidecar.turn(20);
    assert_eq!(sidecar.get("/").await.text(), "old", "stale while the refresh runs");
    origin.wait_for_requests(2).await;
    until("the refresh has ended", || (sidecar.shared.coalescer.running() == 0).then_some(())).await;
    assert_eq!(sidecar.get("/").await.status, 502, "the removed entry is not served on an upstream failure");
}

#[tokio::test(flavor = "multi_thread")]
async fn not_modified_with_no_store_is_served_and_removes_the_entry() {
    let origin = Origin::start(|ask| match ask.number {
        0 => Reply::fresh(10, "old").header("ETag", "\"1\""),
        1 => Reply::new(304, "").header("ETag", "\"1\"").header("Cache-Control", "no-store"),
        _ => Reply::close(),
    })
    .await;
    let sidecar = Sidecar::before(&origin, "");
    sidecar.get("/").await;
    sidecar.turn(11);
    let validated = sidecar.get("/").await;
    assert_eq!(
        (validated.text().as_str(), validated.cache_status().as_str()),
        ("old", "sidecache; fwd=stale; fwd-status=304; detail=no-store")
    );
    assert_eq!(sidecar.shared.memory.usage().entries, 0);
    assert_eq!(sidecar.get("/").await.status, 502);
}

#[tokio::test(flavor = "multi_thread")]
async fn failing_upstream_is_asked_once_in_each_pause_while_something_stands_in() {
    let failures: [(&str, fn() -> Reply, u64); 6] = [
        ("500", || Reply::new(500, "broken"), 2),
        ("503 with Retry-After", || Reply::new(503, "busy").header("Retry-After", "30"), 30),
        ("429", || Reply::new(429, "slow down"), 2),
        ("closed connection", Reply::close, 2),
        ("cut body", || Reply::new(200, "0123456789").cut_after(5, false), 2),
        ("reset in the body", || Reply::new(200, "0123456789").cut_after(5, true), 2),
    ];
    let stand_ins = [
        "stale_if_error = \"1h\"\n",
        "stale_while_revalidate = \"1h\"\nstale_if_error = \"1h\"\n",
        "last_known_good = \"1h\"\n",
        "fallback = { body = \"stored\", on = [\"connect\", \"timeout\", \"malformed\", \"5xx\", \"429\"] }\n",
    ];
    for (name, failure, pause) in failures {
        for stand_in in stand_ins {
            let fails = Arc::new(AtomicBool::new(false));
            let failing = fails.clone();
            let origin =
                Origin::start(
                    move |_| {
                        if failing.load(Ordering::SeqCst) { failure() } else { Reply::new(200, "stored") }
                    },
                )
                .await;
            let rule = format!(
                "[upstream.backoff]\nbase = \"2s\"\n[upstream.retry]\nattempts = 1\n[[upstream.rule]]\npath = \"/**\"\nttl = \"10s\"\n{stand_in}"
            );
            let sidecar = Sidecar::before(&origin, &rule);
            sidecar.get("/").await;
            fails.store(true, Ordering::SeqCst);
            sidecar.turn(11);
            let before = origin.count();
            for _ in 0..50 {
                let answer = sidecar.get("/").await;
                assert_eq!((answer.status, answer.text().as_str()), (200, "stored"), "{name}, {stand_in}");
                until("no fetch runs", || (sidecar.shared.coalescer.running() == 0).then_some(())).await;
            }
            assert_eq!(origin.count(), before + 1, "{name}, {stand_in}");
            sidecar.turn(pause);
            sidecar.get("/").await;
            until("no fetch runs", || (sidecar.shared.coalescer.running() == 0).then_some(())).await;
            assert_eq!(origin.count(), before + 2, "{name}, {stand_in}: one request after the pause");
            fails.store(false, Ordering::SeqCst);
            sidecar.turn(pause * 2);
            sidecar.get("/").await;
            until("the response is stored", || (sidecar.shared.coalescer.running() == 0).then_some(())).await;
            assert!(sidecar.get("/").await.is_hit(), "{name}, {stand_in}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn response_that_breaks_before_its_first_byte_is_sent_is_a_json_502() {
    let origin = Origin::start(|_| Reply::new(200, "0123456789").cut_after(5, false)).await;
    let sidecar = Sidecar::before(&origin, "[[upstream.rule]]\npath = \"/cached\"\nttl = \"10s\"\n");
    for target in ["/cached", "/passed-through"] {
        let answer = sidecar.get(target).await;
        assert_eq!(
            (answer.status, answer.json()["error"]["code"].as_str()),
            (502, Some("upstream_unreachable")),
            "{target}"
        );
    }
}
