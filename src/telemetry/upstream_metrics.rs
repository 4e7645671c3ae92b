//! Per-upstream metrics for Prometheus.
//!
//! Requests hold handles to the counters, so that counting needs no lookup by name.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::histogram::Histogram;
use crate::policy::Tick;
use crate::policy::outcome::{Failure, Outcome, ShadowResult};
use crate::policy::outcome_counters::{OutcomeCounters, outcome_index};

/// The metrics of one upstream.
#[derive(Debug, Default)]
pub struct UpstreamMetrics {
    /// Responses to requests that matched no rule.
    pub no_rule: OutcomeCounters,
    /// Time to the response head, by [`Outcome::LABELS`].
    durations: [Histogram; Outcome::LABELS.len()],
    /// Time to the upstream's response head.
    pub upstream_took: Histogram,
    upstream_ok: AtomicU64,
    upstream_failed: [AtomicU64; Failure::CAUSES.len()],
    /// Time that reads waited for the budget.
    pub reads_waited: Histogram,
    /// Time that writes waited for the budget.
    pub writes_waited: Histogram,
    /// 429 responses passed on to clients.
    passed_on: AtomicU64,
    /// 429 responses that no client saw, because the request was retried.
    absorbed: AtomicU64,
    /// Results of shadow mode, by rule.
    shadow_results: Mutex<BTreeMap<(Box<str>, ShadowResult), u64>>,
    wrong_hit_logged_at: AtomicU64,
    /// Responses by rule, including rules of earlier configurations.
    by_rule: Mutex<BTreeMap<Box<str>, Arc<OutcomeCounters>>>,
}

impl UpstreamMetrics {
    /// Records the time to the response head, by outcome.
    pub fn record_response(&self, outcome: &Outcome, took: Duration) {
        if let Some(latencies) = outcome_index(outcome).and_then(|index| self.durations.get(index)) {
            latencies.add(took);
        }
    }

    /// Records a finished upstream request. `failure` is `None` if it succeeded.
    pub fn record_upstream(&self, failure: Option<Failure>, took: Duration) {
        self.upstream_took.add(took);
        let cause = failure.and_then(|failure| Failure::CAUSES.iter().position(|cause| *cause == failure.cause()));
        let counter = cause.and_then(|cause| self.upstream_failed.get(cause)).unwrap_or(&self.upstream_ok);
        counter.fetch_add(1, Relaxed);
    }

    /// Counts a 429 response of the upstream. `absorbed`: the request was retried.
    pub fn throttled(&self, absorbed: bool) {
        // Without a retry, the client gets the 429.
        let counter = if absorbed { &self.absorbed } else { &self.passed_on };
        counter.fetch_add(1, Relaxed);
    }

    /// Counts a result of shadow mode under a rule.
    pub fn record_shadow(&self, rule: &str, shown: ShadowResult) {
        let mut results = self.shadow_results.lock().unwrap_or_else(PoisonError::into_inner);
        *results.entry((rule.into(), shown)).or_default() += 1;
    }

    /// Returns the results of shadow mode: rule, result, count.
    pub fn shadow_results(&self) -> Vec<(Box<str>, ShadowResult, u64)> {
        let results = self.shadow_results.lock().unwrap_or_else(PoisonError::into_inner);
        results.iter().map(|((rule, shown), count)| (rule.clone(), *shown, *count)).collect()
    }

    /// Returns true at most once per second, to limit log lines about wrong hits.
    pub fn may_log_wrong_hit(&self, now: Tick) -> bool {
        let before = self.wrong_hit_logged_at.swap(now.0 / 1000, Relaxed);
        before != now.0 / 1000
    }

    /// Returns the counters of a rule, shared by all of its paths and kept when the configuration is reloaded.
    pub fn rule_counters(&self, rule: &str) -> Arc<OutcomeCounters> {
        let mut by_rule = self.by_rule.lock().unwrap_or_else(PoisonError::into_inner);
        by_rule.entry(rule.into()).or_default().clone()
    }

    /// Returns counts by rule name and outcome. The empty name stands for requests that matched no rule.
    pub fn by_rule(&self) -> Vec<(Box<str>, &'static str, u64)> {
        let by_rule = self.by_rule.lock().unwrap_or_else(PoisonError::into_inner);
        let named =
            by_rule.iter().flat_map(|(rule, tally)| tally.read().map(|(of, count)| (rule.clone(), of, count)));
        let unnamed = self.no_rule.read().map(|(of, count)| ("".into(), of, count));
        named.chain(unnamed).filter(|(.., count)| *count > 0).collect()
    }

    /// Returns the times to the response head, by outcome.
    pub fn durations(&self) -> impl Iterator<Item = (&'static str, &Histogram)> {
        Outcome::LABELS.into_iter().zip(&self.durations)
    }

    /// Returns the number of upstream requests by result: `ok` or the cause of the failure.
    pub fn results(&self) -> BTreeMap<&'static str, u64> {
        let failed = Failure::CAUSES.into_iter().zip(self.upstream_failed.iter().map(|count| count.load(Relaxed)));
        failed.chain([("ok", self.upstream_ok.load(Relaxed))]).collect()
    }

    /// Returns the number of 429 responses by how they were handled.
    pub fn throttles(&self) -> [(&'static str, u64); 2] {
        [("absorbed", self.absorbed.load(Relaxed)), ("passed_on", self.passed_on.load(Relaxed))]
    }
}
