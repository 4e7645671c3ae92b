//! What was purged, here and in the fleet: one lock around the pure [`Ledger`] and [`Chain`], and two numbers that
//! hits look at.
//!
//! A purge of ours holds from the moment it is recorded, and waits in the outbox until the log has it. Purges of others
//! come with the log ([`super::log`]). As long as the log can't be read, an entry is trusted for `max_unverified`
//! beyond the last time it could, or beyond its own birth.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use tokio::sync::watch;

use super::SidecarId;
use super::purge::Purge;
use crate::policy::chain::{Broken, Chain, LogId, Seen};
use crate::policy::entry::Entry;
use crate::policy::invalidation::{Address, Ledger, Position, Selector, Standing, Strength};
use crate::policy::{Tick, millis};

/// So many subjects and so many URL matchers are remembered.
const MAX_SUBJECTS: usize = 100_000;
const MAX_MATCHERS: usize = 1_000;

/// So many entries of the log are known by their id.
const MAX_LINKS: usize = 60_000;

/// So many of our own are told again when the log was lost, or lost its end.
const MAX_RECENT: usize = 1_000;

/// So many sidecars are known by the last purge that was read of them.
const MAX_TOLD: usize = 10_000;

/// More purges than this don't wait for the log one by one: one of everything stands for them.
const MAX_OUTBOX: usize = 10_000;

/// What was purged.
#[derive(Debug)]
pub struct Invalidations {
    /// The ledger's position: the global epoch.
    epoch: AtomicU64,
    /// The tick until which everything is trusted.
    trusted_until: AtomicU64,
    book: RwLock<Book>,
    fleet: Option<Fleet>,
    /// Whose word counts since a reload.
    successor: OnceLock<Arc<Invalidations>>,
}

/// What there is only if purges are shared.
#[derive(Debug)]
struct Fleet {
    me: SidecarId,
    max_unverified: Duration,
    /// What the log has.
    logged: watch::Sender<Logged>,
    /// The number of the last purge that waits for it.
    waiting: watch::Sender<u64>,
    /// Was the log read to its end?
    caught_up: watch::Sender<bool>,
}

#[derive(Debug)]
struct Book {
    ledger: Ledger,
    chain: Chain,
    /// Ours that were not read back from the log yet, with their positions.
    unread: VecDeque<(u64, Position)>,
    /// The last of ours: another log may lack them.
    recent: VecDeque<Purge>,
    /// The last purge that was read of each sidecar: one that is told twice counts once.
    told: HashMap<SidecarId, u64>,
    /// Ours that the log does not have yet.
    outbox: VecDeque<Purge>,
    /// How many we have made.
    made: u64,
}

/// How far the log is with our purges.
#[derive(Debug, Clone, Copy, Default)]
struct Logged {
    /// The number of the last one that it has.
    number: u64,
    /// It can't be written.
    stuck: bool,
}

/// A purge that was recorded.
#[derive(Debug, Clone, Copy)]
pub struct Recorded {
    /// Its place in our own sequence.
    pub position: Position,
    /// Its number in the outbox.
    pub number: u64,
}

impl Default for Invalidations {
    fn default() -> Self {
        let ledger = Ledger::new(MAX_SUBJECTS, MAX_MATCHERS);
        let epoch = AtomicU64::new(ledger.position().0);
        let (unread, outbox) = (VecDeque::new(), VecDeque::new());
        let book = RwLock::new(Book {
            ledger,
            chain: Chain::new(MAX_LINKS),
            unread,
            recent: VecDeque::new(),
            told: HashMap::new(),
            outbox,
            made: 0,
        });
        let (trusted_until, successor) = (AtomicU64::new(u64::MAX), OnceLock::new());
        Invalidations { epoch, trusted_until, book, fleet: None, successor }
    }
}

impl Invalidations {
    /// Those of a sidecar in a fleet. What it has is trusted until `now` and `max_unverified`, then verified.
    pub fn shared(me: SidecarId, max_unverified: Duration, now: Tick) -> Invalidations {
        let (logged, waiting, caught_up) =
            (watch::Sender::new(Logged::default()), watch::Sender::new(0), watch::Sender::new(false));
        let shared = Invalidations {
            fleet: Some(Fleet { me, max_unverified, logged, waiting, caught_up }),
            ..Invalidations::default()
        };
        shared.verified(now);
        shared
    }

    fn read(&self) -> RwLockReadGuard<'_, Book> {
        self.book.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Book> {
        self.book.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a fetch that begins now is born at.
    pub fn position(&self) -> Position {
        Position(self.epoch.load(Ordering::Acquire))
    }

    /// Purges. It holds here from the moment this returns; `answer`: who has applied it should say so, under this name.
    pub fn record(&self, selectors: Vec<Selector>, strength: Strength, answer: Option<u64>) -> Recorded {
        if let Some(successor) = self.successor.get() {
            successor.record(selectors.clone(), strength, None);
        }
        let mut book = self.write();
        let position = book.ledger.record(selectors.iter().cloned(), strength);
        if let Some(fleet) = &self.fleet {
            if book.outbox.len() >= MAX_OUTBOX {
                book.collapse();
            }
            book.made += 1;
            let number = book.made;
            let purge = Purge { from: fleet.me, number, strength, selectors, answer };
            book.unread.push_back((number, position));
            book.recent.push_back(purge.clone());
            if book.recent.len() > MAX_RECENT {
                book.recent.pop_front();
            }
            book.outbox.push_back(purge);
            fleet.waiting.send_replace(number);
        }
        self.epoch.store(position.0, Ordering::Release);
        Recorded { position, number: book.made }
    }

    /// Another ledger takes its place, before another Redis perhaps. What requests under way purge counts there too, and
    /// what waits for the log is told to the new one.
    pub fn succeeded_by(&self, next: &Arc<Invalidations>) {
        if self.successor.set(next.clone()).is_ok() {
            let waiting: Vec<Purge> = self.write().outbox.drain(..).collect();
            for purge in waiting {
                next.record(purge.selectors, purge.strength, None);
            }
        }
    }

    /// Where an entry stands. Compares two numbers, unless something was purged since it was last asked, or the log
    /// has not been read for long.
    pub fn standing(&self, entry: &Entry, now: Tick) -> Standing {
        let epoch = self.position();
        let known = entry.standing_at(epoch).unwrap_or_else(|| {
            let book = self.read();
            let standing = book.ledger.standing(&entry.address, entry.position);
            entry.remember(book.ledger.position(), standing);
            standing
        });
        if now.0 > self.trusted_until.load(Ordering::Relaxed) { known.max(self.trust(entry, now)) } else { known }
    }

    /// An entry is trusted for a while beyond its own birth, too.
    fn trust(&self, entry: &Entry, now: Tick) -> Standing {
        let trusted = self.fleet.as_ref().is_none_or(|fleet| entry.resident(now) <= millis(fleet.max_unverified));
        if trusted { Standing::Valid } else { Standing::Unverified }
    }

    /// Has anything been purged that a fetch born at `position` is about?
    pub fn outdated(&self, address: &Address, position: Position) -> bool {
        self.position() != position && self.read().ledger.standing(address, position) != Standing::Valid
    }

    /// The position of something whose fetch had seen the log up to `id`; one before everything if that is unknown.
    pub fn position_of(&self, id: LogId) -> Position {
        let book = self.read();
        let unread = book.unread.iter().map(|(_, position)| position.0 - 1).min().map(Position);
        let now = unread.map_or(book.ledger.position(), |unread| unread.min(book.ledger.position()));
        book.chain.position_of(id, now).unwrap_or(Position(0))
    }

    /// The log entry that something fetched at `position` had seen.
    pub fn seen_at(&self, position: Position) -> Seen {
        let book = self.read();
        match book.chain.seen_at(position) {
            Some(id) => Seen::UpTo(id),
            None if book.chain.last().is_none() => Seen::NotYet,
            None => Seen::Forgotten,
        }
    }

    /// The last entry of the log that was read.
    pub fn log_position(&self) -> Option<LogId> {
        self.read().chain.last()
    }

    /// Begins to read a log after `origin`. If another was read before, what is stored may have missed something.
    pub fn begin_log(&self, origin: LogId) {
        let mut book = self.write();
        if book.chain.last().is_some() {
            let position = book.ledger.doubt();
            self.epoch.store(position.0, Ordering::Release);
            book.tell_again(position);
            if let (Some(fleet), Some(last)) = (&self.fleet, book.outbox.back()) {
                fleet.waiting.send_replace(last.number);
            }
        }
        let position = book.ledger.position();
        book.chain.begin(origin, position);
        book.told.clear();
    }

    /// Applies the next entry of the log; `None` is one that can't be understood, and an empty one says nothing.
    pub fn apply(&self, previous: LogId, id: LogId, said: Option<Option<Purge>>) -> Result<(), Broken> {
        let mut book = self.write();
        if book.chain.last() != Some(previous) {
            return Err(Broken);
        }
        let at = match said {
            None => book.ledger.position(),
            Some(None) => book.ledger.doubt(),
            Some(Some(purge)) if book.was_told(&purge) => book.ledger.position(),
            Some(Some(purge)) => match self.ours(&mut book, &purge) {
                Some(position) => position,
                None => book.ledger.record(purge.selectors, purge.strength),
            },
        };
        self.epoch.store(book.ledger.position().0, Ordering::Release);
        book.chain.extend(previous, id, at)
    }

    /// The position of a purge that we made ourselves, when it comes back.
    fn ours(&self, book: &mut Book, purge: &Purge) -> Option<Position> {
        if self.fleet.as_ref().is_none_or(|fleet| fleet.me != purge.from) {
            return None;
        }
        let index = book.unread.iter().position(|(number, _)| *number == purge.number)?;
        book.unread.remove(index).map(|(_, position)| position)
    }

    /// The log was read to its end just now.
    pub fn verified(&self, now: Tick) {
        if let Some(fleet) = &self.fleet {
            self.trusted_until.store(now.plus(fleet.max_unverified).0, Ordering::Relaxed);
        }
    }

    /// Says whether the log was read to its end since it was last lost.
    pub fn set_caught_up(&self, caught_up: bool) {
        if let Some(fleet) = &self.fleet {
            fleet.caught_up.send_if_modified(|known| std::mem::replace(known, caught_up) != caught_up);
        }
    }

    /// Waits until the log has been read to its end.
    pub async fn caught_up(&self) {
        if let Some(fleet) = &self.fleet
            && !*fleet.caught_up.borrow()
        {
            let _ = fleet.caught_up.subscribe().wait_for(|caught_up| *caught_up).await;
        }
    }

    /// The oldest purge that the log does not have. Waits until there is one.
    pub async fn next_to_log(&self) -> Purge {
        loop {
            let Some(fleet) = &self.fleet else { return std::future::pending().await };
            let mut waiting = fleet.waiting.subscribe();
            if let Some(purge) = self.read().outbox.front().cloned() {
                return purge;
            }
            let _ = waiting.changed().await;
        }
    }

    /// The log has it.
    pub fn was_logged(&self, number: u64) {
        let mut book = self.write();
        while book.outbox.front().is_some_and(|purge| purge.number <= number) {
            book.outbox.pop_front();
        }
        if let Some(fleet) = &self.fleet {
            fleet.logged.send_replace(Logged { number, stuck: false });
        }
    }

    /// The log can't be written: nobody should wait for it.
    pub fn log_is_stuck(&self) {
        if let Some(fleet) = &self.fleet {
            fleet.logged.send_modify(|logged| logged.stuck = true);
        }
    }

    /// Waits until the log has a purge, for at most so long, unless it can't be written. True if it has it; alone there
    /// is nothing to wait for.
    pub async fn logged(&self, number: u64, patience: Duration) -> bool {
        let Some(fleet) = &self.fleet else { return false };
        let mut logged = fleet.logged.subscribe();
        let decided = logged.wait_for(|logged| logged.number >= number || logged.stuck);
        let decided = tokio::time::timeout(patience, decided).await;
        decided.is_ok_and(|logged| logged.is_ok_and(|logged| logged.number >= number))
    }

    /// Purges that the log does not have yet.
    pub fn unlogged(&self) -> usize {
        self.read().outbox.len()
    }

    /// Milliseconds since the log was last known to be read to its end; none if purges are not shared.
    pub fn lag(&self, now: Tick) -> Option<u64> {
        let fleet = self.fleet.as_ref()?;
        let trusted = self.trusted_until.load(Ordering::Relaxed);
        Some(now.since(Tick(trusted.saturating_sub(millis(fleet.max_unverified)))))
    }
}

impl Book {
    /// Puts the last of ours into the outbox once more, in their order. Here they count from `at` on: everything before is
    /// in doubt anyway.
    fn tell_again(&mut self, at: Position) {
        let first = self.recent.front().map_or(u64::MAX, |purge| purge.number);
        self.outbox.retain(|purge| purge.number < first);
        self.outbox.extend(self.recent.iter().cloned());
        self.unread = self.outbox.iter().map(|purge| (purge.number, at)).collect();
    }

    /// Notes that a purge was read. True if it was before.
    fn was_told(&mut self, purge: &Purge) -> bool {
        if self.told.len() > MAX_TOLD {
            self.told.clear();
        }
        let last = self.told.entry(purge.from).or_insert(0);
        let before = purge.number <= *last;
        *last = purge.number.max(*last);
        before
    }

    /// Too many wait for the log: one of everything stands for them.
    fn collapse(&mut self) {
        if let Some(last) = self.outbox.pop_back() {
            self.outbox.clear();
            let everything = Purge { strength: Strength::Hard, selectors: vec![Selector::Everything], ..last };
            // When it comes back, it counts from where the first of them did.
            let first = self.unread.front().map(|(_, position)| *position);
            self.unread.clear();
            self.unread.extend(first.map(|position| (everything.number, position)));
            self.outbox.push_back(everything);
        }
    }
}
