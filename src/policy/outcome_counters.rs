//! How often something came out how: a counter for each outcome.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::outcome::Outcome;

/// Counters by [`Outcome::LABELS`].
#[derive(Debug, Default)]
pub struct OutcomeCounters([AtomicU64; Outcome::LABELS.len()]);

impl OutcomeCounters {
    /// Counts one.
    pub fn count(&self, outcome: &Outcome) {
        if let Some(counter) = outcome_index(outcome).and_then(|index| self.0.get(index)) {
            counter.fetch_add(1, Relaxed);
        }
    }

    /// All of them: label and count.
    pub fn read(&self) -> impl Iterator<Item = (&'static str, u64)> {
        Outcome::LABELS.into_iter().zip(self.0.iter().map(|counter| counter.load(Relaxed)))
    }
}

/// An outcome's place among [`Outcome::LABELS`].
pub fn outcome_index(outcome: &Outcome) -> Option<usize> {
    let label = outcome.label();
    Outcome::LABELS.iter().position(|known| *known == label)
}
