//! The effective configuration, for display: every setting with its value, wherever it was set.
//!
//! A setting may come from the file, the environment, the flags, or its default. Secrets are not included, only whether
//! they are set.

use humantime::format_duration;
use serde_json::{Value, json};

use super::{Config, UpstreamConfig};
use crate::policy::client_limits::ClientLimits;
use crate::policy::routing::cache_key::{Partition, QueryFilter};
use crate::policy::routing::key_headers::KeyHeaders;
use crate::policy::routing::rule::{CacheMode, Rule};
use crate::redis::RedisConfig;
use crate::store::memory::MemoryLimits;
use crate::store::redis_tier::RedisTierConfig;

/// Returns the configuration as JSON, with durations and sizes written as in the file.
pub fn effective_json(config: &Config) -> Value {
    let MemoryLimits { max_bytes, max_entry_bytes, max_inflight_bytes, max_unverified } = config.memory;
    let ClientLimits {
        request_body,
        headers,
        url,
        connections,
        header_time,
        keep_alive,
        write_stall,
        shared_write_stall,
    } = config.limits;
    json!({
        "source": config.source,
        "mode": config.mode.0.token(),
        "upstreams": config.upstreams.iter().map(upstream).collect::<Vec<_>>(),
        "memory": {
            "max_bytes": size(max_bytes),
            "max_entry_bytes": size(max_entry_bytes),
            "max_inflight_bytes": size(max_inflight_bytes),
            "max_unverified": duration(max_unverified),
        },
        "limits": {
            "request_body": size(request_body),
            "headers": size(headers),
            "url": size(url),
            "connections": connections,
            "header_time": duration(header_time),
            "keep_alive": duration(keep_alive),
            "write_stall": duration(write_stall),
            "shared_write_stall": duration(shared_write_stall),
        },
        "redis": config.redis.as_ref().map(|of| redis(of, &config.redis_tier)),
        "security": { "secrets": config.secrets.len(), "encrypt": config.encrypt },
        "admin": config.admin.as_ref().map(|admin| json!({
            "listen": admin.listen.to_string(),
            "token": if admin.token.is_some() { "set" } else { "none" },
        })),
        "probes": config.probes.map(|listen| json!({ "listen": listen.to_string() })),
        "shutdown": { "grace": duration(config.grace) },
        "log": {
            "filter": config.log.filter,
            "format": if config.log.json { "json" } else { "human" },
            "requests": config.log.requests.name(),
            "slow": config.log.slow.map(duration),
        },
    })
}

fn size(bytes: u64) -> String {
    let (unit, name) = [(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")]
        .into_iter()
        .find(|(unit, _)| bytes >= *unit && bytes.is_multiple_of(*unit))
        .unwrap_or((1, "B"));
    format!("{}{name}", bytes / unit)
}

fn duration(time: std::time::Duration) -> String {
    format_duration(time).to_string()
}

fn upstream(upstream: &UpstreamConfig) -> Value {
    let UpstreamConfig { timeouts, retry, backoff, breaker, pool, .. } = upstream;
    json!({
        "name": &*upstream.name,
        "listen": upstream.listen.to_string(),
        "to": upstream.origin.to_text(),
        "profile": upstream.profile,
        "http2": upstream.http2,
        "listen_tls": upstream.listen_tls.is_some(),
        "timeouts": {
            "connect": duration(timeouts.connect),
            "first_byte": duration(timeouts.first_byte),
            "idle": duration(timeouts.idle),
            "fetch": duration(timeouts.fetch),
        },
        "backoff": { "base": duration(backoff.base), "cap": duration(backoff.cap) },
        "retry": { "attempts": retry.attempts, "base": duration(retry.base), "cap": duration(retry.cap) },
        "breaker": { "failures": breaker.failures, "open_for": duration(breaker.open_for) },
        "pool": { "connections": pool.connections, "idle": pool.idle, "max_age": duration(pool.max_age) },
        "budget": upstream.budget.as_ref().map(|budget| json!({
            "rate_per_second": budget.pace.map(|pace| 1.0 / pace.every.as_secs_f64()),
            "burst": budget.pace.map(|pace| pace.burst),
            "max_wait": duration(budget.max_wait),
        })),
        "rules": upstream.router.rules().iter().map(|rule| rule_settings(rule)).collect::<Vec<_>>(),
    })
}

/// Returns a rule with its inherited settings. Settings that are not set are omitted.
fn rule_settings(rule: &Rule) -> Value {
    let mut shown = json!({
        "name": &*rule.name,
        "path": rule.path.to_string(),
        "methods": rule.methods.0.iter().map(http::Method::as_str).collect::<Vec<_>>(),
        "cache": match rule.mode {
            CacheMode::Http => "http",
            CacheMode::Override { .. } => "override",
            CacheMode::Off => "off",
        },
    });
    if rule.mode == CacheMode::Off {
        return shown;
    }
    if let CacheMode::Override { ttl, negative_ttl } = rule.mode {
        shown["ttl"] = duration(ttl).into();
        shown["negative_ttl"] = negative_ttl.map_or(Value::Null, |ttl| duration(ttl).into());
    }
    for (name, window) in rule.windows() {
        shown[name] = duration(window).into();
    }
    shown["deadline"] = duration(rule.deadline).into();
    shown["partition"] = match rule.key.partition {
        Partition::Everyone => "everyone",
        Partition::Credential => "credential",
    }
    .into();
    if let QueryFilter::Filtered(patterns) = &rule.key.query {
        let patterns = patterns.iter().map(|(keeps, glob)| format!("{}{glob}", if *keeps { "" } else { "!" }));
        shown["key_query"] = patterns.collect::<Vec<_>>().into();
    }
    let (setting, headers) = match &rule.key.headers {
        KeyHeaders::Listed(names) => ("key_headers", names),
        KeyHeaders::AllBut(names) => ("key_ignore_headers", names),
    };
    if !headers.is_empty() {
        shown[setting] = headers.iter().map(http::HeaderName::as_str).collect::<Vec<_>>().into();
    }
    if let Some(payload) = &rule.fallback {
        shown["fallback"] = json!({ "status": payload.status.as_u16(), "on": payload.on });
    }
    shown
}

fn redis(redis: &RedisConfig, tier: &RedisTierConfig) -> Value {
    json!({
        "place": redis.topology.to_string(),
        "tls": redis.tls.is_some(),
        "username": redis.username,
        "password": redis.password.as_ref().map(|_| "set"),
        "sentinel_username": redis.sentinel_username,
        "sentinel_password": redis.sentinel_password.as_ref().map(|_| "set"),
        "key_prefix": &*redis.key_prefix,
        "command_timeout": duration(redis.command_timeout),
        "compress_above": size(tier.compress_above),
        "write_behind": size(tier.write_behind),
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn effective_configuration_shows_values_but_no_secrets() {
        let text = "[[upstream]]\nname = \"a\"\nurl = \"https://a.example\"\n[[upstream.rule]]\npath = \"/x/{id}\"\n\
                    ttl = \"90s\"\n[admin]\ntoken = { env = \"PATH\" }\n[memory]\nmax_bytes = \"96MiB\"\n";
        let config = crate::config::from_text("a.toml", text, Path::new("")).expect("it is good");
        let json = effective_json(&config);
        assert_eq!(json["memory"]["max_bytes"], "96MiB");
        assert_eq!(json["admin"]["token"], "set");
        assert_eq!(json["upstreams"][0]["rules"][0]["ttl"], "1m 30s");
        assert_eq!(json["upstreams"][0]["rules"][0]["partition"], "credential");
        let path = std::env::var("PATH").expect("there is one");
        assert!(!json.to_string().contains(&path));
    }
}
