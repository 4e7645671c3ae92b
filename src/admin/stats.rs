//! `GET /stats`: the counters, for operators and for the dashboard.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};

use super::Admin;
use crate::policy::outcome::ShadowResult;
use crate::telemetry::logs;

pub(super) async fn stats(State(admin): State<Arc<Admin>>) -> Json<Value> {
    let shared = admin.shared();
    let redis = shared.fleet.as_ref().map(|fleet| {
        let state = fleet.redis.state();
        json!({
            "sidecar": fleet.sidecar_id.to_string(),
            "place": state.place,
            "trouble": state.trouble,
            "connections": state.connections,
            "records": fleet.tier.state(),
            "unlogged_purges": shared.invalidations.unlogged(),
            "invalidation_lag_ms": shared.invalidations.lag(shared.clock.now()),
        })
    });
    Json(json!({
        "redis": redis,
        "requests": shared.telemetry.snapshot(),
        "rules": rules(&admin),
        "rehearsals": shadow_results(&admin),
        "memory": shared.memory.usage(),
        "log_lines_dropped": logs::dropped_lines(),
        "ledger_overflows": shared.invalidations.overflows(),
        "inflight": { "fetches": shared.coalescer.running(), "bytes": shared.inflight.held() },
    }))
}

/// Returns the results of shadow mode, by upstream and rule.
fn shadow_results(admin: &Admin) -> Vec<Value> {
    let mut rows = Vec::new();
    for proxy in admin.proxies() {
        let mut rules: BTreeMap<Box<str>, Value> = BTreeMap::new();
        for (rule, shown, count) in proxy.upstream.metrics.shadow_results() {
            let of_rule = rules.entry(rule.clone()).or_insert_with(|| {
                let mut rows = json!({ "upstream": &*proxy.upstream.name, "rule": rule });
                for shown in ShadowResult::ALL {
                    rows[shown.token()] = 0.into();
                }
                rows
            });
            of_rule[shown.token()] = count.into();
        }
        rows.extend(rules.into_values());
    }
    rows
}

/// Returns the outcomes of requests by upstream and rule, the busiest first, without rules that had no request. A rule
/// without a name stands for requests that no rule serves from the cache.
fn rules(admin: &Admin) -> Vec<Value> {
    let mut counts: BTreeMap<(String, String), BTreeMap<&str, u64>> = BTreeMap::new();
    for proxy in admin.proxies() {
        let mut add = |rule: &str, outcome, count| {
            let of_rule = counts.entry((proxy.upstream.name.to_string(), rule.to_owned())).or_default();
            *of_rule.entry(outcome).or_default() += count;
        };
        for (rule, outcome, count) in proxy.upstream.metrics.by_rule() {
            add(&rule, outcome, count);
        }
    }
    let rows = counts.into_iter().map(|((upstream, rule), outcomes)| {
        let outcomes: BTreeMap<&str, u64> = outcomes.into_iter().filter(|(_, count)| *count > 0).collect();
        let requests: u64 = outcomes.values().sum();
        (requests, json!({ "upstream": upstream, "rule": rule, "requests": requests, "outcomes": outcomes }))
    });
    let mut rows: Vec<(u64, Value)> = rows.filter(|(requests, _)| *requests > 0).collect();
    rows.sort_by_key(|(requests, _)| std::cmp::Reverse(*requests));
    rows.into_iter().map(|(_, rows)| rows).collect()
}
