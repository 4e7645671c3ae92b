//! The invalidation log in Redis: a follower that applies its entries, and a writer that appends local purges.
//!
//! The follower reads the log from its beginning, then blocks at the server until there are new entries. Each entry
//! names its predecessor. If that is not the entry read last, or if the log ends before it, entries may have been
//! missed: everything stored becomes unverified, and reading starts again. A lost connection alone loses no entry.
//!
//! Heartbeats ([`super::membership`]) prove that this sidecar can write, that the log has all purges of all sidecars,
//! and where the log ends. Stored entries are trusted only while they succeed.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::Bytes;
use tokio::time::MissedTickBehavior;
use tracing::{debug, warn};

use super::SidecarId;
use super::inbox::Inbox;
use super::invalidations::Invalidations;
use super::membership::Membership;
use super::purge_message::{LogMessage, PurgeMessage};
use crate::clock::Clock;
use crate::policy::invalidation::log_position::{LogGap, LogId};
use crate::policy::millis;
use crate::redis::{Beat, LogEntry, Redis, RedisError, RedisErrorKind};
use crate::store::authentication::Keyring;
use crate::store::record::random_salt;

/// How long the server blocks a read when there are no new entries.
const BLOCK_TIME: Duration = Duration::from_secs(2);

/// Interval of heartbeats, unless `max_unverified` is shorter than four of them.
const BEAT_INTERVAL: Duration = Duration::from_secs(1);

/// Pause between an error and the next attempt.
const RETRY_PAUSE: Duration = Duration::from_millis(50);

/// Older log entries are not confirmed, because no sidecar waits this long for a confirmation.
const MAX_CONFIRM_AGE: Duration = Duration::from_secs(30);

/// Maximum number of entries per read, and of purges per append.
const BATCH_SIZE: u64 = 1_000;
const APPEND_BATCH: usize = 100;

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
    /// What the heartbeats have shown.
    pub membership: Arc<Membership>,
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
        loop {
            self.redis.follower_connected().await;
            match self.follow_until_error().await {
                FollowError::Redis(error) => {
                    debug!(%error, "the invalidation log can't be read");
                    tokio::time::sleep(RETRY_PAUSE).await;
                }
                FollowError::Broken => {
                    warn!("the invalidation log was replaced or truncated: all entries are now stale");
                    // A stream that was begun anew may have lower IDs.
                    self.membership.set_inbox(LogId::default());
                    self.membership.set_broken();
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
    async fn follow_until_error(&self) -> FollowError {
        let read = async {
            if self.invalidations.log_position().is_none() {
                self.begin().await?;
            }
            self.catch_up().await?;
            loop {
                self.update_verified();
                if self.membership.take_log_truncated() {
                    return Err(FollowError::Broken);
                }
                self.wait_for_entries().await?;
            }
        };
        let Err::<std::convert::Infallible, _>(interrupted) = read.await;
        self.invalidations.set_caught_up(false);
        interrupted
    }

    /// Starts at the oldest entry that the log still has.
    async fn begin(&self) -> Result<(), RedisError> {
        // Creates the log if it does not exist, so that everything fetched from now on has an entry before it.
        self.send_beat().await?;
        let first = self.redis.log_after(None, 1).await?;
        if let Some(entry) = first.first() {
            self.invalidations.begin_log(entry.previous);
        }
        Ok(())
    }

    /// Reads and applies all existing entries, fewer at a time after a missed deadline: the connection may be slow.
    async fn catch_up(&self) -> Result<(), FollowError> {
        let mut size = BATCH_SIZE;
        loop {
            let entries = match self.redis.log_after(self.invalidations.log_position(), size).await {
                Err(error) if error.why == RedisErrorKind::Silent && size > 1 => {
                    size /= 4;
                    self.redis.follower_connected().await;
                    continue;
                }
                entries => entries?,
            };
            let done = (entries.len() as u64) < size;
            self.apply(entries)?;
            if done {
                return Ok(());
            }
        }
    }

    /// Sends heartbeats. Never returns.
    pub async fn send_beats(self) {
        let max_unverified = self.invalidations.max_unverified().unwrap_or(BEAT_INTERVAL);
        let mut ticks = tokio::time::interval(BEAT_INTERVAL.min(max_unverified / 4));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            match self.send_beat().await {
                Ok(()) => self.update_verified(),
                Err(error) => {
                    debug!(%error, "a heartbeat was not sent");
                    self.membership.set_error(error);
                }
            }
        }
    }

    async fn send_beat(&self) -> Result<(), RedisError> {
        let (now, read) = (self.clock.now(), self.invalidations.log_position());
        let reset = Bytes::from(LogMessage::seal_reset(&self.keyring.load(), random_salt()));
        let broken = self.membership.broken_epoch();
        let ((epoch, members), inbox) = (self.membership.known(), self.membership.inbox());
        let beat = Beat {
            me: &self.sidecar_id.to_string(),
            unlogged_for: self.invalidations.unlogged_for(now),
            broken: &broken,
            reset: &reset,
            nonce: getrandom::u64().unwrap_or(0),
            forget_after: super::membership::FORGET_AFTER,
            known: (&epoch, members),
        };
        let reply = self.redis.beat(beat).await?;
        self.membership.update(&reply, now, read);
        if reply.inbox < inbox {
            // It expired, and was begun anew with lower IDs, or will be, if the server's clock went back.
            self.membership.set_inbox(LogId::default());
        }
        Ok(())
    }

    /// Marks everything verified that the last heartbeat proves, once the log is read up to its entry.
    fn update_verified(&self) {
        if let Some(proof) = self.membership.take_proof(self.invalidations.log_position()) {
            self.invalidations.mark_verified(proof.complete_until);
            self.invalidations.set_caught_up(true);
        }
    }

    async fn wait_for_entries(&self) -> Result<(), FollowError> {
        let last = self.invalidations.log_position().unwrap_or_default();
        let update = self
            .redis
            .read_streams(last, (&self.sidecar_id.to_string(), self.membership.inbox()), BLOCK_TIME)
            .await?;
        self.apply(update.log)?;
        for message in update.inbox {
            self.membership.set_inbox(message.id);
            self.inbox.deliver(&message.body);
        }
        Ok(())
    }

    fn apply(&self, entries: Vec<LogEntry>) -> Result<(), LogGap> {
        let mut forged = 0;
        for LogEntry { id, previous, body } in entries {
            let message = (!body.is_empty()).then(|| LogMessage::open(&body, &self.keyring.load()));
            let to_confirm = match &message {
                Some(Some(LogMessage::Purge(purge))) if purge.confirmation.is_some() => Some(purge.clone()),
                _ => None,
            };
            forged += u64::from(matches!(message, Some(None)));
            self.invalidations.apply(previous, id, message)?;
            if let Some(purge) = to_confirm.filter(|_| self.is_recent(id)) {
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
        let message = Bytes::from(format!("{} {}", applied(purge.confirmation.unwrap_or(0)), self.sidecar_id));
        if purge.from == self.sidecar_id {
            self.inbox.deliver(&message);
        } else if let Err(error) = self.redis.send(&purge.from.to_string(), message).await {
            debug!(%error, "a purge could not be confirmed");
        }
    }

    /// Appends the purges of this sidecar to the log, in order. Never returns.
    pub async fn write_purges(self) {
        let me = self.sidecar_id.to_string();
        loop {
            let purges = self.invalidations.next_to_log(APPEND_BATCH).await;
            let last = purges.last().map_or(0, |purge| purge.number);
            let seal =
                |purge: PurgeMessage| (purge.number, Bytes::from(purge.seal(&self.keyring.load(), random_salt())));
            match self.redis.append(&me, purges.into_iter().map(seal).collect()).await {
                Ok(end) => self.invalidations.mark_logged(last, end),
                Err(error) => {
                    self.invalidations.mark_log_unwritable();
                    self.membership.set_error(error.clone());
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
