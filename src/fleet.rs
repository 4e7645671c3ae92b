//! What sidecars say to each other, through Redis: what was purged, who fetches what.
//!
//! Nothing here is needed to answer a request. Without Redis every part falls back to this process alone: purges act
//! here at once and are told later, and each sidecar coalesces for itself.

pub mod inbox;
pub mod invalidation_log;
pub mod invalidations;
pub mod lease;
pub mod purge_message;
pub mod refresh_queue;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;

use crate::redis::Redis;
use crate::store::RedisTier;
use crate::store::authentication::Keyring;
use inbox::Inbox;

/// What a sidecar has in common with the others.
#[derive(Debug)]
pub struct Fleet {
    /// Which one we are.
    pub sidecar_id: SidecarId,
    /// The connections.
    pub redis: Arc<Redis>,
    /// The store.
    pub tier: Arc<RedisTier>,
    /// Messages for us.
    pub inbox: Arc<Inbox>,
    /// The secrets that seal what is said.
    pub keyring: Arc<ArcSwap<Keyring>>,
    /// Whether there is work to share.
    pub shares_refreshes: bool,
    /// How long anything waits for the fleet.
    pub timeout: Duration,
}

/// Names a sidecar for as long as its process lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SidecarId(pub u64);

impl SidecarId {
    /// One that nobody else has.
    pub fn random() -> Result<SidecarId, String> {
        getrandom::u64().map(SidecarId).map_err(|e| format!("no randomness to be had: {e}"))
    }
}

impl fmt::Display for SidecarId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}
