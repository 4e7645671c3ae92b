//! Coordination between sidecars: reading the invalidation log, leases, inboxes, the mode and the shared secret.

use std::time::Duration;

use bytes::Bytes;
use fred::interfaces::{KeysInterface, StreamsInterface};
use fred::types::{Expiration, SetOptions, Value};

use super::connection::TimedClient;
use super::scripts::{CLAIM, RELEASE, RENEW, SEND};
use super::{Redis, RedisError, RedisErrorKind};
use crate::policy::invalidation::log_position::LogId;

/// An entry of the invalidation log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogEntry {
    /// Its ID.
    pub id: LogId,
    /// The ID of the entry before it.
    pub previous: LogId,
    /// Its content.
    pub body: Bytes,
}

/// A message to this sidecar, or an entry of the refresh queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InboxMessage {
    /// Its ID in the stream.
    pub id: LogId,
    /// Its content.
    pub body: Bytes,
}

/// New entries of the streams that a sidecar follows.
#[derive(Debug, Default)]
pub struct StreamUpdate {
    /// New entries of the invalidation log.
    pub log: Vec<LogEntry>,
    /// New messages in the inbox.
    pub inbox: Vec<InboxMessage>,
}

/// The result of claiming a lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LeaseClaim {
    /// This sidecar holds the lease.
    Ours {
        /// Another sidecar released it lately, and may have stored a record.
        released_lately: bool,
    },
    /// Another sidecar holds it. When it is released, a message is sent to the inbox.
    Theirs {
        /// Time until it expires, unless it is renewed.
        left: Duration,
        /// Its holder's token.
        holder: String,
    },
}

/// How long a released lease is marked: longer than the lookups before a claim take.
const RELEASE_MARK: Duration = Duration::from_secs(5);

type Fields = Vec<(String, Bytes)>;
pub(super) type Rows = Vec<(String, Fields)>;

impl Redis {
    pub(super) fn at(&self, name: &str) -> String {
        format!("{}:{name}", self.coordination_prefix)
    }

    /// Returns at most `count` log entries after an ID, or from the log's beginning.
    pub async fn log_after(&self, after: Option<LogId>, count: u64) -> Result<Vec<LogEntry>, RedisError> {
        let key = self.at("log");
        let from = after.map_or_else(|| "-".to_owned(), |id| format!("({id}"));
        // Longer than for other commands: the log may be long, and the server may have just restarted.
        let deadline = self.command_timeout * 10;
        let rows: Rows = self
            .follower
            .run(deadline, |client| async move { client.xrange(key, from, "+", Some(count)).await })
            .await?;
        rows.into_iter().map(entry).collect()
    }

    /// Waits at the server for up to `wait` for new entries in the log or the inbox, and returns them.
    pub async fn read_streams(
        &self,
        log: LogId,
        inbox: (&str, LogId),
        wait: Duration,
    ) -> Result<StreamUpdate, RedisError> {
        let keys = vec![self.at("log"), self.inbox(inbox.0)];
        let ids = vec![log.to_string(), inbox.1.to_string()];
        let block = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX).max(1);
        let deadline = wait + self.command_timeout.max(Duration::from_millis(500));
        let streams: Option<Vec<(String, Rows)>> = self
            .follower
            .run(deadline, |client| async move { client.xread(Some(1000), Some(block), keys, ids).await })
            .await?;
        let mut update = StreamUpdate::default();
        for (key, rows) in streams.unwrap_or_default() {
            if key.ends_with(":log") {
                update.log = rows.into_iter().map(entry).collect::<Result<_, _>>()?;
            } else {
                update.inbox = rows.into_iter().map(message).collect::<Result<_, _>>()?;
            }
        }
        Ok(update)
    }

    /// Waits until the connection that follows the log is there.
    pub async fn follower_connected(&self) {
        self.follower.connected().await;
    }

    pub(super) fn inbox(&self, name: &str) -> String {
        format!("{}:inbox:{name}", self.coordination_prefix)
    }

    /// Sends a message to the inbox of another sidecar.
    pub async fn send(&self, inbox: &str, body: Bytes) -> Result<(), RedisError> {
        let keys = vec![self.inbox(inbox)];
        let _sent: i64 = self.coordination.script(self.command_timeout, SEND, keys, vec![Value::Bytes(body)]).await?;
        Ok(())
    }

    /// Claims the lease `name`, also if the holder with the token `instead_of` still has it.
    pub async fn claim(
        &self,
        name: &str,
        token: &str,
        ttl: Duration,
        inbox: &str,
        instead_of: Option<&str>,
    ) -> Result<LeaseClaim, RedisError> {
        let arguments =
            vec![Value::from(token), millis(ttl), Value::from(inbox), instead_of.unwrap_or_default().into()];
        let (left, holder, released): (i64, String, i64) =
            self.coordination.script(self.command_timeout, CLAIM, self.lease_keys(name), arguments).await?;
        Ok(match u64::try_from(left) {
            Ok(0) | Err(_) => LeaseClaim::Ours { released_lately: released != 0 },
            Ok(left) => LeaseClaim::Theirs { left: Duration::from_millis(left), holder },
        })
    }

    /// Renews a lease. Returns false if this sidecar no longer holds it.
    pub async fn renew(&self, name: &str, token: &str, ttl: Duration) -> Result<bool, RedisError> {
        let keys = vec![self.at(&format!("lease:{name}"))];
        let arguments = vec![Value::from(token), millis(ttl)];
        let kept: i64 = self.coordination.script(self.command_timeout, RENEW, keys, arguments).await?;
        Ok(kept > 0)
    }

    /// Releases a lease, and sends `message` to all sidecars that wait for it.
    pub async fn release(&self, name: &str, token: &str, message: Bytes) -> Result<(), RedisError> {
        let waiting: Vec<String> = self
            .coordination
            .script(
                self.command_timeout,
                RELEASE,
                self.lease_keys(name),
                vec![Value::from(token), millis(RELEASE_MARK)],
            )
            .await?;
        // An error does not keep the others from being told.
        let mut result = Ok(());
        for inbox in waiting {
            result = result.and(self.send(&inbox, message.clone()).await);
        }
        result
    }

    fn lease_keys(&self, name: &str) -> Vec<String> {
        vec![
            self.at(&format!("lease:{name}")),
            self.at(&format!("line:{name}")),
            self.at(&format!("released:{name}")),
        ]
    }

    /// Sets the mode of the fleet, for a time or until another is set. `None` clears it.
    pub async fn set_mode(&self, mode: Option<(Bytes, Option<Duration>)>) -> Result<(), RedisError> {
        let key = self.at("mode");
        let command = |client: TimedClient| async move {
            let Some((mode, time)) = mode else { return client.del::<(), _>(&key).await };
            let time = time.map(|time| i64::try_from(time.as_millis()).unwrap_or(i64::MAX).max(1));
            client.set::<(), _, _>(&key, mode, time.map(Expiration::PX), None, false).await
        };
        self.coordination.run(self.command_timeout, command).await
    }

    /// Returns the shared secret of the fleet: the existing one, or else `mine`, which is then stored.
    pub async fn shared_secret(&self, mine: &[u8]) -> Result<Bytes, RedisError> {
        let (key, mine) = (self.at("secret"), Bytes::copy_from_slice(mine));
        let command = |client: TimedClient| async move {
            let ours = mine.clone();
            let before: Option<Bytes> = client.set(&key, mine, None, Some(SetOptions::NX), true).await?;
            Ok(before.unwrap_or(ours))
        };
        self.coordination.run(self.command_timeout, command).await.map(|secret| Bytes::copy_from_slice(&secret))
    }
}

pub(super) fn millis(duration: Duration) -> Value {
    Value::from(i64::try_from(duration.as_millis()).unwrap_or(i64::MAX))
}

pub(super) fn parse(id: &str) -> Result<LogId, RedisError> {
    LogId::parse(id)
        .ok_or_else(|| RedisError { why: RedisErrorKind::Refused, message: format!("{id:?} is no stream id") })
}

fn field(fields: &Fields, name: &str) -> Bytes {
    let found = fields.iter().find(|(n, _)| n == name);
    found.map_or_else(Bytes::new, |(_, value)| Bytes::copy_from_slice(value))
}

fn entry((id, fields): (String, Fields)) -> Result<LogEntry, RedisError> {
    let previous = field(&fields, "p");
    let previous = parse(std::str::from_utf8(&previous).unwrap_or_default())?;
    Ok(LogEntry { id: parse(&id)?, previous, body: field(&fields, "b") })
}

pub(super) fn message((id, fields): (String, Fields)) -> Result<InboxMessage, RedisError> {
    Ok(InboxMessage { id: parse(&id)?, body: field(&fields, "m") })
}
