//! The pooled HTTP client of an upstream, with time limits and response validation.

use std::future::Future;
use std::io::ErrorKind;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_LENGTH, HOST, TRANSFER_ENCODING, UPGRADE};
use http::uri::Scheme;
use http::{Request, Response, StatusCode, Version};
use http_body::{Body as HttpBody, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::ext::on_informational;
use hyper_util::client::legacy::connect::{CaptureConnection, HttpInfo, capture_connection};
use hyper_util::client::legacy::{Client, Error as ClientError};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls::ClientConfig;
use tokio::time::{Sleep, timeout};

use super::closing_habit::ClosingHabit;
use super::connector::{CONNECT_TIMED_OUT, Connector, ConnectorLimits, NoFreeConnection};
use super::header_case::HeaderCases;
use super::response_framing::framing_error;
use super::response_monitor::{FramingError, MAX_HEAD, ResponseMonitor, TrailingData};
use super::{
    ClientSettings, FreshConnection, InformationalSender, PoolLimits, RecordHeaderCase, SendError, Sending, Timeouts,
    UpstreamClient,
};
use crate::body::tunnel::{DuplexStream, Tunnel};
use crate::body::{Body, BodyError};
use crate::clock::Clock;
use crate::policy::outcome::Failure;
use crate::policy::packed_head::HeaderCase;
use crate::policy::resilience::retry::RetrySafety;
use crate::policy::routing::origin::Origin;
use crate::tls;
use crate::tls::ClientTls;

/// The pool limit of a client without configured limits.
const UNLIMITED: usize = 1 << 20;

/// Idle timeout of a pooled connection.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);

/// Keep-alive of an HTTP/2 connection with open streams: PING interval, and timeout for its acknowledgement.
const PING_EVERY: Duration = Duration::from_secs(20);
const PING_TIMEOUT: Duration = Duration::from_secs(10);

/// Errors of the HTTP library about requests of which nothing was sent, which it does not mark otherwise: of a connection
/// that turned out to be HTTP/2 while another one to the same host was, too, and of a stream that was waiting to be opened
/// when its connection ended.
const UNSENT_TEXTS: [&str; 2] = ["ALPN upgraded to HTTP/2", "runtime dropped the dispatch task"];

/// The pooled client of one upstream.
pub struct PooledClient {
    client: Client<Connector, Body>,
    /// Does not reuse connections.
    fresh: Client<Connector, Body>,
    habit: Arc<ClosingHabit>,
    /// Whether HTTP/2 may be used: then the library sets Host, if a connection turns out to be HTTP/1.1.
    http2: bool,
    header_cases: HeaderCases,
    timeouts: Timeouts,
    /// Maximum age of a connection, so that DNS is queried again under steady traffic too.
    max_age: Duration,
    clock: Clock,
}

impl std::fmt::Debug for PooledClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HttpUpstream").field("timeouts", &self.timeouts).finish_non_exhaustive()
    }
}

impl PooledClient {
    /// Returns the client of a configured upstream. Fails if certificates can't be read.
    pub fn new(config: &ClientSettings, clock: Clock) -> Result<PooledClient, String> {
        let speaks_tls = !matches!(&config.origin, Origin::Fixed { scheme, .. } if *scheme == Scheme::HTTP);
        let limits = ConnectorLimits {
            connect_timeout: config.timeouts.connect,
            // Shorter than the caller's timeout, so that the caller learns that nothing was sent and may retry.
            slot_timeout: config.timeouts.first_byte.mul_f64(0.9),
            max_connections: config.pool.connections,
            http2: config.http2,
            // Without TLS the version is known in advance.
            http2_only: config.http2 && !speaks_tls,
            refuse_local: matches!(config.origin, Origin::Hosts(_)),
        };
        // Loading the system's certificates takes one to two megabytes.
        let tls = if speaks_tls { tls::client_config(&config.tls) } else { tls::unused_client_config() };
        Ok(Self::client(config.timeouts, tls?, &limits, config.pool, clock))
    }

    /// Returns a client without pool limits, for any other purpose. Fails if certificates can't be read.
    pub fn plain(timeouts: Timeouts, clock: Clock) -> Result<PooledClient, String> {
        let pool = PoolLimits { connections: UNLIMITED, idle: UNLIMITED, max_age: Duration::from_hours(1) };
        let limits = ConnectorLimits {
            connect_timeout: timeouts.connect,
            slot_timeout: timeouts.connect,
            max_connections: UNLIMITED,
            http2: false,
            http2_only: false,
            refuse_local: false,
        };
        Ok(Self::client(timeouts, tls::client_config(&ClientTls::default())?, &limits, pool, clock))
    }

    fn client(
        timeouts: Timeouts,
        tls: ClientConfig,
        limits: &ConnectorLimits,
        pool: PoolLimits,
        clock: Clock,
    ) -> PooledClient {
        let connector = Connector::new(limits, tls, clock.clone());
        let (habit, http2) = (connector.habit.clone(), limits.http2);
        let mut builder = Client::builder(TokioExecutor::new());
        builder
            .timer(TokioTimer::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE_TIMEOUT)
            .http1_preserve_header_case(true)
            .http1_title_case_headers(true)
            .http1_max_buf_size(MAX_HEAD)
            .set_host(http2)
            .http2_only(limits.http2_only)
            .http2_keep_alive_interval(PING_EVERY)
            .http2_keep_alive_timeout(PING_TIMEOUT);
        let client = builder.clone().pool_max_idle_per_host(pool.idle).build(connector.clone());
        let fresh = builder.pool_max_idle_per_host(0).build(connector);
        let header_cases = HeaderCases::default();
        PooledClient { client, fresh, habit, http2, header_cases, timeouts, max_age: pool.max_age, clock }
    }

    async fn exchange(&self, mut request: Request<Body>) -> Result<Response<Body>, SendError> {
        let connection = capture_connection(&mut request);
        let may_be_stored = request.extensions_mut().remove::<RecordHeaderCase>().is_some();
        if let Some(informational) = request.extensions_mut().remove::<InformationalSender>() {
            on_informational(&mut request, move |interim| {
                informational.send_informational(interim.status(), interim.headers());
            });
        }
        let fresh = request.extensions_mut().remove::<FreshConnection>().is_some() || self.habit.holds();
        let client = if fresh { &self.fresh } else { &self.client };
        if self.http2 {
            // The authority of the target says the same (RFC 9113 §8.3.1).
            request.headers_mut().remove(HOST);
        }
        let head_only = request.method() == http::Method::HEAD;
        let wants_upgrade = request.headers().contains_key(UPGRADE);
        let answer = timeout(self.timeouts.first_byte, client.request(request)).await;
        let mut response = match answer {
            Ok(Ok(response)) => response,
            Ok(Err(error)) => {
                let error = send_error(&error);
                if error.retry_safety == RetrySafety::ReusedConnectionDied {
                    self.habit.found_closed();
                }
                return Err(error);
            }
            Err(_elapsed) => {
                let message = "no response head within timeouts.first_byte";
                let late = SendError::unanswered(Failure::Timeout, message);
                return Err(SendError { unreachable: true, ..late });
            }
        };
        let monitor = response.extensions_mut().remove::<Arc<ResponseMonitor>>();
        response.extensions_mut().remove::<HttpInfo>();
        if wants_upgrade && response.status() == StatusCode::SWITCHING_PROTOCOLS {
            let tunnel = tunnel(hyper::upgrade::on(&mut response));
            let mut response = response.map(|_nothing| Body::Empty);
            response.extensions_mut().insert(tunnel);
            return Ok(response);
        }
        if let Some(why) = malformed(&response) {
            poison(&connection);
            return Err(SendError::unanswered(Failure::Malformed, why));
        }
        if response.version() == Version::HTTP_10 {
            // Later requests on it would go out as HTTP/1.0.
            poison(&connection);
        }
        // The version of a message is that of its sender (RFC 9110 §2.5).
        *response.version_mut() = Version::HTTP_11;
        if response.status() == StatusCode::NO_CONTENT {
            // RFC 9110 §8.6. A client would wait for the content.
            response.headers_mut().remove(CONTENT_LENGTH);
            response.headers_mut().remove(TRANSFER_ENCODING);
        }
        if let Some(monitor) = &monitor {
            if self.clock.now() > monitor.opened.plus(self.max_age) {
                poison(&connection);
            }
            if may_be_stored && let Some(header_case) = self.header_cases.for_head(&monitor.head()).await {
                response.extensions_mut().insert(header_case);
            }
        }
        let idle = self.timeouts.idle;
        if let Some(monitor) = monitor.as_ref().filter(|_| response.body().is_end_stream()) {
            monitor.finished();
        }
        Ok(response.map(|body| {
            let guarded = IdleTimeoutBody { body, idle, pause: None, monitor };
            if head_only { Body::Empty } else { Body::stream(guarded) }
        }))
    }
}

impl UpstreamClient for PooledClient {
    fn header_case<'a>(&'a self, names: &'a [u8]) -> Pin<Box<dyn Future<Output = Option<HeaderCase>> + Send + 'a>> {
        Box::pin(self.header_cases.for_names(names))
    }

    fn send(&self, request: Request<Body>) -> Sending<'_> {
        Box::pin(self.exchange(request))
    }
}

fn tunnel(upgrade: hyper::upgrade::OnUpgrade) -> Tunnel {
    Tunnel::new(async move {
        let upgraded = upgrade.await.map_err(std::io::Error::other)?;
        Ok(Box::new(TokioIo::new(upgraded)) as Box<dyn DuplexStream>)
    })
}

/// Excludes a connection from reuse.
fn poison(connection: &CaptureConnection) {
    if let Some(connected) = connection.connection_metadata().as_ref() {
        connected.poison();
    }
}

/// Returns why a response that the HTTP library accepts is malformed. Over HTTP/1 the [`ResponseMonitor`] finds framing
/// errors first and ends the connection; this check is for HTTP/2, and for heads with bare line feeds, which the
/// monitor does not parse.
fn malformed(response: &Response<Incoming>) -> Option<&'static str> {
    let fields = response.headers().iter().map(|(name, value)| (name.as_str().as_bytes(), value.as_bytes()));
    match response.status() {
        StatusCode::SWITCHING_PROTOCOLS => Some("101 Switching Protocols without an Upgrade request"),
        _ => framing_error(response.version() == Version::HTTP_10, fields),
    }
}

fn send_error(error: &ClientError) -> SendError {
    let mut message = error.to_string();
    let mut source = std::error::Error::source(error);
    let (mut malformed, mut client, mut timed_out, mut no_slot) = (false, None, false, false);
    let mut unprocessed = false;
    while let Some(cause) = source {
        message = format!("{message}: {cause}");
        if let Some(hyper) = cause.downcast_ref::<hyper::Error>() {
            malformed |= hyper.is_parse();
            // The connection ended before the request was written to it.
            unprocessed |= hyper.is_canceled();
        }
        unprocessed |= cause.downcast_ref::<h2::Error>().is_some_and(is_unprocessed);
        let io = cause.downcast_ref::<std::io::Error>();
        malformed |=
            io.and_then(std::io::Error::get_ref).and_then(|why| why.downcast_ref::<FramingError>()).is_some();
        timed_out |= io.is_some_and(|io| io.kind() == ErrorKind::TimedOut);
        no_slot |= cause.is::<NoFreeConnection>();
        client = client.or_else(|| cause.downcast_ref::<BodyError>().copied());
        source = cause.source();
    }
    unprocessed |= UNSENT_TEXTS.iter().any(|text| message.contains(text));
    timed_out |= no_slot || message.contains(CONNECT_TIMED_OUT);
    let failure = match (malformed, timed_out) {
        (true, _) => Failure::Malformed,
        (false, true) => Failure::Timeout,
        (false, false) => Failure::Connect,
    };
    let mut extras = http::Extensions::new();
    if let Some(connected) = error.connect_info() {
        connected.get_extras(&mut extras);
    }
    let reused = extras.get::<Arc<ResponseMonitor>>().is_some_and(|monitor| monitor.died_idle());
    let ended = if unprocessed {
        RetrySafety::Unprocessed
    } else if error.is_connect() {
        RetrySafety::Unsent
    } else if reused && !malformed {
        RetrySafety::ReusedConnectionDied
    } else {
        RetrySafety::Otherwise
    };
    SendError { failure, retry_safety: ended, client, unreachable: error.is_connect() && !no_slot, message }
}

/// Returns true if the upstream has not processed the request: its stream is beyond the last one that a GOAWAY names, or
/// was refused (RFC 9113 §6.8, §8.7).
fn is_unprocessed(error: &h2::Error) -> bool {
    error.is_remote() && (error.is_go_away() || error.reason() == Some(h2::Reason::REFUSED_STREAM))
}

/// A response body that fails if it exceeds the idle timeout, ends early, or is followed by what looks like another
/// response.
struct IdleTimeoutBody {
    body: Incoming,
    idle: Duration,
    pause: Option<Pin<Box<Sleep>>>,
    monitor: Option<Arc<ResponseMonitor>>,
}

impl IdleTimeoutBody {
    fn overrun(&self) -> Option<TrailingData> {
        self.monitor.as_ref().and_then(|monitor| monitor.trailing_data())
    }
}

impl HttpBody for IdleTimeoutBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match Pin::new(&mut self.body).poll_frame(cx) {
            Poll::Ready(next) => {
                self.pause = None;
                if let Some(monitor) = self.monitor.as_ref().filter(|_| next.is_none() || self.body.is_end_stream()) {
                    monitor.finished();
                }
                Poll::Ready(match next {
                    Some(Ok(frame)) => Some(Ok(frame)),
                    Some(Err(_)) => Some(Err(BodyError::Upstream(Failure::Connect))),
                    None if self.overrun() == Some(TrailingData::SecondResponse) => {
                        Some(Err(BodyError::Upstream(Failure::Malformed)))
                    }
                    None => None,
                })
            }
            Poll::Pending => {
                let idle = self.idle;
                let pause = self.pause.get_or_insert_with(|| Box::pin(tokio::time::sleep(idle)));
                pause.as_mut().poll(cx).map(|()| Some(Err(BodyError::Upstream(Failure::Timeout))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream() && self.overrun() != Some(TrailingData::SecondResponse)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
