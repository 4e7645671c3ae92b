//! Slow clients, idle clients, and exhausted file descriptors: latency of normal clients, time until slow connections
//! are closed, and time to recover. `cargo bench --bench siege`.

#![allow(clippy::disallowed_methods)] // measures real time

mod harness;

use std::net::SocketAddr;
use std::time::Duration;

use harness::{Conn, Program, ms, origin, quantile, row};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, interval, sleep, timeout};

const ATTACKERS: usize = 500;
const LIMITS: &str = "[limits]\nheader_time = \"2s\"\nwrite_stall = \"3s\"\nkeep_alive = \"10s\"\nconnections = 2000\n[memory]\nmax_bytes = \"128MiB\"\nmax_entry_bytes = \"32MiB\"\n";
const FRESH: &str = "Cache-Control: max-age=3600\r\n";

#[tokio::main]
async fn main() {
    println!("{:<72}{:>14}{:>24}", "", "target", "measured");
    let (small, _) = origin(Duration::ZERO, FRESH, 1024).await;
    let sidecar = Program::sidecar(small, "", LIMITS);
    let before = normal_clients(sidecar.api(), Duration::from_secs(3)).await;
    row("hits of normal clients without an attack: p99", "", &ms(before.p99));
    siege("slow heads", &sidecar, before.p99, Duration::from_secs(2), |address| async move {
        trickle(address, "GET / HTTP/1.1\r\nHost: a\r\nX: ").await
    })
    .await;
    siege("slow bodies", &sidecar, before.p99, Duration::from_secs(5), |address| async move {
        trickle(address, "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n").await
    })
    .await;
    slow_readers(&sidecar, before.p99, Duration::from_secs(3)).await;
    idle_flood(&sidecar, before.p99).await;
    no_files(small).await;
}

struct NormalClients {
    p99: Duration,
    failed: usize,
}

/// Runs eight clients, each of which requests a hit every 5 ms.
async fn normal_clients(address: SocketAddr, duration: Duration) -> NormalClients {
    let mut all = JoinSet::new();
    for n in 0..8 {
        all.spawn(async move {
            let (mut times, mut failed) = (Vec::new(), 0);
            let mut conn = Conn::open(address).await;
            let (mut every, end) = (interval(Duration::from_millis(5)), Instant::now() + duration);
            while Instant::now() < end {
                every.tick().await;
                let Some(open) = conn.as_mut() else {
                    failed += 1;
                    conn = Conn::open(address).await;
                    continue;
                };
                match open.get(&format!("/others/{n}")).await {
                    Some(got) if got.status == 200 => times.push(got.took),
                    // The sidecar may have closed an idle connection: open another one.
                    _ => {
                        conn = Conn::open(address).await;
                        failed += usize::from(conn.is_none());
                    }
                }
            }
            (times, failed)
        });
    }
    let (mut times, mut failed) = (Vec::new(), 0);
    for (more, faults) in all.join_all().await {
        times.extend(more);
        failed += faults;
    }
    NormalClients { p99: quantile(times, 0.99), failed }
}

/// Runs [`ATTACKERS`] concurrent attackers beside normal clients.
async fn siege<F: Future<Output = Option<Duration>> + Send + 'static>(
    what: &str,
    sidecar: &Program,
    usual: Duration,
    limit: Duration,
    attack: impl Fn(SocketAddr) -> F,
) {
    let address = sidecar.api();
    let _ = normal_clients(address, Duration::from_millis(200)).await;
    let mut attackers = JoinSet::new();
    for _ in 0..ATTACKERS {
        attackers.spawn(attack(address));
    }
    let seen = normal_clients(address, limit + Duration::from_secs(1)).await;
    let ended: Vec<Option<Duration>> = attackers.join_all().await;
    let stayed = ended.iter().filter(|end| end.is_none()).count();
    let last = ended.into_iter().flatten().max().unwrap_or_default();
    row(
        &format!("{ATTACKERS} {what}: p99 of normal clients (failed: {})", seen.failed),
        &format!("~ {}", ms(usual)),
        &ms(seen.p99),
    );
    let target = format!("<= {}", ms(limit + Duration::from_secs(1)));
    row(&format!("{ATTACKERS} {what}: last one closed after (not closed: {stayed})"), &target, &ms(last));
}

/// Sends `beginning`, then a byte every 100 ms. Returns the time until the connection was closed, `None` after 30 s.
async fn trickle(address: SocketAddr, beginning: &str) -> Option<Duration> {
    let mut stream = TcpStream::connect(address).await.ok()?;
    let begun = Instant::now();
    stream.write_all(beginning.as_bytes()).await.ok()?;
    let (mut read, mut write) = stream.split();
    let mut buffer = [0; 1024];
    let ends = async { while read.read(&mut buffer).await.is_ok_and(|read| read > 0) {} };
    let feeds = async {
        while write.write_all(b"x").await.is_ok() {
            sleep(Duration::from_millis(100)).await;
        }
    };
    timeout(Duration::from_secs(30), async {
        tokio::select! { () = ends => {}, () = feeds => {} }
    })
    .await
    .ok()?;
    Some(begun.elapsed())
}

/// Runs clients that request 16 MiB and read nothing. The sidecar's open files show when they are closed, because a
/// client that does not read does not notice.
async fn slow_readers(sidecar: &Program, usual: Duration, limit: Duration) {
    let address = sidecar.api();
    if let Some(mut conn) = Conn::open(address).await {
        conn.get("/large").await.expect("a response");
    }
    let files = sidecar.files();
    let mut held = Vec::new();
    for _ in 0..ATTACKERS {
        let Ok(mut stream) = TcpStream::connect(address).await else { continue };
        if stream.write_all(b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n").await.is_ok() {
            held.push(stream);
        }
    }
    // Measures from the moment when the socket buffers stop growing: from then on no write makes progress.
    let gone = async {
        let (mut begun, mut most) = (Instant::now(), 0);
        while sidecar.files() > files + 16 {
            let queued = queued();
            // The buffers of the normal clients' responses are included.
            if queued > most + 16 {
                (begun, most) = (Instant::now(), queued);
            }
            sleep(Duration::from_millis(20)).await;
        }
        begun.elapsed()
    };
    let (seen, gone) =
        tokio::join!(normal_clients(address, limit + Duration::from_secs(1)), timeout(Duration::from_secs(30), gone));
    let what = format!("{} slow readers of 16 MiB: p99 of normal clients (failed: {})", held.len(), seen.failed);
    row(&what, &format!("~ {}", ms(usual)), &ms(seen.p99));
    let target = format!("<= {}", ms(limit + Duration::from_secs(1)));
    let what = format!("{} slow readers of 16 MiB: last one closed after", held.len());
    row(&what, &target, &gone.map_or_else(|_| "not closed".into(), ms));
}

/// Returns the number of memory pages that the kernel's TCP buffers hold.
fn queued() -> u64 {
    let table = std::fs::read_to_string("/proc/net/sockstat").unwrap_or_default();
    let line = table.lines().find(|line| line.starts_with("TCP:")).unwrap_or_default();
    line.split_whitespace().skip_while(|word| *word != "mem").nth(1).and_then(|pages| pages.parse().ok()).unwrap_or(0)
}

/// Opens 3,000 idle connections with a limit of 2,000.
async fn idle_flood(sidecar: &Program, usual: Duration) {
    let address = sidecar.api();
    let mut idle = Vec::new();
    for _ in 0..3000 {
        idle.extend(timeout(Duration::from_secs(1), TcpStream::connect(address)).await.into_iter().flatten());
    }
    let seen = normal_clients(address, Duration::from_secs(3)).await;
    row(
        &format!("{} idle connections, limit 2000: p99 of normal clients (failed: {})", idle.len(), seen.failed),
        &format!("~ {}", ms(usual)),
        &ms(seen.p99),
    );
}

/// Opens 1,000 connections with a limit of 256 open files, then closes them.
async fn no_files(upstream: SocketAddr) {
    let sidecar = Program::sidecar_with_files(256, upstream, "");
    let address = sidecar.api();
    let usual = normal_clients(address, Duration::from_secs(2)).await.p99;
    let mut idle = Vec::new();
    for _ in 0..1000 {
        idle.extend(timeout(Duration::from_millis(200), TcpStream::connect(address)).await.into_iter().flatten());
    }
    let seen = normal_clients(address, Duration::from_secs(3)).await;
    let what =
        format!("{} connections, limit 256 files: p99 of normal clients (failed: {})", idle.len(), seen.failed);
    row(&what, &format!("~ {}", ms(usual)), &ms(seen.p99));
    drop(idle);
    let begun = Instant::now();
    let again = async {
        loop {
            if let Some(mut conn) = Conn::open(address).await
                && conn.get("/cold/after").await.is_some_and(|got| got.status == 200)
            {
                return begun.elapsed();
            }
        }
    };
    let recovered = timeout(Duration::from_secs(30), again).await.map_or_else(|_| "never".into(), ms);
    row("  first miss after the connections are closed", "< 1000 ms", &recovered);
}
