//! Load generator of the demo: the same mix of reads, sent to the shop directly and then through the sidecar.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use http::{Request, Response};
use indicatif::{ProgressBar, ProgressStyle};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::catalogue::product_id;
use super::shop::{Shop, TOKENS};
use crate::body::Body;
use crate::clock::Clock;
use crate::upstream::Timeouts;
use crate::upstream::UpstreamClient;
use crate::upstream::client::PooledClient;

/// Number of concurrent applications.
const WORKERS: usize = 8;

/// Pause of an application between two calls.
const THINKING: Duration = Duration::from_millis(10);

/// The target of the load.
#[derive(Debug)]
pub(super) struct Target {
    pub(super) name: &'static str,
    pub(super) base: SocketAddr,
    /// The sidecar's admin listener. `None`: health checks send a request to the shop, as without a sidecar.
    pub(super) health: Option<SocketAddr>,
}

/// The measurements of a load run.
#[derive(Debug, Default)]
pub(super) struct LoadResult {
    /// Latencies of all product reads that succeeded.
    pub(super) latencies: Vec<Duration>,
    pub(super) failures: usize,
    pub(super) hits: usize,
    pub(super) health: Vec<Duration>,
    pub(super) upstream_calls: u64,
    pub(super) lasted: Duration,
}

/// The parameters of a load run.
#[derive(Debug)]
pub(super) struct Load<'a> {
    pub(super) shop: &'a Arc<Shop>,
    pub(super) clock: &'a Clock,
    pub(super) lasting: Duration,
    pub(super) stop: watch::Receiver<bool>,
}

impl Load<'_> {
    /// Sends load to one target and shows a progress bar.
    pub(super) async fn drive(&self, target: &Target) -> Result<LoadResult, String> {
        let limit = Duration::from_secs(30);
        let timeouts = Timeouts { connect: limit, first_byte: limit, idle: limit, fetch: limit };
        let client = Arc::new(PooledClient::plain(timeouts, self.clock.clone())?);
        let (calls_before, start) = (self.shop.requests(), self.clock.instant());
        let until = start + self.lasting;
        let turn = Arc::new(AtomicUsize::new(0));
        let mut workers = JoinSet::new();
        for _ in 0..WORKERS {
            let worker = Worker { client: client.clone(), clock: self.clock.clone(), base: target.base, until };
            workers.spawn(worker.read_products(turn.clone()));
        }
        let (base, path) = match target.health {
            Some(admin) => (admin, "/health"),
            None => (target.base, "/admin/api/2026-07/shop.json"),
        };
        let worker = Worker { client, clock: self.clock.clone(), base, until };
        workers.spawn(worker.check_health(path));
        let bar = self.bar(target.name);
        let mut seen = LoadResult::default();
        let mut stop = self.stop.clone();
        let mut tick = tokio::time::interval(Duration::from_millis(200));
        loop {
            tokio::select! {
                _ = stop.wait_for(|stop| *stop) => break,
                done = workers.join_next() => match done {
                    Some(part) => seen.add(part.map_err(|e| e.to_string())?),
                    None => break,
                },
                _ = tick.tick() => bar.set_position(self.passed(start)),
            }
        }
        bar.finish_and_clear();
        seen.lasted = self.clock.instant().saturating_duration_since(start);
        seen.upstream_calls = self.shop.requests() - calls_before;
        Ok(seen)
    }

    fn passed(&self, start: Instant) -> u64 {
        self.clock.instant().saturating_duration_since(start).as_millis().try_into().unwrap_or(u64::MAX)
    }

    fn bar(&self, name: &'static str) -> ProgressBar {
        let bar = ProgressBar::new(self.lasting.as_millis().try_into().unwrap_or(u64::MAX));
        if let Ok(style) = ProgressStyle::with_template("{msg:>20} {wide_bar} {elapsed_precise}") {
            bar.set_style(style);
        }
        bar.with_message(name)
    }
}

impl LoadResult {
    fn add(&mut self, other: LoadResult) {
        self.latencies.extend(other.latencies);
        self.health.extend(other.health);
        self.failures += other.failures;
        self.hits += other.hits;
    }
}

struct Worker {
    client: Arc<PooledClient>,
    clock: Clock,
    base: SocketAddr,
    until: Instant,
}

impl Worker {
    async fn read_products(self, turn: Arc<AtomicUsize>) -> LoadResult {
        let paths = paths();
        let mut seen = LoadResult::default();
        while self.clock.instant() < self.until {
            let path = &paths[turn.fetch_add(1, Ordering::Relaxed) % paths.len()];
            let begun = self.clock.instant();
            match self.get(path).await {
                Some(response) if response.status().is_success() => {
                    seen.latencies.push(self.clock.instant().saturating_duration_since(begun));
                    let hit = |value: &http::HeaderValue| value.as_bytes().starts_with(b"sidecache; hit");
                    seen.hits += usize::from(response.headers().get_all("cache-status").iter().any(hit));
                }
                Some(_) | None => seen.failures += 1,
            }
            tokio::time::sleep(THINKING).await;
        }
        seen
    }

    async fn check_health(self, path: &'static str) -> LoadResult {
        let mut seen = LoadResult::default();
        while self.clock.instant() < self.until {
            let begun = self.clock.instant();
            let _ = self.get(path).await;
            seen.health.push(self.clock.instant().saturating_duration_since(begun));
            tokio::time::sleep(THINKING * 20).await;
        }
        seen
    }

    /// Returns the response after its body was read to the end, or `None` if that failed.
    async fn get(&self, path: &str) -> Option<Response<()>> {
        let request = Request::get(format!("http://{}{path}", self.base))
            .header("host", self.base.to_string())
            .header("x-shopify-access-token", TOKENS[0])
            .body(Body::Empty)
            .ok()?;
        let (parts, mut body) = self.client.send(request).await.ok()?.into_parts();
        while let Some(chunk) = body.next().await {
            chunk.ok()?;
        }
        Some(Response::from_parts(parts, ()))
    }
}

/// Returns the paths to request: two pages, a count, and twelve products.
fn paths() -> Vec<String> {
    let api = "/admin/api/2026-07";
    let lists = ["products.json?limit=50", "products.json?limit=250", "products/count.json"];
    let single = (0..12).map(|i| format!("{api}/products/{}.json", product_id(0, i * 37)));
    lists.iter().map(|list| format!("{api}/{list}")).chain(single).collect()
}
