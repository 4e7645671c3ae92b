//! `GET /stats`: the counters, for people and for the dashboard.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};

use super::Admin;
use crate::policy::outcome::Rehearsed;

pub(super) async fn stats(State(admin): State<Arc<Admin>>) -> Json<Value> {
    let commons = admin.commons();
    let redis = commons.fleet.as_ref().map(|fleet| {
        let state = fleet.redis.state();
        json!({
            "sidecar": fleet.me.to_string(),
            "place": state.place,
            "trouble": state.trouble,
            "connections": state.connections,
            "records": fleet.shared.state(),
            "unlogged_purges": commons.invalidations.unlogged(),
            "invalidation_lag_ms": commons.invalidations.lag(commons.clock.now()),
        })
    });
    Json(json!({
        "redis": redis,
        "requests": commons.telemetry.snapshot(),
        "rules": rules(&admin),
        "rehearsals": rehearsals(&admin),
        "memory": commons.memory.usage(),
        "inflight": { "fetches": commons.flights.running(), "bytes": commons.purse.held() },
    }))
}

/// What shadow mode has shown, by upstream and rule.
fn rehearsals(admin: &Admin) -> Vec<Value> {
    let mut told = Vec::new();
    for proxy in admin.proxies() {
        let mut rules: BTreeMap<Box<str>, Value> = BTreeMap::new();
        for (rule, shown, count) in proxy.site.meter.rehearsals() {
            let of_rule = rules.entry(rule.clone()).or_insert_with(|| {
                let mut told = json!({ "upstream": &*proxy.site.name, "rule": rule });
                for shown in Rehearsed::ALL {
                    told[shown.token()] = 0.into();
                }
                told
            });
            of_rule[shown.token()] = count.into();
        }
        told.extend(rules.into_values());
    }
    told
}

/// What became of requests, by upstream and rule: those that were asked for at all, the busiest first. A rule without a
/// name stands for requests that no rule answers from the cache.
fn rules(admin: &Admin) -> Vec<Value> {
    let mut counts: BTreeMap<(String, String), BTreeMap<&str, u64>> = BTreeMap::new();
    for proxy in admin.proxies() {
        let mut add = |rule: &str, outcome, count| {
            let of_rule = counts.entry((proxy.site.name.to_string(), rule.to_owned())).or_default();
            *of_rule.entry(outcome).or_default() += count;
        };
        for (rule, outcome, count) in proxy.site.meter.tallies() {
            add(&rule, outcome, count);
        }
    }
    let told = counts.into_iter().map(|((upstream, rule), outcomes)| {
        let outcomes: BTreeMap<&str, u64> = outcomes.into_iter().filter(|(_, count)| *count > 0).collect();
        let requests: u64 = outcomes.values().sum();
        (requests, json!({ "upstream": upstream, "rule": rule, "requests": requests, "outcomes": outcomes }))
    });
    let mut told: Vec<(u64, Value)> = told.filter(|(requests, _)| *requests > 0).collect();
    told.sort_by_key(|(requests, _)| std::cmp::Reverse(*requests));
    told.into_iter().map(|(_, told)| told).collect()
}
