//! Connecting to Redis as configured. Errors are one line.
//!
//! fred is configured to connect once and then to fail. The supervisor reconnects ([`super::connection`]), each time
//! with a new client, because one that lost its connection still reports that it is connected, and with credentials
//! read again.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use fred::clients::Client;
use fred::interfaces::{ClientLike, FredResult};
use fred::types::RespVersion;
use fred::types::config::{
    ClusterDiscoveryPolicy, Config, ConnectionConfig, HostMapping, PerformanceConfig, Server, ServerConfig,
    TcpConfig, TlsConfig, TlsConnector, TlsHostMapping,
};
use tokio::task::{JoinHandle, JoinSet};

use super::config::{RedisConfig, RedisTopology};
use super::errors::is_server_reply;
use crate::secret::SecretSource;
use crate::tls;

/// Timeout of connecting: DNS, TCP, TLS, HELLO, SELECT; in a cluster, to all of its masters.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// Time after which the next node is tried as well.
const SEED_DELAY: Duration = Duration::from_millis(50);

/// Interval between checks whether a client has connected.
const CONNECT_POLL: Duration = Duration::from_millis(1);

/// The kernel closes the connection when sent data is not acknowledged for this long (TCP user timeout).
const USER_TIMEOUT: Duration = Duration::from_secs(1);

/// A client and the task that drives its socket, which does not end when the client is dropped.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) client: Client,
    pub(super) driver: Driver,
}

/// The task that drives a connection. Dropping it closes the connection.
#[derive(Debug)]
pub(super) struct Driver(JoinHandle<FredResult<()>>);

impl Driver {
    /// Waits until the connection ends, and returns the reason.
    pub(super) async fn ended(&mut self) -> String {
        match (&mut self.0).await {
            Ok(Ok(())) => "the connection was closed".to_owned(),
            Ok(Err(error)) => super::errors::first_line(error.details()),
            Err(panicked) => panicked.to_string(),
        }
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Connects to one database. Of a Cluster or of Sentinels, each node is tried on its own, one shortly after the other,
/// and the first that works is used: a node that does not respond delays nothing. The error is one line.
pub(super) async fn connect(config: &RedisConfig, database: u8) -> Result<Connection, String> {
    let mut attempts = JoinSet::new();
    for (delay, topology) in (0..).zip(config.topology.seeds()) {
        let config = RedisConfig { topology, ..config.clone() };
        attempts.spawn(async move {
            tokio::time::sleep(SEED_DELAY * delay).await;
            connect_to(&config, database).await
        });
    }
    let mut failure = "no address".to_owned();
    while let Some(attempt) = attempts.join_next().await {
        match attempt.map_err(|panicked| panicked.to_string()).and_then(|connected| connected) {
            Ok(connection) => return Ok(connection),
            // The reply of a server says more than a timeout.
            Err(why) if !is_server_reply(&failure) => failure = why,
            Err(_) => {}
        }
    }
    Err(failure)
}

async fn connect_to(config: &RedisConfig, database: u8) -> Result<Connection, String> {
    let client = Client::new(
        client_config(config, database)?,
        Some(PerformanceConfig::default()),
        Some(connection_config()),
        None,
    );
    let mut driver = Driver(client.connect());
    tokio::select! {
        biased;
        why = driver.ended() => Err(why),
        () = wait_connected(&client) => Ok(Connection { client, driver }),
        () = tokio::time::sleep(CONNECT_TIMEOUT) => Err(format!("no reply within {} s", CONNECT_TIMEOUT.as_secs())),
    }
}

/// Waits until the client has connected. fred's own `wait_for_connect` waits forever if that happens between its check
/// of the state and its subscription.
async fn wait_connected(client: &Client) {
    while !client.is_connected() {
        tokio::time::sleep(CONNECT_POLL).await;
    }
}

fn client_config(config: &RedisConfig, database: u8) -> Result<Config, String> {
    let password = config.password.as_ref().map(SecretSource::read).transpose()?;
    let password = password.map(|secret| secret.reveal().to_owned());
    let sentinel_password = config.sentinel_password.as_ref().map(SecretSource::read).transpose()?;
    let sentinel_password = sentinel_password.map(|secret| secret.reveal().to_owned());
    let tls = match &config.tls {
        None => None,
        Some(tls) => Some(TlsConfig {
            connector: TlsConnector::from(tls::client_config(tls)?),
            hostnames: TlsHostMapping::Custom(Arc::new(NodeNames(config.tls_names.clone()))),
        }),
    };
    let servers =
        |nodes: &[(String, u16)]| nodes.iter().map(|(host, port)| Server::new(host.as_str(), *port)).collect();
    let server = match &config.topology {
        RedisTopology::Single((host, port)) => ServerConfig::new_centralized(host.as_str(), *port),
        RedisTopology::Unix(path) => ServerConfig::Unix { path: path.clone() },
        RedisTopology::Cluster(nodes) => {
            ServerConfig::Clustered { hosts: servers(nodes), policy: ClusterDiscoveryPolicy::UseCache }
        }
        RedisTopology::Sentinel { nodes, service } => ServerConfig::Sentinel {
            hosts: servers(nodes),
            service_name: service.clone(),
            username: config.sentinel_username.clone(),
            password: sentinel_password,
        },
    };
    Ok(Config {
        server,
        version: RespVersion::RESP3,
        username: config.username.clone(),
        password,
        database: (database != 0).then_some(database),
        tls,
        fail_fast: true,
        ..Config::default()
    })
}

/// The names in the certificates of a Cluster's nodes ([`RedisConfig::tls_names`]).
#[derive(Debug)]
struct NodeNames(BTreeMap<Option<IpAddr>, String>);

impl HostMapping for NodeNames {
    fn map(&self, address: &IpAddr, _seed: &str) -> Option<String> {
        self.0.get(&Some(*address)).or_else(|| self.0.get(&None)).cloned()
    }
}

fn connection_config() -> ConnectionConfig {
    ConnectionConfig {
        connection_timeout: CONNECT_TIMEOUT,
        internal_command_timeout: CONNECT_TIMEOUT,
        // Replies like READONLY and LOADING are handled in `errors.rs`, not by fred.
        reconnect_errors: Vec::new(),
        tcp: TcpConfig { nodelay: Some(true), user_timeout: Some(USER_TIMEOUT), ..TcpConfig::default() },
        ..ConnectionConfig::default()
    }
}
