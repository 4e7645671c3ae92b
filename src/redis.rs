//! Redis client: a small set of commands, each with a deadline, none of which blocks.
//!
//! The driver is fred, behind a supervised connection (`connection.rs`): fred is not relied upon to report that it is
//! connected, to time out, or to bound its queue. Reads and writes have separate connections, so that a stalled write
//! does not delay reads. Following the log has another connection, because it waits at the server.
//!
//! All keys for coordination between sidecars are in one hash slot (`{prefix}:…`), so that scripts work in a cluster.
//! Records are spread over all slots.

mod config;
mod connect;
mod connection;
mod connection_state;
mod coordination;
mod errors;
mod log_throttle;
mod membership;
mod records;
mod refresh_queue;
mod scripts;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::clock::{Clock, FleetClock};
use crate::telemetry::Histogram;
use connection::SupervisedConnection;
use log_throttle::LogThrottle;

pub use config::{RedisConfig, RedisDatabases, RedisTopology};
pub use connection::MAX_IN_FLIGHT;
pub use connection_state::ConnectionState;
pub use coordination::{InboxMessage, LeaseClaim, LogEntry, StreamUpdate};
pub use membership::{Beat, BeatReply};
pub use records::ScanCursor;

/// Log filter directive for the driver: its warnings are suppressed, because this module logs them itself.
pub const DRIVER_LOG_FILTER: &str = "fred=error";

/// The class of a record. Each class can have its own database.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RecordClass {
    /// Shared by all clients.
    Shared,
    /// Belongs to one credential partition.
    Private,
}

impl RecordClass {
    /// Returns its token in a Redis key.
    pub fn token(self) -> &'static str {
        match self {
            RecordClass::Shared => "s",
            RecordClass::Private => "p",
        }
    }
}

/// The reason why a command failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RedisErrorKind {
    /// No connection.
    Down,
    /// The circuit breaker is open.
    Open,
    /// Too many commands are in flight.
    Busy,
    /// No reply in time. The command may have been executed nevertheless.
    Silent,
    /// The reply was an error.
    Refused,
}

/// A command that failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RedisError {
    /// The kind of error.
    pub why: RedisErrorKind,
    /// The error message of Redis or of the client; may be empty.
    pub message: String,
}

impl RedisError {
    /// Returns the error with what to do about it.
    pub fn explained(&self) -> String {
        format!("{self}{}", advice(&self.message))
    }
}

impl fmt::Display for RedisError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self.why {
            RedisErrorKind::Down => "no connection",
            RedisErrorKind::Open => "the circuit breaker is open",
            RedisErrorKind::Busy => "too many commands in flight",
            RedisErrorKind::Silent => "no reply in time",
            RedisErrorKind::Refused => "refused",
        };
        f.write_str(text)?;
        if self.message.is_empty() { Ok(()) } else { write!(f, ": {}", self.message) }
    }
}

/// The connections for reading and writing one database.
#[derive(Debug, Clone)]
struct ReadWritePair {
    reader: Arc<SupervisedConnection>,
    writer: Arc<SupervisedConnection>,
}

/// The connections to Redis.
#[derive(Debug)]
pub struct Redis {
    shared: ReadWritePair,
    private: ReadWritePair,
    /// Commands for the log, leases and the refresh queue.
    coordination: Arc<SupervisedConnection>,
    /// Waits at the server for new log entries.
    follower: Arc<SupervisedConnection>,
    /// Waits at the server for queued refreshes, if refreshes are shared.
    worker: Option<Arc<SupervisedConnection>>,
    /// `{prefix}:1`, with literal braces (a hash tag): one slot.
    coordination_prefix: Box<str>,
    command_timeout: Duration,
    /// Limits the reads of the rest of a large value.
    large_reads: Semaphore,
    log_throttle: Arc<LogThrottle>,
    clock: Arc<FleetClock>,
    /// The server's address, for messages.
    place: String,
    _supervisors: JoinSet<()>,
}

/// The state of Redis, as in `/health` and `/stats`.
#[derive(Debug, Clone, serde::Serialize)]
pub struct RedisState {
    /// The server's address.
    pub place: String,
    /// Why a connection is down, if one is.
    pub trouble: Option<String>,
    /// The state of each connection.
    pub connections: std::collections::BTreeMap<&'static str, ConnectionState>,
}

impl Redis {
    /// Starts to connect, without waiting for it. `works`: whether to open the connection for the refresh queue, too.
    pub fn start(config: &RedisConfig, works: bool, clock: &Clock, time: &Arc<FleetClock>) -> Redis {
        let log_throttle = Arc::new(LogThrottle::new(clock.clone()));
        let mut supervisors = JoinSet::new();
        let coordinates: Box<str> = format!("{{{}}}:1", config.key_prefix).into();
        let slot = scripts::slot_of(&coordinates);
        let mut connection = |name, database, waits| {
            let connection = SupervisedConnection::new(name, slot, waits, clock.clone(), log_throttle.clone());
            let time = time.clone();
            let supervise = connection
                .clone()
                .supervise(Arc::new(config.clone()), database, move |server_time| time.update(server_time));
            supervisors.spawn(supervise);
            connection
        };
        let databases = config.databases;
        let shared = ReadWritePair {
            reader: connection("reader", databases.cache, false),
            writer: connection("writer", databases.cache, false),
        };
        let private = if databases.private == databases.cache {
            shared.clone()
        } else {
            ReadWritePair {
                reader: connection("private-reader", databases.private, false),
                writer: connection("private-writer", databases.private, false),
            }
        };
        let coordination = if databases.coordination == databases.cache {
            shared.writer.clone()
        } else {
            connection("coordination", databases.coordination, false)
        };
        let follower = connection("follower", databases.coordination, true);
        let worker = works.then(|| connection("worker", databases.coordination, true));
        Redis {
            shared,
            private,
            coordination,
            follower,
            worker,
            coordination_prefix: coordinates,
            command_timeout: config.command_timeout,
            large_reads: Semaphore::new(records::MAX_LARGE_READS),
            log_throttle,
            clock: time.clone(),
            place: config.topology.to_string(),
            _supervisors: supervisors,
        }
    }

    /// Returns true if Redis is connected and lookups would be sent.
    pub fn is_usable(&self) -> bool {
        self.shared.reader.is_usable() && self.follower.is_usable()
    }

    /// Returns the fleet clock, which follows the clock of this server.
    pub fn clock(&self) -> &FleetClock {
        &self.clock
    }

    fn connections(&self) -> impl Iterator<Item = &Arc<SupervisedConnection>> {
        let connections = [
            &self.shared.reader,
            &self.shared.writer,
            &self.private.reader,
            &self.private.writer,
            &self.coordination,
            &self.follower,
        ];
        connections.into_iter().chain(&self.worker)
    }

    /// Returns the command latencies of each connection.
    pub fn latencies(&self) -> std::collections::BTreeMap<&'static str, &Histogram> {
        self.connections().map(|connection| (connection.name, connection.latencies())).collect()
    }

    /// Returns the state of Redis.
    pub fn state(&self) -> RedisState {
        RedisState {
            place: self.place.clone(),
            trouble: self.log_throttle.last_error().map(|why| format!("{why}{}", advice(&why))),
            connections: self.connections().map(|connection| (connection.name, connection.state())).collect(),
        }
    }

    fn pair(&self, class: RecordClass) -> &ReadWritePair {
        match class {
            RecordClass::Shared => &self.shared,
            RecordClass::Private => &self.private,
        }
    }
}

/// The reason why a configuration does not work now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProbeError {
    /// The server can't be reached.
    Absent(String),
    /// The server refused the connection or a command, or is not what the configuration says.
    Wrong(String),
}

/// Tries a configuration once, by reading and writing. Returns one line about the server, or an error of one line.
pub async fn probe(config: &RedisConfig) -> Result<String, ProbeError> {
    let place = format!("redis {}", config.topology);
    let connection = connect::connect(config, config.databases.cache).await.map_err(|why| {
        let line = format!("{place}: {why}{}", advice(&why));
        if errors::is_server_reply(&why) { ProbeError::Wrong(line) } else { ProbeError::Absent(line) }
    })?;
    match connection::check_read_write(&connection.client, &config.key_prefix).await {
        Ok(version) => Ok(format!("{place}: ok, version {version}")),
        Err(why) => Err(ProbeError::Wrong(format!("{place}: {why}{}", advice(&why)))),
    }
}

/// Returns what to do about an error reply of Redis, to be appended to it.
fn advice(why: &str) -> &'static str {
    let known = [
        ("WRONGPASS", ": check username and password under [redis]"),
        ("NOAUTH", ": write username and password under [redis]"),
        ("ERR AUTH", ": this server has no password: leave password out"),
        ("NOPERM", ": give the ACL user what config.example.toml says under [redis]"),
        ("ERR This instance has cluster support disabled", ": this is no cluster: write redis://"),
        ("MOVED", ": this is a node of a cluster: write redis-cluster://"),
        ("ERR SELECT", ": a Redis Cluster has database 0 only"),
        (
            "OOM",
            ": Redis has no memory left and evicts nothing: raise maxmemory, or set maxmemory-policy allkeys-lru",
        ),
        ("MISCONF", ": Redis can't save its snapshot and refuses writes: make room on its disk, or see its log"),
        ("NOREPLICAS", ": too few replicas are connected (min-replicas-to-write)"),
        ("WRONGTYPE", ": another program uses this key: choose another key_prefix"),
        ("LOADING", ": Redis is loading its data: wait"),
        ("ERR DB index", ": this server has fewer databases"),
        ("READONLY", ": this is a replica: name its master, or write redis-sentinel://"),
    ];
    known.into_iter().find(|(begins, _)| why.starts_with(begins)).map_or("", |(_, advice)| advice)
}
