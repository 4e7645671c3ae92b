//! The components that exist only with Redis: connections, store, invalidation log, and the shared secret.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::Bytes;
use tokio::task::JoinSet;
use tracing::{debug, info, warn};

use crate::clock::{Clock, FleetClock};
use crate::config::Config;
use crate::fleet::inbox::Inbox;
use crate::fleet::invalidation_log::InvalidationLog;
use crate::fleet::invalidations::Invalidations;
use crate::fleet::mode_message::ModeMessage;
use crate::fleet::refresh_queue::RefreshRequest;
use crate::fleet::{Fleet, SidecarId};
use crate::policy::millis;
use crate::policy::mode::ModeSource;
use crate::policy::routing::cache_key::KeySecret;
use crate::proxy::active::ActiveConfig;
use crate::proxy::{Proxy, SharedState};
use crate::redis::{InboxMessage, Redis, RedisConfig, RedisError};
use crate::store::RedisTier;
use crate::store::authentication::Keyring;
use crate::store::record::RecordCodec;

/// Maximum number of refreshes that run for the fleet at the same time.
const MAX_CONCURRENT_REFRESHES: u64 = 4;

/// Time after which a pending refresh is claimed.
const CLAIM_AFTER: Duration = Duration::from_secs(3);

/// Age at which a refresh that no sidecar could run is dropped.
const ABANDON_AFTER: Duration = Duration::from_mins(1);

/// Time that Redis blocks a read of the refresh queue while the queue is empty.
const BLOCK_TIME: Duration = Duration::from_secs(8);

/// Pause between an error and the next attempt.
const RETRY_PAUSE: Duration = Duration::from_millis(50);

/// The secrets of this process: configured, or generated.
pub(super) struct Secrets {
    seeds: Vec<Vec<u8>>,
    /// True if the secret was generated, so that the fleet's secret is to be adopted.
    made_up: bool,
}

impl Secrets {
    pub(super) fn of(config: &Config) -> Result<Secrets, String> {
        let configured: Vec<Vec<u8>> = config.secrets.iter().map(|s| s.reveal().as_bytes().to_vec()).collect();
        if !configured.is_empty() {
            return Ok(Secrets { seeds: configured, made_up: false });
        }
        let mut random = vec![0; 32];
        getrandom::fill(&mut random).map_err(|e| format!("no random numbers available: {e}"))?;
        Ok(Secrets { seeds: vec![random], made_up: true })
    }

    pub(super) fn key(&self) -> KeySecret {
        KeySecret::of(self.seeds.first().map_or(&[], Vec::as_slice))
    }

    fn ring(&self) -> Keyring {
        Keyring::new(self.seeds.iter().map(Vec::as_slice))
    }
}

/// The fleet's components, built but not started.
#[derive(Debug)]
pub(super) struct FleetParts {
    pub(super) fleet: Arc<Fleet>,
    pub(super) invalidations: Arc<Invalidations>,
    /// The generated secret, if none is configured.
    seed: Option<Vec<u8>>,
}

/// Builds the fleet's components and starts to connect to Redis.
pub(super) fn build(
    redis: &RedisConfig,
    config: &Config,
    secrets: &Secrets,
    clock: &Clock,
) -> Result<FleetParts, String> {
    let me = SidecarId::random()?;
    let codec = RecordCodec {
        keyring: secrets.ring(),
        encrypt: config.encrypt,
        compression: config.redis_tier.compression,
        compress_above: config.redis_tier.compress_above,
        max_body: config.memory.max_entry_bytes,
    };
    let works = config.upstreams.iter().flat_map(|u| u.router.rules()).any(|rule| rule.refresh_ahead.is_some());
    let fleet_clock = Arc::new(FleetClock::new(clock.clone()));
    let connections = Arc::new(Redis::start(redis, works, clock, &fleet_clock));
    let tier = RedisTier::new(connections.clone(), &redis.key_prefix, codec, config.redis_tier.write_behind);
    let fleet = Fleet {
        sidecar_id: me,
        redis: connections,
        tier: Arc::new(tier),
        membership: Arc::default(),
        inbox: Arc::new(Inbox::default()),
        keyring: Arc::new(ArcSwap::from_pointee(secrets.ring())),
        shares_refreshes: works,
        timeout: redis.command_timeout,
    };
    let invalidations = Invalidations::shared(me, config.memory.max_unverified, fleet_clock);
    Ok(FleetParts {
        fleet: Arc::new(fleet),
        invalidations: Arc::new(invalidations),
        seed: secrets.made_up.then(|| secrets.seeds[0].clone()),
    })
}

impl FleetParts {
    /// Starts the fleet's background tasks.
    pub(super) fn start(self, active: &Arc<ActiveConfig>, tasks: &mut JoinSet<()>) {
        let shared = active.shared();
        let FleetParts { fleet, invalidations, seed } = self;
        let log = InvalidationLog {
            redis: fleet.redis.clone(),
            invalidations: invalidations.clone(),
            inbox: fleet.inbox.clone(),
            keyring: fleet.keyring.clone(),
            sidecar_id: fleet.sidecar_id,
            clock: shared.clock.clone(),
            membership: fleet.membership.clone(),
        };
        let (follower, writer, tier) = (log.clone(), log, fleet.tier.clone());
        let active = active.clone();
        tasks.spawn(async move {
            // Before the secret is adopted, nothing is read or written: the fleet may have another secret.
            let mut seed = seed;
            if let Some(seed) = &mut seed {
                warn!(
                    "no [security] secret: the fleet's secret is kept in Redis, and any client of Redis can read it and forge records. Set [security] secret"
                );
                adopt_secret(&fleet, &shared, seed).await;
            }
            let purged = invalidations.clone();
            let seen_at = move |position| invalidations.log_seen_at(position);
            let mut work = JoinSet::new();
            work.spawn(follower.clone().send_beats());
            work.spawn(follower.follow());
            work.spawn(writer.write_purges());
            let scans = tier.clone();
            work.spawn(async move { scans.run_scans(purged).await });
            work.spawn(async move { tier.run_writes(seen_at).await });
            work.spawn(follow_mode(fleet.clone(), shared.clone()));
            work.spawn(run_refresh_worker(fleet.clone(), active));
            match seed {
                Some(mut seed) => {
                    let (mut replies, mut known) = (fleet.membership.replies(), None);
                    while replies.changed().await.is_ok() {
                        let epoch = replies.borrow_and_update().as_ref().map(|reply| reply.epoch.clone());
                        // A Redis that was restarted may have lost the secret.
                        if epoch != known {
                            known = epoch;
                            adopt_secret(&fleet, &shared, &mut seed).await;
                        }
                    }
                }
                None => std::future::pending().await,
            }
        });
    }
}

/// Applies the mode that is set for the fleet, forever. While Redis is unavailable, the last mode stays in force until
/// it expires.
async fn follow_mode(fleet: Arc<Fleet>, shared: Arc<SharedState>) {
    let mut replies = fleet.membership.replies();
    let mut before = Bytes::new();
    while replies.changed().await.is_ok() {
        let stored = replies.borrow_and_update().as_ref().map(|reply| reply.mode.clone()).unwrap_or_default();
        let set = ModeMessage::open(&stored, &fleet.keyring.load());
        let now = fleet.redis.clock().now().unwrap_or_default();
        match set {
            Some(ModeMessage { mode, until }) => {
                let left = until.map(|until| Duration::from_millis(until.saturating_sub(now)));
                shared.mode.set(mode, ModeSource::Fleet, shared.clock.now(), left);
            }
            None => shared.mode.clear(ModeSource::Fleet),
        }
        if stored != before {
            if set.is_none() && !stored.is_empty() {
                warn!(
                    "the mode in Redis failed authentication, and is ignored: set it with `sidecache mode … --fleet`"
                );
            } else {
                let mode = set.map_or("none", |set| set.mode.token());
                let hidden = shared.mode.state(shared.clock.now()).source == ModeSource::Local;
                warn!(mode, overridden_locally = hidden, "the mode of the fleet changed");
            }
            before = stored;
        }
    }
}

/// Runs refreshes for the fleet, forever: those that are offered, and pending ones that other sidecars have left.
async fn run_refresh_worker(fleet: Arc<Fleet>, active: Arc<ActiveConfig>) {
    loop {
        fleet.redis.worker_connected().await;
        if let Err(error) = work_until_error(&fleet, &active).await {
            debug!(%error, "refresh queue not readable");
            tokio::time::sleep(RETRY_PAUSE).await;
        }
    }
}

async fn work_until_error(fleet: &Arc<Fleet>, active: &ActiveConfig) -> Result<(), RedisError> {
    let me = fleet.sidecar_id.to_string();
    fleet.redis.prepare_group().await?;
    let mut under_way = JoinSet::new();
    loop {
        let left = fleet.redis.claim_stale(&me, MAX_CONCURRENT_REFRESHES, CLAIM_AFTER).await?;
        let offered = fleet.redis.read_refreshes(&me, MAX_CONCURRENT_REFRESHES, BLOCK_TIME).await?;
        for message in left.into_iter().chain(offered) {
            under_way.spawn(run_refresh(fleet.clone(), active.proxies(), message));
        }
        // A refresh that takes longer than `CLAIM_AFTER` is claimed by this or another sidecar: its lease prevents a
        // second fetch.
        while under_way.len() >= usize::try_from(MAX_CONCURRENT_REFRESHES).unwrap_or(1) {
            under_way.join_next().await;
        }
    }
}

async fn run_refresh(fleet: Arc<Fleet>, proxies: Vec<Arc<Proxy>>, message: InboxMessage) {
    let refresh = RefreshRequest::open(&message.body, &fleet.keyring.load());
    let mine =
        refresh.and_then(|refresh| Some((proxies.iter().find(|p| p.upstream.id.0 == refresh.upstream)?, refresh)));
    match mine {
        Some((proxy, refresh)) => proxy.run_offered_refresh(&fleet, refresh).await,
        // The refresh is of another configuration or secret: a sidecar that has those claims it once it is pending.
        None if !is_abandoned(&fleet, &message) => {
            return debug!("refresh request left for the sidecars that have its upstream");
        }
        None => debug!("refresh request dropped: no sidecar has its upstream"),
    }
    if let Err(error) = fleet.redis.ack_refresh(message.id).await {
        debug!(%error, "refresh request not acknowledged: it will be repeated");
    }
}

/// Returns true if the refresh is older than [`ABANDON_AFTER`], and no longer needed.
fn is_abandoned(fleet: &Fleet, message: &InboxMessage) -> bool {
    let now = fleet.redis.clock().now();
    now.is_some_and(|now| now.saturating_sub(message.id.ms) > millis(ABANDON_AFTER))
}

/// Adopts the fleet's shared secret, or stores `seed` as the shared secret if there is none. Retries until Redis
/// responds.
async fn adopt_secret(fleet: &Fleet, shared: &SharedState, seed: &mut Vec<u8>) {
    let theirs = loop {
        match fleet.redis.shared_secret(seed).await {
            Ok(secret) => break secret,
            Err(error) => debug!(%error, "the fleet's secret can't be read"),
        }
        tokio::time::sleep(RETRY_PAUSE).await;
    };
    let adopted = Keyring::new([&*theirs]);
    if adopted.current_id() != fleet.keyring.load().current_id() {
        info!("adopted the fleet's secret");
        shared.key_secret.store(Arc::new(KeySecret::of(&theirs)));
        fleet.tier.update_codec(|codec| RecordCodec { keyring: adopted.clone(), ..codec.clone() });
        fleet.keyring.store(Arc::new(adopted));
        // If Redis loses the secret, this one is stored again.
        *seed = theirs.to_vec();
    }
}
