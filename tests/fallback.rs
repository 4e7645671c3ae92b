//! Fallbacks on upstream failures: configured payload, the upstream's error response, generated error response.

use crate::support::{Origin, Reply, Sidecar, get};

/// Starts an origin that fails as the request path says.
async fn failing() -> Origin {
    Origin::start(|ask| match ask.target.trim_start_matches("/plain") {
        "/timeout" => Reply::hang(),
        "/connect" => Reply::close(),
        "/5xx" => Reply::new(503, "the upstream's own words").header("Retry-After", "7"),
        "/429" => Reply::new(429, "slow down").header("Retry-After", "2.0"),
        "/empty" => Reply::new(200, r#"{"products":[]}"#),
        _ => Reply::new(200, r#"{"products":[{"id":9007199254740993}]}"#),
    })
    .await
}

const RULES: &str = r#"
[[upstream.rule]]
name = "plain"
path = "/plain/timeout"
ttl = "10s"
deadline = "200ms"
[[upstream.rule]]
path = "/plain/**"
ttl = "10s"
reject_empty = "/products"
[[upstream.rule]]
path = "/timeout"
ttl = "10s"
deadline = "200ms"
fallback = { body = '{"products":[{"id":1}]}', status = 203 }
[[upstream.rule]]
name = "covered"
path = "/**"
ttl = "10s"
reject_empty = "/products"
fallback = { body = '{"products":[{"id":1}]}', status = 203 }
"#;

const CAUSES: [&str; 5] = ["timeout", "connect", "5xx", "429", "empty"];

#[tokio::test(flavor = "multi_thread")]
async fn failures_have_distinct_cache_status_details_and_counters() {
    let origin = failing().await;
    let sidecar = Sidecar::before(&origin, RULES);
    for cause in CAUSES {
        let answer = sidecar.get(&format!("/{cause}")).await;
        assert_eq!((answer.status, answer.text().as_str()), (203, r#"{"products":[{"id":1}]}"#), "{cause}");
        assert_eq!(answer.header("content-type"), Some("application/json"));
        assert_eq!(answer.header("cache-control"), Some("no-store"));
        let expected = format!("; detail=fallback; cause=\"{cause}\"");
        assert!(answer.cache_status().starts_with("sidecache; fwd=uri-miss"), "{}", answer.cache_status());
        assert!(answer.cache_status().ends_with(&expected), "{}", answer.cache_status());
    }
    let stats = sidecar.stats().await;
    for cause in CAUSES {
        assert_eq!(stats["requests"]["fallbacks"][cause], 1, "{cause}: {stats}");
        assert_eq!(stats["requests"]["failures"][cause], 1, "{cause}: {stats}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_payload_upstream_errors_are_relayed() {
    let origin = failing().await;
    let sidecar = Sidecar::before(&origin, RULES);
    let relayed = sidecar.get("/plain/5xx").await;
    assert_eq!((relayed.status, relayed.text().as_str()), (503, "the upstream's own words"));
    assert_eq!(relayed.header("retry-after"), Some("7"));
    assert_eq!(relayed.cache_status(), "sidecache; fwd=uri-miss; fwd-status=503; cause=\"5xx\"");
    assert_eq!(sidecar.get("/plain/429").await.header("retry-after"), Some("2.0"));
    assert_eq!(sidecar.get("/plain/empty").await.text(), r#"{"products":[]}"#);
    let late = sidecar.get("/plain/timeout").await;
    assert_eq!((late.status, late.json()["error"]["code"].as_str()), (504, Some("upstream_timeout")));
    assert!(late.header("retry-after").is_some() && late.json()["error"]["request_id"].is_string());
    let refused = sidecar.get("/plain/connect").await;
    assert_eq!((refused.status, refused.json()["error"]["code"].as_str()), (502, Some("upstream_unreachable")));
    let good = sidecar.get("/plain/good").await;
    assert!(good.text().contains("9007199254740993") && !good.is_hit());
    assert!(sidecar.get("/plain/good").await.is_hit(), "a response that is not empty is stored");
}

#[tokio::test(flavor = "multi_thread")]
async fn fallback_payload_is_used_only_where_configured() {
    let rules = "[[upstream.rule]]\npath = \"/**\"\nttl = \"10s\"\nfallback = { body = \"{}\", on = [\"429\"] }\n";
    let origin = failing().await;
    let sidecar = Sidecar::before(&origin, rules);
    assert_eq!(sidecar.get("/5xx").await.status, 503);
    assert_eq!(sidecar.get("/429").await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn unreachable_upstream_is_502_and_shows_in_health() {
    let gone = {
        let origin = Origin::start(|_| Reply::close()).await;
        origin.address
    };
    let text = format!(
        "[[upstream]]\nname = \"api\"\nurl = \"http://{gone}\"\nlisten = \"127.0.0.1:0\"\n\
         [admin]\nlisten = \"127.0.0.1:0\"\n"
    );
    let sidecar = Sidecar::from_text(&text);
    assert_eq!(sidecar.get("/").await.status, 502);
    for _ in 0..4 {
        // 503 once the circuit breaker is open: each request is two attempts.
        let status = sidecar.get("/").await.status;
        assert!(status == 502 || status == 503, "{status}");
    }
    let health = get(sidecar.admin, "/health", &[]).await.json();
    assert_eq!(health["status"], "degraded");
    assert_eq!(health["components"]["upstreams"]["api"]["last_cause"], "connect");
    assert_eq!(get(sidecar.admin, "/readyz", &[]).await.status, 200, "readiness does not depend on the upstream");
}

#[tokio::test(flavor = "multi_thread")]
async fn passed_through_requests_have_no_fallback() {
    let origin = failing().await;
    let sidecar = Sidecar::before(&origin, RULES);
    let posted = sidecar.send("POST", "/5xx", "x").await;
    assert_eq!((posted.status, posted.text().as_str()), (503, "the upstream's own words"));
}

#[tokio::test(flavor = "multi_thread")]
async fn fallback_payload_file_is_relative_to_the_configuration() {
    let file = std::env::temp_dir().join(format!("sidecache-payload-{}.json", std::process::id()));
    std::fs::write(&file, r#"{"products":["from a file"]}"#).expect("writable");
    let rules =
        format!("[[upstream.rule]]\npath = \"/**\"\nttl = \"10s\"\nfallback = {{ file = \"{}\" }}\n", file.display());
    let origin = failing().await;
    let sidecar = Sidecar::before(&origin, &rules);
    std::fs::remove_file(&file).expect("the file exists");
    assert_eq!(sidecar.get("/5xx").await.text(), r#"{"products":["from a file"]}"#, "the file was read at startup");
}
