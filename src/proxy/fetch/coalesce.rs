//! Request coalescing: one upstream fetch per key.
//!
//! The first request for a key becomes the *leader* and starts the fetch; requests that arrive while it runs become
//! *followers* (RFC 9211: `collapsed`). States of a fetch:
//!
//! * **pending**: the response head has not arrived. Requests join;
//! * **announced**: the head has arrived, the body streams to all who joined. Requests join until the body outgrows its
//!   buffer;
//! * **completed**: with a shared response, with one that can't be shared (each follower fetches for itself), or with a
//!   failure. The next request starts a new fetch.
//!
//! The fetch is a task of its own, so no client's disconnect ends it. If the task panics, its channel closes and all
//! followers retry.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http::{HeaderMap, Response, StatusCode};
use quick_cache::sync::Cache;
use tokio::sync::{oneshot, watch};

use crate::body::Body;
use crate::body::fanout::{Fanout, Reader};
use crate::fleet::invalidations::Invalidations;
use crate::policy::Tick;
use crate::policy::entry::Entry;
use crate::policy::http::vary::Variant;
use crate::policy::invalidation::ledger::{Position, ResourceId};
use crate::policy::outcome::{Failure, NotStored};
use crate::policy::packed_head::PackedHead;

/// Time for which requests for a key whose response could not be shared do not wait for each other.
const HIT_FOR_MISS: Duration = Duration::from_mins(2);

/// Keys remembered as hit-for-miss.
const MAX_HIT_FOR_MISS: usize = 10_000;

/// The result of a fetch, as all its followers see it.
#[derive(Debug, Clone)]
pub enum FetchResult {
    /// A response for all requests that it is valid for.
    Shared(Arc<SharedResponse>),
    /// The response can't be shared: the leader has it, each follower fetches for itself.
    NotShareable,
    /// The fleet had a record.
    FoundInFleet(Arc<Entry>),
    /// The leader's client disconnected before the fetch started: join again.
    Retry,
    /// No response.
    Failed(Failure),
}

/// A response that followers share.
#[derive(Debug)]
pub struct SharedResponse {
    /// The head as it will be stored.
    pub head: PackedHead,
    /// The upstream's status: 304 if it freshened the stored head.
    pub status: StatusCode,
    /// Set if the response is a failure.
    pub failure: Option<Failure>,
    /// Whether it is stored.
    pub stored: Result<(), NotStored>,
    /// The requests that it is valid for.
    pub variant: Variant,
    /// Whether it may answer requests other than the one that caused it.
    pub shareable: bool,
    /// Fields that are not stored, for the request that caused the fetch.
    pub unstored_fields: HeaderMap,
    /// Arrival of the head.
    pub received_at: Tick,
    /// Age at arrival in milliseconds. `None` if the upstream generated it for this request.
    pub initial_age: Option<u64>,
    /// The body.
    pub body: SharedBody,
}

/// The body of a shared response.
#[derive(Debug)]
pub enum SharedBody {
    /// Complete, and stored.
    Stored(Arc<Entry>),
    /// Streaming from the upstream.
    Streaming(Arc<Fanout>),
}

impl SharedResponse {
    /// Returns the body from its first byte.
    ///
    /// `None` if it has outgrown its buffer, or for a follower if the response needs validation: then it is for the
    /// request that caused the fetch only (RFC 9111 §4).
    pub fn body_for(&self, follower: bool) -> Option<Body> {
        if follower && !self.shareable {
            return None;
        }
        match &self.body {
            SharedBody::Stored(entry) => Some(Body::Full(entry.body.clone())),
            SharedBody::Streaming(fanout) => fanout.join().map(Body::Shared),
        }
    }
}

/// All running fetches, and the keys that are hit-for-miss.
#[derive(Debug)]
pub struct Coalescer {
    running: Mutex<HashMap<Box<[u8]>, Arc<RunningFetch>>>,
    hit_for_miss: Cache<u64, (Tick, Option<NotStored>)>,
    hasher: RandomState,
    invalidations: Arc<Invalidations>,
}

#[derive(Debug)]
struct RunningFetch {
    resource: ResourceId,
    position: Position,
    result: watch::Receiver<Option<FetchResult>>,
}

/// The role of a request that joins.
#[derive(Debug)]
pub enum JoinResult {
    /// No fetch was running: the holder of the [`Leader`] must run it.
    Lead(Leader, Follower),
    /// A fetch is running.
    Follow(Follower),
}

/// Why a key is hit-for-miss.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HitForMiss {
    /// Seconds until requests for the key wait for each other again.
    pub seconds_left: u64,
    /// Why the last response was not stored. `None`: its responses must be validated each time.
    pub reason: Option<NotStored>,
}

/// Waits for the result of a fetch.
#[derive(Debug)]
pub struct Follower {
    result: watch::Receiver<Option<FetchResult>>,
    /// Set for the leader.
    leader: Option<oneshot::Receiver<LeaderResult>>,
}

/// What only the leader gets.
#[derive(Debug)]
enum LeaderResult {
    /// A response that is not shared.
    Response(Response<Body>),
    /// A reader of the shared body, opened before its first byte could be dropped.
    Reader(Reader),
}

/// What one request gets from waiting.
#[derive(Debug)]
pub enum FollowerResult {
    /// The fetch completed; for the leader, with its reader of the body.
    Completed(FetchResult, Option<Body>),
    /// The fetch completed with a response for this request only.
    Unshared(Response<Body>),
    /// The fetch task ended without a result: retry.
    Lost,
}

/// The duty to run a fetch. Dropping it, also by panic, ends the fetch.
#[derive(Debug)]
pub struct Leader {
    coalescer: Arc<Coalescer>,
    /// The key under which others find the fetch. `None` if they don't.
    key: Option<Box<[u8]>>,
    result: watch::Sender<Option<FetchResult>>,
    leader: Option<oneshot::Sender<LeaderResult>>,
    /// Whether the leader's request still runs the fetch itself: if it is dropped then, followers retry.
    runs_in_request: bool,
}

impl Coalescer {
    /// Returns a coalescer without fetches. Purges decide which running fetches may still be joined.
    pub fn new(invalidations: Arc<Invalidations>) -> Coalescer {
        Coalescer {
            running: Mutex::default(),
            hit_for_miss: Cache::new(MAX_HIT_FOR_MISS),
            hasher: RandomState::new(),
            invalidations,
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Box<[u8]>, Arc<RunningFetch>>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Joins the fetch for a key, or starts one. A fetch that began before a purge of its resource is not joined: it
    /// goes on for the followers it has, and a new one takes its place.
    ///
    /// A fetch may have completed since the caller's lookup: `recheck` looks again before a new one starts, and what it
    /// finds is the error.
    pub fn join<T>(
        self: &Arc<Self>,
        key: &[u8],
        resource: &ResourceId,
        position: Position,
        recheck: impl FnOnce() -> Option<T>,
    ) -> Result<JoinResult, T> {
        let mut running = self.lock();
        if let Some(fetch) = running.get(key)
            && !self.invalidations.purged_since(&fetch.resource, fetch.position)
        {
            return Ok(JoinResult::Follow(Follower { result: fetch.result.clone(), leader: None }));
        }
        if let Some(found) = recheck() {
            return Err(found);
        }
        let (leader, follower) = self.start(Some(key.into()));
        let result = follower.result.clone();
        running.insert(key.into(), Arc::new(RunningFetch { resource: resource.clone(), position, result }));
        Ok(JoinResult::Lead(leader, follower))
    }

    /// Starts a fetch that no other request joins.
    pub fn start_unshared(self: &Arc<Self>) -> (Leader, Follower) {
        self.start(None)
    }

    fn start(self: &Arc<Self>, key: Option<Box<[u8]>>) -> (Leader, Follower) {
        let (sender, receiver) = watch::channel(None);
        let (to_leader, from_fetch) = oneshot::channel();
        let leader =
            Leader { coalescer: self.clone(), key, result: sender, leader: Some(to_leader), runs_in_request: false };
        (leader, Follower { result: receiver, leader: Some(from_fetch) })
    }

    /// Returns true if requests for this key do not wait for each other.
    pub fn is_hit_for_miss(&self, key: &[u8], now: Tick) -> bool {
        self.hit_for_miss.get(&self.hasher.hash_one(key)).is_some_and(|(until, _)| now < until)
    }

    /// Returns why requests for this key do not wait for each other, if they don't.
    pub fn hit_for_miss(&self, key: &[u8], now: Tick) -> Option<HitForMiss> {
        let (until, reason) = self.hit_for_miss.get(&self.hasher.hash_one(key))?;
        (now < until).then(|| HitForMiss { seconds_left: until.since(now) / 1000, reason })
    }

    /// Marks a key as hit-for-miss: its responses can't be shared.
    pub fn mark_hit_for_miss(&self, key: &[u8], now: Tick, reason: Option<NotStored>) {
        self.hit_for_miss.insert(self.hasher.hash_one(key), (now.plus(HIT_FOR_MISS), reason));
    }

    /// Removes the mark of a key: a response could be shared.
    pub fn unmark_hit_for_miss(&self, key: &[u8]) {
        self.hit_for_miss.remove(&self.hasher.hash_one(key));
    }

    /// Returns true if a fetch runs for any variant of this key.
    pub fn is_fetching(&self, key: &[u8]) -> bool {
        self.lock().keys().any(|running| running.starts_with(key))
    }

    /// Returns the number of running fetches that requests can join.
    pub fn running(&self) -> usize {
        self.lock().len()
    }
}

impl Follower {
    /// Waits for the result.
    pub async fn wait(mut self) -> FollowerResult {
        let result = match self.result.wait_for(Option::is_some).await {
            Ok(result) => result.clone(),
            Err(_closed) => None,
        };
        let own = self.leader.and_then(|mut leader| leader.try_recv().ok());
        match (result, own) {
            (Some(FetchResult::NotShareable), Some(LeaderResult::Response(response))) => {
                FollowerResult::Unshared(response)
            }
            (Some(result), Some(LeaderResult::Reader(reader))) => {
                FollowerResult::Completed(result, Some(Body::Shared(reader)))
            }
            (Some(result), _) => FollowerResult::Completed(result, None),
            (None, _) => FollowerResult::Lost,
        }
    }
}

impl Leader {
    /// Announces that the response has begun. It can be joined until [`Leader::deregister`].
    pub fn announce(&mut self, response: Arc<SharedResponse>, fanout: &Arc<Fanout>) {
        if let (Some(leader), Some(reader)) = (self.leader.take(), fanout.join()) {
            // If the leader's client has disconnected, the reader is dropped.
            let _ = leader.send(LeaderResult::Reader(reader));
        }
        self.result.send_replace(Some(FetchResult::Shared(response)));
    }

    /// Says whether the leader's request still runs the fetch itself.
    pub fn set_runs_in_request(&mut self, runs_in_request: bool) {
        self.runs_in_request = runs_in_request;
    }

    /// Publishes a preliminary result; the fetch goes on.
    pub fn publish(&mut self, result: FetchResult) {
        self.result.send_replace(Some(result));
    }

    /// Completes the fetch. Requests that come later start a new one.
    pub fn complete(mut self, result: FetchResult) {
        self.runs_in_request = false;
        self.deregister();
        self.result.send_replace(Some(result));
    }

    /// Completes the fetch with a response for the leader only.
    pub fn complete_unshared(mut self, response: Response<Body>) {
        if let Some(leader) = self.leader.take() {
            // If the leader's client has disconnected, the response is dropped.
            let _ = leader.send(LeaderResult::Response(response));
        }
        self.complete(FetchResult::NotShareable);
    }

    /// Waits until the leader's client has disconnected.
    pub async fn wait_disconnected(&mut self) {
        match &mut self.leader {
            Some(leader) => leader.closed().await,
            None => std::future::pending().await,
        }
    }

    /// Removes the fetch from those that can be joined.
    pub fn deregister(&mut self) {
        let Some(key) = self.key.take() else { return };
        let mut running = self.coalescer.lock();
        let ours = running.get(&key).is_some_and(|fetch| fetch.result.same_channel(&self.result.subscribe()));
        if ours {
            running.remove(&key);
        }
    }
}

impl Drop for Leader {
    fn drop(&mut self) {
        self.deregister();
        if self.runs_in_request {
            self.result.send_replace(Some(FetchResult::Retry));
        }
    }
}
