//! Health: from what is known anyway. Nothing here waits for anything.

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
use crate::proxy::Commons;

/// An event loop that was so late, in milliseconds, is worth a word.
const SLOW: u64 = 1000;

/// 200, or 503 if the event loop of the requests stands still. This listener has another one.
pub(super) async fn live(State(admin): State<Arc<Admin>>) -> (StatusCode, &'static str) {
    let commons = admin.commons();
    if commons.telemetry.pulse.is_still(commons.clock.uptime()) {
        (StatusCode::SERVICE_UNAVAILABLE, "the event loop stands still\n")
    } else {
        (StatusCode::OK, "ok\n")
    }
}

/// 200, or 503 while draining. Depends on no upstream.
pub(super) async fn ready(State(admin): State<Arc<Admin>>) -> (StatusCode, &'static str) {
    if admin.draining.load(Ordering::Relaxed) {
        (StatusCode::SERVICE_UNAVAILABLE, "draining\n")
    } else {
        (StatusCode::OK, "ready\n")
    }
}

/// Every component; always 200, the verdict in the body: `ok`, `degraded` (an upstream or Redis is down: what is
/// cached is still served), `draining`.
pub(super) async fn health(State(admin): State<Arc<Admin>>) -> Json<Value> {
    let commons = admin.commons();
    let now = commons.clock.now();
    let mut upstreams = BTreeMap::new();
    let mut degraded = false;
    for proxy in &admin.proxies() {
        let state = proxy.site.signals.state(now);
        let breakers: BTreeMap<_, _> = proxy.site.breakers.open().into_iter().collect();
        let down = state.status == "down" || !breakers.is_empty();
        degraded |= down;
        let mut state = json!(state);
        if down {
            state["status"] = "down".into();
        }
        state["breakers"] = json!(breakers);
        upstreams.insert(proxy.site.name.to_string(), state);
    }
    let usage = commons.memory.usage();
    let redis = redis(&commons);
    degraded |= redis["status"] == "down";
    let status = match (admin.draining.load(Ordering::Relaxed), degraded) {
        (true, _) => "draining",
        (false, true) => "degraded",
        (false, false) => "ok",
    };
    Json(json!({
        "status": status,
        "version": env!("CARGO_PKG_VERSION"),
        "uptime_ms": millis(commons.clock.uptime()),
        "mode": super::mode::told(commons.mode.state(now)),
        "components": {
            "upstreams": upstreams,
            "redis": redis,
            "memory": { "status": "ok", "entries": usage.entries, "bytes": usage.bytes, "max_bytes": usage.max_bytes },
            "configuration": super::reload::told(&admin.reload.reloads()),
            "process": process(&commons),
        },
    }))
}

/// `off`, `ok`, `connecting`, or `down`: then everything is served from memory, and each sidecar is on its own.
fn redis(commons: &Commons) -> Value {
    let Some(fleet) = &commons.fleet else { return json!({ "status": "off" }) };
    let state = fleet.redis.state();
    let well = state.connections.values().all(|link| link.connected && link.breaker == "closed");
    let status = match (&state.trouble, well) {
        (None, true) => "ok",
        (None, false) => "connecting",
        (Some(_), _) => "down",
    };
    json!({
        "status": status,
        "place": state.place,
        "trouble": state.trouble,
        "breakers_open": state.connections.values().filter(|link| link.breaker == "open").count(),
        "waiting_to_be_written_bytes": fleet.shared.state().queue.bytes,
        "unlogged_purges": commons.invalidations.unlogged(),
        "invalidation_lag_ms": commons.invalidations.lag(commons.clock.now()),
    })
}

/// What this process takes, and how late its event loop is. Late by over a second of the last ten: `slow`.
fn process(commons: &Commons) -> Value {
    let delay = commons.telemetry.pulse.delay();
    let (open, most) = open_files();
    let status = match (delay.worst >= SLOW, open.is_some_and(|open| open >= most / 100 * 95)) {
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

/// Open files of this process, where the system tells (Linux), and how many it may have.
pub(super) fn open_files() -> (Option<u64>, u64) {
    let open = std::fs::read_dir("/proc/self/fd").ok().map(|entries| entries.count() as u64);
    (open, process::open_files_limit())
}

/// Resident memory, where the system tells (Linux).
pub(super) fn rss_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}
