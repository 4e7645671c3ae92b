//! Redis as the shared cache tier of a fleet: records are authenticated, and replaced if they were tampered with.

use redis::Commands;

use crate::support::{Origin, Redis, Reply, Sidecar, get, until};

const RULES: &str = "[[upstream.rule]]\npath = \"/products/{id}\"\nttl = \"1h\"\nstale_while_revalidate = \"1h\"\n\
                     tags = [\"products\", \"product:{id}\"]\n";

/// Starts a sidecar and waits until it uses Redis.
async fn member(origin: &Origin, redis: &Redis) -> Sidecar {
    member_with(origin, redis, "").await
}

async fn member_with(origin: &Origin, redis: &Redis, tables: &str) -> Sidecar {
    let sidecar = Sidecar::with_tables(origin, RULES, &(redis.patient_table() + tables));
    sidecar.in_fleet().await;
    sidecar
}

#[tokio::test(flavor = "multi_thread")]
async fn response_fetched_by_one_sidecar_is_a_hit_on_another() {
    let redis = Redis::start();
    let origin = Origin::start(|ask| {
        let body = format!("body {} {}", ask.number, ask.header("accept-language").unwrap_or("-"));
        let reply = Reply::fresh(60, body).header("ETag", "\"x\"").header("x-twice", "1").header("x-twice", "2");
        if ask.target == "/vary" { reply.header("Vary", "Accept-Language") } else { reply }
    })
    .await;
    let (one, other) = (member(&origin, &redis).await, member(&origin, &redis).await);
    let requests: [(&str, &[(&str, &str)]); 5] = [
        ("/products/7", &[]),
        ("/products/7", &[("Accept-Encoding", "gzip")]),
        ("/http", &[]),
        ("/vary", &[("Accept-Language", "de")]),
        ("/vary", &[("Accept-Language", "en")]),
    ];
    for (target, lines) in requests {
        let first = one.get_with(target, lines).await;
        one.written().await;
        let second = other.get_with(target, lines).await;
        assert!(second.is_hit(), "{target} {lines:?}: {}", second.cache_status());
        assert_eq!((second.text(), second.all("x-twice")), (first.text(), vec!["1", "2"]));
        assert!(
            second.headers.iter().any(|(name, _)| name == "ETag"),
            "header case is preserved: {:?}",
            second.headers
        );
        assert!(
            second.headers.iter().any(|(name, _)| name == "x-twice"),
            "header case is preserved: {:?}",
            second.headers
        );
        assert!(other.get_with(target, lines).await.is_hit(), "the second hit is from memory");
    }
    assert_eq!(origin.count(), requests.len() - 1, "a response without a content coding serves every client");
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_record_keeps_its_age_and_is_revalidated_when_stale() {
    let redis = Redis::start();
    let origin = Origin::start(|ask| match ask.header("if-none-match") {
        Some(_) => Reply::new(304, "").header("ETag", "\"1\"").header("Cache-Control", "max-age=60"),
        None => Reply::fresh(60, "x").header("ETag", "\"1\""),
    })
    .await;
    let (one, other) = (member(&origin, &redis).await, member(&origin, &redis).await);
    one.get("/x").await;
    one.written().await;
    other.turn(20);
    let hit = other.get("/x").await;
    let age: u64 = hit.header("age").and_then(|age| age.parse().ok()).expect("an age");
    assert!(hit.is_hit() && (20..25).contains(&age), "{age} {}", hit.cache_status());
    let late = member(&origin, &redis).await;
    late.turn(70);
    let validated = late.get("/x").await;
    assert_eq!((validated.status, validated.text().as_str(), origin.count()), (200, "x", 2));
    assert!(origin.asks()[1].header("if-none-match").is_some(), "revalidated with the record's ETag");
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_record_of_another_sidecar_is_served_stale_on_upstream_failure() {
    let redis = Redis::start();
    let origin = Origin::start(|ask| {
        if ask.number == 0 {
            Reply::fresh(1, "good").header("Cache-Control", "stale-if-error=600")
        } else {
            Reply::close()
        }
    })
    .await;
    let one = member(&origin, &redis).await;
    one.get("/x").await;
    one.written().await;
    let other = member(&origin, &redis).await;
    other.turn(30);
    let stale = other.get("/x").await;
    assert_eq!((stale.status, stale.text().as_str()), (200, "good"), "{}", stale.cache_status());
    assert!(stale.cache_status().contains("stale-if-error"), "{}", stale.cache_status());
}

#[tokio::test(flavor = "multi_thread")]
async fn only_if_cached_reads_redis_and_sends_no_upstream_request() {
    let redis = Redis::start();
    let origin = Origin::start(|_| Reply::fresh(60, "x")).await;
    let (one, other) = (member(&origin, &redis).await, member(&origin, &redis).await);
    let only = [("Cache-Control", "only-if-cached")];
    assert_eq!(other.get_with("/x", &only).await.status, 504);
    one.get("/x").await;
    one.written().await;
    let hit = other.get_with("/x", &only).await;
    assert!(hit.status == 200 && hit.is_hit(), "{}", hit.cache_status());
    assert_eq!(origin.count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn private_records_use_their_own_database_and_contain_no_credential() {
    let redis = Redis::start();
    let origin =
        Origin::start(|ask| Reply::fresh(60, ask.header("authorization").unwrap_or("-").len().to_string())).await;
    let databases = "databases = { private = 1, coordination = 2 }\n";
    let sidecar = member_with(&origin, &redis, databases).await;
    let secret = [("Authorization", "Bearer canary-7f3a"), ("X-Api-Key", "canary-7f3a")];
    sidecar.get_with("/products/1", &secret).await;
    sidecar.get("/products/1").await;
    sidecar.purge(r#"{"tags":["nothing"]}"#).await;
    sidecar.written().await;
    let mut observer = redis.observer();
    for (database, prefix) in [(0, "sidecache:1:s:"), (1, "sidecache:1:p:"), (2, "{sidecache}:1:")] {
        redis::cmd("SELECT").arg(database).exec(&mut observer).expect("a database");
        let keys: Vec<String> = observer.keys("*").expect("keys");
        assert!(!keys.is_empty() && keys.iter().all(|key| key.starts_with(prefix)), "{database}: {keys:?}");
        for key in keys {
            let dump: Vec<u8> = redis::cmd("DUMP").arg(&key).query(&mut observer).expect("a value");
            assert!(!dump.windows(6).any(|w| w == b"canary"), "{key}");
            if database < 2 {
                let left: i64 = observer.pttl(&key).expect("a time");
                // An hour fresh, an hour stale, and a margin.
                assert!((7_200_000..=7_260_000).contains(&left), "{key}: {left}");
            }
        }
    }
    let other = member_with(&origin, &redis, databases).await;
    assert!(other.get_with("/products/1", &secret).await.is_hit(), "from the private database");
    assert!(!other.get_with("/products/1", &[("Authorization", "Bearer another")]).await.is_hit());
}

#[tokio::test(flavor = "multi_thread")]
async fn tampered_redis_record_is_not_served_and_is_replaced() {
    let redis = Redis::start();
    let origin = Origin::start(|ask| Reply::fresh(60, ask.target.repeat(2_000))).await;
    let writer = member(&origin, &redis).await;
    writer.get("/a").await;
    writer.get("/b").await;
    writer.written().await;
    let mut observer = redis.observer();
    let keys = redis.keys("sidecache:1:s:*");
    let records: Vec<Vec<u8>> = keys.iter().map(|key| observer.get(key).expect("a record")).collect();
    assert_eq!(records.len(), 2);
    assert!(records[0].len() < 2_000, "compressed");
    let flipped = |at: usize| {
        let mut record = records[0].clone();
        record[at] ^= 4;
        record
    };
    let mut bad = vec![Vec::new(), b"text".to_vec(), records[0][..40].to_vec(), records[1].clone()];
    bad.extend([2, 5, 9, 30, 60, records[0].len() - 1].map(flipped));
    for record in bad {
        let _: () = observer.set(&keys[0], &record).expect("written");
        let reader = member(&origin, &redis).await;
        for target in ["/a", "/b"] {
            assert_eq!(
                reader.get(target).await.text(),
                target.repeat(2_000),
                "{:?}",
                &record[..record.len().min(60)]
            );
        }
        reader.written().await;
        let replaced: Vec<u8> = observer.get(&keys[0]).expect("a record");
        assert!(
            replaced.len() > 100 && replaced[36..] != record.get(36..).unwrap_or_default()[..],
            "the record was replaced"
        );
    }
    // A key of another type, and a record of a newer version.
    let _: () = observer.del(&keys[0]).expect("removed");
    let _: () = observer.lpush(&keys[0], "x").expect("written");
    assert_eq!(member(&origin, &redis).await.get("/a").await.text(), "/a".repeat(2_000));
    let mut newer = records[0].clone();
    newer[1] = 2;
    let _: () = observer.set(&keys[0], &newer).expect("written");
    assert_eq!(member(&origin, &redis).await.get("/a").await.text(), "/a".repeat(2_000));
}

#[tokio::test(flavor = "multi_thread")]
async fn encrypted_records_stay_readable_during_secret_rotation() {
    let redis = Redis::start();
    let origin = Origin::start(|_| Reply::fresh(60, "plain as day ".repeat(10))).await;
    let folder = crate::support::redis::folder("secrets");
    for name in ["old", "new"] {
        std::fs::write(folder.join(name), format!("secret-{name}")).expect("writable");
    }
    let security = |names: &[&str], encrypt: bool| {
        let files: Vec<String> =
            names.iter().map(|n| format!("{{ file = \"{}\" }}", folder.join(n).display())).collect();
        format!("[security]\nsecret = [{}]\nencrypt = {encrypt}\n", files.join(", "))
    };
    let with = async |names: &[&str], encrypt| member_with(&origin, &redis, &security(names, encrypt)).await;
    let old = with(&["old"], true).await;
    old.get("/x").await;
    old.written().await;
    let mut observer = redis.observer();
    let record: Vec<u8> = observer.get(&redis.keys("sidecache:1:s:*")[0]).expect("a record");
    assert!(!record.windows(8).any(|w| w == b"plain as" || w == b"max-age="), "encrypted");
    let both = with(&["new", "old"], true).await;
    assert!(both.get("/x").await.is_hit(), "decrypted with the second secret");
    both.get("/y").await;
    both.written().await;
    assert!(with(&["new"], true).await.get("/y").await.is_hit(), "encrypted with the first secret");
    assert!(!with(&["old"], true).await.get("/y").await.is_hit(), "without the secret: a miss");
    std::fs::remove_dir_all(folder).expect("the folder exists");
}

#[tokio::test(flavor = "multi_thread")]
async fn sidecars_without_a_configured_secret_share_one_stored_in_redis() {
    let redis = Redis::start();
    let origin = Origin::start(|_| Reply::fresh(60, "x")).await;
    let token = [("Authorization", "Bearer x")];
    let one =
        Sidecar::with_tables(&origin, "[[upstream.rule]]\npath = \"/**\"\nttl = \"1h\"\n", &redis.patient_table());
    one.in_fleet().await;
    one.get_with("/x", &token).await;
    one.written().await;
    let other =
        Sidecar::with_tables(&origin, "[[upstream.rule]]\npath = \"/**\"\nttl = \"1h\"\n", &redis.patient_table());
    other.in_fleet().await;
    assert!(other.get_with("/x", &token).await.is_hit(), "both sidecars compute the same credential digest");
    let secret: Vec<u8> = redis.observer().get("{sidecache}:1:secret").expect("a secret");
    assert_eq!(secret.len(), 32);
}

#[tokio::test(flavor = "multi_thread")]
async fn not_found_response_removes_the_stale_redis_record() {
    let redis = Redis::start();
    let origin = Origin::start(|ask| if ask.number == 0 { Reply::fresh(1, "x") } else { Reply::new(404, "") }).await;
    let one = member(&origin, &redis).await;
    one.get("/x").await;
    one.written().await;
    assert_eq!(redis.keys("sidecache:1:s:*").len(), 1);
    one.turn(10);
    assert_eq!(one.get("/x").await.status, 404);
    until("the record is gone", || redis.keys("sidecache:1:s:*").is_empty().then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stats_separate_memory_from_redis_hits_and_health_reports_redis() {
    let redis = Redis::start();
    let origin = Origin::start(|_| Reply::fresh(60, "x")).await;
    let sidecar = member(&origin, &redis).await;
    sidecar.get("/x").await;
    sidecar.written().await;
    let other = member(&origin, &redis).await;
    for _ in 0..3 {
        other.get("/x").await;
    }
    let stats = other.stats().await;
    assert_eq!(
        (stats["requests"]["from_memory"].as_u64(), stats["requests"]["from_fleet"].as_u64()),
        (Some(2), Some(1))
    );
    assert!(stats["requests"]["latency_ms"]["stored"]["p99"].as_f64().is_some_and(|ms| ms > 0.0), "{stats}");
    let stats = sidecar.stats().await;
    assert_eq!(
        (stats["redis"]["records"]["misses"].as_u64(), stats["redis"]["records"]["hits"].as_u64()),
        (Some(1), Some(0))
    );
    assert_eq!(stats["redis"]["records"]["queue"]["written"].as_u64(), Some(1), "{stats}");
    assert!(stats["redis"]["connections"]["reader"]["p99_ms"].as_f64().is_some_and(|ms| ms > 0.0), "{stats}");
    let health = get(sidecar.admin, "/health", &[]).await.json();
    assert_eq!(health["components"]["redis"]["status"], "ok", "{health}");
    assert!(health["components"]["redis"]["invalidation_lag_ms"].as_u64().is_some_and(|ms| ms < 5_000), "{health}");
}

#[tokio::test(flavor = "multi_thread")]
async fn documented_redis_acl_permissions_are_sufficient() {
    let redis = Redis::start();
    let page = include_str!("../docs/REDIS.md");
    let needs =
        page.split("An ACL user needs `").nth(1).and_then(|rest| rest.split('`').next()).expect("an ACL rule");
    let mut user = redis::cmd("ACL");
    for word in ["SETUSER", "narrow", "on", ">secret"].into_iter().chain(needs.split(' ')) {
        user.arg(word);
    }
    user.exec(&mut redis.observer()).expect("a user");
    let folder = crate::support::redis::folder("acl");
    std::fs::write(folder.join("password"), "secret").expect("writable");
    let table = format!(
        "{}username = \"narrow\"\npassword = {{ file = \"{}\" }}\n",
        redis.table(),
        folder.join("password").display()
    );
    let origin = Origin::start(|ask| Reply::new(200, ask.number.to_string())).await;
    let rules = "[[upstream.rule]]\npath = \"/**\"\nttl = \"60s\"\nrefresh_ahead = \"40s\"\n";
    let (one, other) = (Sidecar::with_tables(&origin, rules, &table), Sidecar::with_tables(&origin, rules, &table));
    for sidecar in [&one, &other] {
        sidecar.in_fleet().await;
    }
    one.get("/x").await;
    one.written().await;
    assert!(other.get("/x").await.is_hit());
    other.turn_in_fleet(50).await;
    assert!(other.get("/x").await.is_hit());
    origin.wait_for_requests(2).await;
    one.purge(r#"{"patterns":["/x*"]}"#).await;
    until("the scan has deleted the record", || redis.keys("sidecache:1:s:*").is_empty().then_some(())).await;
    for sidecar in [&one, &other] {
        let state = sidecar.shared.fleet.as_ref().expect("a fleet").redis.state();
        for (name, link) in state.connections {
            assert_eq!(link.refused, 0, "{name}: {link:?}");
        }
    }
    std::fs::remove_dir_all(folder).expect("the folder exists");
}
