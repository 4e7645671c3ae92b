//! The configuration file's structure, as deserialized by serde. Unknown keys are errors.

use std::collections::BTreeMap;

use serde::Deserialize;
use toml::Spanned;
use toml::Value;

use super::resilience::{BreakerTable, BudgetSpec, PoolTable};
use super::values::{DurationValue, OneOrMany, OptionalDuration, SecretRef, SizeValue, UrlRef};

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct File {
    pub(super) mode: Option<Spanned<String>>,
    pub(super) upstream: Vec<Spanned<Upstream>>,
    pub(super) ttl: BTreeMap<String, DurationValue>,
    pub(super) memory: Memory,
    pub(super) limits: Limits,
    pub(super) security: Security,
    pub(super) admin: Admin,
    pub(super) shutdown: Shutdown,
    pub(super) log: Log,
    pub(super) redis: Option<Spanned<Redis>>,
    pub(super) probes: Option<Probes>,
    // Known, but rejected until it is implemented.
    pub(super) webhook: Option<Spanned<Value>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Upstream {
    pub(super) name: Option<Spanned<String>>,
    pub(super) listen: Option<Spanned<String>>,
    pub(super) url: Option<Spanned<String>>,
    pub(super) hosts: Option<Vec<Spanned<String>>>,
    pub(super) host: Option<Spanned<String>>,
    pub(super) profile: Option<Spanned<String>>,
    pub(super) profile_rules: Option<bool>,
    pub(super) partition: Option<Spanned<String>>,
    pub(super) timeouts: Timeouts,
    pub(super) retry: Retry,
    pub(super) backoff: Backoff,
    pub(super) tls: Tls,
    pub(super) listen_tls: ListenTls,
    pub(super) http2: bool,
    pub(super) via: bool,
    pub(super) defaults: Rule,
    pub(super) rule: Vec<Spanned<Rule>>,
    /// `--ttl`, not from the file.
    #[serde(skip)]
    pub(super) ttl_flag: Option<Spanned<String>>,
    pub(super) budget: Option<Spanned<BudgetSpec>>,
    pub(super) breaker: BreakerTable,
    pub(super) pool: PoolTable,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Timeouts {
    pub(super) deadline: Option<DurationValue>,
    pub(super) connect: Option<DurationValue>,
    pub(super) first_byte: Option<DurationValue>,
    pub(super) idle: Option<DurationValue>,
    pub(super) fetch: Option<DurationValue>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Retry {
    pub(super) attempts: Option<u32>,
    pub(super) base: Option<DurationValue>,
    pub(super) cap: Option<DurationValue>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Backoff {
    pub(super) base: Option<DurationValue>,
    pub(super) cap: Option<DurationValue>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Tls {
    pub(super) ca: Option<Spanned<String>>,
    pub(super) cert: Option<Spanned<String>>,
    pub(super) key: Option<Spanned<String>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct ListenTls {
    pub(super) cert: Option<Spanned<String>>,
    pub(super) key: Option<Spanned<String>>,
    pub(super) client_ca: Option<Spanned<String>>,
}

#[derive(Debug, Default, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Rule {
    pub(super) name: Option<Spanned<String>>,
    pub(super) path: Option<Spanned<OneOrMany<String>>>,
    pub(super) methods: Option<Spanned<Vec<String>>>,
    pub(super) when: Option<When>,
    pub(super) cache: Option<Spanned<String>>,
    pub(super) ttl: Option<Spanned<String>>,
    pub(super) stale_while_revalidate: Option<OptionalDuration>,
    pub(super) stale_if_error: Option<OptionalDuration>,
    pub(super) last_known_good: Option<OptionalDuration>,
    pub(super) negative_ttl: Option<OptionalDuration>,
    pub(super) refresh_ahead: Option<OptionalDuration>,
    pub(super) key: Option<Key>,
    pub(super) tags: Option<Spanned<Vec<String>>>,
    pub(super) reject_empty: Option<Spanned<String>>,
    pub(super) volatile: Option<Spanned<Vec<String>>>,
    pub(super) deadline: Option<DurationValue>,
    pub(super) fallback: Option<Spanned<Fallback>>,
    pub(super) upgrade: Option<Spanned<Vec<String>>>,
    pub(super) set_cookie: Option<Spanned<String>>,
}

#[derive(Debug, Default, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct When {
    pub(super) query: BTreeMap<String, String>,
    pub(super) headers: BTreeMap<Spanned<String>, String>,
    pub(super) graphql: Option<Spanned<Value>>,
}

#[derive(Debug, Default, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Key {
    pub(super) query: Option<Vec<String>>,
    pub(super) headers: Option<Vec<Spanned<String>>>,
    pub(super) ignore_headers: Option<Spanned<Vec<Spanned<String>>>>,
    pub(super) partition: Option<Spanned<String>>,
}

#[derive(Debug, Default, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Fallback {
    pub(super) file: Option<Spanned<String>>,
    pub(super) body: Option<String>,
    pub(super) status: Option<Spanned<u16>>,
    pub(super) content_type: Option<Spanned<String>>,
    pub(super) on: Option<Spanned<Vec<String>>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Memory {
    pub(super) max_bytes: Option<Spanned<SizeValue>>,
    pub(super) max_entry_bytes: Option<Spanned<SizeValue>>,
    pub(super) max_inflight_bytes: Option<SizeValue>,
    pub(super) max_unverified: Option<DurationValue>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Redis {
    pub(super) url: Option<Spanned<UrlRef>>,
    pub(super) username: Option<String>,
    pub(super) password: Option<Spanned<SecretRef>>,
    pub(super) sentinel_username: Option<String>,
    pub(super) sentinel_password: Option<Spanned<SecretRef>>,
    pub(super) tls: RedisTls,
    pub(super) databases: Option<Spanned<Databases>>,
    pub(super) key_prefix: Option<Spanned<String>>,
    pub(super) command_timeout: Option<DurationValue>,
    pub(super) compress: Option<Spanned<String>>,
    pub(super) compress_above: Option<SizeValue>,
    pub(super) write_behind: Option<SizeValue>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RedisTls {
    pub(super) ca: Option<Spanned<String>>,
    pub(super) cert: Option<Spanned<String>>,
    pub(super) key: Option<Spanned<String>>,
    pub(super) names: Option<Spanned<BTreeMap<String, String>>>,
}

#[derive(Debug, Default, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Databases {
    pub(super) cache: Option<u8>,
    pub(super) private: Option<u8>,
    pub(super) coordination: Option<u8>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Limits {
    pub(super) request_body: Option<SizeValue>,
    pub(super) headers: Option<SizeValue>,
    pub(super) url: Option<SizeValue>,
    pub(super) connections: Option<usize>,
    pub(super) header_time: Option<DurationValue>,
    pub(super) keep_alive: Option<DurationValue>,
    pub(super) write_stall: Option<DurationValue>,
    pub(super) shared_write_stall: Option<DurationValue>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Security {
    pub(super) secret: Option<Spanned<OneOrMany<SecretRef>>>,
    pub(super) encrypt: bool,
    pub(super) credential_headers: Option<Vec<Spanned<String>>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Admin {
    pub(super) listen: Option<Spanned<String>>,
    pub(super) token: Option<Spanned<SecretRef>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Probes {
    pub(super) listen: Spanned<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Shutdown {
    pub(super) grace: Option<DurationValue>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Log {
    pub(super) filter: Option<String>,
    pub(super) format: Option<Spanned<String>>,
    pub(super) requests: Option<Spanned<String>>,
    pub(super) slow: Option<OptionalDuration>,
}

/// A profile: default settings and rules.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Profile {
    pub(super) defaults: Rule,
    pub(super) rule: Vec<Spanned<Rule>>,
}
