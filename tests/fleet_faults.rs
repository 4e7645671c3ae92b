//! Fleet faults: Redis rejects writes, is emptied, or returns with older data, and no sidecar serves a purged entry.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::sys::signal::Signal;
use redis::Commands;
use tokio::task::JoinSet;

use crate::support::process::Process;
use crate::support::sidecar::text;
use crate::support::{Chaos, Mood, Origin, Redis, Reply, Sidecar, get, send, soon, until};

const RULES: &str = "[[upstream.rule]]\npath = \"/**\"\nttl = \"1h\"\nstale_if_error = \"1h\"\ntags = [\"all\"]\n";

/// Entries are unverified one second after the invalidation log was last read to its end.
const UNVERIFIED: &str = "[memory]\nmax_unverified = \"1s\"\n";

/// Starts an origin whose responses name the version of the data.
async fn versioned() -> (Origin, Arc<AtomicUsize>) {
    let version = Arc::new(AtomicUsize::new(0));
    let current = version.clone();
    let origin = Origin::start(move |_| Reply::new(200, current.load(Ordering::SeqCst).to_string())).await;
    (origin, version)
}

async fn member(origin: &Origin, tables: &str) -> Sidecar {
    let sidecar = Sidecar::with_tables(origin, RULES, tables);
    sidecar.settled().await;
    sidecar
}

fn command(redis: &Redis, text: &str) {
    let mut command = redis::Cmd::new();
    for word in text.split(' ') {
        command.arg(word);
    }
    command.exec(&mut redis.observer()).expect("a reply");
}

/// Waits until the sidecar responds with this version.
async fn serves(sidecar: &Sidecar, target: &str, version: &str) {
    soon("a response with the version", async { while sidecar.get(target).await.text() != version {} }).await;
}

/// Returns the number of entries in the invalidation log.
fn log_length(redis: &Redis) -> usize {
    redis.observer().xlen("{sidecache}:1:log").expect("a reply")
}

fn redis_of(health: &serde_json::Value) -> &serde_json::Value {
    &health["components"]["redis"]
}

#[tokio::test(flavor = "multi_thread")]
async fn purge_that_redis_refuses_to_write_ends_the_trust_of_every_sidecar() {
    for (refusal, reason, repair) in [
        ("CONFIG SET min-replicas-to-write 1", "NOREPLICAS", "CONFIG SET min-replicas-to-write 0"),
        ("CONFIG SET maxmemory 1", "OOM", "CONFIG SET maxmemory 0"),
        ("REPLICAOF 127.0.0.1 1", "READONLY", "REPLICAOF NO ONE"),
    ] {
        let redis = Redis::start();
        let (origin, version) = versioned().await;
        let tables = redis.patient_table() + UNVERIFIED;
        let (one, other) = (member(&origin, &tables).await, member(&origin, &tables).await);
        for sidecar in [&one, &other] {
            assert_eq!(sidecar.get("/a").await.text(), "0");
        }
        command(&redis, refusal);
        version.store(1, Ordering::SeqCst);
        let purged = one.purge(r#"{"tags":["all"]}"#).await;
        assert_eq!(purged["logged"], false, "{reason}");
        assert_eq!(one.get("/a").await.text(), "1", "{reason}");
        serves(&other, "/a", "1").await;
        let health = soon("health reports the reason", async {
            loop {
                let health = get(other.admin, "/health", &[]).await.json();
                if redis_of(&health)["trouble"].as_str().is_some_and(|text| text.contains(reason)) {
                    return health;
                }
            }
        });
        let health = health.await;
        assert_eq!(health["status"], "degraded", "{health}");
        command(&redis, repair);
        let logged = async {
            while one.shared.invalidations.unlogged() > 0 {
                one.settled().await;
            }
        };
        soon("the purge is logged", logged).await;
        other.settled().await;
        let healthy = async { while get(other.admin, "/health", &[]).await.json()["status"] != "ok" {} };
        soon("health is ok", healthy).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sidecar_cut_off_from_redis_ends_the_trust_of_the_others_until_it_is_back() {
    let redis = Redis::start();
    let (origin, version) = versioned().await;
    let chaos = Chaos::before(redis.address()).await;
    let one = member(&origin, &(chaos.table() + UNVERIFIED)).await;
    let other = member(&origin, &(redis.table() + UNVERIFIED)).await;
    for sidecar in [&one, &other] {
        assert_eq!(sidecar.get("/a").await.text(), "0");
    }
    chaos.set(Mood::Refuses);
    one.lost_redis().await;
    version.store(1, Ordering::SeqCst);
    one.purge(r#"{"tags":["all"]}"#).await;
    serves(&other, "/a", "1").await;
    let health = get(one.admin, "/health", &[]).await.json();
    assert_eq!(redis_of(&health)["unlogged_purges"], 1, "{health}");
    chaos.set(Mood::Fine);
    one.settled().await;
    other.settled().await;
    soon("entries are verified again", async { while !other.get("/a").await.is_hit() {} }).await;
    assert_eq!(log_length(&redis), 2, "the reset that began the log, and one purge");
}

#[tokio::test(flavor = "multi_thread")]
async fn purge_whose_reply_is_lost_is_logged_once() {
    let redis = Redis::start();
    let (origin, _) = versioned().await;
    let chaos = Chaos::before(redis.address()).await;
    let one = member(&origin, &chaos.table()).await;
    let other = member(&origin, &redis.table()).await;
    // The first one loads the script.
    one.purge(r#"{"tags":["all"]}"#).await;
    for round in 2..7 {
        // The commands reach Redis, and the replies do not come back.
        chaos.set(Mood::NoReplies);
        one.purge(r#"{"tags":["all"]}"#).await;
        until("the purge is sent", || (log_length(&redis) > round).then_some(())).await;
        chaos.set(Mood::Fine);
        until("the purge is confirmed", || (one.shared.invalidations.unlogged() == 0).then_some(())).await;
    }
    assert_eq!(log_length(&redis), 7, "the reset that began the log, and six purges");
    other.level_with(&redis).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sidecar_that_shuts_down_logs_its_purges_and_leaves() {
    let redis = Redis::start();
    let (origin, version) = versioned().await;
    let other = member(&origin, &redis.table()).await;
    let file = crate::support::redis::folder("leaving").join("sidecache.toml");
    std::fs::write(&file, text(origin.address, RULES, &redis.table())).expect("writable");
    let one = Process::start(&["--config", &file.display().to_string()], 3).await;
    let admin = one.address("admin");
    until("both are members", || {
        let members: usize = redis.observer().zcard("{sidecache}:1:sidecars").ok()?;
        (members == 2).then_some(())
    })
    .await;
    assert_eq!(other.get("/a").await.text(), "0");
    redis.signal(Signal::SIGSTOP);
    version.store(1, Ordering::SeqCst);
    let lines = [("Content-Type", "application/json")];
    let purged = send(admin, "POST", "/purge", &lines, br#"{"tags":["all"]}"#).await.json();
    assert_eq!(purged["logged"], false, "{purged}");
    one.signal(Signal::SIGTERM);
    redis.signal(Signal::SIGCONT);
    assert_eq!(one.ended().await, Some(0));
    other.level_with(&redis).await;
    assert_eq!(other.get("/a").await.text(), "1");
    let members: usize = redis.observer().zcard("{sidecache}:1:sidecars").expect("a reply");
    assert_eq!(members, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn records_of_a_redis_that_returns_with_older_data_are_not_fresh() {
    let mut redis = Redis::start();
    let (origin, version) = versioned().await;
    let one = member(&origin, &redis.table()).await;
    let other = member(&origin, &redis.table()).await;
    one.get("/a").await;
    one.written().await;
    command(&redis, "SAVE");
    version.store(1, Ordering::SeqCst);
    one.purge(r#"{"tags":["all"]}"#).await;
    other.level_with(&redis).await;
    // The sidecar that made the purge, and could log it once more, is gone.
    drop(one);
    redis.kill();
    other.lost_redis().await;
    redis.restart();
    assert_eq!(redis.keys("sidecache:1:s:*").len(), 1, "the snapshot has the record");
    let later = member(&origin, &redis.table()).await;
    other.settled().await;
    for sidecar in [&later, &other] {
        assert_eq!(sidecar.get("/a").await.text(), "1");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn restarted_redis_makes_entries_stale_and_they_stand_in_for_failures() {
    let mut redis = Redis::start();
    let (origin, _) = versioned().await;
    let one = member(&origin, &redis.table()).await;
    one.get("/a").await;
    redis.kill();
    one.lost_redis().await;
    redis.restart();
    one.settled().await;
    let before = origin.count();
    assert!(!one.get("/a").await.is_hit(), "the entry may have missed a purge");
    assert_eq!(origin.count(), before + 1);
    assert!(one.get("/a").await.is_hit());
}

#[tokio::test(flavor = "multi_thread")]
async fn purge_that_waits_counts_sidecars_that_an_emptied_redis_has_forgotten() {
    let redis = Redis::start();
    let (origin, _) = versioned().await;
    let chaos = Chaos::before(redis.address()).await;
    let one = member(&origin, &redis.table()).await;
    let other = member(&origin, &chaos.table()).await;
    one.settled().await;
    chaos.set(Mood::Refuses);
    other.lost_redis().await;
    command(&redis, "FLUSHALL");
    one.settled().await;
    let lines = [("Content-Type", "application/json")];
    let purge = || send(one.admin, "POST", "/purge?wait=1s", &lines, br#"{"tags":["all"]}"#);
    let purged = purge().await.json();
    assert_eq!((purged["applied"].as_u64(), purged["sidecars"].as_u64()), (Some(1), Some(2)), "{purged}");
    redis.signal(Signal::SIGSTOP);
    let purged = purge().await.json();
    assert!(purged["sidecars"].is_null() && purged["logged"] == false, "{purged}");
    redis.signal(Signal::SIGCONT);
}

#[tokio::test(flavor = "multi_thread")]
async fn sidecar_started_after_redis_was_emptied_does_not_trust_while_an_earlier_one_is_cut_off() {
    let redis = Redis::start();
    let (origin, version) = versioned().await;
    let chaos = Chaos::before(redis.address()).await;
    let one = member(&origin, &(redis.table() + UNVERIFIED)).await;
    let other = member(&origin, &(chaos.table() + UNVERIFIED)).await;
    one.settled().await;
    chaos.set(Mood::Refuses);
    other.lost_redis().await;
    command(&redis, "FLUSHALL");
    let late = member(&origin, &(redis.table() + UNVERIFIED)).await;
    let counted = async { while get(late.admin, "/health", &[]).await.json()["status"] != "degraded" {} };
    soon("the sidecar that is cut off is missed", counted).await;
    assert_eq!(late.get("/a").await.text(), "0");
    version.store(1, Ordering::SeqCst);
    other.purge(r#"{"tags":["all"]}"#).await;
    serves(&late, "/a", "1").await;
    chaos.set(Mood::Fine);
    other.settled().await;
    soon("entries are verified again", async { while !late.get("/a").await.is_hit() {} }).await;
    let healthy = async { while get(late.admin, "/health", &[]).await.json()["status"] != "ok" {} };
    soon("health is ok", healthy).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn purge_logged_once_more_keeps_what_was_fetched_after_it() {
    let redis = Redis::start();
    let down = Arc::new(AtomicUsize::new(0));
    let failing = down.clone();
    let origin = Origin::start(move |ask| {
        let status = if failing.load(Ordering::SeqCst) == 0 { 200 } else { 503 };
        Reply::new(status, ask.number.to_string())
    })
    .await;
    let one = member(&origin, &redis.table()).await;
    let other = member(&origin, &redis.table()).await;
    one.purge(r#"{"tags":["all"]}"#).await;
    other.level_with(&redis).await;
    let fetched = other.get("/a").await.text();
    command(&redis, "DEL {sidecache}:1:log");
    one.settled().await;
    until("the purge is logged once more", || (log_length(&redis) > 1).then_some(())).await;
    other.settled().await;
    other.level_with(&redis).await;
    down.store(1, Ordering::SeqCst);
    let stale = other.get("/a").await;
    assert_eq!((stale.status, stale.text()), (200, fetched), "{}", stale.cache_status());
}

#[tokio::test(flavor = "multi_thread")]
async fn variants_of_a_cold_url_are_fetched_at_once_with_redis() {
    let redis = Redis::start();
    let origin =
        Origin::start(|ask| Reply::new(200, ask.header("x-variant").unwrap_or_default()).header("Vary", "X-Variant"))
            .await;
    let one = member(&origin, &redis.patient_table()).await;
    let address = one.address;
    for round in 0..5 {
        let mut requests = JoinSet::new();
        for variant in 0..20 {
            requests.spawn(async move {
                let variant = variant.to_string();
                let answer = get(address, &format!("/{round}"), &[("X-Variant", &variant)]).await;
                assert_eq!((answer.status, answer.text()), (200, variant.clone()), "{}", answer.cache_status());
            });
        }
        // If each variant waited for the lease of another, this would exceed the timeout.
        soon("all variants", requests.join_all()).await;
    }
    assert_eq!(origin.count(), 100);
}

#[tokio::test(flavor = "multi_thread")]
async fn mode_that_is_not_authenticated_changes_nothing() {
    let redis = Redis::start();
    let (origin, _) = versioned().await;
    let configured =
        Sidecar::from_text(&format!("mode = \"bypass\"\n{}", text(origin.address, RULES, &redis.table())));
    configured.settled().await;
    let mode = async || get(configured.admin, "/health", &[]).await.json()["mode"].clone();
    for forged in ["normal", "normal 9999999999999", ""] {
        let _: () = redis.observer().set("{sidecache}:1:mode", forged).expect("a reply");
        configured.settled().await;
        assert_eq!(mode().await["mode"], "bypass", "{forged:?}");
    }
    let other = member(&origin, &redis.table()).await;
    let lines = [("Content-Type", "application/json")];
    let set = send(other.admin, "POST", "/mode", &lines, br#"{"mode":"normal","fleet":true}"#).await;
    assert_eq!(set.status, 200);
    soon("the fleet mode applies", async { while mode().await["mode"] != "normal" {} }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn full_ledger_makes_only_its_own_upstream_unverified() {
    let (origin, _) = versioned().await;
    let second = format!(
        "[[upstream]]\nname = \"second\"\nurl = \"http://{}\"\nlisten = \"127.0.0.1:0\"\n{RULES}",
        origin.address
    );
    let sidecar = Sidecar::with_tables(&origin, RULES, &second);
    sidecar.get("/a").await;
    let tags: Vec<String> = (0..60_000).map(|tag| format!("tag{tag}")).collect();
    for (upstream, is_hit) in [("second", true), ("api", false)] {
        for half in 0..2 {
            let tags: Vec<_> = tags.iter().map(|tag| format!("{tag}-{half}")).collect();
            let purge = serde_json::json!({ "tags": tags, "upstream": upstream, "soft": true });
            sidecar.purge(&purge.to_string()).await;
        }
        let answer = sidecar.get("/a").await;
        assert_eq!(answer.is_hit(), is_hit, "{upstream}: {}", answer.cache_status());
        assert_eq!(answer.status, 200);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn large_record_is_read_in_parts() {
    let redis = Redis::start();
    let body: Vec<u8> = (0..3_000_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let served = body.clone();
    let origin = Origin::start(move |_| Reply::fresh(3600, served.clone())).await;
    let table = redis.patient_table() + "compress = \"off\"\n";
    let (one, other) = (member(&origin, &table).await, member(&origin, &table).await);
    assert_eq!(one.get("/large").await.body, body);
    one.written().await;
    let answer = other.get("/large").await;
    assert!(answer.is_hit() && answer.body == body, "{}", answer.cache_status());
    assert_eq!(origin.count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn purges_and_confirmations_arrive_after_the_clock_of_redis_went_back() {
    let redis = Redis::start();
    let (origin, version) = versioned().await;
    let (one, other) = (member(&origin, &redis.table()).await, member(&origin, &redis.table()).await);
    one.settled().await;
    let inbox = format!("{{sidecache}}:1:inbox:{}", id_of(&one));
    let lines = [("Content-Type", "application/json")];
    // IDs of a time to come: those that Redis gives from now on are as if its clock had gone back since.
    let ahead = "99999999999999-0";
    let steps = [
        String::new(),
        format!("XSETID {{sidecache}}:1:log {ahead}"),
        format!("XSETID {inbox} {ahead}"),
        format!("DEL {inbox}"),
        "DEL {sidecache}:1:log".to_owned(),
    ];
    for (number, step) in (1..).zip(&steps) {
        if !step.is_empty() {
            command(&redis, step);
            one.settled().await;
            other.settled().await;
        }
        other.get("/a").await;
        version.store(number, Ordering::SeqCst);
        let purged = send(one.admin, "POST", "/purge?wait=5s", &lines, br#"{"tags":["all"]}"#).await.json();
        assert_eq!((purged["applied"].as_u64(), purged["sidecars"].as_u64()), (Some(2), Some(2)), "{step}: {purged}");
        assert_eq!(other.get("/a").await.text(), number.to_string(), "{step}");
    }
    command(&redis, &format!("ZADD {{sidecache}}:1:sidecars 99999999999999 {}", id_of(&other)));
    other.settled().await;
    one.settled().await;
    let health = get(one.admin, "/health", &[]).await.json();
    assert_eq!(health["status"], "ok", "{health}");
}

/// Returns the ID of a sidecar.
fn id_of(sidecar: &Sidecar) -> String {
    sidecar.shared.fleet.as_ref().expect("a fleet").sidecar_id.to_string()
}
