//! How soon is `/health` there, whatever hangs, and under full load? `cargo bench --bench health`. Needs wrk.

#![allow(clippy::disallowed_methods)] // it measures real time

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

/// So often it is asked, a hundred times a second.
const ASKED: usize = 800;

#[tokio::main]
async fn main() {
    println!("{:<72}{:>14}{:>24}", "", "asked", "measured");
    under_load().await;
    while_everything_hangs().await;
}

/// How long each answer of the admin listener took.
async fn health(address: SocketAddr, path: &str) -> Vec<Duration> {
    let mut conn = Conn::open(address).await.expect("it listens");
    let (mut every, mut times) = (interval(Duration::from_millis(10)), Vec::new());
    for _ in 0..ASKED {
        every.tick().await;
        let got = conn.get(path).await.expect("an answer");
        assert_eq!(got.status, 200);
        times.push(got.took);
    }
    times
}

fn tell(what: &str, asked: &str, times: Vec<Duration>) {
    let most = times.iter().max().copied().unwrap_or_default();
    row(what, asked, &format!("p99 {}, most {}", ms(quantile(times, 0.99)), ms(most)));
}

/// As many hits as a core can bear, from 64 connections; whoever asks and measures has the other one.
async fn under_load() {
    let (upstream, _) = origin(Duration::ZERO, "Cache-Control: max-age=3600\r\n", 1024).await;
    let sidecar = Program::sidecar(upstream, "", "");
    tell("/health, nothing to do", "", health(sidecar.admin(), "/health").await);
    let url = format!("http://{}/x", sidecar.api());
    // The one who measures must not wait behind the ones who press.
    let mut wrk = Command::new("nice")
        .args(["-n", "10", "wrk", "-t1", "-c64", "-d20s", &url])
        .stdout(Stdio::null())
        .spawn()
        .expect("wrk is installed (apt-get install wrk)");
    tell("/health under full load", "p99 ≤ 5 ms", health(sidecar.admin(), "/health").await);
    tell("/livez under full load", "", health(sidecar.admin(), "/livez").await);
    let _ = wrk.kill();
    let _ = wrk.wait();
}

/// The upstream takes connections and says nothing, with 200 clients waiting; Redis is stopped.
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
            let mut conn = Conn::open(api).await.expect("it listens");
            let _ = conn.get(&format!("/{n}")).await;
        });
    }
    redis.signal(Signal::SIGSTOP);
    tell("/health, upstream and Redis hang, 200 clients wait", "≤ 500 ms", health(sidecar.admin(), "/health").await);
    redis.signal(Signal::SIGCONT);
    clients.abort_all();
}
