//! Log output on stderr, as text or JSON. Stdout is reserved for the first lines at startup.

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

/// An additional layer that receives events and spans: the trace exporter.
pub type ExtraLayer = Option<Box<dyn Layer<Registry> + Send + Sync>>;

static FILTER: OnceLock<reload::Handle<EnvFilter, Layered<ExtraLayer, Registry>>> = OnceLock::new();
static AS_JSON: AtomicBool = AtomicBool::new(false);

/// Starts logging. `RUST_LOG` takes precedence over the configuration. `quiet`: filter directives for libraries, which
/// apply unless `RUST_LOG` or the configuration names those libraries. `besides`: an additional layer.
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

/// Returns the log filter. The error names the invalid filter.
pub fn filter(config: &LogConfig, quiet: &str) -> Result<EnvFilter, String> {
    let wanted = std::env::var("RUST_LOG").unwrap_or_else(|_| config.filter.clone());
    EnvFilter::try_new(format!("{quiet},{wanted}")).map_err(|e| format!("log filter {wanted:?}: {e}"))
}

/// A log configuration that is parsed and can take effect.
#[derive(Debug)]
pub struct PreparedLog {
    filter: EnvFilter,
    json: bool,
}

/// Parses a log configuration. The error names the invalid filter.
pub fn prepared(config: &LogConfig, quiet: &str) -> Result<PreparedLog, String> {
    Ok(PreparedLog { filter: filter(config, quiet)?, json: config.json })
}

impl PreparedLog {
    /// Makes this the active log configuration. Does nothing if logging was not started.
    pub fn take_effect(self) {
        if let Some(handle) = FILTER.get() {
            let _ = handle.reload(self.filter);
            AS_JSON.store(self.json, Ordering::Relaxed);
        }
    }
}

/// The line format: text or JSON, according to the active log configuration.
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

/// The log configuration.
#[derive(Debug, Clone)]
pub struct LogConfig {
    /// The filter, such as `info` or `sidecache=debug,hyper=warn`.
    pub filter: String,
    /// Whether to write one JSON object per line.
    pub json: bool,
}
