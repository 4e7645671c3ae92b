//! `POST /mode`: the kill switch (bypass mode) and shadow mode, on this sidecar or on all that share its Redis.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tracing::warn;

use super::extract::{JsonBody, bad_request};
use super::{Admin, problem};
use crate::config::parse_duration;
use crate::fleet::mode_message::ModeMessage;
use crate::policy::mode::{Mode, ModeSource};
use crate::policy::{millis, mode};
use crate::store::record::random_salt;

/// The mode to set.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModeRequest {
    /// `normal`, `bypass`, `shadow`, or `configured`: the mode that the environment or the file sets.
    pub mode: String,
    /// Duration, as in `30m`, after which the previous setting applies again. Without it, the mode applies until it is
    /// set again or the sidecar restarts.
    #[serde(rename = "for", skip_serializing_if = "Option::is_none", default)]
    pub time: Option<String>,
    /// Sets the mode of all sidecars that share this Redis, including those that start later.
    #[serde(default)]
    pub fleet: bool,
}

pub(super) async fn mode(State(admin): State<Arc<Admin>>, JsonBody(request): JsonBody<ModeRequest>) -> Response {
    let time = match request.time.as_deref().map(parse_duration).transpose() {
        Ok(time) => time,
        Err(error) => return bad_request(&format!("for: {error}")),
    };
    let set = match (Mode::of(&request.mode), request.mode.as_str()) {
        (Some(mode), _) => Some((mode, time)),
        (None, "configured") => None,
        (None, other) => {
            return bad_request(&format!(
                "mode {other:?}: write \"normal\", \"bypass\", \"shadow\" or \"configured\""
            ));
        }
    };
    if request.fleet
        && let Err(refused) = set_fleet_mode(&admin, set).await
    {
        return *refused;
    }
    let source = if request.fleet { ModeSource::Fleet } else { ModeSource::Local };
    let (switch, now) = (&admin.shared().mode, admin.shared().clock.now());
    match set {
        Some((mode, time)) => switch.set(mode, source, now, time),
        None => switch.clear(source),
    }
    let state = switch.state(now);
    warn!(mode = state.mode.token(), source = state.source.token(), for_ms = state.for_ms, "mode changed");
    Json(mode_json(state)).into_response()
}

/// Stores the fleet's mode in Redis. The error is the response.
async fn set_fleet_mode(admin: &Admin, set: Option<(Mode, Option<Duration>)>) -> Result<(), Box<Response>> {
    let Some(fleet) = &admin.shared().fleet else {
        return Err(Box::new(bad_request("fleet = true needs [redis], which is not configured")));
    };
    let now = fleet.redis.clock().now();
    let seal = |(mode, time): (Mode, Option<Duration>)| {
        // Without the server's clock, Redis alone expires the mode.
        let until = time.zip(now).map(|(time, now)| now.saturating_add(millis(time)));
        let message = ModeMessage { mode, until }.seal(&fleet.keyring.load(), random_salt());
        (Bytes::from(message), time)
    };
    let kept = fleet.redis.set_mode(set.map(seal)).await;
    kept.map_err(|error| {
        let message = format!("the mode was not changed: Redis did not store it for the fleet: {error}");
        Box::new(problem(StatusCode::SERVICE_UNAVAILABLE, "fleet_not_told", &message))
    })
}

/// Returns the mode, its source, and the remaining time in milliseconds, as JSON.
pub(super) fn mode_json(state: mode::ModeState) -> serde_json::Value {
    serde_json::json!({ "mode": state.mode.token(), "source": state.source.token(), "for_ms": state.for_ms })
}
