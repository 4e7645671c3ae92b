//! Local and fleet-wide invalidations: a lock around the ledger and the log positions, and two atomics read on hits.
//!
//! A purge made here takes effect when it is recorded, and stays in the outbox until the log has it. Purges of other
//! sidecars arrive through the log ([`super::invalidation_log`]). An entry is trusted for `max_unverified` after the last
//! moment at which this sidecar is known to have applied all purges of all sidecars, or after the entry was received,
//! whichever is later.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tracing::warn;

use super::SidecarId;
use super::ledger_state::LedgerState;
use super::purge_message::{LogMessage, PurgeMessage};
use crate::clock::FleetClock;
use crate::policy::entry::Entry;
use crate::policy::invalidation::ledger::{InvalidationState, Position, Purge, PurgeKind, ResourceId, Selector};
use crate::policy::invalidation::log_position::{LogGap, LogId, SeenLog};
use crate::policy::{Tick, millis};
use crate::store::redis_tier::PurgedRecords;

/// The purges made by this sidecar and the fleet.
#[derive(Debug)]
pub struct Invalidations {
    /// The position of the ledger: the global epoch.
    epoch: AtomicU64,
    /// The tick until which every entry is trusted.
    trusted_until: AtomicU64,
    state: RwLock<LedgerState>,
    /// Notified when the ledger becomes nearly full.
    nearly_full: Notify,
    fleet: Option<FleetState>,
    /// The instance that replaced this one at a configuration reload.
    successor: OnceLock<Arc<Invalidations>>,
}

/// The state that exists only if purges are shared with a fleet.
#[derive(Debug)]
struct FleetState {
    me: SidecarId,
    started: Tick,
    max_unverified: Duration,
    clock: Arc<FleetClock>,
    /// How far the log has this sidecar's purges.
    log_progress: watch::Sender<LogProgress>,
    /// The number of the last purge that waits to be appended to the log.
    waiting: watch::Sender<u64>,
    /// Whether the log has been read to its end.
    caught_up: watch::Sender<bool>,
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

impl PurgedRecords for Invalidations {
    fn is_settled(&self) -> bool {
        let state = self.read();
        state.outbox.is_empty() && state.unconfirmed.is_empty()
    }

    fn is_gone(&self, resource: &ResourceId, seen: LogId) -> bool {
        let position = self.position_of(seen);
        self.read().ledger.state_of(resource, position, Tick(u64::MAX)) == InvalidationState::Gone
    }
}

impl Default for Invalidations {
    fn default() -> Self {
        let state = LedgerState::default();
        let epoch = AtomicU64::new(state.ledger.position().0);
        let state = RwLock::new(state);
        let (trusted_until, successor) = (AtomicU64::new(u64::MAX), OnceLock::new());
        Invalidations { epoch, trusted_until, state, nearly_full: Notify::new(), fleet: None, successor }
    }
}

impl Invalidations {
    /// Returns the invalidations of a sidecar in a fleet that starts now. Until the first proof that the log is complete,
    /// an entry is trusted for `max_unverified` after it was received.
    pub fn shared(me: SidecarId, max_unverified: Duration, clock: Arc<FleetClock>) -> Invalidations {
        let (log_progress, waiting, caught_up) =
            (watch::Sender::new(LogProgress::default()), watch::Sender::new(0), watch::Sender::new(false));
        let started = clock.tick_now();
        Invalidations {
            trusted_until: AtomicU64::new(0),
            fleet: Some(FleetState { me, started, max_unverified, clock, log_progress, waiting, caught_up }),
            ..Invalidations::default()
        }
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
    pub fn record(&self, selectors: Vec<Selector>, kind: PurgeKind, confirmation: Option<u64>) -> PurgeReceipt {
        if let Some(successor) = self.successor.get() {
            successor.record(selectors.clone(), kind, None);
        }
        let mut state = self.write();
        let position = self.add(&mut state, selectors.iter().cloned(), kind.into());
        if let Some(fleet) = &self.fleet {
            let number = state.recorded + 1;
            let purge = PurgeMessage { from: fleet.me, number, kind, selectors, confirmation, repeated: None };
            state.queue(purge, position, fleet.clock.tick_now());
            fleet.waiting.send_replace(number);
        }
        self.epoch.store(position.0, Ordering::Release);
        PurgeReceipt { position, number: state.recorded }
    }

    /// Records a purge in the ledger. Returns its position.
    fn add(&self, state: &mut LedgerState, what: impl IntoIterator<Item = Selector>, purge: Purge) -> Position {
        let (before, overflows) = (state.ledger.is_nearly_full(), state.ledger.overflows());
        let position = state.ledger.record(what, purge);
        if state.ledger.is_nearly_full() && !before {
            self.nearly_full.notify_one();
        }
        if state.ledger.overflows() > overflows {
            warn!(
                "the invalidation ledger was full: older entries not used since are validated before they are served"
            );
        }
        position
    }

    /// Waits until the ledger becomes nearly full: entries that are checked now are not affected when it drops purges.
    pub async fn wait_nearly_full(&self) {
        self.nearly_full.notified().await;
    }

    /// Makes `next` the successor, possibly with another Redis. Purges by requests still in progress are recorded there
    /// too, and the outbox moves there.
    pub fn replace_with(&self, next: &Arc<Invalidations>) {
        if self.successor.set(next.clone()).is_ok() {
            let waiting: Vec<PurgeMessage> = self.write().outbox.drain(..).collect();
            for purge in waiting {
                next.record(purge.selectors, purge.kind, None);
            }
        }
    }

    /// Returns the invalidation state of an entry. Compares two numbers, unless something was purged since the entry's
    /// last lookup, or the log has not been read for too long.
    pub fn state_of(&self, entry: &Entry, now: Tick) -> InvalidationState {
        let (checked, mut known) = entry.last_check();
        if checked != self.position() {
            let ledger = &self.read().ledger;
            known = known.max(ledger.state_since(&entry.resource, entry.position, entry.received_at, checked));
            entry.cache_state(ledger.position(), known);
        }
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
        self.position() != position
            && self.read().ledger.state_of(address, position, Tick(u64::MAX)) != InvalidationState::Valid
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
            self.reset(&mut state);
        }
        let position = state.ledger.position();
        state.chain.begin(origin, position);
    }

    /// Makes all stored entries unverified, and logs the recent own purges once more, because the log may have lost them.
    fn reset(&self, state: &mut LedgerState) -> Position {
        let position = state.ledger.mark_unverified();
        self.epoch.store(position.0, Ordering::Release);
        if let Some(fleet) = &self.fleet {
            state.requeue_recent(position, &fleet.clock);
            if let Some(last) = state.outbox.back() {
                fleet.waiting.send_replace(last.number);
            }
        }
        position
    }

    /// Applies the next log entry. `message` is `None` for an empty entry, and `Some(None)` for one that can't be
    /// verified or decoded, which makes all stored entries unverified. Fails if `previous` is not the entry read last.
    pub fn apply(&self, previous: LogId, id: LogId, message: Option<Option<LogMessage>>) -> Result<(), LogGap> {
        let mut state = self.write();
        if state.chain.last() != Some(previous) {
            return Err(LogGap);
        }
        let at = match message {
            None => state.ledger.position(),
            Some(None) => state.ledger.mark_unverified(),
            Some(Some(LogMessage::Reset)) => self.reset(&mut state),
            Some(Some(LogMessage::Purge(purge))) => {
                let (ours, duplicate) = (self.ours(&mut state, &purge), state.is_duplicate(&purge));
                match ours {
                    Some(position) => position,
                    None if duplicate => state.ledger.position(),
                    None => {
                        let made_at = purge.repeated.map(|time| self.tick_of(time));
                        self.add(&mut state, purge.selectors, Purge { kind: purge.kind, made_at })
                    }
                }
            }
        };
        self.epoch.store(state.ledger.position().0, Ordering::Release);
        state.chain.extend(previous, id, at)?;
        state.confirm();
        Ok(())
    }

    /// Returns the earliest tick of a fleet time.
    fn tick_of(&self, time: u64) -> Tick {
        self.fleet.as_ref().and_then(|fleet| fleet.clock.tick(time)).unwrap_or_default()
    }

    /// Returns the position of a purge that this sidecar made itself, when it is read back from the log.
    fn ours(&self, state: &mut LedgerState, purge: &PurgeMessage) -> Option<Position> {
        if self.fleet.as_ref().is_none_or(|fleet| fleet.me != purge.from) {
            return None;
        }
        let index = state.unconfirmed.iter().position(|(number, _)| *number == purge.number)?;
        state.unconfirmed.remove(index).map(|(_, position)| position)
    }

    /// Marks all purges that any sidecar made up to `at` as applied.
    pub fn mark_verified(&self, at: Tick) {
        if let Some(fleet) = &self.fleet {
            self.trusted_until.store(at.plus(fleet.max_unverified).0, Ordering::Relaxed);
        }
    }

    /// Returns how long entries are trusted without proof that all purges are applied. `None` without a fleet.
    pub fn max_unverified(&self) -> Option<Duration> {
        self.fleet.as_ref().map(|fleet| fleet.max_unverified)
    }

    /// Returns how often the ledger was full, so that entries that had not been compared with its older purges became
    /// unverified.
    pub fn overflows(&self) -> u64 {
        self.read().ledger.overflows()
    }

    /// Sets whether the log has been read to its end since the last read error.
    pub fn set_caught_up(&self, caught_up: bool) {
        if let Some(fleet) = &self.fleet {
            fleet.caught_up.send_if_modified(|known| std::mem::replace(known, caught_up) != caught_up);
        }
    }

    /// Waits until the log has been read to its end.
    pub async fn wait_caught_up(&self) {
        if let Some(fleet) = &self.fleet
            && !*fleet.caught_up.borrow()
        {
            let _ = fleet.caught_up.subscribe().wait_for(|caught_up| *caught_up).await;
        }
    }

    /// Waits until there are purges that the log does not have, and returns the oldest ones, at most `count`.
    pub async fn next_to_log(&self, count: usize) -> Vec<PurgeMessage> {
        loop {
            let Some(fleet) = &self.fleet else { return std::future::pending().await };
            let mut waiting = fleet.waiting.subscribe();
            let purges = self.unlogged_purges(count);
            if !purges.is_empty() {
                return purges;
            }
            let _ = waiting.changed().await;
        }
    }

    /// Returns the oldest purges that the log does not have, at most `count`.
    pub(super) fn unlogged_purges(&self, count: usize) -> Vec<PurgeMessage> {
        self.read().outbox.iter().take(count).cloned().collect()
    }

    /// Removes the purges up to `number` from the outbox: the log, which ends with the entry `end`, has them.
    pub fn mark_logged(&self, number: u64, end: LogId) {
        let mut state = self.write();
        state.set_logged(number, end);
        while state.outbox.front().is_some_and(|purge| purge.number <= number) {
            state.outbox.pop_front();
        }
        if let Some(fleet) = &self.fleet {
            fleet.log_progress.send_replace(LogProgress { number, unwritable: false });
        }
    }

    /// Marks the log as unwritable, which ends all waits for it.
    pub fn mark_log_unwritable(&self) {
        if let Some(fleet) = &self.fleet {
            fleet.log_progress.send_modify(|logged| logged.unwritable = true);
        }
    }

    /// Waits for at most `patience` until the log has all purges, and returns whether it does.
    pub async fn wait_all_logged(&self, max_wait: Duration) -> bool {
        let Some(fleet) = &self.fleet else { return true };
        let mut logged = fleet.log_progress.subscribe();
        tokio::time::timeout(max_wait, logged.wait_for(|_| self.unlogged() == 0)).await.is_ok()
    }

    /// Waits for at most `patience` until the log has the purge, and returns whether it does. Returns false at once if
    /// the log can't be written, or if purges are not shared.
    pub async fn wait_logged(&self, number: u64, max_wait: Duration) -> bool {
        let Some(fleet) = &self.fleet else { return false };
        let mut logged = fleet.log_progress.subscribe();
        let decided = logged.wait_for(|logged| logged.number >= number || logged.unwritable);
        let decided = tokio::time::timeout(max_wait, decided).await;
        decided.is_ok_and(|logged| logged.is_ok_and(|logged| logged.number >= number))
    }

    /// Returns the maximum time since the log had all purges: zero if it has them, else the time since the start.
    pub fn unlogged_for(&self, now: Tick) -> Duration {
        match &self.fleet {
            Some(fleet) if self.unlogged() > 0 => Duration::from_millis(now.since(fleet.started).max(1)),
            Some(_) | None => Duration::ZERO,
        }
    }

    /// Returns the number of purges that the log does not have yet.
    pub fn unlogged(&self) -> usize {
        self.read().outbox.len()
    }

    /// Returns the milliseconds since the log was last known to be read to its end, or since the start, or `None` if purges are not shared.
    pub fn lag(&self, now: Tick) -> Option<u64> {
        let fleet = self.fleet.as_ref()?;
        let trusted = self.trusted_until.load(Ordering::Relaxed);
        Some(now.since(Tick(trusted.saturating_sub(millis(fleet.max_unverified))).max(fleet.started)))
    }
}
