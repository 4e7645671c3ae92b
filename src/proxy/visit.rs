//! One request's stay: when it began, the time that every decision about it uses, and what it is after.

use std::sync::Arc;
use std::time::{Duration, Instant};

use http::request::Parts;

use super::lookup::Miss;
use super::site::Place;
use crate::clock::Clock;
use crate::policy::Tick;
use crate::policy::key::KeyBuf;
use crate::policy::plan::Plan;

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

/// One request on its way to an answer from upstream.
#[derive(Debug)]
pub(super) struct Quest<'a> {
    pub(super) asked: Arc<Parts>,
    pub(super) place: &'a Place,
    pub(super) plan: &'a Arc<Plan>,
    pub(super) key: KeyBuf,
    pub(super) miss: Miss,
    pub(super) visit: &'a Visit,
}
