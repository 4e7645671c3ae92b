//! Latency of `/health` under full load, and while the upstream and Redis hang. Needs wrk.
//! `cargo bench --bench health`.

#![allow(clippy::disallowed_methods)] // measures real time

mod harness;
#[path = "../tests/support/redis.rs"]
#[allow(dead_code)]
mod server;

use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::time::Duration;

use harness::{Conn, Program, ms, origin, quantile, row};
use nix::sys::signal::Signal;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio::time::interval;

use server::Redis;

/// The number of requests to the admin listener, sent at 100 per second.
const REQUESTS: usize = 800;

#[tokio::main]
async fn main() {
    println!("{:<72}{:>14}{:>24}", "", "target", "measured");
    under_load().await;
    while_everything_hangs().await;
}

/// Returns the latencies of requests to the admin listener.
async fn health(address: SocketAddr, path: &str) -> Vec<Duration> {
    let mut conn = Conn::open(address).await.expect("a listener");
    let (mut every, mut times) = (interval(Duration::from_millis(10)), Vec::new());
    for _ in 0..REQUESTS {
        every.tick().await;
        let got = conn.get(path).await.expect("a response");
        assert_eq!(got.status, 200);
        times.push(got.took);
    }
    times
}

fn report(what: &str, target: &str, times: Vec<Duration>) {
    let max = times.iter().max().copied().unwrap_or_default();
    row(what, target, &format!("p99 {}, max {}", ms(quantile(times, 0.99)), ms(max)));
}

/// Loads the sidecar with hits from 64 connections while `/health` is measured.
async fn under_load() {
    let (upstream, _) = origin(Duration::ZERO, "Cache-Control: max-age=3600\r\n", 1024).await;
    let sidecar = Program::sidecar(upstream, "", "");
    report("/health, idle", "", health(sidecar.admin(), "/health").await);
    let url = format!("http://{}/x", sidecar.api());
    // The load generator has a lower priority, so that it does not delay the measurement.
    let mut wrk = Command::new("nice")
        .args(["-n", "10", "wrk", "-t1", "-c64", "-d20s", &url])
        .stdout(Stdio::null())
        .spawn()
        .expect("wrk is installed (apt-get install wrk)");
    report("/health under full load", "p99 ≤ 5 ms", health(sidecar.admin(), "/health").await);
    report("/livez under full load", "", health(sidecar.admin(), "/livez").await);
    let _ = wrk.kill();
    let _ = wrk.wait();
}

/// The upstream accepts connections and sends nothing, 200 clients wait, and Redis is stopped.
async fn while_everything_hangs() {
    let silent = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let upstream = silent.local_addr().expect("an address");
    tokio::spawn(async move {
        let mut held = Vec::new();
        while let Ok((stream, _)) = silent.accept().await {
            held.push(stream);
        }
    });
    let redis = Redis::start();
    let sidecar = Program::sidecar(upstream, "[upstream.timeouts]\ndeadline = \"30s\"\n", &redis.table());
    let mut clients = JoinSet::new();
    for n in 0..200 {
        let api = sidecar.api();
        clients.spawn(async move {
            let mut conn = Conn::open(api).await.expect("a listener");
            let _ = conn.get(&format!("/{n}")).await;
        });
    }
    redis.signal(Signal::SIGSTOP);
    report(
        "/health, upstream and Redis hang, 200 clients wait",
        "≤ 500 ms",
        health(sidecar.admin(), "/health").await,
    );
    redis.signal(Signal::SIGCONT);
    clients.abort_all();
}
