//! The ledger with its relation to the fleet's log: positions of log entries, and own purges until the log has them.

use std::collections::{HashMap, VecDeque};

use super::SidecarId;
use super::purge_message::PurgeMessage;
use crate::clock::FleetClock;
use crate::policy::Tick;
use crate::policy::invalidation::ledger::{Ledger, Position, PurgeKind, Selector};
use crate::policy::invalidation::log_position::{LogId, LogPositions};

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

/// The ledger, its relation to the log, and the own purges that the log may not have.
#[derive(Debug)]
pub(super) struct LedgerState {
    pub(super) ledger: Ledger,
    pub(super) chain: LogPositions,
    /// Numbers and positions of own purges that have not been read back from the log yet.
    pub(super) unconfirmed: VecDeque<(u64, Position)>,
    /// The most recent own purges: another log may lack them.
    pub(super) recent: VecDeque<(PurgeMessage, Tick)>,
    /// The number of the last purge read of each sidecar, so that a purge logged twice is applied once.
    pub(super) last_numbers: HashMap<SidecarId, u64>,
    /// Own purges that the log does not have yet.
    pub(super) outbox: VecDeque<PurgeMessage>,
    /// Ends of the log, and the number of the last own purge that it had then, until it is read up to there.
    pub(super) logged: VecDeque<(LogId, u64)>,
    /// Number of purges made by this sidecar.
    pub(super) recorded: u64,
}

impl Default for LedgerState {
    fn default() -> Self {
        LedgerState {
            ledger: Ledger::new(MAX_SUBJECTS, MAX_MATCHERS),
            chain: LogPositions::new(MAX_LOG_POSITIONS),
            unconfirmed: VecDeque::new(),
            recent: VecDeque::new(),
            last_numbers: HashMap::new(),
            outbox: VecDeque::new(),
            logged: VecDeque::new(),
            recorded: 0,
        }
    }
}

impl LedgerState {
    /// Queues an own purge, made at `position` and `now`, to be appended to the log.
    pub(super) fn queue(&mut self, purge: PurgeMessage, position: Position, now: Tick) {
        if self.outbox.len() >= MAX_OUTBOX {
            self.collapse_outbox();
        }
        self.recorded = purge.number;
        self.unconfirmed.push_back((purge.number, position));
        self.recent.push_back((purge.clone(), now));
        if self.recent.len() > MAX_RECENT {
            self.recent.pop_front();
        }
        self.outbox.push_back(purge);
    }

    /// Puts the most recent own purges into the outbox again, in order, with the time at which they were made. Their
    /// local position becomes `at`: everything before is unverified anyway.
    pub(super) fn requeue_recent(&mut self, at: Position, clock: &FleetClock) {
        let first = self.recent.front().map_or(u64::MAX, |(purge, _)| purge.number);
        self.outbox.retain(|purge| purge.number < first);
        let repeated = self.recent.iter().map(|(purge, made_at)| PurgeMessage {
            repeated: Some(clock.at(*made_at).unwrap_or_default()),
            confirmation: None,
            ..purge.clone()
        });
        self.outbox.extend(repeated);
        self.unconfirmed = self.outbox.iter().map(|purge| (purge.number, at)).collect();
        self.logged.clear();
    }

    /// Notes that the log, when it ended with the entry `end`, had the own purges up to `number`.
    pub(super) fn set_logged(&mut self, number: u64, end: LogId) {
        self.logged.push_back((end, number));
        self.confirm();
    }

    /// Confirms the own purges that the part of the log that was read had, also those that it no longer keeps.
    pub(super) fn confirm(&mut self) {
        while let Some((_, number)) = self.logged.front().copied().filter(|(end, _)| Some(*end) <= self.chain.last())
        {
            self.logged.pop_front();
            self.unconfirmed.retain(|(unconfirmed, _)| *unconfirmed > number);
        }
    }

    /// Notes that a purge was read. Returns true if it had been read before.
    pub(super) fn is_duplicate(&mut self, purge: &PurgeMessage) -> bool {
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
            let everything = PurgeMessage { kind: PurgeKind::Hard, selectors: vec![Selector::Everything], ..last };
            // When it is read back from the log, it has the position of the first purge that it replaces.
            let first = self.unconfirmed.front().map(|(_, position)| *position);
            self.unconfirmed.clear();
            self.unconfirmed.extend(first.map(|position| (everything.number, position)));
            self.outbox.push_back(everything);
        }
    }
}
