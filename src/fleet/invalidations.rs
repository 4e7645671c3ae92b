//! Local and fleet-wide invalidations: a lock around the [`Ledger`] and [`LogPositions`], and two atomics read on hits.
//!
//! A purge made here takes effect when it is recorded, and stays in the outbox until the log has it. Purges of other
//! sidecars arrive through the log ([`super::invalidation_log`]). While the log can't be read, an entry is trusted for
//! `max_unverified` after the log was last read to its end, or after the entry was received, whichever is later.

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

/// Capacity of the ledger: subjects and URL matchers.
const MAX_SUBJECTS: usize = 100_000;
const MAX_MATCHERS: usize = 1_000;

/// Maximum number of log entries whose positions are kept.
const MAX_LOG_POSITIONS: usize = 60_000;

/// Maximum number of own purges that are appended again when the log, or its end, was lost.
const MAX_RECENT: usize = 1_000;

/// Maximum number of sidecars whose last purge number is kept.
const MAX_SIDECARS: usize = 10_000;

/// Capacity of the outbox. When it is full, one purge of everything replaces all purges in it.
const MAX_OUTBOX: usize = 10_000;

/// The purges made by this sidecar and the fleet.
#[derive(Debug)]
pub struct Invalidations {
    /// The position of the ledger: the global epoch.
    epoch: AtomicU64,
    /// The tick until which every entry is trusted.
    trusted_until: AtomicU64,
    state: RwLock<LedgerState>,
    fleet: Option<FleetState>,
    /// The instance that replaced this one at a configuration reload.
    successor: OnceLock<Arc<Invalidations>>,
}

/// The state that exists only if purges are shared with a fleet.
#[derive(Debug)]
struct FleetState {
    me: SidecarId,
    max_unverified: Duration,
    /// How far the log has this sidecar's purges.
    wait_logged: watch::Sender<LogProgress>,
    /// The number of the last purge that waits to be appended to the log.
    waiting: watch::Sender<u64>,
    /// Whether the log has been read to its end.
    wait_caught_up: watch::Sender<bool>,
}

#[derive(Debug)]
struct LedgerState {
    ledger: Ledger,
    chain: LogPositions,
    /// Numbers and positions of own purges that have not been read back from the log yet.
    unconfirmed: VecDeque<(u64, Position)>,
    /// The most recent own purges: another log may lack them.
    recent: VecDeque<PurgeMessage>,
    /// The number of the last purge read of each sidecar, so that a purge logged twice is applied once.
    last_numbers: HashMap<SidecarId, u64>,
    /// Own purges that the log does not have yet.
    outbox: VecDeque<PurgeMessage>,
    /// Number of purges made by this sidecar.
    recorded: u64,
}

/// Progress of appending own purges to the log.
#[derive(Debug, Clone, Copy, Default)]
struct LogProgress {
    /// The number of the last own purge that the log has.
    number: u64,
    /// Whether the last attempt to append failed.
    unwritable: bool,
}

/// The receipt of a recorded purge.
#[derive(Debug, Clone, Copy)]
pub struct PurgeReceipt {
    /// Its position in the ledger.
    pub position: Position,
    /// Its number in the outbox.
    pub number: u64,
}

impl Default for Invalidations {
    fn default() -> Self {
        let ledger = Ledger::new(MAX_SUBJECTS, MAX_MATCHERS);
        let epoch = AtomicU64::new(ledger.position().0);
        let (unread, outbox) = (VecDeque::new(), VecDeque::new());
        let state = RwLock::new(LedgerState {
            ledger,
            chain: LogPositions::new(MAX_LOG_POSITIONS),
            unconfirmed: unread,
            recent: VecDeque::new(),
            last_numbers: HashMap::new(),
            outbox,
            recorded: 0,
        });
        let (trusted_until, successor) = (AtomicU64::new(u64::MAX), OnceLock::new());
        Invalidations { epoch, trusted_until, state, fleet: None, successor }
    }
}

impl Invalidations {
    /// Returns the invalidations of a sidecar in a fleet. Every entry is trusted until `now` + `max_unverified`; after
    /// that, trust depends on the log.
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

    /// Returns the current position: that of a fetch that starts now.
    pub fn position(&self) -> Position {
        Position(self.epoch.load(Ordering::Acquire))
    }

    /// Records a purge. It is in effect here when this returns. `answer`: the name under which sidecars confirm that
    /// they have applied it.
    pub fn record(&self, selectors: Vec<Selector>, strength: PurgeKind, answer: Option<u64>) -> PurgeReceipt {
        if let Some(successor) = self.successor.get() {
            successor.record(selectors.clone(), strength, None);
        }
        let mut state = self.write();
        let position = state.ledger.record(selectors.iter().cloned(), strength);
        if let Some(fleet) = &self.fleet {
            if state.outbox.len() >= MAX_OUTBOX {
                state.collapse_outbox();
            }
            state.recorded += 1;
            let number = state.recorded;
            let purge = PurgeMessage { from: fleet.me, number, strength, selectors, answer };
            state.unconfirmed.push_back((number, position));
            state.recent.push_back(purge.clone());
            if state.recent.len() > MAX_RECENT {
                state.recent.pop_front();
            }
            state.outbox.push_back(purge);
            fleet.waiting.send_replace(number);
        }
        self.epoch.store(position.0, Ordering::Release);
        PurgeReceipt { position, number: state.recorded }
    }

    /// Makes `next` the successor, possibly with another Redis. Purges by requests still in progress are recorded there
    /// too, and the outbox moves there.
    pub fn replace_with(&self, next: &Arc<Invalidations>) {
        if self.successor.set(next.clone()).is_ok() {
            let waiting: Vec<PurgeMessage> = self.write().outbox.drain(..).collect();
            for purge in waiting {
                next.record(purge.selectors, purge.strength, None);
            }
        }
    }

    /// Returns the invalidation state of an entry. Compares two numbers, unless something was purged since the entry's
    /// last lookup, or the log has not been read for too long.
    pub fn state_of(&self, entry: &Entry, now: Tick) -> InvalidationState {
        let epoch = self.position();
        let known = entry.cached_state(epoch).unwrap_or_else(|| {
            let state = self.read();
            let found = state.ledger.state_of(&entry.resource, entry.position);
            entry.cache_state(state.ledger.position(), found);
            found
        });
        if now.0 > self.trusted_until.load(Ordering::Relaxed) {
            known.max(self.state_while_unverified(entry, now))
        } else {
            known
        }
    }

    /// Returns the state of an entry while the log is unreadable: valid until `max_unverified` after it was received.
    fn state_while_unverified(&self, entry: &Entry, now: Tick) -> InvalidationState {
        let trusted =
            self.fleet.as_ref().is_none_or(|fleet| entry.resident_time(now) <= millis(fleet.max_unverified));
        if trusted { InvalidationState::Valid } else { InvalidationState::Unverified }
    }

    /// Returns true if a purge since `position` applies to a fetch of this resource.
    pub fn purged_since(&self, address: &ResourceId, position: Position) -> bool {
        self.position() != position && self.read().ledger.state_of(address, position) != InvalidationState::Valid
    }

    /// Returns the position of a record whose fetch had seen the log up to `id`; the lowest one if `id` is unknown.
    pub fn position_of(&self, id: LogId) -> Position {
        let state = self.read();
        let unread = state.unconfirmed.iter().map(|(_, position)| position.0 - 1).min().map(Position);
        let now = unread.map_or(state.ledger.position(), |unread| unread.min(state.ledger.position()));
        state.chain.position_of(id, now).unwrap_or(Position(0))
    }

    /// Returns the last log entry that a fetch at `position` had seen.
    pub fn log_seen_at(&self, position: Position) -> SeenLog {
        let state = self.read();
        match state.chain.seen_at(position) {
            Some(id) => SeenLog::UpTo(id),
            None if state.chain.last().is_none() => SeenLog::NotYet,
            None => SeenLog::Forgotten,
        }
    }

    /// Returns the ID of the log entry read last.
    pub fn log_position(&self) -> Option<LogId> {
        self.read().chain.last()
    }

    /// Starts reading a log after `origin`. If a log was read before, stored entries become unverified, because purges
    /// may have been missed.
    pub fn begin_log(&self, origin: LogId) {
        let mut state = self.write();
        if state.chain.last().is_some() {
            let position = state.ledger.mark_unverified();
            self.epoch.store(position.0, Ordering::Release);
            state.requeue_recent(position);
            if let (Some(fleet), Some(last)) = (&self.fleet, state.outbox.back()) {
                fleet.waiting.send_replace(last.number);
            }
        }
        let position = state.ledger.position();
        state.chain.begin(origin, position);
        state.last_numbers.clear();
    }

    /// Applies the next log entry. `said` is `None` for an empty entry, and `Some(None)` for one that can't be verified
    /// or decoded, which makes all stored entries unverified. Fails if `previous` is not the entry read last.
    pub fn apply(&self, previous: LogId, id: LogId, said: Option<Option<PurgeMessage>>) -> Result<(), LogGap> {
        let mut state = self.write();
        if state.chain.last() != Some(previous) {
            return Err(LogGap);
        }
        let at = match said {
            None => state.ledger.position(),
            Some(None) => state.ledger.mark_unverified(),
            Some(Some(purge)) if state.is_duplicate(&purge) => state.ledger.position(),
            Some(Some(purge)) => match self.ours(&mut state, &purge) {
                Some(position) => position,
                None => state.ledger.record(purge.selectors, purge.strength),
            },
        };
        self.epoch.store(state.ledger.position().0, Ordering::Release);
        state.chain.extend(previous, id, at)
    }

    /// Returns the position of a purge that this sidecar made itself, when it is read back from the log.
    fn ours(&self, state: &mut LedgerState, purge: &PurgeMessage) -> Option<Position> {
        if self.fleet.as_ref().is_none_or(|fleet| fleet.me != purge.from) {
            return None;
        }
        let index = state.unconfirmed.iter().position(|(number, _)| *number == purge.number)?;
        state.unconfirmed.remove(index).map(|(_, position)| position)
    }

    /// Marks the log as read to its end at `now`.
    pub fn mark_verified(&self, now: Tick) {
        if let Some(fleet) = &self.fleet {
            self.trusted_until.store(now.plus(fleet.max_unverified).0, Ordering::Relaxed);
        }
    }

    /// Sets whether the log has been read to its end since the last read error.
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

    /// Waits until there is a purge that the log does not have, and returns the oldest one.
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

    /// Removes the purges up to `number` from the outbox: the log has them.
    pub fn mark_logged(&self, number: u64) {
        let mut state = self.write();
        while state.outbox.front().is_some_and(|purge| purge.number <= number) {
            state.outbox.pop_front();
        }
        if let Some(fleet) = &self.fleet {
            fleet.wait_logged.send_replace(LogProgress { number, unwritable: false });
        }
    }

    /// Marks the log as unwritable, which ends all waits for it.
    pub fn mark_log_unwritable(&self) {
        if let Some(fleet) = &self.fleet {
            fleet.wait_logged.send_modify(|logged| logged.unwritable = true);
        }
    }

    /// Waits for at most `patience` until the log has the purge, and returns whether it does. Returns false at once if
    /// the log can't be written, or if purges are not shared.
    pub async fn wait_logged(&self, number: u64, patience: Duration) -> bool {
        let Some(fleet) = &self.fleet else { return false };
        let mut logged = fleet.wait_logged.subscribe();
        let decided = logged.wait_for(|logged| logged.number >= number || logged.unwritable);
        let decided = tokio::time::timeout(patience, decided).await;
        decided.is_ok_and(|logged| logged.is_ok_and(|logged| logged.number >= number))
    }

    /// Returns the number of purges that the log does not have yet.
    pub fn unlogged(&self) -> usize {
        self.read().outbox.len()
    }

    /// Returns the milliseconds since the log was last known to be read to its end, or `None` if purges are not shared.
    pub fn lag(&self, now: Tick) -> Option<u64> {
        let fleet = self.fleet.as_ref()?;
        let trusted = self.trusted_until.load(Ordering::Relaxed);
        Some(now.since(Tick(trusted.saturating_sub(millis(fleet.max_unverified)))))
    }
}

impl LedgerState {
    /// Puts the most recent own purges into the outbox again, in order. Their local position becomes `at`: everything
    /// before is unverified anyway.
    fn requeue_recent(&mut self, at: Position) {
        let first = self.recent.front().map_or(u64::MAX, |purge| purge.number);
        self.outbox.retain(|purge| purge.number < first);
        self.outbox.extend(self.recent.iter().cloned());
        self.unconfirmed = self.outbox.iter().map(|purge| (purge.number, at)).collect();
    }

    /// Notes that a purge was read. Returns true if it had been read before.
    fn is_duplicate(&mut self, purge: &PurgeMessage) -> bool {
        if self.last_numbers.len() > MAX_SIDECARS {
            self.last_numbers.clear();
        }
        let last = self.last_numbers.entry(purge.from).or_insert(0);
        let before = purge.number <= *last;
        *last = purge.number.max(*last);
        before
    }

    /// Replaces all purges in a full outbox with one hard purge of everything.
    fn collapse_outbox(&mut self) {
        if let Some(last) = self.outbox.pop_back() {
            self.outbox.clear();
            let everything =
                PurgeMessage { strength: PurgeKind::Hard, selectors: vec![Selector::Everything], ..last };
            // When it is read back from the log, it has the position of the first purge that it replaces.
            let first = self.unconfirmed.front().map(|(_, position)| *position);
            self.unconfirmed.clear();
            self.unconfirmed.extend(first.map(|position| (everything.number, position)));
            self.outbox.push_back(everything);
        }
    }
}
