//! Faults under load, with real processes: an upstream killed or stopped, a cache stampede, and bursts of requests for
//! an uncacheable response. Prints target and measured values. Run with `just faults`; takes about 40 s.

mod harness;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use harness::{Program, ms, origin, row};
use http::Request;
use nix::sys::signal::Signal;
use sidecache::body::Body;
use sidecache::clock::Clock;
use sidecache::upstream::Timeouts;
use sidecache::upstream::UpstreamClient;
use sidecache::upstream::client::PooledClient;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

/// Requests per second, and the number of different URLs.
const RATE: u32 = 300;
const KEYS: usize = 50;

fn main() {
    // cargo passes --bench; `cargo test --benches` does not, and must not take a minute.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        println!("{:<72}{:>14}{:>24}", "", "target", "measured");
        stampede().await;
        uncacheable().await;
        outage(Signal::SIGKILL, "upstream killed for 5 s").await;
        outage(Signal::SIGSTOP, "upstream stopped for 5 s").await;
    });
}

fn shop(listen: &str) -> Program {
    let pace = ["--latency", "200ms", "--products", "100", "--bucket", "1000000", "--leak", "1000000"];
    Program::start(&[&["mock-shop", "--listen", listen][..], &pace].concat(), "mock-shop")
}

fn client() -> Arc<PooledClient> {
    let limit = Duration::from_secs(30);
    let timeouts = Timeouts { connect: limit, first_byte: limit, idle: limit, fetch: limit };
    Arc::new(PooledClient::plain(timeouts, Clock::start()).expect("a client"))
}

/// Sends a GET and reads the body. Returns the status (0 on failure) and the duration.
async fn get(client: &PooledClient, address: SocketAddr, path: &str) -> (u16, Duration) {
    let clock = Clock::start();
    let begun = clock.instant();
    let request = Request::get(format!("http://{address}{path}"))
        .header("host", address.to_string())
        .header("x-shopify-access-token", "shpat_shop0_app0")
        .body(Body::Empty)
        .expect("a request");
    let status = match client.send(request).await {
        Ok(response) => {
            let status = response.status().as_u16();
            let mut body = response.into_body();
            loop {
                match body.next().await {
                    Some(Ok(_)) => {}
                    None => break status,
                    Some(Err(_)) => break 0,
                }
            }
        }
        Err(_) => 0,
    };
    (status, clock.instant() - begun)
}

/// Sends `count` concurrent requests on open connections. Returns the time until the last response.
async fn burst(address: SocketAddr, count: usize) -> Duration {
    let mut streams = Vec::new();
    for _ in 0..count {
        streams.push(TcpStream::connect(address).await.expect("a listener"));
    }
    let clock = Clock::start();
    let begun = clock.instant();
    let mut requests = JoinSet::new();
    for mut stream in streams {
        requests.spawn(async move {
            stream
                .write_all(format!("GET /burst HTTP/1.1\r\nHost: {address}\r\n\r\n").as_bytes())
                .await
                .expect("sent");
            let mut answer = Vec::new();
            while answer.windows(4).position(|w| w == b"\r\n\r\n").is_none_or(|at| answer.len() < at + 8) {
                let read = stream.read_buf(&mut answer).await.expect("a response");
                assert!(read > 0, "the connection ended: {}", String::from_utf8_lossy(&answer));
            }
        });
    }
    requests.join_all().await;
    clock.instant() - begun
}

async fn stampede() {
    let delay = Duration::from_millis(200);
    let (address, count) = origin(delay, "Cache-Control: max-age=60\r\n", 4).await;
    let sidecar = Program::sidecar(address, "", "");
    let slowest = burst(sidecar.api(), 200).await;
    row(
        "200 concurrent requests for one cold key: upstream requests",
        "1",
        &count.load(Ordering::SeqCst).to_string(),
    );
    row("  slowest response, beyond the upstream's 200 ms", "≤ 5 ms", &ms(slowest.saturating_sub(delay)));
}

async fn uncacheable() {
    let (address, count) = origin(Duration::from_secs(1), "Cache-Control: no-store\r\n", 4).await;
    let sidecar = Program::sidecar(address, "", "");
    let (first, second) = (burst(sidecar.api(), 20).await, burst(sidecar.api(), 20).await);
    row("20 concurrent requests, uncacheable response after 1 s: first burst", "≤ 2050 ms", &ms(first));
    row("  second burst", "≤ 1050 ms", &ms(second));
    row("  upstream requests", "40", &count.load(Ordering::SeqCst).to_string());
}

/// 300 req/s on 50 keys with a TTL of 1 s while the upstream is unavailable for 5 of 15 s.
async fn outage(signal: Signal, what: &str) {
    let first = shop("127.0.0.1:0");
    let address = first.address("mock-shop");
    let rules =
        "[[upstream.rule]]\npath = \"/**\"\nttl = \"1s\"\nstale_while_revalidate = \"1m\"\nstale_if_error = \"1h\"";
    let sidecar = Program::sidecar(address, rules, "");
    let client = client();
    let paths: Vec<String> =
        (0..KEYS).map(|key| format!("/admin/api/2026-07/products.json?limit=1&key={key}")).collect();
    for path in &paths {
        assert_eq!(get(&client, sidecar.api(), path).await.0, 200, "warm-up");
    }
    let mut running = Some(first);
    let (clock, mut every) = (Clock::start(), tokio::time::interval(Duration::from_secs(1) / RATE));
    let begun = clock.instant();
    let mut requests = JoinSet::new();
    let (mut down, mut restored) = (false, false);
    for number in 0..(RATE * 15) as usize {
        every.tick().await;
        let passed = clock.instant() - begun;
        if !down && passed > Duration::from_secs(5) {
            down = true;
            running.as_ref().expect("running").signal(signal);
        }
        if !restored && passed > Duration::from_secs(10) {
            restored = true;
            if signal == Signal::SIGSTOP {
                running.as_ref().expect("stopped").signal(Signal::SIGCONT);
            } else {
                drop(running.take());
                running = Some(shop(&address.to_string()));
            }
        }
        let (client, path, sidecar) = (client.clone(), paths[number % KEYS].clone(), sidecar.api());
        requests.spawn(async move { (down && !restored, get(&client, sidecar, &path).await) });
    }
    let seen = requests.join_all().await;
    let good = seen.iter().filter(|(_, (status, _))| *status == 200).count();
    let quantile = |only_down: bool, part: f64| {
        let mut times: Vec<Duration> =
            seen.iter().filter(|(down, _)| *down || !only_down).map(|(_, (_, time))| *time).collect();
        times.sort_unstable();
        #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        times[(times.len() as f64 * part) as usize]
    };
    #[allow(clippy::cast_precision_loss)]
    let answered = 100.0 * good as f64 / seen.len() as f64;
    row(&format!("{what}, {RATE} req/s, {KEYS} keys, TTL 1 s: successful"), "100 %", &format!("{answered:.2} %"));
    row("  p99 over all 15 s", "≤ 3 ms", &ms(quantile(false, 0.99)));
    row("  p99 during the outage", "≤ 3 ms", &ms(quantile(true, 0.99)));
    row("  p50 over all 15 s", "", &ms(quantile(false, 0.5)));
}
