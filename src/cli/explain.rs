//! `sidecache explain`: queries the running sidecar, or reads only the configuration.

use std::process::ExitCode;

use serde_json::Value;

use super::ExplainArgs;
use super::remote::client;
use crate::admin::{ExplainRequest, explain};
use crate::app;
use crate::config;
use crate::config::Flags;
use crate::process::print_line;

/// The order in which the fields are printed.
const ORDER: [&str; 16] = [
    "request",
    "upstream",
    "goes_to",
    "rule",
    "cache",
    "decision",
    "why",
    "entry",
    "not_stored",
    "paused",
    "being_fetched",
    "key",
    "tags",
    "deadline",
    "upstream_now",
    "note",
];

/// Parses `Name: value`, the argument of `-H`.
pub(super) fn header(line: &str) -> Result<(String, String), String> {
    let (name, value) = line.split_once(':').ok_or_else(|| format!("-H {line:?}: write 'Name: value'"))?;
    Ok((name.trim().to_owned(), value.trim().to_owned()))
}

pub(super) async fn explain(args: ExplainArgs) -> Result<ExitCode, String> {
    let ExplainArgs { remote, method, url, header: lines, data, upstream, offline, config, json } = args;
    let headers = lines.iter().map(|line| header(line)).collect::<Result<_, String>>()?;
    let request = ExplainRequest { method, url, headers, body: data.unwrap_or_default(), upstream };
    let explanation = if offline {
        let flags = Flags { config, ..Flags::default() };
        let config = config::load(&flags).map_err(|errors| super::run::errors(&errors))?;
        let limits = config.limits;
        let proxies = app::proxies(config)?;
        let mut explanation = explain::explain_request(&request, proxies.iter(), &limits, false)?;
        explanation["note"] = "from the configuration file only (--offline): no running sidecar was queried".into();
        explanation
    } else {
        client(&remote)?
            .post("/explain", &request)
            .await
            .map_err(|e| format!("{e} (--offline reads the file only)"))?
    };
    if json {
        print_line(format!("{explanation:#}"));
    } else {
        ORDER
            .iter()
            .filter_map(|name| Some((name, explanation.get(*name)?)))
            .for_each(|(name, value)| print_value(name, value, 0));
    }
    Ok(ExitCode::SUCCESS)
}

/// Prints one line for each value. The fields of an object are indented.
fn print_value(name: &str, value: &Value, depth: usize) {
    let label = format!("{}{}", "  ".repeat(depth), name.replace('_', " "));
    match value {
        Value::Object(parts) => {
            print_line(&label);
            // Fields that do not apply are left out: `--json` shows them.
            let applies = |value: &Value| !value.is_null() && *value != Value::Bool(false);
            let shown = parts.iter().filter(|(_, value)| applies(value));
            shown.for_each(|(name, value)| print_value(name, value, depth + 1));
        }
        Value::Null => print_line(format!("{label:<16} none")),
        Value::String(text) => print_line(format!("{label:<16} {text}")),
        Value::Array(list) => {
            let list: Vec<String> = list.iter().map(|v| v.as_str().map_or(v.to_string(), str::to_owned)).collect();
            print_line(format!("{label:<16} {}", if list.is_empty() { "none".to_owned() } else { list.join(", ") }));
        }
        Value::Bool(yes) => print_line(format!("{label:<16} {}", if *yes { "yes" } else { "no" })),
        Value::Number(number) => print_line(format!("{label:<16} {number}")),
    }
}
