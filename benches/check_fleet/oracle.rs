//! The oracle: the oldest version of a resource that a response may have.
//!
//! A write or purge through one sidecar holds there when its response arrives, on all sidecars that Redis had heard of once
//! all have confirmed it, and everywhere [`BOUND`] later, whatever Redis does meanwhile.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::Duration;

use tokio::time::Instant;

/// `max_unverified` of the sidecars.
pub(crate) const MAX_UNVERIFIED: Duration = Duration::from_secs(2);

/// The time after which a write or purge holds everywhere.
const BOUND: Duration = Duration::from_secs(3);

/// A running process of a sidecar. A restarted sidecar is a new process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct ProcessId(pub(crate) u64);

/// A completed write or purge.
#[derive(Debug, Clone)]
pub(crate) struct Change {
    pub(crate) resource: usize,
    /// The version that the origin had at the latest when the change was made.
    pub(crate) version: u64,
    pub(crate) process: ProcessId,
    /// When its response arrived.
    pub(crate) done: Instant,
    /// Whether all sidecars have confirmed it.
    pub(crate) confirmed: bool,
    pub(crate) what: String,
}

/// All changes, and when each process is known to have sent its first heartbeat.
#[derive(Debug, Default)]
pub(crate) struct Oracle(Mutex<Vec<Change>>, Mutex<HashMap<ProcessId, Instant>>);

impl Oracle {
    pub(crate) fn add(&self, change: Change) {
        self.0.lock().expect("no panic").push(change);
    }

    /// Notes that Redis has heard of a process.
    pub(crate) fn announced(&self, process: ProcessId) {
        self.1.lock().expect("no panic").entry(process).or_insert_with(Instant::now);
    }

    /// Returns the change that a response to a request sent at `sent` to a process must reflect, if there is one.
    pub(crate) fn floor(&self, resource: usize, process: ProcessId, sent: Instant) -> Option<Change> {
        let changes = self.0.lock().expect("no panic");
        let of_resource = changes.iter().filter(|change| change.resource == resource && change.done <= sent);
        let announced = self.1.lock().expect("no panic").get(&process).copied();
        let confirmed = |change: &Change| change.confirmed && announced.is_some_and(|at| at <= change.done);
        let holds = of_resource
            .filter(|change| change.process == process || confirmed(change) || change.done + BOUND <= sent);
        holds.max_by_key(|change| change.version).cloned()
    }
}
