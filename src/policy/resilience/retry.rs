//! Retry policy: which failed attempts may be retried, the pause before a retry, and the retry budget.

use std::time::Duration;

use http::Method;

/// How an attempt ended without a response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RetrySafety {
    /// Nothing of the request can have reached the upstream.
    Unsent,
    /// The upstream has said that it has not processed the request (RFC 9113 §6.8, §8.7).
    Unprocessed,
    /// A reused connection closed before the first byte of this response (RFC 9110 §9.2.2, RFC 9112 §9.3.1).
    ReusedConnectionDied,
    /// Any other end.
    Otherwise,
}

/// The retry policy of an upstream.
#[derive(Debug, Clone, Copy)]
pub struct RetryPolicy {
    /// The maximum number of attempts, including the first.
    pub attempts: u32,
    /// The pause before the first retry; doubled for each further one.
    pub base: Duration,
    /// The longest pause.
    pub cap: Duration,
}

impl RetrySafety {
    /// Returns true if a repetition does not count against the retry budget: it can't double the load on the upstream,
    /// which has not worked on the request.
    pub fn is_free(self) -> bool {
        matches!(self, RetrySafety::Unprocessed | RetrySafety::ReusedConnectionDied)
    }
}

/// Maximum number of attempts of a request that the upstream has not processed. Many, because an upstream that ends each
/// connection after some requests (nginx: `keepalive_requests`) leaves those of a burst unprocessed again and again.
const MAX_UNPROCESSED: u32 = 100;

impl RetryPolicy {
    /// Returns the pause before attempt number `made + 1`, or `None` if there must not be one. `jitter` in 0..=1
    /// shortens the pause by up to half.
    pub fn pause(&self, method: &Method, ended: RetrySafety, made: u32, jitter: f64) -> Option<Duration> {
        let safe = match ended {
            RetrySafety::Unprocessed => return (made < MAX_UNPROCESSED).then_some(Duration::ZERO),
            RetrySafety::ReusedConnectionDied if made == 1 && self.attempts > 1 && method.is_safe() => {
                return Some(Duration::ZERO);
            }
            RetrySafety::Unsent => true,
            RetrySafety::ReusedConnectionDied => method.is_safe(),
            RetrySafety::Otherwise => false,
        };
        let pause = self.base.saturating_mul(1 << made.saturating_sub(1).min(16)).min(self.cap);
        (safe && made < self.attempts).then(|| pause.mul_f64(1.0 - jitter.clamp(0.0, 1.0) / 2.0))
    }
}

/// The retry budget: a tenth of the number of first attempts, plus an initial allowance. It prevents retries from
/// doubling the load on an upstream where all requests fail.
#[derive(Debug, Clone, Copy)]
pub struct RetryBudget {
    /// The saved retries, in tenths of a retry.
    tenths: u32,
}

/// The maximum number of saved retries.
const MAX_SAVED_RETRIES: u32 = 10;

impl Default for RetryBudget {
    fn default() -> Self {
        RetryBudget { tenths: MAX_SAVED_RETRIES * 10 }
    }
}

impl RetryBudget {
    /// Adds a tenth of a retry for a first attempt.
    pub fn deposit(&mut self) {
        self.tenths = (self.tenths + 1).min(MAX_SAVED_RETRIES * 10);
    }

    /// Takes a retry from the budget. Returns false if there is none left.
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
    fn retry_budget_allows_one_retry_per_ten_requests() {
        let mut budget = RetryBudget::default();
        assert_eq!((0..100).filter(|_| budget.withdraw()).count(), 10, "saved up");
        let retries = (0..1000).filter(|_| {
            budget.deposit();
            budget.withdraw()
        });
        assert_eq!(retries.count(), 100);
    }

    #[test]
    fn retry_only_if_unsent_or_safe_method_on_a_dead_reused_connection() {
        let retry = RetryPolicy { attempts: 3, base: Duration::from_millis(50), cap: Duration::from_millis(80) };
        let ms = Duration::from_millis;
        let table = [
            (Method::GET, RetrySafety::Unsent, 1, Some(ms(50))),
            (Method::GET, RetrySafety::Unsent, 2, Some(ms(80))),
            (Method::GET, RetrySafety::Unsent, 3, None),
            (Method::POST, RetrySafety::Unsent, 1, Some(ms(50))),
            (Method::GET, RetrySafety::ReusedConnectionDied, 1, Some(ms(0))),
            (Method::GET, RetrySafety::ReusedConnectionDied, 2, Some(ms(80))),
            (Method::POST, RetrySafety::Unprocessed, 99, Some(ms(0))),
            (Method::POST, RetrySafety::Unprocessed, 100, None),
            (Method::POST, RetrySafety::ReusedConnectionDied, 1, None),
            (Method::GET, RetrySafety::Otherwise, 1, None),
        ];
        for (method, ended, made, expected) in table {
            assert_eq!(retry.pause(&method, ended, made, 0.0), expected, "{method} {ended:?} {made}");
        }
        assert_eq!(retry.pause(&Method::GET, RetrySafety::Unsent, 1, 1.0), Some(ms(25)));
    }
}
