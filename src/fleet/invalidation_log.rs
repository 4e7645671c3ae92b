//! Follows the invalidation log, and tells it what was purged here.
//!
//! The follower reads a log from its beginning, then waits at the server for it to go on. Each entry names the one
//! before it; where that is not the one read last, or where the log ends before what was read, something may have been
//! missed: everything stored is in doubt then, and reading begins anew. A cut connection alone loses nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::Bytes;
use tracing::{debug, warn};

use super::SidecarId;
use super::inbox::Inbox;
use super::invalidations::Invalidations;
use super::purge_message::PurgeMessage;
use crate::clock::Clock;
use crate::policy::invalidation::log_position::{LogGap, LogId};
use crate::policy::{Tick, millis};
use crate::redis::{LogEntry, Redis, RedisError};
use crate::store::authentication::Keyring;
use crate::store::record::random_salt;

/// So long the server holds a reader that has read everything.
const BLOCK_TIME: Duration = Duration::from_secs(1);

/// So often, at most, the end of the log is looked at.
const END_INTERVAL: Duration = Duration::from_millis(500);

/// After trouble, before the next attempt.
const RETRY_PAUSE: Duration = Duration::from_millis(50);

/// So often a sidecar says that it is there.
const PRESENCE_INTERVAL: Duration = Duration::from_secs(5);

/// One that has not said so for so long is taken for gone.
pub const PRESENCE_TTL: Duration = Duration::from_secs(15);

/// Nobody waits longer to hear that a purge was applied.
const MAX_CONFIRM_AGE: Duration = Duration::from_secs(30);

/// Entries read at once.
const BATCH_SIZE: u64 = 1_000;

/// What the follower and the logger work with.
#[derive(Debug, Clone)]
pub struct InvalidationLog {
    /// The connections.
    pub redis: Arc<Redis>,
    /// Where purges go, and come from.
    pub invalidations: Arc<Invalidations>,
    /// Where messages go.
    pub inbox: Arc<Inbox>,
    /// The secrets that seal.
    pub keyring: Arc<ArcSwap<Keyring>>,
    /// This sidecar.
    pub sidecar_id: SidecarId,
    /// The time.
    pub clock: Clock,
    /// When it last said that it is there.
    pub announced_at: Arc<AtomicU64>,
}

/// What ends a stretch of following.
enum FollowError {
    Trouble(RedisError),
    Broken,
}

impl From<RedisError> for FollowError {
    fn from(error: RedisError) -> FollowError {
        FollowError::Trouble(error)
    }
}

impl From<LogGap> for FollowError {
    fn from(_: LogGap) -> FollowError {
        FollowError::Broken
    }
}

impl InvalidationLog {
    /// Follows for ever.
    pub async fn follow(self) {
        let mut inbox = LogId::default();
        loop {
            self.redis.follower_connected().await;
            match self.follow_until_error(&mut inbox).await {
                FollowError::Trouble(error) => {
                    debug!(%error, "the invalidation log can't be read");
                    tokio::time::sleep(RETRY_PAUSE).await;
                }
                FollowError::Broken => {
                    warn!(
                        "the invalidation log is another one, or was cut short: all that is stored is taken for stale"
                    );
                    if let Err(error) = self.begin().await {
                        debug!(%error, "the invalidation log can't be read");
                    }
                    // A log that breaks again and again is not read as fast as it can be.
                    tokio::time::sleep(RETRY_PAUSE * 4).await;
                }
            }
        }
    }

    /// Reads until something comes between.
    async fn follow_until_error(&self, inbox: &mut LogId) -> FollowError {
        let read = async {
            if self.invalidations.log_position().is_none() {
                self.begin().await?;
            }
            self.catch_up().await?;
            let (mut looked, mut goal) = (None::<Tick>, None);
            loop {
                let now = self.clock.now();
                if looked.is_none_or(|looked| now.since(looked) >= millis(END_INTERVAL)) {
                    goal = Some((self.end().await?, now));
                    looked = Some(now);
                    self.announce_presence(now).await;
                }
                self.update_verified(&mut goal);
                self.wait_for_entries(inbox).await?;
                self.update_verified(&mut goal);
            }
        };
        let Err::<std::convert::Infallible, _>(interrupted) = read.await;
        self.invalidations.set_caught_up(false);
        interrupted
    }

    /// Begins with what the log still has.
    async fn begin(&self) -> Result<(), RedisError> {
        // A log that is not there is begun, so that everything fetched from now on has an entry before it.
        self.redis.append(Bytes::new()).await?;
        let first = self.redis.log_after(None, 1).await?;
        if let Some(entry) = first.first() {
            self.invalidations.begin_log(entry.previous);
        }
        Ok(())
    }

    /// Reads what is there.
    async fn catch_up(&self) -> Result<(), FollowError> {
        loop {
            let entries = self.redis.log_after(self.invalidations.log_position(), BATCH_SIZE).await?;
            let done = (entries.len() as u64) < BATCH_SIZE;
            self.apply(entries)?;
            if done {
                return Ok(());
            }
        }
    }

    /// Where the log ends now: not before what was read of it.
    async fn end(&self) -> Result<LogId, FollowError> {
        let (end, read) = (self.redis.log_end().await?, self.invalidations.log_position());
        end.filter(|end| Some(*end) >= read).ok_or(FollowError::Broken)
    }

    /// Once all that was there at some time has been read, everything is verified up to that time.
    fn update_verified(&self, goal: &mut Option<(LogId, Tick)>) {
        if let Some((_, at)) = goal.take_if(|(end, _)| self.invalidations.log_position() >= Some(*end)) {
            self.invalidations.mark_verified(at);
            self.invalidations.set_caught_up(true);
        }
    }

    /// Says now and then that this sidecar is there.
    async fn announce_presence(&self, now: Tick) {
        if now.since(Tick(self.announced_at.load(Ordering::Relaxed))) >= millis(PRESENCE_INTERVAL) {
            self.announced_at.store(now.0, Ordering::Relaxed);
            if let Err(error) = self.redis.announce(Some(&self.sidecar_id.to_string()), PRESENCE_TTL).await {
                debug!(%error, "this sidecar could not say that it is there");
            }
        }
    }

    async fn wait_for_entries(&self, inbox: &mut LogId) -> Result<(), FollowError> {
        let last = self.invalidations.log_position().unwrap_or_default();
        let news = self.redis.read_streams(last, (&self.sidecar_id.to_string(), *inbox), BLOCK_TIME).await?;
        self.apply(news.log)?;
        for message in news.inbox {
            *inbox = message.id;
            self.inbox.deliver(&message.body);
        }
        Ok(())
    }

    fn apply(&self, entries: Vec<LogEntry>) -> Result<(), LogGap> {
        let mut forged = 0;
        for LogEntry { id, previous, body } in entries {
            let said = (!body.is_empty()).then(|| PurgeMessage::open(&body, &self.keyring.load()));
            let answer =
                said.as_ref().and_then(|purge| purge.as_ref().filter(|purge| purge.answer.is_some()).cloned());
            forged += u64::from(matches!(said, Some(None)));
            self.invalidations.apply(previous, id, said)?;
            if let Some(purge) = answer.filter(|_| self.is_recent(id)) {
                tokio::spawn(self.clone().confirm_applied(purge));
            }
        }
        if forged > 0 {
            warn!(entries = forged, "of the invalidation log do not verify: all that is stored is taken for stale");
        }
        Ok(())
    }

    /// Does anybody still wait to hear of this entry?
    fn is_recent(&self, id: LogId) -> bool {
        self.redis.clock().now().is_some_and(|now| now.saturating_sub(id.ms) < millis(MAX_CONFIRM_AGE))
    }

    /// Tells the sidecar that made a purge that it holds here.
    async fn confirm_applied(self, purge: PurgeMessage) {
        let message = Bytes::from(format!("{} {}", applied(purge.answer.unwrap_or(0)), self.sidecar_id));
        if purge.from == self.sidecar_id {
            self.inbox.deliver(&message);
        } else if let Err(error) = self.redis.send(&purge.from.to_string(), message).await {
            debug!(%error, "a purge could not be confirmed");
        }
    }

    /// Writes our own purges into the log, one after the other, for ever.
    pub async fn write_purges(self) {
        loop {
            let purge = self.invalidations.next_to_log().await;
            let body = Bytes::from(purge.seal(&self.keyring.load(), random_salt()));
            match self.redis.append(body).await {
                Ok(_id) => self.invalidations.mark_logged(purge.number),
                Err(error) => {
                    self.invalidations.mark_log_unwritable();
                    debug!(%error, "a purge waits for the invalidation log");
                    tokio::time::sleep(RETRY_PAUSE).await;
                }
            }
        }
    }
}

/// The subject of messages that say that a purge of ours was applied.
pub fn applied(name: u64) -> String {
    format!("applied:{name:016x}")
}
