//! The runtime state of a configuration, which a reload replaces: listeners, proxies, shared state, and their tasks.
//! A listener whose address stays the same keeps its connections.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::MakeUpstream;
use super::admin_runtime::AdminRuntime;
use super::build::{PreparedConfig, PreparedListener, RunningListener, RunningState};
use super::fleet::FleetParts;
use super::shared::{apply_sizes, build, foundations, rebuild};
use crate::admin;
use crate::admin::{Access, Admin};
use crate::clock::Clock;
use crate::config::Config;
use crate::policy::millis;
use crate::policy::mode::ModeSource;
use crate::proxy::SharedState;
use crate::proxy::active::{ActiveConfig, ActiveProxy};
use crate::redis;
use crate::server;
use crate::server::SharedTls;
use crate::telemetry::logs;

/// Time that the admin and probes listeners may take to finish.
const ADMIN_GRACE: Duration = Duration::from_secs(1);

/// Minimum time for purges to reach the fleet's log at shutdown.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(1);

/// The components of a configuration, running or ready to run.
pub(super) struct Runtime {
    /// The active configuration, for the parts that concern the whole process.
    pub(super) active: Arc<ActiveConfig>,
    /// The upstreams' listeners, in the order of the configuration.
    upstreams: Vec<UpstreamListener>,
    pub(super) admin: Option<AdminListener>,
    pub(super) probes: Option<AdminListener>,
    /// The settings that the validity of entries depends on.
    foundations: String,
    /// Grace period of the connections of a closing listener, in milliseconds.
    grace: Arc<AtomicU64>,
    /// `None` before the start and during shutdown.
    tasks: Option<Tasks>,
}

/// The running tasks.
#[derive(Debug)]
struct Tasks {
    api: Arc<Admin>,
    /// The Tokio runtime that serves requests. A reload is started from another thread.
    serving_runtime: Handle,
    admin_runtime: AdminRuntime,
    serving: JoinSet<usize>,
    admin_tasks: JoinSet<()>,
    fleet: JoinSet<()>,
}

/// An upstream's listener.
struct UpstreamListener {
    /// The configured address.
    listen: SocketAddr,
    address: SocketAddr,
    proxy: Arc<ActiveProxy>,
    tls: SharedTls,
    stop: watch::Sender<bool>,
    /// The bound socket, until it is served.
    socket: Option<TcpListener>,
}

/// The admin or probes listener.
#[derive(Debug)]
pub(super) struct AdminListener {
    listen: SocketAddr,
    pub(super) access: Arc<Access>,
    stop: watch::Sender<bool>,
    /// The bound socket, until it is served.
    socket: Option<TcpListener>,
}

/// The fleet's components, not yet started.
pub(super) type PendingFleet = Option<FleetParts>;

impl Runtime {
    /// Binds and builds everything, and starts nothing. Also returns the fleet's components and the lines to print at
    /// startup.
    pub(super) fn new(
        config: Config,
        clock: Clock,
        make: MakeUpstream<'_>,
    ) -> Result<(Runtime, PendingFleet, Vec<String>), String> {
        let (shared, parts) = build(&config, clock)?;
        let shared = Arc::new(shared);
        let mut runtime = Runtime {
            active: ActiveConfig::new(shared.clone()),
            upstreams: Vec::new(),
            admin: None,
            probes: None,
            foundations: foundations(&config),
            grace: Arc::default(),
            tasks: None,
        };
        let mut next = runtime.now().prepare(config, &shared, make)?;
        let lines = std::mem::take(&mut next.lines);
        runtime.replace_active(next);
        Ok((runtime, parts, lines))
    }

    /// Replaces the running configuration; an invalid one changes nothing. Returns the replaced parts that an operator
    /// may notice.
    pub(super) fn replace(&mut self, config: Config, make: MakeUpstream<'_>) -> Result<Vec<String>, String> {
        let serving_runtime =
            self.tasks.as_ref().map(|tasks| tasks.serving_runtime.clone()).ok_or("it is shutting down")?;
        let _entered = serving_runtime.enter();
        let before = self.active.shared();
        let foundations = foundations(&config);
        let restart_cache = foundations != self.foundations;
        let (log, mode, memory) =
            (logs::prepared(&config.log, redis::DRIVER_LOG_FILTER)?, config.mode, config.memory);
        let (shared, parts) = rebuild(&before, &config, restart_cache)?;
        let shared = Arc::new(shared);
        let next = self.now().prepare(config, &shared, make)?;
        // Nothing fails from here on.
        let mut replaced = Vec::new();
        let all_logged = before.invalidations.unlogged() == 0;
        if restart_cache {
            before.invalidations.replace_with(&shared.invalidations);
        }
        self.active.set_shared(shared.clone());
        if restart_cache {
            if let Some(fleet) = before.fleet.clone().filter(|_| all_logged) {
                let invalidations = before.invalidations.clone();
                serving_runtime.spawn(async move { fleet.leave(&invalidations, LEAVE_TIMEOUT).await });
            }
            self.foundations = foundations;
            let mut previous = self.work_for_fleet(parts);
            replaced.push("redis, secrets or memory.max_unverified (the cache starts empty)".to_owned());
            if redis_place(&before) != redis_place(&shared) {
                shared.mode.clear(ModeSource::Fleet);
                // A task of the previous fleet that was just setting its mode does so once more.
                let cleared = shared.clone();
                serving_runtime.spawn(async move {
                    previous.shutdown().await;
                    cleared.mode.clear(ModeSource::Fleet);
                });
            }
        } else {
            apply_sizes(&shared, memory);
        }
        replaced.extend(self.replace_active(next));
        if restart_cache {
            // Running requests may keep the old store for long: free its entries now.
            before.memory.clear_for_good();
        }
        shared.mode.configure(mode.0, mode.1);
        log.take_effect();
        self.serve_new();
        Ok(replaced)
    }

    /// Returns the proxies and listeners that run now.
    fn now(&self) -> RunningState<'_> {
        let held =
            |listener: &AdminListener| RunningListener { listen: listener.listen, address: listener.access.address };
        RunningState {
            active: &self.active,
            upstreams: self
                .upstreams
                .iter()
                .map(|of| RunningListener { listen: of.listen, address: of.address })
                .collect(),
            admin: self.admin.as_ref().map(held),
            probes: self.probes.as_ref().map(held),
        }
    }

    /// Serves with the prepared configuration from the next request on. Returns the listeners that were opened and
    /// closed.
    fn replace_active(&mut self, next: PreparedConfig) -> Vec<String> {
        let PreparedConfig { upstreams, admin, probes, limits, grace, .. } = next;
        self.grace.store(millis(grace), Ordering::Relaxed);
        let mut changed = Vec::new();
        let mut before: Vec<Option<UpstreamListener>> =
            std::mem::take(&mut self.upstreams).into_iter().map(Some).collect();
        for next in upstreams {
            let kept = next.kept.and_then(|at| before.get_mut(at)?.take());
            let running = if let Some(running) = kept {
                running.proxy.replace(next.proxy, limits);
                running.tls.store(Arc::new(next.tls));
                running
            } else {
                changed.push(format!("listening on {}", next.address));
                UpstreamListener {
                    listen: next.listen,
                    address: next.address,
                    proxy: ActiveProxy::new(next.proxy, limits),
                    tls: server::shared_tls(next.tls),
                    stop: watch::Sender::new(false),
                    socket: next.opened,
                }
            };
            self.upstreams.push(running);
        }
        self.active.set_listeners(self.upstreams.iter().map(|running| running.proxy.clone()).collect());
        for gone in before.into_iter().flatten() {
            changed.push(format!("no longer listening on {}", gone.address));
            gone.stop.send_replace(true);
        }
        changed.extend(replace_listener(&mut self.admin, admin));
        changed.extend(replace_listener(&mut self.probes, probes));
        changed
    }

    /// Starts serving, and all background tasks.
    pub(super) fn start(&mut self, api: Arc<Admin>, idle: PendingFleet) {
        let (serving, admin_tasks, fleet) = (JoinSet::new(), JoinSet::new(), JoinSet::new());
        let (serving_runtime, admin_runtime) = (Handle::current(), AdminRuntime::start());
        self.tasks = Some(Tasks { api, serving_runtime, admin_runtime, serving, admin_tasks, fleet });
        drop(self.work_for_fleet(idle));
        self.serve_new();
    }

    /// Replaces the fleet's background tasks, and returns the previous ones. Without `parts` there are none.
    fn work_for_fleet(&mut self, parts: PendingFleet) -> JoinSet<()> {
        let Some(tasks) = &mut self.tasks else { return JoinSet::new() };
        let mut previous = std::mem::take(&mut tasks.fleet);
        previous.abort_all();
        if let Some(parts) = parts {
            parts.start(&self.active, &mut tasks.fleet);
        }
        previous
    }

    /// Starts to serve the listeners that are not served yet.
    fn serve_new(&mut self) {
        let Some(tasks) = &mut self.tasks else { return };
        for running in &mut self.upstreams {
            if let Some(socket) = running.socket.take() {
                let (proxy, tls) = (running.proxy.clone(), running.tls.clone());
                let listener = server::Listener { socket, tls, proxy };
                tasks.serving.spawn(server::serve(listener, running.stop.subscribe(), self.grace.clone()));
            }
        }
        if let Some((socket, listener)) =
            self.admin.as_mut().and_then(|listener| Some((listener.socket.take()?, listener)))
        {
            let (api, access, stop) = (tasks.api.clone(), listener.access.clone(), listener.stop.subscribe());
            tasks
                .admin_runtime
                .serve(&mut tasks.admin_tasks, socket, |socket| admin::serve(socket, api, access, stop));
        }
        if let Some((socket, listener)) =
            self.probes.as_mut().and_then(|listener| Some((listener.socket.take()?, listener)))
        {
            let (api, stop) = (tasks.api.clone(), listener.stop.subscribe());
            tasks
                .admin_runtime
                .serve(&mut tasks.admin_tasks, socket, |socket| admin::serve_probes(socket, api, stop));
        }
    }

    /// Returns the addresses of the upstreams' listeners, in the order of the configuration.
    pub(super) fn addresses(&self) -> Vec<SocketAddr> {
        self.upstreams.iter().map(|running| running.address).collect()
    }

    /// Starts the shutdown: requests finish first, then everything else. [`Shutdown::finished`] waits for that and
    /// returns the number of connections that had to be closed.
    pub(super) fn close(&mut self) -> Shutdown {
        let tasks = self.tasks.take();
        if let Some(tasks) = &tasks {
            tasks.api.drain();
        }
        for running in &self.upstreams {
            running.stop.send_replace(true);
        }
        let stops = self.admin.iter().chain(&self.probes).map(|listener| listener.stop.clone()).collect();
        let shared = self.active.shared();
        let deadline = shared.clock.instant() + Duration::from_millis(self.grace.load(Ordering::Relaxed));
        Shutdown { tasks, stops, shared, deadline }
    }
}

/// The tasks that remain during a shutdown.
pub(super) struct Shutdown {
    tasks: Option<Tasks>,
    stops: Vec<watch::Sender<bool>>,
    shared: Arc<SharedState>,
    /// The end of the grace period.
    deadline: Instant,
}

impl Shutdown {
    /// Waits for running requests, at most for the grace period. Returns the number of connections that had to be
    /// closed.
    pub(super) async fn finished(self) -> usize {
        let Some(Tasks { serving, admin_tasks, mut fleet, admin_runtime: _admin_runtime, .. }) = self.tasks else {
            return 0;
        };
        let cut = serving.join_all().await.into_iter().sum();
        if let Some(fleet) = &self.shared.fleet {
            let rest = self.deadline.saturating_duration_since(self.shared.clock.instant());
            fleet.leave(&self.shared.invalidations, rest.max(LEAVE_TIMEOUT)).await;
        }
        fleet.shutdown().await;
        for stop in self.stops {
            stop.send_replace(true);
        }
        let _ = tokio::time::timeout(ADMIN_GRACE, admin_tasks.join_all()).await;
        cut
    }
}

/// Returns the address of the fleet's Redis, if Redis is configured.
fn redis_place(shared: &SharedState) -> Option<String> {
    shared.fleet.as_ref().map(|fleet| fleet.redis.state().place)
}

/// Replaces a running listener, which is closed if its address changes. Returns the listeners that were opened and
/// closed.
fn replace_listener(running: &mut Option<AdminListener>, next: Option<PreparedListener>) -> Vec<String> {
    if let (Some(same), Some(next)) = (&*running, &next)
        && next.opened.is_none()
    {
        same.access.set_token(next.token.clone());
        return Vec::new();
    }
    let mut changed = Vec::new();
    if let Some(gone) = running.take() {
        changed.push(format!("no longer listening on {}", gone.access.address));
        gone.stop.send_replace(true);
    }
    if let Some(PreparedListener { listen, opened, address, token }) = next {
        changed.push(format!("listening on {address}"));
        let access = Arc::new(Access::new(address, token));
        *running = Some(AdminListener { listen, access, stop: watch::Sender::new(false), socket: opened });
    }
    changed
}
