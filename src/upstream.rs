//! The API behind us, as the proxy sees it: requests go in, answers or failures come out.

mod casing;
mod connect;
mod flaws;
pub mod http;
mod resolve;
mod tap;

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use ::http::{HeaderMap, Request, Response, StatusCode};

use crate::body::{Body, BodyError};
use crate::policy::head::Casing;
use crate::policy::outcome::Failure;
use crate::policy::retry::Ended;

/// An answer, or none, some time later.
pub type Sending<'a> = Pin<Box<dyn Future<Output = Result<Response<Body>, SendError>> + Send + 'a>>;

/// Something that answers requests. The real one is [`http::HttpUpstream`]; tests script others.
pub trait Upstream: fmt::Debug + Send + Sync + 'static {
    /// Sends a request whose URI is absolute. The answer's body fails with
    /// [`BodyError::Upstream`] if it ends early or stands still too long.
    fn send(&self, request: Request<Body>) -> Sending<'_>;

    /// How to write these field names (one a line) as the upstream does; none: in Title-Case.
    fn casing<'a>(&'a self, _names: &'a [u8]) -> Pin<Box<dyn Future<Output = Option<Casing>> + Send + 'a>> {
        Box::pin(std::future::ready(None))
    }
}

/// Goes with a request whose answer may be stored: it is to bring its [`Casing`].
#[derive(Debug, Clone, Copy)]
pub struct MayBeStored;

/// Somebody who hears what is said ahead of answers: interim answers (RFC 9110 §15.2).
pub trait Ear: fmt::Debug + Send + Sync {
    /// Which request is being answered.
    fn turn(&self) -> u64;

    /// An interim answer to that request.
    fn hear(&self, turn: u64, status: StatusCode, headers: &HeaderMap);
}

/// Goes with a request whose interim answers somebody wants to hear.
#[derive(Debug, Clone)]
pub struct Heard {
    ear: Arc<dyn Ear>,
    turn: u64,
}

impl Heard {
    /// By this ear, for the request that is being answered now.
    pub fn by(ear: &Arc<dyn Ear>) -> Heard {
        Heard { ear: ear.clone(), turn: ear.turn() }
    }

    /// Passes one on.
    fn hear(&self, status: StatusCode, headers: &HeaderMap) {
        // 100 is between us and the upstream: the client has had its own.
        if status != StatusCode::CONTINUE {
            self.ear.hear(self.turn, status, headers);
        }
    }
}

/// No answer.
#[derive(Debug, Clone)]
pub struct SendError {
    /// What it counts as.
    pub failure: Failure,
    /// Whether the request can have had an effect.
    pub ended: Ended,
    /// Set if it was the client's body that failed.
    pub client: Option<BodyError>,
    /// Nobody is there, it seems: no connection, or no response head in time.
    pub silent: bool,
    /// For the log.
    pub message: String,
}

impl SendError {
    /// No answer, and the request may have had an effect.
    pub fn unanswered(failure: Failure, message: impl Into<String>) -> SendError {
        SendError { failure, ended: Ended::Otherwise, client: None, silent: false, message: message.into() }
    }
}

impl SendError {
    /// Did anything try to reach the upstream?
    pub fn was_tried(&self) -> bool {
        let held_back = matches!(self.failure, Failure::Throttled | Failure::Unavailable);
        !held_back || self.ended != Ended::Unsent
    }
}

impl fmt::Display for SendError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for SendError {}
