//! The only reader of the clocks. Everything else takes a [`Tick`] or a wall time as an argument.
//!
//! What a fleet shares is dated by one clock: that of the server it lies on ([`FleetClock`]). So neither the skew nor a
//! jump of anybody's own wall clock matters.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use crate::policy::{Tick, millis};

/// The tick at which a process starts: so far from 0 that everything stored has a tick, whenever it was born.
const START: u64 = 100 * 365 * 24 * 3_600_000;

/// Tells the time; the real one, or one that a test turns by hand.
#[derive(Debug, Clone)]
pub struct Clock {
    start: Instant,
    /// Milliseconds added by hand. Frozen for the real clock at zero.
    turned: Arc<AtomicU64>,
}

impl Clock {
    /// A clock that starts now.
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
        Tick(START + millis(at.saturating_duration_since(self.start)) + self.turned.load(Ordering::Relaxed))
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

    /// How long it has been running.
    pub fn uptime(&self) -> Duration {
        self.instant().saturating_duration_since(self.start)
    }

    /// Turns the clock forward, for all its clones.
    pub fn turn(&self, by: Duration) {
        self.turned.fetch_add(millis(by), Ordering::Relaxed);
    }
}

/// The clock of the server that a fleet shares, as far as it is known here: milliseconds since the epoch.
#[derive(Debug)]
pub struct FleetClock {
    clock: Clock,
    /// What is to be added to a tick; 0 while nothing is known.
    ahead: AtomicI64,
}

impl FleetClock {
    /// Nothing is known yet.
    pub fn new(clock: Clock) -> FleetClock {
        FleetClock { clock, ahead: AtomicI64::new(0) }
    }

    /// The server says that it is now this.
    pub fn set(&self, server: u64) {
        let here = self.clock.now().0 - self.clock.turned.load(Ordering::Relaxed);
        self.ahead.store(server.cast_signed() - here.cast_signed(), Ordering::Relaxed);
    }

    /// The fleet's time now; none while nothing is known.
    pub fn now(&self) -> Option<u64> {
        self.at(self.clock.now())
    }

    /// The fleet's time at a tick of ours; none while nothing is known.
    pub fn at(&self, tick: Tick) -> Option<u64> {
        let ahead = self.ahead.load(Ordering::Relaxed);
        (ahead != 0).then(|| tick.0.saturating_add_signed(ahead))
    }

    /// Our tick at a time of the fleet; none while nothing is known.
    pub fn tick(&self, time: u64) -> Option<Tick> {
        let ahead = self.ahead.load(Ordering::Relaxed);
        (ahead != 0).then(|| Tick(time.saturating_add_signed(-ahead)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fleet_clock_translates_both_ways_and_before_our_start() {
        let clock = Clock::start();
        let fleet = FleetClock::new(clock.clone());
        assert_eq!(fleet.at(clock.now()), None);
        fleet.set(1_763_700_000_000);
        let a_day_ago = fleet.tick(1_763_700_000_000 - 86_400_000).expect("known");
        assert!(clock.now().since(a_day_ago) >= 86_400_000);
        assert_eq!(fleet.at(a_day_ago), Some(1_763_700_000_000 - 86_400_000));
        clock.turn(Duration::from_hours(1));
        fleet.set(1_763_700_000_000);
        assert!(
            fleet.at(clock.now()).is_some_and(|now| now >= 1_763_700_000_000 + 3_600_000),
            "turned by hand stays"
        );
    }
}
