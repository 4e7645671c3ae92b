//! State shared by the proxies of all upstreams of a process.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;

use super::fetch::coalesce::Coalescer;
use crate::body::fanout::InflightBudget;
use crate::clock::Clock;
use crate::fleet::Fleet;
use crate::fleet::invalidations::Invalidations;
use crate::policy::mode::ModeSwitch;
use crate::policy::routing::cache_key::KeySecret;
use crate::store::{IncompleteResponses, Memory};
use crate::telemetry::Telemetry;

/// What the steps of every proxy are built from.
#[derive(Debug)]
pub struct SharedState {
    /// Source of time.
    pub clock: Clock,
    /// The memory tier.
    pub memory: Arc<Memory>,
    /// First parts of responses that are not complete (RFC 9111 §3.3).
    pub incomplete: Arc<IncompleteResponses>,
    /// Purges of this process and of the fleet.
    pub invalidations: Arc<Invalidations>,
    /// Running fetches, one for each key.
    pub coalescer: Arc<Coalescer>,
    /// Bytes that running fetches may buffer.
    pub inflight: Arc<InflightBudget>,
    /// The sidecars that share a Redis with this one. `None` without `[redis]`.
    pub fleet: Option<Arc<Fleet>>,
    /// Secret of the digests of credentials. A sidecar may adopt the fleet's after start.
    pub key_secret: Arc<ArcSwap<KeySecret>>,
    /// Size of the largest response that is stored, in bytes.
    pub max_entry_bytes: u64,
    /// Time after which a reader that blocks other readers of the same body is cut.
    pub shared_write_stall: Duration,
    /// The mode: normal, bypass, shadow.
    pub mode: Arc<ModeSwitch>,
    /// Counters, logs and traces.
    pub telemetry: Arc<Telemetry>,
}
