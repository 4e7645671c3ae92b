//! Upstreams that close connections without notice: after each response, or while they are idle.
//!
//! A request that is sent on such a connection is lost, and a write can't be repeated. So after a connection was found
//! closed, requests go out on fresh connections for a while: longer with each further one, until a connection has served
//! a second request.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

use crate::policy::millis;

/// A connection that is closed within this time after its first response counts.
pub(super) const SOON: Duration = Duration::from_secs(1);

/// Time without reuse after the first closed connection; ten times longer after each further one.
const FIRST_HOLD: Duration = Duration::from_secs(1);

/// The longest time without reuse.
const LONGEST_HOLD: Duration = Duration::from_mins(10);

/// Whether connections to an upstream are reused.
#[derive(Debug)]
pub(super) struct ClosingHabit {
    begun: Instant,
    /// Connections found closed since the last reuse.
    closed: AtomicU32,
    /// Milliseconds after `begun` until which no connection is reused.
    until: AtomicU64,
}

impl ClosingHabit {
    pub(super) fn new() -> ClosingHabit {
        ClosingHabit { begun: Instant::now(), closed: AtomicU32::new(0), until: AtomicU64::new(0) }
    }

    fn now(&self) -> u64 {
        millis(self.begun.elapsed())
    }

    /// Notes a connection that was found closed.
    pub(super) fn found_closed(&self) {
        let before = self.closed.fetch_add(1, Ordering::Relaxed);
        let hold = FIRST_HOLD.saturating_mul(10_u32.saturating_pow(before.min(8))).min(LONGEST_HOLD);
        self.until.fetch_max(self.now() + millis(hold), Ordering::Relaxed);
    }

    /// Notes a connection that has served another request.
    pub(super) fn reused(&self) {
        if self.closed.load(Ordering::Relaxed) > 0 {
            self.closed.store(0, Ordering::Relaxed);
        }
    }

    /// Returns true if requests go out on fresh connections now.
    pub(super) fn holds(&self) -> bool {
        self.until.load(Ordering::Relaxed).checked_sub(1).is_some_and(|until| self.now() <= until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn reuse_is_held_back_longer_with_each_closed_connection() {
        let habit = ClosingHabit::new();
        assert!(!habit.holds());
        for seconds in [1, 10, 100, 600, 600] {
            habit.found_closed();
            assert!(habit.holds());
            tokio::time::advance(Duration::from_millis(seconds * 1000 - 1)).await;
            assert!(habit.holds(), "{seconds}");
            tokio::time::advance(Duration::from_millis(2)).await;
            assert!(!habit.holds(), "{seconds}");
        }
        habit.reused();
        habit.found_closed();
        tokio::time::advance(FIRST_HOLD + Duration::from_millis(1)).await;
        assert!(!habit.holds(), "a connection was reused before");
    }
}
