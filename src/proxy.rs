//! The way of a request. [`Proxy::handle`] is the table of contents: every step of it is a module below.

pub mod ahead;
pub mod aside;
pub mod breakers;
pub mod budget;
pub mod explain;
pub mod face;
pub mod fallback;
pub mod fetch;
pub mod fleet;
pub mod flights;
pub mod forward;
pub mod job;
pub mod lookup;
pub mod relay;
pub mod respond;
pub mod send;
pub mod shadow;
pub mod site;
mod texts;
pub mod visit;
pub mod wait;

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use http::{Extensions, HeaderMap, Request, Response, Uri};

use crate::body::Body;
use crate::body::fanout::Purse;
use crate::clock::Clock;
use crate::fleet::Fleet;
use crate::fleet::invalidations::Invalidations;
use crate::policy::Tick;
use crate::policy::freshness::Demands;
use crate::policy::key::{KeyBuf, KeyParts, KeySecret};
use crate::policy::mode::{Mode, Switch};
use crate::policy::outcome::{Bypass, StaleReason};
use crate::policy::plan::Plan;
use crate::policy::ranges::asks_for_part;
use crate::policy::route::Route;
use crate::store::{Memory, Partials};
use crate::telemetry::Telemetry;
use crate::upstream::{Ear, Heard};
use flights::Flights;
use lookup::Lookup;
use site::{Place, Site};
use visit::Visit;

/// What all upstreams of a process share.
#[derive(Debug)]
pub struct Commons {
    /// The time.
    pub clock: Clock,
    /// What is stored.
    pub memory: Arc<Memory>,
    /// Beginnings of answers.
    pub partials: Arc<Partials>,
    /// What was purged.
    pub invalidations: Arc<Invalidations>,
    /// What is being fetched.
    pub flights: Arc<Flights>,
    /// What running fetches may hold.
    pub purse: Arc<Purse>,
    /// The sidecars that share a Redis with this one; none: it is alone.
    pub fleet: Option<Arc<Fleet>>,
    /// Digests credentials. The fleet may have another than the one begun with.
    pub secret: Arc<ArcSwap<KeySecret>>,
    /// The largest answer that is stored.
    pub max_entry_bytes: u64,
    /// When a reader that others wait for is cut.
    pub shared_write_stall: Duration,
    /// The kill switch.
    pub mode: Arc<Switch>,
    /// What happened.
    pub telemetry: Arc<Telemetry>,
}

/// The proxy before one upstream.
#[derive(Debug)]
pub struct Proxy {
    /// What it shares with the others.
    pub commons: Arc<Commons>,
    /// Its upstream.
    pub site: Site,
}

/// An answer: at once, or in a while.
pub enum Handled {
    /// A hit, or a refusal: nothing was awaited, nothing spawned, no future built.
    Now(Response<Body>),
    /// Something has to be fetched, or handed through.
    Later(Pin<Box<dyn Future<Output = Response<Body>> + Send>>),
}

impl Handled {
    /// An answer that takes a while.
    pub fn later(answer: impl Future<Output = Response<Body>> + Send + 'static) -> Handled {
        Handled::Later(Box::pin(answer))
    }

    /// The answer.
    pub async fn response(self) -> Response<Body> {
        match self {
            Handled::Now(response) => response,
            Handled::Later(answer) => answer.await,
        }
    }
}

impl Proxy {
    /// Answers a request that has passed the guard. `ear`: who wants to hear interim answers to it.
    pub fn handle(self: &Arc<Self>, mut request: Request<Body>, ear: Option<&Arc<dyn Ear>>) -> Handled {
        let visit = Visit::begin(&self.commons.clock);
        let place = match self.site.locate(request.uri(), request.headers()) {
            Ok(place) => place,
            Err(misdirected) => return Handled::Now(self.misdirected(&request, &visit, misdirected)),
        };
        let (plan, demands, key) = match self.admit(&request, &place, visit.now) {
            Ok(admitted) => admitted,
            Err(reason) => {
                let place = place.into_owned();
                request.extensions_mut().extend(interims(ear));
                return Handled::later(self.clone().relay(request, place, reason, visit));
            }
        };
        match self.look_up(&key, request.headers(), &demands, visit.now) {
            Lookup::Fresh(entry) => {
                if let Some(ahead) = plan.refresh_ahead {
                    self.ahead(&request, &place, plan, &key, &entry, ahead, visit.now);
                }
                Handled::Now(self.hit(&request, &entry, plan, &visit))
            }
            Lookup::WhileRevalidate(entry) => {
                self.refresh(&request, &place, plan, &key, &entry, false);
                Handled::Now(self.stale(&request, &entry, StaleReason::WhileRevalidate, plan, &visit))
            }
            Lookup::Fetch(miss) if demands.only_if_cached() => {
                self.only_if_cached(request, place.into_owned(), plan, key, miss, visit)
            }
            Lookup::Fetch(miss) => {
                let (place, plan) = (place.into_owned(), plan.clone());
                request.extensions_mut().extend(interims(ear));
                // What is stale is refreshed as a whole, and the part is of that.
                if asks_for_part(request.method(), request.headers()) && miss.stale.is_none() {
                    return Handled::later(self.clone().part(request, place, plan, key, miss, visit));
                }
                Handled::later(self.clone().fetch(request, place, plan, key, miss, visit))
            }
        }
    }

    /// May the cache be asked, under which rule, and by which key?
    fn admit(
        &self,
        request: &Request<Body>,
        place: &Place,
        now: Tick,
    ) -> Result<(&Arc<Plan>, Demands, KeyBuf), Bypass> {
        match self.commons.mode.mode(now) {
            Mode::Normal => self.cacheable(request, place),
            Mode::Bypass => Err(Bypass::Mode),
            Mode::Shadow => Err(Bypass::Shadow),
        }
    }

    /// May the cache be asked, whatever the mode?
    fn cacheable(&self, request: &Request<Body>, place: &Place) -> Result<(&Arc<Plan>, Demands, KeyBuf), Bypass> {
        let (uri, headers) = (request.uri(), request.headers());
        let plan = match self.site.router.route(request.method(), uri.path(), uri.query(), headers) {
            Route::Cache(plan) => plan,
            Route::Bypass(reason) => return Err(reason),
        };
        if !matches!(request.body(), Body::Empty) {
            return Err(Bypass::RequestBody);
        }
        let demands = Demands::of(plan, headers);
        if demands.no_store() {
            return Err(Bypass::NoStoreRequest);
        }
        let key = self.key(uri, headers, place, plan)?;
        Ok((plan, demands, key))
    }

    /// The key of a request under a rule.
    fn key(&self, uri: &Uri, headers: &HeaderMap, place: &Place, plan: &Plan) -> Result<KeyBuf, Bypass> {
        let authority = place.keyed.as_deref();
        let parts = KeyParts { upstream: self.site.id, authority, path: uri.path(), query: uri.query(), headers };
        plan.key.key(&self.commons.secret.load(), &parts)
    }
}

/// What makes interim answers heard, as a request's extensions.
fn interims(ear: Option<&Arc<dyn Ear>>) -> Extensions {
    let mut extensions = Extensions::new();
    if let Some(ear) = ear {
        extensions.insert(Heard::by(ear));
    }
    extensions
}
