//! The only reader of the clocks. Everything else takes a [`Tick`] or a wall time as an argument.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use crate::policy::{Tick, millis};

/// Tells the time; the real one, or one that a test turns by hand.
#[derive(Debug, Clone)]
pub struct Clock {
    start: Instant,
    /// Milliseconds added by hand. Frozen for the real clock at zero.
    turned: Arc<AtomicU64>,
}

impl Clock {
    /// A clock whose tick 0 is now.
    #[allow(clippy::disallowed_methods)] // this is the place
    pub fn start() -> Clock {
        Clock { start: Instant::now(), turned: Arc::default() }
    }

    /// The current instant: for measuring how long something takes.
    #[allow(clippy::disallowed_methods)]
    pub fn instant(&self) -> Instant {
        Instant::now()
    }

    /// The tick of an instant.
    pub fn tick(&self, at: Instant) -> Tick {
        Tick(millis(at.saturating_duration_since(self.start)) + self.turned.load(Ordering::Relaxed))
    }

    /// The tick of now.
    pub fn now(&self) -> Tick {
        self.tick(self.instant())
    }

    /// The wall time, for `Date`, `Age` and `Expires` of answers that arrive.
    #[allow(clippy::disallowed_methods)]
    pub fn wall(&self) -> SystemTime {
        SystemTime::now() + Duration::from_millis(self.turned.load(Ordering::Relaxed))
    }

    /// Turns the clock forward, for all its clones.
    pub fn turn(&self, by: Duration) {
        self.turned.fetch_add(millis(by), Ordering::Relaxed);
    }
}
