//! The write-behind queue to Redis: bounded, and no request waits for it.
//!
//! When it is full, the oldest task is dropped and counted. Lookups see the entries in it.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http::header::HeaderName;
use tokio::sync::{Notify, Semaphore, oneshot};
use tracing::debug;

use super::record::random_salt;
use super::record_store::RecordStore;
use crate::policy::entry::Entry;
use crate::policy::invalidation::ledger::Position;
use crate::policy::invalidation::log_position::SeenLog;
use crate::redis::{RecordClass, RedisErrorKind};

/// Maximum number of waiting tasks, whatever their size.
const MAX_TASKS: usize = 10_000;

/// Maximum number of concurrent writes.
const MAX_CONCURRENT_WRITES: usize = 8;

/// A write that timed out is retried this many times.
const MAX_TIMEOUTS: u32 = 3;

/// Pause before a task is tried again.
const RETRY_PAUSE: Duration = Duration::from_millis(25);

/// An entry to be written.
#[derive(Debug)]
pub(super) struct PendingWrite {
    pub(super) class: RecordClass,
    pub(super) key: String,
    pub(super) entry: Arc<Entry>,
    /// The plain key, and the header names of the vary marker to write there.
    pub(super) vary_marker: Option<(String, Vec<HeaderName>)>,
    pub(super) ttl: Duration,
    pub(super) written: oneshot::Sender<()>,
}

#[derive(Debug)]
pub(super) enum QueueTask {
    Write(PendingWrite),
    Remove { class: RecordClass, key: String },
}

/// The write-behind queue.
#[derive(Debug)]
pub(super) struct WriteBehindQueue {
    queue: Mutex<QueueState>,
    max_bytes: u64,
    more: Notify,
    written: AtomicU64,
    dropped: AtomicU64,
    failed: AtomicU64,
}

#[derive(Debug, Default)]
struct QueueState {
    tasks: VecDeque<QueueTask>,
    /// The latest entry to be written, by key.
    waiting: HashMap<String, Arc<Entry>>,
    bytes: u64,
}

/// The state of the queue, as in `/stats`.
#[derive(Debug, Clone, serde::Serialize)]
pub struct WriteBehindState {
    /// Waiting tasks.
    pub waiting: usize,
    /// Size of the waiting entries, in bytes.
    pub bytes: u64,
    /// Maximum of `bytes`.
    pub max_bytes: u64,
    /// Records written.
    pub written: u64,
    /// Records dropped because the queue was full.
    pub dropped: u64,
    /// Records that Redis refused.
    pub failed: u64,
}

impl WriteBehindQueue {
    pub(super) fn new(max_bytes: u64) -> WriteBehindQueue {
        let [written, dropped, failed] = [0; 3].map(AtomicU64::new);
        WriteBehindQueue { queue: Mutex::default(), max_bytes, more: Notify::new(), written, dropped, failed }
    }

    fn lock(&self) -> MutexGuard<'_, QueueState> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a task. Drops the oldest tasks while the queue is over a limit.
    pub(super) fn push(&self, task: QueueTask) {
        let mut queue = self.lock();
        queue.add(task);
        while queue.bytes > self.max_bytes || queue.tasks.len() > MAX_TASKS {
            let Some(task) = queue.tasks.pop_front() else { break };
            queue.forget(&task);
            self.dropped.fetch_add(1, Relaxed);
        }
        drop(queue);
        self.more.notify_one();
    }

    /// Returns the entry that waits to be written under a key.
    pub(super) fn waiting(&self, key: &str) -> Option<Arc<Entry>> {
        self.lock().waiting.get(key).cloned()
    }

    async fn next(&self) -> QueueTask {
        loop {
            if let Some(task) = self.lock().tasks.pop_front() {
                return task;
            }
            self.more.notified().await;
        }
    }

    pub(super) fn state(&self) -> WriteBehindState {
        let queue = self.lock();
        WriteBehindState {
            waiting: queue.tasks.len(),
            bytes: queue.bytes,
            max_bytes: self.max_bytes,
            written: self.written.load(Relaxed),
            dropped: self.dropped.load(Relaxed),
            failed: self.failed.load(Relaxed),
        }
    }
}

impl QueueState {
    fn add(&mut self, task: QueueTask) {
        match &task {
            QueueTask::Write(writing) => {
                self.bytes += writing.entry.weight();
                self.waiting.insert(writing.key.clone(), writing.entry.clone());
            }
            QueueTask::Remove { key, .. } => drop(self.waiting.remove(key)),
        }
        self.tasks.push_back(task);
    }

    /// Accounts for a task that is done or dropped.
    fn forget(&mut self, task: &QueueTask) {
        let QueueTask::Write(writing) = task else { return };
        self.bytes = self.bytes.saturating_sub(writing.entry.weight());
        if self.waiting.get(&writing.key).is_some_and(|entry| Arc::ptr_eq(entry, &writing.entry)) {
            self.waiting.remove(&writing.key);
        }
    }
}

/// The result of an attempt.
enum WriteResult {
    Done,
    /// Redis refused the command, or the entry can't be written.
    Refused,
    /// The command could not be sent.
    Later,
    /// No reply in time: the record may be too large to write.
    Silent,
}

impl WriteBehindQueue {
    /// Processes the queue, forever. `seen_at` returns the last log entry that a fetch at a position had seen.
    pub(super) async fn write(
        self: Arc<Self>,
        records: Arc<RecordStore>,
        seen_at: impl Fn(Position) -> SeenLog + Send + Sync + 'static,
    ) {
        let (places, seen_at) = (Arc::new(Semaphore::new(MAX_CONCURRENT_WRITES)), Arc::new(seen_at));
        loop {
            let Ok(place) = places.clone().acquire_owned().await else { return };
            let task = self.next().await;
            let (behind, records, seen_at) = (self.clone(), records.clone(), seen_at.clone());
            tokio::spawn(async move {
                behind.run_task(task, &records, &*seen_at).await;
                drop(place);
            });
        }
    }

    /// Runs a task until it is done, refused or superseded, or has timed out too often.
    async fn run_task(
        &self,
        task: QueueTask,
        records: &RecordStore,
        seen_at: &(impl Fn(Position) -> SeenLog + ?Sized),
    ) {
        let mut silences = 0;
        loop {
            if self.superseded(&task) {
                return self.lock().forget(&task);
            }
            match try_task(&task, records, seen_at).await {
                WriteResult::Later => tokio::time::sleep(RETRY_PAUSE).await,
                WriteResult::Silent if silences < MAX_TIMEOUTS => {
                    silences += 1;
                    tokio::time::sleep(RETRY_PAUSE).await;
                }
                WriteResult::Refused | WriteResult::Silent => {
                    self.failed.fetch_add(1, Relaxed);
                    self.lock().forget(&task);
                    return;
                }
                WriteResult::Done => {
                    self.written.fetch_add(1, Relaxed);
                    let removed = matches!(&task, QueueTask::Write(writing) if self.waiting(&writing.key).is_none());
                    self.lock().forget(&task);
                    if let QueueTask::Write(writing) = task {
                        if removed {
                            // A removal queued meanwhile may have run before this write.
                            self.push(QueueTask::Remove { class: writing.class, key: writing.key });
                            return;
                        }
                        // The receiver is usually dropped.
                        let _ = writing.written.send(());
                    }
                    return;
                }
            }
        }
    }

    /// Returns true if a newer entry or a removal has been queued for the same key.
    fn superseded(&self, task: &QueueTask) -> bool {
        let QueueTask::Write(writing) = task else { return false };
        !self.waiting(&writing.key).is_some_and(|entry| Arc::ptr_eq(&entry, &writing.entry))
    }
}

async fn try_task(
    task: &QueueTask,
    records: &RecordStore,
    seen_at: &(impl Fn(Position) -> SeenLog + ?Sized),
) -> WriteResult {
    let done = match task {
        QueueTask::Remove { class, key } => records.redis.remove(*class, key).await,
        QueueTask::Write(writing) => {
            let (received_at, seen) =
                match (records.redis.clock().at(writing.entry.received_at), seen_at(writing.entry.position)) {
                    (Some(received_at), SeenLog::UpTo(seen)) => (received_at, seen),
                    (None, _) | (_, SeenLog::NotYet) => return WriteResult::Later,
                    (Some(_), SeenLog::Forgotten) => return WriteResult::Refused,
                };
            let codec = records.codec();
            let Some(record) = codec.encode_response(&writing.entry, received_at, seen, &writing.key, random_salt())
            else {
                return WriteResult::Refused;
            };
            let written = records.redis.write(writing.class, &writing.key, record.into(), writing.ttl).await;
            match (&writing.vary_marker, written) {
                (Some((plain, names)), Ok(())) => match codec.encode_vary_marker(names, plain, random_salt()) {
                    Some(post) => records.redis.write(writing.class, plain, post.into(), writing.ttl).await,
                    None => Ok(()),
                },
                (_, written) => written,
            }
        }
    };
    match done {
        Ok(()) => WriteResult::Done,
        Err(error) if error.why == RedisErrorKind::Refused => {
            debug!(%error, "a record was not written to Redis");
            WriteResult::Refused
        }
        Err(error) if error.why == RedisErrorKind::Silent => WriteResult::Silent,
        Err(_) => WriteResult::Later,
    }
}
