//! `run` and `check`.

use std::path::PathBuf;
use std::process::ExitCode;

use crate::app::App;
use crate::app::reload::Origin;
#[cfg(feature = "otlp")]
use crate::app::traces;
use crate::clock::Clock;
use crate::config::{self, Config, ConfigError, Flags};
use crate::process::{say, stop_signal};
use crate::redis::{self, Refusal};
use crate::telemetry::logs;
use crate::upstream::http::HttpUpstream;

/// Runs until it is told to stop.
pub(super) async fn run(flags: Flags) -> Result<ExitCode, String> {
    let config = load(&flags)?;
    #[cfg(feature = "otlp")]
    let (traces, besides) = traces::start()?.unzip();
    #[cfg(not(feature = "otlp"))]
    let besides = None;
    logs::start(&config.log, redis::QUIET, besides)?;
    let stop = stop_signal()?;
    let app = App::bind(config)?;
    let file = flags.config.clone().or_else(|| Some(PathBuf::from("sidecache.toml")).filter(|here| here.exists()));
    app.reload_from(Origin { file, load: Box::new(move || load(&flags)) });
    for line in app.lines() {
        say(line);
    }
    let cut = app.run(stop).await;
    #[cfg(feature = "otlp")]
    if let Some(traces) = traces {
        traces.finish().await;
    }
    if cut > 0 {
        tracing::warn!(cut, "connections were still open when the grace had passed");
    }
    Ok(ExitCode::SUCCESS)
}

/// Says whether a configuration is good. A Redis that does not answer is no fault of the configuration; one that
/// refuses it is.
pub(super) async fn check(config: Option<PathBuf>) -> Result<ExitCode, String> {
    let flags = Flags { config, ..Flags::default() };
    let config = load(&flags)?;
    logs::filter(&config.log, redis::QUIET)?;
    for upstream in &config.upstreams {
        HttpUpstream::new(upstream, Clock::start()).map_err(|e| format!("upstream {}: {e}", upstream.name))?;
        let rules = if upstream.rules == 1 { "1 rule".into() } else { format!("{} rules", upstream.rules) };
        say(format!("upstream {}: profile {}, {rules}", upstream.name, upstream.profile));
    }
    if let Some(redis) = &config.redis {
        match redis::probe(redis).await {
            Ok(line) => say(line),
            Err(Refusal::Absent(why)) => {
                say(format!("warning: {why}: until it answers everything is kept in memory"));
            }
            Err(Refusal::Wrong(why)) => return Err(why),
        }
    }
    for warning in config::warnings(&config) {
        say(format!("warning: {warning}"));
    }
    for note in &config.notes {
        say(format!("note: {note}"));
    }
    say(format!("{}: ok", config.source));
    Ok(ExitCode::SUCCESS)
}

fn load(flags: &Flags) -> Result<Config, String> {
    config::load(flags).map_err(|found| errors(&found))
}

/// All that is wrong with a configuration.
pub(super) fn errors(errors: &[ConfigError]) -> String {
    let text: Vec<String> = errors.iter().map(ConfigError::to_string).collect();
    let more = if errors.len() > 1 { format!("\n{} errors", errors.len()) } else { String::new() };
    text.join("\n") + &more
}
