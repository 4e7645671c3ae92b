//! Writing to the invalidation log, and the membership of a sidecar in the fleet.

use std::time::Duration;

use bytes::Bytes;
use fred::interfaces::SortedSetsInterface;
use fred::types::Value;

use super::coordination::{millis, parse};
use super::scripts::{APPEND, BEAT, LEAVE};
use super::{Redis, RedisError};
use crate::clock::ServerTime;
use crate::policy::invalidation::log_position::LogId;

/// Approximate number of entries that the log keeps.
const LOG_LENGTH: i64 = 50_000;

/// Approximate size of the contents that the log keeps, in bytes.
const LOG_BYTES: i64 = 64 << 20;

/// Minimum deadline of an append. No request waits for its reply, and a slow server must not keep the log from growing.
const APPEND_TIMEOUT: Duration = Duration::from_secs(5);

/// A heartbeat of a sidecar.
#[derive(Debug, Clone, Copy)]
pub struct Beat<'b> {
    /// The ID of the sidecar.
    pub me: &'b str,
    /// Maximum time since the log had all purges of the sidecar. Zero if it has them.
    pub unlogged_for: Duration,
    /// The epoch in which the sidecar found the log broken. Empty if it did not.
    pub broken: &'b str,
    /// The content of the log entry that starts a new epoch.
    pub reset: &'b Bytes,
    /// A name for a new epoch.
    pub nonce: u64,
    /// Time after which a sidecar that sends no heartbeats is forgotten.
    pub forget_after: Duration,
    /// The epoch and the number of sidecars in the last reply. An empty text and 0 before the first.
    pub known: (&'b str, u64),
}

/// The reply to a heartbeat.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BeatReply {
    /// The server's time, in milliseconds since the Unix epoch.
    pub now: u64,
    /// The epoch of the log.
    pub epoch: String,
    /// The ID of the last log entry.
    pub end: LogId,
    /// The number of sidecars, with those that the server has lost and that are expected to return.
    pub members: u64,
    /// Time since the log is known to have all purges of all sidecars.
    pub oldest: Duration,
    /// The mode that is set for the fleet. Empty if none is set.
    pub mode: Bytes,
    /// The ID of the last message in the inbox. 0 if there is none.
    pub inbox: LogId,
}

impl Redis {
    /// Appends purges of the sidecar `me` to the log, each with its number, unless the log has them.
    pub async fn append(&self, me: &str, purges: Vec<(u64, Bytes)>) -> Result<LogId, RedisError> {
        let mut arguments = vec![Value::from(LOG_LENGTH), Value::from(LOG_BYTES), Value::from(me)];
        for (number, body) in purges {
            arguments.extend([Value::from(number.cast_signed()), Value::Bytes(body)]);
        }
        let (deadline, keys) = (self.command_timeout.max(APPEND_TIMEOUT), vec![self.at("log"), self.at("numbers")]);
        let id: String = self.coordination.script(deadline, APPEND, keys, arguments).await?;
        parse(&id)
    }

    /// Sends a heartbeat: announces a sidecar, starts a new epoch of the log if needed, and returns the log's end.
    pub async fn beat(&self, beat: Beat<'_>) -> Result<BeatReply, RedisError> {
        let mut keys = ["sidecars", "log", "epoch", "numbers", "mode", "expected"].map(|name| self.at(name)).to_vec();
        keys.push(self.inbox(beat.me));
        let arguments = vec![
            Value::from(beat.me),
            millis(beat.unlogged_for),
            millis(beat.forget_after),
            Value::from(self.coordination.server_id()),
            Value::from(beat.broken),
            Value::Bytes(beat.reset.clone()),
            Value::from(format!("{:016x}", beat.nonce)),
            Value::from(beat.known.0),
            Value::from(beat.known.1.cast_signed()),
        ];
        let sent_at = self.clock.instant();
        let (now, epoch, end, members, oldest, mode, inbox): (u64, String, String, u64, u64, Bytes, String) =
            self.coordination.script(self.command_timeout, BEAT, keys, arguments).await?;
        self.clock.update(ServerTime { server: now, sent_at });
        // The mode shares the connection's read buffer.
        let (oldest, mode) = (Duration::from_millis(oldest), Bytes::copy_from_slice(&mode));
        Ok(BeatReply { now, epoch, end: parse(&end)?, members, oldest, mode, inbox: parse(&inbox)? })
    }

    /// Removes the sidecar `me`, whose purges are all in the log.
    pub async fn leave(&self, me: &str) -> Result<(), RedisError> {
        let keys = vec![self.at("sidecars"), self.at("numbers"), self.inbox(me), self.at("expected")];
        let _removed: i64 = self.coordination.script(self.command_timeout, LEAVE, keys, vec![me.into()]).await?;
        Ok(())
    }

    /// Returns the number of sidecars.
    pub async fn members(&self) -> Result<u64, RedisError> {
        let key = self.at("sidecars");
        self.coordination.run(self.command_timeout, |client| async move { client.zcard(key).await }).await
    }
}
