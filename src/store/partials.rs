//! Beginnings of answers, until somebody asks for the whole: few, and taken out when used.

use std::sync::Arc;

use quick_cache::Weighter;
use quick_cache::sync::Cache;

use crate::policy::partial::Partial;

/// They may take this part of what the memory tier may take beside it, and no more than this, in bytes.
const PART_OF_MEMORY: u64 = 16;
const MOST: u64 = 1 << 20;

/// Beginnings by the key of the whole.
#[derive(Debug)]
pub struct Partials(Cache<Box<[u8]>, Arc<Partial>, Bytes>);

#[derive(Debug, Clone)]
struct Bytes;

impl Weighter<Box<[u8]>, Arc<Partial>> for Bytes {
    fn weight(&self, key: &Box<[u8]>, partial: &Arc<Partial>) -> u64 {
        key.len() as u64 + partial.start.weight()
    }
}

impl Partials {
    /// None yet, beside a memory tier of this size.
    pub fn beside(memory: u64) -> Partials {
        Partials(Cache::with_weighter(64, (memory / PART_OF_MEMORY).min(MOST), Bytes))
    }

    /// Keeps a beginning.
    pub fn put(&self, key: &[u8], partial: Partial) {
        self.0.insert(key.into(), Arc::new(partial));
    }

    /// Takes one out.
    pub fn take(&self, key: &[u8]) -> Option<Arc<Partial>> {
        if self.0.is_empty() {
            return None;
        }
        self.0.remove(key).map(|(_, partial)| partial)
    }
}
