//! Latency histogram: counts in buckets of about a fifth in width, from which quantiles are read.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// Number of buckets: four per doubling, from 1 µs to over a minute.
const BUCKETS: usize = 4 * 27;

/// Quantiles of a histogram, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Quantiles {
    /// The median.
    pub p50: f64,
    /// The 90th percentile.
    pub p90: f64,
    /// The 99th percentile.
    pub p99: f64,
}

/// A histogram of durations.
#[derive(Debug)]
pub struct Histogram {
    counts: [AtomicU64; BUCKETS],
    /// The sum of all durations, in microseconds.
    micros: AtomicU64,
}

impl Default for Histogram {
    fn default() -> Self {
        Histogram { counts: std::array::from_fn(|_| AtomicU64::new(0)), micros: AtomicU64::new(0) }
    }
}

impl Histogram {
    /// Adds a duration.
    pub fn add(&self, took: Duration) {
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX).max(1);
        let power = micros.ilog2() as usize;
        let quarter = if power < 2 { 0 } else { usize::try_from(micros >> (power - 2) & 3).unwrap_or(0) };
        self.counts[(power * 4 + quarter).min(BUCKETS - 1)].fetch_add(1, Relaxed);
        self.micros.fetch_add(micros, Relaxed);
    }

    /// Returns the sum in seconds, and the buckets for Prometheus: upper bound in seconds, and count (not cumulative).
    pub fn buckets(&self) -> (f64, Vec<(f64, u64)>) {
        /// Upper bounds double from 64 µs to 67 s; the last bucket has the rest.
        const FIRST: usize = 6;
        const LAST: usize = 26;
        let counts: Vec<u64> = self.counts.iter().map(|count| count.load(Relaxed)).collect();
        let mut from = 0;
        let mut buckets = Vec::with_capacity(LAST - FIRST + 2);
        for power in FIRST..=LAST {
            let to = power * 4;
            #[allow(clippy::cast_precision_loss)]
            let seconds = (1u64 << power) as f64 / 1e6;
            buckets.push((seconds, counts[from..to].iter().sum()));
            from = to;
        }
        buckets.push((f64::INFINITY, counts[from..].iter().sum()));
        #[allow(clippy::cast_precision_loss)]
        (self.micros.load(Relaxed) as f64 / 1e6, buckets)
    }

    /// Returns the usual quantiles: p50, p90 and p99.
    pub fn quantiles(&self) -> Quantiles {
        Quantiles { p50: self.quantile_ms(0.5), p90: self.quantile_ms(0.9), p99: self.quantile_ms(0.99) }
    }

    /// Returns the quantile `part` (0 to 1), in milliseconds, or 0 if the histogram is empty.
    pub fn quantile_ms(&self, part: f64) -> f64 {
        let counts: Vec<u64> = self.counts.iter().map(|count| count.load(Relaxed)).collect();
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

/// Returns the upper bound of a bucket, in milliseconds.
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
    fn prometheus_buckets_count_each_sample_once() {
        let latencies = Histogram::default();
        for micros in [1, 63, 64, 1_000, 2_000_000, 100_000_000] {
            latencies.add(Duration::from_micros(micros));
        }
        let (seconds, buckets) = latencies.buckets();
        assert!((seconds - 102.001_128).abs() < 1e-6);
        assert_eq!(buckets.iter().map(|(_, count)| count).sum::<u64>(), 6);
        assert_eq!((buckets[0], buckets[1].1), ((0.000_064, 2), 1));
        assert_eq!(buckets.last().map(|(_, count)| *count), Some(1));
    }

    #[test]
    fn quantiles_are_never_too_low_and_at_most_25_percent_too_high() {
        let latencies = Histogram::default();
        assert!(latencies.quantile_ms(0.99) == 0.0);
        (1..=1000).for_each(|ms| latencies.add(Duration::from_millis(ms)));
        for (part, exact) in [(0.5, 500.0), (0.99, 990.0), (1.0, 1000.0)] {
            let found = latencies.quantile_ms(part);
            assert!(found >= exact && found <= exact * 1.25, "{part}: {found}");
        }
    }
}
