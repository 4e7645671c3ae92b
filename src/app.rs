//! The composition root: builds everything once, and owns the order of starting and of stopping.
//!
//! Start: bind all listeners (so that a taken port is an error before anything runs), then serve, then sweep.
//! Stop: not ready, stop accepting, let requests finish within the grace, cut the rest.

mod fleet;
pub mod reload;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::admin::{self, Admin};
use crate::body::fanout::Purse;
use crate::clock::Clock;
use crate::config::{self, Config};
use crate::policy::entry::Entry;
use crate::policy::invalidation::Standing;
use crate::policy::mode::Switch;
use crate::process;
use crate::proxy::face::Face;
use crate::proxy::flights::Flights;
use crate::proxy::site::Site;
use crate::proxy::{Commons, Proxy};
use crate::server;
use crate::store::{Memory, Partials};
use crate::telemetry::Telemetry;
use crate::upstream::Upstream;
use crate::upstream::http::HttpUpstream;
use reload::Reloader;

/// How often expired entries are swept.
const SWEEP_EVERY: Duration = Duration::from_secs(10);

/// How often the event loop's delay is measured.
const BEAT_EVERY: Duration = Duration::from_millis(100);

/// How long the admin listener may take to finish.
const ADMIN_GRACE: Duration = Duration::from_secs(1);

/// A program with its listeners bound, ready to run.
#[derive(Debug)]
pub struct App {
    sites: Vec<server::Listener>,
    admin: Option<(TcpListener, Arc<Admin>)>,
    probes: Option<(TcpListener, Arc<Admin>)>,
    commons: Arc<Commons>,
    fleet: Option<fleet::Parts>,
    grace: Duration,
    lines: Vec<String>,
    reloader: Arc<Reloader>,
}

/// Makes the upstream behind a site: the real one, or a test's.
pub type MakeUpstream<'m> = &'m dyn Fn(&config::Upstream, &Clock) -> Result<Arc<dyn Upstream>, String>;

impl App {
    /// Binds everything. The error is one clear line.
    pub async fn bind(config: Config) -> Result<App, String> {
        Self::bind_with(config, Clock::start(), &|upstream, clock| {
            HttpUpstream::new(upstream, clock.clone()).map(|http| Arc::new(http) as Arc<dyn Upstream>)
        })
        .await
    }

    /// Binds everything, with a clock and upstreams of the caller's choice.
    pub async fn bind_with(config: Config, clock: Clock, make: MakeUpstream<'_>) -> Result<App, String> {
        let redis = config.redis.as_ref().map(|redis| redis.topology.to_string());
        let mut lines = vec![format!(
            "sidecache {} mode={} config={} redis={}",
            env!("CARGO_PKG_VERSION"),
            config.mode.0.token(),
            config.source,
            redis.as_deref().unwrap_or("none (this process only)")
        )];
        let (fixed, shown_config) = (reload::fixed(&config), config::shown(&config));
        let (commons, fleet) = commons(&config, clock)?;
        let commons = Arc::new(commons);
        let limits = within_open_files(config.limits, config.upstreams.len(), &mut lines);
        let (mut sites, mut faces) = (Vec::new(), Vec::new());
        for upstream in config.upstreams {
            let listener = server::bind(upstream.listen, &format!("upstream {}", upstream.name)).await?;
            lines.push(listening(&upstream, local(&listener)?));
            let real = make(&upstream, &commons.clock)?;
            let tls = upstream.listen_tls.as_ref().map(server::acceptor).transpose()?;
            let (listen, port) = (upstream.listen, local(&listener)?.port());
            let site = Site::new(upstream, real, port);
            let face = Face::new(Arc::new(Proxy { commons: commons.clone(), site }), limits);
            faces.push((listen, port, face.clone()));
            sites.push(server::Listener { socket: listener, tls, face });
        }
        let admin = match config.admin {
            None => None,
            Some(admin) => {
                let listener = server::bind(admin.listen, "admin").await?;
                let address = local(&listener)?;
                let token = if admin.token.is_some() { "set" } else { "none" };
                lines.push(format!("listening admin addr={address} token={token}"));
                Some((listener, address, admin.token))
            }
        };
        let probes = match config.probes {
            None => None,
            Some(listen) => {
                let listener = server::bind(listen, "probes").await?;
                lines.push(format!("listening probes addr={}", local(&listener)?));
                Some(listener)
            }
        };
        let shown: Vec<_> = faces.iter().map(|(_, _, face)| face.clone()).collect();
        let reloader = Arc::new(Reloader::new(commons.clone(), faces, fixed, shown_config));
        let (listener, address, token) = match admin {
            Some((listener, address, token)) => (Some(listener), address, token),
            None => (None, SocketAddr::from(([127, 0, 0, 1], 0)), None),
        };
        let state = Arc::new(Admin::new(commons.clone(), shown, reloader.clone(), token, address));
        let admin = listener.map(|listener| (listener, state.clone()));
        let probes = probes.map(|listener| (listener, state));
        lines.extend(config.notes);
        Ok(App { sites, admin, probes, commons, fleet, grace: config.grace, lines, reloader })
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
        self.sites.iter().filter_map(|site| site.socket.local_addr().ok()).collect()
    }

    /// Where the admin listener is.
    pub fn admin_address(&self) -> Option<SocketAddr> {
        self.admin.as_ref().and_then(|(listener, _)| listener.local_addr().ok())
    }

    /// Where the probes' listener is.
    pub fn probes_address(&self) -> Option<SocketAddr> {
        self.probes.as_ref().and_then(|(listener, _)| listener.local_addr().ok())
    }

    /// What all its upstreams share.
    pub fn commons(&self) -> &Arc<Commons> {
        &self.commons
    }

    /// Runs until `stop` turns true (or its sender is gone), then drains. Returns how many connections had to
    /// be cut.
    pub async fn run(self, mut stop: watch::Receiver<bool>) -> usize {
        let App { sites, admin, probes, commons, fleet, grace, reloader, .. } = self;
        let mut background = JoinSet::new();
        if let Some(fleet) = fleet {
            let faces = sites.iter().map(|site| site.face.clone()).collect();
            fleet.start(&commons, faces, &mut background);
        }
        let (drain, draining) = watch::channel(false);
        let (close_admin, admin_closes) = watch::channel(false);
        let mut serving = JoinSet::new();
        for site in sites {
            serving.spawn(server::serve(site, draining.clone(), grace));
        }
        let admin_state = admin.as_ref().or(probes.as_ref()).map(|(_, state)| state.clone());
        let mut asked = JoinSet::new();
        if let Some((listener, state)) = admin {
            asked.spawn(admin::serve(listener, state, admin_closes.clone()));
        }
        if let Some((listener, state)) = probes {
            asked.spawn(admin::serve_probes(listener, state, admin_closes));
        }
        background.spawn(beat(commons.clone()));
        background.spawn(sweep(commons));
        background.spawn(reload::follow(reloader));
        let _ = stop.wait_for(|stop| *stop).await;
        if let Some(state) = admin_state {
            state.drain();
        }
        drain.send_replace(true);
        let cut = serving.join_all().await.into_iter().sum();
        background.shutdown().await;
        close_admin.send_replace(true);
        let _ = tokio::time::timeout(ADMIN_GRACE, asked.join_all()).await;
        cut
    }
}

/// What a configuration makes of requests, without listening anywhere: for explanations.
pub fn proxies(mut config: Config) -> Result<Vec<Proxy>, String> {
    config.redis = None;
    let commons = Arc::new(commons(&config, Clock::start())?.0);
    let proxy = |upstream: config::Upstream| {
        let port = upstream.listen.port();
        let real = Arc::new(HttpUpstream::new(&upstream, commons.clock.clone())?);
        Ok(Proxy { commons: commons.clone(), site: Site::new(upstream, real, port) })
    };
    config.upstreams.into_iter().map(proxy).collect()
}

fn commons(config: &Config, clock: Clock) -> Result<(Commons, Option<fleet::Parts>), String> {
    let secrets = fleet::Secrets::of(config)?;
    let fleet = config.redis.as_ref().map(|redis| fleet::build(redis, config, &secrets, &clock)).transpose()?;
    let commons = Commons {
        clock,
        memory: Memory::new(&config.memory),
        partials: Partials::beside(config.memory.max_bytes),
        invalidations: fleet.as_ref().map_or_else(Arc::default, |fleet| fleet.invalidations.clone()),
        flights: Arc::new(Flights::default()),
        purse: Purse::new(config.memory.max_inflight_bytes),
        fleet: fleet.as_ref().map(|parts| parts.fleet.clone()),
        secret: ArcSwap::from_pointee(secrets.key()),
        max_entry_bytes: config.memory.max_entry_bytes,
        shared_write_stall: config.limits.shared_write_stall,
        mode: Switch::new(config.mode.0, config.mode.1),
        telemetry: Telemetry::default(),
    };
    Ok((commons, fleet))
}

/// Clients may take three quarters of the files this process may open: the rest is for upstreams, Redis and us.
fn within_open_files(mut limits: config::Limits, listeners: usize, lines: &mut Vec<String>) -> config::Limits {
    let files = process::open_files();
    let most = usize::try_from(files / 4 * 3).unwrap_or(usize::MAX) / listeners.max(1);
    if limits.connections > most {
        lines.push(format!(
            "limits.connections = {} is lowered to {most}: this process may open {files} files (ulimit -n)",
            limits.connections
        ));
        limits.connections = most;
    }
    limits
}

fn local(listener: &TcpListener) -> Result<SocketAddr, String> {
    listener.local_addr().map_err(|e| e.to_string())
}

fn listening(upstream: &config::Upstream, address: SocketAddr) -> String {
    let to = match &upstream.target {
        origin @ config::Target::Origin { .. } => origin.origin(),
        config::Target::Hosts(patterns) => format!("{} host patterns", patterns.len()),
    };
    let config::Upstream { name, profile, rules, .. } = upstream;
    format!("listening upstream={name} addr={address} -> {to} profile={profile} rules={rules}")
}

/// Says how late the event loop is.
async fn beat(commons: Arc<Commons>) {
    loop {
        let begun = commons.clock.instant();
        tokio::time::sleep(BEAT_EVERY).await;
        let late = commons.clock.instant().saturating_duration_since(begun).saturating_sub(BEAT_EVERY);
        // The timer's own step is a millisecond.
        commons.telemetry.pulse.beat(late.saturating_sub(Duration::from_millis(1)), commons.clock.now());
    }
}

/// Now and then: what has outlived its windows, or was purged for good, makes room.
async fn sweep(commons: Arc<Commons>) {
    let mut every = tokio::time::interval(SWEEP_EVERY);
    loop {
        every.tick().await;
        let now = commons.clock.now();
        let gone = |entry: &Entry| commons.invalidations.standing(entry, now) == Standing::Gone;
        commons.memory.sweep(|entry| !entry.expired(now) && !gone(entry));
    }
}
