//! The memory tier: entries under a hard limit in bytes, with S3-FIFO eviction by `quick_cache` and expiry of its own.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http::HeaderMap;
use quick_cache::sync::Cache;
use quick_cache::{DefaultHashBuilder, Lifecycle, OptionsBuilder, Weighter};

use super::intern::Interner;
use crate::policy::entry::{Entry, VariantSet};

/// Measured overhead of `quick_cache` per item, in bytes.
const SLOT_BYTES: u64 = 152;

/// Maximum fraction of its shard that an item may take: `quick_cache` silently drops larger ones.
const MAX_SHARD_FRACTION: f64 = 0.9;

/// Number of keys that a sweep visits before it yields. With as many URL patterns purged as the ledger holds, a slice
/// takes about half a millisecond.
const SWEEP_SLICE: usize = 16;

type Key = Box<[u8]>;

/// The memory tier: stored responses by cache key.
#[derive(Debug)]
pub struct Memory {
    cache: Cache<Key, VariantSet, ByteWeighter, DefaultHashBuilder, EvictionCounter>,
    evicted: Arc<AtomicU64>,
    interner: Interner,
    /// Serializes writers, which change a set of variants by replacing it.
    writing: Mutex<()>,
    /// Maximum size of all variants of a key together, in bytes.
    max_resource: AtomicU64,
    shards: usize,
    stored: AtomicU64,
    swept: AtomicU64,
}

#[derive(Debug, Clone)]
struct ByteWeighter;

/// Counts evictions.
#[derive(Debug, Clone)]
struct EvictionCounter(Arc<AtomicU64>);

impl Lifecycle<Key, VariantSet> for EvictionCounter {
    type RequestState = ();

    fn on_evict(&self, (): &mut Self::RequestState, _key: Key, _resource: VariantSet) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

impl Weighter<Key, VariantSet> for ByteWeighter {
    fn weight(&self, key: &Key, resource: &VariantSet) -> u64 {
        key.len() as u64 + SLOT_BYTES + resource.weight()
    }
}

/// Size and counters of the memory tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct MemoryUsage {
    /// Keys.
    pub entries: u64,
    /// Size in bytes, including overhead.
    pub bytes: u64,
    /// Maximum of `bytes`.
    pub max_bytes: u64,
    /// Responses stored since start.
    pub stored: u64,
    /// Keys removed by sweeps: past all of their stale windows, or purged.
    pub swept: u64,
    /// Keys evicted.
    pub evicted: u64,
}

impl Memory {
    /// Creates an empty tier.
    pub fn new(config: &MemoryLimits) -> Memory {
        let shards = shards(config);
        let max_resource = AtomicU64::new(max_resource(config.max_bytes, shards));
        let estimated = usize::try_from(config.max_bytes / 4096).unwrap_or(usize::MAX).max(64);
        let options = OptionsBuilder::new()
            .shards(shards)
            .estimated_items_capacity(estimated)
            .weight_capacity(config.max_bytes)
            .build()
            .expect("all options are set");
        let evicted = Arc::new(AtomicU64::new(0));
        let lifecycle = EvictionCounter(evicted.clone());
        let cache = Cache::with_options(options, ByteWeighter, DefaultHashBuilder::default(), lifecycle);
        let (stored, swept) = (AtomicU64::new(0), AtomicU64::new(0));
        let (interner, writing) = (Interner::default(), Mutex::new(()));
        Memory { cache, evicted, interner, writing, max_resource, shards, stored, swept }
    }

    /// Returns the variants stored under a key. Costs one hash and one read lock of a shard, and no allocation.
    pub fn get(&self, key: &[u8]) -> Option<VariantSet> {
        self.cache.get(key)
    }

    /// Interns the shared values of an entry before it is stored.
    pub fn intern(&self, entry: Entry) -> Arc<Entry> {
        Arc::new(self.interner.intern(entry))
    }

    /// Stores an entry along with the other variants of its key.
    pub fn put(&self, key: &[u8], entry: Arc<Entry>) {
        self.stored.fetch_add(1, Ordering::Relaxed);
        if self.cache.capacity() == 0 {
            return;
        }
        let _one_writer = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let resource = match self.cache.peek(key) {
            Some(others) => others.with(entry, self.max_resource.load(Ordering::Relaxed)),
            None => VariantSet::One(entry),
        };
        self.cache.insert(key.into(), resource);
    }

    /// Removes the variant that a request selects, because the upstream's new response to it is not stored.
    pub fn remove(&self, key: &[u8], request: &HeaderMap) {
        let _one_writer = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(resource) = self.cache.peek(key) else { return };
        match resource.without(request) {
            Some(rest) if rest.variants().len() == resource.variants().len() => {}
            Some(rest) => self.cache.insert(key.into(), rest),
            None => drop(self.cache.remove(key)),
        }
    }

    /// Removes the entries for which `keep` returns false. Yields after each few keys, so that requests are served
    /// meanwhile. Entries added meanwhile may be missed.
    pub async fn sweep(&self, keep: impl Fn(&Entry) -> bool) {
        let mut keys = self.cache.iter();
        loop {
            let mut visited = 0;
            for (key, resource) in keys.by_ref().take(SWEEP_SLICE) {
                visited += 1;
                if !resource.variants().iter().all(|entry| keep(entry)) {
                    self.retain(&key, &keep);
                }
            }
            if visited == 0 {
                return;
            }
            tokio::task::yield_now().await;
        }
    }

    /// Removes the variants of a key for which `keep` returns false.
    fn retain(&self, key: &Key, keep: &impl Fn(&Entry) -> bool) {
        let _one_writer = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(resource) = self.cache.peek(key) else { return };
        match resource.filtered(keep) {
            Some(kept) if kept.variants().len() == resource.variants().len() => {}
            Some(kept) => self.cache.insert(key.clone(), kept),
            None => {
                self.cache.remove(key);
                self.swept.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Calls `look` with every entry, in no order. Entries added or removed meanwhile may be missed.
    pub fn for_each(&self, mut look: impl FnMut(&[u8], &Entry)) {
        for (key, resource) in self.cache.iter() {
            resource.variants().iter().for_each(|entry| look(&key, entry));
        }
    }

    /// Changes the limit. Evicts entries beyond it at once.
    pub fn resize(&self, max_bytes: u64) {
        if max_bytes != self.cache.capacity() {
            self.cache.set_capacity(max_bytes);
            self.max_resource.store(max_resource(max_bytes, self.shards), Ordering::Relaxed);
        }
    }

    /// Returns a tier with the same entries, if `config` needs another number of shards. With the present number, the
    /// largest allowed entries might not fit.
    pub fn rebuilt(&self, config: &MemoryLimits) -> Option<Memory> {
        if shards(config) == self.shards {
            return None;
        }
        let next = Memory::new(config);
        for (key, resource) in self.cache.iter() {
            next.cache.insert(key, resource);
        }
        for (new, old) in [(&next.stored, &self.stored), (&next.swept, &self.swept), (&*next.evicted, &*self.evicted)]
        {
            new.store(old.load(Ordering::Relaxed), Ordering::Relaxed);
        }
        Some(next)
    }

    /// Removes all entries, and stores none from now on.
    pub fn clear_for_good(&self) {
        self.cache.set_capacity(0);
        self.cache.clear();
    }

    /// Returns the size and counters of the tier.
    pub fn usage(&self) -> MemoryUsage {
        MemoryUsage {
            entries: self.cache.len() as u64,
            bytes: self.cache.weight(),
            max_bytes: self.cache.capacity(),
            stored: self.stored.load(Ordering::Relaxed),
            swept: self.swept.load(Ordering::Relaxed),
            evicted: self.evicted.load(Ordering::Relaxed),
        }
    }
}

/// Returns the number of shards: as many as leave room for the largest allowed entry, at most about four per core.
fn shards(config: &MemoryLimits) -> usize {
    const OVERHEAD: u64 = 64 << 10;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let room = (config.max_bytes as f64 * MAX_SHARD_FRACTION) as u64 / (config.max_entry_bytes + OVERHEAD).max(1);
    let most = usize::try_from(room).unwrap_or(usize::MAX).clamp(1, (cores * 4).next_power_of_two());
    if most.is_power_of_two() { most } else { most.next_power_of_two() / 2 }
}

/// Returns the maximum size of all variants of a key together, in bytes.
#[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
fn max_resource(max_bytes: u64, shards: usize) -> u64 {
    (max_bytes as f64 * MAX_SHARD_FRACTION) as u64 / shards as u64
}

/// Limits of the memory tier.
#[derive(Debug, Clone, Copy)]
pub struct MemoryLimits {
    /// Maximum size of all entries including overhead, in bytes.
    pub max_bytes: u64,
    /// Maximum size of one entry, in bytes.
    pub max_entry_bytes: u64,
    /// Maximum size of all running fetches together, in bytes.
    pub max_inflight_bytes: u64,
    /// How long entries may be used while the invalidation log can't be read.
    pub max_unverified: Duration,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::entry::{Lifetimes, testing};

    const MIB: u64 = 1 << 20;

    fn tier(max_bytes: u64, max_entry_bytes: u64) -> Memory {
        Memory::new(&MemoryLimits {
            max_bytes,
            max_entry_bytes,
            max_inflight_bytes: 0,
            max_unverified: std::time::Duration::ZERO,
        })
    }

    fn entry(size: usize) -> Arc<Entry> {
        let lifetimes = Lifetimes { fresh_for: 1000, ..Lifetimes::default() };
        let mut entry = testing::entry(lifetimes);
        entry.body = vec![0; size].into();
        Arc::new(entry)
    }

    #[test]
    fn rebuilt_memory_keeps_entries_and_cleared_memory_stores_none() {
        let sizes = |max_bytes, max_entry_bytes| MemoryLimits {
            max_bytes,
            max_entry_bytes,
            max_inflight_bytes: 1 << 20,
            max_unverified: std::time::Duration::from_secs(30),
        };
        let memory = Memory::new(&sizes(64 << 20, 1 << 10));
        memory.put(b"a", entry(10));
        assert!(memory.rebuilt(&sizes(32 << 20, 1 << 10)).is_none(), "as many parts");
        let larger = memory.rebuilt(&sizes(64 << 20, 32 << 20)).expect("fewer parts, with room for the largest");
        assert!(larger.get(b"a").is_some() && larger.usage().stored == 1);
        larger.clear_for_good();
        larger.put(b"b", entry(10));
        assert!(larger.get(b"a").is_none() && larger.get(b"b").is_none());
    }

    #[test]
    fn entry_of_maximum_size_is_stored_whatever_the_memory_limits() {
        for (max, largest) in [(64 * MIB, 8 * MIB), (2 * MIB, MIB), (1024 * MIB, MIB), (64 * MIB, 32 * MIB)] {
            let tier = tier(max, largest);
            for i in 0..8u8 {
                tier.put(&[i], entry(usize::try_from(largest).expect("small")));
                assert!(tier.get(&[i]).is_some(), "{largest} in {max}");
            }
        }
    }

    #[test]
    fn memory_usage_stays_under_the_limit_when_ten_times_as_much_is_stored() {
        let tier = tier(4 * MIB, MIB);
        for i in 0..40_000u32 {
            tier.put(&i.to_be_bytes(), entry(1024));
            assert!(tier.usage().bytes <= 4 * MIB);
        }
        assert!(tier.usage().bytes > 3 * MIB, "and it is used");
    }

    #[tokio::test]
    async fn sweep_removes_expired_entries() {
        let tier = tier(4 * MIB, MIB);
        tier.put(b"a", entry(10));
        tier.sweep(|entry| !entry.expired(crate::policy::Tick(1000))).await;
        assert!(tier.get(b"a").is_some());
        tier.sweep(|entry| !entry.expired(crate::policy::Tick(1001))).await;
        assert!(tier.get(b"a").is_none());
    }

    #[tokio::test]
    async fn sweep_yields_to_other_tasks_after_each_slice() {
        let tier = Arc::new(tier(4 * MIB, MIB));
        for i in 0..1_000u32 {
            tier.put(&i.to_be_bytes(), entry(1));
        }
        let (visited, seen) = (Arc::new(AtomicU64::new(0)), Arc::new(Mutex::new(Vec::new())));
        let other = tokio::spawn({
            let (visited, seen) = (visited.clone(), seen.clone());
            async move {
                loop {
                    seen.lock().expect("a lock").push(visited.load(Ordering::Relaxed));
                    tokio::task::yield_now().await;
                }
            }
        });
        let keep = |_: &Entry| {
            visited.fetch_add(1, Ordering::Relaxed);
            true
        };
        tier.sweep(keep).await;
        other.abort();
        let seen = seen.lock().expect("a lock");
        assert_eq!(visited.load(Ordering::Relaxed), 1_000);
        assert!(seen.windows(2).all(|pair| pair[1] - pair[0] <= 2 * SWEEP_SLICE as u64), "{seen:?}");
        assert!(seen.len() >= 1_000 / SWEEP_SLICE);
    }
}
