//! The configuration: validated and compiled from file, environment and flags.
//!
//! [`load`] reads the file, the environment and the flags, where each overrides the ones before it. It returns a
//! [`Config`], or errors that name file, line, column and what to write. The types here do not depend on serde, and
//! their values need no further validation.

mod credential_headers;
mod effective;
mod error;
mod file;
mod interpolate;
mod redis;
mod resilience;
mod rules;
mod upstreams;
mod validate;
mod values;
mod warnings;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use http::uri::Scheme;

use crate::policy::client_limits::ClientLimits;
use crate::policy::mode;
use crate::policy::mode::Mode;
use crate::policy::resilience::backoff::FailureBackoff;
use crate::policy::resilience::budget::Budget;
use crate::policy::resilience::circuit_breaker::BreakerConfig;
use crate::policy::resilience::retry::RetryPolicy;
use crate::policy::routing::origin::Origin;
use crate::policy::routing::router::Router;
use crate::proxy::upstream_state::UpstreamSettings;
use crate::redis::RedisConfig;
use crate::secret::Secret;
use crate::store::memory::MemoryLimits;
use crate::store::redis_tier::RedisTierConfig;
use crate::telemetry::logs::LogConfig;
use crate::tls::ClientTls;
use crate::tls::ServerTls;
use crate::upstream::{ClientSettings, PoolLimits, Timeouts};

pub use credential_headers::default_credential_headers;
pub use effective::effective_json;
pub use error::ConfigError;
pub use validate::{from_text, load};
pub use values::{parse_duration, parse_size};
pub use warnings::warnings;

/// The complete configuration of the process.
#[derive(Debug)]
pub struct Config {
    /// Where the configuration came from: `flags`, or the file's path.
    pub source: String,
    /// The upstreams: one listener and one API each.
    pub upstreams: Vec<UpstreamConfig>,
    /// Limits of the memory tier.
    pub memory: MemoryLimits,
    /// Limits on clients.
    pub limits: ClientLimits,
    /// Redis, which a fleet shares; `None`: memory only.
    pub redis: Option<RedisConfig>,
    /// Settings for records in Redis.
    pub redis_tier: RedisTierConfig,
    /// Secrets that sign records and digest credentials: the first one signs, all verify. If empty, a secret is
    /// generated at start, or kept in Redis.
    pub secrets: Vec<Secret>,
    /// Whether records in Redis are encrypted.
    pub encrypt: bool,
    /// The operating mode, and where it was set.
    pub mode: (Mode, mode::ModeSource),
    /// The admin listener; `None`: off.
    pub admin: Option<AdminConfig>,
    /// Address of a separate listener for the kubelet's probes and Prometheus, in addition to the admin listener.
    pub probes: Option<SocketAddr>,
    /// How long requests may take to finish after SIGTERM.
    pub grace: Duration,
    /// Log settings.
    pub log: LogConfig,
    /// Settings that this version does not fully implement, one line each.
    pub notes: Vec<String>,
}

/// Command-line options that add to the file's settings or replace them.
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

/// An upstream: one API behind one listener.
#[derive(Debug)]
pub struct UpstreamConfig {
    /// The name in logs, metrics and purges.
    pub name: Arc<str>,
    /// The address that applications connect to.
    pub listen: SocketAddr,
    /// Where requests are sent.
    pub origin: Origin,
    /// The profile: `generic` or `shopify`.
    pub profile: &'static str,
    /// The operator's rules, then the profile's, then the default rule.
    pub router: Router,
    /// The number of compiled rules at the start of the router that are the operator's.
    pub own_plans: usize,
    /// The number of rules, before compilation, of the operator and the profile.
    pub rules: usize,
    /// Timeouts.
    pub timeouts: Timeouts,
    /// The retry policy.
    pub retry: RetryPolicy,
    /// Whether requests carry `Via`.
    pub adds_via: bool,
    /// The pause of a key after a failed fetch.
    pub backoff: FailureBackoff,
    /// TLS for connections to the upstream.
    pub tls: ClientTls,
    /// TLS for connections from clients.
    pub listen_tls: Option<ServerTls>,
    /// Whether requests are sent to the upstream over HTTP/2.
    pub http2: bool,
    /// The request budget; `None`: unlimited.
    pub budget: Option<Budget>,
    /// When the circuit breaker opens, and for how long.
    pub breaker: BreakerConfig,
    /// Limits of the connection pool.
    pub pool: PoolLimits,
}

impl UpstreamConfig {
    /// Returns the settings of the client that sends requests to this upstream.
    pub fn client_settings(&self) -> ClientSettings {
        ClientSettings {
            origin: self.origin.clone(),
            timeouts: self.timeouts,
            pool: self.pool,
            tls: self.tls.clone(),
            http2: self.http2,
        }
    }

    /// Returns the settings of the proxy in front of this upstream.
    pub fn into_settings(self) -> UpstreamSettings {
        UpstreamSettings {
            client_scheme: if self.listen_tls.is_some() { Scheme::HTTPS } else { Scheme::HTTP },
            name: self.name,
            origin: self.origin,
            router: self.router,
            timeouts: self.timeouts,
            budget: self.budget,
            breaker: self.breaker,
            retry: self.retry,
            backoff: self.backoff,
            adds_via: self.adds_via,
        }
    }
}

/// The admin listener.
#[derive(Debug, Clone)]
pub struct AdminConfig {
    /// The address.
    pub listen: SocketAddr,
    /// The bearer token; `None`: no authentication, on loopback only.
    pub token: Option<Secret>,
}
