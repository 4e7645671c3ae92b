//! Redis is killed, stopped or slowed under load, and comes back.

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

/// 1,000 requests a second, nine of ten for what is in memory, while something happens to Redis.
pub(super) async fn outage(what: &str) {
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
