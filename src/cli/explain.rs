//! `sidecache explain`: asks the running sidecar, or reads only the configuration.

use std::process::ExitCode;

use serde_json::Value;

use super::ExplainArgs;
use super::remote::client;
use crate::admin::{ExplainRequest, explain};
use crate::app;
use crate::config::{self, Flags};
use crate::process::say;

/// The order in which it is told.
const ORDER: [&str; 15] = [
    "request",
    "upstream",
    "goes_to",
    "rule",
    "cache",
    "decision",
    "why",
    "entry",
    "not_stored",
    "being_fetched",
    "key",
    "tags",
    "deadline",
    "upstream_now",
    "note",
];

/// `Name: value`, as after `-H`.
pub(super) fn header(line: &str) -> Result<(String, String), String> {
    let (name, value) = line.split_once(':').ok_or_else(|| format!("-H {line:?}: write 'Name: value'"))?;
    Ok((name.trim().to_owned(), value.trim().to_owned()))
}

pub(super) async fn explain(args: ExplainArgs) -> Result<ExitCode, String> {
    let ExplainArgs { remote, method, url, header: lines, data, upstream, offline, config, json } = args;
    let headers = lines.iter().map(|line| header(line)).collect::<Result<_, String>>()?;
    let request = ExplainRequest { method, url, headers, body: data.unwrap_or_default(), upstream };
    let told = if offline {
        let flags = Flags { config, ..Flags::default() };
        let config = config::load(&flags).map_err(|errors| super::run::errors(&errors))?;
        let limits = config.limits;
        let proxies = app::proxies(config)?;
        let mut told = explain::answer(&request, proxies.iter(), &limits, false)?;
        told["note"] = "from the configuration alone; without --offline the running sidecar is asked".into();
        told
    } else {
        client(&remote)?
            .post("/explain", &request)
            .await
            .map_err(|e| format!("{e} (--offline reads the file only)"))?
    };
    if json {
        say(format!("{told:#}"));
    } else {
        ORDER.iter().filter_map(|name| Some((name, told.get(*name)?))).for_each(|(name, value)| tell(name, value, 0));
    }
    Ok(ExitCode::SUCCESS)
}

/// One line for each value; what belongs together is indented.
fn tell(name: &str, value: &Value, depth: usize) {
    let label = format!("{}{}", "  ".repeat(depth), name.replace('_', " "));
    match value {
        Value::Object(parts) => {
            say(&label);
            parts.iter().for_each(|(name, value)| tell(name, value, depth + 1));
        }
        Value::Null => say(format!("{label:<16} none")),
        Value::String(text) => say(format!("{label:<16} {text}")),
        Value::Array(list) => {
            let list: Vec<String> = list.iter().map(|v| v.as_str().map_or(v.to_string(), str::to_owned)).collect();
            say(format!("{label:<16} {}", if list.is_empty() { "none".to_owned() } else { list.join(", ") }));
        }
        Value::Bool(yes) => say(format!("{label:<16} {}", if *yes { "yes" } else { "no" })),
        Value::Number(number) => say(format!("{label:<16} {number}")),
    }
}
