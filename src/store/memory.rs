//! The memory tier: entries weighed in bytes under a hard cap, S3-FIFO by `quick_cache`, our own expiry.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use http::HeaderMap;
use quick_cache::sync::Cache;
use quick_cache::{DefaultHashBuilder, Lifecycle, OptionsBuilder, Weighter};

use super::alike::Alike;
use crate::config;
use crate::policy::entry::{Entry, Resource};

/// What `quick_cache` keeps for each item, measured.
const SLOT: u64 = 152;

/// An item above about this part of its shard would be dropped silently.
const LARGEST_PART: f64 = 0.9;

type Key = Box<[u8]>;

/// All that is stored, by key.
#[derive(Debug)]
pub struct Memory {
    cache: Cache<Key, Resource, Bytes, DefaultHashBuilder, Evictions>,
    evicted: Arc<AtomicU64>,
    alike: Alike,
    /// Writers change a resource by replacing it, one at a time.
    writing: Mutex<()>,
    /// What all variants of a key may take together.
    max_resource: AtomicU64,
    shards: usize,
    stored: AtomicU64,
    swept: AtomicU64,
}

#[derive(Debug, Clone)]
struct Bytes;

/// Counts what makes room.
#[derive(Debug, Clone)]
struct Evictions(Arc<AtomicU64>);

impl Lifecycle<Key, Resource> for Evictions {
    type RequestState = ();

    fn on_evict(&self, (): &mut Self::RequestState, _key: Key, _resource: Resource) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

impl Weighter<Key, Resource> for Bytes {
    fn weight(&self, key: &Key, resource: &Resource) -> u64 {
        key.len() as u64 + SLOT + resource.weight()
    }
}

/// How full the tier is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Usage {
    /// Keys.
    pub entries: u64,
    /// Bytes, overhead counted.
    pub bytes: u64,
    /// The cap.
    pub max_bytes: u64,
    /// Answers stored since start.
    pub stored: u64,
    /// Keys swept after their last window.
    pub swept: u64,
    /// Keys that made room for others.
    pub evicted: u64,
}

impl Memory {
    /// An empty tier.
    pub fn new(config: &config::Memory) -> Memory {
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
        let lifecycle = Evictions(evicted.clone());
        let cache = Cache::with_options(options, Bytes, DefaultHashBuilder::default(), lifecycle);
        let (stored, swept) = (AtomicU64::new(0), AtomicU64::new(0));
        let (alike, writing) = (Alike::default(), Mutex::new(()));
        Memory { cache, evicted, alike, writing, max_resource, shards, stored, swept }
    }

    /// What is stored under a key. One hash, one shard lock for reading, no allocation.
    pub fn get(&self, key: &[u8]) -> Option<Resource> {
        self.cache.get(key)
    }

    /// An entry in as few bytes as can be, ready to be stored.
    pub fn pack(&self, entry: Entry) -> Arc<Entry> {
        Arc::new(self.alike.pack(entry))
    }

    /// Stores an answer beside the other variants of its key.
    pub fn put(&self, key: &[u8], entry: Arc<Entry>) {
        self.stored.fetch_add(1, Ordering::Relaxed);
        if self.cache.capacity() == 0 {
            return;
        }
        let _one_writer = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let resource = match self.cache.peek(key) {
            Some(others) => others.with(entry, self.max_resource.load(Ordering::Relaxed)),
            None => Resource::One(entry),
        };
        self.cache.insert(key.into(), resource);
    }

    /// Removes what a request selects: the upstream has answered it with something that is not stored.
    pub fn remove(&self, key: &[u8], request: &HeaderMap) {
        let _one_writer = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(resource) = self.cache.peek(key) else { return };
        match resource.without(request) {
            Some(rest) if rest.variants().len() == resource.variants().len() => {}
            Some(rest) => self.cache.insert(key.into(), rest),
            None => drop(self.cache.remove(key)),
        }
    }

    /// Removes what `keep` does not keep.
    pub fn sweep(&self, keep: impl Fn(&Entry) -> bool) {
        let changed = std::cell::RefCell::new(Vec::new());
        self.cache.retain(|key, resource| {
            let kept = resource.variants().iter().filter(|entry| keep(entry)).count();
            if kept == 0 {
                self.swept.fetch_add(1, Ordering::Relaxed);
            } else if kept < resource.variants().len() {
                changed.borrow_mut().push(key.clone());
            }
            kept > 0
        });
        for key in changed.into_inner() {
            let _one_writer = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(resource) = self.cache.peek(&key).and_then(|resource| resource.filtered(&keep)) {
                self.cache.insert(key, resource);
            }
        }
    }

    /// Shows all entries, in no order. What comes or goes meanwhile may be missed.
    pub fn look_at_all(&self, mut look: impl FnMut(&[u8], &Entry)) {
        for (key, resource) in self.cache.iter() {
            resource.variants().iter().for_each(|entry| look(&key, entry));
        }
    }

    /// Another cap: what is beyond it goes at once.
    pub fn resize(&self, max_bytes: u64) {
        if max_bytes != self.cache.capacity() {
            self.cache.set_capacity(max_bytes);
            self.max_resource.store(max_resource(max_bytes, self.shards), Ordering::Relaxed);
        }
    }

    /// The same entries in a tier of other sizes, if these need another number of parts: else the largest answers that
    /// are allowed would find no room.
    pub fn rebuilt(&self, config: &config::Memory) -> Option<Memory> {
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

    /// Nothing is kept any more, nor will be.
    pub fn empty(&self) {
        self.cache.set_capacity(0);
        self.cache.clear();
    }

    /// How full it is.
    pub fn usage(&self) -> Usage {
        Usage {
            entries: self.cache.len() as u64,
            bytes: self.cache.weight(),
            max_bytes: self.cache.capacity(),
            stored: self.stored.load(Ordering::Relaxed),
            swept: self.swept.load(Ordering::Relaxed),
            evicted: self.evicted.load(Ordering::Relaxed),
        }
    }
}

/// As many shards as the largest allowed entry leaves room for, at most four a core.
fn shards(config: &config::Memory) -> usize {
    const OVERHEAD: u64 = 64 << 10;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let room = (config.max_bytes as f64 * LARGEST_PART) as u64 / (config.max_entry_bytes + OVERHEAD).max(1);
    let most = usize::try_from(room).unwrap_or(usize::MAX).clamp(1, (cores * 4).next_power_of_two());
    if most.is_power_of_two() { most } else { most.next_power_of_two() / 2 }
}

/// What all variants of a key may take together, in bytes.
#[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
fn max_resource(max_bytes: u64, shards: usize) -> u64 {
    (max_bytes as f64 * LARGEST_PART) as u64 / shards as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Tick;
    use crate::policy::entry::{About, Terms};
    use crate::policy::head::Head;
    use crate::policy::invalidation::{Address, Position};
    use crate::policy::key::KeyName;
    use crate::policy::tags::UpstreamId;
    use crate::policy::variant::Variant;
    use http::StatusCode;

    const MIB: u64 = 1 << 20;

    fn tier(max_bytes: u64, max_entry_bytes: u64) -> Memory {
        Memory::new(&config::Memory {
            max_bytes,
            max_entry_bytes,
            max_inflight_bytes: 0,
            max_unverified: std::time::Duration::ZERO,
        })
    }

    fn entry(size: usize) -> Arc<Entry> {
        let head = Head::new(StatusCode::OK, &HeaderMap::new(), None, Vec::new());
        let address =
            Address { upstream: UpstreamId(0), authority: "".into(), target: "/".into(), subjects: Box::default() };
        let about = About { key_name: KeyName::default(), tags: Box::default(), rule: "".into() };
        let terms = Terms { fresh_for: 1000, ..Terms::default() };
        let body = bytes::Bytes::from(vec![0; size]);
        Arc::new(Entry::new(head, body, Variant::default(), Tick(0), terms, address, Position(0), about))
    }

    #[test]
    fn other_sizes_keep_what_is_stored() {
        let sizes = |max_bytes, max_entry_bytes| config::Memory {
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
        larger.empty();
        larger.put(b"b", entry(10));
        assert!(larger.get(b"a").is_none() && larger.get(b"b").is_none());
    }

    #[test]
    fn the_largest_allowed_entry_fits_whatever_the_sizes() {
        for (max, largest) in [(64 * MIB, 8 * MIB), (2 * MIB, MIB), (1024 * MIB, MIB), (64 * MIB, 32 * MIB)] {
            let tier = tier(max, largest);
            for i in 0..8u8 {
                tier.put(&[i], entry(usize::try_from(largest).expect("small")));
                assert!(tier.get(&[i]).is_some(), "{largest} in {max}");
            }
        }
    }

    #[test]
    fn ten_times_the_cap_stays_under_the_cap() {
        let tier = tier(4 * MIB, MIB);
        for i in 0..40_000u32 {
            tier.put(&i.to_be_bytes(), entry(1024));
            assert!(tier.usage().bytes <= 4 * MIB);
        }
        assert!(tier.usage().bytes > 3 * MIB, "and it is used");
    }

    #[test]
    fn a_sweep_takes_what_has_expired() {
        let tier = tier(4 * MIB, MIB);
        tier.put(b"a", entry(10));
        tier.sweep(|entry| !entry.expired(Tick(1000)));
        assert!(tier.get(b"a").is_some());
        tier.sweep(|entry| !entry.expired(Tick(1001)));
        assert!(tier.get(b"a").is_none());
    }
}
