//! `GET /requests`: the last requests, with their reasons. Query strings, header fields and bodies are not recorded.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde::Deserialize;
use serde_json::{Value, json};

use super::Admin;
use super::extract::{Limit, QueryParams};
use crate::telemetry::request_log::{KEPT, LoggedRequest};

/// The query parameters of `GET /requests`: which requests to return.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RequestFilter {
    /// Only requests with this outcome, as in `miss`.
    outcome: Option<String>,
    /// Only requests under this rule.
    rule: Option<String>,
    /// Only requests to this upstream.
    upstream: Option<String>,
    /// Maximum number of requests, the newest first.
    limit: Option<Limit>,
}

pub(super) async fn requests(
    State(admin): State<Arc<Admin>>,
    QueryParams(wanted): QueryParams<RequestFilter>,
) -> Json<Value> {
    let now = admin.shared().clock.now();
    let is = |wanted: &Option<String>, is: &str| wanted.as_ref().is_none_or(|wanted| wanted == is);
    let row = |seen: LoggedRequest| {
        let mut row = json!(seen);
        row["ago_ms"] = now.since(seen.at).into();
        row["same"] = format!("{:016x}", seen.same).into();
        row
    };
    let all = admin.shared().telemetry.request_log.read().into_iter();
    let wanted = all
        .filter(|seen| is(&wanted.outcome, seen.outcome) && is(&wanted.rule, &seen.rule))
        .filter(|seen| is(&wanted.upstream, &seen.upstream))
        .take(wanted.limit.map_or(KEPT, |limit| limit.0));
    Json(json!({ "requests": wanted.map(row).collect::<Vec<_>>() }))
}
