//! The ledger of purges, shared: one lock around the pure [`Ledger`], and one number that hits look at.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock};

use crate::policy::entry::Entry;
use crate::policy::invalidation::{Address, Ledger, Position, Selector, Standing, Strength};

/// So many subjects and so many URL matchers are remembered.
const MAX_SUBJECTS: usize = 100_000;
const MAX_MATCHERS: usize = 1_000;

/// What was purged.
#[derive(Debug)]
pub struct Invalidations {
    /// The ledger's position: the global epoch.
    epoch: AtomicU64,
    ledger: RwLock<Ledger>,
}

impl Default for Invalidations {
    fn default() -> Self {
        Invalidations { epoch: AtomicU64::new(0), ledger: RwLock::new(Ledger::new(MAX_SUBJECTS, MAX_MATCHERS)) }
    }
}

impl Invalidations {
    /// What a fetch that begins now is born at.
    pub fn position(&self) -> Position {
        Position(self.epoch.load(Ordering::Acquire))
    }

    /// Purges. It holds from the moment this returns.
    pub fn record(&self, selectors: impl IntoIterator<Item = Selector>, strength: Strength) -> Position {
        let mut ledger = self.ledger.write().unwrap_or_else(PoisonError::into_inner);
        let position = ledger.record(selectors, strength);
        self.epoch.store(position.0, Ordering::Release);
        position
    }

    /// Where an entry stands. Compares one number, unless something was purged since it was last asked.
    pub fn standing(&self, entry: &Entry) -> Standing {
        let epoch = self.position();
        if let Some(known) = entry.standing_at(epoch) {
            return known;
        }
        let ledger = self.ledger.read().unwrap_or_else(PoisonError::into_inner);
        let standing = ledger.standing(&entry.address, entry.position);
        entry.remember(ledger.position(), standing);
        standing
    }

    /// Has anything been purged that a fetch born at `position` is about?
    pub fn outdated(&self, address: &Address, position: Position) -> bool {
        if self.position() == position {
            return false;
        }
        let ledger = self.ledger.read().unwrap_or_else(PoisonError::into_inner);
        ledger.standing(address, position) != Standing::Valid
    }
}
