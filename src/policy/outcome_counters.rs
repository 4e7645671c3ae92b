//! Outcome counters: the number of requests by outcome.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::outcome::Outcome;

/// Counters of requests, one for each of [`Outcome::LABELS`].
#[derive(Debug, Default)]
pub struct OutcomeCounters([AtomicU64; Outcome::LABELS.len()]);

impl OutcomeCounters {
    /// Counts one request.
    pub fn count(&self, outcome: &Outcome) {
        if let Some(counter) = outcome_index(outcome).and_then(|index| self.0.get(index)) {
            counter.fetch_add(1, Relaxed);
        }
    }

    /// Returns the label and the count of every outcome.
    pub fn read(&self) -> impl Iterator<Item = (&'static str, u64)> {
        Outcome::LABELS.into_iter().zip(self.0.iter().map(|counter| counter.load(Relaxed)))
    }
}

/// Returns the index of an outcome's label in [`Outcome::LABELS`].
pub fn outcome_index(outcome: &Outcome) -> Option<usize> {
    let label = outcome.label();
    Outcome::LABELS.iter().position(|known| *known == label)
}
