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
    said: Mutex<ThrottleState>,
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
        LogThrottle { clock, said: Mutex::default() }
    }

    /// Logs a warning, or counts it as suppressed.
    pub(super) fn warn(&self, connection: &'static str, why: &str) {
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.clock.now();
        if now < said.quiet_until {
            said.suppressed += 1;
            return;
        }
        said.quiet_until = now.plus(LINE_INTERVAL);
        let suppressed_lines = std::mem::take(&mut said.suppressed);
        warn!(connection, suppressed_lines, "redis: {why}");
    }

    /// Records that a connection was lost or could not be made. Logs it if the reason is new.
    pub(super) fn down(&self, connection: &'static str, why: &str) {
        let news = {
            let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
            said.down.insert(connection, why.to_owned()).is_none_or(|before| before != why)
        };
        if news {
            self.warn(connection, why);
        }
    }

    /// Records that a connection has been made. Logs it when none is down any more.
    pub(super) fn up(&self, connection: &'static str) {
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        let was_down = said.down.remove(connection).is_some();
        if was_down && said.down.is_empty() {
            info!("redis: all connections are up");
        }
    }

    /// Returns why a connection is down, if one is.
    pub(super) fn last_error(&self) -> Option<String> {
        let said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        said.down.values().next().cloned()
    }
}
