//! What is right: the decisions of a shared HTTP cache, as pure functions and plain data.
//!
//! Nothing in here reads a clock, opens a socket, spawns a task or draws a random number. Time is an
//! argument ([`Tick`]), bodies are complete bytes, and every decision returns the next action together with
//! what that action needs.

pub mod advice;
pub mod asked;
pub mod breaker;
pub mod chain;
pub mod circuit;
pub mod date;
pub mod directives;
pub mod entry;
pub mod failure;
pub mod freshness;
pub mod glob;
pub mod head;
pub mod headers;
pub mod inspect;
pub mod invalidation;
pub mod key;
pub mod links;
pub mod lists;
pub mod mode;
pub mod outcome;
pub mod partial;
pub mod plan;
pub mod quota;
pub mod ranges;
pub mod retry;
pub mod revalidate;
pub mod route;
pub mod storage;
pub mod tags;
pub mod tally;
pub mod target;
pub mod targeted;
pub mod variant;

use std::time::Duration;

/// A point in time: milliseconds on a monotonic clock whose zero is the start of this process.
///
/// What is stored in memory is dated with it, so a jump of the wall clock can't make old things fresh.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Tick(pub u64);

impl Tick {
    /// Milliseconds from `earlier` to `self`, 0 if `earlier` is later.
    pub fn since(self, earlier: Tick) -> u64 {
        self.0.saturating_sub(earlier.0)
    }

    /// The tick `duration` after this one.
    #[must_use]
    pub fn plus(self, duration: Duration) -> Tick {
        Tick(self.0.saturating_add(millis(duration)))
    }
}

/// A duration in whole milliseconds, saturating.
pub fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
