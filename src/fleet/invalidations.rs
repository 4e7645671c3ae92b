//! What was purged, here and in the fleet: one lock around the pure [`Ledger`] and [`LogPositions`], and two numbers that
//! hits look at.
//!
//! A purge of ours holds from the moment it is recorded, and waits in the outbox until the log has it. Purges of others
//! come with the log ([`super::invalidation_log`]). As long as the log can't be read, an entry is trusted for `max_unverified`
//! beyond the last time it could, or beyond its own birth.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use tokio::sync::watch;

use super::SidecarId;
use super::purge_message::PurgeMessage;
use crate::policy::entry::Entry;
use crate::policy::invalidation::ledger::{InvalidationState, Ledger, Position, PurgeKind, ResourceId, Selector};
use crate::policy::invalidation::log_position::{LogGap, LogId, LogPositions, SeenLog};
use crate::policy::{Tick, millis};

/// So many subjects and so many URL matchers are remembered.
const MAX_SUBJECTS: usize = 100_000;
const MAX_MATCHERS: usize = 1_000;

/// So many entries of the log are known by their id.
const MAX_LOG_POSITIONS: usize = 60_000;

/// So many of our own are told again when the log was lost, or lost its end.
const MAX_RECENT: usize = 1_000;

/// So many sidecars are known by the last purge that was read of them.
const MAX_SIDECARS: usize = 10_000;

/// More purges than this don't wait for the log one by one: one of everything stands for them.
const MAX_OUTBOX: usize = 10_000;

/// What was purged.
#[derive(Debug)]
pub struct Invalidations {
    /// The ledger's position: the global epoch.
    epoch: AtomicU64,
    /// The tick until which everything is trusted.
    trusted_until: AtomicU64,
    state: RwLock<LedgerState>,
    fleet: Option<FleetState>,
    /// Whose word counts since a reload.
    successor: OnceLock<Arc<Invalidations>>,
}

/// What there is only if purges are shared.
#[derive(Debug)]
struct FleetState {
    me: SidecarId,
    max_unverified: Duration,
    /// What the log has.
    wait_logged: watch::Sender<LogProgress>,
    /// The number of the last purge that waits for it.
    waiting: watch::Sender<u64>,
    /// Was the log read to its end?
    wait_caught_up: watch::Sender<bool>,
}

#[derive(Debug)]
struct LedgerState {
    ledger: Ledger,
    chain: LogPositions,
    /// Ours that were not read back from the log yet, with their positions.
    unconfirmed: VecDeque<(u64, Position)>,
    /// The last of ours: another log may lack them.
    recent: VecDeque<PurgeMessage>,
    /// The last purge that was read of each sidecar: one that is told twice counts once.
    last_numbers: HashMap<SidecarId, u64>,
    /// Ours that the log does not have yet.
    outbox: VecDeque<PurgeMessage>,
    /// How many we have made.
    recorded: u64,
}

/// How far the log is with our purges.
#[derive(Debug, Clone, Copy, Default)]
struct LogProgress {
    /// The number of the last one that it has.
    number: u64,
    /// It can't be written.
    unwritable: bool,
}

/// A purge that was recorded.
#[derive(Debug, Clone, Copy)]
pub struct PurgeReceipt {
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
        let book = RwLock::new(LedgerState {
            ledger,
            chain: LogPositions::new(MAX_LOG_POSITIONS),
            unconfirmed: unread,
            recent: VecDeque::new(),
            last_numbers: HashMap::new(),
            outbox,
            recorded: 0,
        });
        let (trusted_until, successor) = (AtomicU64::new(u64::MAX), OnceLock::new());
        Invalidations { epoch, trusted_until, state: book, fleet: None, successor }
    }
}

impl Invalidations {
    /// Those of a sidecar in a fleet. What it has is trusted until `now` and `max_unverified`, then verified.
    pub fn shared(me: SidecarId, max_unverified: Duration, now: Tick) -> Invalidations {
        let (logged, waiting, caught_up) =
            (watch::Sender::new(LogProgress::default()), watch::Sender::new(0), watch::Sender::new(false));
        let shared = Invalidations {
            fleet: Some(FleetState { me, max_unverified, wait_logged: logged, waiting, wait_caught_up: caught_up }),
            ..Invalidations::default()
        };
        shared.mark_verified(now);
        shared
    }

    fn read(&self) -> RwLockReadGuard<'_, LedgerState> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, LedgerState> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a fetch that begins now is born at.
    pub fn position(&self) -> Position {
        Position(self.epoch.load(Ordering::Acquire))
    }

    /// Purges. It holds here from the moment this returns; `answer`: who has applied it should say so, under this name.
    pub fn record(&self, selectors: Vec<Selector>, strength: PurgeKind, answer: Option<u64>) -> PurgeReceipt {
        if let Some(successor) = self.successor.get() {
            successor.record(selectors.clone(), strength, None);
        }
        let mut book = self.write();
        let position = book.ledger.record(selectors.iter().cloned(), strength);
        if let Some(fleet) = &self.fleet {
            if book.outbox.len() >= MAX_OUTBOX {
                book.collapse_outbox();
            }
            book.recorded += 1;
            let number = book.recorded;
            let purge = PurgeMessage { from: fleet.me, number, strength, selectors, answer };
            book.unconfirmed.push_back((number, position));
            book.recent.push_back(purge.clone());
            if book.recent.len() > MAX_RECENT {
                book.recent.pop_front();
            }
            book.outbox.push_back(purge);
            fleet.waiting.send_replace(number);
        }
        self.epoch.store(position.0, Ordering::Release);
        PurgeReceipt { position, number: book.recorded }
    }

    /// Another ledger takes its place, before another Redis perhaps. What requests under way purge counts there too, and
    /// what waits for the log is told to the new one.
    pub fn replace_with(&self, next: &Arc<Invalidations>) {
        if self.successor.set(next.clone()).is_ok() {
            let waiting: Vec<PurgeMessage> = self.write().outbox.drain(..).collect();
            for purge in waiting {
                next.record(purge.selectors, purge.strength, None);
            }
        }
    }

    /// Where an entry stands. Compares two numbers, unless something was purged since it was last asked, or the log
    /// has not been read for long.
    pub fn state_of(&self, entry: &Entry, now: Tick) -> InvalidationState {
        let epoch = self.position();
        let known = entry.cached_state(epoch).unwrap_or_else(|| {
            let book = self.read();
            let standing = book.ledger.state_of(&entry.resource, entry.position);
            entry.cache_state(book.ledger.position(), standing);
            standing
        });
        if now.0 > self.trusted_until.load(Ordering::Relaxed) {
            known.max(self.state_while_unverified(entry, now))
        } else {
            known
        }
    }

    /// An entry is trusted for a while beyond its own birth, too.
    fn state_while_unverified(&self, entry: &Entry, now: Tick) -> InvalidationState {
        let trusted =
            self.fleet.as_ref().is_none_or(|fleet| entry.resident_time(now) <= millis(fleet.max_unverified));
        if trusted { InvalidationState::Valid } else { InvalidationState::Unverified }
    }

    /// Has anything been purged that a fetch born at `position` is about?
    pub fn purged_since(&self, address: &ResourceId, position: Position) -> bool {
        self.position() != position && self.read().ledger.state_of(address, position) != InvalidationState::Valid
    }

    /// The position of something whose fetch had seen the log up to `id`; one before everything if that is unknown.
    pub fn position_of(&self, id: LogId) -> Position {
        let book = self.read();
        let unread = book.unconfirmed.iter().map(|(_, position)| position.0 - 1).min().map(Position);
        let now = unread.map_or(book.ledger.position(), |unread| unread.min(book.ledger.position()));
        book.chain.position_of(id, now).unwrap_or(Position(0))
    }

    /// The log entry that something fetched at `position` had seen.
    pub fn log_seen_at(&self, position: Position) -> SeenLog {
        let book = self.read();
        match book.chain.seen_at(position) {
            Some(id) => SeenLog::UpTo(id),
            None if book.chain.last().is_none() => SeenLog::NotYet,
            None => SeenLog::Forgotten,
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
            let position = book.ledger.mark_unverified();
            self.epoch.store(position.0, Ordering::Release);
            book.requeue_recent(position);
            if let (Some(fleet), Some(last)) = (&self.fleet, book.outbox.back()) {
                fleet.waiting.send_replace(last.number);
            }
        }
        let position = book.ledger.position();
        book.chain.begin(origin, position);
        book.last_numbers.clear();
    }

    /// Applies the next entry of the log; `None` is one that can't be understood, and an empty one says nothing.
    pub fn apply(&self, previous: LogId, id: LogId, said: Option<Option<PurgeMessage>>) -> Result<(), LogGap> {
        let mut book = self.write();
        if book.chain.last() != Some(previous) {
            return Err(LogGap);
        }
        let at = match said {
            None => book.ledger.position(),
            Some(None) => book.ledger.mark_unverified(),
            Some(Some(purge)) if book.is_duplicate(&purge) => book.ledger.position(),
            Some(Some(purge)) => match self.ours(&mut book, &purge) {
                Some(position) => position,
                None => book.ledger.record(purge.selectors, purge.strength),
            },
        };
        self.epoch.store(book.ledger.position().0, Ordering::Release);
        book.chain.extend(previous, id, at)
    }

    /// The position of a purge that we made ourselves, when it comes back.
    fn ours(&self, book: &mut LedgerState, purge: &PurgeMessage) -> Option<Position> {
        if self.fleet.as_ref().is_none_or(|fleet| fleet.me != purge.from) {
            return None;
        }
        let index = book.unconfirmed.iter().position(|(number, _)| *number == purge.number)?;
        book.unconfirmed.remove(index).map(|(_, position)| position)
    }

    /// The log was read to its end just now.
    pub fn mark_verified(&self, now: Tick) {
        if let Some(fleet) = &self.fleet {
            self.trusted_until.store(now.plus(fleet.max_unverified).0, Ordering::Relaxed);
        }
    }

    /// Says whether the log was read to its end since it was last lost.
    pub fn set_caught_up(&self, caught_up: bool) {
        if let Some(fleet) = &self.fleet {
            fleet.wait_caught_up.send_if_modified(|known| std::mem::replace(known, caught_up) != caught_up);
        }
    }

    /// Waits until the log has been read to its end.
    pub async fn wait_caught_up(&self) {
        if let Some(fleet) = &self.fleet
            && !*fleet.wait_caught_up.borrow()
        {
            let _ = fleet.wait_caught_up.subscribe().wait_for(|caught_up| *caught_up).await;
        }
    }

    /// The oldest purge that the log does not have. Waits until there is one.
    pub async fn next_to_log(&self) -> PurgeMessage {
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
    pub fn mark_logged(&self, number: u64) {
        let mut book = self.write();
        while book.outbox.front().is_some_and(|purge| purge.number <= number) {
            book.outbox.pop_front();
        }
        if let Some(fleet) = &self.fleet {
            fleet.wait_logged.send_replace(LogProgress { number, unwritable: false });
        }
    }

    /// The log can't be written: nobody should wait for it.
    pub fn mark_log_unwritable(&self) {
        if let Some(fleet) = &self.fleet {
            fleet.wait_logged.send_modify(|logged| logged.unwritable = true);
        }
    }

    /// Waits until the log has a purge, for at most so long, unless it can't be written. True if it has it; alone there
    /// is nothing to wait for.
    pub async fn wait_logged(&self, number: u64, patience: Duration) -> bool {
        let Some(fleet) = &self.fleet else { return false };
        let mut logged = fleet.wait_logged.subscribe();
        let decided = logged.wait_for(|logged| logged.number >= number || logged.unwritable);
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

impl LedgerState {
    /// Puts the last of ours into the outbox once more, in their order. Here they count from `at` on: everything before is
    /// in doubt anyway.
    fn requeue_recent(&mut self, at: Position) {
        let first = self.recent.front().map_or(u64::MAX, |purge| purge.number);
        self.outbox.retain(|purge| purge.number < first);
        self.outbox.extend(self.recent.iter().cloned());
        self.unconfirmed = self.outbox.iter().map(|purge| (purge.number, at)).collect();
    }

    /// Notes that a purge was read. True if it was before.
    fn is_duplicate(&mut self, purge: &PurgeMessage) -> bool {
        if self.last_numbers.len() > MAX_SIDECARS {
            self.last_numbers.clear();
        }
        let last = self.last_numbers.entry(purge.from).or_insert(0);
        let before = purge.number <= *last;
        *last = purge.number.max(*last);
        before
    }

    /// Too many wait for the log: one of everything stands for them.
    fn collapse_outbox(&mut self) {
        if let Some(last) = self.outbox.pop_back() {
            self.outbox.clear();
            let everything =
                PurgeMessage { strength: PurgeKind::Hard, selectors: vec![Selector::Everything], ..last };
            // When it comes back, it counts from where the first of them did.
            let first = self.unconfirmed.front().map(|(_, position)| *position);
            self.unconfirmed.clear();
            self.unconfirmed.extend(first.map(|position| (everything.number, position)));
            self.outbox.push_back(everything);
        }
    }
}
