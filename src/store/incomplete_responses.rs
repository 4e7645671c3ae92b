//! Incomplete responses (RFC 9111 §3.3), kept until the whole response is requested: few, and removed when used.

use std::sync::Arc;

use quick_cache::Weighter;
use quick_cache::sync::Cache;

use crate::policy::http::incomplete::IncompleteResponse;

/// Their limit in bytes: this fraction (1/n) of the memory tier's limit, and in addition to it; at most `MAX_BYTES`.
const PART_OF_MEMORY: u64 = 16;
const MAX_BYTES: u64 = 1 << 20;

/// Incomplete responses, by the cache key of the complete response.
#[derive(Debug)]
pub struct IncompleteResponses(Cache<Box<[u8]>, Arc<IncompleteResponse>, ByteWeighter>);

#[derive(Debug, Clone)]
struct ByteWeighter;

impl Weighter<Box<[u8]>, Arc<IncompleteResponse>> for ByteWeighter {
    fn weight(&self, key: &Box<[u8]>, partial: &Arc<IncompleteResponse>) -> u64 {
        key.len() as u64 + partial.start.weight()
    }
}

impl IncompleteResponses {
    /// Creates an empty store that goes with a memory tier of `memory` bytes.
    pub fn beside(memory: u64) -> IncompleteResponses {
        IncompleteResponses(Cache::with_weighter(64, (memory / PART_OF_MEMORY).min(MAX_BYTES), ByteWeighter))
    }

    /// Stores an incomplete response.
    pub fn put(&self, key: &[u8], partial: IncompleteResponse) {
        self.0.insert(key.into(), Arc::new(partial));
    }

    /// Removes and returns the incomplete response of a key.
    pub fn take(&self, key: &[u8]) -> Option<Arc<IncompleteResponse>> {
        if self.0.is_empty() {
            return None;
        }
        self.0.remove(key).map(|(_, partial)| partial)
    }
}
