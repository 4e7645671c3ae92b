//! What belongs to one request: its times, and the values that the steps pass on.

use std::sync::Arc;
use std::time::{Duration, Instant};

use http::Request;
use http::request::Parts;

use super::lookup::Miss;
use super::upstream_state::Destination;
use crate::clock::Clock;
use crate::policy::Tick;
use crate::policy::http::request_view::RequestView;
use crate::policy::routing::cache_key::CacheKey;
use crate::policy::routing::rule::Rule;

/// The times of one request, sampled when it arrived.
#[derive(Debug, Clone)]
pub(crate) struct Exchange {
    clock: Clock,
    /// Arrival of the request.
    pub(crate) begun: Instant,
    /// The time that all decisions about the request use.
    pub(crate) now: Tick,
}

impl Exchange {
    /// Starts now.
    pub(crate) fn begin(clock: &Clock) -> Exchange {
        let (begun, now) = clock.instant_and_tick();
        Exchange { clock: clock.clone(), begun, now }
    }

    /// Returns the time since the request arrived.
    pub(crate) fn elapsed(&self) -> Duration {
        self.clock.instant().saturating_duration_since(self.begun)
    }

    /// Returns the current time, for decisions after an `await`.
    pub(crate) fn current_time(&self) -> Tick {
        self.clock.now()
    }
}

/// What a response is built for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ResponseContext<'r> {
    /// The client's request.
    pub(crate) request: RequestView<'r>,
    /// The rule that applies; `None` if no rule may answer the request from the cache.
    pub(crate) rule: Option<&'r Rule>,
    /// The times of the request.
    pub(crate) exchange: &'r Exchange,
}

impl<'r> ResponseContext<'r> {
    /// Returns the context of a request under a rule.
    pub(crate) fn new(request: impl Into<RequestView<'r>>, rule: Option<&'r Rule>, exchange: &'r Exchange) -> Self {
        ResponseContext { request: request.into(), rule, exchange }
    }
}

/// A request that may be answered from the cache: its head, where it goes, the rule that applies, its key.
#[derive(Debug, Clone)]
pub(crate) struct CacheRequest {
    pub(crate) parts: Arc<Parts>,
    pub(crate) destination: Destination,
    pub(crate) rule: Arc<Rule>,
    pub(crate) key: CacheKey,
}

impl CacheRequest {
    /// Returns the GET of the same target with the same headers.
    pub(crate) fn to_get<B>(request: &Request<B>) -> Arc<Parts> {
        let mut copy = Request::new(());
        copy.uri_mut().clone_from(request.uri());
        copy.headers_mut().clone_from(request.headers());
        *copy.version_mut() = request.version();
        *copy.extensions_mut() = request.extensions().clone();
        Arc::new(copy.into_parts().0)
    }
}

/// A cache miss on its way to a response.
#[derive(Debug)]
pub(crate) struct MissContext {
    pub(crate) request: CacheRequest,
    pub(crate) miss: Miss,
    pub(crate) exchange: Exchange,
}

impl MissContext {
    pub(crate) fn response(&self) -> ResponseContext<'_> {
        ResponseContext::new(&*self.request.parts, Some(&self.request.rule), &self.exchange)
    }
}
