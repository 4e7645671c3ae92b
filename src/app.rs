//! The composition root: builds everything once, and owns the order of starting and of stopping.
//!
//! Start: bind all listeners (so that a taken port is an error before anything runs), then serve, then sweep.
//! Stop: not ready, stop accepting, let requests finish within the grace, cut the rest.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::admin::{self, Admin};
use crate::body::fanout::Purse;
use crate::clock::Clock;
use crate::config::{self, Config};
use crate::policy::invalidation::Standing;
use crate::policy::key::KeySecret;
use crate::proxy::flights::Flights;
use crate::proxy::invalidations::Invalidations;
use crate::proxy::site::Site;
use crate::proxy::{Commons, Proxy};
use crate::server;
use crate::store::Memory;
use crate::telemetry::Telemetry;
use crate::upstream::Upstream;
use crate::upstream::http::HttpUpstream;

/// How often expired entries are swept.
const SWEEP_EVERY: Duration = Duration::from_secs(10);

/// How long the admin listener may take to finish.
const ADMIN_GRACE: Duration = Duration::from_secs(1);

/// A program with its listeners bound, ready to run.
#[derive(Debug)]
pub struct App {
    sites: Vec<(TcpListener, Arc<Proxy>)>,
    admin: Option<(TcpListener, Arc<Admin>)>,
    commons: Arc<Commons>,
    limits: config::Limits,
    grace: Duration,
    lines: Vec<String>,
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
        let mut lines = vec![format!(
            "sidecache {} mode=normal config={} redis=none (this process only)",
            env!("CARGO_PKG_VERSION"),
            config.source
        )];
        let commons = Arc::new(commons(&config, clock)?);
        let mut sites = Vec::new();
        for (index, upstream) in config.upstreams.into_iter().enumerate() {
            let listener = server::bind(upstream.listen, &format!("upstream {}", upstream.name)).await?;
            lines.push(listening(&upstream, local(&listener)?));
            let real = make(&upstream, &commons.clock)?;
            let index = u16::try_from(index).map_err(|_| "more upstreams than fit".to_owned())?;
            let site = Site::new(index, upstream, real, local(&listener)?.port());
            sites.push((listener, Arc::new(Proxy { commons: commons.clone(), site })));
        }
        let admin = match config.admin {
            None => None,
            Some(admin) => {
                let listener = server::bind(admin.listen, "admin").await?;
                let address = local(&listener)?;
                let token = if admin.token.is_some() { "set" } else { "none" };
                lines.push(format!("listening admin addr={address} token={token}"));
                let proxies = sites.iter().map(|(_, proxy)| proxy.clone()).collect();
                Some((listener, Arc::new(Admin::new(commons.clone(), proxies, admin.token, address))))
            }
        };
        lines.extend(config.notes);
        Ok(App { sites, admin, commons, limits: config.limits, grace: config.grace, lines })
    }

    /// What to print at start, one line each.
    pub fn lines(&self) -> &[String] {
        &self.lines
    }

    /// Where the upstreams' listeners are, in the order of the configuration.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.sites.iter().filter_map(|(listener, _)| listener.local_addr().ok()).collect()
    }

    /// Where the admin listener is.
    pub fn admin_address(&self) -> Option<SocketAddr> {
        self.admin.as_ref().and_then(|(listener, _)| listener.local_addr().ok())
    }

    /// What all its upstreams share.
    pub fn commons(&self) -> &Arc<Commons> {
        &self.commons
    }

    /// Runs until `stop` turns true (or its sender is gone), then drains. Returns how many connections had to
    /// be cut.
    pub async fn run(self, mut stop: watch::Receiver<bool>) -> usize {
        let App { sites, admin, commons, limits, grace, .. } = self;
        let (drain, draining) = watch::channel(false);
        let (close_admin, admin_closes) = watch::channel(false);
        let mut serving = JoinSet::new();
        for (listener, proxy) in sites {
            serving.spawn(server::serve(listener, proxy, limits, draining.clone(), grace));
        }
        let admin_state = admin.as_ref().map(|(_, state)| state.clone());
        let admin = admin.map(|(listener, state)| tokio::spawn(admin::serve(listener, state, admin_closes)));
        let sweeper = tokio::spawn(sweep(commons));
        let _ = stop.wait_for(|stop| *stop).await;
        if let Some(state) = admin_state {
            state.drain();
        }
        drain.send_replace(true);
        let cut = serving.join_all().await.into_iter().sum();
        sweeper.abort();
        close_admin.send_replace(true);
        if let Some(admin) = admin {
            let _ = tokio::time::timeout(ADMIN_GRACE, admin).await;
        }
        cut
    }
}

fn commons(config: &Config, clock: Clock) -> Result<Commons, String> {
    let secret = match &config.key_secret {
        Some(secret) => secret.clone(),
        None => {
            let mut random = [0; 32];
            getrandom::fill(&mut random).map_err(|e| format!("no randomness to be had: {e}"))?;
            KeySecret(random)
        }
    };
    Ok(Commons {
        clock,
        memory: Memory::new(&config.memory),
        invalidations: Invalidations::default(),
        flights: Arc::new(Flights::default()),
        purse: Purse::new(config.memory.max_inflight_bytes),
        secret,
        max_entry_bytes: config.memory.max_entry_bytes,
        shared_write_stall: config.limits.shared_write_stall,
        telemetry: Telemetry::default(),
    })
}

fn local(listener: &TcpListener) -> Result<SocketAddr, String> {
    listener.local_addr().map_err(|e| e.to_string())
}

fn listening(upstream: &config::Upstream, address: SocketAddr) -> String {
    let to = match &upstream.target {
        config::Target::Origin { scheme, authority, .. } => format!("{scheme}://{authority}"),
        config::Target::Hosts(patterns) => format!("{} host patterns", patterns.len()),
    };
    let config::Upstream { name, profile, rules, .. } = upstream;
    format!("listening upstream={name} addr={address} -> {to} profile={profile} rules={rules}")
}

/// Now and then: what has outlived its windows, or was purged for good, makes room.
async fn sweep(commons: Arc<Commons>) {
    let mut every = tokio::time::interval(SWEEP_EVERY);
    loop {
        every.tick().await;
        let now = commons.clock.now();
        commons.memory.sweep(|entry| !entry.expired(now) && commons.invalidations.standing(entry) != Standing::Gone);
    }
}
