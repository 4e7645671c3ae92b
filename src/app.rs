//! The composition root: builds everything once, and owns the order of starting and of stopping.
//!
//! Start: bind all listeners (so that a taken port is an error before anything runs), then serve, then sweep.
//! Stop: not ready, stop accepting, let requests finish within the grace, cut the rest.

mod apart;
mod commons;
mod fleet;
mod prepare;
pub mod reload;
mod rig;
#[cfg(feature = "otlp")]
pub mod traces;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::admin::Admin;
use crate::clock::Clock;
use crate::config::{self, Config};
use crate::policy::entry::Entry;
use crate::policy::invalidation::Standing;
use crate::proxy::face::Stage;
use crate::proxy::site::Site;
use crate::proxy::{Commons, Proxy};
use crate::upstream::Upstream;
use crate::upstream::http::HttpUpstream;
use reload::Reloader;
use rig::{Idle, Rig};

/// How often expired entries are swept.
const SWEEP_EVERY: Duration = Duration::from_secs(10);

/// How often the event loop's delay is measured.
const BEAT_EVERY: Duration = Duration::from_millis(100);

/// A program with its listeners bound, ready to run.
#[derive(Debug)]
pub struct App {
    stage: Arc<Stage>,
    reloader: Arc<Reloader>,
    idle: Idle,
    lines: Vec<String>,
}

/// Makes the upstream behind a site: the real one, or a test's.
pub type MakeUpstream<'m> = &'m dyn Fn(&config::Upstream, &Clock) -> Result<Arc<dyn Upstream>, String>;

/// The real one.
fn real(upstream: &config::Upstream, clock: &Clock) -> Result<Arc<dyn Upstream>, String> {
    HttpUpstream::new(upstream, clock.clone()).map(|http| Arc::new(http) as Arc<dyn Upstream>)
}

impl App {
    /// Binds everything. The error is one clear line.
    pub fn bind(config: Config) -> Result<App, String> {
        Self::bind_with(config, Clock::start(), &real)
    }

    /// Binds everything, with a clock and upstreams of the caller's choice. Within a runtime.
    pub fn bind_with(config: Config, clock: Clock, make: MakeUpstream<'_>) -> Result<App, String> {
        let redis = config.redis.as_ref().map(|redis| redis.topology.to_string());
        let mut lines = vec![format!(
            "sidecache {} mode={} config={} redis={}",
            env!("CARGO_PKG_VERSION"),
            config.mode.0.token(),
            config.source,
            redis.as_deref().unwrap_or("none (this process only)")
        )];
        let shown = config::shown(&config);
        let (rig, idle, more) = Rig::new(config, clock, make)?;
        lines.extend(more);
        let stage = rig.stage.clone();
        Ok(App { stage, reloader: Arc::new(Reloader::new(rig, shown)), idle, lines })
    }

    /// Where its configuration can be read again.
    pub fn reload_from(&self, origin: reload::Origin) {
        self.reloader.from(origin);
    }

    /// What to print at start, one line each.
    pub fn lines(&self) -> &[String] {
        &self.lines
    }

    /// Where the upstreams' listeners are, in the order of the configuration.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.reloader.rig().addresses()
    }

    /// Where the admin listener is.
    pub fn admin_address(&self) -> Option<SocketAddr> {
        self.reloader.rig().admin.as_ref().map(|asked| asked.access.address)
    }

    /// Where the probes' listener is.
    pub fn probes_address(&self) -> Option<SocketAddr> {
        self.reloader.rig().probes.as_ref().map(|asked| asked.access.address)
    }

    /// What all its upstreams share now.
    pub fn commons(&self) -> Arc<Commons> {
        self.stage.commons()
    }

    /// Runs until `stop` turns true (or its sender is gone), then drains. Returns how many connections had to
    /// be cut.
    pub async fn run(self, mut stop: watch::Receiver<bool>) -> usize {
        let App { stage, reloader, idle, .. } = self;
        let api = Arc::new(Admin::new(stage.clone(), reloader.clone()));
        reloader.rig().start(api, idle);
        let mut background = JoinSet::new();
        background.spawn(beat(stage.clone()));
        background.spawn(sweep(stage));
        background.spawn(reload::follow(reloader.clone()));
        let _ = stop.wait_for(|stop| *stop).await;
        let closing = reloader.rig().close();
        let cut = closing.finished().await;
        background.shutdown().await;
        cut
    }
}

/// What a configuration makes of requests, without listening anywhere: for explanations.
pub fn proxies(mut config: Config) -> Result<Vec<Proxy>, String> {
    config.redis = None;
    let commons = Arc::new(commons::first(&config, Clock::start())?.0);
    let proxy = |upstream: config::Upstream| {
        let port = upstream.listen.port();
        let real = real(&upstream, &commons.clock)?;
        Ok(Proxy { commons: commons.clone(), site: Site::new(upstream, real, port) })
    };
    config.upstreams.into_iter().map(proxy).collect()
}

/// Says how late the event loop is.
async fn beat(stage: Arc<Stage>) {
    loop {
        let clock = stage.commons().clock.clone();
        let begun = clock.instant();
        tokio::time::sleep(BEAT_EVERY).await;
        let late = clock.instant().saturating_duration_since(begun).saturating_sub(BEAT_EVERY);
        // The timer's own step is a millisecond.
        stage.commons().telemetry.pulse.beat(late.saturating_sub(Duration::from_millis(1)), clock.uptime());
    }
}

/// Now and then: what has outlived its windows, or was purged for good, makes room.
async fn sweep(stage: Arc<Stage>) {
    let mut every = tokio::time::interval(SWEEP_EVERY);
    loop {
        every.tick().await;
        let commons = stage.commons();
        let now = commons.clock.now();
        let gone = |entry: &Entry| commons.invalidations.standing(entry, now) == Standing::Gone;
        commons.memory.sweep(|entry| !entry.expired(now) && !gone(entry));
    }
}
