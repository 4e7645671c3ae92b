//! Caching policy: the decisions of a shared HTTP cache, as pure functions and plain data.
//!
//! This module reads no clock, opens no socket, spawns no task and generates no random number. Time is an
//! argument ([`Tick`]), bodies are complete bytes, and every decision returns the next action together with
//! the data that the action needs.

pub mod body_inspection;
pub mod client_limits;
pub mod entry;
pub mod explain_text;
pub mod http;
pub mod invalidation;
pub mod mode;
pub mod outcome;
pub mod outcome_counters;
pub mod packed_head;
pub mod rejection;
pub mod resilience;
pub mod routing;

use std::time::Duration;

/// A point in time: milliseconds on a monotonic clock whose zero is the start of this process.
///
/// Entries in memory carry ticks rather than wall time, so a jump of the wall clock can't make an old entry fresh.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Tick(pub u64);

impl Tick {
    /// Returns the milliseconds from `earlier` to `self`, 0 if `earlier` is later.
    pub fn since(self, earlier: Tick) -> u64 {
        self.0.saturating_sub(earlier.0)
    }

    /// Returns the tick `duration` after this one, saturating.
    #[must_use]
    pub fn plus(self, duration: Duration) -> Tick {
        Tick(self.0.saturating_add(millis(duration)))
    }
}

/// Converts a duration to whole milliseconds, saturating.
pub fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
pub(crate) mod testing {
    //! Helpers of the tests that compare encodings.

    use std::fmt::Write as _;

    /// Returns the bytes in lowercase hexadecimal.
    pub(crate) fn hex(bytes: &[u8]) -> String {
        bytes.iter().fold(String::new(), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        })
    }
}
