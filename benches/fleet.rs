//! A fleet before a real Redis, with real processes that are really killed: one cold key, Redis away, purges, the
//! processor's time of a hit from Redis, a sidecar killed under load. Prints asked and measured. `just bench-fleet`;
//! some minutes; `cargo bench --bench fleet -- cold purge` runs only parts. Ends what it started.

#![allow(clippy::cast_precision_loss, clippy::cast_possible_truncation)] // figures for people

#[path = "../tests/support/chaos.rs"]
#[allow(dead_code)]
mod chaos;
mod harness;
#[path = "../tests/support/redis.rs"]
#[allow(dead_code)]
mod server;

use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use fred::interfaces::{ClientLike, KeysInterface};
use harness::{Conn, Got, Program, body_of, cpu_of, ms, origin, quantile, row};
use nix::sys::signal::Signal;
use server::Redis;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

const FRESH: &str = "Cache-Control: max-age=3600\r\n";
const TAGGED: &str = "[[upstream.rule]]\npath = \"/p/{id}\"\nttl = \"1h\"\ntags = [\"all\", \"p:{id}\"]\n";

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    if let Some(url) = arguments.iter().find_map(|a| a.strip_prefix("bare-get=")) {
        return runtime.block_on(bare_get(url));
    }
    // cargo passes --bench; `cargo test --benches` does not, and must not take minutes.
    if !arguments.iter().any(|argument| argument == "--bench") {
        return;
    }
    let chosen = |name: &str| {
        let named: Vec<&String> = arguments.iter().filter(|a| !a.starts_with('-')).collect();
        named.is_empty() || named.iter().any(|a| *a == name)
    };
    runtime.block_on(async {
        row("", "asked", "measured");
        if chosen("cold") {
            cold().await;
        }
        if chosen("outage") {
            outage("killed for 3 s").await;
            outage("stopped for 3 s").await;
            outage("slowed by 500 ms for 3 s").await;
        }
        if chosen("tampered") {
            tampered().await;
        }
        if chosen("purge") {
            purge().await;
            lost().await;
        }
        if chosen("soak") {
            soak().await;
        }
        if chosen("cpu") {
            cpu().await;
        }
        if chosen("restart") {
            restart().await;
        }
    });
}

/// Waits until a sidecar uses Redis.
async fn joined(sidecar: &Program) {
    let mut admin = Conn::open(sidecar.admin()).await.expect("an admin listener");
    loop {
        let health = admin.get("/health").await.expect("an answer");
        let health: serde_json::Value = serde_json::from_slice(&health.body).expect("json");
        let redis = &health["components"]["redis"];
        if redis["status"] == "ok" && redis["invalidation_lag_ms"].as_u64().is_some_and(|lag| lag < 2_000) {
            return;
        }
        sleep(Duration::from_millis(5)).await;
    }
}

async fn stats(sidecar: &Program) -> serde_json::Value {
    let mut admin = Conn::open(sidecar.admin()).await.expect("an admin listener");
    serde_json::from_slice(&admin.get("/stats").await.expect("an answer").body).expect("json")
}

async fn members(count: usize, upstream: SocketAddr, rules: &str, table: &str) -> Vec<Program> {
    let sidecars: Vec<Program> = (0..count).map(|_| Program::sidecar(upstream, rules, table)).collect();
    for sidecar in &sidecars {
        joined(sidecar).await;
    }
    sidecars
}

/// The statuses of so many requests at once to each; 0 where the connection ended.
async fn burst(addresses: &[SocketAddr], each: usize, target: &str) -> Vec<(SocketAddr, u16)> {
    let mut conns = Vec::new();
    for address in addresses {
        for _ in 0..each {
            conns.push((*address, Conn::open(*address).await.expect("a listener")));
        }
    }
    let mut asking = JoinSet::new();
    for (address, mut conn) in conns {
        let target = target.to_owned();
        asking.spawn(async move { (address, conn.get(&target).await.map_or(0, |got| got.status)) });
    }
    asking.join_all().await
}

/// 4 sidecars × 200 requests for one cold key.
async fn cold() {
    for (what, asked) in [
        ("4 × 200 at once, one cold key", "1"),
        ("  the fetching process killed mid-fetch", "≤ 2"),
        ("  Redis down", "≤ 4"),
    ] {
        let mut redis = Redis::start();
        let (upstream, count) = origin(Duration::from_millis(700), FRESH, 1024).await;
        let mut sidecars = members(4, upstream, "", &redis.table()).await;
        if asked == "≤ 4" {
            redis.kill();
        }
        let addresses: Vec<SocketAddr> = sidecars.iter().map(Program::api).collect();
        let asking = tokio::spawn({
            let addresses = addresses.clone();
            async move { burst(&addresses, 200, "/cold").await }
        });
        let mut killed = None;
        if asked == "≤ 2" {
            while count.load(Ordering::SeqCst) == 0 {
                sleep(Duration::from_millis(1)).await;
            }
            // Whose request is at the origin? The one whose lease is in Redis.
            let fetching = fetching(&sidecars, &redis).await;
            let sidecar = sidecars.remove(fetching);
            killed = Some(sidecar.api());
            sidecar.kill();
        }
        let statuses = asking.await.expect("it ran");
        let failed = statuses.iter().filter(|(from, status)| Some(*from) != killed && *status != 200).count();
        row(&format!("{what}: upstream requests"), asked, &count.load(Ordering::SeqCst).to_string());
        row("    errors for clients of those that live", "0", &failed.to_string());
    }
}

/// Which of them fetches: whose lease it is.
async fn fetching(sidecars: &[Program], redis: &Redis) -> usize {
    let lease = redis.keys("{sidecache}:1:lease:*").remove(0);
    let holder: String = redis::cmd("GET").arg(lease).query(&mut redis.observer()).expect("a lease");
    for (index, sidecar) in sidecars.iter().enumerate() {
        if stats(sidecar).await["redis"]["sidecar"].as_str().is_some_and(|id| holder.starts_with(id)) {
            return index;
        }
    }
    panic!("nobody has the lease {holder}");
}

/// 1,000 requests a second, nine of ten for what is in memory, while something happens to Redis.
async fn outage(what: &str) {
    let mut redis = Redis::start();
    let chaos = chaos::Chaos::before(redis.address()).await;
    let (upstream, _count) = origin(Duration::ZERO, FRESH, 1024).await;
    let sidecars = members(2, upstream, TAGGED, &chaos.table()).await;
    let (sidecar, other) = (&sidecars[0], &sidecars[1]);
    let mut warm = Conn::open(sidecar.api()).await.expect("a listener");
    let mut there = Conn::open(other.api()).await.expect("a listener");
    for id in 0..100 {
        assert_eq!(warm.get(&format!("/p/{id}")).await.expect("an answer").status, 200);
    }
    sleep(Duration::from_millis(200)).await;
    for id in 0..100 {
        assert!(there.get(&format!("/p/{id}")).await.expect("an answer").is_hit());
    }
    let before = load(sidecar.api(), Duration::from_secs(3), 0).await;
    let rss = sidecar.rss();
    let watched = Arc::new(AtomicBool::new(true));
    let watcher = tokio::spawn(breaker_opens(sidecar.admin(), watched.clone()));
    sleep(Duration::from_millis(50)).await;
    match what {
        "killed for 3 s" => redis.kill(),
        "stopped for 3 s" => redis.signal(Signal::SIGSTOP),
        _ => chaos.set(chaos::Mood::Slow(Duration::from_millis(500))),
    }
    let during = load(sidecar.api(), Duration::from_secs(3), 1_000_000).await;
    let mut admin = Conn::open(sidecar.admin()).await.expect("an admin listener");
    let purged = admin.send("POST", "/purge", "{\"tags\":[\"p:7\"]}").await.expect("an answer");
    assert_eq!(purged.status, 200);
    let own = warm.get("/p/7").await.expect("an answer").is_hit();
    let grown = sidecar.rss().saturating_sub(rss);
    watched.store(false, Ordering::SeqCst);
    let opened = watcher.await.expect("it ran");
    match what {
        "killed for 3 s" => redis.restart(),
        "stopped for 3 s" => redis.signal(Signal::SIGCONT),
        _ => chaos.set(chaos::Mood::Fine),
    }
    let back = Instant::now();
    let again = used_again(sidecar, &mut warm).await.duration_since(back);
    let mut told = None;
    for _ in 0..2_000 {
        if !there.get("/p/7").await.expect("an answer").is_hit() {
            told = Some(back.elapsed());
            break;
        }
        sleep(Duration::from_millis(1)).await;
    }
    let errors = before.iter().chain(&during).filter(|(_, got)| got.as_ref().is_none_or(|g| g.status != 200)).count();
    let hits = |seen: &[(bool, Option<Got>)]| -> Vec<Duration> {
        seen.iter().filter(|(hit, _)| *hit).filter_map(|(_, got)| got.as_ref().map(|g| g.took)).collect()
    };
    let (p99_before, p99_during) = (quantile(hits(&before), 0.99), quantile(hits(&during), 0.99));
    let misses: Vec<Duration> =
        during.iter().filter(|(hit, _)| !*hit).filter_map(|(_, got)| got.as_ref().map(|g| g.took)).collect();
    let slowed = misses.iter().filter(|took| **took > Duration::from_millis(50)).count();
    let slowest = misses.iter().max().copied().unwrap_or_default();
    row(&format!("Redis {what}, 1,000 req/s: client errors"), "0", &errors.to_string());
    row("  p99 of hits from memory, beyond what it was before", "≤ 1 ms", &ms(p99_during.saturating_sub(p99_before)));
    row("  requests slowed by more than 50 ms", "≤ 32", &slowed.to_string());
    row("  the slowest of them (two commands of 100 ms at most)", "", &ms(slowest));
    row(
        "  breaker open after the first missed deadline",
        "≤ 100 ms",
        &opened.map_or("no deadline missed".into(), ms),
    );
    row("  memory grown", "≤ 24 MiB", &format!("{:.1} MiB", grown as f64 / 1_048_576.0));
    row("  Redis used again after it listens", "≤ 1 s", &ms(again));
    row("  what was purged meanwhile: served there", "no", if own { "yes" } else { "no" });
    row(
        "  and on the other, once Redis is back",
        "no",
        &told.map_or("yes".into(), |t| format!("no, after {}", ms(t))),
    );
}

/// Requests at a steady rate: of a hundred warm targets, and every tenth of something new. Says which were warm.
async fn load(address: SocketAddr, time: Duration, first_new: usize) -> Vec<(bool, Option<Got>)> {
    const WORKERS: usize = 50;
    let mut workers = JoinSet::new();
    for worker in 0..WORKERS {
        workers.spawn(async move {
            let mut conn = Conn::open(address).await.expect("a listener");
            let mut every = tokio::time::interval(Duration::from_millis(WORKERS as u64));
            let (begun, mut seen, mut number) = (Instant::now(), Vec::new(), worker);
            while begun.elapsed() < time {
                every.tick().await;
                number += WORKERS;
                let warm = !(number / WORKERS + worker).is_multiple_of(10);
                // 7 is purged on the way.
                let id = if warm { 8 + number % 90 } else { 1_000 + first_new + number };
                let got = conn.get(&format!("/p/{id}")).await;
                seen.push((warm, got));
            }
            seen
        });
    }
    workers.join_all().await.into_iter().flatten().collect()
}

/// How long after the first missed deadline the reader's breaker opens, as `/stats` shows it.
async fn breaker_opens(admin: SocketAddr, watched: Arc<AtomicBool>) -> Option<Duration> {
    let mut conn = Conn::open(admin).await.expect("an admin listener");
    let (mut missed, mut before) = (None, Instant::now());
    while watched.load(Ordering::SeqCst) {
        let asked = Instant::now();
        let stats = conn.get("/stats").await.expect("an answer");
        let stats: serde_json::Value = serde_json::from_slice(&stats.body).expect("json");
        let reader = &stats["redis"]["connections"]["reader"];
        if reader["missed"].as_u64() > Some(0) {
            // It happened after the last look.
            let since = *missed.get_or_insert(before);
            if reader["breaker"] == "open" || reader["connected"] == false {
                return Some(asked.duration_since(since));
            }
        }
        before = asked;
        sleep(Duration::from_millis(1)).await;
    }
    None
}

/// Until a look-up reaches Redis again: when.
async fn used_again(sidecar: &Program, conn: &mut Conn) -> Instant {
    let looked = |stats: &serde_json::Value| stats["redis"]["records"]["misses"].as_u64().unwrap_or(0);
    let before = looked(&stats(sidecar).await);
    for number in 0.. {
        conn.get(&format!("/p/again-{number}")).await.expect("an answer");
        let now = Instant::now();
        if looked(&stats(sidecar).await) > before {
            return now;
        }
        sleep(Duration::from_millis(2)).await;
    }
    unreachable!("it tries for ever")
}

/// Records changed in every way, read by sidecars with an empty memory.
async fn tampered() {
    const RECORDS: usize = 5_000;
    const ROUNDS: usize = 20;
    let redis = Redis::start();
    let (upstream, count) = origin(Duration::ZERO, FRESH, 1500).await;
    let writer = members(1, upstream, "", &redis.table()).await.remove(0);
    read_all(writer.api(), RECORDS).await;
    sleep(Duration::from_millis(500)).await;
    let mut observer = redis.observer();
    let keys = redis.keys("sidecache:1:s:*");
    let good: Vec<Vec<u8>> = redis::cmd("MGET").arg(&keys).query(&mut observer).expect("records");
    let (mut changed, mut wrong, mut ended, asked) = (0, 0, 0, count.load(Ordering::SeqCst));
    for round in 0..ROUNDS {
        let mut pipe = redis::pipe();
        for (index, key) in keys.iter().enumerate() {
            let mut record = good[index].clone();
            match (index + round) % 5 {
                0 => record.truncate((index * 7919 + round) % record.len()),
                1 => record.clone_from(&good[(index + 1) % good.len()]),
                2 => record[1] = 0,
                3 => {
                    let at = (index * 31 + round * 97) % record.len();
                    record[at] ^= 1 << (round % 8);
                }
                _ => record.extend_from_slice(b"more"),
            }
            changed += 1;
            pipe.cmd("SET").arg(key).arg(record).arg("PX").arg(3_600_000).ignore();
        }
        pipe.exec(&mut observer).expect("written");
        let mut reader = members(1, upstream, "", &redis.table()).await.remove(0);
        wrong += read_all(reader.api(), RECORDS).await;
        ended += usize::from(reader.has_ended());
    }
    row(&format!("{changed} records tampered with: wrong bodies"), "0", &wrong.to_string());
    row("  processes that ended", "0", &ended.to_string());
    row("  of them fetched again", "all", &(count.load(Ordering::SeqCst) - asked).to_string());
}

/// Reads all targets; how many bodies were not theirs.
async fn read_all(address: SocketAddr, targets: usize) -> usize {
    let mut workers = JoinSet::new();
    for worker in 0..32 {
        workers.spawn(async move {
            let mut conn = Conn::open(address).await.expect("a listener");
            let mut wrong = 0;
            for target in (worker..targets).step_by(32).map(|id| format!("/r/{id}")) {
                let got = conn.get(&target).await;
                wrong += usize::from(got.is_none_or(|got| got.body != body_of(&target, 1500).as_bytes()));
            }
            wrong
        });
    }
    workers.join_all().await.into_iter().sum()
}

/// One tag on a million entries.
async fn purge() {
    const ENTRIES: usize = 1_000_000;
    const ROUNDS: usize = 100;
    let redis = Redis::start();
    let (upstream, count) = origin(Duration::ZERO, FRESH, 200).await;
    let sidecars = members(4, upstream, TAGGED, &redis.table()).await;
    let (begun, mut workers) = (Instant::now(), JoinSet::new());
    for worker in 0..64 {
        let address = sidecars[worker % 4].api();
        workers.spawn(async move {
            let mut conn = Conn::open(address).await.expect("a listener");
            for id in (worker..ENTRIES).step_by(64) {
                assert_eq!(conn.get(&format!("/p/{id}")).await.expect("an answer").status, 200);
            }
        });
    }
    workers.join_all().await;
    let mut observer = redis.observer();
    while stats(&sidecars[0]).await["redis"]["records"]["queue"]["waiting"] != 0 {
        sleep(Duration::from_millis(50)).await;
    }
    let keys: usize = redis::cmd("DBSIZE").query(&mut observer).expect("a number");
    println!("  ({ENTRIES} entries made in {:.0} s; {keys} keys in Redis)", begun.elapsed().as_secs_f64());
    let mut admin = Conn::open(sidecars[0].admin()).await.expect("an admin listener");
    let mut conns = Vec::new();
    for sidecar in &sidecars {
        conns.push(Conn::open(sidecar.api()).await.expect("a listener"));
    }
    let (mut answered, mut reached) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        let target = format!("/p/x{round}");
        for conn in &mut conns {
            conn.get(&target).await.expect("an answer");
            assert!(conn.get(&target).await.expect("an answer").is_hit());
        }
        let last = count.load(Ordering::SeqCst);
        let purged = Instant::now();
        let answer = admin.send("POST", "/purge", "{\"tags\":[\"all\"]}").await.expect("an answer");
        answered.push(answer.took);
        // Until each has served something that is not what it had.
        for conn in &mut conns {
            while conn.get(&target).await.expect("an answer").number() < last {}
        }
        reached.push(purged.elapsed());
    }
    row("purge of a tag with 1,000,000 entries: answered, p99", "≤ 5 ms", &ms(quantile(answered, 0.99)));
    row("  until none of four serves it, p99", "≤ 100 ms", &ms(quantile(reached, 0.99)));
}

/// 10,000 purges while a follower's connection is cut every second.
async fn lost() {
    const PURGES: usize = 10_000;
    let redis = Redis::start();
    let chaos = chaos::Chaos::before(redis.address()).await;
    let (upstream, _count) = origin(Duration::ZERO, FRESH, 100).await;
    let teller = members(1, upstream, TAGGED, &redis.table()).await.remove(0);
    let follower = members(1, upstream, TAGGED, &chaos.table()).await.remove(0);
    let done = Arc::new(AtomicBool::new(false));
    let cutter = tokio::spawn({
        let done = done.clone();
        async move {
            let mut cuts = 0;
            while !done.load(Ordering::SeqCst) {
                sleep(Duration::from_secs(1)).await;
                chaos.cut();
                cuts += 1;
            }
            // Kept until the end, so that the follower can connect again.
            (cuts, chaos)
        }
    });
    let (mut there, mut admin) = (
        Conn::open(follower.api()).await.expect("a listener"),
        Conn::open(teller.admin()).await.expect("a listener"),
    );
    for id in 0..PURGES {
        there.get(&format!("/p/{id}")).await.expect("an answer");
    }
    let begun = Instant::now();
    for id in 0..PURGES {
        let answer = admin.send("POST", "/purge", &format!("{{\"tags\":[\"p:{id}\"]}}")).await.expect("an answer");
        assert_eq!(answer.status, 200);
        // Long enough for some cuts.
        if id % 100 == 0 {
            sleep(Duration::from_millis(80)).await;
        }
    }
    let took = begun.elapsed();
    done.store(true, Ordering::SeqCst);
    let (cuts, chaos) = cutter.await.expect("it ran");
    sleep(Duration::from_secs(3)).await;
    joined(&follower).await;
    let mut served = 0;
    for id in 0..PURGES {
        served += usize::from(there.get(&format!("/p/{id}")).await.expect("an answer").is_hit());
    }
    drop(chaos);
    println!("  ({PURGES} purges in {:.1} s, {cuts} cuts)", took.as_secs_f64());
    row("10,000 purges, the connection cut every second: lost", "0", &served.to_string());
}

/// 100,000 keys and tags, until all their TTLs have passed.
async fn soak() {
    const KEYS: usize = 100_000;
    let redis = Redis::start();
    let (upstream, _count) = origin(Duration::ZERO, FRESH, 200).await;
    let rules = "[[upstream.rule]]\npath = \"/p/{id}\"\nttl = \"5s\"\ntags = [\"all\", \"p:{id}\"]\n";
    let sidecar = members(1, upstream, rules, &redis.table()).await.remove(0);
    let size = || redis::cmd("DBSIZE").query::<usize>(&mut redis.observer()).expect("a number");
    // The log, the secret, and who is there.
    while size() < 3 {
        sleep(Duration::from_millis(10)).await;
    }
    let baseline = size();
    let mut workers = JoinSet::new();
    for worker in 0..64 {
        let address = sidecar.api();
        workers.spawn(async move {
            let mut conn = Conn::open(address).await.expect("a listener");
            for id in (worker..KEYS).step_by(64) {
                conn.get(&format!("/p/{id}")).await.expect("an answer");
            }
        });
    }
    workers.join_all().await;
    let mut admin = Conn::open(sidecar.admin()).await.expect("an admin listener");
    for id in 0..1_000 {
        admin.send("POST", "/purge", &format!("{{\"tags\":[\"p:{id}\"]}}")).await.expect("an answer");
    }
    let peak = size();
    let begun = Instant::now();
    while size() > baseline && begun.elapsed() < Duration::from_secs(120) {
        sleep(Duration::from_millis(500)).await;
    }
    row(&format!("keys in Redis, from {peak}, back to"), &baseline.to_string(), &size().to_string());
    println!("  (after {:.0} s: a TTL of 5 s and a margin of 60 s)", begun.elapsed().as_secs_f64());
}

/// The processor's time of one request, over many.
async fn cpu() {
    const TARGETS: usize = 20_000;
    const REQUESTS: usize = 200_000;
    let redis = Redis::start();
    let (upstream, _count) = origin(Duration::ZERO, FRESH, 1024).await;
    let memory = members(1, upstream, "", &redis.table()).await.remove(0);
    drive(memory.api(), TARGETS, TARGETS).await;
    sleep(Duration::from_secs(1)).await;
    // Its memory holds a few hundred of them: nearly every look-up goes to Redis.
    let tables = redis.table() + "[memory]\nmax_bytes = \"1MiB\"\nmax_entry_bytes = \"64KiB\"\n";
    let remote = members(1, upstream, "", &tables).await.remove(0);
    let (mut from_memory, mut from_redis, mut bare, mut rates) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..3 {
        let (begun, before) = (Instant::now(), memory.cpu());
        drive(memory.api(), 1_000, REQUESTS).await;
        from_memory.push(memory.cpu().saturating_sub(before) / REQUESTS as u32);
        let _ = begun;
        let (begun, before) = (Instant::now(), remote.cpu());
        drive(remote.api(), TARGETS, REQUESTS).await;
        from_redis.push(remote.cpu().saturating_sub(before) / REQUESTS as u32);
        rates.push(REQUESTS as f64 / begun.elapsed().as_secs_f64());
        let key = &redis.keys("sidecache:1:s:*")[0];
        let output = Command::new(std::env::current_exe().expect("a path"))
            .arg(format!("bare-get={} {key} {REQUESTS}", redis.address()))
            .stderr(Stdio::inherit())
            .output()
            .expect("it runs");
        let nanos: u64 = String::from_utf8_lossy(&output.stdout).trim().parse().expect("a number");
        bare.push(Duration::from_nanos(nanos));
    }
    let stats = stats(&remote).await;
    let us = |d: Duration| format!("{:.1} µs", d.as_nanos() as f64 / 1000.0);
    let (memory, redis_hit, bare) = (quantile(from_memory, 0.5), quantile(from_redis, 0.5), quantile(bare, 0.5));
    row("processor time of a hit from memory (1 KiB, 64 connections)", "", &us(memory));
    row("  of a bare fred GET, 64 at once", "", &us(bare));
    row("  of a hit from Redis: at most 2 × memory + 1 × bare", &us(memory * 2 + bare), &us(redis_hit));
    rates.sort_by(f64::total_cmp);
    row("  hits from Redis per second, client and all on two cores", "", &format!("{:.0}", rates[1]));
    row("  look-ups that found their record", "", &stats["redis"]["records"]["hits"].to_string());
    let output = Command::new("redis-benchmark")
        .args(["-p", &redis.port.to_string(), "-t", "get", "-d", "1024", "-n", "200000", "-c", "64", "-q"])
        .output()
        .expect("it runs");
    let text = String::from_utf8_lossy(&output.stdout).replace('\r', "\n");
    let rate = text.lines().rev().find_map(|l| l.split("GET: ").nth(1)?.split(' ').next().map(str::to_owned));
    row("  redis-benchmark GET of 1 KiB, 64 connections, per second", "", &rate.unwrap_or_default());
}

/// So many requests over 64 connections.
async fn drive(address: SocketAddr, targets: usize, requests: usize) {
    let mut workers = JoinSet::new();
    for worker in 0..64 {
        workers.spawn(async move {
            let mut conn = Conn::open(address).await.expect("a listener");
            for number in (worker..requests).step_by(64) {
                // Round and round, so that a small memory never has what comes next.
                conn.get(&format!("/c/{}", number % targets)).await.expect("an answer");
            }
        });
    }
    workers.join_all().await;
}

/// A process of its own: nothing but GETs through fred, 64 at once. Prints nanoseconds of processor time for each.
async fn bare_get(what: &str) {
    let mut words = what.split(' ');
    let (address, key, requests) = (words.next().expect("an address"), words.next().expect("a key"), words.next());
    let requests: u32 = requests.and_then(|n| n.parse().ok()).expect("a number");
    let config = fred::types::config::Config::from_url(&format!("redis://{address}")).expect("a URL");
    let client = fred::clients::Client::new(config, None, None, None);
    client.init().await.expect("it answers");
    let before = cpu_of("self");
    let mut workers = JoinSet::new();
    for _ in 0..64 {
        let (client, key) = (client.clone(), key.to_owned());
        workers.spawn(async move {
            for _ in 0..requests / 64 {
                let value: Option<bytes::Bytes> = client.get(&key).await.expect("an answer");
                assert!(value.is_some());
            }
        });
    }
    workers.join_all().await;
    println!("{}", (cpu_of("self").saturating_sub(before) / requests).as_nanos());
}

/// A sidecar killed under load, and started again.
async fn restart() {
    const TARGETS: usize = 5_000;
    let redis = Redis::start();
    let (upstream, _count) = origin(Duration::ZERO, FRESH, 1024).await;
    let first = members(1, upstream, "", &redis.table()).await.remove(0);
    drive(first.api(), TARGETS, TARGETS * 2).await;
    let address = first.api();
    let under_load = tokio::spawn(async move {
        let mut conn = Conn::open(address).await?;
        for number in 0.. {
            conn.get(&format!("/c/{}", number % TARGETS)).await?;
        }
        None::<()>
    });
    sleep(Duration::from_millis(300)).await;
    first.kill();
    let _ = under_load.await;
    let second = Program::sidecar(upstream, "", &redis.table());
    let begun = Instant::now();
    let mut workers = JoinSet::new();
    for worker in 0..16 {
        let address = second.api();
        workers.spawn(async move {
            let (mut conn, mut hits, mut all) = (Conn::open(address).await.expect("a listener"), 0, 0);
            let mut number = worker * 311;
            while begun.elapsed() < Duration::from_secs(1) {
                number += 1;
                let got = conn.get(&format!("/c/{}", number % TARGETS)).await.expect("an answer");
                hits += u32::from(got.is_hit());
                all += 1;
            }
            (hits, all)
        });
    }
    let seen = workers.join_all().await;
    let (hits, all): (u32, u32) = seen.iter().fold((0, 0), |(h, a), (hits, all)| (h + hits, a + all));
    let part = 100.0 * f64::from(hits) / f64::from(all);
    row(
        &format!("killed under load: hits in its first second back ({all} requests)"),
        "≥ 95 %",
        &format!("{part:.1} %"),
    );
}
