//! The one retry that is safe, and how long to wait before it.

use std::time::Duration;

use http::Method;

/// How an attempt ended without an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// Nothing of the request can have reached the upstream.
    Unsent,
    /// A connection that had served before died before the first byte of this answer: RFC 9110 §9.2.2,
    /// RFC 9112 §9.3.1.
    ReusedConnectionDied,
    /// Anything else.
    Otherwise,
}

/// The retry policy of an upstream.
#[derive(Debug, Clone, Copy)]
pub struct Retry {
    /// Attempts in all.
    pub attempts: u32,
    /// The pause before the first retry; doubled for each further one.
    pub base: Duration,
    /// The longest pause.
    pub cap: Duration,
}

impl Retry {
    /// The pause before attempt number `made + 1`, or `None` if there must not be one. `jitter` in 0..=1
    /// takes up to half of the pause away.
    pub fn pause(&self, method: &Method, ended: Ended, made: u32, jitter: f64) -> Option<Duration> {
        let safe = match ended {
            Ended::Unsent => true,
            Ended::ReusedConnectionDied => method.is_safe(),
            Ended::Otherwise => false,
        };
        let pause = self.base.saturating_mul(1 << made.saturating_sub(1).min(16)).min(self.cap);
        (safe && made < self.attempts).then(|| pause.mul_f64(1.0 - jitter.clamp(0.0, 1.0) / 2.0))
    }
}

/// How many retries there may be beside first attempts: a tenth of them, and a few to begin with. What fails for all
/// is not asked twice as often.
#[derive(Debug, Clone, Copy)]
pub struct RetryBudget {
    /// In tenths of a retry.
    tenths: u32,
}

/// Retries that can be saved up.
const SAVED: u32 = 10;

impl Default for RetryBudget {
    fn default() -> Self {
        RetryBudget { tenths: SAVED * 10 }
    }
}

impl RetryBudget {
    /// A first attempt is made.
    pub fn deposit(&mut self) {
        self.tenths = (self.tenths + 1).min(SAVED * 10);
    }

    /// May there be a retry?
    pub fn withdraw(&mut self) -> bool {
        let left = self.tenths.checked_sub(10);
        self.tenths = left.unwrap_or(self.tenths);
        left.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retries_are_a_tenth_of_all_in_the_long_run() {
        let mut budget = RetryBudget::default();
        assert_eq!((0..100).filter(|_| budget.withdraw()).count(), 10, "saved up");
        let retries = (0..1000).filter(|_| {
            budget.deposit();
            budget.withdraw()
        });
        assert_eq!(retries.count(), 100);
    }

    #[test]
    fn only_what_is_safe_is_tried_again() {
        let retry = Retry { attempts: 3, base: Duration::from_millis(50), cap: Duration::from_millis(80) };
        let ms = Duration::from_millis;
        let table = [
            (Method::GET, Ended::Unsent, 1, Some(ms(50))),
            (Method::GET, Ended::Unsent, 2, Some(ms(80))),
            (Method::GET, Ended::Unsent, 3, None),
            (Method::POST, Ended::Unsent, 1, Some(ms(50))),
            (Method::GET, Ended::ReusedConnectionDied, 1, Some(ms(50))),
            (Method::POST, Ended::ReusedConnectionDied, 1, None),
            (Method::GET, Ended::Otherwise, 1, None),
        ];
        for (method, ended, made, expected) in table {
            assert_eq!(retry.pause(&method, ended, made, 0.0), expected, "{method} {ended:?} {made}");
        }
        assert_eq!(retry.pause(&Method::GET, Ended::Unsent, 1, 1.0), Some(ms(25)));
    }
}
