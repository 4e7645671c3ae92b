//! `POST /reload`: the configuration is read again.

use std::sync::Arc;
use std::time::SystemTime;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::{Admin, problem};

/// Somebody who can read the configuration again.
pub trait Reload: std::fmt::Debug + Send + Sync {
    /// Takes it, or says in one line why not, and changes nothing. Returns what was replaced that people may miss.
    fn reload(&self) -> Result<Vec<String>, String>;

    /// How that has gone so far.
    fn reloads(&self) -> Reloads;

    /// The configuration in force, without its secrets.
    fn shown(&self) -> Value;
}

/// How reloading has gone.
#[derive(Debug, Clone, Default)]
pub struct Reloads {
    /// So often it was tried.
    pub count: u64,
    /// The last time.
    pub at: Option<SystemTime>,
    /// Why the last one was not taken.
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

/// `GET /config`.
pub(super) async fn config(State(admin): State<Arc<Admin>>) -> Json<Value> {
    Json(admin.reload.shown())
}

/// For `/health`.
pub(super) fn told(reloads: &Reloads) -> Value {
    json!({
        "status": if reloads.error.is_some() { "rejected" } else { "ok" },
        "reloads": reloads.count,
        "last": reloads.at.map(httpdate::fmt_http_date),
        "error": reloads.error,
    })
}
