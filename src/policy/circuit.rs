//! The breaker before an upstream host. Only what says that nobody is there counts: connections refused or timed
//! out, and answers that did not begin in time. States:
//!
//! * **closed**: everything goes through;
//! * **open**: nothing does, until a pause has passed;
//! * **half-open**: one request tries, and decides. Should nobody hear of it again, another one may after a pause.

use std::time::Duration;

use super::Tick;

/// It opens too when at least this part of at least so many requests failed within [`WINDOW`] slots of a second.
const SHARE: u32 = 50;
const LEAST: u32 = 20;
const WINDOW: usize = 10;

/// When it opens, and for how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tolerance {
    /// Failures in a row.
    pub failures: u32,
    /// The pause.
    pub open_for: Duration,
}

/// The breaker of one host.
#[derive(Debug, Clone, Copy, Default)]
pub struct Circuit {
    state: State,
    in_a_row: u32,
    /// Requests and failures, by second.
    slots: [(u64, u32, u32); WINDOW],
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum State {
    #[default]
    Closed,
    Open {
        until: Tick,
    },
    HalfOpen {
        until: Tick,
    },
}

impl Circuit {
    /// May a request go through? If not: when the next one may try.
    pub fn admits(&mut self, tolerance: Tolerance, now: Tick) -> Result<(), Duration> {
        if let Some(wait) = self.opens_in(now) {
            return Err(wait);
        }
        if self.state != State::Closed {
            self.state = State::HalfOpen { until: now.plus(tolerance.open_for) };
        }
        Ok(())
    }

    /// When the next request may try, if none may now.
    pub fn opens_in(&self, now: Tick) -> Option<Duration> {
        match self.state {
            State::Open { until } | State::HalfOpen { until } if now < until => {
                Some(Duration::from_millis(until.since(now)))
            }
            State::Closed | State::Open { .. } | State::HalfOpen { .. } => None,
        }
    }

    /// Somebody was there. True if that closed it.
    pub fn succeeded(&mut self, now: Tick) -> bool {
        self.count(now, 0);
        match self.state {
            State::Closed => {
                self.in_a_row = 0;
                false
            }
            // From before it opened.
            State::Open { .. } => false,
            State::HalfOpen { .. } => {
                *self = Circuit::default();
                true
            }
        }
    }

    /// Nobody was there. True if that opened it.
    pub fn failed(&mut self, tolerance: Tolerance, now: Tick) -> bool {
        self.count(now, 1);
        self.in_a_row = self.in_a_row.saturating_add(1);
        let until = now.plus(tolerance.open_for);
        match self.state {
            State::Closed if self.in_a_row >= tolerance.failures || self.too_many(now) => {
                self.state = State::Open { until };
                true
            }
            State::Closed | State::Open { .. } => false,
            State::HalfOpen { .. } => {
                self.state = State::Open { until };
                false
            }
        }
    }

    /// `closed`, `open` or `half-open`.
    pub fn name(&self) -> &'static str {
        match self.state {
            State::Closed => "closed",
            State::Open { .. } => "open",
            State::HalfOpen { .. } => "half-open",
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

    fn too_many(&self, now: Tick) -> bool {
        let oldest = (now.0 / 1000).saturating_sub(WINDOW as u64 - 1);
        let recent = self.slots.iter().filter(|(second, ..)| *second >= oldest);
        let (all, failed) = recent.fold((0, 0), |(all, failed), slot| (all + slot.1, failed + slot.2));
        all >= LEAST && failed * 100 >= all * SHARE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOLERANCE: Tolerance = Tolerance { failures: 5, open_for: Duration::from_secs(5) };
    const NOW: Tick = Tick(1_000_000);

    fn later(seconds: u64) -> Tick {
        NOW.plus(Duration::from_secs(seconds))
    }

    #[test]
    fn five_in_a_row_open_it_and_one_probe_decides() {
        let mut circuit = Circuit::default();
        for n in 1..=5 {
            assert_eq!(circuit.admits(TOLERANCE, NOW), Ok(()));
            assert_eq!(circuit.failed(TOLERANCE, NOW), n == 5);
        }
        assert_eq!(circuit.admits(TOLERANCE, later(2)), Err(Duration::from_secs(3)));
        assert!(!circuit.succeeded(later(2)), "an answer from before");
        assert_eq!((circuit.admits(TOLERANCE, later(5)), circuit.name()), (Ok(()), "half-open"));
        assert!(circuit.admits(TOLERANCE, later(5)).is_err(), "one probe");
        assert!(!circuit.failed(TOLERANCE, later(6)));
        assert_eq!(circuit.name(), "open");
        assert_eq!(circuit.admits(TOLERANCE, later(11)), Ok(()));
        assert_eq!(circuit.admits(TOLERANCE, later(16)), Ok(()), "the first probe was never heard of again");
        assert!(circuit.succeeded(later(16)));
        assert_eq!((circuit.admits(TOLERANCE, later(16)), circuit.name()), (Ok(()), "closed"));
    }

    #[test]
    fn half_of_many_open_it_too_but_not_of_few_or_old_ones() {
        let mut circuit = Circuit::default();
        for n in 0..10 {
            circuit.succeeded(NOW);
            assert!(!circuit.failed(TOLERANCE, NOW) || n == 9, "{n}");
        }
        assert_eq!(circuit.name(), "open");
        let mut circuit = Circuit::default();
        for n in 0..20 {
            circuit.succeeded(later(n * 2));
            assert!(!circuit.failed(TOLERANCE, later(n * 2)), "{n}: only ten within ten seconds");
        }
    }
}
