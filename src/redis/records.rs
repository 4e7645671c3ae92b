//! Records: read, write, remove, walk.

use std::time::Duration;

use bytes::Bytes;
use fred::interfaces::{ClientLike, ClusterInterface, KeysInterface};
use fred::types::{ClusterHash, CustomCommand, Expiration, Value};

use super::link::Asking;
use super::scripts::REMOVE;
use super::{Class, Redis, Trouble};

/// Keys looked at in one step of a walk.
const STEP: u32 = 500;

/// Where a walk is.
#[derive(Debug, Clone, Default)]
pub struct Cursor {
    /// Which node of a cluster.
    node: usize,
    cursor: String,
}

impl Redis {
    /// What lies under a key, at most so many bytes of it; none if there is nothing. They are part of the connection's
    /// read buffer: copy what is to stay.
    pub async fn read_start(&self, class: Class, key: &str, bytes: usize) -> Result<Bytes, Trouble> {
        let last = bytes.saturating_sub(1);
        let command = |client: Asking| async move { client.getrange(key, 0, last).await };
        self.pair(class).reader.run(self.command_timeout, command).await
    }

    /// Stores bytes for so long.
    pub async fn write(&self, class: Class, key: &str, value: Bytes, ttl: Duration) -> Result<(), Trouble> {
        let size = value.len() as u64;
        let ttl = i64::try_from(ttl.as_millis()).unwrap_or(i64::MAX).max(1);
        let command = |client: Asking| async move {
            client.set::<(), _, _>(key, value, Some(Expiration::PX(ttl)), None, false).await
        };
        // What is large takes its time.
        let more = Duration::from_millis(size / 10_000);
        self.pair(class).writer.run(self.command_timeout + more, command).await
    }

    /// Removes what lies under a key, if it still begins so.
    pub async fn remove_unchanged(&self, class: Class, key: &str, start: Bytes) -> Result<bool, Trouble> {
        let writer = &self.pair(class).writer;
        let removed: i64 =
            writer.script(self.command_timeout, REMOVE, vec![key.to_owned()], vec![Value::Bytes(start)]).await?;
        Ok(removed > 0)
    }

    /// Removes keys.
    pub async fn remove(&self, class: Class, key: &str) -> Result<(), Trouble> {
        let command = |client: Asking| async move { client.unlink::<(), _>(key).await };
        self.pair(class).writer.run(self.command_timeout, command).await
    }

    /// One step of a walk over all keys that begin so: keys, and where to go on; none at the end. `prefix` has no
    /// glob characters.
    pub async fn walk(
        &self,
        class: Class,
        prefix: &str,
        at: Cursor,
    ) -> Result<(Vec<String>, Option<Cursor>), Trouble> {
        let pattern = format!("{prefix}*");
        let from = if at.cursor.is_empty() { "0".to_owned() } else { at.cursor };
        // A walk does not hurry.
        let deadline = self.command_timeout * 10;
        let reader = &self.pair(class).reader;
        let (cursor, keys, nodes): (String, Vec<String>, usize) = reader
            .run(deadline, |client| async move {
                let mut nodes =
                    client.cached_cluster_state().map_or(Vec::new(), |state| state.unique_primary_nodes());
                nodes.sort_by_key(|node| (node.host.to_string(), node.port));
                let arguments = [from.as_str(), "MATCH", &pattern, "COUNT", &STEP.to_string()].map(str::to_owned);
                let command = CustomCommand::new_static("SCAN", ClusterHash::Random, false);
                let (cursor, keys): (String, Vec<String>) = match nodes.get(at.node) {
                    Some(node) => client.with_cluster_node(node).custom(command, arguments.to_vec()).await?,
                    None => client.custom(command, arguments.to_vec()).await?,
                };
                Ok((cursor, keys, nodes.len()))
            })
            .await?;
        let next = match cursor.as_str() {
            "0" if at.node + 1 < nodes => Some(Cursor { node: at.node + 1, cursor: String::new() }),
            "0" => None,
            _ => Some(Cursor { node: at.node, cursor }),
        };
        Ok((keys, next))
    }
}
