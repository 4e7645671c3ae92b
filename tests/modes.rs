//! Modes: shadow mode, and modes set for a whole fleet.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::{Origin, Redis, Reply, Sidecar, get, send, soon, until};

const RULES: &str = "[[upstream.rule]]\nname = \"all\"\npath = \"/**\"\nttl = \"1m\"\nvolatile = [\"/cost\"]\n";

async fn mode(sidecar: &Sidecar, request: &Value) -> crate::support::Answer {
    let json = [("Content-Type", "application/json")];
    send(sidecar.admin, "POST", "/mode", &json, request.to_string().as_bytes()).await
}

async fn health_mode(sidecar: &Sidecar) -> Value {
    get(sidecar.admin, "/health", &[]).await.json()["mode"].clone()
}

/// Waits until the shadow counters have these values. Bodies are compared in the background.
async fn wait_for_counters(sidecar: &Sidecar, expected: [u64; 4]) {
    let counted = async { while shadow_counters(sidecar).await != expected {} };
    soon(&format!("{expected:?}"), counted).await;
}

/// Returns the shadow counters: hits, wrong hits, not compared, misses.
async fn shadow_counters(sidecar: &Sidecar) -> Vec<u64> {
    let counters = sidecar.stats().await["rehearsals"][0].clone();
    ["hit", "wrong_hit", "not_compared", "miss"].iter().map(|name| counters[*name].as_u64().unwrap_or(0)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn shadow_mode_passes_all_requests_and_counts_would_be_hits_and_misses() {
    let version = Arc::new(AtomicUsize::new(1));
    let now = version.clone();
    let origin = Origin::start(move |ask| {
        let version = now.load(Ordering::SeqCst);
        match ask.target.as_str() {
            "/steady" => Reply::new(200, format!("{{\"a\":1,\"cost\":{}}}", ask.number)),
            "/validated" if ask.header("if-none-match").is_some() => Reply::new(304, "").header("ETag", "\"1\""),
            "/validated" => Reply::new(200, "x").header("ETag", "\"1\""),
            _ => Reply::new(200, format!("{{\"version\":{version}}}")),
        }
    })
    .await;
    let sidecar = Sidecar::from_text(&format!(
        "mode = \"shadow\"\n{}",
        crate::support::sidecar::text(origin.address, RULES, "")
    ));
    assert_eq!(health_mode(&sidecar).await, json!({"mode": "shadow", "source": "file", "for_ms": null}));
    for _ in 0..3 {
        let answer = sidecar.get("/steady").await;
        assert_eq!(answer.cache_status(), "sidecache; fwd=bypass; detail=shadow");
    }
    wait_for_counters(&sidecar, [2, 0, 0, 1]).await; // bodies that differ only in the volatile field are equal
    sidecar.get("/moving").await;
    version.store(2, Ordering::SeqCst);
    assert_eq!(sidecar.get("/moving").await.text(), "{\"version\":2}", "the upstream's response");
    wait_for_counters(&sidecar, [2, 1, 0, 2]).await;
    // A write invalidates the entry: the next request is a miss, the one after it a correct hit.
    sidecar.send("PUT", "/moving", "x").await;
    sidecar.get("/moving").await;
    sidecar.get("/moving").await;
    wait_for_counters(&sidecar, [3, 1, 0, 3]).await;
    sidecar.get("/validated").await;
    sidecar.get_with("/validated", &[("If-None-Match", "\"1\"")]).await;
    wait_for_counters(&sidecar, [4, 1, 0, 4]).await;
    // A request for an expired entry is counted as a miss.
    sidecar.clock.turn(Duration::from_secs(61));
    sidecar.get("/steady").await;
    wait_for_counters(&sidecar, [4, 1, 0, 5]).await;
    assert_eq!(origin.count(), 11, "every request reached the upstream");
    let metrics = get(sidecar.admin, "/metrics", &[]).await.text();
    let wrong = "sidecache_shadow_total{upstream=\"api\",rule=\"all\",result=\"wrong_hit\"} 1";
    assert!(metrics.lines().any(|line| line == wrong), "{metrics}");
    // Entries stored in shadow mode are served in normal mode.
    mode(&sidecar, &json!({"mode": "normal"})).await;
    assert!(sidecar.get("/steady").await.is_hit());
}

#[tokio::test(flavor = "multi_thread")]
async fn fleet_mode_reaches_every_sidecar_and_a_local_mode_overrides_it() {
    let redis = Redis::start();
    let origin = Origin::start(|_| Reply::fresh(60, "x")).await;
    let one = Sidecar::with_tables(&origin, RULES, &redis.table());
    let other = Sidecar::with_tables(&origin, RULES, &redis.table());
    one.in_fleet().await;
    other.in_fleet().await;
    let reply = mode(&one, &json!({"mode": "bypass", "fleet": true})).await;
    assert_eq!(reply.json(), json!({"mode": "bypass", "source": "fleet", "for_ms": null}));
    let mode_of = |sidecar: &Sidecar| {
        let state = sidecar.shared.mode.state(sidecar.clock.now());
        (state.mode.token(), state.source.token())
    };
    until("the other sidecar applies the mode", || (mode_of(&other) == ("bypass", "fleet")).then_some(())).await;
    assert!(other.get("/x").await.cache_status().ends_with("detail=mode"));
    // A sidecar that starts later applies the mode, too.
    let late = Sidecar::with_tables(&origin, RULES, &redis.table());
    until("the third sidecar applies the mode", || (mode_of(&late) == ("bypass", "fleet")).then_some(())).await;
    // A local mode has precedence over the fleet mode.
    mode(&other, &json!({"mode": "normal"})).await;
    assert_eq!(mode_of(&other), ("normal", "local"));
    mode(&other, &json!({"mode": "configured"})).await;
    assert_eq!(mode_of(&other), ("bypass", "fleet"));
    // A mode with `for` expires on all sidecars.
    let reply = mode(&other, &json!({"mode": "shadow", "for": "1500ms", "fleet": true})).await.json();
    assert!(reply["for_ms"].as_u64() <= Some(1500), "{reply}");
    until("the first sidecar applies the mode", || (mode_of(&one) == ("shadow", "fleet")).then_some(())).await;
    for sidecar in [&one, &other, &late] {
        until("the mode expires", || (mode_of(sidecar) == ("normal", "default")).then_some(())).await;
    }
    drop(redis);
    soon("Redis is lost", other.lost_redis()).await;
    let refused = mode(&other, &json!({"mode": "bypass", "fleet": true})).await;
    assert_eq!((refused.status, refused.json()["error"]["code"].as_str()), (503, Some("fleet_not_told")));
    assert_eq!(mode_of(&other), ("normal", "default"), "the mode is unchanged");
}

#[tokio::test(flavor = "multi_thread")]
async fn shadow_mode_stores_no_rejected_or_uncacheable_response() {
    let origin = Origin::start(|ask| match ask.target.as_str() {
        "/list" => Reply::new(200, "{\"products\":[]}"),
        _ => Reply::new(503, "x").header("Cache-Control", "no-store"),
    })
    .await;
    let rules = "[[upstream.rule]]\npath = \"/**\"\nttl = \"1m\"\nreject_empty = \"/products\"\n";
    let sidecar = Sidecar::before(&origin, rules);
    mode(&sidecar, &json!({"mode": "shadow"})).await;
    for target in ["/list", "/list", "/bad"] {
        sidecar.get(target).await;
    }
    assert_eq!(sidecar.stats().await["memory"]["entries"], 0);
    wait_for_counters(&sidecar, [0, 0, 0, 3]).await;
}
