//! What sidecars say to each other: the invalidation log, leases, inboxes, the common secret.

use std::time::Duration;

use bytes::Bytes;
use fred::interfaces::{KeysInterface, StreamsInterface};
use fred::types::{Expiration, SetOptions, Value};

use super::link::Asking;
use super::scripts::{APPEND, CLAIM, PRESENT, RELEASE, RENEW};
use super::{Redis, Trouble, Why};
use crate::policy::chain::LogId;

/// The log keeps about so many entries.
const LOG_LENGTH: usize = 50_000;

/// An entry of the invalidation log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogEntry {
    /// Its id.
    pub id: LogId,
    /// The id of the entry before it.
    pub previous: LogId,
    /// What it says.
    pub body: Bytes,
}

/// Something for this sidecar alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Its id in the inbox.
    pub id: LogId,
    /// What it says.
    pub body: Bytes,
}

/// What came since.
#[derive(Debug, Default)]
pub struct News {
    /// In the log.
    pub log: Vec<LogEntry>,
    /// In the inbox.
    pub inbox: Vec<Message>,
}

/// What comes of asking for a lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Claim {
    /// It is ours.
    Ours,
    /// Somebody has it. There will be a message at its end.
    Theirs {
        /// For so long, unless it is kept.
        left: Duration,
        /// Its holder's token.
        holder: String,
    },
}

type Fields = Vec<(String, Bytes)>;
pub(super) type Rows = Vec<(String, Fields)>;

impl Redis {
    pub(super) fn at(&self, name: &str) -> String {
        format!("{}:{name}", self.coordinates)
    }

    /// Appends to the log; nothing only makes sure that there is a log. The id of the last entry.
    pub async fn append(&self, body: Bytes) -> Result<LogId, Trouble> {
        let arguments = vec![Value::from(i64::try_from(LOG_LENGTH).unwrap_or(i64::MAX)), Value::Bytes(body)];
        let id: String =
            self.coordination.script(self.command_timeout, APPEND, vec![self.at("log")], arguments).await?;
        parse(&id)
    }

    /// The last entry's id.
    pub async fn log_end(&self) -> Result<Option<LogId>, Trouble> {
        let key = self.at("log");
        let rows: Rows = self
            .follower
            .run(self.command_timeout, |client| async move { client.xrevrange(key, "+", "-", Some(1)).await })
            .await?;
        rows.first().map(|(id, _)| parse(id)).transpose()
    }

    /// Entries after an id, from the log's beginning if there is none; at most so many.
    pub async fn log_after(&self, after: Option<LogId>, count: u64) -> Result<Vec<LogEntry>, Trouble> {
        let key = self.at("log");
        let from = after.map_or_else(|| "-".to_owned(), |id| format!("({id}"));
        // A log may be long, and a server may be just back.
        let deadline = self.command_timeout * 10;
        let rows: Rows = self
            .follower
            .run(deadline, |client| async move { client.xrange(key, from, "+", Some(count)).await })
            .await?;
        rows.into_iter().map(entry).collect()
    }

    /// Waits at the server, for at most so long, for the log or the inbox to go on.
    pub async fn news(&self, log: LogId, inbox: (&str, LogId), wait: Duration) -> Result<News, Trouble> {
        let keys = vec![self.at("log"), self.inbox(inbox.0)];
        let ids = vec![log.to_string(), inbox.1.to_string()];
        let block = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX).max(1);
        let deadline = wait + self.command_timeout.max(Duration::from_millis(500));
        let streams: Option<Vec<(String, Rows)>> = self
            .follower
            .run(deadline, |client| async move { client.xread(Some(1000), Some(block), keys, ids).await })
            .await?;
        let mut news = News::default();
        for (key, rows) in streams.unwrap_or_default() {
            if key.ends_with(":log") {
                news.log = rows.into_iter().map(entry).collect::<Result<_, _>>()?;
            } else {
                news.inbox = rows.into_iter().map(message).collect::<Result<_, _>>()?;
            }
        }
        Ok(news)
    }

    /// Waits until the log can be asked.
    pub async fn follower_connected(&self) {
        self.follower.connected().await;
    }

    fn inbox(&self, name: &str) -> String {
        format!("{}:inbox:{name}", self.coordinates)
    }

    /// Leaves a message for another sidecar.
    pub async fn send(&self, inbox: &str, body: Bytes) -> Result<(), Trouble> {
        let key = self.inbox(inbox);
        let command = |client: Asking| async move {
            let kept = (fred::types::streams::XCapKind::MaxLen, fred::types::streams::XCapTrim::AlmostExact, 1000);
            client.xadd::<(), _, _, _, _>(&key, false, kept, "*", vec![("m", body)]).await?;
            client.pexpire::<(), _>(key, 60_000, None).await
        };
        self.coordination.run(self.command_timeout, command).await
    }

    /// Asks for the lease of a name, also if this holder still has it.
    pub async fn claim(
        &self,
        name: &str,
        token: &str,
        ttl: Duration,
        inbox: &str,
        instead_of: Option<&str>,
    ) -> Result<Claim, Trouble> {
        let arguments =
            vec![Value::from(token), millis(ttl), Value::from(inbox), instead_of.unwrap_or_default().into()];
        let (left, holder): (i64, String) =
            self.coordination.script(self.command_timeout, CLAIM, self.lease_keys(name), arguments).await?;
        Ok(match u64::try_from(left) {
            Ok(0) | Err(_) => Claim::Ours,
            Ok(left) => Claim::Theirs { left: Duration::from_millis(left), holder },
        })
    }

    /// Keeps a lease; false if it is no longer ours.
    pub async fn renew(&self, name: &str, token: &str, ttl: Duration) -> Result<bool, Trouble> {
        let keys = vec![self.at(&format!("lease:{name}"))];
        let arguments = vec![Value::from(token), millis(ttl)];
        let kept: i64 = self.coordination.script(self.command_timeout, RENEW, keys, arguments).await?;
        Ok(kept > 0)
    }

    /// Gives a lease back, and tells all who wait.
    pub async fn release(&self, name: &str, token: &str, message: Bytes) -> Result<(), Trouble> {
        let arguments = vec![Value::from(token), Value::Bytes(message), Value::from(self.inbox(""))];
        let _told: i64 =
            self.coordination.script(self.command_timeout, RELEASE, self.lease_keys(name), arguments).await?;
        Ok(())
    }

    fn lease_keys(&self, name: &str) -> Vec<String> {
        vec![self.at(&format!("lease:{name}")), self.at(&format!("line:{name}"))]
    }

    /// Says that a sidecar is there, if one is named, and counts those that said so within this time.
    pub async fn present(&self, me: Option<&str>, within: Duration) -> Result<u64, Trouble> {
        let seconds = i64::try_from(within.as_secs()).unwrap_or(i64::MAX);
        let arguments = vec![Value::from(me.unwrap_or_default()), Value::from(seconds)];
        self.coordination.script(self.command_timeout, PRESENT, vec![self.at("sidecars")], arguments).await
    }

    /// The mode that was set for the fleet, and for how much longer it counts; none: nobody has set one.
    pub async fn common_mode(&self) -> Result<Option<(String, Option<Duration>)>, Trouble> {
        let key = self.at("mode");
        let command = |client: Asking| async move { client.get::<Option<String>, _>(&key).await };
        let kept = self.coordination.run(self.command_timeout, command).await?;
        Ok(kept.map(|kept| match kept.split_once(' ') {
            None => (kept, None),
            Some((mode, until)) => {
                let left =
                    until.parse::<u64>().ok().zip(self.time.now()).map(|(until, now)| until.saturating_sub(now));
                (mode.to_owned(), left.map(Duration::from_millis))
            }
        }))
    }

    /// Keeps a mode for the fleet, for a time or until another is kept; none: from now on nobody has set one.
    pub async fn keep_mode(&self, mode: Option<(&'static str, Option<Duration>)>) -> Result<(), Trouble> {
        let key = self.at("mode");
        let now = self.time.now();
        let command = |client: Asking| async move {
            let Some((mode, time)) = mode else { return client.del::<(), _>(&key).await };
            let Some(time) = time else { return client.set::<(), _, _>(&key, mode, None, None, false).await };
            let time = i64::try_from(time.as_millis()).unwrap_or(i64::MAX).max(1);
            // Until when, by the server's clock: each reader knows how long it may trust what it has read last.
            let kept =
                now.map_or_else(|| mode.to_owned(), |now| format!("{mode} {}", now.saturating_add_signed(time)));
            client.set::<(), _, _>(&key, kept, Some(Expiration::PX(time)), None, false).await
        };
        self.coordination.run(self.command_timeout, command).await
    }

    /// The secret that the fleet shares: what is there already, or `mine`.
    pub async fn common_secret(&self, mine: &[u8]) -> Result<Bytes, Trouble> {
        let (key, mine) = (self.at("secret"), Bytes::copy_from_slice(mine));
        let command = |client: Asking| async move {
            let ours = mine.clone();
            let before: Option<Bytes> = client.set(&key, mine, None, Some(SetOptions::NX), true).await?;
            Ok(before.unwrap_or(ours))
        };
        self.coordination.run(self.command_timeout, command).await.map(|secret| Bytes::copy_from_slice(&secret))
    }
}

fn millis(duration: Duration) -> Value {
    Value::from(i64::try_from(duration.as_millis()).unwrap_or(i64::MAX))
}

fn parse(id: &str) -> Result<LogId, Trouble> {
    LogId::parse(id).ok_or_else(|| Trouble { why: Why::Refused, message: format!("{id:?} is no stream id") })
}

fn field(fields: &Fields, name: &str) -> Bytes {
    let found = fields.iter().find(|(n, _)| n == name);
    found.map_or_else(Bytes::new, |(_, value)| Bytes::copy_from_slice(value))
}

fn entry((id, fields): (String, Fields)) -> Result<LogEntry, Trouble> {
    let previous = field(&fields, "p");
    let previous = parse(std::str::from_utf8(&previous).unwrap_or_default())?;
    Ok(LogEntry { id: parse(&id)?, previous, body: field(&fields, "b") })
}

pub(super) fn message((id, fields): (String, Fields)) -> Result<Message, Trouble> {
    Ok(Message { id: parse(&id)?, body: field(&fields, "m") })
}
