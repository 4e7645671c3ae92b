//! Log lines on stderr, for people or as JSON. Stdout belongs to the first lines of a start.

use std::fmt;
use std::io::IsTerminal;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use tracing::{Event, Subscriber};
use tracing_subscriber::filter::EnvFilter;
use tracing_subscriber::fmt::format::{Compact, Format, Json, Writer};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::{Layered, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry, reload};

/// Who else hears of what happens: the exporter of traces.
pub type ExtraLayer = Option<Box<dyn Layer<Registry> + Send + Sync>>;

static FILTER: OnceLock<reload::Handle<EnvFilter, Layered<ExtraLayer, Registry>>> = OnceLock::new();
static AS_JSON: AtomicBool = AtomicBool::new(false);

/// Starts logging. `RUST_LOG` beats the configuration. `quiet`: what is said of libraries unless one of them names them.
pub fn start(config: &LogConfig, quiet: &str, besides: ExtraLayer) -> Result<(), String> {
    let (filter, handle) = reload::Layer::new(filter(config, quiet)?);
    AS_JSON.store(config.json, Ordering::Relaxed);
    let lines = tracing_subscriber::fmt::layer()
        .with_ansi(std::io::stderr().is_terminal())
        .event_format(LineFormat { human: Format::default().with_target(false).compact(), json: json() })
        .with_writer(std::io::stderr)
        .with_filter(filter);
    tracing_subscriber::registry().with(besides).with(lines).init();
    let _ = FILTER.set(handle);
    Ok(())
}

fn json() -> Format<Json> {
    Format::default().json().flatten_event(true)
}

/// What to log. The error names the filter.
pub fn filter(config: &LogConfig, quiet: &str) -> Result<EnvFilter, String> {
    let wanted = std::env::var("RUST_LOG").unwrap_or_else(|_| config.filter.clone());
    EnvFilter::try_new(format!("{quiet},{wanted}")).map_err(|e| format!("log filter {wanted:?}: {e}"))
}

/// Another way of logging, ready to take effect.
#[derive(Debug)]
pub struct PreparedLog {
    filter: EnvFilter,
    json: bool,
}

/// Reads another way of logging.
pub fn prepared(config: &LogConfig, quiet: &str) -> Result<PreparedLog, String> {
    Ok(PreparedLog { filter: filter(config, quiet)?, json: config.json })
}

impl PreparedLog {
    /// From now on it counts, if this process logs at all.
    pub fn take_effect(self) {
        if let Some(handle) = FILTER.get() {
            let _ = handle.reload(self.filter);
            AS_JSON.store(self.json, Ordering::Relaxed);
        }
    }
}

/// Lines for people, or JSON, whichever is wanted now.
struct LineFormat {
    human: Format<Compact>,
    json: Format<Json>,
}

impl<S, N> FormatEvent<S, N> for LineFormat
where
    S: Subscriber + for<'l> LookupSpan<'l>,
    N: for<'w> FormatFields<'w> + 'static,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        if AS_JSON.load(Ordering::Relaxed) {
            self.json.format_event(context, writer, event)
        } else {
            self.human.format_event(context, writer, event)
        }
    }
}

/// How to log.
#[derive(Debug, Clone)]
pub struct LogConfig {
    /// A filter like `info` or `sidecache=debug,hyper=warn`.
    pub filter: String,
    /// One JSON object a line.
    pub json: bool,
}
