//! Configuration reload while requests are served: at SIGHUP, at `POST /reload`, or when the file changes.
//! An invalid configuration changes nothing.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use serde_json::Value;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::interval;
use tracing::{error, info};

use super::real;
use super::runtime::Runtime;
use crate::admin::{Reload, ReloadStatus};
use crate::config;
use crate::config::Config;
use crate::proxy::active::ActiveConfig;

/// Interval between reads of the file. Its contents are compared, because Kubernetes changes a mounted folder by moving
/// a symbolic link. Two successive reads must agree, so that a file that is being written is not loaded.
const POLL_INTERVAL: Duration = Duration::from_secs(1);

/// Reads the configuration. The error names the location and the problem.
pub type Load = Box<dyn Fn() -> Result<Config, String> + Send + Sync>;

/// The source of a configuration.
pub struct ConfigSource {
    /// Reads the configuration.
    pub load: Load,
    /// The file to watch, if any.
    pub file: Option<PathBuf>,
}

/// The configuration reloader: reads the configuration again, and replaces the running one.
pub(super) struct Reloader {
    origin: OnceLock<ConfigSource>,
    /// Serializes reloads. Neither the shutdown nor a request for the status of the last reload waits for it.
    turn: Mutex<()>,
    runtime: Mutex<Runtime>,
    active: Arc<ActiveConfig>,
    reloads: Mutex<ReloadStatus>,
    /// The effective configuration.
    shown: Mutex<Value>,
    watched: Mutex<WatchedFile>,
}

/// The contents of the file, kept to detect changes.
#[derive(Default)]
struct WatchedFile {
    /// The contents when they were last loaded.
    taken: Option<Vec<u8>>,
    /// The contents at the last read.
    seen: Option<Vec<u8>>,
}

impl WatchedFile {
    /// Returns true if the contents have changed, and are the same as at the last read.
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

/// Returns an error without its excerpts of the file: they may hold secrets that only readers of the file may see.
fn strip_excerpts(error: &str) -> String {
    let shown = |line: &&str| line.trim_start_matches(|c: char| c == ' ' || c.is_ascii_digit()).starts_with('|');
    error.lines().filter(|line| !shown(line)).collect::<Vec<_>>().join("\n")
}

impl Reloader {
    pub(super) fn new(runtime: Runtime, shown: Value) -> Reloader {
        Reloader {
            origin: OnceLock::new(),
            active: runtime.active.clone(),
            turn: Mutex::default(),
            runtime: Mutex::new(runtime),
            reloads: Mutex::default(),
            shown: Mutex::new(shown),
            watched: Mutex::default(),
        }
    }

    /// Returns the running components.
    pub(super) fn runtime(&self) -> MutexGuard<'_, Runtime> {
        self.runtime.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the source of the configuration. Before this call, a reload is an error.
    pub(super) fn from(&self, origin: ConfigSource) {
        let _ = self.origin.set(origin);
        self.take_over();
    }

    /// Returns the contents of the file. `None` if it cannot be read, for example while a symbolic link is being moved.
    fn contents(&self) -> Option<Vec<u8>> {
        let file = self.origin.get()?.file.as_ref()?;
        std::fs::read(file).ok()
    }

    fn watched(&self) -> MutexGuard<'_, WatchedFile> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Marks the current contents of the file as loaded, so that they are not a change.
    fn take_over(&self) {
        let now = self.contents();
        *self.watched() = WatchedFile { taken: now.clone(), seen: now };
    }

    fn has_changed(&self) -> bool {
        self.contents().is_some_and(|now| self.watched().look(now))
    }

    fn lock(&self) -> MutexGuard<'_, ReloadStatus> {
        self.reloads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn replace(&self) -> Result<Vec<String>, String> {
        let Some(origin) = self.origin.get() else { return Err("there is no configuration file to reload".into()) };
        let config = (origin.load)()?;
        let shown = config::effective_json(&config);
        let replaced = self.runtime().replace(config, &real)?;
        *self.shown.lock().unwrap_or_else(PoisonError::into_inner) = shown;
        Ok(replaced)
    }
}

impl Reload for Reloader {
    fn reload(&self) -> Result<Vec<String>, String> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let done = self.replace().map_err(|error| strip_excerpts(&error));
        let mut reloads = self.lock();
        reloads.count += 1;
        reloads.at = Some(self.active.shared().clock.wall());
        reloads.error = done.as_ref().err().cloned();
        match &done {
            Ok(replaced) if replaced.is_empty() => info!("configuration reloaded"),
            Ok(replaced) => info!(replaced = replaced.join(", "), "configuration reloaded"),
            Err(why) => error!("configuration reload failed, the previous one stays in force: {why}"),
        }
        done
    }

    fn reloads(&self) -> ReloadStatus {
        self.lock().clone()
    }

    fn shown(&self) -> Value {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Reloads at SIGHUP and when the file has changed, forever.
pub(super) async fn follow(reloader: Arc<Reloader>) {
    if reloader.origin.get().is_none() {
        return;
    }
    let Ok(mut hangup) = signal(SignalKind::hangup()) else { return };
    let mut every = interval(POLL_INTERVAL);
    loop {
        let requested = tokio::select! {
            _ = hangup.recv() => true,
            _ = every.tick() => false,
        };
        let reloader = reloader.clone();
        // File reads may block.
        let done = tokio::task::spawn_blocking(move || {
            if requested {
                reloader.take_over();
            }
            if requested || reloader.has_changed() {
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
    fn changed_file_is_reported_once_two_reads_return_the_same_contents() {
        let mut watched = WatchedFile { taken: Some(b"old".into()), seen: Some(b"old".into()) };
        for (now, expected) in [("old", false), ("ne", false), ("new", false), ("new", true), ("new", false)] {
            assert_eq!(watched.look(now.into()), expected, "{now}");
        }
    }

    #[test]
    fn configuration_errors_omit_excerpts_of_the_file() {
        let error = "a.toml:7:11: no closing quote\n  |\n7 | url = \"redis://:hunter2@redis\n  |       ^\n1 errors";
        assert_eq!(strip_excerpts(error), "a.toml:7:11: no closing quote\n1 errors");
    }
}
