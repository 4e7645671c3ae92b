//! Process-wide counters: relaxed atomics, read together as a snapshot.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use serde::Serialize;

use super::histogram::{Histogram, Quantiles};
use crate::policy::outcome::{BypassReason, Failure, ForwardReason, NotStored, Outcome};

/// Reasons why a GET was not stored: those of [`NotStored`] and [`BypassReason`] that the hint explains, and the rest.
const REASONS: [&str; 7] =
    ["no-freshness", "no-store", "private", "authorization", "unkeyed-credential", "rule-off", "other"];

/// All counters of a process.
#[derive(Debug, Default)]
pub struct Counters {
    outcomes: [AtomicU64; Outcome::LABELS.len()],
    causes: [AtomicU64; Failure::CAUSES.len()],
    fallbacks: [AtomicU64; Failure::CAUSES.len()],
    upstream_ok: AtomicU64,
    upstream_failed: AtomicU64,
    stored: AtomicU64,
    writes: AtomicU64,
    /// Time to the response head: `hits` for responses served from the cache, `others` for all others.
    hits: Histogram,
    others: Histogram,
    from_fleet: AtomicU64,
    throttled: AtomicU64,
    absorbed: AtomicU64,
    refused: AtomicU64,
    unstored: [AtomicU64; REASONS.len()],
    unstored_gets: AtomicU64,
}

/// The values of the counters at one time.
#[derive(Debug, Clone, Serialize)]
pub struct Snapshot {
    /// Requests that got a response.
    pub requests: u64,
    /// Requests by outcome.
    pub outcomes: BTreeMap<&'static str, u64>,
    /// Failures behind responses, by cause. The client may not have seen them.
    pub failures: BTreeMap<&'static str, u64>,
    /// Fallback payloads served, by cause of the failure.
    pub fallbacks: BTreeMap<&'static str, u64>,
    /// Fresh and stale hits as a fraction of all requests that a rule allows to be served from the cache.
    pub hit_ratio: f64,
    /// Requests sent upstream.
    pub upstream_requests: u64,
    /// Upstream requests that failed.
    pub upstream_failures: u64,
    /// 429 responses of the upstream.
    pub throttled: u64,
    /// 429 responses that no client saw, because the request waited and was retried.
    pub throttles_absorbed: u64,
    /// Requests that were not sent, because the budget would have delayed them by more than `max_wait`.
    pub refused_by_budget: u64,
    /// Responses stored.
    pub stored: u64,
    /// Writes passed through.
    pub writes: u64,
    /// Responses served from the memory of this process.
    pub from_memory: u64,
    /// Responses served from records that another sidecar stored.
    pub from_fleet: u64,
    /// Time to the response head, in milliseconds: of responses served from the cache, and of all others.
    pub latency_ms: BTreeMap<&'static str, Quantiles>,
}

impl Counters {
    pub(super) fn answered(&self, outcome: &Outcome, took: Duration) {
        count(&self.outcomes, &Outcome::LABELS, outcome.label());
        if let Some(failure) = outcome.failure() {
            count(&self.causes, &Failure::CAUSES, failure.cause());
        }
        if let Outcome::Fallback { failure, .. } = outcome {
            count(&self.fallbacks, &Failure::CAUSES, failure.cause());
        }
        let stored = matches!(outcome, Outcome::Hit { .. } | Outcome::Stale { .. });
        let latencies = if stored { &self.hits } else { &self.others };
        latencies.add(took);
    }

    pub(super) fn upstream(&self, failure: Option<Failure>) {
        let counter = if failure.is_none() { &self.upstream_ok } else { &self.upstream_failed };
        counter.fetch_add(1, Relaxed);
    }

    pub(super) fn found_in_fleet(&self) {
        self.from_fleet.fetch_add(1, Relaxed);
    }

    pub(super) fn throttled(&self) {
        self.throttled.fetch_add(1, Relaxed);
    }

    pub(super) fn absorbed(&self) {
        self.absorbed.fetch_add(1, Relaxed);
    }

    pub(super) fn refused(&self) {
        self.refused.fetch_add(1, Relaxed);
    }

    pub(super) fn stored(&self) {
        self.stored.fetch_add(1, Relaxed);
    }

    pub(super) fn written(&self) {
        self.writes.fetch_add(1, Relaxed);
    }

    /// Counts a GET whose response was not stored, as long as none ever was. Returns the number of such requests.
    pub(super) fn unstored_get(&self, outcome: &Outcome) -> Option<u64> {
        let Outcome::Relayed { fetched, failure: None } = outcome else { return None };
        if self.stored.load(Relaxed) > 0 {
            return None;
        }
        let reason = match (fetched.forward, fetched.stored) {
            (ForwardReason::Bypass(reason @ (BypassReason::UnkeyedCredential | BypassReason::Off)), _) => {
                reason.token()
            }
            (
                _,
                Err(Some(
                    skip @ (NotStored::NoFreshness
                    | NotStored::NoStore
                    | NotStored::Private
                    | NotStored::Authorization),
                )),
            ) => skip.token(),
            (_, Err(_)) => "other",
            (_, Ok(())) => return None,
        };
        count(&self.unstored, &REASONS, reason);
        Some(self.unstored_gets.fetch_add(1, Relaxed) + 1)
    }

    pub(super) fn commonest_skip(&self) -> Option<&'static str> {
        let counted = REASONS.iter().zip(&self.unstored).map(|(name, n)| (n.load(Relaxed), *name));
        counted.max_by_key(|(n, _)| *n).map(|(_, name)| name)
    }

    pub(super) fn snapshot(&self) -> Snapshot {
        let outcomes = read(&self.outcomes, &Outcome::LABELS);
        let of = |label: &str| outcomes.get(label).copied().unwrap_or(0);
        let served = of("hit") + of("stale");
        let cacheable = served + of("miss") + of("collapsed") + of("fallback") + of("failed");
        let (ok, failed) = (self.upstream_ok.load(Relaxed), self.upstream_failed.load(Relaxed));
        #[allow(clippy::cast_precision_loss)]
        let hit_ratio = if cacheable == 0 { 0.0 } else { served as f64 / cacheable as f64 };
        Snapshot {
            requests: outcomes.values().sum(),
            failures: read(&self.causes, &Failure::CAUSES),
            fallbacks: read(&self.fallbacks, &Failure::CAUSES),
            hit_ratio,
            upstream_requests: ok + failed,
            upstream_failures: failed,
            throttled: self.throttled.load(Relaxed),
            throttles_absorbed: self.absorbed.load(Relaxed),
            refused_by_budget: self.refused.load(Relaxed),
            stored: self.stored.load(Relaxed),
            writes: self.writes.load(Relaxed),
            from_memory: served.saturating_sub(self.from_fleet.load(Relaxed)),
            from_fleet: self.from_fleet.load(Relaxed),
            latency_ms: [("stored", self.hits.quantiles()), ("others", self.others.quantiles())].into(),
            outcomes,
        }
    }
}

fn count(counters: &[AtomicU64], names: &[&str], name: &str) {
    if let Some(counter) = names.iter().position(|known| *known == name).and_then(|i| counters.get(i)) {
        counter.fetch_add(1, Relaxed);
    }
}

fn read(counters: &[AtomicU64], names: &[&'static str]) -> BTreeMap<&'static str, u64> {
    names.iter().copied().zip(counters.iter().map(|n| n.load(Relaxed))).collect()
}
