//! What all upstreams of a process share, built from a configuration: the first time, and from the one before.

use std::sync::Arc;

use arc_swap::ArcSwap;

use super::fleet;
use crate::body::fanout::Purse;
use crate::clock::Clock;
use crate::config::{self, Config, Secret};
use crate::fleet::invalidations::Invalidations;
use crate::policy::mode::Switch;
use crate::proxy::Commons;
use crate::proxy::flights::Flights;
use crate::store::wire::Sealing;
use crate::store::{Memory, Partials};
use crate::telemetry::Telemetry;

/// For a process that starts.
pub(super) fn first(config: &Config, clock: Clock) -> Result<(Commons, Option<fleet::Parts>), String> {
    let mode = Arc::new(Switch::new(config.mode.0, config.mode.1));
    built(config, clock, mode, Arc::default())
}

/// For a process that has some already. Unless they can't be trusted any more under the new configuration, entries
/// stay; who changes the Redis or the secrets begins with an empty cache.
pub(super) fn renewed(
    before: &Commons,
    config: &Config,
    anew: bool,
) -> Result<(Commons, Option<fleet::Parts>), String> {
    let (mode, telemetry) = (before.mode.clone(), before.telemetry.clone());
    if anew {
        return built(config, before.clock.clone(), mode, telemetry);
    }
    let (memory, limits) = (config.memory, config.limits);
    let same_purse = before.purse.max() == memory.max_inflight_bytes;
    let commons = Commons {
        clock: before.clock.clone(),
        memory: before.memory.rebuilt(&memory).map_or_else(|| before.memory.clone(), Arc::new),
        partials: before.partials.clone(),
        invalidations: before.invalidations.clone(),
        flights: before.flights.clone(),
        purse: if same_purse { before.purse.clone() } else { Purse::new(memory.max_inflight_bytes) },
        fleet: before.fleet.clone(),
        secret: before.secret.clone(),
        max_entry_bytes: memory.max_entry_bytes,
        shared_write_stall: limits.shared_write_stall,
        mode,
        telemetry,
    };
    Ok((commons, None))
}

/// Makes what was kept as large as it may be now.
pub(super) fn adapt(commons: &Commons, memory: config::Memory) {
    commons.memory.resize(memory.max_bytes);
    if let Some(fleet) = &commons.fleet {
        let max_body = memory.max_entry_bytes;
        fleet.shared.seal_with(|sealing| Sealing { max_body, ..sealing.clone() });
    }
}

fn built(
    config: &Config,
    clock: Clock,
    mode: Arc<Switch>,
    telemetry: Arc<Telemetry>,
) -> Result<(Commons, Option<fleet::Parts>), String> {
    let secrets = fleet::Secrets::of(config)?;
    let fleet = config.redis.as_ref().map(|redis| fleet::build(redis, config, &secrets, &clock)).transpose()?;
    let invalidations: Arc<Invalidations> =
        fleet.as_ref().map_or_else(Arc::default, |fleet| fleet.invalidations.clone());
    let commons = Commons {
        clock,
        memory: Arc::new(Memory::new(&config.memory)),
        partials: Arc::new(Partials::beside(config.memory.max_bytes)),
        invalidations,
        flights: Arc::new(Flights::default()),
        purse: Purse::new(config.memory.max_inflight_bytes),
        fleet: fleet.as_ref().map(|parts| parts.fleet.clone()),
        secret: Arc::new(ArcSwap::from_pointee(secrets.key())),
        max_entry_bytes: config.memory.max_entry_bytes,
        shared_write_stall: config.limits.shared_write_stall,
        mode,
        telemetry,
    };
    Ok((commons, fleet))
}

/// What the entries of a process depend on. Secrets print as stars: their digests tell whether they changed.
pub(super) fn foundations(config: &Config) -> String {
    let digest = |secret: &Secret| blake3::hash(secret.reveal().as_bytes());
    let secrets: Vec<_> = config.secrets.iter().map(digest).collect();
    let works = config.upstreams.iter().flat_map(|u| u.router.plans()).any(|plan| plan.refresh_ahead.is_some());
    let (redis, encrypt, max_unverified) = (&config.redis, config.encrypt, config.memory.max_unverified);
    // With a Redis, who refreshes ahead shares that work, which takes a connection of its own.
    let works = works && redis.is_some();
    format!("{redis:?} {secrets:?} {encrypt} {max_unverified:?} {works}")
}
