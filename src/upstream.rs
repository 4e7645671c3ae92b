//! The upstream client interface: sends a request, returns a response or an error.

pub mod client;
mod closing_habit;
mod connector;
mod header_case;
mod resolver;
mod response_framing;
mod response_monitor;

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, Request, Response, StatusCode};

use crate::body::{Body, BodyError};
use crate::policy::outcome::Failure;
use crate::policy::packed_head::HeaderCase;
use crate::policy::resilience::retry::RetrySafety;
use crate::policy::routing::origin::Origin;
use crate::tls::ClientTls;

/// A future that resolves to a response or an error.
pub type Sending<'a> = Pin<Box<dyn Future<Output = Result<Response<Body>, SendError>> + Send + 'a>>;

/// A client that sends requests to an upstream. The real one is [`client::PooledClient`]; tests use scripted ones.
pub trait UpstreamClient: fmt::Debug + Send + Sync + 'static {
    /// Sends a request whose URI is absolute. The response body fails with
    /// [`BodyError::Upstream`] if it ends early or exceeds the idle timeout.
    fn send(&self, request: Request<Body>) -> Sending<'_>;

    /// Returns the case in which the upstream writes these field names (one per line), or `None` for Title-Case.
    fn header_case<'a>(&'a self, _names: &'a [u8]) -> Pin<Box<dyn Future<Output = Option<HeaderCase>> + Send + 'a>> {
        Box::pin(std::future::ready(None))
    }
}

/// Request extension: the response may be stored, so it must carry its [`HeaderCase`].
#[derive(Debug, Clone, Copy)]
pub struct RecordHeaderCase;

/// Request extension: the request goes out on a connection of its own, which was not used before.
#[derive(Debug, Clone, Copy)]
pub struct FreshConnection;

/// A receiver of informational responses (1xx, RFC 9110 §15.2).
pub trait InformationalSink: fmt::Debug + Send + Sync {
    /// Returns the number of the request whose response is pending.
    fn current_request(&self) -> u64;

    /// Sends an informational response to the request with the number `turn`.
    fn send_informational(&self, turn: u64, status: StatusCode, headers: &HeaderMap);
}

/// Request extension: forwards the informational responses to this request.
#[derive(Debug, Clone)]
pub struct InformationalSender {
    sink: Arc<dyn InformationalSink>,
    current_request: u64,
}

impl InformationalSender {
    /// Returns a sender for the current request of `sink`.
    pub fn new(sink: &Arc<dyn InformationalSink>) -> InformationalSender {
        InformationalSender { sink: sink.clone(), current_request: sink.current_request() }
    }

    /// Forwards an informational response.
    fn send_informational(&self, status: StatusCode, headers: &HeaderMap) {
        // 100 (Continue) concerns only the connection to the upstream: the proxy sends the client its own.
        if status != StatusCode::CONTINUE {
            self.sink.send_informational(self.current_request, status, headers);
        }
    }
}

/// The error of a request that got no response.
#[derive(Debug, Clone)]
pub struct SendError {
    /// The kind of failure.
    pub failure: Failure,
    /// Whether the request may have had an effect.
    pub retry_safety: RetrySafety,
    /// Set if the client's request body failed.
    pub client: Option<BodyError>,
    /// Whether the upstream seems unreachable: no connection, or no response head in time.
    pub unreachable: bool,
    /// The message for the log.
    pub message: String,
}

impl SendError {
    /// Returns the error of a request that got no response but may have had an effect.
    pub fn unanswered(failure: Failure, message: impl Into<String>) -> SendError {
        SendError {
            failure,
            retry_safety: RetrySafety::Otherwise,
            client: None,
            unreachable: false,
            message: message.into(),
        }
    }
}

impl SendError {
    /// Returns true if the proxy tried to reach the upstream.
    pub fn was_tried(&self) -> bool {
        let held_back = matches!(self.failure, Failure::Throttled | Failure::Unavailable);
        !held_back || self.retry_safety != RetrySafety::Unsent
    }
}

impl fmt::Display for SendError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for SendError {}

/// Time limits of an upstream.
#[derive(Debug, Clone, Copy)]
pub struct Timeouts {
    /// DNS, TCP and TLS together.
    pub connect: Duration,
    /// From sending the request to the response head.
    pub first_byte: Duration,
    /// Between two chunks of a body.
    pub idle: Duration,
    /// For a whole fetch whose response is being stored.
    pub fetch: Duration,
}

/// Limits of the connection pool of an upstream.
#[derive(Debug, Clone, Copy)]
pub struct PoolLimits {
    /// Maximum number of connections per host. Further requests wait for a free one.
    pub connections: usize,
    /// Maximum number of idle connections kept per host.
    pub idle: usize,
    /// Maximum age of a connection. An older one is not reused.
    pub max_age: Duration,
}

/// The settings of an upstream's client.
#[derive(Debug, Clone)]
pub struct ClientSettings {
    /// The origins that requests go to.
    pub origin: Origin,
    /// Time limits.
    pub timeouts: Timeouts,
    /// Connection limits.
    pub pool: PoolLimits,
    /// TLS settings of connections to the upstream.
    pub tls: ClientTls,
    /// Whether to use HTTP/2 to the upstream.
    pub http2: bool,
}
