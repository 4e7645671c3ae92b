//! When to stop asking. States:
//!
//! * **closed**: everything is asked; failures in a row are counted;
//! * **silent**: there was no answer in time, so often that nobody should wait for one. Whoever watches the
//!   connection closes it again, as soon as anything is answered;
//! * **refusing**: it answers, with errors. Nothing is asked for a pause; then one request tries, and decides.

use std::time::Duration;

use super::Tick;

/// So many failures in a row open it.
const FAILURES: u32 = 5;

/// How long nothing is asked of something that answers with errors.
const PAUSE: Duration = Duration::from_secs(1);

/// How a request failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// No answer in time, or no connection.
    Silence,
    /// An error was the answer.
    Refusal,
}

/// The breaker.
#[derive(Debug, Clone, Copy, Default)]
pub struct Breaker {
    failures: u32,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum State {
    #[default]
    Closed,
    Silent,
    Refusing {
        until: Tick,
    },
}

impl Breaker {
    /// May something be asked now? Whoever is let through a pause's end is alone for the next pause.
    pub fn admits(&mut self, now: Tick) -> bool {
        match &mut self.state {
            State::Closed => true,
            State::Silent => false,
            State::Refusing { until } if now < *until => false,
            State::Refusing { until } => {
                *until = now.plus(PAUSE);
                true
            }
        }
    }

    /// Would something be let through now?
    pub fn would_admit(&self, now: Tick) -> bool {
        match self.state {
            State::Closed => true,
            State::Silent => false,
            State::Refusing { until } => now >= until,
        }
    }

    /// It answered.
    pub fn succeeded(&mut self) {
        *self = Breaker::default();
    }

    /// It did not, or with an error. True if that opened it.
    pub fn failed(&mut self, fault: Fault, now: Tick) -> bool {
        self.failures = self.failures.saturating_add(1);
        let was_closed = self.state == State::Closed;
        if self.failures >= FAILURES {
            self.state = match fault {
                Fault::Silence => State::Silent,
                Fault::Refusal => State::Refusing { until: now.plus(PAUSE) },
            };
        }
        was_closed && self.is_open()
    }

    /// Whoever watches knows that there is no answer to be had. True if that opened it.
    pub fn trip(&mut self) -> bool {
        let was_closed = self.state == State::Closed;
        self.failures = self.failures.max(FAILURES);
        self.state = State::Silent;
        was_closed
    }

    /// It was found to answer: silence is over. Errors have to end by themselves.
    pub fn heard(&mut self) {
        if self.state == State::Silent {
            *self = Breaker::default();
        }
    }

    /// Has nothing failed since the last success?
    pub fn is_calm(&self) -> bool {
        self.failures == 0
    }

    /// Is nothing asked, or hardly anything?
    pub fn is_open(&self) -> bool {
        self.state != State::Closed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Tick = Tick(1_000);

    #[test]
    fn five_in_a_row_open_it_and_a_success_between_does_not() {
        let mut breaker = Breaker::default();
        for _ in 0..4 {
            assert!(!breaker.failed(Fault::Silence, NOW) && breaker.admits(NOW));
        }
        breaker.succeeded();
        for _ in 0..4 {
            assert!(!breaker.failed(Fault::Silence, NOW));
        }
        assert!(breaker.failed(Fault::Silence, NOW), "the fifth");
        assert!(!breaker.admits(NOW.plus(Duration::from_hours(1))), "time alone does not close it");
        assert!(!breaker.failed(Fault::Silence, NOW), "it is open already");
        breaker.heard();
        assert!(breaker.admits(NOW) && !breaker.is_open());
    }

    #[test]
    fn errors_are_tried_again_once_a_pause() {
        let mut breaker = Breaker::default();
        for _ in 0..5 {
            breaker.failed(Fault::Refusal, NOW);
        }
        breaker.heard();
        assert!(!breaker.admits(NOW), "that it answers is no news");
        let later = NOW.plus(PAUSE);
        assert!(!breaker.would_admit(NOW) && breaker.would_admit(later));
        assert!(breaker.admits(later) && !breaker.admits(later), "one");
        breaker.failed(Fault::Refusal, later);
        assert!(!breaker.admits(later));
        let again = later.plus(PAUSE);
        assert!(breaker.admits(again));
        breaker.succeeded();
        assert!(breaker.admits(again) && breaker.admits(again));
    }

    #[test]
    fn a_watcher_can_open_it_at_once() {
        let mut breaker = Breaker::default();
        assert!(breaker.trip() && !breaker.trip());
        assert!(breaker.is_open());
    }
}
