//! The membership of this sidecar in the fleet, as its heartbeats show it.
//!
//! Redis keeps for each sidecar the last time at which the log had all of its purges. The oldest of these times bounds
//! what any sidecar may have missed: a sidecar that is cut off from Redis, or can't write to it, makes the others stop
//! trusting their entries after `max_unverified`, until it is back, leaves, or is forgotten.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

use crate::policy::invalidation::log_position::LogId;
use crate::policy::{Tick, millis};
use crate::redis::{BeatReply, RedisError};

/// A sidecar that has sent no heartbeat for this long, and did not leave, is forgotten: it is taken for dead.
pub const FORGET_AFTER: Duration = Duration::from_mins(10);

/// What the heartbeats have shown.
#[derive(Debug, Default)]
pub struct Membership {
    state: Mutex<State>,
    /// Changes with every reply.
    replies: watch::Sender<Option<BeatReply>>,
}

/// What a heartbeat proves once the log is read up to an entry: all purges up to a tick are applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Proof {
    /// The last entry of the log.
    pub end: LogId,
    /// The tick up to which the log was complete.
    pub complete_until: Tick,
}

#[derive(Debug, Default)]
struct State {
    last: Option<BeatReply>,
    proof: Option<Proof>,
    /// The log ended before an entry that had been read.
    log_truncated: bool,
    /// The ID of the last message read from the inbox.
    inbox: LogId,
    /// The epoch in which this sidecar found the log broken.
    broken: Option<String>,
    /// Why the last command for the log failed. `None` after a successful heartbeat.
    error: Option<RedisError>,
}

impl Membership {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records the reply to a heartbeat sent at `now`, when the log had been read up to `read`. Returns the tick until
    /// which the log is known to be complete.
    pub fn update(&self, reply: &BeatReply, now: Tick, read: Option<LogId>) -> Tick {
        let complete_until = self.state().update(reply, now, read);
        self.replies.send_replace(Some(reply.clone()));
        complete_until
    }

    /// Removes and returns the latest proof, if the log is read up to its entry.
    pub fn take_proof(&self, read: Option<LogId>) -> Option<Proof> {
        self.state().proof.take_if(|proof| Some(proof.end) <= read)
    }

    /// Returns a receiver of the replies to heartbeats.
    pub fn replies(&self) -> watch::Receiver<Option<BeatReply>> {
        self.replies.subscribe()
    }

    /// Returns true, once, if a heartbeat has shown that the log ended before an entry that had been read.
    pub fn take_log_truncated(&self) -> bool {
        std::mem::take(&mut self.state().log_truncated)
    }

    /// Notes that the log is broken in the present epoch: the next heartbeat starts another.
    pub fn set_broken(&self) {
        let mut state = self.state();
        state.broken = state.last.as_ref().map(|last| last.epoch.clone());
    }

    /// Returns the epoch in which the log was found broken, or an empty text.
    pub fn broken_epoch(&self) -> String {
        self.state().broken.clone().unwrap_or_default()
    }

    /// Returns the ID of the last message read from the inbox.
    pub fn inbox(&self) -> LogId {
        self.state().inbox
    }

    /// Sets the ID of the last message read from the inbox. 0: the inbox is read from its beginning.
    pub fn set_inbox(&self, read: LogId) {
        self.state().inbox = read;
    }

    /// Records why a command for the log failed.
    pub fn set_error(&self, error: RedisError) {
        self.state().error = Some(error);
    }

    /// Returns why the last command for the log failed. `None` after a successful heartbeat.
    pub fn error(&self) -> Option<RedisError> {
        self.state().error.clone()
    }

    /// Returns the epoch at the last heartbeat, and the number of sidecars with those that a Redis which lost its data
    /// has forgotten. An empty text and 0 before the first.
    pub fn known(&self) -> (String, u64) {
        self.state().last.as_ref().map(|last| (last.epoch.clone(), last.members)).unwrap_or_default()
    }

    /// Returns the server's time at the last heartbeat, in milliseconds, and the last log entry at that time.
    pub fn last_beat(&self) -> Option<(u64, LogId)> {
        self.state().last.as_ref().map(|last| (last.now, last.end))
    }

    /// Returns the time since the log is known to have all purges of all sidecars, at the last heartbeat.
    pub fn oldest(&self) -> Option<Duration> {
        self.state().last.as_ref().map(|last| last.oldest)
    }
}

impl State {
    fn update(&mut self, reply: &BeatReply, now: Tick, read: Option<LogId>) -> Tick {
        if self.last.as_ref().is_some_and(|last| last.epoch != reply.epoch) {
            self.broken = None;
        }
        self.log_truncated |= Some(reply.end) < read;
        self.error = None;
        self.last = Some(reply.clone());
        let complete_until = Tick(now.0.saturating_sub(millis(reply.oldest)));
        self.proof = Some(Proof { end: reply.end, complete_until });
        complete_until
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::redis::RedisErrorKind;
    use bytes::Bytes;

    fn reply(now: u64, epoch: &str, members: u64, oldest: u64) -> BeatReply {
        let oldest = Duration::from_millis(oldest);
        BeatReply {
            now,
            epoch: epoch.into(),
            end: LogId::default(),
            members,
            oldest,
            mode: Bytes::new(),
            inbox: LogId::default(),
        }
    }

    #[test]
    fn log_is_complete_up_to_the_oldest_heartbeat() {
        let membership = Membership::default();
        assert_eq!(membership.update(&reply(1_000, "a 1", 2, 400), Tick(5_000), None), Tick(4_600));
        assert_eq!(
            membership.update(&reply(2_000, "a 1", 2, 1_400), Tick(6_000), None),
            Tick(4_600),
            "one is silent"
        );
    }

    #[test]
    fn broken_log_is_reported_until_the_epoch_changes() {
        let membership = Membership::default();
        membership.update(&reply(1, "a 1", 1, 0), Tick(1), None);
        membership.set_broken();
        assert_eq!(membership.broken_epoch(), "a 1");
        membership.set_error(RedisError { why: RedisErrorKind::Refused, message: String::new() });
        membership.update(&reply(2, "a 2", 1, 0), Tick(2), None);
        assert_eq!((membership.broken_epoch().as_str(), membership.error()), ("", None));
    }
}
