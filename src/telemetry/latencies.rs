//! How long something takes: counts in buckets a fifth apart, from which quantiles are read.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// Four buckets for each doubling, from 1 µs to over a minute.
const BUCKETS: usize = 4 * 27;

/// Milliseconds that half, nine in ten, and all but one in a hundred took at most.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Quantiles {
    /// Half.
    pub p50: f64,
    /// Nine in ten.
    pub p90: f64,
    /// All but one in a hundred.
    pub p99: f64,
}

/// A histogram.
#[derive(Debug)]
pub struct Latencies([AtomicU64; BUCKETS]);

impl Default for Latencies {
    fn default() -> Self {
        Latencies(std::array::from_fn(|_| AtomicU64::new(0)))
    }
}

impl Latencies {
    /// Counts one.
    pub fn add(&self, took: Duration) {
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX).max(1);
        let power = micros.ilog2() as usize;
        let quarter = if power < 2 { 0 } else { usize::try_from(micros >> (power - 2) & 3).unwrap_or(0) };
        self.0[(power * 4 + quarter).min(BUCKETS - 1)].fetch_add(1, Relaxed);
    }

    /// The quantiles that people ask for.
    pub fn quantiles(&self) -> Quantiles {
        Quantiles { p50: self.quantile_ms(0.5), p90: self.quantile_ms(0.9), p99: self.quantile_ms(0.99) }
    }

    /// Milliseconds that this part of all took at most; 0 if there were none.
    pub fn quantile_ms(&self, part: f64) -> f64 {
        let counts: Vec<u64> = self.0.iter().map(|count| count.load(Relaxed)).collect();
        #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let wanted = (counts.iter().sum::<u64>() as f64 * part).ceil() as u64;
        let mut seen = 0;
        for (bucket, count) in counts.iter().enumerate() {
            seen += count;
            if wanted > 0 && seen >= wanted {
                return upper_ms(bucket);
            }
        }
        0.0
    }
}

/// The upper end of a bucket.
fn upper_ms(bucket: usize) -> f64 {
    let (power, quarter) = (bucket / 4, bucket % 4);
    #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_possible_wrap)]
    let micros = 2f64.powi(power as i32) * (1.0 + (quarter as f64 + 1.0) / 4.0);
    (micros / 1000.0 * 1000.0).round() / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_at_most_a_quarter_too_high_and_never_too_low() {
        let latencies = Latencies::default();
        assert!(latencies.quantile_ms(0.99) == 0.0);
        (1..=1000).for_each(|ms| latencies.add(Duration::from_millis(ms)));
        for (part, exact) in [(0.5, 500.0), (0.99, 990.0), (1.0, 1000.0)] {
            let found = latencies.quantile_ms(part);
            assert!(found >= exact && found <= exact * 1.25, "{part}: {found}");
        }
    }
}
