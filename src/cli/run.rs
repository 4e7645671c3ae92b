//! The commands `run` and `check`.

use std::path::PathBuf;
use std::process::ExitCode;

use crate::app::App;
use crate::app::reload::ConfigSource;
#[cfg(feature = "otlp")]
use crate::app::traces;
use crate::clock::Clock;
use crate::config;
use crate::config::{Config, ConfigError, Flags};
use crate::process::{print_line, stop_signal};
use crate::redis;
use crate::redis::ProbeError;
use crate::telemetry::logs;
use crate::upstream::client::PooledClient;

/// Runs the sidecar until a stop signal arrives.
pub(super) async fn run(flags: Flags) -> Result<ExitCode, String> {
    let config = load(&flags)?;
    #[cfg(feature = "otlp")]
    let (traces, besides) = traces::start()?.unzip();
    #[cfg(not(feature = "otlp"))]
    let besides = None;
    let _flush = logs::start(&config.log, redis::DRIVER_LOG_FILTER, besides)?;
    let stop = stop_signal()?;
    let app = App::bind(config)?;
    let file = flags.config.clone().or_else(|| Some(PathBuf::from("sidecache.toml")).filter(|file| file.exists()));
    app.reload_from(ConfigSource { file, load: Box::new(move || load(&flags)) });
    let lines = app.lines().to_vec();
    // A reader of stdout that stands still must not keep the sidecar from starting.
    std::thread::spawn(move || lines.iter().for_each(print_line));
    let cut = app.run(stop).await;
    #[cfg(feature = "otlp")]
    if let Some(traces) = traces {
        traces.finish().await;
    }
    if cut > 0 {
        tracing::warn!(cut, "shutdown.grace has passed: open connections were closed");
    }
    Ok(ExitCode::SUCCESS)
}

/// Checks a configuration. A Redis that does not respond is not an error of the configuration; a Redis that rejects the
/// configuration is.
pub(super) async fn check(config: Option<PathBuf>) -> Result<ExitCode, String> {
    let flags = Flags { config, ..Flags::default() };
    let config = load(&flags)?;
    logs::filter(&config.log, redis::DRIVER_LOG_FILTER)?;
    for upstream in &config.upstreams {
        PooledClient::new(&upstream.client_settings(), Clock::start())
            .map_err(|e| format!("upstream {}: {e}", upstream.name))?;
        let rules = if upstream.rules == 1 { "1 rule".into() } else { format!("{} rules", upstream.rules) };
        print_line(format!("upstream {}: profile {}, {rules}", upstream.name, upstream.profile));
    }
    if let Some(redis) = &config.redis {
        match redis::probe(redis).await {
            Ok(line) => print_line(line),
            Err(ProbeError::Absent(why)) => {
                print_line(format!("warning: {why}. Until Redis answers, entries are stored in memory only"));
            }
            Err(ProbeError::Wrong(why)) => return Err(why),
        }
    }
    for warning in config::warnings(&config) {
        print_line(format!("warning: {warning}"));
    }
    for note in &config.notes {
        print_line(format!("note: {note}"));
    }
    print_line(format!("{}: ok", config.source));
    Ok(ExitCode::SUCCESS)
}

fn load(flags: &Flags) -> Result<Config, String> {
    config::load(flags).map_err(|found| errors(&found))
}

/// Returns the text of all errors of a configuration.
pub(super) fn errors(errors: &[ConfigError]) -> String {
    let text: Vec<String> = errors.iter().map(ConfigError::to_string).collect();
    let more = if errors.len() > 1 { format!("\n{} errors", errors.len()) } else { String::new() };
    text.join("\n") + &more
}
