//! Result table of the demo: the figures without and with the sidecar, each beside its target.

use std::fmt::Write;
use std::time::Duration;

use super::load::LoadResult;

struct TableRow {
    name: &'static str,
    before: String,
    after: String,
    /// The target of the sidecar, and whether it was met.
    target: Option<(&'static str, bool)>,
}

/// Renders the table.
pub(super) fn render(before: &LoadResult, after: &LoadResult) -> String {
    let row = |name, of: &dyn Fn(&LoadResult) -> String, target| TableRow {
        name,
        before: of(before),
        after: of(after),
        target,
    };
    let rows = [
        row("successful responses", &|s| s.latencies.len().to_string(), None),
        row("products p50", &|s| duration(quantile(&s.latencies, 0.5)), None),
        row(
            "products p99",
            &|s| duration(quantile(&s.latencies, 0.99)),
            Some(("< 2 s", quantile(&after.latencies, 0.99).is_some_and(|p99| p99 < Duration::from_secs(2)))),
        ),
        row("failures", &|s| percent(failures(s)), Some(("< 5 %", failures(after) < 0.05))),
        row("requests per second", &|s| format!("{:.1}", rate(s)), Some(("> 5", rate(after) > 5.0))),
        row("upstream calls", &|s| s.upstream_calls.to_string(), None),
        row("hit ratio", &|s| percent(hit_ratio(s)), Some(("> 50 %", hit_ratio(after) > 0.5))),
        row(
            "health check p99",
            &|s| duration(quantile(&s.health, 0.99)),
            Some(("< 500 ms", quantile(&after.health, 0.99).is_some_and(|p99| p99 < Duration::from_millis(500)))),
        ),
    ];
    let mut text = format!("{:<24}{:>14}{:>14}   {}\n", "", "direct", "sidecar", "target");
    for TableRow { name, before, after, target } in rows {
        let target =
            target.map_or(String::new(), |(target, met)| format!("{target} {}", if met { "✓" } else { "✗" }));
        let _ = writeln!(text, "{name:<24}{before:>14}{after:>14}   {target}");
    }
    text
}

fn quantile(latencies: &[Duration], part: f64) -> Option<Duration> {
    let mut sorted = latencies.to_vec();
    sorted.sort_unstable();
    #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let index = ((sorted.len() as f64 * part) as usize).min(sorted.len().saturating_sub(1));
    sorted.get(index).copied()
}

#[allow(clippy::cast_precision_loss)]
fn failures(seen: &LoadResult) -> f64 {
    seen.failures as f64 / (seen.failures + seen.latencies.len()).max(1) as f64
}

#[allow(clippy::cast_precision_loss)]
fn hit_ratio(seen: &LoadResult) -> f64 {
    seen.hits as f64 / (seen.failures + seen.latencies.len()).max(1) as f64
}

#[allow(clippy::cast_precision_loss)]
fn rate(seen: &LoadResult) -> f64 {
    seen.latencies.len() as f64 / seen.lasted.as_secs_f64().max(0.001)
}

fn percent(part: f64) -> String {
    format!("{:.1} %", part * 100.0)
}

fn duration(duration: Option<Duration>) -> String {
    match duration {
        None => "-".to_owned(),
        Some(d) if d < Duration::from_millis(1) => format!("{} µs", d.as_micros()),
        Some(d) if d < Duration::from_secs(1) => format!("{:.1} ms", d.as_secs_f64() * 1000.0),
        Some(d) => format!("{:.2} s", d.as_secs_f64()),
    }
}
