//! How late the event loop is: a task that wants to wake every so often says how much later it did.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use serde::Serialize;

use crate::policy::{Tick, millis};

/// The worst of at least so many milliseconds is told.
const WINDOW: u64 = 10_000;

/// What one task writes and anybody reads.
#[derive(Debug, Default)]
pub struct Pulse {
    last: AtomicU64,
    worst: AtomicU64,
    worst_before: AtomicU64,
    window: AtomicU64,
}

/// The event loop's delay, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Delay {
    /// The last time.
    pub last: u64,
    /// The worst of the last ten to twenty seconds.
    pub worst: u64,
}

impl Pulse {
    /// It woke so late.
    pub fn beat(&self, late: Duration, now: Tick) {
        let (late, window) = (millis(late), now.0 / WINDOW);
        if self.window.swap(window, Relaxed) != window {
            self.worst_before.store(self.worst.swap(0, Relaxed), Relaxed);
        }
        self.last.store(late, Relaxed);
        self.worst.fetch_max(late, Relaxed);
    }

    /// How late it is.
    pub fn delay(&self) -> Delay {
        let worst = self.worst.load(Relaxed).max(self.worst_before.load(Relaxed));
        Delay { last: self.last.load(Relaxed), worst }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_is_forgotten_after_a_while() {
        let pulse = Pulse::default();
        pulse.beat(Duration::from_millis(40), Tick(1_000));
        pulse.beat(Duration::from_millis(1), Tick(1_100));
        assert_eq!(pulse.delay(), Delay { last: 1, worst: 40 });
        pulse.beat(Duration::from_millis(2), Tick(11_000));
        assert_eq!(pulse.delay(), Delay { last: 2, worst: 40 });
        pulse.beat(Duration::from_millis(3), Tick(21_000));
        assert_eq!(pulse.delay(), Delay { last: 3, worst: 3 });
    }
}
