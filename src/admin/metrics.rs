//! `GET /metrics`: the counters in the format of Prometheus (`OpenMetrics` 1.0 text).
//! Labels are upstreams, rules and outcomes: never a shop, a credential, or a URL.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

use super::Admin;
use crate::policy::mode::Mode;
use crate::policy::outcome::ShadowResult;
use crate::telemetry::{Histogram, logs};

/// The series of a metric: the labels and the value of each.
type Series<V> = Vec<(Vec<(&'static str, String)>, V)>;

#[derive(Debug)]
struct ScrapeCollector(Arc<Admin>);

pub(super) async fn metrics(State(admin): State<Arc<Admin>>) -> Response {
    let mut registry = Registry::with_prefix("sidecache");
    registry.register_collector(Box::new(ScrapeCollector(admin)));
    let mut text = String::new();
    match encode(&mut text, &registry) {
        Ok(()) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(CONTENT_TYPE, kind)], text).into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

fn counter(to: &mut DescriptorEncoder<'_>, name: &str, help: &str, series: &Series<u64>) -> fmt::Result {
    let mut metric = to.encode_descriptor(name, help, None, MetricType::Counter)?;
    series.iter().try_for_each(|(labels, value)| {
        if labels.is_empty() {
            return metric.encode_counter::<NoLabelSet, _, u64>(value, None);
        }
        metric.encode_family(labels)?.encode_counter::<NoLabelSet, _, u64>(value, None)
    })
}

fn gauge(to: &mut DescriptorEncoder<'_>, name: &str, help: &str, series: &Series<f64>) -> fmt::Result {
    let mut metric = to.encode_descriptor(name, help, None, MetricType::Gauge)?;
    series.iter().try_for_each(|(labels, value)| {
        if labels.is_empty() { metric.encode_gauge(value) } else { metric.encode_family(labels)?.encode_gauge(value) }
    })
}

fn histogram(to: &mut DescriptorEncoder<'_>, name: &str, help: &str, series: &Series<&Histogram>) -> fmt::Result {
    let mut metric = to.encode_descriptor(name, help, None, MetricType::Histogram)?;
    series.iter().try_for_each(|(labels, latencies)| {
        let (seconds, buckets) = latencies.buckets();
        let count = buckets.iter().map(|(_, count)| count).sum();
        if count == 0 {
            return Ok(());
        }
        metric.encode_family(labels)?.encode_histogram::<NoLabelSet>(seconds, count, &buckets, None)
    })
}

#[allow(clippy::cast_precision_loss)] // gauge values are floats
impl Collector for ScrapeCollector {
    fn encode(&self, mut to: DescriptorEncoder<'_>) -> fmt::Result {
        let to = &mut to;
        self.requests(to)?;
        self.upstreams(to)?;
        let shared = self.0.shared();
        let usage = shared.memory.usage();
        gauge(to, "entries", "Keys in memory", &vec![(Vec::new(), usage.entries as f64)])?;
        let mut bytes = vec![(vec![("tier", "memory".to_owned())], usage.bytes as f64)];
        if let Some(fleet) = &shared.fleet {
            let waiting = fleet.tier.state().queue.bytes;
            bytes.push((vec![("tier", "write_behind".to_owned())], waiting as f64));
        }
        gauge(to, "bytes", "Bytes in memory, with overhead", &bytes)?;
        let limit = vec![(vec![("tier", "memory".to_owned())], usage.max_bytes as f64)];
        gauge(to, "bytes_limit", "Limit of bytes in memory (memory.max_bytes)", &limit)?;
        counter(to, "evictions", "Entries evicted to make room", &vec![(Vec::new(), usage.evicted)])?;
        counter(to, "expirations", "Entries removed after expiry", &vec![(Vec::new(), usage.swept)])?;
        let help = "Log lines dropped, because the reader of stderr was too slow";
        counter(to, "log_lines_dropped", help, &vec![(Vec::new(), logs::dropped_lines())])?;
        let help = "Overflows of the invalidation ledger, which made entries unverified";
        counter(to, "ledger_overflows", help, &vec![(Vec::new(), shared.invalidations.overflows())])?;
        self.redis(to)?;
        let taken = f64::from(u8::from(self.0.reload.reloads().error.is_none()));
        let help = "1: the last configuration reload succeeded";
        gauge(to, "config_last_reload_successful", help, &vec![(Vec::new(), taken)])?;
        let mode = shared.mode.state(shared.clock.now()).mode;
        let modes = Mode::ALL.map(|one| (vec![("mode", one.token().to_owned())], f64::from(u8::from(one == mode))));
        gauge(to, "mode", "1: the current mode", &modes.to_vec())?;
        let build = vec![(vec![("version", env!("CARGO_PKG_VERSION").to_owned())], 1.0)];
        gauge(to, "build_info", "The program's version", &build)?;
        let delay = shared.telemetry.event_loop_lag.values().worst as f64 / 1000.0;
        let help = "Largest event loop lag of the last ten seconds";
        gauge(to, "event_loop_delay_seconds", help, &vec![(Vec::new(), delay)])?;
        let files = super::health::open_files().0.map(|files| (Vec::new(), files as f64));
        gauge(to, "open_files", "Files this process has open", &files.into_iter().collect())?;
        let rss = super::health::rss_bytes().map(|bytes| (Vec::new(), bytes as f64));
        gauge(to, "resident_memory_bytes", "Resident memory of the process", &rss.into_iter().collect())
    }
}

impl ScrapeCollector {
    fn requests(&self, to: &mut DescriptorEncoder<'_>) -> fmt::Result {
        // A rule with several paths compiles to several rules of the same name: their counts are added.
        let proxies = self.0.proxies();
        let mut counts: BTreeMap<(&str, String, &str), u64> = BTreeMap::new();
        let mut took = Vec::new();
        for proxy in &proxies {
            let upstream = &proxy.upstream;
            for (rule, outcome, count) in upstream.metrics.by_rule() {
                *counts.entry((&upstream.name, rule.into(), outcome)).or_default() += count;
            }
            let of = |outcome: &str| vec![("upstream", upstream.name.to_string()), ("outcome", outcome.to_owned())];
            took.extend(upstream.metrics.durations().map(|(outcome, latencies)| (of(outcome), latencies)));
        }
        let collapsed = counts.iter().filter(|((.., outcome), _)| *outcome == "collapsed").map(|(_, n)| n).sum();
        let series = counts
            .into_iter()
            .filter(|(_, count)| *count > 0)
            .map(|((upstream, rule, outcome), count)| {
                let of = vec![("upstream", upstream.to_owned()), ("rule", rule), ("outcome", outcome.to_owned())];
                (of, count)
            })
            .collect();
        counter(to, "requests", "Responses sent, by outcome", &series)?;
        histogram(to, "request_duration_seconds", "Time to the response head", &took)?;
        counter(to, "coalesced", "Requests that shared a fetch", &vec![(Vec::new(), collapsed)])?;
        let shown: Vec<_> = proxies
            .iter()
            .flat_map(|proxy| {
                let of = |(rule, shown, count): (Box<str>, ShadowResult, u64)| {
                    let labels = [
                        ("upstream", proxy.upstream.name.to_string()),
                        ("rule", rule.into()),
                        ("result", shown.token().into()),
                    ];
                    (labels.to_vec(), count)
                };
                proxy.upstream.metrics.shadow_results().into_iter().map(of).collect::<Vec<_>>()
            })
            .collect();
        counter(to, "shadow", "Requests in shadow mode, by the outcome that the cache would have had", &shown)?;
        let fallbacks = self.0.shared().telemetry.snapshot().fallbacks;
        let series =
            fallbacks.into_iter().map(|(cause, count)| (vec![("reason", cause.to_owned())], count)).collect();
        counter(to, "fallback", "Configured payloads served, by cause", &series)
    }

    #[allow(clippy::cast_precision_loss)]
    fn upstreams(&self, to: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let (mut results, mut took, mut waited) = (Vec::new(), Vec::new(), Vec::new());
        let (mut throttles, mut breakers, mut up) = (Vec::new(), Vec::new(), Vec::new());
        let now = self.0.shared().clock.now();
        let proxies = self.0.proxies();
        for proxy in &proxies {
            let (name, meter) = (proxy.upstream.name.to_string(), &proxy.upstream.metrics);
            let of = |label: &'static str, value: &str| vec![("upstream", name.clone()), (label, value.to_owned())];
            results.extend(meter.results().into_iter().map(|(result, count)| (of("result", result), count)));
            throttles.extend(meter.throttles().map(|(result, count)| (of("result", result), count)));
            took.push((vec![("upstream", name.clone())], &meter.upstream_took));
            waited.extend(
                [("read", &meter.reads_waited), ("write", &meter.writes_waited)]
                    .map(|(who, waited)| (vec![("upstream", name.clone()), ("priority", who.to_owned())], waited)),
            );
            breakers.push((vec![("target", name.clone())], proxy.upstream.breakers.open().len() as f64));
            let down = proxy.upstream.health.state(now).status == "down";
            up.push((vec![("upstream", name)], if down { 0.0 } else { 1.0 }));
        }
        counter(to, "upstream_requests", "Requests sent upstream, by result", &results)?;
        histogram(to, "upstream_duration_seconds", "Time to the upstream's response head", &took)?;
        counter(to, "throttles", "429s: absorbed by waiting, or passed on to clients", &throttles)?;
        histogram(to, "budget_wait_seconds", "Time that requests waited for the budget", &waited)?;
        gauge(to, "breaker_open", "Hosts of an upstream whose circuit breaker is open", &breakers)?;
        gauge(to, "upstream_up", "1: the last requests to the upstream succeeded", &up)
    }

    #[allow(clippy::cast_precision_loss)]
    fn redis(&self, to: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let shared = self.0.shared();
        let Some(fleet) = &shared.fleet else { return Ok(()) };
        let state = fleet.redis.state();
        let up = state.trouble.is_none() && state.connections.values().all(|connection| connection.connected);
        gauge(to, "redis_up", "1: Redis responds", &vec![(Vec::new(), f64::from(u8::from(up)))])?;
        let took: Vec<_> = fleet.redis.latencies().into_iter().collect();
        let series = took.iter().map(|(name, took)| (vec![("connection", (*name).to_owned())], *took)).collect();
        histogram(to, "redis_duration_seconds", "Duration of Redis commands", &series)?;
        let lag = shared.invalidations.lag(shared.clock.now()).map(|ms| (Vec::new(), ms as f64 / 1000.0));
        let help = "Time since the invalidation log was last read";
        gauge(to, "invalidation_lag_seconds", help, &lag.into_iter().collect())?;
        let unlogged = shared.invalidations.unlogged() as f64;
        gauge(
            to,
            "unlogged_purges",
            "Purges of this sidecar that are not in the invalidation log yet",
            &vec![(Vec::new(), unlogged)],
        )?;
        let shared = fleet.tier.state();
        let looks =
            [("hit", shared.hits), ("miss", shared.misses), ("error", shared.errors), ("forged", shared.forged)];
        let series = looks.map(|(result, count)| (vec![("result", result.to_owned())], count)).to_vec();
        counter(to, "redis_lookups", "Record lookups in Redis", &series)
    }
}
