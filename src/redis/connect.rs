//! One connection to Redis, as the configuration says, or one clear line why there is none.
//!
//! fred is told to connect once and to fail then. Connecting again is the supervisor's business ([`super::link`]): with
//! a new client each time, because one that was lost still says it is connected, and with credentials read anew.

use std::time::Duration;

use fred::clients::Client;
use fred::interfaces::{ClientLike, FredResult};
use fred::types::RespVersion;
use fred::types::config::{
    ClusterDiscoveryPolicy, Config, ConnectionConfig, PerformanceConfig, Server, ServerConfig, TcpConfig, TlsConfig,
    TlsConnector,
};
use tokio::task::JoinHandle;

use crate::config::{Redis, SecretSource, Topology};
use crate::tls;

/// How long connecting may take: name, TCP, TLS, HELLO, SELECT; in a cluster, all of its masters.
const CONNECT: Duration = Duration::from_secs(2);

/// Between looks at whether a client has connected.
const LOOK: Duration = Duration::from_millis(1);

/// The kernel gives up on what it can't deliver for so long.
const USER_TIMEOUT: Duration = Duration::from_secs(1);

/// A client, and the task that drives its socket: dropping a client does not end that.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) client: Client,
    pub(super) driver: Driver,
}

/// Ends when the connection does, and ends the connection when dropped.
#[derive(Debug)]
pub(super) struct Driver(JoinHandle<FredResult<()>>);

impl Driver {
    /// Waits for the connection's end: why it ended.
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

/// Connects to one database. The error is one clear line.
pub(super) async fn connect(config: &Redis, database: u8) -> Result<Connection, String> {
    let client = Client::new(settings(config, database)?, Some(PerformanceConfig::default()), Some(limits()), None);
    let mut driver = Driver(client.connect());
    tokio::select! {
        biased;
        why = driver.ended() => Err(why),
        () = connected(&client) => Ok(Connection { client, driver }),
        () = tokio::time::sleep(CONNECT) => Err(format!("no answer within {} s", CONNECT.as_secs())),
    }
}

/// Until the client has connected. fred's own `wait_for_connect` misses it, for ever, if that happens between its look at
/// the state and its subscription.
async fn connected(client: &Client) {
    while !client.is_connected() {
        tokio::time::sleep(LOOK).await;
    }
}

fn settings(config: &Redis, database: u8) -> Result<Config, String> {
    let password = config.password.as_ref().map(SecretSource::read).transpose()?;
    let password = password.map(|secret| secret.reveal().to_owned());
    let tls = match &config.tls {
        None => None,
        Some(tls) => Some(TlsConfig::from(TlsConnector::from(tls::client_config(tls)?))),
    };
    let servers =
        |nodes: &[(String, u16)]| nodes.iter().map(|(host, port)| Server::new(host.as_str(), *port)).collect();
    let server = match &config.topology {
        Topology::Single((host, port)) => ServerConfig::new_centralized(host.as_str(), *port),
        Topology::Unix(path) => ServerConfig::Unix { path: path.clone() },
        Topology::Cluster(nodes) => {
            ServerConfig::Clustered { hosts: servers(nodes), policy: ClusterDiscoveryPolicy::UseCache }
        }
        Topology::Sentinel { nodes, service } => ServerConfig::Sentinel {
            hosts: servers(nodes),
            service_name: service.clone(),
            username: None,
            password: None,
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

fn limits() -> ConnectionConfig {
    ConnectionConfig {
        connection_timeout: CONNECT,
        internal_command_timeout: CONNECT,
        // What answers with READONLY, LOADING and the like is our business to judge.
        reconnect_errors: Vec::new(),
        tcp: TcpConfig { nodelay: Some(true), user_timeout: Some(USER_TIMEOUT), ..TcpConfig::default() },
        ..ConnectionConfig::default()
    }
}
