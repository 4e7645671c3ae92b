//! Scans (SCAN) that remove from Redis the records purged by URL pattern, or by a purge of everything.
//!
//! A scan visits all keys in steps, at a bounded rate, and asks the invalidations about the URL and the log entry in each
//! record's meta part: what was fetched after the purge stays. It only frees memory: purged records are not used in any
//! case. Patterns are never sent to Redis; they are matched here.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::{JoinError, JoinSet};
use tracing::{debug, info};

use super::record::{HEADER_BYTES, RecordHeader, meta_end};
use super::record_store::RecordStore;
use crate::policy::invalidation::ledger::{ResourceId, Selector};
use crate::policy::invalidation::log_position::LogId;
use crate::redis::{RecordClass, RedisError, ScanCursor};

/// Maximum number of waiting scans. A scan beyond it is dropped: its records expire by their TTL.
const MAX_WAITING: usize = 100;

/// Maximum number of concurrent reads of records.
const MAX_CONCURRENT_READS: usize = 8;

/// Size of the first read of a record, in bytes: enough for the URL of most records.
const FIRST_READ: usize = 2 << 10;

/// Maximum number of keys visited in a second.
const MAX_KEYS_PER_SECOND: u32 = 10_000;

/// Number of keys after which a scan logs its progress.
const PROGRESS_INTERVAL: usize = 100_000;

/// Time that a scan waits for its purge to be read back from the log, without which records can't be compared to it.
const WAIT_FOR_LOG: Duration = Duration::from_secs(30);

/// Pause after a failure. A scan ends after `MAX_FAILURES` failed steps in a row. A record is skipped after
/// `MAX_RECORD_RETRIES` retries.
const RETRY_PAUSE: Duration = Duration::from_millis(100);
const MAX_FAILURES: u32 = 100;
const MAX_RECORD_RETRIES: u32 = 5;

/// What a scan asks about records.
pub trait PurgedRecords: Send + Sync + 'static {
    /// Returns true if the log has all own purges, and they were read back from it.
    fn is_settled(&self) -> bool;

    /// Returns true if a hard purge applies to the record of a resource whose fetch had seen the log up to `seen`. Only
    /// URL patterns and the selector for everything are considered.
    fn is_gone(&self, resource: &ResourceId, seen: LogId) -> bool;
}

/// The queue of scans.
#[derive(Debug)]
pub(super) struct ScanQueue {
    queue: mpsc::Sender<()>,
    waiting: tokio::sync::Mutex<mpsc::Receiver<()>>,
    running: AtomicU64,
    scanned: AtomicU64,
    removed: AtomicU64,
}

/// The state of the scans, as in `/stats`.
#[derive(Debug, Clone, serde::Serialize)]
pub struct ScanState {
    /// Scans running or waiting.
    pub running: u64,
    /// Keys visited, by all scans.
    pub scanned: u64,
    /// Records removed, by all scans.
    pub removed: u64,
}

impl Default for ScanQueue {
    fn default() -> Self {
        let (queue, waiting) = mpsc::channel(MAX_WAITING);
        let [running, scanned, removed] = [0; 3].map(AtomicU64::new);
        ScanQueue { queue, waiting: tokio::sync::Mutex::new(waiting), running, scanned, removed }
    }
}

impl ScanQueue {
    /// Queues a scan if one of the selectors needs one: a URL pattern, or the selector for everything.
    pub(super) fn enqueue(&self, selectors: &[Selector]) {
        let needed = selectors.iter().any(|s| matches!(s, Selector::Matching(_) | Selector::Everything));
        if needed && self.queue.try_send(()).is_ok() {
            self.running.fetch_add(1, Relaxed);
        }
    }

    /// Runs the queued scans one after the other, forever.
    pub(super) async fn run_all(&self, records: &Arc<RecordStore>, purged: Arc<dyn PurgedRecords>) {
        let mut waiting = self.waiting.lock().await;
        while waiting.recv().await.is_some() {
            // One scan does for all that wait: it asks about all purges.
            let mut merged = 1;
            while waiting.try_recv().is_ok() {
                merged += 1;
            }
            let settled = async {
                while !purged.is_settled() {
                    tokio::time::sleep(RETRY_PAUSE).await;
                }
            };
            if tokio::time::timeout(WAIT_FOR_LOG, settled).await.is_err() {
                debug!("a scan was not made, because the log can't be written: records expire with their TTL");
                self.running.fetch_sub(merged, Relaxed);
                continue;
            }
            for class in [RecordClass::Shared, RecordClass::Private] {
                if let Err(error) = self.scan(records, class, &purged).await {
                    debug!(%error, "a scan was aborted: records that it did not reach expire with their TTL");
                }
            }
            self.running.fetch_sub(merged, Relaxed);
            let ScanState { scanned, removed, .. } = self.state();
            info!(scanned, removed, "purged records removed from Redis");
        }
    }

    pub(super) fn state(&self) -> ScanState {
        ScanState {
            running: self.running.load(Relaxed),
            scanned: self.scanned.load(Relaxed),
            removed: self.removed.load(Relaxed),
        }
    }

    async fn scan(
        &self,
        records: &Arc<RecordStore>,
        class: RecordClass,
        purged: &Arc<dyn PurgedRecords>,
    ) -> Result<(), RedisError> {
        let mut unreported = 0;
        let (prefix, mut cursor, mut failures) = (records.keys_of(class), Some(ScanCursor::default()), 0);
        while let Some(at) = cursor.take() {
            let (keys, next) = match records.redis.scan(class, &prefix, at.clone()).await {
                Ok(step) => step,
                Err(error) if failures >= MAX_FAILURES => return Err(error),
                Err(_) => {
                    failures += 1;
                    tokio::time::sleep(RETRY_PAUSE).await;
                    cursor = Some(at);
                    continue;
                }
            };
            (failures, cursor) = (0, next);
            self.scanned.fetch_add(keys.len() as u64, Relaxed);
            let pause = Duration::from_secs(1) / MAX_KEYS_PER_SECOND * u32::try_from(keys.len()).unwrap_or(u32::MAX);
            unreported += keys.len();
            if unreported >= PROGRESS_INTERVAL {
                unreported = 0;
                let ScanState { scanned, removed, .. } = self.state();
                info!(scanned, removed, "removing purged records from Redis");
            }
            let mut looking = JoinSet::new();
            for cache_key in keys {
                if looking.len() >= MAX_CONCURRENT_READS {
                    self.count(looking.join_next().await.as_ref());
                }
                let (records, purged) = (records.clone(), purged.clone());
                looking.spawn(async move {
                    let mut looked = remove_if_gone(&records, class, &cache_key, &*purged).await;
                    for _ in 0..MAX_RECORD_RETRIES {
                        if looked.is_ok() {
                            break;
                        }
                        tokio::time::sleep(RETRY_PAUSE).await;
                        looked = remove_if_gone(&records, class, &cache_key, &*purged).await;
                    }
                    looked
                });
            }
            while let Some(looked) = looking.join_next().await {
                self.count(Some(&looked));
            }
            tokio::time::sleep(pause).await;
        }
        Ok(())
    }

    /// Counts a removed record. Failures are ignored: a record that can't be read expires by its TTL.
    fn count(&self, looked: Option<&Result<Result<bool, RedisError>, JoinError>>) {
        if let Some(Ok(Ok(true))) = looked {
            self.removed.fetch_add(1, Relaxed);
        }
    }
}

async fn remove_if_gone(
    records: &RecordStore,
    class: RecordClass,
    key: &str,
    purged: &dyn PurgedRecords,
) -> Result<bool, RedisError> {
    let mut start = records.redis.read_start(class, key, FIRST_READ).await?;
    if let Some(end) = meta_end(&start).filter(|end| *end > start.len() && start.len() == FIRST_READ) {
        start = records.redis.read_start(class, key, end).await?;
    }
    let Some(RecordHeader { address, seen }) = records.codec().read_header(&start, key) else { return Ok(false) };
    let resource = ResourceId {
        upstream: address.upstream,
        authority: address.authority.into(),
        target: address.target.into(),
        subjects: Box::default(),
    };
    if !purged.is_gone(&resource, seen) {
        return Ok(false);
    }
    let unchanged = start.slice(..start.len().min(HEADER_BYTES));
    records.redis.remove_unchanged(class, key, unchanged).await
}
