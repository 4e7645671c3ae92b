//! What is counted for each upstream, for Prometheus. Handles lie where the requests pass: no look-up by name.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::histogram::Histogram;
use crate::policy::Tick;
use crate::policy::outcome::{Failure, Outcome, ShadowResult};
use crate::policy::outcome_counters::{OutcomeCounters, outcome_index};

/// What is counted for one upstream.
#[derive(Debug, Default)]
pub struct UpstreamMetrics {
    /// Answers under no rule.
    pub no_rule: OutcomeCounters,
    /// Time to the response head, by [`Outcome::LABELS`].
    durations: [Histogram; Outcome::LABELS.len()],
    /// Time to the upstream's response head.
    pub upstream_took: Histogram,
    upstream_ok: AtomicU64,
    upstream_failed: [AtomicU64; Failure::CAUSES.len()],
    /// Time that reads waited for their turn …
    pub reads_waited: Histogram,
    /// … and writes.
    pub writes_waited: Histogram,
    /// 429s that clients saw.
    passed_on: AtomicU64,
    /// 429s that nobody saw.
    absorbed: AtomicU64,
    /// What rehearsals have shown, by rule.
    record_shadow: Mutex<BTreeMap<(Box<str>, ShadowResult), u64>>,
    wrong_hit_logged_at: AtomicU64,
    /// Answers by rule, those of configurations before too.
    by_rule: Mutex<BTreeMap<Box<str>, Arc<OutcomeCounters>>>,
}

impl UpstreamMetrics {
    /// A request was answered.
    pub fn record_answer(&self, outcome: &Outcome, took: Duration) {
        if let Some(latencies) = outcome_index(outcome).and_then(|index| self.durations.get(index)) {
            latencies.add(took);
        }
    }

    /// A request to the upstream has ended.
    pub fn record_upstream(&self, failure: Option<Failure>, took: Duration) {
        self.upstream_took.add(took);
        let cause = failure.and_then(|failure| Failure::CAUSES.iter().position(|cause| *cause == failure.cause()));
        let counter = cause.and_then(|cause| self.upstream_failed.get(cause)).unwrap_or(&self.upstream_ok);
        counter.fetch_add(1, Relaxed);
    }

    /// The upstream answered 429, and the request …
    pub fn throttled(&self, absorbed: bool) {
        // … was sent again, or not.
        let counter = if absorbed { &self.absorbed } else { &self.passed_on };
        counter.fetch_add(1, Relaxed);
    }

    /// A rehearsal has shown something of a request under this rule.
    pub fn record_shadow(&self, rule: &str, shown: ShadowResult) {
        let mut rehearsed = self.record_shadow.lock().unwrap_or_else(PoisonError::into_inner);
        *rehearsed.entry((rule.into(), shown)).or_default() += 1;
    }

    /// What rehearsals have shown: rule, what, how often.
    pub fn shadow_results(&self) -> Vec<(Box<str>, ShadowResult, u64)> {
        let rehearsed = self.record_shadow.lock().unwrap_or_else(PoisonError::into_inner);
        rehearsed.iter().map(|((rule, shown), count)| (rule.clone(), *shown, *count)).collect()
    }

    /// One line a second is enough.
    pub fn may_log_wrong_hit(&self, now: Tick) -> bool {
        let before = self.wrong_hit_logged_at.swap(now.0 / 1000, Relaxed);
        before != now.0 / 1000
    }

    /// Where a rule counts: all of its paths, in this configuration and the next.
    pub fn rule_counters(&self, rule: &str) -> Arc<OutcomeCounters> {
        let mut by_rule = self.by_rule.lock().unwrap_or_else(PoisonError::into_inner);
        by_rule.entry(rule.into()).or_default().clone()
    }

    /// What rules have counted, by their names; the one without a name: under no rule.
    pub fn by_rule(&self) -> Vec<(Box<str>, &'static str, u64)> {
        let by_rule = self.by_rule.lock().unwrap_or_else(PoisonError::into_inner);
        let named =
            by_rule.iter().flat_map(|(rule, tally)| tally.read().map(|(of, count)| (rule.clone(), of, count)));
        let unnamed = self.no_rule.read().map(|(of, count)| ("".into(), of, count));
        named.chain(unnamed).filter(|(.., count)| *count > 0).collect()
    }

    /// Time to the response head, by outcome.
    pub fn durations(&self) -> impl Iterator<Item = (&'static str, &Histogram)> {
        Outcome::LABELS.into_iter().zip(&self.durations)
    }

    /// Requests to the upstream by result: `ok` or a cause of failure.
    pub fn results(&self) -> BTreeMap<&'static str, u64> {
        let failed = Failure::CAUSES.into_iter().zip(self.upstream_failed.iter().map(|count| count.load(Relaxed)));
        failed.chain([("ok", self.upstream_ok.load(Relaxed))]).collect()
    }

    /// 429s by what became of them.
    pub fn throttles(&self) -> [(&'static str, u64); 2] {
        [("absorbed", self.absorbed.load(Relaxed)), ("passed_on", self.passed_on.load(Relaxed))]
    }
}
