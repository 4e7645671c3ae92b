//! The oracle: the oldest version of a resource that a response may have.
//!
//! A write or purge through one sidecar holds there when its response arrives, on all sidecars once all have confirmed
//! it, and everywhere [`BOUND`] later, whatever Redis does meanwhile.

use std::sync::Mutex;
use std::time::Duration;

use tokio::time::Instant;

/// `max_unverified` of the sidecars.
pub(crate) const MAX_UNVERIFIED: Duration = Duration::from_secs(2);

/// The time after which a write or purge holds everywhere.
const BOUND: Duration = Duration::from_secs(3);

/// A running process of a sidecar. A restarted sidecar is a new process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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

/// All changes.
#[derive(Debug, Default)]
pub(crate) struct Oracle(Mutex<Vec<Change>>);

impl Oracle {
    pub(crate) fn add(&self, change: Change) {
        self.0.lock().expect("no panic").push(change);
    }

    /// Returns the change that a response to a request sent at `sent` to a process must reflect, if there is one.
    pub(crate) fn floor(&self, resource: usize, process: ProcessId, sent: Instant) -> Option<Change> {
        let changes = self.0.lock().expect("no panic");
        let of_resource = changes.iter().filter(|change| change.resource == resource && change.done <= sent);
        let holds =
            of_resource.filter(|change| change.process == process || change.confirmed || change.done + BOUND <= sent);
        holds.max_by_key(|change| change.version).cloned()
    }
}
