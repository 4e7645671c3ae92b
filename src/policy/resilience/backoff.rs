//! The pause of a key after a failed fetch: while it lasts, what can stand in is served without asking the upstream.
//!
//! The pause is the upstream's `Retry-After`, or grows exponentially with each failure (RFC 9110 §10.2.3 asks for the
//! former). At its end one request is let through as a probe. A failing key does not pause others: a failing host is the
//! circuit breaker's.

use std::time::Duration;

use super::failure::Failure;
use crate::policy::Tick;

/// The longest `Retry-After` that is obeyed.
const MAX_RETRY_AFTER: Duration = Duration::from_hours(1);

/// Time for which a probe keeps others waiting for its result.
const PROBE_TIME: Duration = Duration::from_secs(10);

/// The lengths of pauses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FailureBackoff {
    /// The pause after the first failure; doubled for each further one.
    pub base: Duration,
    /// The longest pause, unless the upstream asks for more.
    pub cap: Duration,
}

/// A failure to be recorded.
#[derive(Debug, Clone, Copy)]
pub struct FailedFetch {
    /// How the fetch failed.
    pub failure: Failure,
    /// The upstream's `Retry-After`, if it sent one.
    pub retry_after: Option<Duration>,
    /// A random number in 0..=1, which shortens the pause by up to half.
    pub jitter: f64,
}

/// The state of a key whose last fetch failed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FailedKey {
    /// How the last fetch failed.
    pub failure: Failure,
    failures: u32,
    until: Tick,
}

impl FailedKey {
    /// Returns the state after a failure. `before`: the state until now. Failures of requests that were sent before the
    /// pause began do not lengthen it.
    pub fn after(before: Option<FailedKey>, failed: FailedFetch, backoff: &FailureBackoff, now: Tick) -> FailedKey {
        let FailedFetch { failure, retry_after, jitter } = failed;
        let before = before.map_or((0, Tick(0)), |before| (before.failures, before.until));
        let asked = retry_after.map(|wait| now.plus(wait.min(MAX_RETRY_AFTER)));
        let failures = before.0.saturating_add(1);
        let pause = backoff.base.saturating_mul(1 << (failures - 1).min(16)).min(backoff.cap);
        let until = asked.unwrap_or_else(|| now.plus(pause.mul_f64(1.0 - jitter.clamp(0.0, 1.0) / 2.0)));
        FailedKey { failure, failures, until }
    }

    /// Returns the time until the next probe. `None` if a request may be sent now.
    pub fn paused_for(&self, now: Tick) -> Option<Duration> {
        (now < self.until).then(|| Duration::from_millis(self.until.since(now)))
    }

    /// Returns the state while a probe that is sent now is under way: others do not send one.
    #[must_use]
    pub fn probed(self, now: Tick) -> FailedKey {
        FailedKey { until: now.plus(PROBE_TIME), ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BACKOFF: FailureBackoff = FailureBackoff { base: Duration::from_secs(1), cap: Duration::from_mins(1) };

    fn failed(retry_after: Option<u64>) -> FailedFetch {
        FailedFetch { failure: Failure::Timeout, retry_after: retry_after.map(Duration::from_secs), jitter: 0.0 }
    }

    #[test]
    fn pause_doubles_from_the_base_to_the_cap() {
        let (mut key, mut now) = (None, Tick(1_000));
        for seconds in [1, 2, 4, 8, 16, 32, 60, 60] {
            let next = FailedKey::after(key, failed(None), &BACKOFF, now);
            assert_eq!(next.paused_for(now), Some(Duration::from_secs(seconds)));
            now = now.plus(Duration::from_secs(seconds));
            assert_eq!(next.paused_for(now), None);
            key = Some(next);
        }
        let jittered = FailedKey::after(None, FailedFetch { jitter: 1.0, ..failed(None) }, &BACKOFF, now);
        assert_eq!(jittered.paused_for(now), Some(Duration::from_millis(500)));
    }

    #[test]
    fn retry_after_of_the_upstream_is_the_pause() {
        let now = Tick(1_000);
        for (asked, paused) in [(0, None), (30, Some(30)), (300, Some(300)), (86_400, Some(3_600))] {
            let key = FailedKey::after(None, failed(Some(asked)), &BACKOFF, now);
            assert_eq!(key.paused_for(now), paused.map(Duration::from_secs), "{asked}");
        }
    }

    #[test]
    fn probe_keeps_others_from_sending() {
        let now = Tick(1_000);
        let key = FailedKey::after(None, failed(None), &BACKOFF, now);
        let later = now.plus(Duration::from_secs(1));
        assert_eq!(key.paused_for(later), None);
        assert!(key.probed(later).paused_for(later).is_some());
        assert_eq!(key.probed(later).paused_for(later.plus(PROBE_TIME)), None, "its result never arrived");
    }
}
