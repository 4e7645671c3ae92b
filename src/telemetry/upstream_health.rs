//! Passive upstream health, derived from the results of regular requests. No health check is sent.

use std::sync::Mutex;
use std::sync::PoisonError;

use serde::Serialize;

use crate::policy::Tick;
use crate::policy::outcome::Failure;

/// Number of consecutive failures after which an upstream is `down`.
const DOWN_AFTER: u32 = 5;

/// The passive health of one upstream.
#[derive(Debug, Default)]
pub struct PassiveHealth(Mutex<LastResults>);

#[derive(Debug, Default, Clone, Copy)]
struct LastResults {
    ok: Option<Tick>,
    failure: Option<(Tick, &'static str)>,
    in_a_row: u32,
}

/// The change of health caused by the result of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HealthTransition {
    /// No change.
    None,
    /// The first failure after a success.
    Failing,
    /// The first success after a failure.
    Recovered,
}

/// The health of an upstream as reported by `/health`.
#[derive(Debug, Clone, Serialize)]
pub struct UpstreamHealth {
    /// `unknown` before the first request, then `ok`, `failing` or `down`.
    pub status: &'static str,
    /// Consecutive failures since the last success.
    pub failures_in_a_row: u32,
    /// Milliseconds since the last success.
    pub last_ok_ms_ago: Option<u64>,
    /// Milliseconds since the last failure.
    pub last_failure_ms_ago: Option<u64>,
    /// The cause of the last failure.
    pub last_cause: Option<&'static str>,
}

impl PassiveHealth {
    /// Records the result of a request, and returns the change of health.
    pub fn record(&self, failure: Option<Failure>, now: Tick) -> HealthTransition {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let before = last.in_a_row;
        match failure {
            None => {
                last.ok = Some(now);
                last.in_a_row = 0;
            }
            Some(failure) => {
                last.failure = Some((now, failure.cause()));
                // A throttled or an empty response comes from an upstream that is up.
                let is_up = matches!(failure, Failure::Throttled | Failure::Empty);
                last.in_a_row = if is_up { 0 } else { last.in_a_row + 1 };
            }
        }
        match (before, last.in_a_row) {
            (0, 1..) => HealthTransition::Failing,
            (1.., 0) => HealthTransition::Recovered,
            (_, _) => HealthTransition::None,
        }
    }

    /// Returns the health at `now`.
    pub fn state(&self, now: Tick) -> UpstreamHealth {
        let last = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let status = match (last.ok, last.in_a_row) {
            (None, 0) => "unknown",
            (Some(_), 0) => "ok",
            (_, n) if n < DOWN_AFTER => "failing",
            (_, _) => "down",
        };
        UpstreamHealth {
            status,
            failures_in_a_row: last.in_a_row,
            last_ok_ms_ago: last.ok.map(|at| now.since(at)),
            last_failure_ms_ago: last.failure.map(|(at, _)| now.since(at)),
            last_cause: last.failure.map(|(_, cause)| cause),
        }
    }
}
