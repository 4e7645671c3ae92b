//! Commands on records: read, write, remove and scan.

use std::time::Duration;

use bytes::Bytes;
use fred::interfaces::{ClientLike, ClusterInterface, KeysInterface};
use fred::types::{ClusterHash, CustomCommand, Expiration, Value};

use super::connection::TimedClient;
use super::scripts::REMOVE_UNCHANGED;
use super::{RecordClass, Redis, RedisError};

/// Keys visited in one step of a scan (COUNT).
const SCAN_COUNT: u32 = 500;

/// Maximum number of concurrent reads of the rest of a large value.
pub(super) const MAX_LARGE_READS: usize = 2;

/// Returns the time by which a value of this size extends a deadline: a millisecond per 10,000 bytes.
fn transfer_time(bytes: usize) -> Duration {
    Duration::from_millis(bytes as u64 / 10_000)
}

/// The position of a scan.
#[derive(Debug, Clone, Default)]
pub struct ScanCursor {
    /// Index of the node, in a cluster.
    node: usize,
    cursor: String,
}

impl Redis {
    /// Returns the first `bytes` bytes of a value; empty if the key does not exist. They share the connection's read
    /// buffer: copy what is to be kept.
    pub async fn read_start(&self, class: RecordClass, key: &str, bytes: usize) -> Result<Bytes, RedisError> {
        let last = bytes.saturating_sub(1);
        let command = |client: TimedClient| async move { client.getrange(key, 0, last).await };
        self.pair(class).reader.run(self.command_timeout, command).await
    }

    /// Returns `bytes` bytes of a value from `start` on, or fewer at its end. Only two of these run at
    /// the same time, so that their replies delay other replies little.
    pub async fn read_range(
        &self,
        class: RecordClass,
        key: &str,
        start: usize,
        bytes: usize,
    ) -> Result<Bytes, RedisError> {
        let _permit = self.large_reads.acquire().await;
        let last = start + bytes.saturating_sub(1);
        let command = |client: TimedClient| async move { client.getrange(key, start, last).await };
        self.pair(class).reader.run(self.command_timeout + transfer_time(bytes), command).await
    }

    /// Sets a value that expires after `ttl`.
    pub async fn write(&self, class: RecordClass, key: &str, value: Bytes, ttl: Duration) -> Result<(), RedisError> {
        let deadline = self.command_timeout + transfer_time(value.len());
        let ttl = i64::try_from(ttl.as_millis()).unwrap_or(i64::MAX).max(1);
        let command = |client: TimedClient| async move {
            client.set::<(), _, _>(key, value, Some(Expiration::PX(ttl)), None, false).await
        };
        self.pair(class).writer.run(deadline, command).await
    }

    /// Removes a key if its value still begins with `start`. Returns true if it was removed.
    pub async fn remove_unchanged(&self, class: RecordClass, key: &str, start: Bytes) -> Result<bool, RedisError> {
        let writer = &self.pair(class).writer;
        let removed: i64 = writer
            .script(self.command_timeout, REMOVE_UNCHANGED, vec![key.to_owned()], vec![Value::Bytes(start)])
            .await?;
        Ok(removed > 0)
    }

    /// Removes a key.
    pub async fn remove(&self, class: RecordClass, key: &str) -> Result<(), RedisError> {
        let command = |client: TimedClient| async move { client.unlink::<(), _>(key).await };
        self.pair(class).writer.run(self.command_timeout, command).await
    }

    /// Runs one step of a scan over all keys that begin with `prefix`, which has no glob characters. Returns keys and
    /// the next position, which is `None` at the end.
    pub async fn scan(
        &self,
        class: RecordClass,
        prefix: &str,
        at: ScanCursor,
    ) -> Result<(Vec<String>, Option<ScanCursor>), RedisError> {
        let pattern = format!("{prefix}*");
        let from = if at.cursor.is_empty() { "0".to_owned() } else { at.cursor };
        // Longer than for other commands: a scan is not urgent.
        let deadline = self.command_timeout * 10;
        let reader = &self.pair(class).reader;
        let (cursor, keys, nodes): (String, Vec<String>, usize) = reader
            .run(deadline, |client| async move {
                let mut nodes =
                    client.cached_cluster_state().map_or(Vec::new(), |state| state.unique_primary_nodes());
                nodes.sort_by_key(|node| (node.host.to_string(), node.port));
                let arguments =
                    [from.as_str(), "MATCH", &pattern, "COUNT", &SCAN_COUNT.to_string()].map(str::to_owned);
                let command = CustomCommand::new_static("SCAN", ClusterHash::Random, false);
                let (cursor, keys): (String, Vec<String>) = match nodes.get(at.node) {
                    Some(node) => client.with_cluster_node(node).custom(command, arguments.to_vec()).await?,
                    None => client.custom(command, arguments.to_vec()).await?,
                };
                Ok((cursor, keys, nodes.len()))
            })
            .await?;
        let next = match cursor.as_str() {
            "0" if at.node + 1 < nodes => Some(ScanCursor { node: at.node + 1, cursor: String::new() }),
            "0" => None,
            _ => Some(ScanCursor { node: at.node, cursor }),
        };
        Ok((keys, next))
    }
}
