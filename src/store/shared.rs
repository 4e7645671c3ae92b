//! The tier that a fleet shares: records in Redis. Reading is part of a flight; writing waits in a bounded queue
//! behind it (`behind.rs`).
//!
//! Keys are made of digests: `{prefix}:1:{s|p}:{digest of the key}`, and, where an answer depends on request headers,
//! `:{digest of these}` behind it. A rule suggests which headers that are; where an answer depends on others, a
//! signpost lies under the plain key.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use http::header::{HeaderMap, HeaderName};
use tracing::debug;

use super::behind::{Behind, Task, Writing};
use super::records::Records;
use super::walk::Walks;
use super::wire::{Answer, HEAD, Record, Sealing, Unreadable};
use crate::policy::chain::Seen;
use crate::policy::entry::Entry;
use crate::policy::invalidation::{Position, Selector};
use crate::policy::variant::Variant;
use crate::redis::{Redis, Trouble};

/// Beyond all windows of a record, before Redis collects it.
const MARGIN: Duration = Duration::from_mins(1);

/// No record lives longer than this in Redis.
const LONGEST: Duration = Duration::from_hours(31 * 24);

pub use super::records::Place;

/// The tier.
#[derive(Debug)]
pub struct Shared {
    records: Arc<Records>,
    behind: Arc<Behind>,
    walks: Walks,
    counts: Counts,
}

#[derive(Debug, Default)]
struct Counts {
    hits: AtomicU64,
    misses: AtomicU64,
    errors: AtomicU64,
    forged: AtomicU64,
}

/// What `/stats` says of it.
#[derive(Debug, Clone, serde::Serialize)]
pub struct State {
    /// Records found.
    pub hits: u64,
    /// Nothing found.
    pub misses: u64,
    /// Redis could not be asked: counted as a miss by whoever asked.
    pub errors: u64,
    /// Records that did not verify.
    pub forged: u64,
    /// What waits to be written.
    pub queue: super::behind::State,
    /// Walks that remove what was purged by the look of its URL.
    pub walks: super::walk::State,
}

/// A record that was found.
#[derive(Debug)]
pub enum Found {
    /// It lay in Redis.
    Answer(Box<Answer>),
    /// It still waits to be written.
    Waiting(Arc<Entry>),
}

impl Shared {
    /// The tier in this Redis, below this prefix.
    pub fn new(redis: Arc<Redis>, prefix: &str, sealing: Sealing, max_waiting: u64) -> Shared {
        Shared {
            records: Arc::new(Records::new(redis, prefix, sealing)),
            behind: Arc::new(Behind::new(max_waiting)),
            walks: Walks::default(),
            counts: Counts::default(),
        }
    }

    /// From now on records are sealed so.
    pub fn seal_with(&self, change: impl FnOnce(&Sealing) -> Sealing) {
        self.records.seal_with(change);
    }

    /// Where the record for a key lies.
    pub fn place(&self, key: &[u8]) -> Place {
        self.records.place(key)
    }

    /// Looks for the record of a request. `usual`: the request headers that its answers probably depend on.
    pub async fn look(
        &self,
        place: &Place,
        usual: &[HeaderName],
        request: &HeaderMap,
    ) -> Result<Option<Found>, Trouble> {
        let guess = Variant::of(usual.to_vec(), request);
        match self.read(place, &place.of(&guess)).await? {
            Some(Read::Found(found)) => return Ok(Some(found)),
            Some(Read::Signpost(names)) if names != usual => return self.look_there(place, names, request).await,
            Some(Read::Signpost(_)) => {}
            None if guess.0.is_empty() => {}
            None => match self.read(place, &place.plain).await? {
                Some(Read::Signpost(names)) if names != usual => return self.look_there(place, names, request).await,
                // A plain record is for all who ask, whatever their headers.
                Some(Read::Found(found)) => return Ok(Some(found)),
                Some(Read::Signpost(_)) | None => {}
            },
        }
        self.counts.misses.fetch_add(1, Relaxed);
        Ok(None)
    }

    async fn look_there(
        &self,
        place: &Place,
        names: Vec<HeaderName>,
        request: &HeaderMap,
    ) -> Result<Option<Found>, Trouble> {
        match self.read(place, &place.of(&Variant::of(names, request))).await? {
            Some(Read::Found(found)) => Ok(Some(found)),
            Some(Read::Signpost(_)) | None => {
                self.counts.misses.fetch_add(1, Relaxed);
                Ok(None)
            }
        }
    }

    /// What lies under one key, if it is ours.
    async fn read(&self, place: &Place, key: &str) -> Result<Option<Read>, Trouble> {
        if let Some(entry) = self.behind.waiting(key) {
            self.counts.hits.fetch_add(1, Relaxed);
            return Ok(Some(Read::Found(Found::Waiting(entry))));
        }
        let most = self.records.sealing().longest();
        let read = self.records.redis.read_start(place.class, key, most).await.inspect_err(|_| {
            self.counts.errors.fetch_add(1, Relaxed);
        })?;
        let Some(bytes) = Some(read).filter(|bytes| !bytes.is_empty()) else { return Ok(None) };
        match self.records.sealing().open(&bytes, key) {
            Ok(Record::Answer(answer)) => {
                self.counts.hits.fetch_add(1, Relaxed);
                Ok(Some(Read::Found(Found::Answer(answer))))
            }
            Ok(Record::Signpost(names)) => Ok(Some(Read::Signpost(names))),
            Err(Unreadable::NotForUs) => Ok(None),
            Err(Unreadable::Forged) => {
                self.counts.forged.fetch_add(1, Relaxed);
                debug!(key, "a record does not verify: removed");
                let start = bytes.slice(..bytes.len().min(HEAD));
                // If it can't be removed now, its TTL does it, or the next reader.
                let _ = self.records.redis.remove_unchanged(place.class, key, start).await;
                Ok(None)
            }
        }
    }

    /// Stores an entry behind the caller's back. The receiver hears when it is written, or fails when it will not be.
    pub fn keep(
        &self,
        key: &[u8],
        entry: &Arc<Entry>,
        usual: &[HeaderName],
        resident: u64,
    ) -> tokio::sync::oneshot::Receiver<()> {
        let place = self.place(key);
        let names: Vec<HeaderName> = entry.variant.0.iter().map(|(name, _)| name.clone()).collect();
        let ttl = Duration::from_millis(entry.terms.keep_for().saturating_sub(resident)).min(LONGEST) + MARGIN;
        let at = place.of(&entry.variant);
        let signpost = (names != usual && *at != *place.plain).then(|| (place.plain.to_string(), names));
        let (written, receiver) = tokio::sync::oneshot::channel();
        let write = Writing { class: place.class, key: at, entry: entry.clone(), signpost, ttl, written };
        self.behind.push(Task::Write(write));
        receiver
    }

    /// Forgets what a request selected.
    pub fn forget(&self, key: &[u8], variant: &Variant) {
        let place = self.place(key);
        self.behind.push(Task::Remove { class: place.class, key: place.of(variant) });
    }

    /// How it is.
    pub fn state(&self) -> State {
        State {
            hits: self.counts.hits.load(Relaxed),
            misses: self.counts.misses.load(Relaxed),
            errors: self.counts.errors.load(Relaxed),
            forged: self.counts.forged.load(Relaxed),
            queue: self.behind.state(),
            walks: self.walks.state(),
        }
    }

    /// Writes what waits, for ever. `seen_at` says which log entry something fetched at a position had seen.
    pub async fn write_behind(&self, seen_at: impl Fn(Position) -> Seen + Send + Sync + 'static) {
        self.behind.clone().write(self.records.clone(), seen_at).await;
    }

    /// Removes, behind the caller's back, what these selectors name by the look of the URL, or with everything.
    pub fn clear(&self, selectors: Vec<Selector>) {
        self.walks.ask(selectors);
    }

    /// Makes the walks that are asked for, for ever.
    pub async fn clear_purged(&self) {
        self.walks.make(&self.records).await;
    }
}

/// What lay under one key.
enum Read {
    Found(Found),
    Signpost(Vec<HeaderName>),
}
