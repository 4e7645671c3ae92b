//! A model of the invalidation log, membership and records: random interleavings of purges, appends, heartbeats, reads,
//! lost replies, kills, and a Redis that is emptied or returns with older data. Whatever happens, no sidecar takes an
//! entry for valid for longer than `max_unverified` after a purge of it by another one, and none after its own.

mod server;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;

use super::SidecarId;
use super::invalidations::Invalidations;
use super::membership::Membership;
use crate::clock::{Clock, FleetClock, ServerTime};
use crate::policy::entry::{Entry, Lifetimes, testing};
use crate::policy::invalidation::ledger::{InvalidationState, PurgeKind, Selector};
use crate::policy::invalidation::log_position::{LogId, SeenLog};
use crate::policy::invalidation::tag::{TagScope, UpstreamId, subjects};
use crate::policy::{Tick, millis};
use server::{Data, Server, StoredRecord};

const SIDECARS: usize = 3;
const RESOURCES: usize = 2;
const MAX_UNVERIFIED: Duration = Duration::from_secs(1);

/// Real time passes while the model runs.
const TOLERANCE: u64 = 200;

const SCOPE: TagScope<'static> = TagScope { upstream: UpstreamId(0), authority: None };

#[derive(Debug, Clone)]
enum Step {
    Purge {
        by: usize,
        resource: usize,
        hard: bool,
    },
    /// The oldest unlogged purges reach Redis; the reply may be lost.
    Append {
        by: usize,
        lost: bool,
    },
    Beat {
        by: usize,
        lost: bool,
    },
    /// Reads this many entries of the log.
    Read {
        by: usize,
        count: usize,
    },
    /// Fetches a resource from the upstream into memory, and stores its record in Redis.
    Fetch {
        by: usize,
        resource: usize,
    },
    /// Takes the record of a resource into memory.
    Load {
        by: usize,
        resource: usize,
    },
    Pass {
        millis: u64,
    },
    Kill {
        by: usize,
    },
    /// A sidecar is started in the place of one that was killed.
    Start {
        by: usize,
    },
    Snapshot,
    /// Redis is started again, with the last snapshot or empty.
    Restore,
    Flush,
}

fn step() -> impl Strategy<Value = Step> {
    let (by, resource) = (0..SIDECARS, 0..RESOURCES);
    prop_oneof![
        4 => (by.clone(), resource.clone(), any::<bool>())
            .prop_map(|(by, resource, hard)| Step::Purge { by, resource, hard }),
        6 => (by.clone(), prop::bool::weighted(0.2)).prop_map(|(by, lost)| Step::Append { by, lost }),
        8 => (by.clone(), prop::bool::weighted(0.2)).prop_map(|(by, lost)| Step::Beat { by, lost }),
        8 => (by.clone(), 1..5usize).prop_map(|(by, count)| Step::Read { by, count }),
        5 => (by.clone(), resource.clone()).prop_map(|(by, resource)| Step::Fetch { by, resource }),
        4 => (by.clone(), resource).prop_map(|(by, resource)| Step::Load { by, resource }),
        4 => (10..700u64).prop_map(|millis| Step::Pass { millis }),
        1 => by.clone().prop_map(|by| Step::Kill { by }),
        1 => by.prop_map(|by| Step::Start { by }),
        1 => Just(Step::Snapshot),
        1 => Just(Step::Restore),
        1 => Just(Step::Flush),
    ]
}

struct Sidecar {
    id: SidecarId,
    invalidations: Invalidations,
    membership: Membership,
    entries: Vec<(usize, Entry)>,
    /// The sidecars that Redis counted at its heartbeats.
    heard_of: HashSet<SidecarId>,
}

struct Purged {
    by: SidecarId,
    resource: usize,
    at: Tick,
}

struct Model {
    clock: Clock,
    fleet_clock: Arc<FleetClock>,
    /// The time since which Redis counts each sidecar that it counts.
    counted_since: HashMap<SidecarId, Tick>,
    server: Server,
    sidecars: Vec<Option<Sidecar>>,
    purges: Vec<Purged>,
    /// The number of sidecars started.
    started: u64,
}

fn target(resource: usize) -> String {
    format!("/r/{resource}")
}

impl Model {
    fn new() -> Model {
        let clock = Clock::start();
        let fleet_clock = Arc::new(FleetClock::new(clock.clone()));
        fleet_clock.update(ServerTime { server: 1_000_000_000_000, sent_at: clock.instant() });
        let server = Server { data: Data::default(), snapshot: Data::default(), run: 1, last_id: 0 };
        let (counted_since, sidecars, purges) = (HashMap::new(), Vec::new(), Vec::new());
        let mut model = Model { clock, fleet_clock, counted_since, server, sidecars, purges, started: 0 };
        for _ in 0..SIDECARS {
            let sidecar = model.start();
            model.sidecars.push(Some(sidecar));
        }
        model
    }

    fn start(&mut self) -> Sidecar {
        self.started += 1;
        let id = SidecarId(self.started);
        let invalidations = Invalidations::shared(id, MAX_UNVERIFIED, self.fleet_clock.clone());
        Sidecar {
            id,
            invalidations,
            membership: Membership::default(),
            entries: Vec::new(),
            heard_of: HashSet::new(),
        }
    }

    /// Notes which sidecars Redis counts, by their ID or as one that has not returned.
    fn note_counted(&mut self) {
        let (data, now) = (&self.server.data, self.clock.now());
        for id in (1..=self.started).map(SidecarId) {
            if data.members.contains_key(&id.0) || data.expected.is_incomplete() {
                self.counted_since.entry(id).or_insert(now);
            } else {
                self.counted_since.remove(&id);
            }
        }
    }

    fn step(&mut self, step: &Step) {
        let now = self.clock.now();
        match *step {
            Step::Pass { millis } => self.clock.turn(Duration::from_millis(millis)),
            Step::Kill { by } => self.sidecars[by] = None,
            Step::Start { by } => {
                if self.sidecars[by].is_none() {
                    self.sidecars[by] = Some(self.start());
                }
            }
            Step::Snapshot => self.server.snapshot = self.server.data.clone(),
            Step::Restore => {
                self.server.data = self.server.snapshot.clone();
                self.server.run += 1;
            }
            Step::Flush => self.server.data = Data::default(),
            Step::Purge { by, .. }
            | Step::Append { by, .. }
            | Step::Beat { by, .. }
            | Step::Read { by, .. }
            | Step::Fetch { by, .. }
            | Step::Load { by, .. } => {
                if let Some(sidecar) = &mut self.sidecars[by] {
                    sidecar.step(step, &mut self.server, now);
                    if let Step::Purge { resource, .. } = *step {
                        self.purges.push(Purged { by: sidecar.id, resource, at: now });
                    }
                }
            }
        }
        self.note_counted();
    }

    fn check(&self) -> Result<(), TestCaseError> {
        let now = self.clock.now();
        for sidecar in self.sidecars.iter().flatten() {
            for (resource, entry) in &sidecar.entries {
                if sidecar.invalidations.state_of(entry, now) != InvalidationState::Valid {
                    continue;
                }
                let of_entry = self.purges.iter().filter(|p| p.resource == *resource && p.at > entry.received_at);
                for purge in of_entry {
                    let Some(known_at) = self.known_at(sidecar, purge) else { continue };
                    let old = now.since(known_at);
                    prop_assert!(purge.by != sidecar.id, "{:?} serves what it purged {old} ms ago", sidecar.id);
                    prop_assert!(
                        old <= millis(MAX_UNVERIFIED) + TOLERANCE,
                        "{:?} serves what {:?} purged {old} ms ago",
                        sidecar.id,
                        purge.by
                    );
                }
            }
        }
        Ok(())
    }
}

impl Model {
    /// Returns the time since which `sidecar` must take the purge into account, if it can know of the one that made it.
    fn known_at(&self, sidecar: &Sidecar, purge: &Purged) -> Option<Tick> {
        if purge.by == sidecar.id || sidecar.heard_of.contains(&purge.by) {
            return Some(purge.at);
        }
        self.counted_since.get(&purge.by).map(|since| purge.at.max(*since))
    }
}

impl Sidecar {
    fn step(&mut self, step: &Step, server: &mut Server, now: Tick) {
        match *step {
            Step::Purge { resource, hard, .. } => {
                let kind = if hard { PurgeKind::Hard } else { PurgeKind::Soft };
                self.invalidations.record(vec![Selector::target(SCOPE, &target(resource))], kind, None);
            }
            Step::Append { lost, .. } => {
                let purges = self.invalidations.unlogged_purges(3);
                let last = purges.last().map_or(0, |purge| purge.number);
                if !purges.is_empty() && server.append(self.id, purges) && !lost {
                    let end = server.data.log.last().map_or(LogId::default(), |(_, id, _)| *id);
                    self.invalidations.mark_logged(last, end);
                }
            }
            Step::Beat { lost, .. } => {
                let read = self.invalidations.log_position();
                let unlogged_for = self.invalidations.unlogged_for(now);
                let reply = server.beat(self.id, unlogged_for, &self.membership, now.0);
                if !lost {
                    self.membership.update(&reply, now, read);
                    self.heard_of.extend(server.data.members.keys().map(|id| SidecarId(*id)));
                    self.verify();
                }
            }
            Step::Read { count, .. } => self.read(server, count),
            Step::Fetch { resource, .. } => {
                let position = self.invalidations.position();
                self.keep(resource, now, position);
                if let SeenLog::UpTo(seen) = self.invalidations.log_seen_at(position) {
                    server.data.records.insert(resource, StoredRecord { seen, received_at: now });
                }
            }
            Step::Load { resource, .. } => {
                if let Some(record) = server.data.records.get(&resource) {
                    let position = self.invalidations.position_of(record.seen);
                    self.keep(resource, record.received_at, position);
                }
            }
            Step::Pass { .. }
            | Step::Kill { .. }
            | Step::Start { .. }
            | Step::Snapshot
            | Step::Restore
            | Step::Flush => {}
        }
    }

    fn keep(&mut self, resource: usize, received_at: Tick, position: crate::policy::invalidation::ledger::Position) {
        let mut entry = testing::entry(Lifetimes::default());
        entry.received_at = received_at;
        entry.position = position;
        entry.resource.target = target(resource).into();
        entry.resource.subjects = subjects(SCOPE, &target(resource), &[]).into();
        self.entries.push((resource, entry));
    }

    /// Follows the log as `invalidation_log.rs` does.
    fn read(&mut self, server: &Server, count: usize) {
        let broken = self.membership.take_log_truncated();
        let Some(last) = self.invalidations.log_position().filter(|_| !broken) else {
            if broken {
                self.membership.set_broken();
            }
            if let Some((previous, ..)) = server.data.log.first() {
                self.invalidations.begin_log(*previous);
            }
            return;
        };
        let after: Vec<_> = server.data.log.iter().filter(|(_, id, _)| *id > last).take(count).cloned().collect();
        for (previous, id, message) in after {
            if self.invalidations.apply(previous, id, message.map(Some)).is_err() {
                self.membership.set_broken();
                if let Some((previous, ..)) = server.data.log.first() {
                    self.invalidations.begin_log(*previous);
                }
                return;
            }
        }
        self.verify();
    }

    fn verify(&self) {
        if let Some(proof) = self.membership.take_proof(self.invalidations.log_position()) {
            self.invalidations.mark_verified(proof.complete_until);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, ..ProptestConfig::default() })]

    #[test]
    fn no_interleaving_keeps_an_entry_valid_beyond_max_unverified(steps in prop::collection::vec(step(), 1..120)) {
        let mut model = Model::new();
        for step in &steps {
            model.step(step);
            model.check()?;
        }
    }
}
