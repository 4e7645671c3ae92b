//! What the operator decided, validated and compiled: no serde here, and nothing left to go wrong later.
//!
//! [`load`] is the way in: it reads the file, the environment and the flags, in that order of increasing
//! strength, and answers with a [`Config`] or with errors that name file, line, column and what to write.

mod error;
mod file;
mod interpolate;
mod protection;
mod redis;
mod rules;
mod secret;
mod shown;
mod upstreams;
mod validate;
mod values;
mod warnings;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use http::HeaderName;
use http::uri::{Authority, Scheme};

use crate::policy::circuit::Tolerance;
use crate::policy::glob::Glob;
use crate::policy::mode::{self, Mode};
use crate::policy::quota::Budget;
use crate::policy::retry::Retry;
use crate::policy::route::Router;

pub use error::ConfigError;
pub use secret::{Secret, SecretSource};
pub use shown::shown;
pub use validate::{from_text, load};
pub use values::{parse_duration, parse_size};
pub use warnings::warnings;

/// Everything the program needs to know to start.
#[derive(Debug)]
pub struct Config {
    /// Where it came from: `flags`, or the file's path.
    pub source: String,
    /// What runs: one listener and one API each.
    pub upstreams: Vec<Upstream>,
    /// The memory tier.
    pub memory: Memory,
    /// Limits on what clients may do.
    pub limits: Limits,
    /// The store that a fleet shares; `None`: memory only.
    pub redis: Option<Redis>,
    /// Secrets that sign records and digest credentials: the first one signs, all verify. None: made up at start,
    /// or kept in Redis.
    pub secrets: Vec<Secret>,
    /// Encrypt what lies in Redis.
    pub encrypt: bool,
    /// What it does with requests, and who says so.
    pub mode: (Mode, mode::Source),
    /// The admin listener; `None`: off.
    pub admin: Option<Admin>,
    /// Where kubelet and Prometheus ask, if not only at the admin listener.
    pub probes: Option<SocketAddr>,
    /// How long to let requests finish on SIGTERM.
    pub grace: Duration,
    /// How to log.
    pub log: Log,
    /// Defaults that this version does not act on yet, one line each.
    pub notes: Vec<String>,
}

/// What the command line adds to, or puts in the place of, the file.
#[derive(Debug, Clone, Default)]
pub struct Flags {
    /// `--config`.
    pub config: Option<PathBuf>,
    /// `--upstream`.
    pub upstream: Option<String>,
    /// `--listen`.
    pub listen: Option<String>,
    /// `--profile`.
    pub profile: Option<String>,
    /// `--ttl`.
    pub ttl: Option<String>,
    /// `--redis`.
    pub redis: Option<String>,
}

/// One API behind one listener.
#[derive(Debug)]
pub struct Upstream {
    /// Its name in logs, metrics and purges.
    pub name: Arc<str>,
    /// Where applications connect to.
    pub listen: SocketAddr,
    /// Where requests go.
    pub target: Target,
    /// `generic`, `shopify`.
    pub profile: &'static str,
    /// The operator's rules, then the profile's, then the closing one.
    pub router: Router,
    /// So many of the router's plans, the first ones, are the operator's.
    pub own_plans: usize,
    /// How many rules are the operator's or the profile's.
    pub rules: usize,
    /// How long to wait for what.
    pub timeouts: Timeouts,
    /// The safe retry.
    pub retry: Retry,
    /// TLS towards the upstream.
    pub tls: Tls,
    /// TLS towards the clients.
    pub listen_tls: Option<ListenTls>,
    /// Speak HTTP/2 to the upstream.
    pub http2: bool,
    /// How often it may be asked; none: as often as clients ask.
    pub budget: Option<Budget>,
    /// When it is not asked for a while.
    pub tolerance: Tolerance,
    /// Connections to it.
    pub pool: Pool,
}

/// Connections to an upstream.
#[derive(Debug, Clone, Copy)]
pub struct Pool {
    /// To each host; who comes when there are so many waits for one.
    pub connections: usize,
    /// Idle ones kept for each host.
    pub idle: usize,
    /// An older one is not used again.
    pub max_age: Duration,
}

/// Where requests go.
#[derive(Debug, Clone)]
pub enum Target {
    /// One origin.
    Origin {
        /// `http` or `https`.
        scheme: Scheme,
        /// Host and port.
        authority: Authority,
        /// Forward (and key) the client's Host rather than the authority.
        preserve_host: bool,
    },
    /// The client names the host; these are allowed.
    Hosts(Vec<HostPattern>),
}

impl Target {
    /// `scheme://authority`; for host patterns, which say it with each request, only that.
    pub fn origin(&self) -> String {
        match self {
            Target::Origin { scheme, authority, .. } => format!("{scheme}://{authority}"),
            Target::Hosts(_) => "hosts".to_owned(),
        }
    }
}

/// `[scheme://]pattern[:port]`.
#[derive(Debug, Clone)]
pub struct HostPattern {
    /// `https` unless it says otherwise.
    pub scheme: Scheme,
    /// One glob a label.
    pub labels: Vec<Glob>,
    /// A port other than the scheme's.
    pub port: Option<u16>,
}

impl HostPattern {
    /// Is this authority (lower-case host, port if named) allowed by it? `*` stands for one label.
    pub fn matches(&self, host: &str, port: Option<u16>) -> bool {
        let default = if self.scheme == Scheme::HTTPS { 443 } else { 80 };
        let labels: Vec<&str> = host.split('.').collect();
        port.unwrap_or(default) == self.port.unwrap_or(default)
            && labels.len() == self.labels.len()
            && self.labels.iter().zip(labels).all(|(glob, label)| !label.is_empty() && glob.matches(label.as_bytes()))
    }
}

/// How long an upstream may take.
#[derive(Debug, Clone, Copy)]
pub struct Timeouts {
    /// DNS, TCP and TLS together.
    pub connect: Duration,
    /// From sending the request to the response head.
    pub first_byte: Duration,
    /// Between two pieces of a body.
    pub idle: Duration,
    /// A whole fetch that is being stored.
    pub fetch: Duration,
}

/// TLS towards the upstream.
#[derive(Debug, Clone, Default)]
pub struct Tls {
    /// Trust these certificates (PEM) instead of the system's.
    pub ca: Option<PathBuf>,
    /// Client certificate chain and key (PEM).
    pub identity: Option<(PathBuf, PathBuf)>,
}

/// TLS towards clients.
#[derive(Debug, Clone)]
pub struct ListenTls {
    /// Certificate chain (PEM).
    pub cert: PathBuf,
    /// Its key (PEM).
    pub key: PathBuf,
    /// Only clients with a certificate that these (PEM) vouch for.
    pub client_ca: Option<PathBuf>,
}

/// Sizes of the memory tier, in bytes.
#[derive(Debug, Clone, Copy)]
pub struct Memory {
    /// All entries together, overhead counted.
    pub max_bytes: u64,
    /// One entry.
    pub max_entry_bytes: u64,
    /// All running fetches together.
    pub max_inflight_bytes: u64,
    /// How long entries may be trusted while the invalidation log can't be read.
    pub max_unverified: Duration,
}

/// The store that a fleet shares.
#[derive(Debug, Clone)]
pub struct Redis {
    /// Where it is.
    pub topology: Topology,
    /// TLS towards it.
    pub tls: Option<Tls>,
    /// ACL user.
    pub username: Option<String>,
    /// Where its password is, read again for each connection.
    pub password: Option<SecretSource>,
    /// Which databases.
    pub databases: Databases,
    /// Begins every key.
    pub key_prefix: Box<str>,
    /// How long a command may take.
    pub command_timeout: Duration,
    /// How bodies are compressed …
    pub compress: Compression,
    /// … that are larger than this many bytes.
    pub compress_above: u64,
    /// Bytes that may wait to be written.
    pub write_behind: u64,
}

/// Where a Redis is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Topology {
    /// One server.
    Single((String, u16)),
    /// One server, by its socket.
    Unix(PathBuf),
    /// A cluster, by some of its nodes.
    Cluster(Vec<(String, u16)>),
    /// A master that sentinels watch.
    Sentinel {
        /// The sentinels.
        nodes: Vec<(String, u16)>,
        /// The master's name.
        service: String,
    },
}

impl std::fmt::Display for Topology {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let list = |nodes: &[(String, u16)]| {
            nodes.iter().map(|(host, port)| format!("{host}:{port}")).collect::<Vec<_>>().join(",")
        };
        match self {
            Topology::Single((host, port)) => write!(f, "{host}:{port}"),
            Topology::Unix(path) => write!(f, "unix:{}", path.display()),
            Topology::Cluster(nodes) => write!(f, "cluster:{}", list(nodes)),
            Topology::Sentinel { nodes, service } => write!(f, "sentinel:{service}@{}", list(nodes)),
        }
    }
}

/// Logical databases.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Databases {
    /// What all may share.
    pub cache: u8,
    /// What belongs to one credential.
    pub private: u8,
    /// The invalidation log, leases, work.
    pub coordination: u8,
}

/// How bodies are compressed at rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compression {
    /// Not at all.
    Off,
    /// Quick.
    #[default]
    Lz4,
    /// Small.
    Zstd,
}

/// Limits on what clients may do.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes of a request body.
    pub request_body: u64,
    /// Bytes of all header lines.
    pub headers: u64,
    /// Bytes of the request target.
    pub url: u64,
    /// Open client connections per listener.
    pub connections: usize,
    /// From a request's first byte to the end of its head.
    pub header_time: Duration,
    /// An idle connection is closed after this.
    pub keep_alive: Duration,
    /// A client that takes nothing for so long is cut.
    pub write_stall: Duration,
    /// The same, for one that others wait for behind a full window.
    pub shared_write_stall: Duration,
}

/// The admin listener.
#[derive(Debug, Clone)]
pub struct Admin {
    /// Where.
    pub listen: SocketAddr,
    /// Its bearer token; `None`: open, on loopback only.
    pub token: Option<Secret>,
}

/// How to log.
#[derive(Debug, Clone)]
pub struct Log {
    /// A filter like `info` or `sidecache=debug,hyper=warn`.
    pub filter: String,
    /// One JSON object a line.
    pub json: bool,
}

/// Headers that carry credentials, unless `security.credential_headers` says otherwise.
pub fn default_credential_headers() -> Vec<HeaderName> {
    [
        "authorization",
        "cookie",
        "x-api-key",
        "api-key",
        "apikey",
        "x-auth-token",
        "x-access-token",
        "private-token",
        "x-shopify-access-token",
        "x-shopify-storefront-access-token",
        "shopify-storefront-private-token",
    ]
    .map(HeaderName::from_static)
    .to_vec()
}
