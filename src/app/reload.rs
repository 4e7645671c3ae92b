//! Another configuration while requests pass through: at SIGHUP, `POST /reload`, or when the file changes. A bad one
//! changes nothing.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::time::interval;
use tracing::{error, info, warn};

use crate::admin::{Reload, Reloads};
use crate::config::{self, Config};
use crate::proxy::face::Face;
use crate::proxy::site::Site;
use crate::proxy::{Commons, Proxy};
use crate::upstream::http::HttpUpstream;

/// How often the file is looked at. Its contents count: Kubernetes changes a mounted folder by moving a link.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Reads the configuration again. The error says where and what.
pub type Load = Box<dyn Fn() -> Result<Config, String> + Send + Sync>;

/// Where a configuration comes from.
pub struct Origin {
    /// Reads it.
    pub load: Load,
    /// The file to watch, if there is one.
    pub file: Option<PathBuf>,
}

/// Replaces what can be replaced.
pub(super) struct Reloader {
    origin: OnceLock<Origin>,
    commons: Arc<Commons>,
    /// In the order of the configuration: where each listens, on which port, and what it shows.
    faces: Vec<(std::net::SocketAddr, u16, Arc<Face>)>,
    /// What only a restart changes, as it was at start: name and value.
    fixed: Vec<(&'static str, String)>,
    reloads: Mutex<Reloads>,
    /// What the file said when it was last read, to be watched for a change.
    seen: Mutex<Option<Vec<u8>>>,
}

impl std::fmt::Debug for Reloader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reloader").field("reloads", &self.reloads).finish_non_exhaustive()
    }
}

/// What only a restart changes.
pub(super) fn fixed(config: &Config) -> Vec<(&'static str, String)> {
    let tls: Vec<_> = config.upstreams.iter().map(|upstream| &upstream.listen_tls).collect();
    vec![
        ("[redis]", format!("{:?}", config.redis)),
        ("[admin]", format!("{:?}", config.admin)),
        ("[probes]", format!("{:?}", config.probes)),
        ("[shutdown]", format!("{:?}", config.grace)),
        ("[log]", format!("{:?}", config.log)),
        ("[security]", format!("{:?} {}", config.secrets, config.encrypt)),
        ("[upstream.listen_tls]", format!("{tls:?}")),
        ("limits.connections", config.limits.connections.to_string()),
        ("memory.max_entry_bytes, max_inflight_bytes, max_unverified", {
            let memory = &config.memory;
            format!("{} {} {:?}", memory.max_entry_bytes, memory.max_inflight_bytes, memory.max_unverified)
        }),
    ]
}

impl Reloader {
    pub(super) fn new(
        commons: Arc<Commons>,
        faces: Vec<(std::net::SocketAddr, u16, Arc<Face>)>,
        fixed: Vec<(&'static str, String)>,
    ) -> Reloader {
        Reloader { origin: OnceLock::new(), commons, faces, fixed, reloads: Mutex::default(), seen: Mutex::default() }
    }

    /// From now on it can.
    pub(super) fn from(&self, origin: Origin) {
        let _ = self.origin.set(origin);
        self.has_changed();
    }

    /// Does the file say something else than when this was last asked? Between two links there may be none: no.
    fn has_changed(&self) -> bool {
        let file = self.origin.get().and_then(|origin| origin.file.as_ref());
        let Some(now) = file.and_then(|file| std::fs::read(file).ok()) else { return false };
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let before = seen.replace(now);
        before != *seen
    }

    fn lock(&self) -> MutexGuard<'_, Reloads> {
        self.reloads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Builds everything first; only then does it show.
    fn replace(&self) -> Result<Vec<String>, String> {
        let Some(origin) = self.origin.get() else { return Err("there is nothing to read again".into()) };
        let config = (origin.load)()?;
        let listens: Vec<_> = config.upstreams.iter().map(|upstream| upstream.listen).collect();
        if listens.iter().ne(self.faces.iter().map(|(listen, ..)| listen)) {
            return Err("the upstreams' listen addresses have changed: that needs a restart".into());
        }
        let restart = fixed(&config)
            .into_iter()
            .zip(&self.fixed)
            .filter(|((_, new), (_, old))| new != old)
            .map(|((name, _), _)| name.to_owned())
            .collect();
        let (memory, limits, mode) = (config.memory.max_bytes, config.limits, config.mode);
        let sites: Vec<Arc<Proxy>> = config
            .upstreams
            .into_iter()
            .zip(&self.faces)
            .map(|(upstream, (_, port, face))| self.proxy(upstream, *port, &face.proxy()))
            .collect::<Result<_, String>>()?;
        for (proxy, (_, _, face)) in sites.into_iter().zip(&self.faces) {
            let connections = face.now().limits.connections;
            face.show(proxy, config::Limits { connections, ..limits });
        }
        self.commons.mode.configure(mode);
        self.commons.memory.resize(memory);
        Ok(restart)
    }

    fn proxy(&self, upstream: config::Upstream, port: u16, before: &Proxy) -> Result<Arc<Proxy>, String> {
        let name = upstream.name.clone();
        let http = HttpUpstream::new(&upstream, self.commons.clock.clone());
        let real = Arc::new(http.map_err(|error| format!("upstream {name}: {error}"))?);
        let mut site = Site::new(upstream, real, port);
        site.inherit(&before.site);
        Ok(Arc::new(Proxy { commons: self.commons.clone(), site }))
    }
}

impl Reload for Reloader {
    fn reload(&self) -> Result<Vec<String>, String> {
        // One at a time.
        let mut reloads = self.lock();
        let done = self.replace();
        reloads.count += 1;
        reloads.at = Some(self.commons.clock.wall());
        reloads.error = done.as_ref().err().cloned();
        match &done {
            Ok(restart) if restart.is_empty() => info!("the configuration was read again"),
            Ok(restart) => {
                warn!(restart = restart.join(", "), "the configuration was read again; some of it needs a restart");
            }
            Err(why) => error!("the configuration was not taken, and nothing has changed: {why}"),
        }
        done
    }

    fn reloads(&self) -> Reloads {
        self.lock().clone()
    }
}

/// Reloads at SIGHUP, and when the file has changed, for ever.
pub(super) async fn follow(reloader: Arc<Reloader>) {
    if reloader.origin.get().is_none() {
        return;
    }
    let Ok(mut hangup) = signal(SignalKind::hangup()) else { return };
    let mut every = interval(LOOK_EVERY);
    loop {
        tokio::select! {
            _ = hangup.recv() => drop(reloader.has_changed()),
            _ = every.tick() => {
                if !reloader.has_changed() {
                    continue;
                }
            }
        }
        let reloader = reloader.clone();
        let _ = tokio::task::spawn_blocking(move || reloader.reload()).await;
    }
}
