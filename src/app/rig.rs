//! Everything that a configuration sets up and another one replaces: listeners, proxies, what they share, and the tasks
//! that work for them. Listeners that stay keep their connections.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::MakeUpstream;
use super::apart::Apart;
use super::commons::{adapt, first, foundations, renewed};
use super::fleet::Parts;
use super::prepare::{Held, Next, NextAsked, Now};
use crate::admin::{self, Access, Admin};
use crate::clock::Clock;
use crate::config::Config;
use crate::policy::millis;
use crate::policy::mode::Source;
use crate::proxy::Commons;
use crate::proxy::face::{Face, Stage};
use crate::redis;
use crate::server::{self, SharedTls};
use crate::telemetry::logs;

/// How long the admin listener may take to finish.
const ADMIN_GRACE: Duration = Duration::from_secs(1);

/// What runs, or is ready to.
pub(super) struct Rig {
    /// What is shown to those who ask about the whole process.
    pub(super) stage: Arc<Stage>,
    /// In the order of the configuration.
    upstreams: Vec<Running>,
    pub(super) admin: Option<Asked>,
    pub(super) probes: Option<Asked>,
    /// What the entries depend on.
    foundations: String,
    /// What the connections of a listener that closes have, in milliseconds.
    grace: Arc<AtomicU64>,
    /// None: nothing is at work yet.
    tasks: Option<Tasks>,
}

/// What is at work.
#[derive(Debug)]
struct Tasks {
    api: Arc<Admin>,
    /// Where requests are served. A reload is asked for from elsewhere.
    here: Handle,
    apart: Apart,
    serving: JoinSet<usize>,
    asked: JoinSet<()>,
    fleet: JoinSet<()>,
}

/// An upstream's listener.
struct Running {
    /// As configured.
    listen: SocketAddr,
    address: SocketAddr,
    face: Arc<Face>,
    tls: SharedTls,
    stop: watch::Sender<bool>,
    /// Not yet served.
    socket: Option<TcpListener>,
}

/// The admin or the probes' listener.
#[derive(Debug)]
pub(super) struct Asked {
    listen: SocketAddr,
    pub(super) access: Arc<Access>,
    stop: watch::Sender<bool>,
    /// Not yet served.
    socket: Option<TcpListener>,
}

/// What works for the fleet, not yet at work.
pub(super) type Idle = Option<Parts>;

impl Rig {
    /// Everything bound and built, nothing at work yet. Returns what to tell at start, too.
    pub(super) fn new(
        config: Config,
        clock: Clock,
        make: MakeUpstream<'_>,
    ) -> Result<(Rig, Idle, Vec<String>), String> {
        let (commons, parts) = first(&config, clock)?;
        let commons = Arc::new(commons);
        let mut rig = Rig {
            stage: Stage::new(commons.clone()),
            upstreams: Vec::new(),
            admin: None,
            probes: None,
            foundations: foundations(&config),
            grace: Arc::default(),
            tasks: None,
        };
        let mut next = rig.now().prepare(config, &commons, make)?;
        let lines = std::mem::take(&mut next.lines);
        rig.show(next);
        Ok((rig, parts, lines))
    }

    /// Puts another configuration in the place of the one before; a bad one changes nothing. Returns what was replaced
    /// that people may miss.
    pub(super) fn replace(&mut self, config: Config, make: MakeUpstream<'_>) -> Result<Vec<String>, String> {
        let here = self.tasks.as_ref().map(|tasks| tasks.here.clone()).ok_or("it is shutting down")?;
        let _here = here.enter();
        let before = self.stage.commons();
        let foundations = foundations(&config);
        let anew = foundations != self.foundations;
        let (log, mode, memory) = (logs::prepared(&config.log, redis::QUIET)?, config.mode, config.memory);
        let (commons, parts) = renewed(&before, &config, anew)?;
        let commons = Arc::new(commons);
        let next = self.now().prepare(config, &commons, make)?;
        // From here on nothing fails.
        let mut replaced = Vec::new();
        if anew {
            before.invalidations.succeeded_by(&commons.invalidations);
        }
        self.stage.set_commons(commons.clone());
        if anew {
            self.foundations = foundations;
            self.work_for_fleet(parts);
            replaced.push("redis, secrets or memory.max_unverified: the cache begins empty".to_owned());
            if place(&before) != place(&commons) {
                commons.mode.clear(Source::Fleet);
            }
        } else {
            adapt(&commons, memory);
        }
        replaced.extend(self.show(next));
        if anew {
            // Requests under way may hold the old one for long: not its memory.
            before.memory.empty();
        }
        commons.mode.configure(mode.0, mode.1);
        log.take_effect();
        self.serve_new();
        Ok(replaced)
    }

    /// What runs.
    fn now(&self) -> Now<'_> {
        let held = |asked: &Asked| Held { listen: asked.listen, address: asked.access.address };
        Now {
            stage: &self.stage,
            upstreams: self.upstreams.iter().map(|of| Held { listen: of.listen, address: of.address }).collect(),
            admin: self.admin.as_ref().map(held),
            probes: self.probes.as_ref().map(held),
        }
    }

    /// From the next request on this is what answers. Returns which listeners came and went.
    fn show(&mut self, next: Next) -> Vec<String> {
        let Next { upstreams, admin, probes, limits, grace, .. } = next;
        self.grace.store(millis(grace), Ordering::Relaxed);
        let mut changed = Vec::new();
        let mut before: Vec<Option<Running>> = std::mem::take(&mut self.upstreams).into_iter().map(Some).collect();
        for next in upstreams {
            let kept = next.kept.and_then(|at| before.get_mut(at)?.take());
            let running = if let Some(running) = kept {
                running.face.show(next.proxy, limits);
                running.tls.store(Arc::new(next.tls));
                running
            } else {
                changed.push(format!("listening on {}", next.address));
                Running {
                    listen: next.listen,
                    address: next.address,
                    face: Face::new(next.proxy, limits),
                    tls: server::shared_tls(next.tls),
                    stop: watch::Sender::new(false),
                    socket: next.opened,
                }
            };
            self.upstreams.push(running);
        }
        self.stage.set_faces(self.upstreams.iter().map(|running| running.face.clone()).collect());
        for gone in before.into_iter().flatten() {
            changed.push(format!("no longer listening on {}", gone.address));
            gone.stop.send_replace(true);
        }
        changed.extend(exchange(&mut self.admin, admin));
        changed.extend(exchange(&mut self.probes, probes));
        changed
    }

    /// Sets everything to work.
    pub(super) fn start(&mut self, api: Arc<Admin>, idle: Idle) {
        let (serving, asked, fleet) = (JoinSet::new(), JoinSet::new(), JoinSet::new());
        let (here, apart) = (Handle::current(), Apart::start());
        self.tasks = Some(Tasks { api, here, apart, serving, asked, fleet });
        self.work_for_fleet(idle);
        self.serve_new();
    }

    /// Others work for the fleet from now on, or nobody.
    fn work_for_fleet(&mut self, parts: Idle) {
        let Some(tasks) = &mut self.tasks else { return };
        tasks.fleet = JoinSet::new();
        if let Some(parts) = parts {
            parts.start(&self.stage, &mut tasks.fleet);
        }
    }

    /// Begins to serve the listeners that nobody serves yet.
    fn serve_new(&mut self) {
        let Some(tasks) = &mut self.tasks else { return };
        for running in &mut self.upstreams {
            if let Some(socket) = running.socket.take() {
                let (face, tls) = (running.face.clone(), running.tls.clone());
                let listener = server::Listener { socket, tls, face };
                tasks.serving.spawn(server::serve(listener, running.stop.subscribe(), self.grace.clone()));
            }
        }
        if let Some((socket, asked)) = self.admin.as_mut().and_then(|asked| Some((asked.socket.take()?, asked))) {
            let (api, access, stop) = (tasks.api.clone(), asked.access.clone(), asked.stop.subscribe());
            tasks.apart.serve(&mut tasks.asked, socket, |socket| admin::serve(socket, api, access, stop));
        }
        if let Some((socket, asked)) = self.probes.as_mut().and_then(|asked| Some((asked.socket.take()?, asked))) {
            let (api, stop) = (tasks.api.clone(), asked.stop.subscribe());
            tasks.apart.serve(&mut tasks.asked, socket, |socket| admin::serve_probes(socket, api, stop));
        }
    }

    /// Where the upstreams' listeners are, in the order of the configuration.
    pub(super) fn addresses(&self) -> Vec<SocketAddr> {
        self.upstreams.iter().map(|running| running.address).collect()
    }

    /// Lets all requests finish, then everything else. What it returns has the number of connections that had to be cut.
    pub(super) fn close(&mut self) -> Closing {
        let tasks = self.tasks.take();
        if let Some(tasks) = &tasks {
            tasks.api.drain();
        }
        for running in &self.upstreams {
            running.stop.send_replace(true);
        }
        let stops = self.admin.iter().chain(&self.probes).map(|asked| asked.stop.clone()).collect();
        Closing { tasks, stops }
    }
}

/// What is left when everything is to end.
pub(super) struct Closing {
    tasks: Option<Tasks>,
    stops: Vec<watch::Sender<bool>>,
}

impl Closing {
    /// Waits for the requests that run, at most for the grace. Returns how many connections had to be cut.
    pub(super) async fn finished(self) -> usize {
        let Some(Tasks { serving, asked, mut fleet, apart: _apart, .. }) = self.tasks else { return 0 };
        let cut = serving.join_all().await.into_iter().sum();
        fleet.shutdown().await;
        for stop in self.stops {
            stop.send_replace(true);
        }
        let _ = tokio::time::timeout(ADMIN_GRACE, asked.join_all()).await;
        cut
    }
}

/// Which Redis a fleet has, if it is one.
fn place(commons: &Commons) -> Option<String> {
    commons.fleet.as_ref().map(|fleet| fleet.redis.state().place)
}

/// Takes the next one for the one that runs, which ends if it listens elsewhere. Returns what came and went.
fn exchange(running: &mut Option<Asked>, next: Option<NextAsked>) -> Vec<String> {
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
    if let Some(NextAsked { listen, opened, address, token }) = next {
        changed.push(format!("listening on {address}"));
        let access = Arc::new(Access::new(address, token));
        *running = Some(Asked { listen, access, stop: watch::Sender::new(false), socket: opened });
    }
    changed
}
