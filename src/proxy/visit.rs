//! One request's stay: when it began, and the time that every decision about it uses.

use std::time::{Duration, Instant};

use crate::clock::Clock;
use crate::policy::Tick;

/// Sampled once, when the request came.
#[derive(Debug, Clone)]
pub struct Visit {
    clock: Clock,
    /// When it began.
    pub begun: Instant,
    /// The time for all verdicts.
    pub now: Tick,
}

impl Visit {
    /// Begins now.
    pub fn begin(clock: &Clock) -> Visit {
        let begun = clock.instant();
        Visit { clock: clock.clone(), begun, now: clock.tick(begun) }
    }

    /// How long it has lasted.
    pub fn elapsed(&self) -> Duration {
        self.clock.instant().saturating_duration_since(self.begun)
    }

    /// The time after waiting.
    pub fn later(&self) -> Tick {
        self.clock.now()
    }
}
