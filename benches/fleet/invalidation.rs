//! Tampered records, purges, and purges whose log entry is lost.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use super::chaos;
use super::harness::{Conn, body_of, ms, origin, quantile, row};
use super::server::Redis;
use super::{FRESH, TAGGED, joined, members, stats};

/// Tampered records, read by sidecars with an empty memory tier.
pub(super) async fn tampered() {
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
    let (mut changed, mut wrong, mut ended, before) = (0, 0, 0, count.load(Ordering::SeqCst));
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
    row("  records fetched again", "all", &(count.load(Ordering::SeqCst) - before).to_string());
}

/// Reads all targets. Returns the number of wrong bodies.
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

/// Purges a tag of a million entries.
pub(super) async fn purge() {
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
                assert_eq!(conn.get(&format!("/p/{id}")).await.expect("a response").status, 200);
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
            conn.get(&target).await.expect("a response");
            assert!(conn.get(&target).await.expect("a response").is_hit());
        }
        let last = count.load(Ordering::SeqCst);
        let purged = Instant::now();
        let answer = admin.send("POST", "/purge", "{\"tags\":[\"all\"]}").await.expect("a response");
        answered.push(answer.took);
        // Until each sidecar has served a newer response.
        for conn in &mut conns {
            while conn.get(&target).await.expect("a response").number() < last {}
        }
        reached.push(purged.elapsed());
    }
    row("purge of a tag with 1,000,000 entries: response, p99", "≤ 5 ms", &ms(quantile(answered, 0.99)));
    row("  until applied by all four sidecars, p99", "≤ 100 ms", &ms(quantile(reached, 0.99)));
}

/// Sends 10,000 purges while the Redis connection of another sidecar is cut every second.
pub(super) async fn lost() {
    const PURGES: usize = 10_000;
    let redis = Redis::start();
    let chaos = chaos::Chaos::before(redis.address()).await;
    let (upstream, _count) = origin(Duration::ZERO, FRESH, 100).await;
    let purger = members(1, upstream, TAGGED, &redis.table()).await.remove(0);
    let reader = members(1, upstream, TAGGED, &chaos.table()).await.remove(0);
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
            // The proxy runs until the end, so that the reader can reconnect.
            (cuts, chaos)
        }
    });
    let (mut conn, mut admin) =
        (Conn::open(reader.api()).await.expect("a listener"), Conn::open(purger.admin()).await.expect("a listener"));
    for id in 0..PURGES {
        conn.get(&format!("/p/{id}")).await.expect("a response");
    }
    let begun = Instant::now();
    for id in 0..PURGES {
        let answer = admin.send("POST", "/purge", &format!("{{\"tags\":[\"p:{id}\"]}}")).await.expect("a response");
        assert_eq!(answer.status, 200);
        // Slows the loop down, so that it lasts for several cuts.
        if id % 100 == 0 {
            sleep(Duration::from_millis(80)).await;
        }
    }
    let took = begun.elapsed();
    done.store(true, Ordering::SeqCst);
    let (cuts, chaos) = cutter.await.expect("no panic");
    sleep(Duration::from_secs(3)).await;
    joined(&reader).await;
    let mut served = 0;
    for id in 0..PURGES {
        served += usize::from(conn.get(&format!("/p/{id}")).await.expect("a response").is_hit());
    }
    drop(chaos);
    println!("  ({PURGES} purges in {:.1} s, {cuts} cuts)", took.as_secs_f64());
    row("10,000 purges, connection cut every second: lost purges", "0", &served.to_string());
}
