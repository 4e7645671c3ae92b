//! Another configuration while requests pass through: at SIGHUP, `POST /reload`, or when the file changes. A bad one
//! changes nothing.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use serde_json::Value;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::interval;
use tracing::{error, info, warn};

use crate::admin::{Reload, Reloads};
use crate::config::{self, Config, ListenTls, Secret};
use crate::proxy::face::Face;
use crate::proxy::site::Site;
use crate::proxy::{Commons, Proxy};
use crate::upstream::http::HttpUpstream;

/// How often the file is looked at. Its contents count: Kubernetes changes a mounted folder by moving a link.
/// Two looks must agree, so that a file which is being written is left alone.
const LOOK_EVERY: Duration = Duration::from_secs(1);

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
    /// One reload at a time. Whoever asks how the last one went does not wait for this.
    turn: Mutex<()>,
    reloads: Mutex<Reloads>,
    /// The configuration in force.
    shown: Mutex<Value>,
    watched: Mutex<Watched>,
}

/// What the file said, to be watched for a change.
#[derive(Default)]
struct Watched {
    /// When it was last taken over.
    taken: Option<Vec<u8>>,
    /// At the last look.
    seen: Option<Vec<u8>>,
}

impl Watched {
    /// Is this a change, and the same as at the last look?
    fn look(&mut self, now: Vec<u8>) -> bool {
        let settled = self.seen.as_ref() == Some(&now);
        let changed = settled && self.taken.as_ref() != Some(&now);
        if changed {
            self.taken = Some(now);
        } else {
            self.seen = Some(now);
        }
        changed
    }
}

impl std::fmt::Debug for Reloader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reloader").field("reloads", &self.reloads).finish_non_exhaustive()
    }
}

/// What only a restart changes.
pub(super) fn fixed(config: &Config) -> Vec<(&'static str, String)> {
    let tls: Vec<_> =
        config.upstreams.iter().map(|upstream| upstream.listen_tls.as_ref().map(certificates)).collect();
    // Secrets print as stars: what they are tells whether they changed.
    let digest = |secret: &Secret| blake3::hash(secret.reveal().as_bytes());
    let token = config.admin.as_ref().and_then(|admin| admin.token.as_ref()).map(digest);
    let secrets: Vec<_> = config.secrets.iter().map(digest).collect();
    vec![
        ("[redis]", format!("{:?}", config.redis)),
        ("[admin]", format!("{:?} {token:?}", config.admin)),
        ("[probes]", format!("{:?}", config.probes)),
        ("[shutdown]", format!("{:?}", config.grace)),
        ("[log]", format!("{:?}", config.log)),
        ("[security]", format!("{secrets:?} {}", config.encrypt)),
        ("[upstream.listen_tls]", format!("{tls:?}")),
        ("limits.connections", config.limits.connections.to_string()),
        ("limits.shared_write_stall", format!("{:?}", config.limits.shared_write_stall)),
        ("memory.max_entry_bytes, max_inflight_bytes, max_unverified", {
            let memory = &config.memory;
            format!("{} {} {:?}", memory.max_entry_bytes, memory.max_inflight_bytes, memory.max_unverified)
        }),
    ]
}

/// Where certificates and keys lie, and a digest of what they are.
fn certificates(tls: &ListenTls) -> String {
    let files = [Some(&tls.cert), Some(&tls.key), tls.client_ca.as_ref()];
    let digest = |file: &PathBuf| std::fs::read(file).ok().map(|text| blake3::hash(&text));
    files.map(|file| format!("{file:?} {:?}", file.and_then(digest))).join(" ")
}

/// An error without the lines of the file that it shows: they may hold what only its readers should see.
fn without_excerpts(error: &str) -> String {
    let shown = |line: &&str| line.trim_start_matches(|c: char| c == ' ' || c.is_ascii_digit()).starts_with('|');
    error.lines().filter(|line| !shown(line)).collect::<Vec<_>>().join("\n")
}

impl Reloader {
    pub(super) fn new(
        commons: Arc<Commons>,
        faces: Vec<(std::net::SocketAddr, u16, Arc<Face>)>,
        fixed: Vec<(&'static str, String)>,
        shown: Value,
    ) -> Reloader {
        Reloader {
            origin: OnceLock::new(),
            commons,
            faces,
            fixed,
            turn: Mutex::default(),
            reloads: Mutex::default(),
            shown: Mutex::new(shown),
            watched: Mutex::default(),
        }
    }

    /// From now on it can.
    pub(super) fn from(&self, origin: Origin) {
        let _ = self.origin.set(origin);
        self.take_over();
    }

    /// What the file says now. Between two links there may be none.
    fn contents(&self) -> Option<Vec<u8>> {
        let file = self.origin.get()?.file.as_ref()?;
        std::fs::read(file).ok()
    }

    fn watched(&self) -> MutexGuard<'_, Watched> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the file says now is no change.
    fn take_over(&self) {
        let now = self.contents();
        *self.watched() = Watched { taken: now.clone(), seen: now };
    }

    fn has_changed(&self) -> bool {
        self.contents().is_some_and(|now| self.watched().look(now))
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
        let shown = config::shown(&config);
        let (memory, limits, mode) = (config.memory.max_bytes, config.limits, config.mode);
        let ports = self.faces.iter().map(|(_, port, _)| *port);
        let sites: Vec<Site> = config
            .upstreams
            .into_iter()
            .zip(ports)
            .map(|(new, port)| self.site(new, port))
            .collect::<Result<_, _>>()?;
        for (mut site, (_, _, face)) in sites.into_iter().zip(&self.faces) {
            site.inherit(&face.proxy().site);
            let connections = face.now().limits.connections;
            let proxy = Proxy { commons: self.commons.clone(), site };
            face.show(Arc::new(proxy), config::Limits { connections, ..limits });
        }
        self.commons.mode.configure(mode.0, mode.1);
        self.commons.memory.resize(memory);
        *self.shown.lock().unwrap_or_else(PoisonError::into_inner) = shown;
        Ok(restart)
    }

    fn site(&self, upstream: config::Upstream, port: u16) -> Result<Site, String> {
        let name = upstream.name.clone();
        let http = HttpUpstream::new(&upstream, self.commons.clock.clone());
        let real = Arc::new(http.map_err(|error| format!("upstream {name}: {error}"))?);
        Ok(Site::new(upstream, real, port))
    }
}

impl Reload for Reloader {
    fn reload(&self) -> Result<Vec<String>, String> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let done = self.replace().map_err(|error| without_excerpts(&error));
        let mut reloads = self.lock();
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

    fn shown(&self) -> Value {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner).clone()
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
        let asked = tokio::select! {
            _ = hangup.recv() => true,
            _ = every.tick() => false,
        };
        let reloader = reloader.clone();
        // Files may hang.
        let done = tokio::task::spawn_blocking(move || {
            if asked {
                reloader.take_over();
            }
            if asked || reloader.has_changed() {
                let _ = reloader.reload();
            }
        });
        let _ = done.await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_being_written_is_left_alone() {
        let mut watched = Watched { taken: Some(b"old".into()), seen: Some(b"old".into()) };
        for (now, expected) in [("old", false), ("ne", false), ("new", false), ("new", true), ("new", false)] {
            assert_eq!(watched.look(now.into()), expected, "{now}");
        }
    }

    #[test]
    fn errors_without_the_lines_of_the_file() {
        let error = "a.toml:7:11: no closing quote\n  |\n7 | url = \"redis://:hunter2@redis\n  |       ^\n1 errors";
        assert_eq!(without_excerpts(error), "a.toml:7:11: no closing quote\n1 errors");
    }
}
