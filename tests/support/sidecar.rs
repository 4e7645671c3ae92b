//! A sidecar in the test process, on free ports, with a clock that tests advance.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use sidecache::app::App;
use sidecache::clock::Clock;
use sidecache::config;
use sidecache::proxy::SharedState;
use sidecache::upstream::UpstreamClient;
use sidecache::upstream::client::PooledClient;
use tokio::sync::watch;

use super::client::{Answer, get, send};
use super::origin::Origin;

/// A running sidecar.
#[derive(Debug)]
pub(crate) struct Sidecar {
    pub(crate) address: SocketAddr,
    pub(crate) admin: SocketAddr,
    pub(crate) clock: Clock,
    pub(crate) shared: Arc<SharedState>,
    stop: watch::Sender<bool>,
}

/// Returns a configuration with one upstream. `upstream` is appended to its table, `tables` to the file.
pub(crate) fn text(origin: SocketAddr, upstream: &str, tables: &str) -> String {
    format!(
        "[[upstream]]\nname = \"api\"\nurl = \"http://{origin}\"\nlisten = \"127.0.0.1:0\"\n{upstream}\n\
         [admin]\nlisten = \"127.0.0.1:0\"\n{tables}\n"
    )
}

impl Sidecar {
    /// Starts a sidecar in front of an origin, with these lines in its upstream table.
    pub(crate) fn before(origin: &Origin, upstream: &str) -> Sidecar {
        Self::from_text(&text(origin.address, upstream, ""))
    }

    /// Starts a sidecar as [`Sidecar::before`] does, with tables after the upstream.
    pub(crate) fn with_tables(origin: &Origin, upstream: &str, tables: &str) -> Sidecar {
        Self::from_text(&text(origin.address, upstream, tables))
    }

    pub(crate) fn from_text(text: &str) -> Sidecar {
        Self::start(text, &|upstream, clock| {
            PooledClient::new(&upstream.client_settings(), clock.clone())
                .map(|http| Arc::new(http) as Arc<dyn UpstreamClient>)
        })
    }

    /// Starts a sidecar that uses this upstream client.
    pub(crate) fn over(upstream: Arc<impl UpstreamClient>, lines: &str) -> Sidecar {
        let upstream: Arc<dyn UpstreamClient> = upstream;
        let unused = "127.0.0.1:9".parse().expect("an address");
        Self::start(&text(unused, lines, ""), &|_, _| Ok(upstream.clone()))
    }

    fn start(text: &str, make: sidecache::app::MakeUpstream<'_>) -> Sidecar {
        super::canary::watch();
        let config = config::from_text("test", text, Path::new("."));
        let config = config.unwrap_or_else(|errors| panic!("{}", errors[0]));
        let clock = Clock::start();
        let app = App::bind_with(config, clock.clone(), make).expect("free ports");
        let (address, admin) = (app.addresses()[0], app.admin_address().expect("an admin listener"));
        let shared = app.shared();
        let (stop, stopped) = watch::channel(false);
        tokio::spawn(app.run(stopped));
        Sidecar { address, admin, clock, shared, stop }
    }

    pub(crate) async fn get(&self, target: &str) -> Answer {
        get(self.address, target, &[]).await
    }

    pub(crate) async fn get_with(&self, target: &str, lines: &[(&str, &str)]) -> Answer {
        get(self.address, target, lines).await
    }

    pub(crate) async fn send(&self, method: &str, target: &str, body: &str) -> Answer {
        send(self.address, method, target, &[], body.as_bytes()).await
    }

    /// Sends `POST /purge`, which must succeed, and returns the JSON of the response.
    pub(crate) async fn purge(&self, json: &str) -> serde_json::Value {
        let lines = [("Content-Type", "application/json")];
        let answer = send(self.admin, "POST", "/purge", &lines, json.as_bytes()).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        answer.json()
    }

    pub(crate) async fn stats(&self) -> serde_json::Value {
        get(self.admin, "/stats", &[]).await.json()
    }

    /// Waits until the sidecar has caught up with the invalidation log.
    pub(crate) async fn in_fleet(&self) {
        super::soon("the invalidation log is read", self.shared.invalidations.wait_caught_up()).await;
    }

    /// Waits until the sidecar has read the log up to the end reported by a heartbeat sent after this call.
    pub(crate) async fn settled(&self) {
        let fleet = self.shared.fleet.as_ref().expect("a fleet");
        let last = || fleet.membership.last_beat();
        let before = last();
        let (_, end) = super::until("a heartbeat", || last().filter(|last| Some(*last) != before)).await;
        let read = || self.shared.invalidations.log_position() >= Some(end);
        super::until("the invalidation log is read", || read().then_some(())).await;
    }

    /// Waits until the sidecar has read the log to its current end.
    pub(crate) async fn level_with(&self, redis: &super::Redis) {
        let mut observer = redis.observer();
        let mut end = || {
            let last: redis::streams::StreamRangeReply =
                redis::Commands::xrevrange_count(&mut observer, "{sidecache}:1:log", "+", "-", 1).expect("a reply");
            last.ids.first().map(|entry| entry.id.clone())
        };
        let read = || self.shared.invalidations.log_position().map(|id| id.to_string());
        super::until("the invalidation log is read", || end().filter(|end| read().as_ref() == Some(end))).await;
    }

    /// Waits until all Redis connections of the sidecar are lost.
    pub(crate) async fn lost_redis(&self) {
        let state = || self.shared.fleet.as_ref().expect("a fleet").redis.state();
        super::until("the Redis connections are lost", || {
            state().connections.values().all(|link| !link.connected).then_some(())
        })
        .await;
    }

    /// Waits until the write-behind queue to Redis is empty.
    pub(crate) async fn written(&self) {
        let queue = || self.shared.fleet.as_ref().expect("a fleet").tier.state().queue;
        super::until("the write-behind queue is empty", || {
            (queue().bytes == 0 && queue().waiting == 0).then_some(())
        })
        .await;
    }

    /// Advances the clock, and waits until the sidecar has read the invalidation log at the new time.
    pub(crate) async fn turn_in_fleet(&self, seconds: u64) {
        self.turn(seconds);
        let lag = || self.shared.invalidations.lag(self.clock.now());
        super::until("the invalidation log is read", || lag().filter(|lag| *lag < 3_000)).await;
    }

    /// Advances the clock.
    pub(crate) fn turn(&self, seconds: u64) {
        self.clock.turn(Duration::from_secs(seconds));
    }
}

impl Drop for Sidecar {
    fn drop(&mut self) {
        self.stop.send_replace(true);
        super::canary::assert_silent();
    }
}
