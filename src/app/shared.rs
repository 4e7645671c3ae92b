//! The shared state of all upstreams: built at startup, rebuilt from the previous state by a configuration reload.

use std::sync::Arc;

use arc_swap::ArcSwap;

use super::fleet;
use crate::body::fanout::InflightBudget;
use crate::clock::Clock;
use crate::config::Config;
use crate::fleet::invalidations::Invalidations;
use crate::policy::mode::ModeSwitch;
use crate::proxy::SharedState;
use crate::proxy::fetch::coalesce::Coalescer;
use crate::secret::Secret;
use crate::store::memory::MemoryLimits;
use crate::store::record::RecordCodec;
use crate::store::{IncompleteResponses, Memory};
use crate::telemetry::Telemetry;

/// Builds the shared state at startup.
pub(super) fn build(config: &Config, clock: Clock) -> Result<(SharedState, Option<fleet::FleetParts>), String> {
    let mode = Arc::new(ModeSwitch::new(config.mode.0, config.mode.1));
    build_with(config, clock, mode, Arc::default())
}

/// Rebuilds the shared state for a new configuration. Entries are kept unless they cannot be trusted under it (`anew`):
/// a change of the Redis or the secrets starts with an empty cache.
pub(super) fn rebuild(
    before: &SharedState,
    config: &Config,
    restart_cache: bool,
) -> Result<(SharedState, Option<fleet::FleetParts>), String> {
    let (mode, telemetry) = (before.mode.clone(), before.telemetry.clone());
    if restart_cache {
        return build_with(config, before.clock.clone(), mode, telemetry);
    }
    let (memory, limits) = (config.memory, config.limits);
    let same_inflight = before.inflight.max() == memory.max_inflight_bytes;
    let shared = SharedState {
        clock: before.clock.clone(),
        memory: before.memory.rebuilt(&memory).map_or_else(|| before.memory.clone(), Arc::new),
        incomplete: before.incomplete.clone(),
        invalidations: before.invalidations.clone(),
        coalescer: before.coalescer.clone(),
        inflight: if same_inflight {
            before.inflight.clone()
        } else {
            InflightBudget::new(memory.max_inflight_bytes)
        },
        fleet: before.fleet.clone(),
        key_secret: before.key_secret.clone(),
        max_entry_bytes: memory.max_entry_bytes,
        shared_write_stall: limits.shared_write_stall,
        mode,
        telemetry,
    };
    Ok((shared, None))
}

/// Applies the new size limits to the state that was kept.
pub(super) fn apply_sizes(shared: &SharedState, memory: MemoryLimits) {
    shared.memory.resize(memory.max_bytes);
    if let Some(fleet) = &shared.fleet {
        let max_body = memory.max_entry_bytes;
        fleet.tier.update_codec(|codec| RecordCodec { max_body, ..codec.clone() });
    }
}

fn build_with(
    config: &Config,
    clock: Clock,
    mode: Arc<ModeSwitch>,
    telemetry: Arc<Telemetry>,
) -> Result<(SharedState, Option<fleet::FleetParts>), String> {
    let secrets = fleet::Secrets::of(config)?;
    let fleet = config.redis.as_ref().map(|redis| fleet::build(redis, config, &secrets, &clock)).transpose()?;
    let invalidations: Arc<Invalidations> =
        fleet.as_ref().map_or_else(Arc::default, |fleet| fleet.invalidations.clone());
    let shared = SharedState {
        clock,
        memory: Arc::new(Memory::new(&config.memory)),
        incomplete: Arc::new(IncompleteResponses::beside(config.memory.max_bytes)),
        coalescer: Arc::new(Coalescer::new(invalidations.clone())),
        invalidations,
        inflight: InflightBudget::new(config.memory.max_inflight_bytes),
        fleet: fleet.as_ref().map(|parts| parts.fleet.clone()),
        key_secret: Arc::new(ArcSwap::from_pointee(secrets.key())),
        max_entry_bytes: config.memory.max_entry_bytes,
        shared_write_stall: config.limits.shared_write_stall,
        mode,
        telemetry,
    };
    Ok((shared, fleet))
}

/// Returns a text of all settings that the validity of entries depends on. Secrets print as stars, so their digests are
/// included to detect changes.
pub(super) fn foundations(config: &Config) -> String {
    let digest = |secret: &Secret| blake3::hash(secret.reveal().as_bytes());
    let secrets: Vec<_> = config.secrets.iter().map(digest).collect();
    let works = config.upstreams.iter().flat_map(|u| u.router.rules()).any(|rule| rule.refresh_ahead.is_some());
    let (redis, encrypt, max_unverified) = (&config.redis, config.encrypt, config.memory.max_unverified);
    // With Redis, refreshes ahead are shared among sidecars, which needs a connection of its own.
    let works = works && redis.is_some();
    format!("{redis:?} {secrets:?} {encrypt} {max_unverified:?} {works}")
}
