//! Credential leaks: no credential appears in logs, admin responses, error responses or Redis (`support/canary.rs`).

use crate::support::{Chaos, Mood, Origin, Redis, Reply, Sidecar, canary, get, send};

const TOKEN: &str = "canary-9d3f1c77a0";

/// Searches all keys and values in Redis for credentials.
fn search_redis(redis: &Redis) {
    let mut observer = redis.observer();
    // With RDB compression, DUMP would return compressed values.
    let _: () = redis::cmd("CONFIG").arg(&["SET", "rdbcompression", "no"]).query(&mut observer).expect("a reply");
    let keys = redis.keys("*");
    assert!(!keys.is_empty(), "Redis has keys");
    for key in keys {
        let value: Vec<u8> = redis::cmd("DUMP").arg(&key).query(&mut observer).unwrap_or_default();
        canary::search("Redis", &[key.as_bytes(), &value].concat());
    }
}

#[test]
fn secret_search_finds_a_planted_secret() {
    canary::learn("Authorization", "Bearer of-this-test-alone-4711");
    assert_eq!(canary::finds("here", b"token=of-this-test-alone-4711;").len(), 1);
    assert_eq!(canary::finds("here", b"token=of-this-test-alone;").len(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_never_appear_in_logs_metrics_admin_or_redis() {
    canary::watch();
    let redis = Redis::start();
    let origin = Origin::start(|ask| match ask.target.split(['?', '/']).nth(1) {
        Some("fails") => Reply::new(503, "{}"),
        Some("throttled") => Reply::new(429, "{}"),
        Some("broken") => Reply::raw("nonsense\r\n\r\n"),
        Some("closed") => Reply::close(),
        _ => Reply::fresh(60, "{}"),
    })
    .await;
    let sidecar = Sidecar::with_tables(&origin, "", &redis.table());
    sidecar.in_fleet().await;
    let (bearer, cookie) = (format!("Bearer {TOKEN}"), format!("session={TOKEN}"));
    let headers = [
        ("Authorization", bearer.as_str()),
        ("Cookie", cookie.as_str()),
        ("X-Shopify-Access-Token", TOKEN),
        ("X-Api-Key", TOKEN),
        ("X-Unheard-Of-Token", TOKEN),
        ("Proxy-Authorization", bearer.as_str()),
    ];
    for (name, value) in headers {
        for target in ["/ok", "/ok", "/fails", "/throttled", "/broken", "/closed"] {
            let answer = get(sidecar.address, target, &[(name, value)]).await;
            canary::search("a response", format!("{:?} {}", answer.headers, answer.text()).as_bytes());
        }
        send(sidecar.address, "POST", "/ok", &[(name, value)], b"{}").await;
        let bad = [(name, value), ("Connection", "host")];
        let refused = send(sidecar.address, "GET", "/ok", &bad, b"").await;
        assert_eq!(refused.status, 400);
        canary::search("an error response", refused.text().as_bytes());
        let lines = [("Content-Type", "application/json")];
        let query = serde_json::json!({ "url": "/ok", "headers": [[name, value]] }).to_string();
        let explanation = send(sidecar.admin, "POST", "/explain", &lines, query.as_bytes()).await;
        canary::search("an explanation", explanation.text().as_bytes());
    }
    sidecar.written().await;
    for path in ["/stats", "/health"] {
        canary::search(path, get(sidecar.admin, path, &[]).await.text().as_bytes());
    }
    search_redis(&redis);
    canary::assert_silent();
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_password_never_appears_in_logs_or_admin() {
    canary::watch();
    canary::learn("token", TOKEN);
    let redis = Redis::with(&["--requirepass", TOKEN]);
    let chaos = Chaos::before(redis.address()).await;
    let origin = Origin::start(|_| Reply::fresh(60, "{}")).await;
    let file = std::env::temp_dir().join(format!("sidecache-canary-{}", origin.address.port()));
    std::fs::write(&file, TOKEN).expect("written");
    let (at, password) = (chaos.address, file.display());
    let table = format!("[redis]\nurl = \"redis://{at}\"\npassword = {{ file = \"{password}\" }}\n");
    let sidecar = Sidecar::with_tables(&origin, "", &table);
    sidecar.in_fleet().await;
    sidecar.get("/a").await;
    chaos.set(Mood::Refuses);
    sidecar.lost_redis().await;
    for path in ["/stats", "/health"] {
        canary::search(path, get(sidecar.admin, path, &[]).await.text().as_bytes());
    }
    std::fs::remove_file(&file).expect("the file exists");
    canary::assert_silent();
}
