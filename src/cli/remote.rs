//! Commands that talk to a running sidecar.

use std::process::ExitCode;
use std::time::Duration;

use http::StatusCode;
use serde_json::Value;

use super::{HealthArgs, ModeArgs, PurgeArgs, RemoteArgs, StatsArgs};
use crate::admin::{AdminClient, ModeRequest, PurgeRequest};
use crate::config::Secret;
use crate::process::say;

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

/// What a path of the admin API tells, as JSON.
pub(super) async fn fetched(client: &AdminClient, path: &str) -> Result<Value, String> {
    let (status, text) = client.get(path).await?;
    if status == StatusCode::UNAUTHORIZED {
        return Err(format!("{status}: give the admin token with --token-file FILE"));
    }
    serde_json::from_str(&text).map_err(|_| format!("{status}: {text}"))
}

/// `sidecache purge …`.
pub(super) async fn purge(args: PurgeArgs) -> Result<ExitCode, String> {
    let PurgeArgs { remote, tag, url, prefix, pattern, all, upstream, host, soft } = args;
    let request =
        PurgeRequest { tags: tag, urls: url, prefixes: prefix, patterns: pattern, all, upstream, hosts: host, soft };
    let answer = client(&remote)?.post("/purge", &request).await?;
    say(answer);
    Ok(ExitCode::SUCCESS)
}

/// `sidecache stats`.
pub(super) async fn stats(args: &StatsArgs) -> Result<ExitCode, String> {
    let client = client(&args.remote)?;
    let mut before: Option<Value> = None;
    loop {
        let now = fetched(&client, "/stats").await?;
        if !args.watch {
            say(format!("{now:#}"));
            return Ok(ExitCode::SUCCESS);
        }
        match &before {
            None => say("  requests/s   hit ratio   p99 of hits   upstream/s   failed/s    keys       memory"),
            Some(before) => say(line(before, &now)),
        }
        before = Some(now);
        tokio::time::sleep(EVERY).await;
    }
}

/// How often `--watch` looks.
const EVERY: Duration = Duration::from_secs(2);

/// What happened between two looks, in one line.
#[allow(clippy::cast_precision_loss)] // for people
fn line(before: &Value, now: &Value) -> String {
    let at = |told: &Value, path: &str| told.pointer(path).and_then(Value::as_f64).unwrap_or(0.0);
    let rate = |path: &str| (at(now, path) - at(before, path)).max(0.0) / EVERY.as_secs_f64();
    let outcome = |name: &str| rate(&format!("/requests/outcomes/{name}"));
    let served = outcome("hit") + outcome("stale");
    let asked = served + ["miss", "collapsed", "fallback", "failed"].map(outcome).iter().sum::<f64>();
    let ratio = if asked > 0.0 { format!("{:.1} %", served / asked * 100.0) } else { "–".into() };
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

/// `sidecache mode …`.
pub(super) async fn mode(args: ModeArgs) -> Result<ExitCode, String> {
    let ModeArgs { remote, mode, time, fleet, dry_run: _ } = args;
    let state = client(&remote)?.post("/mode", &ModeRequest { mode, time, fleet }).await?;
    let left = state["for_ms"].as_u64().map(|ms| format!(" for another {} s", ms.div_ceil(1000)));
    let word = |key: &str| state[key].as_str().unwrap_or("?").to_owned();
    say(format!("mode {} (set by: {}){}", word("mode"), word("source"), left.unwrap_or_default()));
    Ok(ExitCode::SUCCESS)
}

/// `sidecache health`: exit code 0 if it is ready (and, without `--ready`, everything is well).
pub(super) async fn health(args: &HealthArgs) -> Result<ExitCode, String> {
    let client = client(&args.remote)?;
    if args.ready {
        let (status, text) = client.get("/readyz").await?;
        say(text.trim_end());
        return Ok(ExitCode::from(u8::from(!status.is_success())));
    }
    let (_, text) = client.get("/health").await?;
    print_json(&text);
    let well = serde_json::from_str::<Value>(&text).is_ok_and(|health| health["status"] == "ok");
    Ok(ExitCode::from(u8::from(!well)))
}

fn print_json(text: &str) {
    match serde_json::from_str::<Value>(text) {
        Ok(json) => say(format!("{json:#}")),
        Err(_) => say(text),
    }
}
