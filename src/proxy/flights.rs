//! Who waits for whom: one fetch per key.
//!
//! A flight is *waiting* for its head, then it has *landed*: as an answer that all may share, as one that
//! nobody may (everyone goes for themselves), or as a failure. It is a task of its own, so no client's leaving
//! ends it; should the task itself vanish, its sender goes with it and everybody hears of it.

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
use crate::policy::head::Head;
use crate::policy::invalidation::{Address, Position};
use crate::policy::outcome::{Failure, Skip};
use crate::policy::variant::Variant;

/// For so long nobody waits for a key whose answer could not be shared.
const HIT_FOR_MISS: Duration = Duration::from_mins(2);

/// Keys remembered as not worth waiting for.
const MAX_HIT_FOR_MISS: usize = 10_000;

/// How a flight ended, as far as its waiters are concerned.
#[derive(Debug, Clone)]
pub enum Landing {
    /// An answer for all who asked for the same.
    Shared(Arc<Arrival>),
    /// Not for sharing: the leader has it, everyone else fetches for themselves.
    Released,
    /// The fleet has it already.
    Found(Arc<Entry>),
    /// Nothing: its leader left before it began. Board again.
    Again,
    /// No answer.
    Failed(Failure),
}

/// A shared answer.
#[derive(Debug)]
pub struct Arrival {
    /// Its head, as it will be stored.
    pub head: Head,
    /// What the upstream said: 304 where `head` was freshened by it.
    pub status: StatusCode,
    /// Set if it is a failure.
    pub failure: Option<Failure>,
    /// Whether it is stored.
    pub stored: Result<(), Skip>,
    /// Which requests it is for.
    pub variant: Variant,
    /// It may answer others than the one who asked for it.
    pub for_others: bool,
    /// Fields that are not stored: for the one who asked.
    pub first_hand: HeaderMap,
    /// When the head came.
    pub born: Tick,
    /// Its age then, in milliseconds; none if the upstream made it for this request.
    pub initial_age: Option<u64>,
    /// Its body.
    pub content: Content,
}

/// A shared body.
#[derive(Debug)]
pub enum Content {
    /// Complete, and stored.
    Stored(Arc<Entry>),
    /// Coming.
    Coming(Arc<Fanout>),
}

impl Arrival {
    /// The body from its first byte; unless it has become too large to join, or is not for a follower: an
    /// answer that needs validation is for the request that fetched it (RFC 9111 §4).
    pub fn body_for(&self, follower: bool) -> Option<Body> {
        if follower && !self.for_others {
            return None;
        }
        match &self.content {
            Content::Stored(entry) => Some(Body::Full(entry.body.clone())),
            Content::Coming(fanout) => fanout.join().map(Body::Shared),
        }
    }
}

/// All running flights.
#[derive(Debug)]
pub struct Flights {
    running: Mutex<HashMap<Box<[u8]>, Arc<Flight>>>,
    hit_for_miss: Cache<u64, (Tick, Option<Skip>)>,
    hasher: RandomState,
}

#[derive(Debug)]
struct Flight {
    address: Address,
    position: Position,
    landing: watch::Receiver<Option<Landing>>,
}

/// What a request gets when it asks for a flight.
#[derive(Debug)]
pub enum Seat {
    /// Nobody fetches this yet: whoever holds the [`Lead`] does.
    Lead(Lead, Waiter),
    /// Somebody does.
    Follow(Waiter),
}

/// The place of one who waits for a landing.
#[derive(Debug)]
pub struct Waiter {
    landing: watch::Receiver<Option<Landing>>,
    /// The leader's own.
    private: Option<oneshot::Receiver<Private>>,
}

/// What only the leader gets.
#[derive(Debug)]
enum Private {
    /// An answer that is not shared.
    Response(Response<Body>),
    /// A seat at a shared body, taken before its first byte could be dropped.
    Reader(Reader),
}

/// What comes of waiting.
#[derive(Debug)]
pub enum Waited {
    /// The flight landed; with the leader's seat at the body.
    Landed(Landing, Option<Body>),
    /// It landed, and the answer is this request's alone.
    Private(Response<Body>),
    /// The task is gone without a word: try again.
    Lost,
}

/// The duty to fetch. Dropping it, by panic too, ends the flight.
#[derive(Debug)]
pub struct Lead {
    flights: Arc<Flights>,
    /// Under which key others find this flight; none for one that flies alone.
    key: Option<Box<[u8]>>,
    landing: watch::Sender<Option<Landing>>,
    private: Option<oneshot::Sender<Private>>,
    /// Its leader's client can still end it by leaving.
    grounded: bool,
}

impl Default for Flights {
    fn default() -> Self {
        Flights { running: Mutex::default(), hit_for_miss: Cache::new(MAX_HIT_FOR_MISS), hasher: RandomState::new() }
    }
}

impl Flights {
    fn lock(&self) -> MutexGuard<'_, HashMap<Box<[u8]>, Arc<Flight>>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Joins the flight for a key, or begins one. Nobody joins a flight that a purge has outdated: that one
    /// flies on for those it has, and a new one takes its place.
    ///
    /// A flight may have landed since the caller looked: `instead` looks again before one is begun, and what it
    /// finds is the error.
    pub fn board<T>(
        self: &Arc<Self>,
        key: &[u8],
        address: &Address,
        position: Position,
        invalidations: &Invalidations,
        instead: impl FnOnce() -> Option<T>,
    ) -> Result<Seat, T> {
        let mut running = self.lock();
        if let Some(flight) = running.get(key)
            && !invalidations.outdated(&flight.address, flight.position)
        {
            return Ok(Seat::Follow(Waiter { landing: flight.landing.clone(), private: None }));
        }
        if let Some(found) = instead() {
            return Err(found);
        }
        let (lead, waiter) = self.flight(Some(key.into()));
        let landing = waiter.landing.clone();
        running.insert(key.into(), Arc::new(Flight { address: address.clone(), position, landing }));
        Ok(Seat::Lead(lead, waiter))
    }

    /// A flight that nobody else finds.
    pub fn alone(self: &Arc<Self>) -> (Lead, Waiter) {
        self.flight(None)
    }

    fn flight(self: &Arc<Self>, key: Option<Box<[u8]>>) -> (Lead, Waiter) {
        let (landing, landed) = watch::channel(None);
        let (private, own) = oneshot::channel();
        let lead = Lead { flights: self.clone(), key, landing, private: Some(private), grounded: false };
        (lead, Waiter { landing: landed, private: Some(own) })
    }

    /// Is this key one that is not worth waiting for?
    pub fn is_hit_for_miss(&self, key: &[u8], now: Tick) -> bool {
        self.hit_for_miss.get(&self.hasher.hash_one(key)).is_some_and(|(until, _)| now < until)
    }

    /// For how many seconds more, and why; no reason: its answers have to be validated.
    pub fn why_hit_for_miss(&self, key: &[u8], now: Tick) -> Option<(u64, Option<Skip>)> {
        let (until, why) = self.hit_for_miss.get(&self.hasher.hash_one(key))?;
        (now < until).then(|| (until.since(now) / 1000, why))
    }

    /// Is it being fetched, whatever the request headers?
    pub fn is_flying(&self, key: &[u8]) -> bool {
        self.lock().keys().any(|flying| flying.starts_with(key))
    }

    /// Remembers that this key's answers can't be shared.
    pub fn mark_hit_for_miss(&self, key: &[u8], now: Tick, why: Option<Skip>) {
        self.hit_for_miss.insert(self.hasher.hash_one(key), (now.plus(HIT_FOR_MISS), why));
    }

    /// They can, after all.
    pub fn unmark_hit_for_miss(&self, key: &[u8]) {
        self.hit_for_miss.remove(&self.hasher.hash_one(key));
    }

    /// How many are under way that others can join.
    pub fn running(&self) -> usize {
        self.lock().len()
    }
}

impl Waiter {
    /// Waits for the landing.
    pub async fn landing(mut self) -> Waited {
        let landing = match self.landing.wait_for(Option::is_some).await {
            Ok(landing) => landing.clone(),
            Err(_gone) => None,
        };
        let private = self.private.and_then(|mut private| private.try_recv().ok());
        match (landing, private) {
            (Some(Landing::Released), Some(Private::Response(response))) => Waited::Private(response),
            (Some(landing), Some(Private::Reader(reader))) => Waited::Landed(landing, Some(Body::Shared(reader))),
            (Some(landing), _) => Waited::Landed(landing, None),
            (None, _) => Waited::Lost,
        }
    }
}

impl Lead {
    /// Tells everybody that the answer has begun. It can still be joined, until the lead leaves.
    pub fn announce(&mut self, arrival: Arc<Arrival>, fanout: &Arc<Fanout>) {
        if let (Some(private), Some(reader)) = (self.private.take(), fanout.join()) {
            // If the leader has left, its seat is given up at once.
            let _ = private.send(Private::Reader(reader));
        }
        self.landing.send_replace(Some(Landing::Shared(arrival)));
    }

    /// Says whether it is still in the hands of its leader's client, who may leave.
    pub fn set_grounded(&mut self, grounded: bool) {
        self.grounded = grounded;
    }

    /// Tells everybody something to go on with, while the flight goes on.
    pub fn show(&mut self, landing: Landing) {
        self.landing.send_replace(Some(landing));
    }

    /// Tells everybody the end of it. Who asks from now on begins anew.
    pub fn land(mut self, landing: Landing) {
        self.grounded = false;
        self.leave();
        self.landing.send_replace(Some(landing));
    }

    /// Tells everybody to fetch for themselves, and gives the leader what came.
    pub fn release(mut self, response: Response<Body>) {
        if let Some(private) = self.private.take() {
            // If the leader has left, nobody wants it.
            let _ = private.send(Private::Response(response));
        }
        self.land(Landing::Released);
    }

    /// Until the leader has left.
    pub async fn left_alone(&mut self) {
        match &mut self.private {
            Some(private) => private.closed().await,
            None => std::future::pending().await,
        }
    }

    /// From now on nobody finds this flight.
    pub fn leave(&mut self) {
        let Some(key) = self.key.take() else { return };
        let mut running = self.flights.lock();
        let ours = running.get(&key).is_some_and(|flight| flight.landing.same_channel(&self.landing.subscribe()));
        if ours {
            running.remove(&key);
        }
    }
}

impl Drop for Lead {
    fn drop(&mut self) {
        self.leave();
        if self.grounded {
            self.landing.send_replace(Some(Landing::Again));
        }
    }
}
