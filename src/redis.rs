//! Redis, as far as the rest of the house knows it: a few narrow commands, each with a deadline, none that blocks.
//!
//! Behind it stands fred, and between the two a guard of ours (`link.rs`): fred is never trusted to say that it is
//! connected, to give up in time, or to bound what it queues. Reading and writing have connections of their own, so
//! that a stalled write does not hold up reads; following the log has another, because it waits on the server.
//!
//! Everything that sidecars say to each other lies in one hash slot (`{prefix}:…`), so that scripts work in a cluster;
//! records are spread over all slots.

mod connect;
mod coordination;
mod errors;
mod herald;
mod link;
mod records;
mod scripts;
mod work;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;

use crate::clock::{Clock, FleetClock};
use crate::config;
use crate::telemetry::Latencies;
use herald::Herald;
use link::Link;

pub use coordination::{Claim, LogEntry, Message, News};
pub use link::{IN_FLIGHT, LinkState};
pub use records::Cursor;

/// What the driver says by itself, in the words of a log filter: what it warns of, this house says.
pub const QUIET: &str = "fred=error";

/// Two kinds of records, which can lie in databases of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Class {
    /// All may share it.
    Shared,
    /// It belongs to one credential.
    Private,
}

impl Class {
    /// Its part of a key.
    pub fn token(self) -> &'static str {
        match self {
            Class::Shared => "s",
            Class::Private => "p",
        }
    }
}

/// Why a command did nothing, as far as anyone knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// No connection.
    Down,
    /// The breaker is open.
    Open,
    /// Too many commands are under way.
    Busy,
    /// No answer in time: it may have been done all the same.
    Silent,
    /// An error was the answer.
    Refused,
}

/// A command that failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trouble {
    /// How.
    pub why: Why,
    /// What Redis said, if it said anything.
    pub message: String,
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = match self.why {
            Why::Down => "no connection",
            Why::Open => "the breaker is open",
            Why::Busy => "too many commands under way",
            Why::Silent => "no answer in time",
            Why::Refused => "refused",
        };
        f.write_str(word)?;
        if self.message.is_empty() { Ok(()) } else { write!(f, ": {}", self.message) }
    }
}

/// A reader and a writer of one database.
#[derive(Debug, Clone)]
struct Pair {
    reader: Arc<Link>,
    writer: Arc<Link>,
}

/// The connections to Redis.
#[derive(Debug)]
pub struct Redis {
    shared: Pair,
    private: Pair,
    /// Log, leases, work.
    coordination: Arc<Link>,
    /// Waits for the log to go on.
    follower: Arc<Link>,
    /// Waits for work, where there is any to share.
    worker: Option<Arc<Link>>,
    /// `{prefix}:1`, in braces: one slot.
    coordinates: Box<str>,
    command_timeout: Duration,
    herald: Arc<Herald>,
    time: Arc<FleetClock>,
    /// Where it is, for people.
    place: String,
    _supervisors: JoinSet<()>,
}

/// What `/health` and `/stats` say of Redis.
#[derive(Debug, Clone, serde::Serialize)]
pub struct State {
    /// Where it is.
    pub place: String,
    /// Why it is down, if it is.
    pub trouble: Option<String>,
    /// Each connection.
    pub connections: std::collections::BTreeMap<&'static str, LinkState>,
}

impl Redis {
    /// Begins to connect. Nothing waits for that. `works`: also to what is needed to share work.
    pub fn start(config: &config::Redis, works: bool, clock: &Clock, time: &Arc<FleetClock>) -> Redis {
        let herald = Arc::new(Herald::new(clock.clone()));
        let mut supervisors = JoinSet::new();
        let coordinates: Box<str> = format!("{{{}}}:1", config.key_prefix).into();
        let slot = scripts::slot_of(&coordinates);
        let mut link = |name, database, waits| {
            let link = Link::new(name, slot, waits, clock.clone(), herald.clone());
            let time = time.clone();
            let supervise = link.clone().supervise(Arc::new(config.clone()), database, move |told| time.hear(told));
            supervisors.spawn(supervise);
            link
        };
        let databases = config.databases;
        let shared =
            Pair { reader: link("reader", databases.cache, false), writer: link("writer", databases.cache, false) };
        let private = if databases.private == databases.cache {
            shared.clone()
        } else {
            Pair {
                reader: link("private-reader", databases.private, false),
                writer: link("private-writer", databases.private, false),
            }
        };
        let coordination = if databases.coordination == databases.cache {
            shared.writer.clone()
        } else {
            link("coordination", databases.coordination, false)
        };
        let follower = link("follower", databases.coordination, true);
        let worker = works.then(|| link("worker", databases.coordination, true));
        Redis {
            shared,
            private,
            coordination,
            follower,
            worker,
            coordinates,
            command_timeout: config.command_timeout,
            herald,
            time: time.clone(),
            place: config.topology.to_string(),
            _supervisors: supervisors,
        }
    }

    /// Is it worth asking?
    pub fn answers(&self) -> bool {
        self.shared.reader.answers() && self.follower.answers()
    }

    /// The clock that the fleet shares: this server's.
    pub fn time(&self) -> &FleetClock {
        &self.time
    }

    fn links(&self) -> impl Iterator<Item = &Arc<Link>> {
        let links = [
            &self.shared.reader,
            &self.shared.writer,
            &self.private.reader,
            &self.private.writer,
            &self.coordination,
            &self.follower,
        ];
        links.into_iter().chain(&self.worker)
    }

    /// How long the commands of each connection took.
    pub fn took(&self) -> std::collections::BTreeMap<&'static str, &Latencies> {
        self.links().map(|link| (link.name, link.took())).collect()
    }

    /// How it is.
    pub fn state(&self) -> State {
        State {
            place: self.place.clone(),
            trouble: self.herald.trouble().map(|why| format!("{why}{}", advice(&why))),
            connections: self.links().map(|link| (link.name, link.state())).collect(),
        }
    }

    fn pair(&self, class: Class) -> &Pair {
        match class {
            Class::Shared => &self.shared,
            Class::Private => &self.private,
        }
    }
}

/// Why a configuration does not work now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// Nothing answers.
    Absent(String),
    /// What answers refuses us, or is something else.
    Wrong(String),
}

/// Tries a configuration once, by reading and writing: one line about the server, or one clear line why not.
pub async fn probe(config: &config::Redis) -> Result<String, Refusal> {
    let place = format!("redis {}", config.topology);
    let connection = connect::connect(config, config.databases.cache).await.map_err(|why| {
        let line = format!("{place}: {why}{}", advice(&why));
        if errors::is_answer(&why) { Refusal::Wrong(line) } else { Refusal::Absent(line) }
    })?;
    match link::try_out(&connection.client, &config.key_prefix).await {
        Ok(version) => Ok(format!("{place}: ok, version {version}")),
        Err(why) => Err(Refusal::Wrong(format!("{place}: {why}{}", advice(&why)))),
    }
}

/// What to do about an answer of Redis.
fn advice(why: &str) -> &'static str {
    let known = [
        ("WRONGPASS", ": check username and password under [redis]"),
        ("NOAUTH", ": write username and password under [redis]"),
        ("ERR AUTH", ": this server has no password: leave password out"),
        ("NOPERM", ": give the ACL user what config.example.toml says under [redis]"),
        ("ERR This instance has cluster support disabled", ": this is no cluster: write redis://"),
        ("MOVED", ": this is a node of a cluster: write redis-cluster://"),
        ("ERR SELECT", ": a Redis Cluster has database 0 only"),
        ("ERR DB index", ": this server has fewer databases"),
        ("READONLY", ": this is a replica: name its master, or write redis-sentinel://"),
    ];
    known.into_iter().find(|(begins, _)| why.starts_with(begins)).map_or("", |(_, advice)| advice)
}
