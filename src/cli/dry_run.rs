//! `mode bypass --dry-run`: estimates each upstream's load from the last requests, and compares it to its limit.

use std::collections::BTreeMap;
use std::process::ExitCode;

use serde_json::Value;

use super::ModeArgs;
use super::remote::{client, fetch_json};
use crate::process::print_line;

/// Maximum age of the requests that count, in milliseconds. Older requests count only if there are no others.
const RECENT_MS: u64 = 60_000;

/// Number of requests that arrived for an upstream, and of those that reached it.
#[derive(Debug, Default, PartialEq, Eq)]
struct UpstreamLoad {
    arrived: u64,
    reached: u64,
    /// Age of the oldest request, in milliseconds.
    since: u64,
}

pub(super) async fn dry_run(args: ModeArgs) -> Result<ExitCode, String> {
    let ModeArgs { remote, mode, .. } = args;
    if mode != "bypass" && mode != "shadow" {
        return Err(
            "--dry-run works for bypass and shadow: it estimates the requests that would reach the upstream".into()
        );
    }
    let client = client(&remote)?;
    let requests = fetch_json(&client, "/requests").await?;
    let budgets = fetch_json(&client, "/budgets").await?;
    let loads = loads(requests["requests"].as_array().map_or(&[], Vec::as_slice));
    if loads.is_empty() {
        print_line("no requests yet: nothing to estimate from");
    }
    let mut fits = true;
    for (upstream, load) in &loads {
        let budget = budgets["budgets"].as_array().into_iter().flatten().find(|b| b["upstream"] == **upstream);
        let pace = budget.and_then(|budget| budget["pace_per_second"].as_f64());
        let (lines, well) = describe_load(upstream, load, &mode, pace);
        lines.into_iter().for_each(print_line);
        fits &= well;
    }
    print_line("nothing was changed");
    Ok(ExitCode::from(u8::from(!fits)))
}

fn loads(requests: &[Value]) -> BTreeMap<String, UpstreamLoad> {
    let ago = |request: &Value| request["ago_ms"].as_u64().unwrap_or(0);
    let lately = requests.iter().any(|request| ago(request) <= RECENT_MS);
    let mut loads: BTreeMap<String, UpstreamLoad> = BTreeMap::new();
    for request in requests.iter().filter(|request| !lately || ago(request) <= RECENT_MS) {
        let load = loads.entry(request["upstream"].as_str().unwrap_or_default().to_owned()).or_default();
        let (asks, reaches) = match request["outcome"].as_str().unwrap_or_default() {
            "hit" | "collapsed" => (1, 0),
            "rejected" | "not-cached" => (0, 0),
            // A stale response is refreshed in the background.
            _ => (1, 1),
        };
        load.arrived += asks;
        load.reached += reaches;
        load.since = load.since.max(ago(request));
    }
    loads
}

/// Returns a description of an upstream's load, and whether the load fits the upstream's limit (`pace`, requests/s).
#[allow(clippy::cast_precision_loss)] // for display only
fn describe_load(upstream: &str, load: &UpstreamLoad, mode: &str, pace: Option<f64>) -> (Vec<String>, bool) {
    let seconds = (load.since as f64 / 1000.0).max(1.0);
    let (now, then) = (load.reached as f64 / seconds, load.arrived as f64 / seconds);
    let mut lines = vec![
        format!("upstream {upstream}, estimated from {} requests of the last {seconds:.0} s:", load.arrived),
        format!("  now     {now:>9.2} requests/s reach the upstream"),
        format!("  {mode}  {then:>9.2} requests/s would"),
    ];
    let fits = pace.is_none_or(|pace| then <= pace);
    lines.push(match pace {
        None => "  the configuration has no budget with a rate: the upstream's limit is unknown".into(),
        Some(pace) if fits => format!("  within the configured budget of {pace:.2}/s"),
        Some(pace) => format!("  ABOVE the configured budget of {pace:.2}/s: clients would receive 429 responses"),
    });
    (lines, fits)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn upstream_load_counts_recent_requests_and_is_compared_to_the_rate() {
        let one = |outcome: &str, ago: u64| json!({ "upstream": "shop", "outcome": outcome, "ago_ms": ago });
        let mut requests =
            vec![one("miss", 10_000), one("collapsed", 9_000), one("stale", 8_000), one("miss", 90_000)];
        requests.extend((0..37).map(|n| one("hit", n * 100)));
        let loads = loads(&requests);
        assert_eq!(loads["shop"], UpstreamLoad { arrived: 40, reached: 2, since: 10_000 });
        let (lines, fits) = describe_load("shop", &loads["shop"], "bypass", Some(2.0));
        assert!(!fits && lines[2].contains("4.00") && lines[3].contains("ABOVE"), "{lines:?}");
        assert!(describe_load("shop", &loads["shop"], "bypass", Some(4.0)).1);
    }
}
