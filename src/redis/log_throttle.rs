//! Log messages about Redis connections: lost, restored, and at most one warning per second.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tracing::{info, warn};

use crate::clock::Clock;
use crate::policy::Tick;

/// Minimum interval between two warnings.
const LINE_INTERVAL: Duration = Duration::from_secs(1);

/// The log of all connections, rate limited.
#[derive(Debug)]
pub(super) struct LogThrottle {
    clock: Clock,
    state: Mutex<ThrottleState>,
}

#[derive(Debug, Default)]
struct ThrottleState {
    /// Warnings before this are suppressed.
    quiet_until: Tick,
    /// Number of suppressed warnings.
    suppressed: u64,
    /// Connections that are down, and why.
    down: BTreeMap<&'static str, String>,
}

impl LogThrottle {
    pub(super) fn new(clock: Clock) -> LogThrottle {
        LogThrottle { clock, state: Mutex::default() }
    }

    /// Logs a warning, or counts it as suppressed.
    pub(super) fn warn(&self, connection: &'static str, why: &str) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.clock.now();
        if now < state.quiet_until {
            state.suppressed += 1;
            return;
        }
        state.quiet_until = now.plus(LINE_INTERVAL);
        let suppressed_lines = std::mem::take(&mut state.suppressed);
        warn!(connection, suppressed_lines, "redis: {why}");
    }

    /// Records that a connection was lost or could not be made. Logs it if the reason is new.
    pub(super) fn down(&self, connection: &'static str, why: &str) {
        let changed = {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.down.insert(connection, why.to_owned()).is_none_or(|before| before != why)
        };
        if changed {
            self.warn(connection, why);
        }
    }

    /// Records that a connection has been made. Logs it when none is down any more.
    pub(super) fn up(&self, connection: &'static str) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let was_down = state.down.remove(connection).is_some();
        if was_down && state.down.is_empty() {
            info!("redis: all connections are up");
        }
    }

    /// Returns why a connection is down, if one is.
    pub(super) fn last_error(&self) -> Option<String> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.down.values().next().cloned()
    }
}
