//! Fleet benchmarks with real sidecar processes and a real Redis: a cold key, Redis outages, tampered records, purges,
//! CPU time of a Redis hit, and a restart under load. Prints target and measured values. Run with `just bench-fleet`;
//! takes some minutes. `cargo bench --bench fleet -- cold purge` runs only these parts.

#![allow(clippy::cast_precision_loss, clippy::cast_possible_truncation)] // approximate figures

#[path = "../tests/support/chaos.rs"]
#[allow(dead_code)]
mod chaos;
#[path = "fleet/cost.rs"]
mod cost;
mod harness;
#[path = "fleet/invalidation.rs"]
mod invalidation;
#[path = "fleet/outage.rs"]
mod outage;
#[path = "fleet/scale.rs"]
mod scale;
#[path = "../tests/support/redis.rs"]
#[allow(dead_code)]
mod server;

use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::time::Duration;

use harness::{Conn, Program, origin, row};
use server::Redis;
use tokio::task::JoinSet;
use tokio::time::sleep;

const FRESH: &str = "Cache-Control: max-age=3600\r\n";
const TAGGED: &str = "[[upstream.rule]]\npath = \"/p/{id}\"\nttl = \"1h\"\ntags = [\"all\", \"p:{id}\"]\n";

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    if let Some(url) = arguments.iter().find_map(|a| a.strip_prefix("bare-get=")) {
        return runtime.block_on(cost::bare_get(url));
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
        row("", "target", "measured");
        if chosen("cold") {
            cold().await;
        }
        if chosen("variants") {
            scale::variants().await;
        }
        if chosen("outage") {
            outage::outage("killed for 3 s").await;
            outage::outage("stopped for 3 s").await;
            outage::outage("slowed by 500 ms for 3 s").await;
        }
        if chosen("tampered") {
            invalidation::tampered().await;
        }
        if chosen("purge") {
            invalidation::purge().await;
            invalidation::lost().await;
        }
        if chosen("soak") {
            cost::soak().await;
        }
        if chosen("cpu") {
            cost::cpu().await;
        }
        if chosen("scale") {
            scale::scale().await;
        }
        if chosen("restart") {
            cost::restart().await;
        }
    });
}

/// Waits until a sidecar uses Redis.
async fn joined(sidecar: &Program) {
    let mut admin = Conn::open(sidecar.admin()).await.expect("an admin listener");
    loop {
        let health = admin.get("/health").await.expect("a response");
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
    serde_json::from_slice(&admin.get("/stats").await.expect("a response").body).expect("json")
}

async fn members(count: usize, upstream: SocketAddr, rules: &str, table: &str) -> Vec<Program> {
    let sidecars: Vec<Program> = (0..count).map(|_| Program::sidecar(upstream, rules, table)).collect();
    for sidecar in &sidecars {
        joined(sidecar).await;
    }
    sidecars
}

/// Sends `each` concurrent requests to each address. Returns the statuses; 0 if the connection ended.
async fn burst(addresses: &[SocketAddr], each: usize, target: &str) -> Vec<(SocketAddr, u16)> {
    let mut conns = Vec::new();
    for address in addresses {
        for _ in 0..each {
            conns.push((*address, Conn::open(*address).await.expect("a listener")));
        }
    }
    let mut requests = JoinSet::new();
    for (address, mut conn) in conns {
        let target = target.to_owned();
        requests.spawn(async move { (address, conn.get(&target).await.map_or(0, |got| got.status)) });
    }
    requests.join_all().await
}

/// 4 sidecars × 200 requests for one cold key.
async fn cold() {
    for (what, target) in [
        ("4 × 200 concurrent requests for one cold key", "1"),
        ("  with the leader's process killed during the fetch", "≤ 2"),
        ("  with Redis down", "≤ 4"),
    ] {
        let mut redis = Redis::start();
        let (upstream, count) = origin(Duration::from_millis(700), FRESH, 1024).await;
        let mut sidecars = members(4, upstream, "", &redis.table()).await;
        if target == "≤ 4" {
            redis.kill();
        }
        let addresses: Vec<SocketAddr> = sidecars.iter().map(Program::api).collect();
        let requests = tokio::spawn({
            let addresses = addresses.clone();
            async move { burst(&addresses, 200, "/cold").await }
        });
        let mut killed = None;
        if target == "≤ 2" {
            while count.load(Ordering::SeqCst) == 0 {
                sleep(Duration::from_millis(1)).await;
            }
            // The sidecar that holds the lease in Redis is the one that fetches.
            let fetching = fetching(&sidecars, &redis).await;
            let sidecar = sidecars.remove(fetching);
            killed = Some(sidecar.api());
            sidecar.kill();
        }
        let statuses = requests.await.expect("no panic");
        let failed = statuses.iter().filter(|(from, status)| Some(*from) != killed && *status != 200).count();
        row(&format!("{what}: upstream requests"), target, &count.load(Ordering::SeqCst).to_string());
        row("    client errors at the other sidecars", "0", &failed.to_string());
    }
}

/// Returns the index of the sidecar that holds the lease.
async fn fetching(sidecars: &[Program], redis: &Redis) -> usize {
    let lease = redis.keys("{sidecache}:1:lease:*").remove(0);
    let holder: String = redis::cmd("GET").arg(lease).query(&mut redis.observer()).expect("a lease");
    for (index, sidecar) in sidecars.iter().enumerate() {
        if stats(sidecar).await["redis"]["sidecar"].as_str().is_some_and(|id| holder.starts_with(id)) {
            return index;
        }
    }
    panic!("no sidecar holds the lease {holder}");
}
