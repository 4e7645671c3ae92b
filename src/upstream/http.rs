//! The real upstream: a pooled HTTP/1.1 client with time limits, the one safe retry, and suspicion.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_LENGTH, HeaderMap, TRANSFER_ENCODING, UPGRADE};
use http::uri::Uri;
use http::{Request, Response, StatusCode, Version};
use http_body::{Body as HttpBody, Frame, SizeHint};
use hyper::body::Incoming;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder, MaybeHttpsStream};
use hyper_util::client::legacy::connect::{
    CaptureConnection, Connected, Connection, HttpConnector, HttpInfo, capture_connection,
};
use hyper_util::client::legacy::{Client, Error as ClientError};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::TcpStream;
use tokio::time::{Sleep, timeout};
use tower_service::Service;

use super::casing::Casings;
use super::resolve::Resolver;
use super::tap::{Tap, Tapped};
use super::{SendError, Sending, Upstream};
use crate::body::tunnel::{Duplex, Tunnel};
use crate::body::{Body, BodyError};
use crate::clock::Clock;
use crate::config::{self, Target, Timeouts};
use crate::policy::entry::Casing;
use crate::policy::outcome::Failure;
use crate::policy::retry::{Ended, Retry};
use crate::tls;

/// Idle connections kept for one host.
const MAX_IDLE: usize = 64;

/// An idle connection is closed after this.
const IDLE: Duration = Duration::from_secs(60);

/// An older connection is not used again, so that DNS is asked again under steady traffic too.
const MAX_AGE: Duration = Duration::from_mins(5);

/// An HTTP/2 connection that carries streams is asked so often whether it lives, and must answer in time.
const PING_EVERY: Duration = Duration::from_secs(20);
const PING_ANSWER: Duration = Duration::from_secs(10);

/// A larger response head is malformed.
const MAX_HEAD: usize = 128 << 10;

/// The upstream behind one listener.
pub struct HttpUpstream {
    client: Client<Connector, Body>,
    casings: Casings,
    timeouts: Timeouts,
    retry: Retry,
    clock: Clock,
}

impl std::fmt::Debug for HttpUpstream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HttpUpstream").field("timeouts", &self.timeouts).finish_non_exhaustive()
    }
}

impl HttpUpstream {
    /// The client of a configured upstream. Fails if certificates can't be read.
    pub fn new(config: &config::Upstream, clock: Clock) -> Result<HttpUpstream, String> {
        let guarded = matches!(config.target, Target::Hosts(_));
        Self::client(config.timeouts, config.retry, &config.tls, guarded, config.http2, clock)
    }

    /// A client for anything else, which never retries.
    pub fn plain(timeouts: Timeouts, clock: Clock) -> Result<HttpUpstream, String> {
        let retry = Retry { attempts: 1, base: Duration::ZERO, cap: Duration::ZERO };
        Self::client(timeouts, retry, &config::Tls::default(), false, false, clock)
    }

    fn client(
        timeouts: Timeouts,
        retry: Retry,
        tls: &config::Tls,
        guarded: bool,
        http2: bool,
        clock: Clock,
    ) -> Result<HttpUpstream, String> {
        let mut tcp = HttpConnector::new_with_resolver(Resolver::new(guarded));
        tcp.set_nodelay(true);
        tcp.enforce_http(false);
        tcp.set_keepalive(Some(Duration::from_secs(30)));
        tcp.set_connect_timeout(Some(timeouts.connect));
        let secure = HttpsConnectorBuilder::new().with_tls_config(tls::client_config(tls)?).https_or_http();
        let secure = if http2 {
            secure.enable_all_versions().wrap_connector(tcp)
        } else {
            secure.enable_http1().wrap_connector(tcp)
        };
        let connector = Connector { secure, limit: timeouts.connect, http2, clock: clock.clone() };
        let client = Client::builder(TokioExecutor::new())
            .timer(TokioTimer::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE)
            .pool_max_idle_per_host(MAX_IDLE)
            .http1_preserve_header_case(true)
            .http1_title_case_headers(true)
            .http1_max_buf_size(MAX_HEAD)
            .set_host(false)
            .http2_keep_alive_interval(PING_EVERY)
            .http2_keep_alive_timeout(PING_ANSWER)
            .build(connector);
        Ok(HttpUpstream { client, casings: Casings::default(), timeouts, retry, clock })
    }

    async fn attempt(&self, mut request: Request<Body>) -> Result<Response<Body>, SendError> {
        let connection = capture_connection(&mut request);
        let head_only = request.method() == http::Method::HEAD;
        let asked_upgrade = request.headers().contains_key(UPGRADE);
        let answer = timeout(self.timeouts.first_byte, self.client.request(request)).await;
        let mut response = match answer {
            Ok(Ok(response)) => response,
            Ok(Err(error)) => return Err(send_error(&error)),
            Err(_elapsed) => {
                return Err(SendError::unanswered(Failure::Timeout, "no response head within timeouts.first_byte"));
            }
        };
        let tap = response.extensions_mut().remove::<Arc<Tap>>();
        response.extensions_mut().remove::<HttpInfo>();
        if asked_upgrade && response.status() == StatusCode::SWITCHING_PROTOCOLS {
            let tunnel = tunnel(hyper::upgrade::on(&mut response));
            let mut response = response.map(|_nothing| Body::Empty);
            response.extensions_mut().insert(tunnel);
            return Ok(response);
        }
        if let Some(why) = malformed(response.version(), response.status(), response.headers()) {
            poison(&connection);
            return Err(SendError::unanswered(Failure::Malformed, why));
        }
        if let Some(tap) = &tap {
            if self.clock.now() > tap.opened.plus(MAX_AGE) {
                poison(&connection);
            }
            if let Some(casing) = self.casings.of(&tap.head()).await {
                response.extensions_mut().insert(casing);
            }
        }
        let idle = self.timeouts.idle;
        Ok(response.map(
            |body| {
                if head_only { Body::Empty } else { Body::stream(Guarded { body, idle, pause: None, tap }) }
            },
        ))
    }
}

impl Upstream for HttpUpstream {
    fn casing<'a>(&'a self, names: &'a [u8]) -> Pin<Box<dyn Future<Output = Option<Casing>> + Send + 'a>> {
        Box::pin(self.casings.of_names(names))
    }

    fn send(&self, request: Request<Body>) -> Sending<'_> {
        Box::pin(async move {
            let (parts, mut body) = request.into_parts();
            let mut made = 0;
            loop {
                let copy = body.try_clone();
                let result = self.attempt(Request::from_parts(parts.clone(), body)).await;
                made += 1;
                let (Err(error), Some(again)) = (&result, copy) else { return result };
                let jitter = f64::from(getrandom::u32().unwrap_or(0)) / f64::from(u32::MAX);
                let Some(pause) = self.retry.pause(&parts.method, error.ended, made, jitter) else { return result };
                tokio::time::sleep(pause).await;
                body = again;
            }
        })
    }
}

fn tunnel(upgrade: hyper::upgrade::OnUpgrade) -> Tunnel {
    Tunnel::new(async move {
        let upgraded = upgrade.await.map_err(std::io::Error::other)?;
        Ok(Box::new(TokioIo::new(upgraded)) as Box<dyn Duplex>)
    })
}

fn poison(connection: &CaptureConnection) {
    if let Some(connected) = connection.connection_metadata().as_ref() {
        connected.poison();
    }
}

/// What the HTTP library lets pass and we don't: RFC 9112 §6.1, §6.3; an upgrade that nobody asked for.
fn malformed(version: Version, status: StatusCode, headers: &HeaderMap) -> Option<&'static str> {
    let mut lengths = headers.get_all(CONTENT_LENGTH).iter();
    let (first, more) = (lengths.next(), lengths.next().is_some());
    let encodings = headers.get_all(TRANSFER_ENCODING).iter().count();
    let chunked = headers.get(TRANSFER_ENCODING).is_none_or(|te| te.as_bytes().eq_ignore_ascii_case(b"chunked"));
    if more || first.is_some_and(|value| !value.as_bytes().iter().all(u8::is_ascii_digit)) {
        Some("the answer has more than one Content-Length, or one that is no number")
    } else if first.is_some() && encodings > 0 {
        Some("the answer has both Content-Length and Transfer-Encoding")
    } else if encodings > 1 || !chunked {
        Some("the answer has a Transfer-Encoding other than chunked")
    } else if version == Version::HTTP_10 && encodings > 0 {
        Some("an HTTP/1.0 answer has a Transfer-Encoding")
    } else if status == StatusCode::SWITCHING_PROTOCOLS {
        Some("101 Switching Protocols, which nobody asked for")
    } else {
        None
    }
}

fn send_error(error: &ClientError) -> SendError {
    let mut message = error.to_string();
    let mut source = std::error::Error::source(error);
    let (mut malformed, mut client, mut timed_out) = (false, None, false);
    while let Some(cause) = source {
        message = format!("{message}: {cause}");
        if let Some(hyper) = cause.downcast_ref::<hyper::Error>() {
            malformed |= hyper.is_parse();
        }
        timed_out |= cause.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::TimedOut);
        client = client.or_else(|| cause.downcast_ref::<BodyError>().copied());
        source = cause.source();
    }
    timed_out |= message.contains(CONNECT_TIMED_OUT);
    let failure = match (malformed, timed_out) {
        (true, _) => Failure::Malformed,
        (false, true) => Failure::Timeout,
        (false, false) => Failure::Connect,
    };
    let mut extras = http::Extensions::new();
    if let Some(connected) = error.connect_info() {
        connected.get_extras(&mut extras);
    }
    let reused = extras.get::<Arc<Tap>>().is_some_and(|tap| tap.died_idle());
    let ended = if error.is_connect() {
        Ended::Unsent
    } else if reused && !malformed {
        Ended::ReusedConnectionDied
    } else {
        Ended::Otherwise
    };
    SendError { failure, ended, client, message }
}

/// The answer's body: an error if it stands still, ends early, or is followed by more than was announced.
struct Guarded {
    body: Incoming,
    idle: Duration,
    pause: Option<Pin<Box<Sleep>>>,
    tap: Option<Arc<Tap>>,
}

impl HttpBody for Guarded {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match Pin::new(&mut self.body).poll_frame(cx) {
            Poll::Ready(next) => {
                self.pause = None;
                let overrun = || self.tap.as_ref().is_some_and(|tap| tap.overrun());
                Poll::Ready(match next {
                    Some(Ok(frame)) => Some(Ok(frame)),
                    Some(Err(_)) => Some(Err(BodyError::Upstream(Failure::Connect))),
                    None if overrun() => Some(Err(BodyError::Upstream(Failure::Malformed))),
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
        self.body.is_end_stream() && !self.tap.as_ref().is_some_and(|tap| tap.overrun())
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

const CONNECT_TIMED_OUT: &str = "no connection within timeouts.connect";

/// DNS, TCP and TLS under one limit, with a tap on what comes out.
#[derive(Clone)]
struct Connector {
    secure: HttpsConnector<HttpConnector<Resolver>>,
    limit: Duration,
    /// Whether to speak HTTP/2.
    http2: bool,
    clock: Clock,
}

/// A connection to the upstream.
struct Wire {
    io: TokioIo<Tapped<TokioIo<MaybeHttpsStream<TokioIo<TcpStream>>>>>,
    http2: bool,
}

type BoxError = Box<dyn std::error::Error + Send + Sync>;

impl Service<Uri> for Connector {
    type Response = Wire;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Wire, BoxError>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.secure.poll_ready(cx)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let connecting = self.secure.call(uri);
        let (limit, clock, may_http2) = (self.limit, self.clock.clone(), self.http2);
        Box::pin(async move {
            let stream = timeout(limit, connecting).await.map_err(|_| BoxError::from(CONNECT_TIMED_OUT))??;
            // Over TLS both sides agree on it; without, we just do.
            let http2 = match &stream {
                MaybeHttpsStream::Http(_) => may_http2,
                MaybeHttpsStream::Https(_) => stream.connected().is_negotiated_h2(),
            };
            let tapped = Tapped { inner: TokioIo::new(stream), tap: Tap::new(clock.now(), !http2) };
            Ok(Wire { io: TokioIo::new(tapped), http2 })
        })
    }
}

impl Connection for Wire {
    fn connected(&self) -> Connected {
        let tapped = self.io.inner();
        let connected = tapped.inner.inner().connected().extra(tapped.tap.clone());
        if self.http2 { connected.negotiated_h2() } else { connected }
    }
}

impl hyper::rt::Read for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: hyper::rt::ReadBufCursor<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl hyper::rt::Write for Wire {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }
}
