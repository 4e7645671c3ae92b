//! The part of the composition that there is only with Redis: connections, store, log, and the secret in common.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::task::JoinSet;
use tracing::{debug, info, warn};

use crate::clock::{Clock, FleetClock};
use crate::config::{self, Config};
use crate::fleet::inbox::Inbox;
use crate::fleet::invalidations::Invalidations;
use crate::fleet::log::Log;
use crate::fleet::work::Refresh;
use crate::fleet::{Fleet, SidecarId};
use crate::policy::key::KeySecret;
use crate::policy::millis;
use crate::policy::mode::{Mode, Source};
use crate::proxy::face::Stage;
use crate::proxy::{Commons, Proxy};
use crate::redis::{Message, Redis, Trouble};
use crate::store::Shared;
use crate::store::pack::Packing;
use crate::store::seal::Ring;
use crate::store::wire::Sealing;

/// Is the secret in common still there?
const LOOK_AT_SECRET: Duration = Duration::from_secs(2);

/// What mode was set for the fleet?
const LOOK_AT_MODE: Duration = Duration::from_secs(1);

/// Refreshes for the fleet at once.
const WORK_AT_ONCE: u64 = 4;

/// Work that nobody has finished for so long is taken over.
const LEFT_BEHIND: Duration = Duration::from_secs(3);

/// Work that nobody could do for so long is dropped.
const USELESS_AFTER: Duration = Duration::from_mins(1);

/// So long the server holds a worker that has nothing to do.
const WAIT_FOR_WORK: Duration = Duration::from_secs(1);

/// After trouble, before the next attempt.
const PAUSE: Duration = Duration::from_millis(50);

/// The secrets of this process: configured, or made up.
pub(super) struct Secrets {
    seeds: Vec<Vec<u8>>,
    /// Made up, so that the fleet's is to be adopted.
    made_up: bool,
}

impl Secrets {
    pub(super) fn of(config: &Config) -> Result<Secrets, String> {
        let configured: Vec<Vec<u8>> = config.secrets.iter().map(|s| s.reveal().as_bytes().to_vec()).collect();
        if !configured.is_empty() {
            return Ok(Secrets { seeds: configured, made_up: false });
        }
        let mut random = vec![0; 32];
        getrandom::fill(&mut random).map_err(|e| format!("no randomness to be had: {e}"))?;
        Ok(Secrets { seeds: vec![random], made_up: true })
    }

    pub(super) fn key(&self) -> KeySecret {
        KeySecret::of(self.seeds.first().map_or(&[], Vec::as_slice))
    }

    fn ring(&self) -> Ring {
        Ring::new(self.seeds.iter().map(Vec::as_slice))
    }
}

/// The fleet's part, built but not yet at work.
#[derive(Debug)]
pub(super) struct Parts {
    pub(super) fleet: Arc<Fleet>,
    pub(super) invalidations: Arc<Invalidations>,
    /// The secret that was made up, if one was.
    seed: Option<Vec<u8>>,
}

/// Begins to connect.
pub(super) fn build(
    redis: &config::Redis,
    config: &Config,
    secrets: &Secrets,
    clock: &Clock,
) -> Result<Parts, String> {
    let me = SidecarId::random()?;
    let packing = match redis.compress {
        config::Compression::Off => Packing::None,
        config::Compression::Lz4 => Packing::Lz4,
        config::Compression::Zstd => Packing::Zstd,
    };
    let sealing = Sealing {
        ring: secrets.ring(),
        encrypt: config.encrypt,
        packing,
        pack_above: redis.compress_above,
        max_body: config.memory.max_entry_bytes,
    };
    let works = config.upstreams.iter().flat_map(|u| u.router.plans()).any(|plan| plan.refresh_ahead.is_some());
    let connections = Arc::new(Redis::start(redis, works, clock, &Arc::new(FleetClock::new(clock.clone()))));
    let shared = Shared::new(connections.clone(), &redis.key_prefix, sealing, redis.write_behind);
    let fleet = Fleet {
        me,
        redis: connections,
        shared: Arc::new(shared),
        inbox: Arc::new(Inbox::default()),
        ring: Arc::new(ArcSwap::from_pointee(secrets.ring())),
        works,
        patience: redis.command_timeout,
    };
    let invalidations = Invalidations::shared(me, config.memory.max_unverified, clock.now());
    Ok(Parts {
        fleet: Arc::new(fleet),
        invalidations: Arc::new(invalidations),
        seed: secrets.made_up.then(|| secrets.seeds[0].clone()),
    })
}

impl Parts {
    /// Sets everything to work.
    pub(super) fn start(self, stage: &Arc<Stage>, tasks: &mut JoinSet<()>) {
        let commons = stage.commons();
        let Parts { fleet, invalidations, seed } = self;
        let log = Log {
            redis: fleet.redis.clone(),
            invalidations: invalidations.clone(),
            inbox: fleet.inbox.clone(),
            ring: fleet.ring.clone(),
            me: fleet.me,
            clock: commons.clock.clone(),
            said_present: Arc::default(),
        };
        let (follower, teller, shared) = (log.clone(), log, fleet.shared.clone());
        let stage = stage.clone();
        tasks.spawn(async move {
            // Nothing is read or written with a secret that the fleet may not have.
            let mut seed = seed;
            if let Some(seed) = &mut seed {
                warn!(
                    "no [security] secret: the fleet's is kept in Redis, where whoever can read it can forge records"
                );
                adopt(&fleet, &commons, seed).await;
            }
            let seen_at = move |position| invalidations.seen_at(position);
            let mut work = JoinSet::new();
            work.spawn(follower.follow());
            work.spawn(teller.tell());
            let walking = shared.clone();
            work.spawn(async move { walking.clear_purged().await });
            work.spawn(async move { shared.write_behind(seen_at).await });
            work.spawn(follow_mode(fleet.clone(), commons.clone()));
            work.spawn(labour(fleet.clone(), stage));
            match seed {
                Some(mut seed) => loop {
                    tokio::time::sleep(LOOK_AT_SECRET).await;
                    adopt(&fleet, &commons, &mut seed).await;
                },
                None => std::future::pending().await,
            }
        });
    }
}

/// Does what was set for the fleet, for ever. While Redis does not tell, what it told last counts, for its time.
async fn follow_mode(fleet: Arc<Fleet>, commons: Arc<Commons>) {
    let mut before = None;
    loop {
        if let Ok(told) = fleet.redis.common_mode().await {
            let set = told.and_then(|(word, left)| Some((Mode::of(&word)?, left)));
            match set {
                Some((mode, left)) => commons.mode.set(mode, Source::Fleet, commons.clock.now(), left),
                None => commons.mode.clear(Source::Fleet),
            }
            let mode = set.map(|(mode, _)| mode);
            if mode != before {
                let state = commons.mode.state(commons.clock.now());
                let hidden = state.source == Source::Local;
                warn!(
                    mode = mode.map_or("none", Mode::token),
                    hidden_by_the_one_set_here = hidden,
                    "the fleet's mode"
                );
                before = mode;
            }
        }
        tokio::time::sleep(LOOK_AT_MODE).await;
    }
}

/// Works for the fleet, for ever: on what is offered, and on what others have left.
async fn labour(fleet: Arc<Fleet>, stage: Arc<Stage>) {
    loop {
        fleet.redis.worker_connected().await;
        if let Err(trouble) = labour_for_a_while(&fleet, &stage).await {
            debug!(%trouble, "no work can be had");
            tokio::time::sleep(PAUSE).await;
        }
    }
}

async fn labour_for_a_while(fleet: &Arc<Fleet>, stage: &Stage) -> Result<(), Trouble> {
    let me = fleet.me.to_string();
    fleet.redis.tidy_work().await?;
    let mut under_way = JoinSet::new();
    loop {
        let left = fleet.redis.take_over(&me, WORK_AT_ONCE, LEFT_BEHIND).await?;
        let offered = fleet.redis.work(&me, WORK_AT_ONCE, WAIT_FOR_WORK).await?;
        for message in left.into_iter().chain(offered) {
            under_way.spawn(work_off(fleet.clone(), stage.proxies(), message));
        }
        // What takes longer than it may is taken over, by us or others: its lease keeps it from being done twice.
        while under_way.len() >= usize::try_from(WORK_AT_ONCE).unwrap_or(1) {
            under_way.join_next().await;
        }
    }
}

async fn work_off(fleet: Arc<Fleet>, proxies: Vec<Arc<Proxy>>, message: Message) {
    let refresh = Refresh::open(&message.body, &fleet.ring.load());
    let mine = refresh.and_then(|refresh| Some((proxies.iter().find(|p| p.site.id.0 == refresh.upstream)?, refresh)));
    match mine {
        Some((proxy, refresh)) => proxy.work_off(&fleet, refresh).await,
        // Of another configuration, or another secret: those who have that find it when it is left behind.
        None if !is_old(&fleet, &message) => return debug!("work that is not for this sidecar"),
        None => debug!("work that nobody can do"),
    }
    if let Err(trouble) = fleet.redis.work_done(message.id).await {
        debug!(%trouble, "work is done, and will be done again");
    }
}

/// Has it lain there for so long that nobody needs it any more?
fn is_old(fleet: &Fleet, message: &Message) -> bool {
    let now = fleet.redis.time().now();
    now.is_some_and(|now| now.saturating_sub(message.id.ms) > millis(USELESS_AFTER))
}

/// Makes the secret in common ours, or ours the one in common. Tries until Redis says which.
async fn adopt(fleet: &Fleet, commons: &Commons, seed: &mut Vec<u8>) {
    let theirs = loop {
        match fleet.redis.common_secret(seed).await {
            Ok(secret) => break secret,
            Err(trouble) => debug!(%trouble, "the secret in common can't be read"),
        }
        tokio::time::sleep(PAUSE).await;
    };
    let adopted = Ring::new([&*theirs]);
    if adopted.first() != fleet.ring.load().first() {
        info!("took over the fleet's secret");
        commons.secret.store(Arc::new(KeySecret::of(&theirs)));
        fleet.shared.seal_with(|sealing| Sealing { ring: adopted.clone(), ..sealing.clone() });
        fleet.ring.store(Arc::new(adopted));
        // Should Redis lose it, this is what it gets back.
        *seed = theirs.to_vec();
    }
}
