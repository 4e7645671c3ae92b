//! Commands that talk to a running sidecar.

use std::process::ExitCode;

use http::StatusCode;
use serde_json::Value;

use super::{HealthArgs, ModeArgs, PurgeArgs, RemoteArgs};
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
pub(super) async fn stats(args: &RemoteArgs) -> Result<ExitCode, String> {
    let (status, text) = client(args)?.get("/stats").await?;
    if status == StatusCode::UNAUTHORIZED {
        return Err(format!("{status}: give the admin token with --token-file FILE"));
    }
    print_json(&text);
    Ok(ExitCode::from(u8::from(!status.is_success())))
}

/// `sidecache mode …`.
pub(super) async fn mode(args: ModeArgs) -> Result<ExitCode, String> {
    let ModeArgs { remote, mode, time } = args;
    let state = client(&remote)?.post("/mode", &ModeRequest { mode, time }).await?;
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
