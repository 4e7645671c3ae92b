//! What is said about Redis: when it goes, when it comes back, and at most one line a second.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tracing::{info, warn};

use crate::clock::Clock;
use crate::policy::Tick;

/// Between two lines.
const PAUSE: Duration = Duration::from_secs(1);

/// Speaks for all connections.
#[derive(Debug)]
pub(super) struct Herald {
    clock: Clock,
    said: Mutex<Said>,
}

#[derive(Debug, Default)]
struct Said {
    /// Nothing is said before this.
    quiet_until: Tick,
    /// Lines that were not said.
    swallowed: u64,
    /// Connections that are down, and why.
    down: BTreeMap<&'static str, String>,
}

impl Herald {
    pub(super) fn new(clock: Clock) -> Herald {
        Herald { clock, said: Mutex::default() }
    }

    /// Something is wrong.
    pub(super) fn say(&self, connection: &'static str, why: &str) {
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.clock.now();
        if now < said.quiet_until {
            said.swallowed += 1;
            return;
        }
        said.quiet_until = now.plus(PAUSE);
        let unsaid = std::mem::take(&mut said.swallowed);
        warn!(connection, why, unsaid, "redis");
    }

    /// A connection is lost, or could not be made.
    pub(super) fn down(&self, connection: &'static str, why: &str) {
        let news = {
            let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
            said.down.insert(connection, why.to_owned()).is_none_or(|before| before != why)
        };
        if news {
            self.say(connection, why);
        }
    }

    /// A connection is there.
    pub(super) fn up(&self, connection: &'static str) {
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        let was_down = said.down.remove(connection).is_some();
        if was_down && said.down.is_empty() {
            info!("redis answers");
        }
    }

    /// Why a connection is down, if one is.
    pub(super) fn trouble(&self) -> Option<String> {
        let said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        said.down.values().next().cloned()
    }
}
