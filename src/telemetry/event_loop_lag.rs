//! Event loop lag: a periodic task measures how late it is woken.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use serde::Serialize;

use crate::policy::millis;

/// Window of the reported maximum, in milliseconds: it covers one to two windows.
const WINDOW: u64 = 10_000;

/// Time without a measurement after which the event loop is considered stalled.
const STALLED_AFTER: Duration = Duration::from_secs(5);

/// The lag of the event loop, written by one task and read by any.
#[derive(Debug, Default)]
pub struct EventLoopLag {
    last: AtomicU64,
    worst: AtomicU64,
    worst_before: AtomicU64,
    window: AtomicU64,
    /// When the last measurement was made, in milliseconds since the start.
    at: AtomicU64,
}

/// The lag of the event loop, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct LagValues {
    /// The last measurement.
    pub last: u64,
    /// The maximum of the last 10 to 20 seconds.
    pub worst: u64,
}

impl EventLoopLag {
    /// Records that the task was woken `late`, at `uptime` after the start.
    pub fn record(&self, late: Duration, uptime: Duration) {
        self.at.store(millis(uptime), Relaxed);
        let (late, window) = (millis(late), millis(uptime) / WINDOW);
        if self.window.swap(window, Relaxed) != window {
            self.worst_before.store(self.worst.swap(0, Relaxed), Relaxed);
        }
        self.last.store(late, Relaxed);
        self.worst.fetch_max(late, Relaxed);
    }

    /// Returns true if the last measurement is too old: the event loop is stalled.
    pub fn is_stalled(&self, uptime: Duration) -> bool {
        millis(uptime).saturating_sub(self.at.load(Relaxed)) > millis(STALLED_AFTER)
    }

    /// Returns the last and the maximum lag.
    pub fn values(&self) -> LagValues {
        let worst = self.worst.load(Relaxed).max(self.worst_before.load(Relaxed));
        LagValues { last: self.last.load(Relaxed), worst }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn worst_lag_expires_after_two_windows_and_silence_means_stalled() {
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
