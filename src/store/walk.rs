//! Removes from Redis what was purged by the look of its URL, or with everything: a walk over all keys, in steps, which
//! looks at the URL in each record's head. Nothing depends on it being done: purged records don't count anyway; this
//! gives their memory back. Patterns never reach Redis: they are matched here.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::{JoinError, JoinSet};
use tracing::{debug, info};

use super::records::Records;
use super::wire::{HEAD, meta_end};
use crate::policy::invalidation::{Address, Selector};
use crate::redis::{Class, Cursor, Trouble};

/// Walks that may wait. One that finds no room is not made: TTLs do its work, later.
const MAX_WAITING: usize = 100;

/// Records looked at at once.
const AT_ONCE: usize = 8;

/// So much of a record is read to see its URL: with most, that is enough.
const FIRST: usize = 2 << 10;

/// After a step that failed; a walk that fails so often in a row ends, and so does what is done to one record.
const PAUSE: Duration = Duration::from_millis(100);
const PATIENCE: u32 = 100;
const PATIENCE_WITH_ONE: u32 = 5;

/// Walks to be made.
#[derive(Debug)]
pub(super) struct Walks {
    queue: mpsc::Sender<Vec<Selector>>,
    waiting: tokio::sync::Mutex<mpsc::Receiver<Vec<Selector>>>,
    running: AtomicU64,
    scanned: AtomicU64,
    removed: AtomicU64,
}

/// What `/stats` says of walks.
#[derive(Debug, Clone, serde::Serialize)]
pub struct State {
    /// Under way or waiting.
    pub running: u64,
    /// Keys looked at, by all walks.
    pub scanned: u64,
    /// Records removed, by all walks.
    pub removed: u64,
}

impl Default for Walks {
    fn default() -> Self {
        let (queue, waiting) = mpsc::channel(MAX_WAITING);
        let [running, scanned, removed] = [0; 3].map(AtomicU64::new);
        Walks { queue, waiting: tokio::sync::Mutex::new(waiting), running, scanned, removed }
    }
}

impl Walks {
    /// Asks for one.
    pub(super) fn ask(&self, mut selectors: Vec<Selector>) {
        selectors.retain(|selector| matches!(selector, Selector::Matching(_) | Selector::Everything));
        if !selectors.is_empty() && self.queue.try_send(selectors).is_ok() {
            self.running.fetch_add(1, Relaxed);
        }
    }

    /// Makes them, one after the other, for ever.
    pub(super) async fn make(&self, records: &Arc<Records>) {
        let mut waiting = self.waiting.lock().await;
        while let Some(selectors) = waiting.recv().await {
            let selectors: Arc<[Selector]> = selectors.into();
            for class in [Class::Shared, Class::Private] {
                if let Err(trouble) = self.walk(records, class, &selectors).await {
                    debug!(%trouble, "a walk was given up: what it did not reach goes with its TTL");
                }
            }
            self.running.fetch_sub(1, Relaxed);
            let State { scanned, removed, .. } = self.state();
            info!(scanned, removed, "removed from redis what was purged");
        }
    }

    pub(super) fn state(&self) -> State {
        State {
            running: self.running.load(Relaxed),
            scanned: self.scanned.load(Relaxed),
            removed: self.removed.load(Relaxed),
        }
    }

    async fn walk(&self, records: &Arc<Records>, class: Class, selectors: &Arc<[Selector]>) -> Result<(), Trouble> {
        let (prefix, mut cursor, mut failures) = (records.keys_of(class), Some(Cursor::default()), 0);
        while let Some(at) = cursor.take() {
            let (keys, next) = match records.redis.walk(class, &prefix, at.clone()).await {
                Ok(step) => step,
                Err(trouble) if failures >= PATIENCE => return Err(trouble),
                Err(_) => {
                    failures += 1;
                    tokio::time::sleep(PAUSE).await;
                    cursor = Some(at);
                    continue;
                }
            };
            (failures, cursor) = (0, next);
            self.scanned.fetch_add(keys.len() as u64, Relaxed);
            let mut looking = JoinSet::new();
            for key in keys {
                if looking.len() >= AT_ONCE {
                    self.note(looking.join_next().await.as_ref());
                }
                let (records, selectors) = (records.clone(), selectors.clone());
                looking.spawn(async move {
                    let mut looked = remove_if_named(&records, class, &key, &selectors).await;
                    for _ in 0..PATIENCE_WITH_ONE {
                        if looked.is_ok() {
                            break;
                        }
                        tokio::time::sleep(PAUSE).await;
                        looked = remove_if_named(&records, class, &key, &selectors).await;
                    }
                    looked
                });
            }
            while let Some(looked) = looking.join_next().await {
                self.note(Some(&looked));
            }
        }
        Ok(())
    }

    /// What can't be looked at goes with its TTL.
    fn note(&self, looked: Option<&Result<Result<bool, Trouble>, JoinError>>) {
        if let Some(Ok(Ok(true))) = looked {
            self.removed.fetch_add(1, Relaxed);
        }
    }
}

async fn remove_if_named(
    records: &Records,
    class: Class,
    key: &str,
    selectors: &[Selector],
) -> Result<bool, Trouble> {
    let everything = selectors.iter().any(|selector| matches!(selector, Selector::Everything));
    let mut start = records.redis.read_start(class, key, FIRST).await?;
    if !everything {
        if let Some(end) = meta_end(&start).filter(|end| *end > start.len() && start.len() == FIRST) {
            start = records.redis.read_start(class, key, end).await?;
        }
        let Some(glimpse) = records.sealing().glimpse(&start, key) else { return Ok(false) };
        let address = Address {
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
    let unchanged = start.slice(..start.len().min(HEAD));
    records.redis.remove_unchanged(class, key, unchanged).await
}
