//! The refresh queue: refreshes that the fleet does once, in a stream with one consumer group.
//!
//! The sidecar that reads an entry does the refresh. Pending refreshes of a dead sidecar are claimed by another.

use std::time::Duration;

use bytes::Bytes;
use fred::interfaces::StreamsInterface;
use fred::types::Value;

use super::coordination::{Rows, message};
use super::scripts::{OFFER_REFRESH, PREPARE_GROUP};
use super::{InboxMessage, Redis, RedisError};
use crate::policy::invalidation::log_position::LogId;

const CONSUMER_GROUP: &str = "workers";

/// Maximum length of the queue.
const MAX_WAITING: i64 = 10_000;

impl Redis {
    /// Adds a refresh, unless one of the same `name` was added within `once_in`. Returns true if it was added.
    pub async fn offer(&self, name: &str, body: Bytes, once_in: Duration) -> Result<bool, RedisError> {
        let keys = vec![self.at(&format!("offered:{name}")), self.at("work")];
        let once_in = i64::try_from(once_in.as_millis()).unwrap_or(i64::MAX).max(1);
        let arguments = vec![Value::from(once_in), Value::from(MAX_WAITING), Value::Bytes(body)];
        let offered: i64 = self.coordination.script(self.command_timeout, OFFER_REFRESH, keys, arguments).await?;
        Ok(offered > 0)
    }

    /// Makes sure that the consumer group exists, and removes consumers that are gone and have nothing pending.
    pub async fn prepare_group(&self) -> Result<(), RedisError> {
        let keys = vec![self.at("work")];
        self.coordination
            .script::<i64>(self.command_timeout, PREPARE_GROUP, keys, vec![Value::from(CONSUMER_GROUP)])
            .await?;
        Ok(())
    }

    /// Waits at the server for up to `wait` for refreshes, and returns at most `most` of them.
    pub async fn read_refreshes(&self, me: &str, most: u64, wait: Duration) -> Result<Vec<InboxMessage>, RedisError> {
        let Some(worker) = &self.worker else { return Ok(std::future::pending().await) };
        let (key, me) = (self.at("work"), me.to_owned());
        let block = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX).max(1);
        let deadline = wait + self.command_timeout.max(Duration::from_millis(500));
        let streams: Option<Vec<(String, Rows)>> = worker
            .run(deadline, |client| async move {
                client.xreadgroup(CONSUMER_GROUP, me, Some(most), Some(block), false, key, ">").await
            })
            .await?;
        streams.unwrap_or_default().into_iter().flat_map(|(_, rows)| rows).map(message).collect()
    }

    /// Claims at most `most` refreshes that have been pending for `idle`.
    pub async fn claim_stale(&self, me: &str, most: u64, idle: Duration) -> Result<Vec<InboxMessage>, RedisError> {
        let (key, me) = (self.at("work"), me.to_owned());
        let idle = u64::try_from(idle.as_millis()).unwrap_or(u64::MAX);
        let (_cursor, rows, _gone): (String, Rows, Vec<String>) = self
            .coordination
            .run(self.command_timeout, |client| async move {
                client.xautoclaim(key, CONSUMER_GROUP, me, idle, "0-0", Some(most), false).await
            })
            .await?;
        rows.into_iter().map(message).collect()
    }

    /// Acknowledges and deletes a refresh that is done.
    pub async fn ack_refresh(&self, id: LogId) -> Result<(), RedisError> {
        let (key, id) = (self.at("work"), id.to_string());
        self.coordination
            .run(self.command_timeout, |client| async move {
                client.xack::<(), _, _, _>(&key, CONSUMER_GROUP, &id).await?;
                client.xdel::<(), _, _>(&key, &id).await
            })
            .await
    }

    /// Waits until the connection for the refresh queue is there; forever if refreshes are not shared.
    pub async fn worker_connected(&self) {
        match &self.worker {
            Some(worker) => worker.connected().await,
            None => std::future::pending().await,
        }
    }
}
