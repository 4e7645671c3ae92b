//! The invalidation log in Redis: a follower that applies its entries, and a writer that appends local purges.
//!
//! The follower reads the log from its beginning, then blocks at the server until there are new entries. Each entry
//! names its predecessor. If that is not the entry read last, or if the log ends before it, entries may have been
//! missed: everything stored becomes unverified, and reading starts again. A lost connection alone loses no entry.

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

/// How long the server blocks a read when there are no new entries.
const BLOCK_TIME: Duration = Duration::from_secs(1);

/// Minimum interval between two queries for the end of the log.
const END_INTERVAL: Duration = Duration::from_millis(500);

/// Pause between an error and the next attempt.
const RETRY_PAUSE: Duration = Duration::from_millis(50);

/// Interval at which a sidecar announces its presence.
const PRESENCE_INTERVAL: Duration = Duration::from_secs(5);

/// A sidecar that has not announced its presence for this long is considered gone.
pub const PRESENCE_TTL: Duration = Duration::from_secs(15);

/// Older log entries are not confirmed, because no sidecar waits this long for a confirmation.
const MAX_CONFIRM_AGE: Duration = Duration::from_secs(30);

/// Maximum number of entries per read.
const BATCH_SIZE: u64 = 1_000;

/// The state shared by the follower and the writer.
#[derive(Debug, Clone)]
pub struct InvalidationLog {
    /// The Redis connections.
    pub redis: Arc<Redis>,
    /// The purges to apply, and to append.
    pub invalidations: Arc<Invalidations>,
    /// Receives the messages to this sidecar.
    pub inbox: Arc<Inbox>,
    /// The keys that authenticate log entries.
    pub keyring: Arc<ArcSwap<Keyring>>,
    /// The ID of this sidecar.
    pub sidecar_id: SidecarId,
    /// The clock.
    pub clock: Clock,
    /// The tick at which this sidecar last announced its presence.
    pub announced_at: Arc<AtomicU64>,
}

/// The reason why following the log was interrupted.
enum FollowError {
    Redis(RedisError),
    Broken,
}

impl From<RedisError> for FollowError {
    fn from(error: RedisError) -> FollowError {
        FollowError::Redis(error)
    }
}

impl From<LogGap> for FollowError {
    fn from(_: LogGap) -> FollowError {
        FollowError::Broken
    }
}

impl InvalidationLog {
    /// Follows the log. Never returns.
    pub async fn follow(self) {
        let mut inbox = LogId::default();
        loop {
            self.redis.follower_connected().await;
            match self.follow_until_error(&mut inbox).await {
                FollowError::Redis(error) => {
                    debug!(%error, "the invalidation log can't be read");
                    tokio::time::sleep(RETRY_PAUSE).await;
                }
                FollowError::Broken => {
                    warn!("the invalidation log was replaced or truncated: all entries are now stale");
                    if let Err(error) = self.begin().await {
                        debug!(%error, "the invalidation log can't be read");
                    }
                    // Bounds the rate at which a log that breaks repeatedly is read again.
                    tokio::time::sleep(RETRY_PAUSE * 4).await;
                }
            }
        }
    }

    /// Follows the log until an error occurs, and returns it.
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

    /// Starts at the oldest entry that the log still has.
    async fn begin(&self) -> Result<(), RedisError> {
        // Creates the log if it does not exist, so that everything fetched from now on has an entry before it.
        self.redis.append(Bytes::new()).await?;
        let first = self.redis.log_after(None, 1).await?;
        if let Some(entry) = first.first() {
            self.invalidations.begin_log(entry.previous);
        }
        Ok(())
    }

    /// Reads and applies all existing entries.
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

    /// Returns the ID of the last log entry. Fails if the log is missing, or ends before the entry read last.
    async fn end(&self) -> Result<LogId, FollowError> {
        let (end, read) = (self.redis.log_end().await?, self.invalidations.log_position());
        end.filter(|end| Some(*end) >= read).ok_or(FollowError::Broken)
    }

    /// Marks everything verified up to the time of `goal`, once the entry that was the log's last at that time is read.
    fn update_verified(&self, goal: &mut Option<(LogId, Tick)>) {
        if let Some((_, at)) = goal.take_if(|(end, _)| self.invalidations.log_position() >= Some(*end)) {
            self.invalidations.mark_verified(at);
            self.invalidations.set_caught_up(true);
        }
    }

    /// Announces the presence of this sidecar, at most once per [`PRESENCE_INTERVAL`].
    async fn announce_presence(&self, now: Tick) {
        if now.since(Tick(self.announced_at.load(Ordering::Relaxed))) >= millis(PRESENCE_INTERVAL) {
            self.announced_at.store(now.0, Ordering::Relaxed);
            if let Err(error) = self.redis.announce(Some(&self.sidecar_id.to_string()), PRESENCE_TTL).await {
                debug!(%error, "the presence of this sidecar could not be written");
            }
        }
    }

    async fn wait_for_entries(&self, inbox: &mut LogId) -> Result<(), FollowError> {
        let last = self.invalidations.log_position().unwrap_or_default();
        let update = self.redis.read_streams(last, (&self.sidecar_id.to_string(), *inbox), BLOCK_TIME).await?;
        self.apply(update.log)?;
        for message in update.inbox {
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
            warn!(
                entries = forged,
                "entries of the invalidation log failed authentication: all cached entries are now stale"
            );
        }
        Ok(())
    }

    /// Returns true if the entry is young enough for a sidecar to be waiting for its confirmation.
    fn is_recent(&self, id: LogId) -> bool {
        self.redis.clock().now().is_some_and(|now| now.saturating_sub(id.ms) < millis(MAX_CONFIRM_AGE))
    }

    /// Confirms to the sidecar that made the purge that it is applied here.
    async fn confirm_applied(self, purge: PurgeMessage) {
        let message = Bytes::from(format!("{} {}", applied(purge.answer.unwrap_or(0)), self.sidecar_id));
        if purge.from == self.sidecar_id {
            self.inbox.deliver(&message);
        } else if let Err(error) = self.redis.send(&purge.from.to_string(), message).await {
            debug!(%error, "a purge could not be confirmed");
        }
    }

    /// Appends the purges of this sidecar to the log, in order. Never returns.
    pub async fn write_purges(self) {
        loop {
            let purge = self.invalidations.next_to_log().await;
            let body = Bytes::from(purge.seal(&self.keyring.load(), random_salt()));
            match self.redis.append(body).await {
                Ok(_id) => self.invalidations.mark_logged(purge.number),
                Err(error) => {
                    self.invalidations.mark_log_unwritable();
                    debug!(%error, "a purge is not in the invalidation log yet");
                    tokio::time::sleep(RETRY_PAUSE).await;
                }
            }
        }
    }
}

/// Returns the subject of the messages that confirm a purge.
pub fn applied(name: u64) -> String {
    format!("applied:{name:016x}")
}
