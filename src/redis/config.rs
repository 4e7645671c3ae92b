//! Settings of the Redis connections.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use crate::secret::SecretSource;
use crate::tls::ClientTls;

/// Settings of the Redis that a fleet shares.
#[derive(Debug, Clone)]
pub struct RedisConfig {
    /// Addresses of the servers.
    pub topology: RedisTopology,
    /// TLS settings, if TLS is used.
    pub tls: Option<ClientTls>,
    /// The names in the certificates of a Cluster's nodes, by the address with which a Cluster names them; `None` as the
    /// address stands for all others.
    pub tls_names: BTreeMap<Option<IpAddr>, String>,
    /// ACL user.
    pub username: Option<String>,
    /// Source of the password, read again for each connection.
    pub password: Option<SecretSource>,
    /// ACL user of the Sentinels, if they have one of their own.
    pub sentinel_username: Option<String>,
    /// Source of the password of the Sentinels, read again for each connection.
    pub sentinel_password: Option<SecretSource>,
    /// Logical databases.
    pub databases: RedisDatabases,
    /// Prefix of every key.
    pub key_prefix: Box<str>,
    /// Timeout of a command.
    pub command_timeout: Duration,
}

/// Logical databases.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RedisDatabases {
    /// Records shared by all clients.
    pub cache: u8,
    /// Records of one credential partition.
    pub private: u8,
    /// The invalidation log, leases and the refresh queue.
    pub coordination: u8,
}

/// The kind and addresses of a Redis deployment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RedisTopology {
    /// One server.
    Single((String, u16)),
    /// One server, by its Unix socket.
    Unix(PathBuf),
    /// A Redis Cluster, by some of its nodes.
    Cluster(Vec<(String, u16)>),
    /// A master monitored by Redis Sentinel.
    Sentinel {
        /// The sentinels.
        nodes: Vec<(String, u16)>,
        /// The master's name.
        service: String,
    },
}

impl RedisTopology {
    /// Returns a topology for each node that can be connected to first.
    pub fn seeds(&self) -> Vec<RedisTopology> {
        match self {
            RedisTopology::Single(_) | RedisTopology::Unix(_) => vec![self.clone()],
            RedisTopology::Cluster(nodes) => {
                nodes.iter().map(|node| RedisTopology::Cluster(vec![node.clone()])).collect()
            }
            RedisTopology::Sentinel { nodes, service } => {
                let seed = |node: &(String, u16)| RedisTopology::Sentinel {
                    nodes: vec![node.clone()],
                    service: service.clone(),
                };
                nodes.iter().map(seed).collect()
            }
        }
    }
}

impl std::fmt::Display for RedisTopology {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let list = |nodes: &[(String, u16)]| {
            nodes.iter().map(|(host, port)| format!("{host}:{port}")).collect::<Vec<_>>().join(",")
        };
        match self {
            RedisTopology::Single((host, port)) => write!(f, "{host}:{port}"),
            RedisTopology::Unix(path) => write!(f, "unix:{}", path.display()),
            RedisTopology::Cluster(nodes) => write!(f, "cluster:{}", list(nodes)),
            RedisTopology::Sentinel { nodes, service } => write!(f, "sentinel:{service}@{}", list(nodes)),
        }
    }
}
