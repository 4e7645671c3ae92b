//! Commands that use the admin API of a running sidecar: `purge`, `stats`, `mode`, `health`.

use std::process::ExitCode;
use std::time::Duration;

use http::StatusCode;
use serde_json::Value;

use super::{HealthArgs, ModeArgs, PurgeArgs, RemoteArgs, StatsArgs};
use crate::admin::{AdminClient, ModeRequest, PurgeRequest};
use crate::process::print_line;
use crate::secret::Secret;

pub(super) fn client(args: &RemoteArgs) -> Result<AdminClient, String> {
    let token = match &args.token_file {
        None => None,
        Some(path) => {
            let text = std::fs::read_to_string(path).map_err(|e| format!("--token-file {}: {e}", path.display()))?;
            Some(Secret::new(text.trim()))
        }
    };
    AdminClient::new(args.admin.trim_end_matches('/'), token)
}

/// Sends a GET request to the admin API, and returns the response as JSON.
pub(super) async fn fetch_json(client: &AdminClient, path: &str) -> Result<Value, String> {
    let (status, text) = client.get(path).await?;
    if status == StatusCode::UNAUTHORIZED {
        return Err(format!("{status}: give the admin token with --token-file FILE"));
    }
    serde_json::from_str(&text).map_err(|_| format!("{status}: {text}"))
}

/// Runs `sidecache purge …`.
pub(super) async fn purge(args: PurgeArgs) -> Result<ExitCode, String> {
    let PurgeArgs { remote, tag, url, prefix, pattern, all, upstream, host, soft } = args;
    let request =
        PurgeRequest { tags: tag, urls: url, prefixes: prefix, patterns: pattern, all, upstream, hosts: host, soft };
    let answer = client(&remote)?.post("/purge", &request).await?;
    print_line(answer);
    Ok(ExitCode::SUCCESS)
}

/// Runs `sidecache stats`.
pub(super) async fn stats(args: &StatsArgs) -> Result<ExitCode, String> {
    let client = client(&args.remote)?;
    let mut before: Option<Value> = None;
    loop {
        let now = fetch_json(&client, "/stats").await?;
        if !args.watch {
            print_line(format!("{now:#}"));
            return Ok(ExitCode::SUCCESS);
        }
        match &before {
            None => print_line("  requests/s   hit ratio   p99 of hits   upstream/s   failed/s    keys       memory"),
            Some(before) => print_line(watch_line(before, &now)),
        }
        before = Some(now);
        tokio::time::sleep(WATCH_INTERVAL).await;
    }
}

/// Interval between the lines of `--watch`.
const WATCH_INTERVAL: Duration = Duration::from_secs(2);

/// Formats the difference between two results of `/stats` as one line.
#[allow(clippy::cast_precision_loss)] // for display only
fn watch_line(before: &Value, now: &Value) -> String {
    let at = |reply: &Value, path: &str| reply.pointer(path).and_then(Value::as_f64).unwrap_or(0.0);
    let rate = |path: &str| (at(now, path) - at(before, path)).max(0.0) / WATCH_INTERVAL.as_secs_f64();
    let outcome = |name: &str| rate(&format!("/requests/outcomes/{name}"));
    let served = outcome("hit") + outcome("stale");
    let total = served + ["miss", "collapsed", "fallback", "failed"].map(outcome).iter().sum::<f64>();
    let ratio = if total > 0.0 { format!("{:.1} %", served / total * 100.0) } else { "–".into() };
    format!(
        "{:>12.1} {ratio:>11} {:>10.2} ms {:>12.1} {:>10.1} {:>7} {:>8.1} MiB",
        rate("/requests/requests"),
        at(now, "/requests/latency_ms/stored/p99"),
        rate("/requests/upstream_requests"),
        outcome("failed") + outcome("fallback"),
        at(now, "/memory/entries"),
        at(now, "/memory/bytes") / 1_048_576.0,
    )
}

/// Runs `sidecache mode …`.
pub(super) async fn mode(args: ModeArgs) -> Result<ExitCode, String> {
    let ModeArgs { remote, mode, time, fleet, dry_run: _ } = args;
    let state = client(&remote)?.post("/mode", &ModeRequest { mode, time, fleet }).await?;
    let left = state["for_ms"].as_u64().map(|ms| format!(" for another {} s", ms.div_ceil(1000)));
    let text = |key: &str| state[key].as_str().unwrap_or("?").to_owned();
    print_line(format!("mode {} (set by: {}){}", text("mode"), text("source"), left.unwrap_or_default()));
    Ok(ExitCode::SUCCESS)
}

/// Runs `sidecache health`. The exit code is 0 if the health is `ok`; with `--ready`, if the sidecar is ready.
pub(super) async fn health(args: &HealthArgs) -> Result<ExitCode, String> {
    let client = client(&args.remote)?;
    if args.ready {
        let (status, text) = client.get("/readyz").await?;
        print_line(text.trim_end());
        return Ok(ExitCode::from(u8::from(!status.is_success())));
    }
    let (_, text) = client.get("/health").await?;
    print_json(&text);
    let well = serde_json::from_str::<Value>(&text).is_ok_and(|health| health["status"] == "ok");
    Ok(ExitCode::from(u8::from(!well)))
}

fn print_json(text: &str) {
    match serde_json::from_str::<Value>(text) {
        Ok(json) => print_line(format!("{json:#}")),
        Err(_) => print_line(text),
    }
}
