//! Coordination between sidecars through Redis: purges, leases and shared refreshes.
//!
//! Serving a request does not depend on it. Without Redis every part falls back to this process alone: purges take
//! effect here at once and are propagated later, and each sidecar coalesces requests on its own.

mod authenticated;
pub mod inbox;
pub mod invalidation_log;
pub mod invalidations;
pub mod lease;
#[cfg(test)]
mod lease_model;
mod ledger_state;
pub mod membership;
pub mod mode_message;
#[cfg(test)]
mod model;
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
use invalidations::Invalidations;
use membership::Membership;

/// The state that a sidecar needs to coordinate with the others.
#[derive(Debug)]
pub struct Fleet {
    /// The ID of this sidecar.
    pub sidecar_id: SidecarId,
    /// The Redis connections.
    pub redis: Arc<Redis>,
    /// The shared store.
    pub tier: Arc<RedisTier>,
    /// What the heartbeats have shown.
    pub membership: Arc<Membership>,
    /// Messages to this sidecar.
    pub inbox: Arc<Inbox>,
    /// The keys that authenticate and encrypt messages.
    pub keyring: Arc<ArcSwap<Keyring>>,
    /// Whether refreshes are shared with other sidecars.
    pub shares_refreshes: bool,
    /// The longest wait for the fleet.
    pub timeout: Duration,
}

impl Fleet {
    /// Leaves the fleet, if the log has all purges of this sidecar within `patience`. A sidecar that does not leave is
    /// missed by the others, which stop trusting what they have stored.
    pub async fn leave(&self, invalidations: &Invalidations, max_wait: Duration) {
        if !invalidations.wait_all_logged(max_wait).await {
            let unlogged = invalidations.unlogged();
            tracing::warn!(
                unlogged,
                "purges are not in the invalidation log: the other sidecars stop trusting theirs"
            );
        } else if let Err(error) = self.redis.leave(&self.sidecar_id.to_string()).await {
            tracing::debug!(%error, "this sidecar could not leave the fleet");
        }
    }
}

/// Identifies a sidecar for the lifetime of its process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SidecarId(pub u64);

impl SidecarId {
    /// Returns a random ID. Fails if the system has no randomness.
    pub fn random() -> Result<SidecarId, String> {
        getrandom::u64().map(SidecarId).map_err(|e| format!("no random numbers available: {e}"))
    }
}

impl fmt::Display for SidecarId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}
