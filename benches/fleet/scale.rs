//! What many sidecars cost one Redis. A follower sends what an idle sidecar sends: a blocking read of the log and a
//! heartbeat. One real sidecar purges.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, interval, sleep};

use crate::harness::{Conn, Program, cpu_of, ms, origin, quantile, row};
use crate::server::Redis;
use crate::{FRESH, TAGGED, joined};

const PURGES: usize = 50;

/// Measures the commands, the processor time of Redis, and how soon a purge reaches all followers.
pub(crate) async fn scale() {
    for followers in [4, 32, 128, 1_000] {
        let redis = Redis::with(&["--maxclients", "20000"]);
        let (upstream, _) = origin(Duration::ZERO, FRESH, 100).await;
        let sidecar = Program::sidecar(upstream, TAGGED, &redis.patient_table());
        joined(&sidecar).await;
        let (arrivals, mut arrived) = mpsc::unbounded_channel();
        let stop = Arc::new(AtomicBool::new(false));
        let ready = Arc::new(AtomicUsize::new(0));
        let mut tasks = JoinSet::new();
        for number in 0..followers {
            tasks.spawn(follow(redis.port, arrivals.clone(), ready.clone(), stop.clone()));
            tasks.spawn(beat(redis.port, number, stop.clone()));
        }
        while ready.load(Ordering::SeqCst) < followers {
            sleep(Duration::from_millis(10)).await;
        }
        sleep(Duration::from_secs(2)).await;
        let process = redis.process().to_string();
        let (cpu, commands) = (cpu_of(&process), client_commands(&redis));
        let idle = Duration::from_secs(10);
        sleep(idle).await;
        let (cpu, commands) = (cpu_of(&process).saturating_sub(cpu), client_commands(&redis) - commands);
        let what = format!("{followers} followers, idle: commands a second");
        row(&what, &format!("≤ {}", 2 * (followers + 1)), &format!("{:.0}", commands as f64 / idle.as_secs_f64()));
        let share = cpu.as_secs_f64() / idle.as_secs_f64() * 100.0;
        row(&format!("{followers} followers, idle: Redis' processor time"), "", &format!("{share:.1} % of a core"));
        let mut admin = Conn::open(sidecar.admin()).await.expect("an admin listener");
        let mut times = Vec::new();
        for _ in 0..PURGES {
            while arrived.try_recv().is_ok() {}
            let begun = Instant::now();
            admin.send("POST", "/purge", "{\"tags\":[\"all\"]}").await.expect("a response");
            for _ in 0..followers {
                arrived.recv().await.expect("a follower");
            }
            times.push(begun.elapsed());
            sleep(Duration::from_millis(20)).await;
        }
        let what = format!("{followers} followers: a purge reaches the last one, p99");
        row(&what, if followers == 1_000 { "≤ 100 ms" } else { "" }, &ms(quantile(times, 0.99)));
        stop.store(true, Ordering::SeqCst);
        tasks.abort_all();
    }
}

/// Measures 20 variants of a cold URL, requested at once, without Redis and with it.
pub(crate) async fn variants() {
    const UPSTREAM: Duration = Duration::from_millis(50);
    for with_redis in [false, true] {
        let redis = Redis::start();
        let tables = if with_redis { redis.table() } else { String::new() };
        let (upstream, count) = origin(UPSTREAM, "Cache-Control: max-age=3600\r\nVary: X-Variant\r\n", 1024).await;
        let sidecar = Program::sidecar(upstream, "", &tables);
        if with_redis {
            joined(&sidecar).await;
        }
        let (api, mut times, mut failed) = (sidecar.api(), Vec::new(), 0);
        for round in 0..25 {
            let mut requests = JoinSet::new();
            for variant in 0..20 {
                requests.spawn(async move {
                    let mut client = Conn::open(api).await?;
                    client.get_with(&format!("/{round}"), &format!("X-Variant: {variant}")).await
                });
            }
            for got in requests.join_all().await {
                failed += usize::from(got.as_ref().is_none_or(|got| got.status != 200));
                // The first round opens connections and loads scripts.
                times.extend(got.filter(|_| round > 0).map(|got| got.took));
            }
        }
        let with = if with_redis { "with Redis" } else { "without Redis" };
        // The first response shows which headers select a variant; the other variants are fetched after it.
        let target = ms(UPSTREAM * 2 + Duration::from_millis(20));
        let (p50, p99) = (quantile(times.clone(), 0.5), quantile(times, 0.99));
        row(&format!("20 variants of a cold URL at once, {with}: p50"), "", &ms(p50));
        row("  p99: two upstream requests, one after the other, + 20 ms", &format!("≤ {target}"), &ms(p99));
        row("  failed", "0", &failed.to_string());
        row("  upstream requests", "500", &count.load(Ordering::SeqCst).to_string());
    }
}

/// Returns the number of commands that clients sent: scripts and reads, without what scripts call.
fn client_commands(redis: &Redis) -> u64 {
    let stats: String = redis::cmd("INFO").arg("commandstats").query(&mut redis.observer()).expect("a reply");
    let count = |line: &str| -> Option<u64> {
        let (name, rest) = line.strip_prefix("cmdstat_")?.split_once(":calls=")?;
        ["evalsha", "xread", "ping"].contains(&name).then(|| rest.split(',').next()?.parse().ok())?
    };
    stats.lines().filter_map(count).sum()
}

async fn command(stream: &mut TcpStream, words: &[&str], buffer: &mut Vec<u8>) -> Option<usize> {
    let mut text = format!("*{}\r\n", words.len());
    for word in words {
        text += &format!("${}\r\n{word}\r\n", word.len());
    }
    stream.write_all(text.as_bytes()).await.ok()?;
    buffer.clear();
    stream.read_buf(buffer).await.ok()
}

/// Reads new entries of the log, as a sidecar does, and reports each arrival.
async fn follow(port: u16, arrivals: mpsc::UnboundedSender<()>, ready: Arc<AtomicUsize>, stop: Arc<AtomicBool>) {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await.expect("a Redis");
    let mut buffer = Vec::with_capacity(4096);
    ready.fetch_add(1, Ordering::SeqCst);
    let mut last = "$".to_owned();
    while !stop.load(Ordering::Relaxed) {
        let words = ["XREAD", "COUNT", "1000", "BLOCK", "2000", "STREAMS", "{sidecache}:1:log", &last];
        let Some(1..) = command(&mut stream, &words, &mut buffer).await else { return };
        // The ID of the only entry: the first line that looks like one.
        let text = String::from_utf8_lossy(&buffer).into_owned();
        let is_id =
            |line: &&str| line.split_once('-').is_some_and(|(ms, _)| ms.len() == 13 && ms.parse::<u64>().is_ok());
        if let Some(id) = text.lines().find(is_id) {
            id.clone_into(&mut last);
            let _ = arrivals.send(());
        }
    }
}

/// Sends a script a second, which writes and reads what a heartbeat does.
async fn beat(port: u16, number: usize, stop: Arc<AtomicBool>) {
    const SCRIPT: &str = "redis.call('ZADD', KEYS[1], redis.call('TIME')[1] * 1000, ARGV[1]) \
        redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', 0) redis.call('ZRANGE', KEYS[1], 0, 0, 'WITHSCORES') \
        redis.call('GET', KEYS[3]) redis.call('GET', KEYS[4]) return redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)";
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await.expect("a Redis");
    let mut buffer = Vec::with_capacity(4096);
    let Some(1..) = command(&mut stream, &["SCRIPT", "LOAD", SCRIPT], &mut buffer).await else { return };
    let digest = String::from_utf8_lossy(&buffer).lines().nth(1).unwrap_or_default().to_owned();
    let name = format!("follower-{number}");
    // Sidecars do not beat in step.
    sleep(Duration::from_millis(number as u64 * 7 % 1000)).await;
    let mut ticks = interval(Duration::from_secs(1));
    let keys = ["{sidecache}:1:bench-sidecars", "{sidecache}:1:log", "{sidecache}:1:epoch", "{sidecache}:1:mode"];
    while !stop.load(Ordering::Relaxed) {
        ticks.tick().await;
        let words = ["EVALSHA", &digest, "4", keys[0], keys[1], keys[2], keys[3], &name];
        if command(&mut stream, &words, &mut buffer).await.is_none() {
            return;
        }
    }
}
