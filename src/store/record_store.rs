//! Redis keys and codec of the records, shared by lookups, the write queue and scans.

use std::sync::Arc;

use arc_swap::ArcSwap;

use super::record::RecordCodec;
use crate::policy::http::vary::Variant;
use crate::policy::routing::cache_key::is_private;
use crate::redis::{RecordClass, Redis};

/// The records of a fleet.
#[derive(Debug)]
pub(super) struct RecordStore {
    pub(super) redis: Arc<Redis>,
    /// `{prefix}:1`.
    prefix: Box<str>,
    codec: ArcSwap<RecordCodec>,
}

/// The Redis key of a record, from the cache key of its request.
#[derive(Debug, Clone)]
pub struct RecordKey {
    pub(super) class: RecordClass,
    /// The plain key, without variant.
    pub(super) plain: Box<str>,
}

impl RecordStore {
    pub(super) fn new(redis: Arc<Redis>, prefix: &str, codec: RecordCodec) -> RecordStore {
        RecordStore { redis, prefix: format!("{prefix}:1").into(), codec: ArcSwap::from_pointee(codec) }
    }

    pub(super) fn codec(&self) -> Arc<RecordCodec> {
        self.codec.load_full()
    }

    /// Replaces the codec for new records and lookups.
    pub(super) fn update_codec(&self, change: impl FnOnce(&RecordCodec) -> RecordCodec) {
        let changed = change(&self.codec.load());
        self.codec.store(Arc::new(changed));
    }

    /// Returns the record key of a cache key.
    pub(super) fn record_key(&self, key: &[u8]) -> RecordKey {
        let class = if is_private(key) { RecordClass::Private } else { RecordClass::Shared };
        let plain = format!("{}{}", self.keys_of(class), blake3::hash(key).to_hex()).into();
        RecordKey { class, plain }
    }

    /// Returns the prefix of all keys of a class.
    pub(super) fn keys_of(&self, class: RecordClass) -> String {
        format!("{}:{}:", self.prefix, class.token())
    }
}

impl RecordKey {
    /// Returns its name without prefix: the digest of the cache key in hex. `Cache-Status` shows the beginning of it
    /// ([`crate::policy::routing::cache_key::short_name`]).
    pub fn digest(&self) -> &str {
        self.plain.rsplit(':').next().unwrap_or_default()
    }

    /// Returns the Redis key of a variant.
    pub(super) fn for_variant(&self, variant: &Variant) -> String {
        if variant.0.is_empty() {
            return self.plain.to_string();
        }
        format!("{}:{}", self.plain, &variant.digest().to_hex()[..32])
    }
}
