//! One request's stay: when it began, and the time that every decision about it uses.

use std::time::{Duration, Instant};

use http::header::HeaderMap;
use http::{Method, Request, Uri, request};

use crate::body::Body;
use crate::clock::Clock;
use crate::policy::Tick;

/// Sampled once, when the request came.
#[derive(Debug, Clone)]
pub struct Visit {
    clock: Clock,
    /// When it began.
    pub begun: Instant,
    /// The time for all verdicts.
    pub now: Tick,
}

impl Visit {
    /// Begins now.
    pub fn begin(clock: &Clock) -> Visit {
        let begun = clock.instant();
        Visit { clock: clock.clone(), begun, now: clock.tick(begun) }
    }

    /// How long it has lasted.
    pub fn elapsed(&self) -> Duration {
        self.clock.instant().saturating_duration_since(self.begun)
    }

    /// The time after waiting.
    pub fn later(&self) -> Tick {
        self.clock.now()
    }
}

/// The parts of a request that an answer depends on, wherever they are kept.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'r> {
    /// Its method.
    pub method: &'r Method,
    /// Its target.
    pub uri: &'r Uri,
    /// Its headers.
    pub headers: &'r HeaderMap,
}

impl<'r> From<&'r Request<Body>> for Asked<'r> {
    fn from(request: &'r Request<Body>) -> Self {
        Asked { method: request.method(), uri: request.uri(), headers: request.headers() }
    }
}

impl<'r> From<&'r request::Parts> for Asked<'r> {
    fn from(parts: &'r request::Parts) -> Self {
        Asked { method: &parts.method, uri: &parts.uri, headers: &parts.headers }
    }
}
