//! What is in force, for people: every setting with its value, whoever said it (file, environment, flags, default).
//! Secrets are not in it, only whether there are any.

use humantime::format_duration;
use serde_json::{Value, json};

use super::{Config, Limits, Memory, Redis, Upstream};
use crate::policy::key::{Partition, QueryFilter};
use crate::policy::plan::{CacheMode, Plan};

/// The configuration as JSON; durations and sizes are written as in the file.
pub fn shown(config: &Config) -> Value {
    let Memory { max_bytes, max_entry_bytes, max_inflight_bytes, max_unverified } = config.memory;
    let Limits { request_body, headers, url, connections, header_time, keep_alive, write_stall, shared_write_stall } =
        config.limits;
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
        "redis": config.redis.as_ref().map(redis),
        "security": { "secrets": config.secrets.len(), "encrypt": config.encrypt },
        "admin": config.admin.as_ref().map(|admin| json!({
            "listen": admin.listen.to_string(),
            "token": if admin.token.is_some() { "set" } else { "none" },
        })),
        "probes": config.probes.map(|listen| json!({ "listen": listen.to_string() })),
        "shutdown": { "grace": duration(config.grace) },
        "log": { "filter": config.log.filter, "format": if config.log.json { "json" } else { "human" } },
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

fn upstream(upstream: &Upstream) -> Value {
    let Upstream { timeouts, retry, tolerance, pool, .. } = upstream;
    json!({
        "name": &*upstream.name,
        "listen": upstream.listen.to_string(),
        "to": upstream.target.origin(),
        "profile": upstream.profile,
        "http2": upstream.http2,
        "listen_tls": upstream.listen_tls.is_some(),
        "timeouts": {
            "connect": duration(timeouts.connect),
            "first_byte": duration(timeouts.first_byte),
            "idle": duration(timeouts.idle),
            "fetch": duration(timeouts.fetch),
        },
        "retry": { "attempts": retry.attempts, "base": duration(retry.base), "cap": duration(retry.cap) },
        "breaker": { "failures": tolerance.failures, "open_for": duration(tolerance.open_for) },
        "pool": { "connections": pool.connections, "idle": pool.idle, "max_age": duration(pool.max_age) },
        "budget": upstream.budget.as_ref().map(|budget| json!({
            "rate_per_second": budget.pace.map(|pace| 1.0 / pace.every.as_secs_f64()),
            "burst": budget.pace.map(|pace| pace.burst),
            "max_wait": duration(budget.max_wait),
        })),
        "rules": upstream.router.plans().iter().map(|plan| rule(plan)).collect::<Vec<_>>(),
    })
}

/// A rule, with what it inherits. Only what it says is there.
fn rule(plan: &Plan) -> Value {
    let mut told = json!({
        "name": &*plan.name,
        "path": plan.path.to_string(),
        "methods": plan.methods.0.iter().map(http::Method::as_str).collect::<Vec<_>>(),
        "cache": match plan.mode {
            CacheMode::Http => "http",
            CacheMode::Override { .. } => "override",
            CacheMode::Off => "off",
        },
    });
    if plan.mode == CacheMode::Off {
        return told;
    }
    if let CacheMode::Override { ttl, negative_ttl } = plan.mode {
        told["ttl"] = duration(ttl).into();
        told["negative_ttl"] = negative_ttl.map_or(Value::Null, |ttl| duration(ttl).into());
    }
    for (name, window) in plan.windows() {
        told[name] = duration(window).into();
    }
    told["deadline"] = duration(plan.deadline).into();
    told["partition"] = match plan.key.partition {
        Partition::Everyone => "everyone",
        Partition::Credential => "credential",
    }
    .into();
    if let QueryFilter::Filtered(patterns) = &plan.key.query {
        let patterns = patterns.iter().map(|(keeps, glob)| format!("{}{glob}", if *keeps { "" } else { "!" }));
        told["key_query"] = patterns.collect::<Vec<_>>().into();
    }
    if !plan.key.headers.is_empty() {
        told["key_headers"] = plan.key.headers.iter().map(http::HeaderName::as_str).collect::<Vec<_>>().into();
    }
    if let Some(payload) = &plan.fallback {
        told["fallback"] = json!({ "status": payload.status.as_u16(), "on": payload.on });
    }
    told
}

fn redis(redis: &Redis) -> Value {
    json!({
        "place": redis.topology.to_string(),
        "tls": redis.tls.is_some(),
        "username": redis.username,
        "password": redis.password.as_ref().map(|_| "set"),
        "key_prefix": &*redis.key_prefix,
        "command_timeout": duration(redis.command_timeout),
        "compress_above": size(redis.compress_above),
        "write_behind": size(redis.write_behind),
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn what_is_in_force_is_shown_and_secrets_are_not() {
        let text = "[[upstream]]\nname = \"a\"\nurl = \"https://a.example\"\n[[upstream.rule]]\npath = \"/x/{id}\"\n\
                    ttl = \"90s\"\n[admin]\ntoken = { env = \"PATH\" }\n[memory]\nmax_bytes = \"96MiB\"\n";
        let config = crate::config::from_text("a.toml", text, Path::new("")).expect("it is good");
        let shown = shown(&config);
        assert_eq!(shown["memory"]["max_bytes"], "96MiB");
        assert_eq!(shown["admin"]["token"], "set");
        assert_eq!(shown["upstreams"][0]["rules"][0]["ttl"], "1m 30s");
        assert_eq!(shown["upstreams"][0]["rules"][0]["partition"], "credential");
        let path = std::env::var("PATH").expect("there is one");
        assert!(!shown.to_string().contains(&path));
    }
}
