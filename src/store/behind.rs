//! What waits to be written to Redis: bounded, and never waited for. When it is full the oldest goes, and is counted.
//! Look-ups see what is in it.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http::header::HeaderName;
use tokio::sync::{Notify, Semaphore, oneshot};
use tracing::debug;

use super::records::Records;
use super::wire::salt;
use crate::policy::chain::Seen;
use crate::policy::entry::Entry;
use crate::policy::invalidation::Position;
use crate::redis::{Class, Why};

/// Tasks that may wait, whatever their size.
const MAX_TASKS: usize = 10_000;

/// Writes under way at once.
const AT_ONCE: usize = 8;

/// A write that was not answered so often is given up.
const SILENCES: u32 = 3;

/// After a write that could not be tried.
const PAUSE: Duration = Duration::from_millis(25);

/// An entry on its way.
#[derive(Debug)]
pub(super) struct Writing {
    pub(super) class: Class,
    pub(super) key: String,
    pub(super) entry: Arc<Entry>,
    /// The plain key, and what a signpost there is to say.
    pub(super) signpost: Option<(String, Vec<HeaderName>)>,
    pub(super) ttl: Duration,
    pub(super) written: oneshot::Sender<()>,
}

#[derive(Debug)]
pub(super) enum Task {
    Write(Writing),
    Remove { class: Class, key: String },
}

/// The queue.
#[derive(Debug)]
pub(super) struct Behind {
    queue: Mutex<Queue>,
    max_bytes: u64,
    more: Notify,
    written: AtomicU64,
    dropped: AtomicU64,
    failed: AtomicU64,
}

#[derive(Debug, Default)]
struct Queue {
    tasks: VecDeque<Task>,
    /// By key: what is to be written last.
    waiting: HashMap<String, Arc<Entry>>,
    bytes: u64,
}

/// What `/stats` says of the queue.
#[derive(Debug, Clone, serde::Serialize)]
pub struct State {
    /// Tasks that wait.
    pub waiting: usize,
    /// Bytes that wait.
    pub bytes: u64,
    /// The most that may.
    pub max_bytes: u64,
    /// Records written.
    pub written: u64,
    /// Records dropped because the queue was full.
    pub dropped: u64,
    /// Records that Redis refused.
    pub failed: u64,
}

impl Behind {
    pub(super) fn new(max_bytes: u64) -> Behind {
        let [written, dropped, failed] = [0; 3].map(AtomicU64::new);
        Behind { queue: Mutex::default(), max_bytes, more: Notify::new(), written, dropped, failed }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a task; what is oldest goes if there is no room.
    pub(super) fn push(&self, task: Task) {
        let mut queue = self.lock();
        queue.add(task);
        while queue.bytes > self.max_bytes || queue.tasks.len() > MAX_TASKS {
            let Some(task) = queue.tasks.pop_front() else { break };
            queue.leaves(&task);
            self.dropped.fetch_add(1, Relaxed);
        }
        drop(queue);
        self.more.notify_one();
    }

    /// What waits under a key.
    pub(super) fn waiting(&self, key: &str) -> Option<Arc<Entry>> {
        self.lock().waiting.get(key).cloned()
    }

    async fn next(&self) -> Task {
        loop {
            if let Some(task) = self.lock().tasks.pop_front() {
                return task;
            }
            self.more.notified().await;
        }
    }

    pub(super) fn state(&self) -> State {
        let queue = self.lock();
        State {
            waiting: queue.tasks.len(),
            bytes: queue.bytes,
            max_bytes: self.max_bytes,
            written: self.written.load(Relaxed),
            dropped: self.dropped.load(Relaxed),
            failed: self.failed.load(Relaxed),
        }
    }
}

impl Queue {
    fn add(&mut self, task: Task) {
        match &task {
            Task::Write(writing) => {
                self.bytes += writing.entry.weight();
                self.waiting.insert(writing.key.clone(), writing.entry.clone());
            }
            Task::Remove { key, .. } => drop(self.waiting.remove(key)),
        }
        self.tasks.push_back(task);
    }

    /// A task is done, or dropped.
    fn leaves(&mut self, task: &Task) {
        let Task::Write(writing) = task else { return };
        self.bytes = self.bytes.saturating_sub(writing.entry.weight());
        if self.waiting.get(&writing.key).is_some_and(|entry| Arc::ptr_eq(entry, &writing.entry)) {
            self.waiting.remove(&writing.key);
        }
    }
}

/// What becomes of an attempt.
enum Tried {
    Done,
    /// Redis does not want it.
    Refused,
    /// Redis could not be asked.
    Later,
    /// Redis did not answer in time: it may be too much to write.
    Silent,
}

impl Behind {
    /// Writes what waits, for ever. `seen_at` says which log entry something fetched at a position had seen.
    pub(super) async fn write(
        self: Arc<Self>,
        records: Arc<Records>,
        seen_at: impl Fn(Position) -> Seen + Send + Sync + 'static,
    ) {
        let (places, seen_at) = (Arc::new(Semaphore::new(AT_ONCE)), Arc::new(seen_at));
        loop {
            let Ok(place) = places.clone().acquire_owned().await else { return };
            let task = self.next().await;
            let (behind, records, seen_at) = (self.clone(), records.clone(), seen_at.clone());
            tokio::spawn(async move {
                behind.carry_out(task, &records, &*seen_at).await;
                drop(place);
            });
        }
    }

    /// Tries until Redis has it or does not want it.
    async fn carry_out(&self, task: Task, records: &Records, seen_at: &(impl Fn(Position) -> Seen + ?Sized)) {
        let mut silences = 0;
        loop {
            if self.superseded(&task) {
                return self.lock().leaves(&task);
            }
            match attempt(&task, records, seen_at).await {
                Tried::Later => tokio::time::sleep(PAUSE).await,
                Tried::Silent if silences < SILENCES => {
                    silences += 1;
                    tokio::time::sleep(PAUSE).await;
                }
                Tried::Refused | Tried::Silent => {
                    self.failed.fetch_add(1, Relaxed);
                    self.lock().leaves(&task);
                    return;
                }
                Tried::Done => {
                    self.written.fetch_add(1, Relaxed);
                    let removed = matches!(&task, Task::Write(writing) if self.waiting(&writing.key).is_none());
                    self.lock().leaves(&task);
                    if let Task::Write(writing) = task {
                        if removed {
                            // A removal that came meanwhile may have overtaken it.
                            self.push(Task::Remove { class: writing.class, key: writing.key });
                            return;
                        }
                        // Most don't wait for it.
                        let _ = writing.written.send(());
                    }
                    return;
                }
            }
        }
    }

    /// Has a newer entry, or a removal, come for the same key since?
    fn superseded(&self, task: &Task) -> bool {
        let Task::Write(writing) = task else { return false };
        !self.waiting(&writing.key).is_some_and(|entry| Arc::ptr_eq(&entry, &writing.entry))
    }
}

async fn attempt(task: &Task, records: &Records, seen_at: &(impl Fn(Position) -> Seen + ?Sized)) -> Tried {
    let done = match task {
        Task::Remove { class, key } => records.redis.remove(*class, key).await,
        Task::Write(writing) => {
            let (born, seen) = match (records.redis.time().at(writing.entry.born), seen_at(writing.entry.position)) {
                (Some(born), Seen::UpTo(seen)) => (born, seen),
                (None, _) | (_, Seen::NotYet) => return Tried::Later,
                (Some(_), Seen::Forgotten) => return Tried::Refused,
            };
            let sealing = records.sealing();
            let Some(record) = sealing.answer(&writing.entry, born, seen, &writing.key, salt()) else {
                return Tried::Refused;
            };
            let written = records.redis.write(writing.class, &writing.key, record.into(), writing.ttl).await;
            match (&writing.signpost, written) {
                (Some((plain, names)), Ok(())) => match sealing.signpost(names, plain, salt()) {
                    Some(post) => records.redis.write(writing.class, plain, post.into(), writing.ttl).await,
                    None => Ok(()),
                },
                (_, written) => written,
            }
        }
    };
    match done {
        Ok(()) => Tried::Done,
        Err(trouble) if trouble.why == Why::Refused => {
            debug!(%trouble, "a record was not written");
            Tried::Refused
        }
        Err(trouble) if trouble.why == Why::Silent => Tried::Silent,
        Err(_) => Tried::Later,
    }
}
