//! What happened, said in the words of [`Outcome`]: counters and log lines.

mod counters;
mod event_loop_lag;
mod histogram;
pub mod logs;
pub mod request_log;
pub mod spans;
mod upstream_health;
mod upstream_metrics;

use std::sync::Arc;
use std::time::Duration;

use http::{Method, StatusCode};
use tracing::{Level, debug, enabled, info, warn};

pub use counters::{Counters, Snapshot};
pub use event_loop_lag::{EventLoopLag, LagValues};
pub use histogram::{Histogram, Quantiles};
pub use request_log::RequestLog;
pub use upstream_health::{HealthTransition, PassiveHealth, UpstreamHealth};
pub use upstream_metrics::UpstreamMetrics;

use crate::policy::Tick;
use crate::policy::http::request_view::RequestView;
use crate::policy::outcome::{Failure, Outcome};
use crate::policy::routing::rule::Rule;

/// After so many GETs without anything stored, one hint says why.
const HINT_AFTER: u64 = 20;

/// A request and its answer, as far as a log line tells.
#[derive(Debug, Clone, Copy)]
pub struct AnsweredRequest<'a> {
    /// The upstream's name.
    pub upstream: &'a Arc<str>,
    /// The rule it came under.
    pub rule: Option<&'a Rule>,
    /// What was asked.
    pub request: RequestView<'a>,
    /// What was answered.
    pub status: StatusCode,
    /// When it came.
    pub now: Tick,
    /// How long it took to the response head.
    pub took: Duration,
    /// The name that an error of ours gave to it.
    pub request_id: Option<&'a str>,
    /// The same for requests that one stored answer could serve; none: it was served one.
    pub identity: Option<u64>,
}

/// Counts and logs.
#[derive(Debug, Default)]
pub struct Telemetry {
    counters: Counters,
    request_ids: RequestIds,
    /// The last requests.
    pub request_log: RequestLog,
    /// How late the event loop is.
    pub event_loop_lag: EventLoopLag,
}

impl Telemetry {
    /// A request was answered. At most one log line; none for a hit unless asked for.
    pub fn record(&self, outcome: &Outcome, answered: &AnsweredRequest<'_>) {
        self.counters.answered(outcome, answered.took);
        self.request_log.add(outcome, answered);
        let level = level(outcome);
        if level != Level::DEBUG || enabled!(target: "sidecache::access", Level::DEBUG) {
            log(level, outcome, answered);
        }
        if *answered.request.method == Method::GET && self.counters.unstored_get(outcome) == Some(HINT_AFTER) {
            self.hint(answered.upstream);
        }
    }

    /// A request to the upstream ended, well or not.
    pub fn upstream(&self, failure: Option<Failure>, took: Duration) {
        self.counters.upstream(failure, took);
    }

    /// The upstream answered 429.
    pub fn throttled(&self) {
        self.counters.throttled();
    }

    /// … and the request was sent again, in its time.
    pub fn absorbed(&self) {
        self.counters.absorbed();
    }

    /// A request was not sent: its turn would have come too late.
    pub fn refused_by_budget(&self) {
        self.counters.refused();
    }

    /// An answer was stored.
    pub fn stored(&self) {
        self.counters.stored();
    }

    /// A request was answered from what another sidecar has stored.
    pub fn found_in_fleet(&self) {
        self.counters.found_in_fleet();
    }

    /// A write was relayed, and what it may have changed is invalidated.
    pub fn written(&self) {
        self.counters.written();
    }

    /// All counters now.
    pub fn snapshot(&self) -> Snapshot {
        self.counters.snapshot()
    }

    /// A name for a request that a person may ask about.
    pub fn next_request_id(&self) -> String {
        self.request_ids.next()
    }

    fn hint(&self, upstream: &str) {
        let reason = self.counters.commonest_skip().unwrap_or("no-freshness");
        let advice = match reason {
            "no-freshness" => {
                "the upstream's answers have no Cache-Control, Expires or validators. Start with --ttl 30s, or write \
                 a rule with cache = \"override\" and a ttl"
            }
            "no-store" | "private" | "authorization" => {
                "the upstream's headers forbid a shared cache to store them. If you know better, write a rule with \
                 cache = \"override\" and a ttl"
            }
            "unkeyed-credential" => {
                "requests carry a header that looks like a credential and is not keyed. Add it to \
                 [security] credential_headers"
            }
            "rule-off" => "the rule that matches says cache = \"off\". Write a rule of yours for these paths",
            _ => "see Cache-Status in the answers: detail names the reason of each",
        };
        info!(upstream, reason, "{HINT_AFTER} GETs and nothing was stored: {advice}");
    }
}

fn log(level: Level, outcome: &Outcome, answered: &AnsweredRequest<'_>) {
    let AnsweredRequest { upstream, rule, request, status, took, request_id, .. } = *answered;
    let upstream: &str = upstream;
    let (method, path) = (request.method.as_str(), request.uri.path());
    let (outcome_label, detail) = (outcome.label(), outcome.detail().unwrap_or(""));
    let cause = outcome.failure().map_or("", Failure::cause);
    let rule = rule.map_or("", |rule| &*rule.name);
    let status = status.as_u16();
    let ms = (took.as_secs_f64() * 10_000.0).round() / 10.0;
    match level {
        Level::WARN => warn!(
            target: "sidecache::access",
            upstream, rule, method, path, status, outcome = outcome_label, detail, cause, ms, request_id
        ),
        Level::INFO => info!(
            target: "sidecache::access",
            upstream, rule, method, path, status, outcome = outcome_label, detail, ms
        ),
        _ => debug!(target: "sidecache::access", upstream, rule, method, path, status, outcome = outcome_label, ms),
    }
}

/// Hits are not worth a line by default, failures always are.
fn level(outcome: &Outcome) -> Level {
    match outcome {
        Outcome::Hit { .. } => Level::DEBUG,
        Outcome::Stale { .. } if outcome.failure().is_none() => Level::DEBUG,
        Outcome::Stale { .. } | Outcome::Fallback { .. } | Outcome::Failed { .. } => Level::WARN,
        Outcome::Relayed { failure: Some(_), .. } => Level::WARN,
        Outcome::Relayed { .. } | Outcome::NotCached | Outcome::Rejected { .. } => Level::INFO,
    }
}

/// Sixteen hex digits: unique in this process, unlikely to repeat in another.
#[derive(Debug)]
struct RequestIds {
    base: u64,
    count: std::sync::atomic::AtomicU64,
}

impl Default for RequestIds {
    fn default() -> Self {
        let base = getrandom::u64().unwrap_or(u64::from(std::process::id()) << 32);
        RequestIds { base, count: std::sync::atomic::AtomicU64::new(0) }
    }
}

impl RequestIds {
    fn next(&self) -> String {
        let count = self.count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        format!("{:016x}", self.base.wrapping_add(count.wrapping_mul(0x9e37_79b9_7f4a_7c15)))
    }
}
