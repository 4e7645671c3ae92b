//! A long run with expirations, the CPU time of a Redis hit, and a restart under load.

use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::time::Duration;

use fred::interfaces::{ClientLike, KeysInterface};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use super::harness::{Conn, Program, cpu_of, origin, quantile, row};
use super::server::Redis;
use super::{FRESH, members, stats};

/// 100,000 keys and tags, until all their TTLs have passed.
pub(super) async fn soak() {
    const KEYS: usize = 100_000;
    let redis = Redis::start();
    let (upstream, _count) = origin(Duration::ZERO, FRESH, 200).await;
    let rules = "[[upstream.rule]]\npath = \"/p/{id}\"\nttl = \"5s\"\ntags = [\"all\", \"p:{id}\"]\n";
    let sidecar = members(1, upstream, rules, &redis.table()).await.remove(0);
    let size = || redis::cmd("DBSIZE").query::<usize>(&mut redis.observer()).expect("a number");
    // The invalidation log, the secret, and the members.
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
                conn.get(&format!("/p/{id}")).await.expect("a response");
            }
        });
    }
    workers.join_all().await;
    let mut admin = Conn::open(sidecar.admin()).await.expect("an admin listener");
    for id in 0..1_000 {
        admin.send("POST", "/purge", &format!("{{\"tags\":[\"p:{id}\"]}}")).await.expect("a response");
    }
    let peak = size();
    let begun = Instant::now();
    while size() > baseline && begun.elapsed() < Duration::from_secs(120) {
        sleep(Duration::from_millis(500)).await;
    }
    row(&format!("keys in Redis, from {peak}, back to"), &baseline.to_string(), &size().to_string());
    println!("  (after {:.0} s: a TTL of 5 s and a margin of 60 s)", begun.elapsed().as_secs_f64());
}

/// Measures the CPU time per request.
pub(super) async fn cpu() {
    const TARGETS: usize = 20_000;
    const REQUESTS: usize = 200_000;
    let redis = Redis::start();
    let (upstream, _count) = origin(Duration::ZERO, FRESH, 1024).await;
    let memory = members(1, upstream, "", &redis.table()).await.remove(0);
    drive(memory.api(), TARGETS, TARGETS).await;
    sleep(Duration::from_secs(1)).await;
    // The memory tier holds a few hundred of the entries: nearly every lookup goes to Redis.
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
            .expect("the program starts");
        let nanos: u64 = String::from_utf8_lossy(&output.stdout).trim().parse().expect("a number");
        bare.push(Duration::from_nanos(nanos));
    }
    let stats = stats(&remote).await;
    let us = |d: Duration| format!("{:.1} µs", d.as_nanos() as f64 / 1000.0);
    let (memory, redis_hit, bare) = (quantile(from_memory, 0.5), quantile(from_redis, 0.5), quantile(bare, 0.5));
    row("CPU time of a memory hit (1 KiB, 64 connections)", "", &us(memory));
    row("  of a bare fred GET, 64 concurrent", "", &us(bare));
    row("  of a Redis hit: at most 2 × memory hit + 1 × bare GET", &us(memory * 2 + bare), &us(redis_hit));
    rates.sort_by(f64::total_cmp);
    row("  Redis hits per second, client and servers on two cores", "", &format!("{:.0}", rates[1]));
    row("  lookups that found a record", "", &stats["redis"]["records"]["hits"].to_string());
    let output = Command::new("redis-benchmark")
        .args(["-p", &redis.port.to_string(), "-t", "get", "-d", "1024", "-n", "200000", "-c", "64", "-q"])
        .output()
        .expect("the program starts");
    let text = String::from_utf8_lossy(&output.stdout).replace('\r', "\n");
    let rate = text.lines().rev().find_map(|l| l.split("GET: ").nth(1)?.split(' ').next().map(str::to_owned));
    row("  redis-benchmark GET of 1 KiB, 64 connections, per second", "", &rate.unwrap_or_default());
}

/// Sends `requests` requests over 64 connections, to `targets` URLs in turn.
async fn drive(address: SocketAddr, targets: usize, requests: usize) {
    let mut workers = JoinSet::new();
    for worker in 0..64 {
        workers.spawn(async move {
            let mut conn = Conn::open(address).await.expect("a listener");
            for number in (worker..requests).step_by(64) {
                // In cyclic order, so that a small memory tier never holds the next URL.
                conn.get(&format!("/c/{}", number % targets)).await.expect("a response");
            }
        });
    }
    workers.join_all().await;
}

/// Runs in a separate process: sends GETs through fred, 64 concurrent, and prints the CPU time per GET in nanoseconds.
pub(super) async fn bare_get(what: &str) {
    let mut words = what.split(' ');
    let (address, key, requests) = (words.next().expect("an address"), words.next().expect("a key"), words.next());
    let requests: u32 = requests.and_then(|n| n.parse().ok()).expect("a number");
    let config = fred::types::config::Config::from_url(&format!("redis://{address}")).expect("a URL");
    let client = fred::clients::Client::new(config, None, None, None);
    client.init().await.expect("a reply");
    let before = cpu_of("self");
    let mut workers = JoinSet::new();
    for _ in 0..64 {
        let (client, key) = (client.clone(), key.to_owned());
        workers.spawn(async move {
            for _ in 0..requests / 64 {
                let value: Option<bytes::Bytes> = client.get(&key).await.expect("a reply");
                assert!(value.is_some());
            }
        });
    }
    workers.join_all().await;
    println!("{}", (cpu_of("self").saturating_sub(before) / requests).as_nanos());
}

/// Kills a sidecar under load, and starts it again.
pub(super) async fn restart() {
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
                let got = conn.get(&format!("/c/{}", number % TARGETS)).await.expect("a response");
                hits += u32::from(got.is_hit());
                all += 1;
            }
            (hits, all)
        });
    }
    let seen = workers.join_all().await;
    let (hits, all): (u32, u32) = seen.iter().fold((0, 0), |(h, a), (hits, all)| (h + hits, a + all));
    let part = 100.0 * f64::from(hits) / f64::from(all);
    row(&format!("restart under load: hits in the first second ({all} requests)"), "≥ 95 %", &format!("{part:.1} %"));
}
