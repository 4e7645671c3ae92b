//! Log lines on stderr, for people or as JSON. Stdout belongs to the first lines of a start.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

use crate::config::Log;

/// Starts logging. `RUST_LOG` beats the configuration.
pub fn start(config: &Log) -> Result<(), String> {
    let base = tracing_subscriber::fmt().with_env_filter(filter(config)?).with_writer(std::io::stderr);
    if config.json {
        base.json().flatten_event(true).init();
    } else {
        base.with_target(false).with_ansi(std::io::stderr().is_terminal()).compact().init();
    }
    Ok(())
}

/// What to log. The error names the filter.
pub fn filter(config: &Log) -> Result<EnvFilter, String> {
    let wanted = std::env::var("RUST_LOG").unwrap_or_else(|_| config.filter.clone());
    EnvFilter::try_new(&wanted).map_err(|e| format!("log filter {wanted:?}: {e}"))
}
