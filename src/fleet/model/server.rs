//! What Redis holds in the model: the scripts APPEND and BEAT, in Rust.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use bytes::Bytes;

use crate::fleet::SidecarId;
use crate::fleet::membership::Membership;
use crate::fleet::purge_message::{LogMessage, PurgeMessage};
use crate::policy::invalidation::log_position::LogId;
use crate::policy::{Tick, millis};
use crate::redis::BeatReply;

/// A record: the log entry that its fetch had seen, and when it was received.
#[derive(Debug, Clone, Copy)]
pub(super) struct StoredRecord {
    pub(super) seen: LogId,
    pub(super) received_at: Tick,
}

/// What Redis holds: the scripts APPEND and BEAT, in Rust.
#[derive(Debug, Clone, Default)]
pub(super) struct Data {
    pub(super) log: Vec<(LogId, LogId, Option<LogMessage>)>,
    pub(super) numbers: HashMap<SidecarId, u64>,
    pub(super) members: BTreeMap<u64, u64>,
    pub(super) epoch: String,
    pub(super) expected: Expected,
    pub(super) records: HashMap<usize, StoredRecord>,
}

/// The sidecars that report to an epoch.
#[derive(Debug, Clone, Default)]
pub(super) struct Expected {
    pub(super) since: u64,
    pub(super) members: u64,
    /// Whether each sidecar that sent a heartbeat in this epoch had been in an earlier one.
    pub(super) returned: HashMap<SidecarId, bool>,
}

impl Expected {
    pub(super) fn count(&self, returned: bool) -> u64 {
        self.returned.values().filter(|one| **one == returned).count() as u64
    }

    pub(super) fn is_incomplete(&self) -> bool {
        self.members > self.count(true)
    }
}

pub(super) struct Server {
    pub(super) data: Data,
    pub(super) snapshot: Data,
    pub(super) run: u64,
    /// The last ID given, which no other log has.
    pub(super) last_id: u64,
}

impl Server {
    pub(super) fn push(&mut self, message: Option<LogMessage>) -> LogId {
        self.last_id += 1;
        let id = LogId { ms: self.last_id, seq: 0 };
        let previous = self.data.log.last().map_or(LogId::default(), |(_, id, _)| *id);
        self.data.log.push((previous, id, message));
        id
    }

    pub(super) fn append(&mut self, from: SidecarId, purges: Vec<PurgeMessage>) -> bool {
        if self.data.log.is_empty() {
            return false;
        }
        for purge in purges {
            if purge.number > self.data.numbers.get(&from).copied().unwrap_or(0) {
                self.data.numbers.insert(from, purge.number);
                self.push(Some(LogMessage::Purge(purge)));
            }
        }
        true
    }

    pub(super) fn beat(
        &mut self,
        me: SidecarId,
        unlogged_for: Duration,
        membership: &Membership,
        now: u64,
    ) -> BeatReply {
        let (broken, (known_epoch, known_members)) = (membership.broken_epoch(), membership.known());
        if self.data.log.is_empty() {
            self.data.numbers.clear();
        }
        let server = format!("{}", self.run);
        let of_server = self.data.epoch.split(' ').next() == Some(&*server);
        if self.data.log.is_empty() || !of_server || self.data.epoch == broken {
            let id = self.push(Some(LogMessage::Reset));
            self.data.epoch = format!("{server} {}", id.ms);
            self.data.expected = Expected { since: now, ..Expected::default() };
        }
        let expected = &mut self.data.expected;
        if known_epoch != self.data.epoch {
            expected.returned.entry(me).or_insert(!known_epoch.is_empty());
            expected.members = expected.members.max(known_members);
        }
        if unlogged_for.is_zero() {
            self.data.members.insert(me.0, now);
        } else {
            self.data.members.entry(me.0).or_insert(now - millis(unlogged_for));
        }
        let mut oldest = self.data.members.values().min().copied().unwrap_or(now);
        if expected.is_incomplete() {
            oldest = oldest.min(expected.since);
        }
        let members = (self.data.members.len() as u64).max(expected.members + expected.count(false));
        BeatReply {
            now,
            epoch: self.data.epoch.clone(),
            end: self.data.log.last().map_or(LogId::default(), |(_, id, _)| *id),
            members,
            oldest: Duration::from_millis(now.saturating_sub(oldest)),
            mode: Bytes::new(),
            inbox: LogId::default(),
        }
    }
}
