//! Health endpoints. They report state that is already known, and never wait.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde_json::{Value, json};

use super::Admin;
use crate::policy::millis;
use crate::process;
use crate::proxy::SharedState;
use crate::redis::RedisErrorKind;

/// Event loop lag from which the process is reported as slow, in milliseconds.
const SLOW_MS: u64 = 1000;

/// Returns 200, or 503 if the event loop that serves requests is stalled. This listener runs on another event loop.
pub(super) async fn livez(State(admin): State<Arc<Admin>>) -> (StatusCode, &'static str) {
    let shared = admin.shared();
    if shared.telemetry.event_loop_lag.is_stalled(shared.clock.uptime()) {
        (StatusCode::SERVICE_UNAVAILABLE, "the event loop is blocked\n")
    } else {
        (StatusCode::OK, "ok\n")
    }
}

/// Returns 200, or 503 while draining. Does not depend on any upstream.
pub(super) async fn readyz(State(admin): State<Arc<Admin>>) -> (StatusCode, &'static str) {
    if admin.draining.load(Ordering::Relaxed) {
        (StatusCode::SERVICE_UNAVAILABLE, "draining\n")
    } else {
        (StatusCode::OK, "ready\n")
    }
}

/// Returns the health of every component. The status is always 200; the body has the overall status: `ok`, `degraded`
/// (an upstream or Redis is down: cached responses are still served), or `draining`.
pub(super) async fn health(State(admin): State<Arc<Admin>>) -> Json<Value> {
    let shared = admin.shared();
    let now = shared.clock.now();
    let mut upstreams = BTreeMap::new();
    let mut degraded = false;
    for proxy in &admin.proxies() {
        let state = proxy.upstream.health.state(now);
        let breakers: BTreeMap<_, _> = proxy.upstream.breakers.open().into_iter().collect();
        let down = state.status == "down" || !breakers.is_empty();
        degraded |= down;
        let mut state = json!(state);
        if down {
            state["status"] = "down".into();
        }
        state["breakers"] = json!(breakers);
        upstreams.insert(proxy.upstream.name.to_string(), state);
    }
    let usage = shared.memory.usage();
    let redis = redis_component(&shared);
    degraded |= redis["status"] == "down" || redis["status"] == "degraded";
    let status = match (admin.draining.load(Ordering::Relaxed), degraded) {
        (true, _) => "draining",
        (false, true) => "degraded",
        (false, false) => "ok",
    };
    Json(json!({
        "status": status,
        "version": env!("CARGO_PKG_VERSION"),
        "uptime_ms": millis(shared.clock.uptime()),
        "mode": super::mode::mode_json(shared.mode.state(now)),
        "components": {
            "upstreams": upstreams,
            "redis": redis,
            "memory": { "status": "ok", "entries": usage.entries, "bytes": usage.bytes, "max_bytes": usage.max_bytes },
            "configuration": super::reload::reload_json(&admin.reload.reloads()),
            "process": process(&shared),
        },
    }))
}

/// Returns the health of Redis: `off`, `ok`, `connecting`, `degraded` (it can be read, but purges may not reach every
/// sidecar), or `down`. While it is down, responses are served from memory, and each sidecar works on its own.
fn redis_component(shared: &SharedState) -> Value {
    let Some(fleet) = &shared.fleet else { return json!({ "status": "off" }) };
    let state = fleet.redis.state();
    let connected = state.connections.values().all(|connection| connection.connected);
    let open = state.connections.iter().find(|(_, connection)| connection.breaker == "open").map(|(name, _)| *name);
    let refused = fleet.membership.error();
    let (max_unverified, oldest) = (shared.invalidations.max_unverified(), fleet.membership.oldest());
    let silent = oldest.filter(|oldest| Some(*oldest) > max_unverified).map(|oldest| {
        format!("a sidecar has not logged its purges for {oldest:.0?}: it is cut off from Redis, or was killed")
    });
    let (status, trouble) = match (refused, state.trouble) {
        (Some(error), _) if error.why == RedisErrorKind::Refused => ("degraded", Some(error.explained())),
        (_, Some(trouble)) => ("down", Some(trouble)),
        (Some(error), None) => ("degraded", Some(error.explained())),
        (None, None) if !connected => ("connecting", Some(format!("no connection to {} yet", state.place))),
        (None, None) if fleet.membership.last_beat().is_none() => {
            ("connecting", Some("no heartbeat was answered yet: the other sidecars do not know this one".to_owned()))
        }
        (None, None) if open.is_some() => (
            "down",
            open.map(|name| format!("no reply in time: the circuit breaker of the connection {name} is open")),
        ),
        (None, None) if silent.is_some() => ("degraded", silent),
        (None, None) => ("ok", None),
    };
    json!({
        "status": status,
        "place": state.place,
        "trouble": trouble,
        "breakers_open": state.connections.values().filter(|connection| connection.breaker == "open").count(),
        "waiting_to_be_written_bytes": fleet.tier.state().queue.bytes,
        "unlogged_purges": shared.invalidations.unlogged(),
        "invalidation_lag_ms": shared.invalidations.lag(shared.clock.now()),
    })
}

/// Returns the resources that the process uses, and its event loop lag. The status is `slow` if the lag has reached one
/// second within the last ten.
fn process(shared: &SharedState) -> Value {
    let delay = shared.telemetry.event_loop_lag.values();
    let (open, most) = open_files();
    let status = match (delay.worst >= SLOW_MS, open.is_some_and(|open| open >= most / 100 * 95)) {
        (_, true) => "files",
        (true, false) => "slow",
        (false, false) => "ok",
    };
    json!({
        "status": status,
        "rss_bytes": rss_bytes(),
        "open_files": open,
        "open_files_limit": most,
        "event_loop_delay_ms": delay,
    })
}

/// Returns the number of open files of this process, if the system reports it (Linux), and the limit.
pub(super) fn open_files() -> (Option<u64>, u64) {
    let open = std::fs::read_dir("/proc/self/fd").ok().map(|entries| entries.count() as u64);
    (open, process::open_files_limit())
}

/// Returns the resident memory in bytes, if the system reports it (Linux).
pub(super) fn rss_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}
