//! Log output on stderr, as text or JSON. Stdout is reserved for the first lines at startup.
//!
//! Lines go through a bounded queue to a thread of their own, so that a reader of stderr that stands still stalls no
//! request. Lines that find the queue full are dropped and counted.

use std::fmt;
use std::io::IsTerminal;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

use tracing::{Event, Level, Subscriber, warn};
use tracing_appender::non_blocking::{ErrorCounter, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::filter::EnvFilter;
use tracing_subscriber::fmt::format::{Compact, Format, Json, Writer};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::{Layered, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry, reload};

use crate::policy::millis;

/// An additional layer that receives events and spans: the trace exporter.
pub type ExtraLayer = Option<Box<dyn Layer<Registry> + Send + Sync>>;

static FILTER: OnceLock<reload::Handle<EnvFilter, Layered<ExtraLayer, Registry>>> = OnceLock::new();
static AS_JSON: AtomicBool = AtomicBool::new(false);
static REQUESTS: AtomicU8 = AtomicU8::new(LoggedRequests::Failures as u8);
static SLOW_MS: AtomicU64 = AtomicU64::new(u64::MAX);
static DROPPED: OnceLock<ErrorCounter> = OnceLock::new();
static DROPPED_TOLD: AtomicU64 = AtomicU64::new(0);

/// Capacity of the queue, in lines.
const QUEUE_LINES: usize = 8_192;

/// Writes the lines in the queue when it is dropped, unless the reader of stderr stands still.
#[derive(Debug)]
pub struct FlushOnDrop(#[expect(dead_code, reason = "held for its Drop")] WorkerGuard);

/// The requests that are logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoggedRequests {
    /// None.
    Off,
    /// Failures, refusals, and slow ones.
    Failures,
    /// All that were not served from the cache.
    Misses,
    /// All.
    All,
}

impl LoggedRequests {
    /// All values with their names in the configuration.
    pub const NAMES: [(&'static str, LoggedRequests); 4] = [
        ("failures", LoggedRequests::Failures),
        ("misses", LoggedRequests::Misses),
        ("all", LoggedRequests::All),
        ("off", LoggedRequests::Off),
    ];

    /// Returns the name in the configuration.
    pub fn name(self) -> &'static str {
        Self::NAMES.into_iter().find(|(_, requests)| *requests == self).map_or("", |(name, _)| name)
    }
}

/// Returns the level at which a request is logged, or `None` if it is not. `level`: that of its outcome, where hits are
/// `DEBUG`. `refused`: it was not answered as asked.
pub fn level_of_request(level: Level, refused: bool, took: Duration) -> Option<Level> {
    let requests = REQUESTS.load(Ordering::Relaxed);
    let failed = level == Level::WARN || refused || took >= Duration::from_millis(SLOW_MS.load(Ordering::Relaxed));
    let chosen = if requests == LoggedRequests::All as u8 {
        true
    } else if requests == LoggedRequests::Misses as u8 {
        failed || level != Level::DEBUG
    } else {
        failed && requests != LoggedRequests::Off as u8
    };
    match level {
        Level::DEBUG if chosen => Some(Level::INFO),
        _ if chosen => Some(level),
        _ => tracing::enabled!(target: "sidecache::access", Level::DEBUG).then_some(Level::DEBUG),
    }
}

/// Returns the number of log lines that were dropped because the queue was full.
pub fn dropped_lines() -> u64 {
    DROPPED.get().map_or(0, |dropped| dropped.dropped_lines() as u64)
}

/// Logs how many lines were dropped, if that has not been told yet.
pub fn tell_dropped_lines() {
    let (dropped, told) = (dropped_lines(), DROPPED_TOLD.load(Ordering::Relaxed));
    if dropped > told {
        warn!("{} log lines were dropped: the reader of stderr is too slow", dropped - told);
        // Unless this line was dropped, too.
        if dropped_lines() == dropped {
            DROPPED_TOLD.store(dropped, Ordering::Relaxed);
        }
    }
}

/// Starts logging. `RUST_LOG` takes precedence over the configuration. `quiet`: filter directives for libraries, which
/// apply unless `RUST_LOG` or the configuration names those libraries. `besides`: an additional layer.
pub fn start(config: &LogConfig, quiet: &str, besides: ExtraLayer) -> Result<FlushOnDrop, String> {
    let (filter, handle) = reload::Layer::new(filter(config, quiet)?);
    config.set();
    let queue = NonBlockingBuilder::default().lossy(true).buffered_lines_limit(QUEUE_LINES).thread_name("log");
    let (writer, guard) = queue.finish(std::io::stderr());
    let _ = DROPPED.set(writer.error_counter());
    let lines = tracing_subscriber::fmt::layer()
        .with_ansi(std::io::stderr().is_terminal())
        .event_format(LineFormat { human: Format::default().with_target(false).compact(), json: json() })
        .with_writer(writer)
        .with_filter(filter);
    tracing_subscriber::registry().with(besides).with(lines).init();
    let _ = FILTER.set(handle);
    Ok(FlushOnDrop(guard))
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
    config: LogConfig,
}

/// Parses a log configuration. The error names the invalid filter.
pub fn prepared(config: &LogConfig, quiet: &str) -> Result<PreparedLog, String> {
    Ok(PreparedLog { filter: filter(config, quiet)?, config: config.clone() })
}

impl PreparedLog {
    /// Makes this the active log configuration. Does nothing if logging was not started.
    pub fn take_effect(self) {
        if let Some(handle) = FILTER.get() {
            let _ = handle.reload(self.filter);
            self.config.set();
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
    /// The requests that are logged.
    pub requests: LoggedRequests,
    /// A request that takes this long is logged with the failures. `None`: however long it takes, it is not.
    pub slow: Option<Duration>,
}

impl LogConfig {
    fn set(&self) {
        AS_JSON.store(self.json, Ordering::Relaxed);
        REQUESTS.store(self.requests as u8, Ordering::Relaxed);
        SLOW_MS.store(self.slow.map_or(u64::MAX, millis), Ordering::Relaxed);
    }
}
