//! Five hundred who are slow, thousands who are idle, and no file left to open: how do the others fare, when are the
//! slow ones gone, and how soon is everything as before? `cargo bench --bench siege`.

#![allow(clippy::disallowed_methods)] // it measures real time

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
    println!("{:<72}{:>14}{:>24}", "", "asked", "measured");
    let (small, _) = origin(Duration::ZERO, FRESH, 1024).await;
    let sidecar = Program::sidecar(small, "", LIMITS);
    let before = others(sidecar.api(), Duration::from_secs(3)).await;
    row("others' hits, nobody attacking: p99", "", &ms(before.p99));
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

struct Others {
    p99: Duration,
    failed: usize,
}

/// Eight applications, a hit every 5 ms each.
async fn others(address: SocketAddr, lasting: Duration) -> Others {
    let mut all = JoinSet::new();
    for n in 0..8 {
        all.spawn(async move {
            let (mut times, mut failed) = (Vec::new(), 0);
            let mut conn = Conn::open(address).await;
            let (mut every, end) = (interval(Duration::from_millis(5)), Instant::now() + lasting);
            while Instant::now() < end {
                every.tick().await;
                let Some(open) = conn.as_mut() else {
                    failed += 1;
                    conn = Conn::open(address).await;
                    continue;
                };
                match open.get(&format!("/others/{n}")).await {
                    Some(got) if got.status == 200 => times.push(got.took),
                    // A connection that was idle may have been asked to leave: a client opens another one.
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
    Others { p99: quantile(times, 0.99), failed }
}

/// So many attack at once while others work.
async fn siege<F: Future<Output = Option<Duration>> + Send + 'static>(
    what: &str,
    sidecar: &Program,
    usual: Duration,
    limit: Duration,
    attack: impl Fn(SocketAddr) -> F,
) {
    let address = sidecar.api();
    let _ = others(address, Duration::from_millis(200)).await;
    let mut attackers = JoinSet::new();
    for _ in 0..ATTACKERS {
        attackers.spawn(attack(address));
    }
    let fared = others(address, limit + Duration::from_secs(1)).await;
    let ended: Vec<Option<Duration>> = attackers.join_all().await;
    let stayed = ended.iter().filter(|end| end.is_none()).count();
    let last = ended.into_iter().flatten().max().unwrap_or_default();
    row(
        &format!("{ATTACKERS} {what}: others' p99 (failed: {})", fared.failed),
        &format!("~ {}", ms(usual)),
        &ms(fared.p99),
    );
    let asked = format!("<= {}", ms(limit + Duration::from_secs(1)));
    row(&format!("{ATTACKERS} {what}: the last one closed after (not closed: {stayed})"), &asked, &ms(last));
}

/// A beginning, then a byte every 100 ms. When the connection ends; none: it did not.
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

/// They ask for megabytes and take none of them. That they were cut shows in the files that the sidecar has open: who
/// does not read does not see it.
async fn slow_readers(sidecar: &Program, usual: Duration, limit: Duration) {
    let address = sidecar.api();
    if let Some(mut conn) = Conn::open(address).await {
        conn.get("/large").await.expect("an answer");
    }
    let files = sidecar.files();
    let mut held = Vec::new();
    for _ in 0..ATTACKERS {
        let Ok(mut stream) = TcpStream::connect(address).await else { continue };
        if stream.write_all(b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n").await.is_ok() {
            held.push(stream);
        }
    }
    // Two gigabytes are on their way into the kernel. Once it takes no more, nobody does: from then on the clock runs.
    let gone = async {
        let (mut begun, mut most) = (Instant::now(), 0);
        while sidecar.files() > files + 16 {
            let queued = queued();
            // The others' answers are among them.
            if queued > most + 16 {
                (begun, most) = (Instant::now(), queued);
            }
            sleep(Duration::from_millis(20)).await;
        }
        begun.elapsed()
    };
    let (fared, gone) =
        tokio::join!(others(address, limit + Duration::from_secs(1)), timeout(Duration::from_secs(30), gone));
    let what = format!("{} slow readers of 16 MiB: others' p99 (failed: {})", held.len(), fared.failed);
    row(&what, &format!("~ {}", ms(usual)), &ms(fared.p99));
    let asked = format!("<= {}", ms(limit + Duration::from_secs(1)));
    let what = format!("{} slow readers of 16 MiB: the last one closed after", held.len());
    row(&what, &asked, &gone.map_or_else(|_| "not closed".into(), ms));
}

/// Pages of memory that the kernel's TCP holds.
fn queued() -> u64 {
    let table = std::fs::read_to_string("/proc/net/sockstat").unwrap_or_default();
    let line = table.lines().find(|line| line.starts_with("TCP:")).unwrap_or_default();
    line.split_whitespace().skip_while(|word| *word != "mem").nth(1).and_then(|pages| pages.parse().ok()).unwrap_or(0)
}

/// Half as many again as there are places, all idle.
async fn idle_flood(sidecar: &Program, usual: Duration) {
    let address = sidecar.api();
    let mut idle = Vec::new();
    for _ in 0..3000 {
        idle.extend(timeout(Duration::from_secs(1), TcpStream::connect(address)).await.into_iter().flatten());
    }
    let fared = others(address, Duration::from_secs(3)).await;
    row(
        &format!("{} idle connections before 2000 places: others' p99 (failed: {})", idle.len(), fared.failed),
        &format!("~ {}", ms(usual)),
        &ms(fared.p99),
    );
}

/// 256 files at most, 1000 connections; then they all leave.
async fn no_files(upstream: SocketAddr) {
    let sidecar = Program::sidecar_with_files(256, upstream, "");
    let address = sidecar.api();
    let usual = others(address, Duration::from_secs(2)).await.p99;
    let mut idle = Vec::new();
    for _ in 0..1000 {
        idle.extend(timeout(Duration::from_millis(200), TcpStream::connect(address)).await.into_iter().flatten());
    }
    let fared = others(address, Duration::from_secs(3)).await;
    let what = format!("{} connections before 256 files: others' p99 (failed: {})", idle.len(), fared.failed);
    row(&what, &format!("~ {}", ms(usual)), &ms(fared.p99));
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
    row("… and when they have left, a miss is answered after", "< 1000 ms", &recovered);
}
