//! Redis outages under load: Redis is killed, stopped or slowed down, and recovers.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::sys::signal::Signal;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use super::chaos;
use super::harness::{Conn, Got, Program, ms, origin, quantile, row};
use super::server::Redis;
use super::{FRESH, TAGGED, members, stats};

/// Sends 1,000 requests per second, nine of ten for entries in memory, during a Redis fault.
pub(super) async fn outage(what: &str) {
    let mut redis = Redis::start();
    let chaos = chaos::Chaos::before(redis.address()).await;
    let (upstream, _count) = origin(Duration::ZERO, FRESH, 1024).await;
    let sidecars = members(2, upstream, TAGGED, &chaos.table()).await;
    let (sidecar, other) = (&sidecars[0], &sidecars[1]);
    let mut warm = Conn::open(sidecar.api()).await.expect("a listener");
    let mut other_conn = Conn::open(other.api()).await.expect("a listener");
    for id in 0..100 {
        assert_eq!(warm.get(&format!("/p/{id}")).await.expect("a response").status, 200);
    }
    sleep(Duration::from_millis(200)).await;
    for id in 0..100 {
        assert!(other_conn.get(&format!("/p/{id}")).await.expect("a response").is_hit());
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
    let purged = admin.send("POST", "/purge", "{\"tags\":[\"p:7\"]}").await.expect("a response");
    assert_eq!(purged.status, 200);
    let own = warm.get("/p/7").await.expect("a response").is_hit();
    let grown = sidecar.rss().saturating_sub(rss);
    watched.store(false, Ordering::SeqCst);
    let opened = watcher.await.expect("no panic");
    match what {
        "killed for 3 s" => redis.restart(),
        "stopped for 3 s" => redis.signal(Signal::SIGCONT),
        _ => chaos.set(chaos::Mood::Fine),
    }
    let back = Instant::now();
    let again = used_again(sidecar, &mut warm).await.duration_since(back);
    let mut applied = None;
    for _ in 0..2_000 {
        if !other_conn.get("/p/7").await.expect("a response").is_hit() {
            applied = Some(back.elapsed());
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
    row("  p99 of memory hits, increase", "≤ 1 ms", &ms(p99_during.saturating_sub(p99_before)));
    row("  requests slowed by more than 50 ms", "≤ 32", &slowed.to_string());
    row("  slowest request (at most two commands of 100 ms)", "", &ms(slowest));
    row(
        "  breaker open after the first missed deadline",
        "≤ 100 ms",
        &opened.map_or("no deadline missed".into(), ms),
    );
    row("  memory growth", "≤ 24 MiB", &format!("{:.1} MiB", grown as f64 / 1_048_576.0));
    row("  Redis used again after it listens", "≤ 1 s", &ms(again));
    row("  entry purged during the outage: served by the same sidecar", "no", if own { "yes" } else { "no" });
    row(
        "  served by the other sidecar after the recovery",
        "no",
        &applied.map_or("yes".into(), |t| format!("no, after {}", ms(t))),
    );
}

/// Sends requests at a steady rate, every tenth for a new target. Returns for each whether its target was warm.
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
                // Target 7 is purged during the outage.
                let id = if warm { 8 + number % 90 } else { 1_000 + first_new + number };
                let got = conn.get(&format!("/p/{id}")).await;
                seen.push((warm, got));
            }
            seen
        });
    }
    workers.join_all().await.into_iter().flatten().collect()
}

/// Returns the time from the first missed deadline until the reader's breaker opens, as `/stats` reports it.
async fn breaker_opens(admin: SocketAddr, watched: Arc<AtomicBool>) -> Option<Duration> {
    let mut conn = Conn::open(admin).await.expect("an admin listener");
    let (mut missed, mut before) = (None, Instant::now());
    while watched.load(Ordering::SeqCst) {
        let polled = Instant::now();
        let stats = conn.get("/stats").await.expect("a response");
        let stats: serde_json::Value = serde_json::from_slice(&stats.body).expect("json");
        let reader = &stats["redis"]["connections"]["reader"];
        if reader["missed"].as_u64() > Some(0) {
            // The deadline was missed after the previous poll.
            let since = *missed.get_or_insert(before);
            if reader["breaker"] == "open" || reader["connected"] == false {
                return Some(polled.duration_since(since));
            }
        }
        before = polled;
        sleep(Duration::from_millis(1)).await;
    }
    None
}

/// Waits until a lookup reaches Redis again. Returns the time.
async fn used_again(sidecar: &Program, conn: &mut Conn) -> Instant {
    let lookups = |stats: &serde_json::Value| stats["redis"]["records"]["misses"].as_u64().unwrap_or(0);
    let before = lookups(&stats(sidecar).await);
    for number in 0.. {
        conn.get(&format!("/p/again-{number}")).await.expect("a response");
        let now = Instant::now();
        if lookups(&stats(sidecar).await) > before {
            return now;
        }
        sleep(Duration::from_millis(2)).await;
    }
    unreachable!("the loop has no end")
}
