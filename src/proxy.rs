//! The request pipeline. [`Proxy::handle`] is its table of contents: every step is a type in a module below, built once
//! at start with the dependencies that it names.

pub mod active;
mod admission;
mod assembly;
mod destination;
mod exchange;
pub mod explain;
mod fallback;
pub mod fetch;
mod lookup;
mod miss;
mod pass_through;
mod refresh;
pub mod respond;
pub mod send;
mod shadow;
mod shared;
pub mod upstream_state;
mod write;

use std::pin::Pin;
use std::sync::Arc;

use http::header::HeaderValue;
use http::{Request, Response};
use serde_json::Value;

use crate::body::Body;
use crate::body::fanout::InflightBudget;
use crate::clock::Clock;
use crate::fleet::Fleet;
use crate::fleet::refresh_queue::RefreshRequest;
use crate::policy::http::range::has_range;
use crate::policy::http::request_view::RequestView;
use crate::policy::outcome::{BypassReason, StaleReason};
use crate::policy::rejection::Rejection;
use crate::upstream::{InformationalSender, InformationalSink};
use admission::{Admission, Admitted};
use exchange::{CacheRequest, Exchange, MissContext, ResponseContext};
use explain::Explainer;
use lookup::{Lookup, LookupResult};
use miss::MissHandler;
use pass_through::{Bypassed, PassThrough};
use refresh::{Refresher, ServedEntry};
use respond::Responder;
use upstream_state::{Misdirected, UpstreamState};

pub use shared::SharedState;

/// The proxy in front of one upstream.
#[derive(Debug)]
pub struct Proxy {
    /// Its upstream.
    pub upstream: Arc<UpstreamState>,
    clock: Clock,
    inflight: Arc<InflightBudget>,
    admission: Arc<Admission>,
    lookup: Arc<Lookup>,
    misses: Arc<MissHandler>,
    refresher: Arc<Refresher>,
    pass_through: Arc<PassThrough>,
    responder: Arc<Responder>,
    explainer: Explainer,
}

/// A response that is ready, or a future that resolves to one.
pub enum Handled {
    /// A hit, or a rejection: nothing was awaited, nothing spawned, no future built.
    Now(Response<Body>),
    /// A miss, or a request that is passed through.
    Later(Pin<Box<dyn Future<Output = Response<Body>> + Send>>),
}

impl Handled {
    /// Boxes a future.
    pub fn later(response: impl Future<Output = Response<Body>> + Send + 'static) -> Handled {
        Handled::Later(Box::pin(response))
    }

    /// Returns the response.
    pub async fn response(self) -> Response<Body> {
        match self {
            Handled::Now(response) => response,
            Handled::Later(response) => response.await,
        }
    }
}

impl Proxy {
    /// Answers a request that has passed the guard. `sink` receives informational responses (1xx) to it.
    pub fn handle(&self, mut request: Request<Body>, sink: Option<&Arc<dyn InformationalSink>>) -> Handled {
        let exchange = Exchange::begin(&self.clock);
        let destination = match self.upstream.locate(request.uri(), request.headers()) {
            Ok(destination) => destination,
            Err(Misdirected) => return Handled::Now(self.responder.misdirected(&request, &exchange)),
        };
        let Admitted { rule, directives, key } = match self.admission.admit(&request, &destination, exchange.now) {
            Ok(admitted) => admitted,
            Err(reason) => {
                let destination = destination.into_owned();
                return self.pass_through(Bypassed { request, destination, reason, exchange }, sink);
            }
        };
        match self.lookup.find(&key, request.headers(), &directives, exchange.now) {
            LookupResult::Fresh(entry) => {
                let (request, destination, key) = (&request, &*destination, &*key);
                let served = ServedEntry { request, destination, rule, key, entry: &entry };
                self.refresher.refresh_ahead(served, exchange.now);
                Handled::Now(self.responder.hit(&ResponseContext::new(request, Some(rule), &exchange), &entry))
            }
            LookupResult::WhileRevalidate(entry) => {
                let (request, destination, key) = (&request, &*destination, &*key);
                self.refresher.refresh(ServedEntry { request, destination, rule, key, entry: &entry }, false);
                let context = ResponseContext::new(request, Some(rule), &exchange);
                Handled::Now(self.responder.stale(&context, &entry, StaleReason::WhileRevalidate))
            }
            LookupResult::Miss(miss) => {
                attach_sink(&mut request, sink);
                let (destination, rule, only_if_cached) =
                    (destination.into_owned(), rule.clone(), directives.only_if_cached());
                if has_range(request.method(), request.headers()) && miss.stale.is_none() && !only_if_cached {
                    let parts = CacheRequest::to_get(&request);
                    let cached = CacheRequest { parts, destination, rule, key };
                    return self.range_miss(request, MissContext { request: cached, miss, exchange });
                }
                let parts = Arc::new(request.into_parts().0);
                let request = CacheRequest { parts, destination, rule, key };
                self.miss(MissContext { request, miss, exchange }, only_if_cached)
            }
        }
    }

    fn pass_through(&self, mut bypassed: Bypassed, sink: Option<&Arc<dyn InformationalSink>>) -> Handled {
        attach_sink(&mut bypassed.request, sink);
        Handled::later(self.pass_through.clone().run(bypassed))
    }

    fn miss(&self, context: MissContext, only_if_cached: bool) -> Handled {
        let misses = self.misses.clone();
        if !only_if_cached {
            Handled::later(misses.run(context))
        } else if misses.fleet_lookup.is_enabled() {
            Handled::later(misses.run_only_if_cached(context))
        } else {
            Handled::Now(self.responder.not_cached(&context.response()))
        }
    }

    /// Answers a range request that is not in memory: from the fleet's store, or by passing it through. With a stale
    /// entry in memory it is a miss like any other: the entry is refreshed as a whole, and the range taken from that.
    fn range_miss(&self, request: Request<Body>, context: MissContext) -> Handled {
        let (misses, pass_through) = (self.misses.clone(), self.pass_through.clone());
        Handled::later(async move {
            if let Some(response) = misses.find_in_fleet(&context).await {
                return response;
            }
            let MissContext { request: CacheRequest { destination, .. }, exchange, .. } = context;
            let reason = BypassReason::Range;
            pass_through.run(Bypassed { request, destination, reason, exchange }).await
        })
    }

    /// Answers a request that the guard rejected.
    pub fn reject<'r>(&self, request: impl Into<RequestView<'r>>, rejection: &Rejection) -> Response<Body> {
        self.responder.rejected(request, rejection)
    }

    /// Explains a request without sending it. `running`: with the state of the cache and of the upstream.
    pub fn explain(&self, request: &Request<Body>, running: bool) -> Value {
        self.explainer.explain(request, running)
    }

    /// Runs a refresh that a sidecar of the fleet has offered. Returns when it is done, or has failed.
    pub async fn run_offered_refresh(&self, fleet: &Fleet, refresh: RefreshRequest) {
        self.refresher.run_offered(fleet, refresh).await;
    }

    /// Returns the budget of buffered bytes.
    pub fn inflight(&self) -> &Arc<InflightBudget> {
        &self.inflight
    }

    /// Returns the current time as a `Date` field.
    pub fn date(&self) -> Option<HeaderValue> {
        HeaderValue::from_str(&httpdate::fmt_http_date(self.clock.wall())).ok()
    }
}

/// Passes a sink of informational responses on with a request.
fn attach_sink(request: &mut Request<Body>, sink: Option<&Arc<dyn InformationalSink>>) {
    if let Some(sink) = sink {
        request.extensions_mut().insert(InformationalSender::new(sink));
    }
}
