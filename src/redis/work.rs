//! Work that the fleet does once: a stream with one consumer group. Whoever reads an entry works on it; what a worker
//! that died has left is taken over by another.

use std::time::Duration;

use bytes::Bytes;
use fred::interfaces::StreamsInterface;
use fred::types::Value;

use super::coordination::{Rows, message};
use super::scripts::{OFFER, TIDY};
use super::{Message, Redis, Trouble};
use crate::policy::chain::LogId;

const GROUP: &str = "workers";

/// So much work may wait.
const MAX_WAITING: i64 = 10_000;

impl Redis {
    /// Offers work, unless the same was offered within this time. `name` tells it from other work.
    pub async fn offer(&self, name: &str, body: Bytes, once_in: Duration) -> Result<bool, Trouble> {
        let keys = vec![self.at(&format!("offered:{name}")), self.at("work")];
        let once_in = i64::try_from(once_in.as_millis()).unwrap_or(i64::MAX).max(1);
        let arguments = vec![Value::from(once_in), Value::from(MAX_WAITING), Value::Bytes(body)];
        let offered: i64 = self.coordination.script(self.command_timeout, OFFER, keys, arguments).await?;
        Ok(offered > 0)
    }

    /// Makes sure that there is a group, and forgets workers that are gone and have left nothing.
    pub async fn tidy_work(&self) -> Result<(), Trouble> {
        let keys = vec![self.at("work")];
        self.coordination.script::<i64>(self.command_timeout, TIDY, keys, vec![Value::from(GROUP)]).await?;
        Ok(())
    }

    /// Waits at the server, for at most so long, for work.
    pub async fn work(&self, me: &str, most: u64, wait: Duration) -> Result<Vec<Message>, Trouble> {
        let Some(worker) = &self.worker else { return Ok(std::future::pending().await) };
        let (key, me) = (self.at("work"), me.to_owned());
        let block = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX).max(1);
        let deadline = wait + self.command_timeout.max(Duration::from_millis(500));
        let streams: Option<Vec<(String, Rows)>> = worker
            .run(deadline, |client| async move {
                client.xreadgroup(GROUP, me, Some(most), Some(block), false, key, ">").await
            })
            .await?;
        streams.unwrap_or_default().into_iter().flat_map(|(_, rows)| rows).map(message).collect()
    }

    /// Takes over work that nobody has finished for so long.
    pub async fn take_over(&self, me: &str, most: u64, idle: Duration) -> Result<Vec<Message>, Trouble> {
        let (key, me) = (self.at("work"), me.to_owned());
        let idle = u64::try_from(idle.as_millis()).unwrap_or(u64::MAX);
        let (_cursor, rows, _gone): (String, Rows, Vec<String>) = self
            .coordination
            .run(self.command_timeout, |client| async move {
                client.xautoclaim(key, GROUP, me, idle, "0-0", Some(most), false).await
            })
            .await?;
        rows.into_iter().map(message).collect()
    }

    /// It is done.
    pub async fn work_done(&self, id: LogId) -> Result<(), Trouble> {
        let (key, id) = (self.at("work"), id.to_string());
        self.coordination
            .run(self.command_timeout, |client| async move {
                client.xack::<(), _, _, _>(&key, GROUP, &id).await?;
                client.xdel::<(), _, _>(&key, &id).await
            })
            .await
    }

    /// Waits until work can be asked for.
    pub async fn worker_connected(&self) {
        match &self.worker {
            Some(worker) => worker.connected().await,
            None => std::future::pending().await,
        }
    }
}
