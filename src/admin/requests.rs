//! `GET /requests`: the last ones, with their reasons. No query string, no header, no body is remembered.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde::Deserialize;
use serde_json::{Value, json};

use super::Admin;
use super::input::{Asked, Limit};
use crate::telemetry::recent::{KEPT, Seen};

/// Which requests to tell of.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Wanted {
    /// That came out so, as in `miss`.
    outcome: Option<String>,
    /// Under this rule.
    rule: Option<String>,
    /// To this upstream.
    upstream: Option<String>,
    /// So many, the newest first.
    limit: Option<Limit>,
}

pub(super) async fn requests(State(admin): State<Arc<Admin>>, Asked(wanted): Asked<Wanted>) -> Json<Value> {
    let now = admin.commons().clock.now();
    let is = |wanted: &Option<String>, is: &str| wanted.as_ref().is_none_or(|wanted| wanted == is);
    let told = |seen: Seen| {
        let mut told = json!(seen);
        told["ago_ms"] = now.since(seen.at).into();
        told["same"] = format!("{:016x}", seen.same).into();
        told
    };
    let all = admin.commons().telemetry.recent.read().into_iter();
    let wanted = all
        .filter(|seen| is(&wanted.outcome, seen.outcome) && is(&wanted.rule, &seen.rule))
        .filter(|seen| is(&wanted.upstream, &seen.upstream))
        .take(wanted.limit.map_or(KEPT, |limit| limit.0));
    Json(json!({ "requests": wanted.map(told).collect::<Vec<_>>() }))
}
