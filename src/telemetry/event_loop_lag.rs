//! How late the event loop is: a task that wants to wake every so often says how much later it did.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use serde::Serialize;

use crate::policy::millis;

/// The worst of at least so many milliseconds is told.
const WINDOW: u64 = 10_000;

/// Without a beat for so long it stands still.
const STALLED_AFTER: Duration = Duration::from_secs(5);

/// What one task writes and anybody reads.
#[derive(Debug, Default)]
pub struct EventLoopLag {
    last: AtomicU64,
    worst: AtomicU64,
    worst_before: AtomicU64,
    window: AtomicU64,
    /// Of the last beat: milliseconds since the start.
    at: AtomicU64,
}

/// The event loop's delay, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct LagValues {
    /// The last time.
    pub last: u64,
    /// The worst of the last ten to twenty seconds.
    pub worst: u64,
}

impl EventLoopLag {
    /// It woke so late, so long after the start.
    pub fn record(&self, late: Duration, uptime: Duration) {
        self.at.store(millis(uptime), Relaxed);
        let (late, window) = (millis(late), millis(uptime) / WINDOW);
        if self.window.swap(window, Relaxed) != window {
            self.worst_before.store(self.worst.swap(0, Relaxed), Relaxed);
        }
        self.last.store(late, Relaxed);
        self.worst.fetch_max(late, Relaxed);
    }

    /// Does it stand still?
    pub fn is_stalled(&self, uptime: Duration) -> bool {
        millis(uptime).saturating_sub(self.at.load(Relaxed)) > millis(STALLED_AFTER)
    }

    /// How late it is.
    pub fn values(&self) -> LagValues {
        let worst = self.worst.load(Relaxed).max(self.worst_before.load(Relaxed));
        LagValues { last: self.last.load(Relaxed), worst }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_is_forgotten_after_a_while() {
        let pulse = EventLoopLag::default();
        let at = Duration::from_millis;
        pulse.record(at(40), at(1_000));
        pulse.record(at(1), at(1_100));
        assert_eq!(pulse.values(), LagValues { last: 1, worst: 40 });
        pulse.record(at(2), at(11_000));
        assert_eq!(pulse.values(), LagValues { last: 2, worst: 40 });
        pulse.record(at(3), at(21_000));
        assert_eq!(pulse.values(), LagValues { last: 3, worst: 3 });
        assert!(!pulse.is_stalled(at(26_000)) && pulse.is_stalled(at(26_001)));
    }
}
