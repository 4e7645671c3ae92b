//! The composition root: builds all components once, and defines the order of startup and shutdown.
//!
//! Startup: bind all listeners (so that a port in use is an error before anything runs), then serve, then sweep.
//! Shutdown: report not ready, stop accepting, let requests finish within the grace period, close the remaining
//! connections.

mod admin_runtime;
mod build;
mod fleet;
pub mod reload;
mod runtime;
mod shared;
#[cfg(feature = "otlp")]
pub mod traces;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::admin::Admin;
use crate::clock::Clock;
use crate::config;
use crate::config::Config;
use crate::policy::entry::Entry;
use crate::policy::invalidation::ledger::InvalidationState;
use crate::proxy::active::ActiveConfig;
use crate::proxy::upstream_state::UpstreamState;
use crate::proxy::{Proxy, SharedState};
use crate::telemetry::logs;
use crate::upstream::UpstreamClient;
use crate::upstream::client::PooledClient;
use reload::Reloader;
use runtime::{PendingFleet, Runtime};

/// Interval between sweeps of expired entries.
const SWEEP_INTERVAL: Duration = Duration::from_secs(10);

/// Interval between measurements of the event loop lag.
const LAG_INTERVAL: Duration = Duration::from_millis(100);

/// The program with its listeners bound, ready to run.
#[derive(Debug)]
pub struct App {
    active: Arc<ActiveConfig>,
    reloader: Arc<Reloader>,
    idle: PendingFleet,
    lines: Vec<String>,
}

/// Creates the client of an upstream: the real client, or one of a test.
pub type MakeUpstream<'m> = &'m dyn Fn(&config::UpstreamConfig, &Clock) -> Result<Arc<dyn UpstreamClient>, String>;

/// Creates the real upstream client.
fn real(upstream: &config::UpstreamConfig, clock: &Clock) -> Result<Arc<dyn UpstreamClient>, String> {
    PooledClient::new(&upstream.client_settings(), clock.clone())
        .map(|http| Arc::new(http) as Arc<dyn UpstreamClient>)
}

impl App {
    /// Binds all listeners and builds all components. The error is one line of text.
    pub fn bind(config: Config) -> Result<App, String> {
        Self::bind_with(config, Clock::start(), &real)
    }

    /// Like [`App::bind`], with a clock and upstream clients of the caller's choice. Must be called within a Tokio
    /// runtime.
    pub fn bind_with(config: Config, clock: Clock, make: MakeUpstream<'_>) -> Result<App, String> {
        let redis = config.redis.as_ref().map(|redis| redis.topology.to_string());
        let mut lines = vec![format!(
            "sidecache {} mode={} config={} redis={}",
            env!("CARGO_PKG_VERSION"),
            config.mode.0.token(),
            config.source,
            redis.as_deref().unwrap_or("none (this process only)")
        )];
        let shown = config::effective_json(&config);
        let (runtime, idle, more) = Runtime::new(config, clock, make)?;
        lines.extend(more);
        let active = runtime.active.clone();
        Ok(App { active, reloader: Arc::new(Reloader::new(runtime, shown)), idle, lines })
    }

    /// Sets the source that the configuration is reloaded from.
    pub fn reload_from(&self, origin: reload::ConfigSource) {
        self.reloader.from(origin);
    }

    /// Returns the lines to print at startup.
    pub fn lines(&self) -> &[String] {
        &self.lines
    }

    /// Returns the addresses of the upstreams' listeners, in the order of the configuration.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.reloader.runtime().addresses()
    }

    /// Returns the address of the admin listener, if it is configured.
    pub fn admin_address(&self) -> Option<SocketAddr> {
        self.reloader.runtime().admin.as_ref().map(|listener| listener.access.address)
    }

    /// Returns the address of the probes listener, if it is configured.
    pub fn probes_address(&self) -> Option<SocketAddr> {
        self.reloader.runtime().probes.as_ref().map(|listener| listener.access.address)
    }

    /// Returns the current shared state of all upstreams.
    pub fn shared(&self) -> Arc<SharedState> {
        self.active.shared()
    }

    /// Runs until `stop` turns true (or its sender is dropped), then drains. Returns the number of connections that had
    /// to be closed after the grace period.
    pub async fn run(self, mut stop: watch::Receiver<bool>) -> usize {
        let App { active, reloader, idle, .. } = self;
        let api = Arc::new(Admin::new(active.clone(), reloader.clone()));
        reloader.runtime().start(api, idle);
        let mut background = JoinSet::new();
        background.spawn(measure_event_loop_lag(active.clone()));
        background.spawn(sweep(active));
        background.spawn(reload::follow(reloader.clone()));
        let _ = stop.wait_for(|stop| *stop).await;
        let closing = reloader.runtime().close();
        let cut = closing.finished().await;
        background.shutdown().await;
        cut
    }
}

/// Returns the proxies of a configuration, without listeners and Redis, to explain requests.
pub fn proxies(config: Config) -> Result<Vec<Proxy>, String> {
    proxies_with(config, Clock::start(), &real).map(|(_, proxies)| proxies)
}

/// Returns proxies without listeners and Redis, with a clock and upstream clients of the caller's choice, and their
/// shared state.
pub fn proxies_with(
    mut config: Config,
    clock: Clock,
    make: MakeUpstream<'_>,
) -> Result<(SharedState, Vec<Proxy>), String> {
    config.redis = None;
    let (shared, _) = shared::build(&config, clock)?;
    let proxy = |upstream: config::UpstreamConfig| {
        let (client, port) = (make(&upstream, &shared.clock)?, upstream.listen.port());
        Ok(Proxy::new(&shared, UpstreamState::new(upstream.into_settings(), client, port)))
    };
    let proxies = config.upstreams.into_iter().map(proxy).collect::<Result<_, String>>()?;
    Ok((shared, proxies))
}

/// Measures the event loop lag periodically, and tells of dropped log lines, forever.
async fn measure_event_loop_lag(active: Arc<ActiveConfig>) {
    loop {
        let clock = active.shared().clock.clone();
        let begun = clock.instant();
        tokio::time::sleep(LAG_INTERVAL).await;
        let late = clock.instant().saturating_duration_since(begun).saturating_sub(LAG_INTERVAL);
        // The timer has a resolution of one millisecond.
        active
            .shared()
            .telemetry
            .event_loop_lag
            .record(late.saturating_sub(Duration::from_millis(1)), clock.uptime());
        logs::tell_dropped_lines();
    }
}

/// Removes the entries that are past all of their windows or were hard-purged, periodically and when the ledger is
/// nearly full, forever.
async fn sweep(active: Arc<ActiveConfig>) {
    let mut every = tokio::time::interval(SWEEP_INTERVAL);
    loop {
        let invalidations = active.shared().invalidations.clone();
        tokio::select! {
            _ = every.tick() => {}
            () = invalidations.wait_nearly_full() => {}
        }
        let shared = active.shared();
        let now = shared.clock.now();
        let gone = |entry: &Entry| shared.invalidations.state_of(entry, now) == InvalidationState::Gone;
        shared.memory.sweep(|entry| !entry.expired(now) && !gone(entry)).await;
    }
}
