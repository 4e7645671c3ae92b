//! Another configuration while requests pass through: at SIGHUP, `POST /reload`, or when the file changes. A bad one
//! changes nothing.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use serde_json::Value;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::interval;
use tracing::{error, info};

use super::real;
use super::rig::Rig;
use crate::admin::{Reload, Reloads};
use crate::config::{self, Config};
use crate::proxy::face::Stage;

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

/// Reads the configuration again, and has it replace what runs.
pub(super) struct Reloader {
    origin: OnceLock<Origin>,
    /// One reload at a time. Whoever asks how the last one went does not wait for this, nor does the end.
    turn: Mutex<()>,
    rig: Mutex<Rig>,
    stage: Arc<Stage>,
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

/// An error without the lines of the file that it shows: they may hold what only its readers should see.
fn without_excerpts(error: &str) -> String {
    let shown = |line: &&str| line.trim_start_matches(|c: char| c == ' ' || c.is_ascii_digit()).starts_with('|');
    error.lines().filter(|line| !shown(line)).collect::<Vec<_>>().join("\n")
}

impl Reloader {
    pub(super) fn new(rig: Rig, shown: Value) -> Reloader {
        Reloader {
            origin: OnceLock::new(),
            stage: rig.stage.clone(),
            turn: Mutex::default(),
            rig: Mutex::new(rig),
            reloads: Mutex::default(),
            shown: Mutex::new(shown),
            watched: Mutex::default(),
        }
    }

    /// What runs.
    pub(super) fn rig(&self) -> MutexGuard<'_, Rig> {
        self.rig.lock().unwrap_or_else(PoisonError::into_inner)
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

    fn replace(&self) -> Result<Vec<String>, String> {
        let Some(origin) = self.origin.get() else { return Err("there is nothing to read again".into()) };
        let config = (origin.load)()?;
        let shown = config::shown(&config);
        let replaced = self.rig().replace(config, &real)?;
        *self.shown.lock().unwrap_or_else(PoisonError::into_inner) = shown;
        Ok(replaced)
    }
}

impl Reload for Reloader {
    fn reload(&self) -> Result<Vec<String>, String> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let done = self.replace().map_err(|error| without_excerpts(&error));
        let mut reloads = self.lock();
        reloads.count += 1;
        reloads.at = Some(self.stage.commons().clock.wall());
        reloads.error = done.as_ref().err().cloned();
        match &done {
            Ok(replaced) if replaced.is_empty() => info!("the configuration was read again"),
            Ok(replaced) => info!(replaced = replaced.join(", "), "the configuration was read again"),
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
