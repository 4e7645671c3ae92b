//! Fleet coordination: purges reach every sidecar, and a cold key costs one upstream request.

use std::sync::atomic::{AtomicUsize, Ordering};

use redis::Commands;
use tokio::task::JoinSet;

use nix::sys::signal::Signal;

use crate::support::process::Process;
use crate::support::sidecar::text;
use crate::support::{Chaos, Gate, Mood, Origin, Redis, Reply, Sidecar, get, send, soon, until};

const RULES: &str = "[[upstream.rule]]\npath = \"/products/{id}\"\nttl = \"1h\"\nstale_while_revalidate = \"1h\"\n\
                     tags = [\"products\", \"product:{id}\"]\n\
                     [[upstream.rule]]\npath = \"/**\"\nttl = \"1h\"\n";

async fn member(origin: &Origin, table: &str) -> Sidecar {
    let sidecar = Sidecar::with_tables(origin, RULES, table);
    sidecar.in_fleet().await;
    sidecar
}

async fn fleet(origin: &Origin, redis: &Redis, size: usize) -> Vec<Sidecar> {
    let mut sidecars = Vec::new();
    for _ in 0..size {
        sidecars.push(member(origin, &redis.table()).await);
    }
    sidecars
}

fn counting() -> impl Fn(&crate::support::origin::Ask) -> Reply + Send + Sync + 'static {
    |ask| Reply::new(200, ask.number.to_string())
}

/// Waits until three sidecars wait for the lease of a fourth.
async fn three_wait_for_lease(redis: &Redis) {
    until("three sidecars wait for the lease", || {
        let lines = redis.keys("{sidecache}:1:line:*");
        let count: usize = lines.first().and_then(|line| redis.observer().scard(line).ok()).unwrap_or(0);
        (count == 3).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn purge_on_one_sidecar_reaches_every_sidecar() {
    let redis = Redis::start();
    let origin = Origin::start(counting()).await;
    let sidecars = fleet(&origin, &redis, 3).await;
    let table = [
        (r#"{"tags":["product:1"]}"#, vec!["/products/1"]),
        (r#"{"urls":["/a?x=1"]}"#, vec!["/a?x=1"]),
        (r#"{"prefixes":["/a"]}"#, vec!["/a?x=1", "/a?x=2"]),
        (r#"{"patterns":["*x=2"]}"#, vec!["/a?x=2"]),
        (r#"{"all":true}"#, vec!["/products/1", "/products/2", "/a?x=1", "/a?x=2"]),
    ];
    for (purge, named) in table {
        let targets = ["/products/1", "/products/2", "/a?x=1", "/a?x=2"];
        for target in targets {
            for sidecar in &sidecars {
                sidecar.get(target).await;
                assert!(sidecar.get(target).await.is_hit());
                sidecar.written().await;
            }
        }
        let answer = send(
            sidecars[0].admin,
            "POST",
            "/purge?wait=10s",
            &[("Content-Type", "application/json")],
            purge.as_bytes(),
        )
        .await;
        let answer = answer.json();
        assert_eq!((answer["applied"].as_u64(), answer["sidecars"].as_u64()), (Some(3), Some(3)), "{answer}");
        assert_eq!(answer["logged"], true);
        for target in targets {
            let before = origin.count();
            for sidecar in &sidecars {
                sidecar.get(target).await;
                sidecar.written().await;
            }
            let fetched = origin.count() - before;
            assert_eq!(
                fetched,
                usize::from(named.contains(&target)),
                "{purge}: {target} is fetched once by the fleet"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn soft_purge_is_soft_on_every_sidecar() {
    let redis = Redis::start();
    let origin = Origin::start(counting()).await;
    let sidecars = fleet(&origin, &redis, 2).await;
    sidecars[0].get("/products/1").await;
    sidecars[0].written().await;
    sidecars[1].get("/products/1").await;
    sidecars[0].purge(r#"{"tags":["product:1"],"soft":true}"#).await;
    sidecars[1].level_with(&redis).await;
    let stale = sidecars[1].get("/products/1").await;
    assert!(stale.cache_status().contains("stale-while-revalidate"), "{}", stale.cache_status());
}

#[tokio::test(flavor = "multi_thread")]
async fn write_on_one_sidecar_invalidates_on_all() {
    let redis = Redis::start();
    let version = std::sync::Arc::new(AtomicUsize::new(0));
    let current = version.clone();
    let origin = Origin::start(move |ask| {
        if ask.method == "PUT" {
            current.fetch_add(1, Ordering::SeqCst);
        }
        Reply::new(200, current.load(Ordering::SeqCst).to_string())
    })
    .await;
    let sidecars = fleet(&origin, &redis, 2).await;
    for round in 1..20 {
        for sidecar in &sidecars {
            sidecar.get("/products/1").await;
            sidecar.written().await;
        }
        assert_eq!(sidecars[0].send("PUT", "/products/1", "x").await.status, 200);
        sidecars[1].level_with(&redis).await;
        for sidecar in &sidecars {
            assert_eq!(sidecar.get("/products/1").await.text(), round.to_string());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn fetch_begun_before_a_purge_is_neither_stored_nor_joined() {
    let redis = Redis::start();
    let gate = Gate::new();
    let slow = gate.clone();
    let origin = Origin::start(move |ask| {
        let reply = Reply::new(200, ask.number.to_string());
        if ask.number == 0 { reply.after(&slow) } else { reply }
    })
    .await;
    let sidecars = fleet(&origin, &redis, 2).await;
    let address = sidecars[0].address;
    let first = tokio::spawn(async move { get(address, "/products/1", &[]).await });
    origin.wait_for_requests(1).await;
    sidecars[0].purge(r#"{"tags":["product:1"]}"#).await;
    sidecars[1].level_with(&redis).await;
    // The first sidecar still holds the lease, but a request after the purge does not wait for it.
    assert_eq!(sidecars[1].get("/products/1").await.text(), "1");
    gate.open();
    assert_eq!(soon("the first response", first).await.expect("no panic").text(), "0", "the response is delivered");
    for sidecar in &sidecars {
        sidecar.written().await;
        assert_ne!(sidecar.get("/products/1").await.text(), "0", "the response is not stored");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn purge_survives_a_lost_redis_connection() {
    let redis = Redis::start();
    let origin = Origin::start(counting()).await;
    let chaos = Chaos::before(redis.address()).await;
    let (one, other) = (member(&origin, &redis.table()).await, member(&origin, &chaos.table()).await);
    for round in 0..20 {
        other.get("/products/1").await;
        other.written().await;
        chaos.set(Mood::Refuses);
        one.purge(r#"{"tags":["product:1"]}"#).await;
        let before = origin.count();
        chaos.set(Mood::Fine);
        other.level_with(&redis).await;
        assert!(!other.get("/products/1").await.is_hit(), "{round}");
        assert_eq!(origin.count(), before + 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn purge_during_a_redis_outage_is_local_at_once_and_fleet_wide_later() {
    let redis = Redis::start();
    let origin = Origin::start(counting()).await;
    let chaos = Chaos::before(redis.address()).await;
    let (one, other) = (member(&origin, &chaos.table()).await, member(&origin, &redis.table()).await);
    for sidecar in [&one, &other] {
        sidecar.get("/products/1").await;
        sidecar.written().await;
    }
    chaos.set(Mood::Refuses);
    one.lost_redis().await;
    let answer = one.purge(r#"{"tags":["product:1"]}"#).await;
    assert_eq!(answer["logged"], false, "{answer}");
    assert!(!one.get("/products/1").await.is_hit());
    let old = other.get("/products/1").await;
    assert!(old.is_hit(), "the purge is not in the log");
    chaos.set(Mood::Fine);
    // The new response may be a hit on a record that the first sidecar has stored since.
    soon("the other sidecar applies the purge", async {
        while other.get("/products/1").await.text() == old.text() {}
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unverified_entries_are_not_served_after_max_unverified() {
    let redis = Redis::start();
    let origin = Origin::start(counting()).await;
    let chaos = Chaos::before(redis.address()).await;
    let sidecar = member(&origin, &chaos.table()).await;
    sidecar.get("/products/1").await;
    chaos.set(Mood::Refuses);
    sidecar.lost_redis().await;
    assert!(sidecar.get("/products/1").await.is_hit());
    sidecar.turn(29);
    assert!(sidecar.get("/products/1").await.is_hit(), "max_unverified is 30 s");
    sidecar.turn(5);
    assert_eq!(sidecar.get("/products/1").await.text(), "1", "fetched again");
    assert!(sidecar.get("/products/1").await.is_hit(), "the new entry is served for max_unverified, too");
    sidecar.turn(35);
    assert!(!sidecar.get("/products/1").await.is_hit());
    chaos.set(Mood::Fine);
    sidecar.turn_in_fleet(600).await;
    assert!(sidecar.get("/products/1").await.is_hit(), "verified");
}

#[tokio::test(flavor = "multi_thread")]
async fn replaced_invalidation_log_makes_entries_stale() {
    let redis = Redis::start();
    let origin = Origin::start(counting()).await;
    let rules = "[[upstream.rule]]\npath = \"/**\"\nttl = \"1h\"\nstale_if_error = \"1h\"\n";
    let sidecar = Sidecar::with_tables(&origin, rules, &redis.table());
    sidecar.in_fleet().await;
    for lost in ["DEL {sidecache}:1:log", "FLUSHALL"] {
        sidecar.purge(r#"{"all":true}"#).await;
        sidecar.get("/a").await;
        assert!(sidecar.get("/a").await.is_hit());
        let before = origin.count();
        let mut command = redis::Cmd::new();
        for word in lost.split(' ') {
            command.arg(word);
        }
        command.exec(&mut redis.observer()).expect("a reply");
        // The sidecar checks the end of the log once a second.
        soon("the replaced log is noticed", async {
            while sidecar.get("/a").await.is_hit() {
                tokio::task::yield_now().await;
            }
        })
        .await;
        assert!(origin.count() > before);
        sidecar.settled().await;
        sidecar.get("/a").await;
        assert!(sidecar.get("/a").await.is_hit(), "an entry fetched since is trusted");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pattern_purge_deletes_records_in_redis() {
    let redis = Redis::start();
    let origin = Origin::start(counting()).await;
    let sidecar = member(&origin, &redis.patient_table()).await;
    for id in 0..20 {
        sidecar.get(&format!("/products/{id}")).await;
        sidecar.get(&format!("/other/{id}*?")).await;
    }
    sidecar.written().await;
    assert_eq!(redis.keys("sidecache:1:s:*").len(), 40);
    sidecar.purge(r#"{"patterns":["*[a-z]*","/products/1*"]}"#).await;
    until("the matching records are deleted", || (redis.keys("sidecache:1:s:*").len() == 29).then_some(())).await;
    sidecar.purge(r#"{"prefixes":["/other/1*"]}"#).await;
    until("one record is deleted", || (redis.keys("sidecache:1:s:*").len() == 28).then_some(())).await;
    sidecar.purge(r#"{"all":true}"#).await;
    until("all records are deleted", || redis.keys("sidecache:1:s:*").is_empty().then_some(())).await;
    let scans = || sidecar.shared.fleet.as_ref().expect("a fleet").tier.state().walks;
    until("the scans have ended", || (scans().running == 0).then_some(())).await;
    assert_eq!(sidecar.stats().await["redis"]["records"]["walks"]["removed"], 40);
}

#[tokio::test(flavor = "multi_thread")]
async fn scan_keeps_records_fetched_after_the_purge() {
    let redis = Redis::start();
    let origin = Origin::start(counting()).await;
    let (one, other) = (member(&origin, &redis.patient_table()).await, member(&origin, &redis.patient_table()).await);
    for purge in [r#"{"all":true}"#, r#"{"prefixes":["/a"]}"#] {
        for id in 0..100 {
            one.get(&format!("/a{id}")).await;
        }
        one.written().await;
        one.purge(purge).await;
        other.level_with(&redis).await;
        let before = origin.count();
        for id in 0..100 {
            other.get(&format!("/a{id}")).await;
        }
        other.written().await;
        let scans = || one.shared.fleet.as_ref().expect("a fleet").tier.state().walks;
        until("the scans have ended", || (scans().running == 0).then_some(())).await;
        for id in 0..100 {
            one.get(&format!("/a{id}")).await;
        }
        assert_eq!(origin.count() - before, 100, "{purge}: each was fetched once");
        assert_eq!(redis.keys("sidecache:1:s:*").len(), 100);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_misses_in_the_fleet_make_one_upstream_request() {
    let redis = Redis::start();
    let gate = Gate::new();
    let held = gate.clone();
    let origin = Origin::start(move |_| Reply::new(200, "x").after(&held)).await;
    let sidecars = fleet(&origin, &redis, 4).await;
    let mut clients = JoinSet::new();
    for sidecar in &sidecars {
        for _ in 0..50 {
            let address = sidecar.address;
            clients.spawn(async move { get(address, "/products/1", &[]).await });
        }
    }
    origin.wait_for_requests(1).await;
    three_wait_for_lease(&redis).await;
    gate.open();
    while let Some(answer) = clients.join_next().await {
        assert_eq!(answer.expect("no panic").text(), "x");
    }
    assert_eq!(origin.count(), 1);
    until("the lease is released", || redis.keys("{sidecache}:1:l*:*").is_empty().then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unshareable_response_releases_waiting_sidecars() {
    let redis = Redis::start();
    let gate = Gate::new();
    let held = gate.clone();
    let origin = Origin::start(move |ask| {
        let reply = Reply::new(200, "x").header("Cache-Control", "no-store");
        if ask.number == 0 { reply.after(&held) } else { reply }
    })
    .await;
    let table = redis.table();
    let one = Sidecar::with_tables(&origin, "", &table);
    let other = Sidecar::with_tables(&origin, "", &table);
    one.in_fleet().await;
    other.in_fleet().await;
    let (first, second) = (one.address, other.address);
    let first = tokio::spawn(async move { get(first, "/x", &[]).await.status });
    origin.wait_for_requests(1).await;
    let second = tokio::spawn(async move { get(second, "/x", &[]).await.status });
    until("the second sidecar waits for the lease", || {
        (!redis.keys("{sidecache}:1:line:*").is_empty()).then_some(())
    })
    .await;
    gate.open();
    assert_eq!(soon("both responses", async { (first.await, second.await) }).await.0.expect("no panic"), 200);
    until("both sidecars have fetched", || (origin.count() == 2).then_some(())).await;
}

const AHEAD: &str = "[[upstream.rule]]\npath = \"/**\"\nttl = \"60s\"\nrefresh_ahead = \"40s\"\n";

/// Starts two sidecars that share an entry which is about to expire.
async fn about_to_expire(origin: &Origin, redis: &Redis, lines: &[(&str, &str)]) -> [Sidecar; 2] {
    let one = Sidecar::with_tables(origin, AHEAD, &redis.table());
    let other = Sidecar::with_tables(origin, AHEAD, &redis.table());
    for sidecar in [&one, &other] {
        sidecar.in_fleet().await;
        sidecar.get_with("/x", lines).await;
        sidecar.written().await;
    }
    assert_eq!(origin.count(), 1);
    one.turn_in_fleet(50).await;
    other.turn_in_fleet(50).await;
    [one, other]
}

#[tokio::test(flavor = "multi_thread")]
async fn hot_entry_is_refreshed_early_once_in_the_fleet() {
    let redis = Redis::start();
    for lines in [&[][..], &[("Authorization", "Bearer x")]] {
        let origin = Origin::start(counting()).await;
        let sidecars = about_to_expire(&origin, &redis, lines).await;
        for _ in 0..20 {
            for sidecar in &sidecars {
                assert!(sidecar.get_with("/x", lines).await.is_hit());
            }
        }
        origin.wait_for_requests(2).await;
        for sidecar in &sidecars {
            sidecar.written().await;
            // The sidecar that did not fetch finds the refreshed record when its own entry expires.
            sidecar.turn_in_fleet(15).await;
            assert_eq!(sidecar.get_with("/x", lines).await.text(), "1");
        }
        assert_eq!(origin.count(), 2, "{lines:?}");
        until("the refresh queue is empty", || {
            let left: usize = redis.observer().xlen("{sidecache}:1:work").unwrap_or(0);
            (left == 0).then_some(())
        })
        .await;
        let _: () = redis::cmd("FLUSHALL").query(&mut redis.observer()).expect("a reply");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn refresh_job_of_a_dead_worker_is_taken_over() {
    let redis = Redis::start();
    let never = Gate::new();
    let origin = Origin::start(move |ask| {
        let reply = Reply::new(200, ask.number.to_string());
        if ask.number == 1 { reply.after(&never) } else { reply }
    })
    .await;
    let rules = "[[upstream.rule]]\npath = \"/**\"\nttl = \"10s\"\nrefresh_ahead = \"10s\"\n";
    let file = crate::support::redis::folder("worker").join("sidecache.toml");
    std::fs::write(&file, text(origin.address, rules, &redis.patient_table())).expect("writable");
    let worker = Process::start(&["--config", &file.display().to_string()], 3).await;
    let address = worker.address("upstream=api");
    // The sidecar confirms a purge: it has read the log to its end.
    let admin = worker.address("admin");
    let confirmed = async {
        let lines = [("Content-Type", "application/json")];
        while send(admin, "POST", "/purge?wait=10s", &lines, br#"{"tags":["x"]}"#).await.json()["applied"] != 1 {}
    };
    soon("the sidecar has read the log", confirmed).await;
    // The sidecar enqueues a refresh, claims it, and is killed while the refresh runs.
    let hot = async {
        while origin.count() < 2 {
            assert_eq!(get(address, "/x", &[]).await.status, 200);
        }
    };
    soon("the refresh is claimed", hot).await;
    worker.signal(Signal::SIGKILL);
    assert_eq!(worker.ended().await, None);
    let other = Sidecar::with_tables(&origin, rules, &redis.patient_table());
    origin.wait_for_requests(3).await;
    until("the refresh queue is empty", || {
        let left: usize = redis.observer().xlen("{sidecache}:1:work").unwrap_or(1);
        (left == 0).then_some(())
    })
    .await;
    drop(other);
    std::fs::remove_dir_all(file.parent().expect("a folder")).expect("the folder exists");
}

#[tokio::test(flavor = "multi_thread")]
async fn url_purge_applies_to_every_target_of_the_record() {
    let redis = Redis::start();
    let origin = Origin::start(counting()).await;
    let rules = "[[upstream.rule]]\npath = \"/**\"\nttl = \"1h\"\nkey = { query = [\"*\", \"!utm_*\"] }\n";
    let one = Sidecar::with_tables(&origin, rules, &redis.table());
    let other = Sidecar::with_tables(&origin, rules, &redis.table());
    for sidecar in [&one, &other] {
        sidecar.in_fleet().await;
    }
    one.get("/x?utm_a=1").await;
    one.written().await;
    one.purge(r#"{"urls":["/x?utm_a=1"]}"#).await;
    other.level_with(&redis).await;
    assert!(!other.get("/x?utm_a=2").await.is_hit(), "both targets share the record");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_cache_responses_are_not_fetched_one_after_another() {
    let redis = Redis::start();
    let gate = Gate::new();
    let held = gate.clone();
    let origin = Origin::start(move |ask| {
        let reply = Reply::new(200, "x").header("Cache-Control", "no-cache").header("ETag", "\"1\"");
        if ask.number == 0 { reply.after(&held) } else { reply }
    })
    .await;
    let mut sidecars = Vec::new();
    for _ in 0..4 {
        let sidecar = Sidecar::with_tables(&origin, "", &redis.table());
        sidecar.in_fleet().await;
        sidecars.push(sidecar);
    }
    let mut clients = JoinSet::new();
    for sidecar in &sidecars {
        let address = sidecar.address;
        clients.spawn(async move { get(address, "/x", &[]).await.status });
    }
    origin.wait_for_requests(1).await;
    three_wait_for_lease(&redis).await;
    gate.open();
    for status in soon("all responses", clients.join_all()).await {
        assert_eq!(status, 200);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn oversized_response_releases_waiting_sidecars() {
    let redis = Redis::start();
    let gate = Gate::new();
    let held = gate.clone();
    let origin = Origin::start(move |ask| {
        let chunk = format!("{:x}\r\n{}\r\n", 40_000, "x".repeat(40_000)).repeat(4);
        let head = "HTTP/1.1 200 OK\r\nCache-Control: max-age=60\r\nTransfer-Encoding: chunked\r\n\r\n";
        let reply = Reply::raw_halfway(format!("{head}{chunk}"), &held, "0\r\n\r\n");
        if ask.number == 0 { reply } else { Reply::fresh(60, "small") }
    })
    .await;
    let memory = format!("{}[memory]\nmax_bytes = \"1MiB\"\nmax_entry_bytes = \"64KiB\"\n", redis.table());
    let one = Sidecar::with_tables(&origin, "", &memory);
    let other = Sidecar::with_tables(&origin, "", &memory);
    one.in_fleet().await;
    other.in_fleet().await;
    let address = one.address;
    let first = tokio::spawn(async move { get(address, "/x", &[]).await.body.len() });
    origin.wait_for_requests(1).await;
    assert_eq!(other.get("/x").await.text(), "small", "before the first response has ended");
    gate.open();
    assert_eq!(soon("the first response", first).await.expect("no panic"), 160_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn purge_lost_in_a_failover_is_logged_again() {
    let redis = Redis::start();
    let origin = Origin::start(counting()).await;
    let chaos = Chaos::before(redis.address()).await;
    let sidecar = member(&origin, &redis.table()).await;
    let far = member(&origin, &chaos.table()).await;
    far.get("/products/2").await;
    far.written().await;
    chaos.set(Mood::Refuses);
    far.lost_redis().await;
    sidecar.purge(r#"{"tags":["product:2"]}"#).await;
    sidecar.level_with(&redis).await;
    // Deletes the last log entry, as a failover to a lagging replica would.
    let last: redis::streams::StreamRangeReply =
        redis.observer().xrevrange_count("{sidecache}:1:log", "+", "-", 1).expect("a log");
    let _: usize = redis.observer().xdel("{sidecache}:1:log", &[&last.ids[0].id]).expect("a reply");
    chaos.set(Mood::Fine);
    soon("the purge reaches the other sidecar", async { while far.get("/products/2").await.text() == "0" {} }).await;
    soon("records are shared again", async {
        let mut number = 0;
        loop {
            number += 1;
            let target = format!("/products/new-{number}");
            sidecar.get(&target).await;
            sidecar.written().await;
            if far.get(&target).await.is_hit() {
                return;
            }
        }
    })
    .await;
}
