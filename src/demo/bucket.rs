//! Shopify's leaky bucket: each call adds one, calls leak at a constant rate, and a full bucket causes a 429.

use std::time::Instant;

/// The bucket of one token.
#[derive(Debug, Clone, Copy)]
pub struct LeakyBucket {
    level: f64,
    at: Instant,
}

/// The result of a call.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum BucketResult {
    /// The call fits; the number of calls in the bucket now.
    Fits(u32),
    /// The bucket is full; the number of seconds to wait.
    Full(f64),
}

impl LeakyBucket {
    /// Creates an empty bucket.
    pub fn new(at: Instant) -> LeakyBucket {
        LeakyBucket { level: 0.0, at }
    }

    /// Adds one call at `now` to a bucket of `size` calls that leaks `leak` calls per second.
    pub fn pour(&mut self, now: Instant, size: u32, leak: f64) -> BucketResult {
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        self.level = (self.level - passed * leak).max(0.0);
        self.at = now;
        if self.level + 1.0 > f64::from(size) {
            return BucketResult::Full(((self.level + 1.0 - f64::from(size)) / leak).ceil().max(1.0));
        }
        self.level += 1.0;
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // between 0 and size
        BucketResult::Fits(self.level.ceil() as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn leaky_bucket_fills_to_its_capacity_and_leaks_over_time() {
        let start = crate::clock::Clock::start().instant();
        let mut bucket = LeakyBucket::new(start);
        assert_eq!(bucket.pour(start, 2, 2.0), BucketResult::Fits(1));
        assert_eq!(bucket.pour(start, 2, 2.0), BucketResult::Fits(2));
        assert_eq!(bucket.pour(start, 2, 2.0), BucketResult::Full(1.0));
        assert_eq!(bucket.pour(start + Duration::from_millis(500), 2, 2.0), BucketResult::Fits(2));
    }
}
