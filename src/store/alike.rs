//! What many entries have alike is kept once: the shape of their heads, and the authority they came from.

use std::hash::{BuildHasher, Hash, RandomState};
use std::sync::{Arc, Mutex, PoisonError};

use crate::policy::entry::Entry;
use crate::policy::head::Shape;

/// So many different values of a kind are remembered. Two that fall into one place displace each other: then what they
/// stand in is a little larger, and nothing else.
const PLACES: usize = 256;

/// Values seen lately, each once.
#[derive(Debug)]
struct Seen<T: ?Sized> {
    places: Box<[Mutex<Option<Arc<T>>>]>,
    hasher: RandomState,
}

impl<T: ?Sized> Default for Seen<T> {
    fn default() -> Self {
        Seen { places: (0..PLACES).map(|_| Mutex::default()).collect(), hasher: RandomState::new() }
    }
}

impl<T: Hash + Eq + ?Sized> Seen<T> {
    /// One that is equal and was seen before, or else this one.
    fn alike(&self, value: &Arc<T>) -> Arc<T> {
        let place = usize::try_from(self.hasher.hash_one(value) % PLACES as u64).unwrap_or(0);
        let mut seen = self.places[place].lock().unwrap_or_else(PoisonError::into_inner);
        match &*seen {
            Some(known) if known == value => known.clone(),
            Some(_) | None => seen.insert(value.clone()).clone(),
        }
    }
}

/// What entries have alike.
#[derive(Debug, Default)]
pub(super) struct Alike {
    shapes: Seen<Shape>,
    authorities: Seen<str>,
}

impl Alike {
    /// The same entry in as few bytes as can be.
    pub(super) fn pack(&self, mut entry: Entry) -> Entry {
        entry.address.authority = self.authorities.alike(&entry.address.authority);
        let shape = self.shapes.alike(entry.head.shape());
        entry.owns_shape = Arc::ptr_eq(&shape, entry.head.shape());
        (entry.head, entry.body) = entry.head.packed(shape, entry.body);
        entry
    }
}
