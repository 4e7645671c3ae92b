//! The keys whose last fetch failed, and until when they are paused ([`FailedKey`]).

use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use quick_cache::sync::Cache;

use crate::policy::Tick;
use crate::policy::resilience::backoff::{FailedFetch, FailedKey, FailureBackoff};
use crate::policy::resilience::failure::Failure;

/// Maximum number of keys. Beyond it, the least used are forgotten.
const MAX_KEYS: usize = 10_000;

/// The failed keys of an upstream.
#[derive(Debug)]
pub struct FailedKeys {
    keys: Cache<u64, FailedKey>,
    /// Whether any fetch has failed since the start.
    any: AtomicBool,
    hasher: RandomState,
}

impl Default for FailedKeys {
    fn default() -> Self {
        FailedKeys { keys: Cache::new(MAX_KEYS), any: AtomicBool::new(false), hasher: RandomState::new() }
    }
}

impl FailedKeys {
    /// Records a failed fetch.
    pub fn failed(
        &self,
        key: &[u8],
        failure: Failure,
        retry_after: Option<Duration>,
        backoff: &FailureBackoff,
        now: Tick,
    ) {
        let hash = self.hasher.hash_one(key);
        let jitter = f64::from(getrandom::u32().unwrap_or(0)) / f64::from(u32::MAX);
        let failed = FailedFetch { failure, retry_after, jitter };
        self.any.store(true, Ordering::Relaxed);
        self.keys.insert(hash, FailedKey::after(self.keys.get(&hash), failed, backoff, now));
    }

    /// Records a response that is no failure.
    pub fn succeeded(&self, key: &[u8]) {
        if self.any.load(Ordering::Relaxed) {
            self.keys.remove(&self.hasher.hash_one(key));
        }
    }

    /// Returns how the last fetch of a key failed.
    pub fn last_failure(&self, key: &[u8]) -> Option<Failure> {
        if !self.any.load(Ordering::Relaxed) {
            return None;
        }
        self.keys.get(&self.hasher.hash_one(key)).map(|failed| failed.failure)
    }

    /// Returns the time until a key may be fetched again.
    pub fn paused_for(&self, key: &[u8], now: Tick) -> Option<Duration> {
        self.keys.get(&self.hasher.hash_one(key))?.paused_for(now)
    }

    /// Returns true if a key may not be fetched now. Else the caller fetches it, and others don't meanwhile.
    pub fn is_paused_or_probe(&self, key: &[u8], now: Tick) -> bool {
        if !self.any.load(Ordering::Relaxed) {
            return false;
        }
        let hash = self.hasher.hash_one(key);
        let Some(failed) = self.keys.get(&hash) else { return false };
        if failed.paused_for(now).is_some() {
            return true;
        }
        self.keys.insert(hash, failed.probed(now));
        false
    }
}
