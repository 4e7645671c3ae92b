//! Circuit breaker state machine, for an upstream's hosts and for connections to Redis.
//!
//! * **closed**: requests pass; failures are counted;
//! * **open**: requests are refused, until a pause has passed, or until [`CircuitBreaker::reset_open`] where a watcher
//!   notices recovery by itself;
//! * **half-open**: one request passes as a probe, and decides. If its result never arrives, another one passes after
//!   another pause.
//!
//! Which results count as failures is for the caller to decide.

use std::time::Duration;

use crate::policy::Tick;

/// With `failure_ratio`, the breaker also opens when at least this percentage of at least [`RATIO_MIN`] requests failed
/// within [`WINDOW`] slots of a second.
const RATIO_PERCENT: u32 = 50;
const RATIO_MIN: u32 = 20;
const WINDOW: usize = 10;

/// When a breaker opens, and for how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BreakerConfig {
    /// The number of consecutive failures that opens it.
    pub failures: u32,
    /// How long it stays open before a probe.
    pub open_for: Duration,
    /// Whether a high ratio of failures opens it, too.
    pub failure_ratio: bool,
    /// Whether responses with status 5xx count, as a ratio of all.
    pub on_5xx: bool,
}

/// How an open breaker closes again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recovery {
    /// By a probe, after a pause.
    Probe,
    /// By [`CircuitBreaker::reset_open`].
    Reset,
}

/// A circuit breaker.
#[derive(Debug, Clone, Copy, Default)]
pub struct CircuitBreaker {
    state: BreakerState,
    consecutive_failures: u32,
    /// For each slot: the second, and the requests and failures in it.
    slots: [(u64, u32, u32); WINDOW],
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum BreakerState {
    #[default]
    Closed,
    /// Requests are refused until this time; `None`: until the breaker is reset.
    Open {
        until: Option<Tick>,
    },
    HalfOpen {
        until: Tick,
    },
}

impl CircuitBreaker {
    /// Admits a request, or returns the time until the next probe.
    pub fn admit(&mut self, config: &BreakerConfig, now: Tick) -> Result<(), Duration> {
        if let Some(wait) = self.refuses_for(config, now) {
            return Err(wait);
        }
        if self.state != BreakerState::Closed {
            self.state = BreakerState::HalfOpen { until: now.plus(config.open_for) };
        }
        Ok(())
    }

    /// Returns the time until the next probe, if requests are refused now. `open_for` if that is not known.
    pub fn refuses_for(&self, config: &BreakerConfig, now: Tick) -> Option<Duration> {
        match self.state {
            BreakerState::Open { until: None } => Some(config.open_for),
            BreakerState::Open { until: Some(until) } | BreakerState::HalfOpen { until } if now < until => {
                Some(Duration::from_millis(until.since(now)))
            }
            BreakerState::Closed | BreakerState::Open { .. } | BreakerState::HalfOpen { .. } => None,
        }
    }

    /// Counts a success. Returns true if that closed the breaker.
    pub fn succeeded(&mut self, now: Tick) -> bool {
        self.count(now, 0);
        match self.state {
            BreakerState::Closed => {
                self.consecutive_failures = 0;
                false
            }
            // The request was sent before the breaker opened.
            BreakerState::Open { .. } => false,
            BreakerState::HalfOpen { .. } => {
                *self = CircuitBreaker::default();
                true
            }
        }
    }

    /// Counts a response that means failure: it opens the breaker as a ratio of all, not by itself. Returns true if that
    /// opened it.
    pub fn failed_by_answer(&mut self, config: &BreakerConfig, now: Tick) -> bool {
        self.count(now, 1);
        let until = Some(now.plus(config.open_for));
        match self.state {
            BreakerState::Closed if self.exceeds_ratio(now) => {
                self.state = BreakerState::Open { until };
                true
            }
            BreakerState::Closed | BreakerState::Open { .. } => false,
            BreakerState::HalfOpen { .. } => {
                self.state = BreakerState::Open { until };
                false
            }
        }
    }

    /// Counts a failure after which the breaker closes by a probe. Returns true if that opened it.
    pub fn failed(&mut self, config: &BreakerConfig, now: Tick) -> bool {
        self.failed_with(config, Recovery::Probe, now)
    }

    /// Counts a failure. Returns true if that opened the breaker.
    pub fn failed_with(&mut self, config: &BreakerConfig, recovery: Recovery, now: Tick) -> bool {
        self.count(now, 1);
        self.consecutive_failures = self.consecutive_failures.saturating_add(1);
        let until = match recovery {
            Recovery::Probe => Some(now.plus(config.open_for)),
            Recovery::Reset => None,
        };
        let too_many =
            self.consecutive_failures >= config.failures || config.failure_ratio && self.exceeds_ratio(now);
        match self.state {
            BreakerState::Closed if too_many => {
                self.state = BreakerState::Open { until };
                true
            }
            BreakerState::Closed | BreakerState::Open { .. } => false,
            BreakerState::HalfOpen { .. } => {
                self.state = BreakerState::Open { until };
                false
            }
        }
    }

    /// Opens the breaker until it is reset. Returns true if it was closed.
    pub fn open_until_reset(&mut self) -> bool {
        let was_closed = self.is_closed();
        self.state = BreakerState::Open { until: None };
        self.consecutive_failures = self.consecutive_failures.max(1);
        was_closed
    }

    /// Closes the breaker, whatever its state is.
    pub fn reset(&mut self) {
        *self = CircuitBreaker::default();
    }

    /// Closes the breaker if it is open until it is reset.
    pub fn reset_open(&mut self) {
        if self.state == (BreakerState::Open { until: None }) {
            self.reset();
        }
    }

    /// Returns true if requests pass.
    pub fn is_closed(&self) -> bool {
        self.state == BreakerState::Closed
    }

    /// Returns true if nothing has failed since the last success.
    pub fn has_no_failures(&self) -> bool {
        self.consecutive_failures == 0
    }

    /// Returns `closed`, `open` or `half-open`.
    pub fn name(&self) -> &'static str {
        match self.state {
            BreakerState::Closed => "closed",
            BreakerState::Open { .. } => "open",
            BreakerState::HalfOpen { .. } => "half-open",
        }
    }

    fn count(&mut self, now: Tick, failures: u32) {
        let second = now.0 / 1000;
        let Some(slot) = self.slots.get_mut(usize::try_from(second % WINDOW as u64).unwrap_or(0)) else { return };
        if slot.0 != second {
            *slot = (second, 0, 0);
        }
        slot.1 = slot.1.saturating_add(1);
        slot.2 = slot.2.saturating_add(failures);
    }

    fn exceeds_ratio(&self, now: Tick) -> bool {
        let oldest = (now.0 / 1000).saturating_sub(WINDOW as u64 - 1);
        let recent = self.slots.iter().filter(|(second, ..)| *second >= oldest);
        let (all, failed) = recent.fold((0, 0), |(all, failed), slot| (all + slot.1, failed + slot.2));
        all >= RATIO_MIN && failed * 100 >= all * RATIO_PERCENT
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: BreakerConfig =
        BreakerConfig { failures: 5, open_for: Duration::from_secs(5), failure_ratio: true, on_5xx: true };
    const NOW: Tick = Tick(1_000_000);

    fn later(seconds: u64) -> Tick {
        NOW.plus(Duration::from_secs(seconds))
    }

    #[test]
    fn breaker_opens_after_five_consecutive_failures_and_one_probe_decides() {
        let mut breaker = CircuitBreaker::default();
        for n in 1..=5 {
            assert_eq!(breaker.admit(&CONFIG, NOW), Ok(()));
            assert_eq!(breaker.failed(&CONFIG, NOW), n == 5);
        }
        assert_eq!(breaker.admit(&CONFIG, later(2)), Err(Duration::from_secs(3)));
        assert!(!breaker.succeeded(later(2)), "a response to a request from before");
        assert_eq!((breaker.admit(&CONFIG, later(5)), breaker.name()), (Ok(()), "half-open"));
        assert!(breaker.admit(&CONFIG, later(5)).is_err(), "one probe");
        assert!(!breaker.failed(&CONFIG, later(6)));
        assert_eq!(breaker.name(), "open");
        assert_eq!(breaker.admit(&CONFIG, later(11)), Ok(()));
        assert_eq!(breaker.admit(&CONFIG, later(16)), Ok(()), "the result of the first probe never arrived");
        assert!(breaker.succeeded(later(16)));
        assert_eq!((breaker.admit(&CONFIG, later(16)), breaker.name()), (Ok(()), "closed"));
    }

    #[test]
    fn breaker_opens_at_a_failure_ratio_of_half_of_many_recent_requests() {
        let mut breaker = CircuitBreaker::default();
        for n in 0..10 {
            breaker.succeeded(NOW);
            assert!(!breaker.failed(&CONFIG, NOW) || n == 9, "{n}");
        }
        assert_eq!(breaker.name(), "open");
        let mut breaker = CircuitBreaker::default();
        for n in 0..20 {
            breaker.succeeded(later(n * 2));
            assert!(!breaker.failed(&CONFIG, later(n * 2)), "{n}: only ten within ten seconds");
        }
    }

    #[test]
    fn answers_that_mean_failure_open_the_breaker_as_a_ratio_only() {
        let mut breaker = CircuitBreaker::default();
        for n in 1..=20 {
            assert_eq!(breaker.failed_by_answer(&CONFIG, NOW), n == 20, "{n}");
        }
        assert_eq!(breaker.admit(&CONFIG, later(5)), Ok(()));
        assert!(!breaker.failed_by_answer(&CONFIG, later(5)) && breaker.name() == "open");
        assert_eq!(breaker.admit(&CONFIG, later(10)), Ok(()));
        assert!(breaker.succeeded(later(10)));
    }

    #[test]
    fn success_between_failures_keeps_the_breaker_closed() {
        let mut breaker = CircuitBreaker::default();
        for _ in 0..4 {
            assert!(!breaker.failed_with(&CONFIG, Recovery::Reset, NOW) && breaker.admit(&CONFIG, NOW).is_ok());
        }
        breaker.reset();
        assert!(breaker.has_no_failures());
        for _ in 0..4 {
            assert!(!breaker.failed_with(&CONFIG, Recovery::Reset, NOW));
        }
        assert!(breaker.failed_with(&CONFIG, Recovery::Reset, NOW), "the fifth");
    }

    #[test]
    fn breaker_that_waits_for_a_reset_does_not_close_by_time() {
        let mut breaker = CircuitBreaker::default();
        assert!(breaker.open_until_reset() && !breaker.open_until_reset());
        assert!(breaker.admit(&CONFIG, later(3600)).is_err());
        assert!(!breaker.failed_with(&CONFIG, Recovery::Reset, NOW), "it is open already");
        breaker.reset_open();
        assert!(breaker.admit(&CONFIG, NOW).is_ok() && breaker.is_closed());
    }

    #[test]
    fn reset_of_an_answering_server_does_not_close_a_breaker_opened_by_errors() {
        let mut breaker = CircuitBreaker::default();
        for _ in 0..5 {
            breaker.failed_with(&CONFIG, Recovery::Probe, NOW);
        }
        breaker.reset_open();
        assert!(breaker.admit(&CONFIG, NOW).is_err());
        assert!(breaker.refuses_for(&CONFIG, NOW).is_some() && breaker.refuses_for(&CONFIG, later(5)).is_none());
        assert!(breaker.admit(&CONFIG, later(5)).is_ok() && breaker.admit(&CONFIG, later(5)).is_err(), "one");
        breaker.failed_with(&CONFIG, Recovery::Probe, later(5));
        assert!(breaker.admit(&CONFIG, later(5)).is_err());
        assert!(breaker.admit(&CONFIG, later(10)).is_ok());
        breaker.reset();
        assert!(breaker.admit(&CONFIG, later(10)).is_ok() && breaker.admit(&CONFIG, later(10)).is_ok());
    }
}
