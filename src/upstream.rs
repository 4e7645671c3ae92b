//! The API behind us, as the proxy sees it: requests go in, answers or failures come out.

pub mod client;
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

/// An answer, or none, some time later.
pub type Sending<'a> = Pin<Box<dyn Future<Output = Result<Response<Body>, SendError>> + Send + 'a>>;

/// Something that answers requests. The real one is [`client::PooledClient`]; tests script others.
pub trait UpstreamClient: fmt::Debug + Send + Sync + 'static {
    /// Sends a request whose URI is absolute. The answer's body fails with
    /// [`BodyError::Upstream`] if it ends early or stands still too long.
    fn send(&self, request: Request<Body>) -> Sending<'_>;

    /// How to write these field names (one a line) as the upstream does; none: in Title-Case.
    fn header_case<'a>(&'a self, _names: &'a [u8]) -> Pin<Box<dyn Future<Output = Option<HeaderCase>> + Send + 'a>> {
        Box::pin(std::future::ready(None))
    }
}

/// Goes with a request whose answer may be stored: it is to bring its [`HeaderCase`].
#[derive(Debug, Clone, Copy)]
pub struct RecordHeaderCase;

/// Somebody who hears what is said ahead of answers: interim answers (RFC 9110 §15.2).
pub trait InformationalSink: fmt::Debug + Send + Sync {
    /// Which request is being answered.
    fn current_request(&self) -> u64;

    /// An interim answer to that request.
    fn send_informational(&self, turn: u64, status: StatusCode, headers: &HeaderMap);
}

/// Goes with a request whose interim answers somebody wants to hear.
#[derive(Debug, Clone)]
pub struct InformationalSender {
    sink: Arc<dyn InformationalSink>,
    current_request: u64,
}

impl InformationalSender {
    /// By this ear, for the request that is being answered now.
    pub fn new(sink: &Arc<dyn InformationalSink>) -> InformationalSender {
        InformationalSender { sink: sink.clone(), current_request: sink.current_request() }
    }

    /// Passes one on.
    fn send_informational(&self, status: StatusCode, headers: &HeaderMap) {
        // 100 is between us and the upstream: the client has had its own.
        if status != StatusCode::CONTINUE {
            self.sink.send_informational(self.current_request, status, headers);
        }
    }
}

/// No answer.
#[derive(Debug, Clone)]
pub struct SendError {
    /// What it counts as.
    pub failure: Failure,
    /// Whether the request can have had an effect.
    pub retry_safety: RetrySafety,
    /// Set if it was the client's body that failed.
    pub client: Option<BodyError>,
    /// Nobody is there, it seems: no connection, or no response head in time.
    pub unreachable: bool,
    /// For the log.
    pub message: String,
}

impl SendError {
    /// No answer, and the request may have had an effect.
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
    /// Did anything try to reach the upstream?
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

/// How long an upstream may take.
#[derive(Debug, Clone, Copy)]
pub struct Timeouts {
    /// DNS, TCP and TLS together.
    pub connect: Duration,
    /// From sending the request to the response head.
    pub first_byte: Duration,
    /// Between two pieces of a body.
    pub idle: Duration,
    /// A whole fetch that is being stored.
    pub fetch: Duration,
}

/// Connections to an upstream.
#[derive(Debug, Clone, Copy)]
pub struct PoolLimits {
    /// To each host; who comes when there are so many waits for one.
    pub connections: usize,
    /// Idle ones kept for each host.
    pub idle: usize,
    /// An older one is not used again.
    pub max_age: Duration,
}

/// Settings of an upstream's client.
#[derive(Debug, Clone)]
pub struct ClientSettings {
    /// The origins that requests go to.
    pub origin: Origin,
    /// Time limits.
    pub timeouts: Timeouts,
    /// Connection limits.
    pub pool: PoolLimits,
    /// TLS towards the upstream.
    pub tls: ClientTls,
    /// Whether to speak HTTP/2 to the upstream.
    pub http2: bool,
}
