//! `POST /reload`: triggers a configuration reload. `GET /config`: returns the effective configuration.

use std::sync::Arc;
use std::time::SystemTime;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::{Admin, problem};

/// Triggers a configuration reload.
pub trait Reload: std::fmt::Debug + Send + Sync {
    /// Reloads the configuration. Returns the replaced parts that an operator may notice. If the configuration is
    /// invalid, nothing changes, and the error is one line of text.
    fn reload(&self) -> Result<Vec<String>, String>;

    /// Returns the status of past reloads.
    fn reloads(&self) -> ReloadStatus;

    /// Returns the effective configuration, without its secrets.
    fn shown(&self) -> Value;
}

/// The status of past reloads.
#[derive(Debug, Clone, Default)]
pub struct ReloadStatus {
    /// Number of attempted reloads.
    pub count: u64,
    /// Time of the last attempt.
    pub at: Option<SystemTime>,
    /// Why the last reload was rejected.
    pub error: Option<String>,
}

pub(super) async fn reload(State(admin): State<Arc<Admin>>) -> Response {
    let reload = admin.reload.clone();
    match tokio::task::spawn_blocking(move || reload.reload()).await {
        Ok(Ok(replaced)) => Json(json!({ "reloaded": true, "replaced": replaced })).into_response(),
        Ok(Err(why)) => problem(StatusCode::UNPROCESSABLE_ENTITY, "bad_configuration", &why),
        Err(error) => problem(StatusCode::INTERNAL_SERVER_ERROR, "internal", &error.to_string()),
    }
}

/// Returns the effective configuration (`GET /config`).
pub(super) async fn config(State(admin): State<Arc<Admin>>) -> Json<Value> {
    Json(admin.reload.shown())
}

/// Returns the status of past reloads for `/health`.
pub(super) fn reload_json(reloads: &ReloadStatus) -> Value {
    json!({
        "status": if reloads.error.is_some() { "rejected" } else { "ok" },
        "reloads": reloads.count,
        "last": reloads.at.map(httpdate::fmt_http_date),
        "error": reloads.error,
    })
}
