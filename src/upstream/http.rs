//! The real upstream: a pooled HTTP client with time limits, and suspicion.

use std::future::Future;
use std::io::ErrorKind;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::header::UPGRADE;
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

use super::casing::Casings;
use super::connect::{CONNECT_TIMED_OUT, Connector, NoPlace, Terms};
use super::flaws::flaw;
use super::tap::{Flawed, MAX_HEAD, Overrun, Tap};
use super::{Heard, MayBeStored, SendError, Sending, Upstream};
use crate::body::tunnel::{Duplex, Tunnel};
use crate::body::{Body, BodyError};
use crate::clock::Clock;
use crate::config::{self, Pool, Target, Timeouts};
use crate::policy::head::Casing;
use crate::policy::outcome::Failure;
use crate::policy::retry::Ended;
use crate::tls;

/// For a client without limits of its own.
const MANY: usize = 1 << 20;

/// An idle connection is closed after this.
const IDLE: Duration = Duration::from_secs(60);

/// An HTTP/2 connection that carries streams is asked so often whether it lives, and must answer in time.
const PING_EVERY: Duration = Duration::from_secs(20);
const PING_ANSWER: Duration = Duration::from_secs(10);

/// The upstream behind one listener.
pub struct HttpUpstream {
    client: Client<Connector, Body>,
    casings: Casings,
    timeouts: Timeouts,
    /// DNS is asked again under steady traffic too.
    max_age: Duration,
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
        let terms = Terms {
            limit: config.timeouts.connect,
            // Before the one who waits for the answer gives up: then it is known that nothing was sent.
            patience: config.timeouts.first_byte.mul_f64(0.9),
            most: config.pool.connections,
            http2: config.http2,
            guarded: matches!(config.target, Target::Hosts(_)),
        };
        // The system's certificates take a megabyte or two to read.
        let speaks_tls = !matches!(&config.target, Target::Origin { scheme, .. } if *scheme == Scheme::HTTP);
        let tls = if speaks_tls { tls::client_config(&config.tls) } else { tls::unused_client_config() };
        Ok(Self::client(config.timeouts, tls?, &terms, config.pool, clock))
    }

    /// A client for anything else.
    pub fn plain(timeouts: Timeouts, clock: Clock) -> Result<HttpUpstream, String> {
        let pool = Pool { connections: MANY, idle: MANY, max_age: Duration::from_hours(1) };
        let terms =
            Terms { limit: timeouts.connect, patience: timeouts.connect, most: MANY, http2: false, guarded: false };
        Ok(Self::client(timeouts, tls::client_config(&config::Tls::default())?, &terms, pool, clock))
    }

    fn client(timeouts: Timeouts, tls: ClientConfig, terms: &Terms, pool: Pool, clock: Clock) -> HttpUpstream {
        let connector = Connector::new(terms, tls, clock.clone());
        let client = Client::builder(TokioExecutor::new())
            .timer(TokioTimer::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE)
            .pool_max_idle_per_host(pool.idle)
            .http1_preserve_header_case(true)
            .http1_title_case_headers(true)
            .http1_max_buf_size(MAX_HEAD)
            .set_host(false)
            .http2_keep_alive_interval(PING_EVERY)
            .http2_keep_alive_timeout(PING_ANSWER)
            .build(connector);
        HttpUpstream { client, casings: Casings::default(), timeouts, max_age: pool.max_age, clock }
    }

    async fn exchange(&self, mut request: Request<Body>) -> Result<Response<Body>, SendError> {
        let connection = capture_connection(&mut request);
        let may_be_stored = request.extensions_mut().remove::<MayBeStored>().is_some();
        if let Some(heard) = request.extensions_mut().remove::<Heard>() {
            on_informational(&mut request, move |interim| heard.hear(interim.status(), interim.headers()));
        }
        let head_only = request.method() == http::Method::HEAD;
        let asked_upgrade = request.headers().contains_key(UPGRADE);
        let answer = timeout(self.timeouts.first_byte, self.client.request(request)).await;
        let mut response = match answer {
            Ok(Ok(response)) => response,
            Ok(Err(error)) => return Err(send_error(&error)),
            Err(_elapsed) => {
                let message = "no response head within timeouts.first_byte";
                let late = SendError::unanswered(Failure::Timeout, message);
                return Err(SendError { silent: true, ..late });
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
        if let Some(why) = malformed(&response) {
            poison(&connection);
            return Err(SendError::unanswered(Failure::Malformed, why));
        }
        if let Some(tap) = &tap {
            if self.clock.now() > tap.opened.plus(self.max_age) {
                poison(&connection);
            }
            if may_be_stored && let Some(casing) = self.casings.of(&tap.head()).await {
                response.extensions_mut().insert(casing);
            }
        }
        let idle = self.timeouts.idle;
        if let Some(tap) = tap.as_ref().filter(|_| response.body().is_end_stream()) {
            tap.finished();
        }
        Ok(response.map(|body| {
            let guarded = Guarded { body, idle, pause: None, tap };
            if head_only { Body::Empty } else { Body::stream(guarded) }
        }))
    }
}

impl Upstream for HttpUpstream {
    fn casing<'a>(&'a self, names: &'a [u8]) -> Pin<Box<dyn Future<Output = Option<Casing>> + Send + 'a>> {
        Box::pin(self.casings.of_names(names))
    }

    fn send(&self, request: Request<Body>) -> Sending<'_> {
        Box::pin(self.exchange(request))
    }
}

fn tunnel(upgrade: hyper::upgrade::OnUpgrade) -> Tunnel {
    Tunnel::new(async move {
        let upgraded = upgrade.await.map_err(std::io::Error::other)?;
        Ok(Box::new(TokioIo::new(upgraded)) as Box<dyn Duplex>)
    })
}

/// Its connection is not to be used again.
fn poison(connection: &CaptureConnection) {
    if let Some(connected) = connection.connection_metadata().as_ref() {
        connected.poison();
    }
}

/// What is wrong with an answer that the HTTP library takes. Over HTTP/1 the tap looks for flaws before it, and ends the
/// connection; this is for HTTP/2, and for heads with bare line feeds, which the tap does not read.
fn malformed(response: &Response<Incoming>) -> Option<&'static str> {
    let fields = response.headers().iter().map(|(name, value)| (name.as_str().as_bytes(), value.as_bytes()));
    match response.status() {
        StatusCode::SWITCHING_PROTOCOLS => Some("101 Switching Protocols, which nobody asked for"),
        _ => flaw(response.version() == Version::HTTP_10, fields),
    }
}

fn send_error(error: &ClientError) -> SendError {
    let mut message = error.to_string();
    let mut source = std::error::Error::source(error);
    let (mut malformed, mut client, mut timed_out, mut crowded) = (false, None, false, false);
    while let Some(cause) = source {
        message = format!("{message}: {cause}");
        if let Some(hyper) = cause.downcast_ref::<hyper::Error>() {
            malformed |= hyper.is_parse();
        }
        let io = cause.downcast_ref::<std::io::Error>();
        malformed |= io.and_then(std::io::Error::get_ref).and_then(|why| why.downcast_ref::<Flawed>()).is_some();
        timed_out |= io.is_some_and(|io| io.kind() == ErrorKind::TimedOut);
        crowded |= cause.is::<NoPlace>();
        client = client.or_else(|| cause.downcast_ref::<BodyError>().copied());
        source = cause.source();
    }
    timed_out |= crowded || message.contains(CONNECT_TIMED_OUT);
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
    SendError { failure, ended, client, silent: error.is_connect() && !crowded, message }
}

/// The answer's body: an error if it stands still, ends early, or is followed by what looks like another answer.
struct Guarded {
    body: Incoming,
    idle: Duration,
    pause: Option<Pin<Box<Sleep>>>,
    tap: Option<Arc<Tap>>,
}

impl Guarded {
    fn overrun(&self) -> Option<Overrun> {
        self.tap.as_ref().and_then(|tap| tap.overrun())
    }
}

impl HttpBody for Guarded {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match Pin::new(&mut self.body).poll_frame(cx) {
            Poll::Ready(next) => {
                self.pause = None;
                if let Some(tap) = self.tap.as_ref().filter(|_| next.is_none() || self.body.is_end_stream()) {
                    tap.finished();
                }
                Poll::Ready(match next {
                    Some(Ok(frame)) => Some(Ok(frame)),
                    Some(Err(_)) => Some(Err(BodyError::Upstream(Failure::Connect))),
                    None if self.overrun() == Some(Overrun::Answer) => {
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
        self.body.is_end_stream() && self.overrun() != Some(Overrun::Answer)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
