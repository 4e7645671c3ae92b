//! `POST /mode`: the kill switch, on the running sidecar.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::extract::rejection::JsonRejection;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use tracing::warn;

use super::{Admin, problem};
use crate::config::parse_duration;
use crate::policy::mode::{self, Mode};

/// What to do from now on.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModeRequest {
    /// `normal`, `bypass`, or `configured`: what the file or the environment says.
    pub mode: String,
    /// For so long, as in `30m`; then the configuration counts again. Without: until it is set again, or the restart.
    #[serde(rename = "for", skip_serializing_if = "Option::is_none", default)]
    pub time: Option<String>,
}

pub(super) async fn mode(
    State(admin): State<Arc<Admin>>,
    request: Result<Json<ModeRequest>, JsonRejection>,
) -> Response {
    let request = match request {
        Ok(Json(request)) => request,
        Err(error) => return problem(error.status(), "bad_request", &error.body_text()),
    };
    let time = match request.time.as_deref().map(parse_duration).transpose() {
        Ok(time) => time,
        Err(error) => return problem(StatusCode::BAD_REQUEST, "bad_request", &format!("for: {error}")),
    };
    let (switch, now) = (&admin.commons.mode, admin.commons.clock.now());
    let set = Mode::ALL.into_iter().find(|mode| mode.token() == request.mode);
    match (set, request.mode.as_str()) {
        (Some(mode), _) => switch.set(mode, now, time),
        (None, "configured") => switch.clear(),
        (None, other) => {
            let message = format!("mode {other:?}: write \"normal\", \"bypass\" or \"configured\"");
            return problem(StatusCode::BAD_REQUEST, "bad_request", &message);
        }
    }
    let state = switch.state(now);
    warn!(mode = state.mode.token(), for_ms = state.for_ms, "the mode was set");
    Json(told(state)).into_response()
}

/// For people: the mode, what it comes from, and for how long.
pub(super) fn told(state: mode::State) -> serde_json::Value {
    serde_json::json!({ "mode": state.mode.token(), "source": state.source, "for_ms": state.for_ms })
}
