//! Interning of values that many entries share: the shape of their heads, and the upstream's authority.

use std::hash::{BuildHasher, Hash, RandomState};
use std::sync::{Arc, Mutex, PoisonError};

use crate::policy::entry::Entry;
use crate::policy::packed_head::HeadShape;

/// Number of slots of a table. Values that hash to the same slot replace each other, which only costs memory.
const SLOTS: usize = 256;

/// A table of recently seen values.
#[derive(Debug)]
struct InternTable<T: ?Sized> {
    places: Box<[Mutex<Option<Arc<T>>>]>,
    hasher: RandomState,
}

impl<T: ?Sized> Default for InternTable<T> {
    fn default() -> Self {
        InternTable { places: (0..SLOTS).map(|_| Mutex::default()).collect(), hasher: RandomState::new() }
    }
}

impl<T: Hash + Eq + ?Sized> InternTable<T> {
    /// Returns an equal value seen before, or else this one.
    fn intern(&self, value: &Arc<T>) -> Arc<T> {
        let place = usize::try_from(self.hasher.hash_one(value) % SLOTS as u64).unwrap_or(0);
        let mut seen = self.places[place].lock().unwrap_or_else(PoisonError::into_inner);
        match &*seen {
            Some(known) if known == value => known.clone(),
            Some(_) | None => seen.insert(value.clone()).clone(),
        }
    }
}

/// The tables of values that entries share.
#[derive(Debug, Default)]
pub(super) struct Interner {
    shapes: InternTable<HeadShape>,
    authorities: InternTable<str>,
}

impl Interner {
    /// Returns the entry with shared values interned and its head packed.
    pub(super) fn intern(&self, mut entry: Entry) -> Entry {
        entry.resource.authority = self.authorities.intern(&entry.resource.authority);
        let shape = self.shapes.intern(entry.head.shape());
        entry.owns_shape = Arc::ptr_eq(&shape, entry.head.shape());
        (entry.head, entry.body) = entry.head.packed(shape, entry.body);
        entry
    }
}
