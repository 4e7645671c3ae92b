//! Scans (SCAN) that remove from Redis the records purged by URL pattern, or by a purge of everything.
//!
//! A scan visits all keys in steps and compares the URL in each record's meta part. It only frees memory: purged
//! records are not used in any case. Patterns are never sent to Redis; they are matched here.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::{JoinError, JoinSet};
use tracing::{debug, info};

use super::record::{HEADER_BYTES, meta_end};
use super::record_store::RecordStore;
use crate::policy::invalidation::ledger::{ResourceId, Selector};
use crate::redis::{RecordClass, RedisError, ScanCursor};

/// Maximum number of waiting scans. A scan beyond it is dropped: its records expire by their TTL.
const MAX_WAITING: usize = 100;

/// Maximum number of concurrent reads of records.
const MAX_CONCURRENT_READS: usize = 8;

/// Size of the first read of a record, in bytes: enough for the URL of most records.
const FIRST_READ: usize = 2 << 10;

/// Pause after a failure. A scan ends after `MAX_FAILURES` failed steps in a row. A record is skipped after
/// `MAX_RECORD_RETRIES` retries.
const RETRY_PAUSE: Duration = Duration::from_millis(100);
const MAX_FAILURES: u32 = 100;
const MAX_RECORD_RETRIES: u32 = 5;

/// The queue of scans.
#[derive(Debug)]
pub(super) struct ScanQueue {
    queue: mpsc::Sender<Vec<Selector>>,
    waiting: tokio::sync::Mutex<mpsc::Receiver<Vec<Selector>>>,
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
    /// Queues a scan for the selectors that need one: URL patterns, and the selector for everything.
    pub(super) fn enqueue(&self, mut selectors: Vec<Selector>) {
        selectors.retain(|selector| matches!(selector, Selector::Matching(_) | Selector::Everything));
        if !selectors.is_empty() && self.queue.try_send(selectors).is_ok() {
            self.running.fetch_add(1, Relaxed);
        }
    }

    /// Runs the queued scans one after the other, forever.
    pub(super) async fn run_all(&self, records: &Arc<RecordStore>) {
        let mut waiting = self.waiting.lock().await;
        while let Some(selectors) = waiting.recv().await {
            let selectors: Arc<[Selector]> = selectors.into();
            for class in [RecordClass::Shared, RecordClass::Private] {
                if let Err(error) = self.scan(records, class, &selectors).await {
                    debug!(%error, "a scan was aborted: records that it did not reach expire with their TTL");
                }
            }
            self.running.fetch_sub(1, Relaxed);
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
        selectors: &Arc<[Selector]>,
    ) -> Result<(), RedisError> {
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
            let mut looking = JoinSet::new();
            for cache_key in keys {
                if looking.len() >= MAX_CONCURRENT_READS {
                    self.count(looking.join_next().await.as_ref());
                }
                let (records, selectors) = (records.clone(), selectors.clone());
                looking.spawn(async move {
                    let mut looked = remove_if_named(&records, class, &cache_key, &selectors).await;
                    for _ in 0..MAX_RECORD_RETRIES {
                        if looked.is_ok() {
                            break;
                        }
                        tokio::time::sleep(RETRY_PAUSE).await;
                        looked = remove_if_named(&records, class, &cache_key, &selectors).await;
                    }
                    looked
                });
            }
            while let Some(looked) = looking.join_next().await {
                self.count(Some(&looked));
            }
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

async fn remove_if_named(
    records: &RecordStore,
    class: RecordClass,
    key: &str,
    selectors: &[Selector],
) -> Result<bool, RedisError> {
    let everything = selectors.iter().any(|selector| matches!(selector, Selector::Everything));
    let mut start = records.redis.read_start(class, key, FIRST_READ).await?;
    if !everything {
        if let Some(end) = meta_end(&start).filter(|end| *end > start.len() && start.len() == FIRST_READ) {
            start = records.redis.read_start(class, key, end).await?;
        }
        let Some(glimpse) = records.codec().read_header(&start, key) else { return Ok(false) };
        let address = ResourceId {
            upstream: glimpse.address.upstream,
            authority: glimpse.address.authority.into(),
            target: glimpse.address.target.into(),
            subjects: Box::default(),
        };
        let named = |selector: &Selector| matches!(selector, Selector::Matching(m) if m.matches(&address));
        if !selectors.iter().any(named) {
            return Ok(false);
        }
    }
    let unchanged = start.slice(..start.len().min(HEADER_BYTES));
    records.redis.remove_unchanged(class, key, unchanged).await
}
