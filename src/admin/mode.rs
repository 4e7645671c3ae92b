//! `POST /mode`: the kill switch, and the rehearsal. On this sidecar, or on all that share its Redis.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use tracing::warn;

use super::input::{Told, bad};
use super::{Admin, problem};
use crate::config::parse_duration;
use crate::policy::mode::{self, Mode, Source};

/// What to do from now on.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModeRequest {
    /// `normal`, `bypass`, `shadow`, or `configured`: what the environment or the file says.
    pub mode: String,
    /// For so long, as in `30m`; then what counted before counts again. Without: until it is set again, or the restart.
    #[serde(rename = "for", skip_serializing_if = "Option::is_none", default)]
    pub time: Option<String>,
    /// All sidecars that share this Redis, also those that start later.
    #[serde(default)]
    pub fleet: bool,
}

pub(super) async fn mode(State(admin): State<Arc<Admin>>, Told(request): Told<ModeRequest>) -> Response {
    let time = match request.time.as_deref().map(parse_duration).transpose() {
        Ok(time) => time,
        Err(error) => return bad(&format!("for: {error}")),
    };
    let set = match (Mode::of(&request.mode), request.mode.as_str()) {
        (Some(mode), _) => Some((mode, time)),
        (None, "configured") => None,
        (None, other) => {
            return bad(&format!("mode {other:?}: write \"normal\", \"bypass\", \"shadow\" or \"configured\""));
        }
    };
    if request.fleet
        && let Err(refused) = tell_fleet(&admin, set).await
    {
        return *refused;
    }
    let source = if request.fleet { Source::Fleet } else { Source::Local };
    let (switch, now) = (&admin.commons().mode, admin.commons().clock.now());
    match set {
        Some((mode, time)) => switch.set(mode, source, now, time),
        None => switch.clear(source),
    }
    let state = switch.state(now);
    warn!(mode = state.mode.token(), source = state.source.token(), for_ms = state.for_ms, "the mode was set");
    Json(told(state)).into_response()
}

/// Redis keeps it for the fleet.
async fn tell_fleet(admin: &Admin, set: Option<(Mode, Option<Duration>)>) -> Result<(), Box<Response>> {
    let Some(fleet) = &admin.commons().fleet else {
        return Err(Box::new(bad("fleet: there is no [redis], and so no fleet")));
    };
    let kept = fleet.redis.keep_mode(set.map(|(mode, time)| (mode.token(), time))).await;
    kept.map_err(|trouble| {
        let message = format!("the fleet was not told, and nothing has changed: redis: {trouble}");
        Box::new(problem(StatusCode::SERVICE_UNAVAILABLE, "fleet_not_told", &message))
    })
}

/// For people: the mode, what it comes from, and for how long.
pub(super) fn told(state: mode::State) -> serde_json::Value {
    serde_json::json!({ "mode": state.mode.token(), "source": state.source.token(), "for_ms": state.for_ms })
}
