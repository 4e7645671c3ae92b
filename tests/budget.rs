//! Upstream protection: request budget, Retry-After, circuit breaker, and connection limit.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::time::Instant;

use crate::support::sidecar::text;
use crate::support::{Client, Gate, Origin, Reply, Sidecar, get, send, until};

type Times = Arc<Mutex<Vec<Instant>>>;

fn gaps(times: &Times) -> Vec<Duration> {
    let times = times.lock().expect("unpoisoned");
    times.windows(2).map(|pair| pair[1] - pair[0]).collect()
}

/// Starts an origin that sends 429 to the first `throttled` requests, then 200. Returns the request times, too.
async fn throttling(throttled: usize, retry_after: &'static str) -> (Origin, Times) {
    let times = Times::default();
    let noted = times.clone();
    let origin = Origin::start(move |ask| {
        noted.lock().expect("unpoisoned").push(Instant::now());
        if ask.number < throttled {
            Reply::new(429, "slow down").header("Retry-After", retry_after)
        } else {
            Reply::fresh(60, "at last")
        }
    })
    .await;
    (origin, times)
}

#[tokio::test(flavor = "multi_thread")]
async fn response_429_with_retry_after_is_retried_within_the_deadline() {
    let (origin, times) = throttling(2, "0.4").await;
    let sidecar = Sidecar::before(&origin, "");
    let answer = sidecar.get("/a").await;
    assert_eq!((answer.status, answer.text()), (200, "at last".into()));
    assert!(sidecar.get("/a").await.is_hit());
    for gap in gaps(&times) {
        assert!(gap >= Duration::from_millis(400), "sent before Retry-After: {gap:?}");
    }
    let stats = sidecar.stats().await;
    assert_eq!((&stats["requests"]["throttled"], &stats["requests"]["throttles_absorbed"]), (&2.into(), &2.into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn passed_through_reads_wait_for_the_budget_and_writes_are_not_retried() {
    let (origin, times) = throttling(1, "0.3").await;
    let rule = "[[upstream.rule]]\npath = \"/**\"\ncache = \"off\"\n";
    let sidecar = Sidecar::before(&origin, rule);
    assert_eq!(sidecar.get("/a").await.status, 200);
    assert!(gaps(&times)[0] >= Duration::from_millis(300));
    let (origin, times) = throttling(1, "0.3").await;
    let sidecar = Sidecar::before(&origin, rule);
    let answer = sidecar.send("POST", "/a", "x").await;
    assert_eq!((answer.status, answer.header("retry-after")), (429, Some("0.3")), "forwarded unchanged");
    assert_eq!(sidecar.send("POST", "/a", "x").await.status, 200);
    assert!(gaps(&times)[0] >= Duration::from_millis(300), "the next write waited for Retry-After");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_request_is_sent_during_retry_after() {
    let origin = Origin::start(|ask| match ask.number {
        0 | 1 => Reply::new(200, "old"),
        _ => Reply::new(429, "slow down").header("Retry-After", "600"),
    })
    .await;
    let rule = "[[upstream.rule]]\npath = \"/**\"\nttl = \"10s\"\nstale_if_error = \"1h\"\n\
                [[upstream.rule]]\npath = \"/**\"\n";
    let sidecar = Sidecar::before(&origin, rule);
    for target in ["/a", "/b"] {
        assert_eq!(sidecar.get(target).await.text(), "old");
    }
    sidecar.turn(20);
    for target in ["/a", "/a", "/b"] {
        let stale = sidecar.get(target).await;
        assert_eq!(stale.text(), "old");
        assert!(stale.cache_status().contains("detail=stale-if-error"), "{stale:?}");
    }
    assert_eq!(origin.count(), 3, "only the first request was sent");
    let cold = sidecar.get("/cold").await;
    assert_eq!((cold.status, &cold.json()["error"]["code"]), (503, &"upstream_throttled".into()));
    let again: u64 = cold.header("retry-after").expect("a Retry-After").parse().expect("seconds");
    assert!((590..=600).contains(&again), "{again}");
    assert_eq!(origin.count(), 3);
    let other = sidecar.get_with("/cold", &[("Authorization", "Bearer other")]).await;
    assert_eq!(other.status, 429, "another credential has its own budget");
}

#[tokio::test(flavor = "multi_thread")]
async fn retries_of_retry_after_zero_are_bounded() {
    let (origin, times) = throttling(usize::MAX, "0").await;
    let budget = "budget = { rate = \"1000/s\", burst = 1000, max_wait = \"350ms\" }";
    let sidecar = Sidecar::before(&origin, budget);
    assert_eq!(sidecar.get("/a").await.status, 429);
    assert!(origin.count() <= 4, "{}", origin.count());
    assert!(gaps(&times).iter().all(|gap| *gap >= Duration::from_millis(100)));
}

#[tokio::test(flavor = "multi_thread")]
async fn configured_rate_is_kept_and_long_waits_are_refused_at_once() {
    let (origin, times) = throttling(0, "").await;
    let budget = "budget = { rate = \"10/s\", burst = 2, max_wait = \"350ms\", per = \"host\" }";
    let sidecar = Sidecar::before(&origin, budget);
    let mut requests = tokio::task::JoinSet::new();
    for n in 0..12 {
        requests.spawn(async move { get(sidecar.address, &format!("/{n}"), &[("X-N", "1")]).await });
    }
    let answers = requests.join_all().await;
    let served = answers.iter().filter(|answer| answer.status == 200).count();
    let refused = answers.iter().filter(|answer| answer.status == 503 && answer.header("retry-after").is_some());
    assert_eq!(served + refused.count(), 12);
    assert!((2..=6).contains(&served), "two at once, then one every 100 ms: {served}");
    assert_eq!(origin.count(), served);
    let times = times.lock().expect("unpoisoned");
    for (n, at) in times.iter().enumerate().skip(2) {
        let earliest = Duration::from_millis(100 * (n as u64 - 1) - 20);
        assert!(*at - times[0] >= earliest, "{n}: {:?}", *at - times[0]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn circuit_breaker_opens_for_an_unreachable_host() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("bound");
    drop(listener);
    let breaker = "[upstream.retry]\nattempts = 1\n[upstream.breaker]\nfailures = 3\nopen_for = \"5s\"\n";
    let sidecar = Sidecar::from_text(&text(address, breaker, ""));
    for n in 0..3 {
        let answer = sidecar.get(&format!("/{n}")).await;
        assert_eq!((answer.status, &answer.json()["error"]["code"]), (502, &"upstream_unreachable".into()));
    }
    let rejected = sidecar.get("/spared").await;
    assert_eq!((rejected.status, &rejected.json()["error"]["code"]), (503, &"upstream_unavailable".into()));
    // Bypass mode ignores the open breaker.
    for (mode, status) in [("bypass", 502), ("normal", 503)] {
        let body = format!("{{\"mode\":\"{mode}\"}}");
        assert_eq!(
            send(sidecar.admin, "POST", "/mode", &[("Content-Type", "application/json")], body.as_bytes())
                .await
                .status,
            200
        );
        assert_eq!(sidecar.get("/switched").await.status, status, "{mode}");
    }
    let health = get(sidecar.admin, "/health", &[]).await.json();
    let open = &health["components"]["upstreams"]["api"]["breakers"];
    assert_eq!(open[address.to_string()], "open", "{health}");
    sidecar.turn(5);
    assert_eq!(sidecar.get("/probe").await.status, 502, "one probe is sent");
    assert_eq!(sidecar.get("/spared").await.status, 503, "the failed probe opens the breaker again");
    let back = tokio::net::TcpListener::bind(address).await.expect("the port is still free");
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = back.accept().await {
            use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
            let _ = stream.read(&mut [0; 4096]).await;
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok").await;
        }
    });
    sidecar.turn(5);
    for target in ["/probe", "/next"] {
        assert_eq!(sidecar.get(target).await.status, 200);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn upstream_connections_are_limited() {
    let gate = Gate::new();
    let held = gate.clone();
    let origin = Origin::start(move |_| Reply::fresh(60, "x").after(&held)).await;
    let sidecar = Sidecar::before(&origin, "[upstream.pool]\nconnections = 2\n");
    let mut clients = Vec::new();
    for n in 0..6 {
        let mut client = Client::connect(sidecar.address).await;
        client.ask("GET", &format!("/{n}"), &[], b"").await;
        clients.push(client);
    }
    origin.wait_for_requests(2).await;
    until("all six fetches are running", || (sidecar.shared.coalescer.running() == 6).then_some(())).await;
    assert_eq!(origin.connections(), 2);
    gate.open();
    for client in &mut clients {
        assert_eq!(client.answer_to("GET").await.expect("a response").status, 200);
    }
    assert_eq!((origin.connections(), origin.count()), (2, 6));
}
