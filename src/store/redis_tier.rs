//! The Redis tier: records shared by the fleet.
//!
//! Lookups are part of a fetch; writes wait in a bounded queue (`write_behind.rs`).
//!
//! Keys are made of digests: `{prefix}:1:{s|p}:{digest of the cache key}`, followed by `:{digest of the headers}` where
//! a response varies by request headers. A rule suggests these headers; where a response varies by others, a vary
//! marker is stored under the plain key.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::header::{HeaderMap, HeaderName};
use tracing::debug;

use super::compression::Compression;
use super::record::{HEADER_BYTES, Record, RecordCodec, RecordError, StoredResponse, record_length};
use super::record_store::RecordStore;
use super::scan::ScanQueue;
use super::write_behind::{PendingWrite, QueueTask, WriteBehindQueue};
use crate::policy::entry::Entry;
use crate::policy::http::vary::Variant;
use crate::policy::invalidation::ledger::{Position, Selector};
use crate::policy::invalidation::log_position::SeenLog;
use crate::redis::{Redis, RedisError};

/// Added to the retention time of a record to give its TTL.
const TTL_MARGIN: Duration = Duration::from_mins(1);

/// Size of one read of a record, in bytes.
const READ_SIZE: usize = 256 << 10;

/// Maximum retention time of a record in Redis, without `TTL_MARGIN`.
const MAX_TTL: Duration = Duration::from_hours(31 * 24);

pub use super::record_store::RecordKey;
pub use super::scan::PurgedRecords;

/// Settings of the records in Redis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RedisTierConfig {
    /// Compression of bodies larger than `compress_above`.
    pub compression: Compression,
    /// Size of the largest body that is not compressed, in bytes.
    pub compress_above: u64,
    /// Maximum size of the entries that wait to be written, in bytes.
    pub write_behind: u64,
}

impl Default for RedisTierConfig {
    fn default() -> Self {
        RedisTierConfig { compression: Compression::Lz4, compress_above: 2 << 10, write_behind: 16 << 20 }
    }
}

/// The Redis tier.
#[derive(Debug)]
pub struct RedisTier {
    records: Arc<RecordStore>,
    queue: Arc<WriteBehindQueue>,
    scans: ScanQueue,
    counts: TierCounters,
}

#[derive(Debug, Default)]
struct TierCounters {
    hits: AtomicU64,
    misses: AtomicU64,
    errors: AtomicU64,
    forged: AtomicU64,
}

/// The state of the tier, as in `/stats`.
#[derive(Debug, Clone, serde::Serialize)]
pub struct TierState {
    /// Records found.
    pub hits: u64,
    /// Lookups that found nothing.
    pub misses: u64,
    /// Lookups that failed because Redis was unavailable. The caller counts them as misses.
    pub errors: u64,
    /// Records that failed authentication.
    pub forged: u64,
    /// The write-behind queue.
    pub queue: super::write_behind::WriteBehindState,
    /// Scans that remove records purged by URL pattern.
    pub walks: super::scan::ScanState,
}

/// The result of a lookup.
#[derive(Debug)]
pub enum TierRecord {
    /// No record of this variant. The request headers that the resource varies by, if a vary marker shows them.
    Absent(Option<Vec<HeaderName>>),
    /// A record from Redis.
    Stored(Box<StoredResponse>),
    /// An entry that still waits to be written.
    Waiting(Arc<Entry>),
}

impl RedisTier {
    /// Creates the tier in `redis`, with keys below `prefix` and at most `max_waiting` bytes waiting to be written.
    pub fn new(redis: Arc<Redis>, prefix: &str, codec: RecordCodec, max_waiting: u64) -> RedisTier {
        RedisTier {
            records: Arc::new(RecordStore::new(redis, prefix, codec)),
            queue: Arc::new(WriteBehindQueue::new(max_waiting)),
            scans: ScanQueue::default(),
            counts: TierCounters::default(),
        }
    }

    /// Replaces the codec for new records and lookups.
    pub fn update_codec(&self, change: impl FnOnce(&RecordCodec) -> RecordCodec) {
        self.records.update_codec(change);
    }

    /// Returns the record key of a cache key.
    pub fn record_key(&self, key: &[u8]) -> RecordKey {
        self.records.record_key(key)
    }

    /// Looks up the record of a request. `usual`: the request headers that its response is expected to vary by.
    pub async fn find(
        &self,
        record_key: &RecordKey,
        usual: &[HeaderName],
        request: &HeaderMap,
    ) -> Result<TierRecord, RedisError> {
        let guess = Variant::of(usual.to_vec(), request);
        match self.read(record_key, &record_key.for_variant(&guess)).await? {
            Some(KeyContents::Found(found)) => return Ok(found),
            Some(KeyContents::VaryMarker(names)) if names != usual => {
                return self.find_variant(record_key, names, request).await;
            }
            Some(KeyContents::VaryMarker(_)) => {}
            None if guess.0.is_empty() => {}
            None => match self.read(record_key, &record_key.plain).await? {
                Some(KeyContents::VaryMarker(names)) if names != usual => {
                    return self.find_variant(record_key, names, request).await;
                }
                // A record under the plain key does not vary: it matches any request headers.
                Some(KeyContents::Found(found)) => return Ok(found),
                Some(KeyContents::VaryMarker(_)) | None => {}
            },
        }
        self.counts.misses.fetch_add(1, Relaxed);
        Ok(TierRecord::Absent(None))
    }

    async fn find_variant(
        &self,
        record_key: &RecordKey,
        names: Vec<HeaderName>,
        request: &HeaderMap,
    ) -> Result<TierRecord, RedisError> {
        match self.read(record_key, &record_key.for_variant(&Variant::of(names.clone(), request))).await? {
            Some(KeyContents::Found(found)) => Ok(found),
            Some(KeyContents::VaryMarker(_)) | None => {
                self.counts.misses.fetch_add(1, Relaxed);
                Ok(TierRecord::Absent(Some(names)))
            }
        }
    }

    /// Reads one key. Returns `None` if there is no record, or none that this process may use.
    async fn read(&self, place: &RecordKey, key: &str) -> Result<Option<KeyContents>, RedisError> {
        if let Some(entry) = self.queue.waiting(key) {
            self.counts.hits.fetch_add(1, Relaxed);
            return Ok(Some(KeyContents::Found(TierRecord::Waiting(entry))));
        }
        let read = self.read_whole(place, key).await.inspect_err(|_| {
            self.counts.errors.fetch_add(1, Relaxed);
        })?;
        let Some(bytes) = Some(read).filter(|bytes| !bytes.is_empty()) else { return Ok(None) };
        match self.records.codec().decode(&bytes, key) {
            Ok(Record::Response(answer)) => {
                self.counts.hits.fetch_add(1, Relaxed);
                Ok(Some(KeyContents::Found(TierRecord::Stored(answer))))
            }
            Ok(Record::VaryMarker(names)) => Ok(Some(KeyContents::VaryMarker(names))),
            Err(RecordError::NotForUs) => Ok(None),
            Err(RecordError::Forged) => {
                self.counts.forged.fetch_add(1, Relaxed);
                debug!(key, "a record does not verify: removed");
                let start = bytes.slice(..bytes.len().min(HEADER_BYTES));
                // If this fails, the next reader removes it, or it expires.
                let _ = self.records.redis.remove_unchanged(place.class, key, start).await;
                Ok(None)
            }
        }
    }

    /// Reads a record: a small one by one command, a large one in parts, between which other replies have their turn.
    async fn read_whole(&self, place: &RecordKey, key: &str) -> Result<Bytes, RedisError> {
        let first = self.records.redis.read_start(place.class, key, READ_SIZE).await?;
        let length = record_length(&first).min(self.records.codec().max_record_bytes());
        if first.len() < READ_SIZE || length <= first.len() {
            return Ok(first);
        }
        let mut whole = BytesMut::with_capacity(length);
        whole.extend_from_slice(&first);
        while whole.len() < length {
            let rest = READ_SIZE.min(length - whole.len());
            let part = self.records.redis.read_range(place.class, key, whole.len(), rest).await?;
            if part.is_empty() {
                break;
            }
            whole.extend_from_slice(&part);
        }
        Ok(whole.freeze())
    }

    /// Queues an entry to be written. The receiver resolves when it is written, and fails when it will not be.
    ///
    /// `usual`: the request headers that the response is expected to vary by. `resident`: the entry's age since it was
    /// received, in milliseconds, which shortens the TTL.
    pub fn enqueue_write(
        &self,
        key: &[u8],
        entry: &Arc<Entry>,
        usual: &[HeaderName],
        resident: u64,
    ) -> tokio::sync::oneshot::Receiver<()> {
        let place = self.record_key(key);
        let names: Vec<HeaderName> = entry.variant.0.iter().map(|(name, _)| name.clone()).collect();
        let ttl =
            Duration::from_millis(entry.lifetimes.retention().saturating_sub(resident)).min(MAX_TTL) + TTL_MARGIN;
        let at = place.for_variant(&entry.variant);
        let vary_marker = (names != usual && *at != *place.plain).then(|| (place.plain.to_string(), names));
        let (written, receiver) = tokio::sync::oneshot::channel();
        let write = PendingWrite { class: place.class, key: at, entry: entry.clone(), vary_marker, ttl, written };
        self.queue.push(QueueTask::Write(write));
        receiver
    }

    /// Queues the removal of the record of a key and variant.
    pub fn enqueue_remove(&self, key: &[u8], variant: &Variant) {
        let place = self.record_key(key);
        self.queue.push(QueueTask::Remove { class: place.class, key: place.for_variant(variant) });
    }

    /// Returns the state of the tier.
    pub fn state(&self) -> TierState {
        TierState {
            hits: self.counts.hits.load(Relaxed),
            misses: self.counts.misses.load(Relaxed),
            errors: self.counts.errors.load(Relaxed),
            forged: self.counts.forged.load(Relaxed),
            queue: self.queue.state(),
            walks: self.scans.state(),
        }
    }

    /// Processes the write queue, forever. `seen_at` returns the last log entry that a fetch at a position had seen.
    pub async fn run_writes(&self, seen_at: impl Fn(Position) -> SeenLog + Send + Sync + 'static) {
        self.queue.clone().write(self.records.clone(), seen_at).await;
    }

    /// Queues a scan that removes the records matched by the URL patterns, or the selector for everything, among these.
    pub fn enqueue_scan(&self, selectors: &[Selector]) {
        self.scans.enqueue(selectors);
    }

    /// Runs the queued scans, forever.
    pub async fn run_scans(&self, purged: Arc<dyn PurgedRecords>) {
        self.scans.run_all(&self.records, purged).await;
    }
}

/// What a key holds.
enum KeyContents {
    Found(TierRecord),
    VaryMarker(Vec<HeaderName>),
}
