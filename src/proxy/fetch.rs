//! The fetch task of a cache key: sends the request upstream, decides whether the response may be stored, and delivers
//! it to all waiting requests.

pub(crate) mod attempt;
pub(crate) mod body;
pub mod coalesce;
pub mod failed_keys;
pub(crate) mod fleet;
pub(crate) mod opportunistic;
pub(crate) mod spec;
pub(crate) mod store;

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use http::header::{AGE, HeaderMap};
use http::{Method, Response, StatusCode};
use tokio::time::Instant;
use tracing::Instrument;

use crate::body::Body;
use crate::body::fanout::{Fanout, InflightBudget};
use crate::clock::Clock;
use crate::policy::entry::{Entry, Lifetimes};
use crate::policy::http::conditional::{HeadComparison, compare_head, freshen_head, is_other_representation};
use crate::policy::http::hop_by_hop::{pick, strip_hop_by_hop};
use crate::policy::http::request_view::RequestView;
use crate::policy::http::storage::{ResponseView, StorePlan, decide, failure_vary, initial_age};
use crate::policy::http::vary::Variant;
use crate::policy::outcome::{Failure, NotStored};
use crate::policy::resilience::budget::retry_after;
use crate::proxy::lookup::Lookup;
use crate::proxy::send::{BODY_PATIENCE, Sender};
use crate::proxy::upstream_state::UpstreamState;
use crate::store::IncompleteResponses;
use crate::telemetry::spans;
use coalesce::{FetchResult, Leader, SharedBody, SharedResponse};
use fleet::{FleetLookup, LeaseOutcome};
use spec::FetchSpec;
use store::{ResponseStore, UpstreamResponse, declared_length, stored_head};

/// Runs fetches.
#[derive(Debug)]
pub(crate) struct Fetcher {
    pub(crate) upstream: Arc<UpstreamState>,
    pub(crate) clock: Clock,
    pub(crate) lookup: Arc<Lookup>,
    pub(crate) fleet_lookup: Arc<FleetLookup>,
    pub(crate) sender: Arc<Sender>,
    pub(crate) store: Arc<ResponseStore>,
    pub(crate) incomplete: Arc<IncompleteResponses>,
    pub(crate) inflight: Arc<InflightBudget>,
    pub(crate) max_entry_bytes: u64,
    pub(crate) shared_write_stall: Duration,
}

/// A response that is about to be delivered: whether it is stored, and whether it is a failure.
struct Delivery {
    response: UpstreamResponse,
    plan: StorePlan,
    failure: Option<Failure>,
    /// The fetch must be complete by then.
    by: Instant,
}

impl Fetcher {
    /// Runs a fetch as a task of its own, which no client's disconnect ends.
    pub(crate) fn spawn(self: &Arc<Self>, leader: Leader, spec: FetchSpec) {
        // Boxed: spawning moves the future several times, and it has some kilobytes.
        let fetch: Pin<Box<dyn Future<Output = ()> + Send>> = Box::pin(self.clone().run(leader, spec));
        tokio::spawn(fetch.instrument(spans::fetch()));
    }

    /// Runs a fetch until the response is stored, delivered, or known not to arrive.
    async fn run(self: Arc<Self>, mut leader: Leader, mut spec: FetchSpec) {
        let by = Instant::now() + self.upstream.timeouts.fetch;
        match self.fleet_lookup.find_or_claim(&mut leader, &mut spec, by).await {
            LeaseOutcome::Found(entry) => return leader.complete(FetchResult::FoundInFleet(entry)),
            LeaseOutcome::Fetch(lease) => *spec.lease() = lease,
        }
        // A purge from here on is later than this fetch.
        spec.position = self.lookup.invalidations.position();
        let sending = self.send(&spec);
        let attempt = if spec.request.parts.method == Method::HEAD {
            // The response can't be stored: without a client it is not needed.
            tokio::select! {
                attempt = sending => attempt,
                () = leader.wait_disconnected() => return,
            }
        } else {
            sending.await
        };
        let delay = self.clock.instant().saturating_duration_since(attempt.sent_at);
        let by = Instant::from_std(attempt.sent_at) + self.upstream.timeouts.fetch;
        match attempt.response {
            Err(error) => {
                self.sender.record_error(&error, delay);
                if error.was_tried() && error.client.is_none() {
                    self.pause_key(&spec, error.failure, None);
                }
                leader.complete(FetchResult::Failed(error.failure));
            }
            Ok(mut response) => {
                strip_hop_by_hop(response.headers_mut());
                self.sender.record_response(&response, delay);
                let response = self.store.received(response, delay);
                self.on_response(leader, &spec, response, by).await;
            }
        }
    }

    /// Records a failure of a fetch: what can stand in is served without asking the upstream, for a while.
    fn pause_key(&self, spec: &FetchSpec, failure: Failure, retry_after: Option<Duration>) {
        let (upstream, now) = (&self.upstream, self.clock.now());
        upstream.failed_keys.failed(&spec.request.key, failure, retry_after, &upstream.backoff, now);
    }

    /// Decides what a response is used for.
    async fn on_response(&self, leader: Leader, spec: &FetchSpec, response: UpstreamResponse, by: Instant) {
        let is_get = spec.request.parts.method == Method::GET;
        if response.response.status() == StatusCode::NOT_MODIFIED
            && let Some(stale) = spec.stale.as_ref().filter(|_| is_get)
        {
            if is_other_representation(&stale.head.headers(), response.response.headers()) {
                self.pause_key(spec, Failure::Malformed, None);
                return leader.complete(FetchResult::Failed(Failure::Malformed));
            }
            self.upstream.failed_keys.succeeded(&spec.request.key);
            return self.on_not_modified(leader, spec, stale, &response);
        }
        let failure = Failure::from_status(response.response.status());
        if let Some(failure) = failure {
            self.pause_key(spec, failure, retry_after(response.response.headers(), response.date));
        }
        let unstorable = |failure: &Failure| !self.store.may_store_failure(spec, &response.view(), *failure);
        if let Some(failure) = failure.filter(unstorable) {
            let vary = failure_vary(&response.view(), &spec.request.rule).filter(|_| is_get);
            let Some(vary) = vary else {
                return self.deliver_unshared(leader, spec, response.response, NotStored::Status);
            };
            let plan = StorePlan { lifetimes: Lifetimes::default(), vary, drop: Vec::new() };
            return self.deliver(leader, spec, Delivery { response, plan, failure: Some(failure), by }).await;
        }
        let is_head = spec.request.parts.method == Method::HEAD;
        if is_head
            && response.response.status() == StatusCode::OK
            && let Some(stored) = &spec.stale
        {
            self.on_head_response(spec, stored, &response);
        }
        match decide(&spec.view(), &response.view(), &spec.request.rule) {
            Err(reason) => self.deliver_unshared(leader, spec, response.response, reason),
            Ok(_) if declared_length(response.response.headers()) > Some(self.max_entry_bytes) => {
                self.deliver_unshared(leader, spec, response.response, NotStored::TooLarge);
            }
            Ok(plan) => {
                let inspect = spec.request.rule.reject_empty.is_some() && response.response.status().is_success();
                let delivery = Delivery { response, plan, failure: None, by };
                if inspect {
                    self.inspect(leader, spec, delivery).await;
                } else {
                    self.deliver(leader, spec, delivery).await;
                }
            }
        }
    }

    /// Delivers a response to the leader only. The next requests for the key don't wait for each other.
    fn deliver_unshared(&self, leader: Leader, spec: &FetchSpec, response: Response<Body>, reason: NotStored) {
        // A failure says nothing about the next response.
        let succeeded = Failure::from_status(response.status()).is_none();
        if succeeded {
            self.upstream.failed_keys.succeeded(&spec.request.key);
        }
        if spec.request.parts.method == Method::GET && succeeded {
            self.store.mark_hit_for_miss(spec, Some(reason));
            self.store.remove_stored(spec);
        }
        deliver_to_leader(leader, response, reason);
    }

    /// Freshens the stored response with the response to a HEAD, or removes it if it is outdated (RFC 9111 §4.3.5).
    fn on_head_response(&self, spec: &FetchSpec, stored: &Arc<Entry>, response: &UpstreamResponse) {
        let headers = stored.head.headers();
        match compare_head(&headers, stored.body.len(), response.response.headers()) {
            HeadComparison::Unknown => {}
            // A stale entry will be validated.
            HeadComparison::Another if self.lookup.is_servable(stored, self.clock.now()) => {
                self.store.remove_stored(spec);
            }
            HeadComparison::Another => {}
            HeadComparison::Same => {
                let headers = freshen_head(&headers, response.response.headers());
                let view = ResponseView { status: stored.head.status, headers: &headers, ..response.view() };
                let request = RequestView { method: &Method::GET, ..spec.view() };
                if let Ok(plan) = decide(&request, &view, &spec.request.rule) {
                    let head = stored_head(&view, stored.head.header_case().cloned(), spec, &plan.drop);
                    let content = (head, stored.body.clone());
                    let entry = self.store.entry(spec, &plan, content, response.received_at);
                    self.store.store_if_valid(spec, &entry);
                }
            }
        }
    }

    /// Freshens the stored response with a 304 (RFC 9111 §4.3.4).
    fn on_not_modified(&self, leader: Leader, spec: &FetchSpec, stale: &Arc<Entry>, response: &UpstreamResponse) {
        let headers = freshen_head(&stale.head.headers(), response.response.headers());
        let view = ResponseView { status: stale.head.status, headers: &headers, ..response.view() };
        let (plan, stored) = match decide(&spec.view(), &view, &spec.request.rule) {
            Ok(plan) => (plan, Ok(())),
            // The 304 made the response uncacheable: deliver it to waiting requests, but do not keep it.
            Err(reason) => {
                self.store.remove_stored(spec);
                (StorePlan { lifetimes: Lifetimes::default(), vary: Vec::new(), drop: Vec::new() }, Err(reason))
            }
        };
        let head = stored_head(&view, stale.head.header_case().cloned(), spec, &plan.drop);
        let entry = self.store.entry(spec, &plan, (head.clone(), stale.body.clone()), response.received_at);
        if stored.is_ok() {
            self.store.store_if_valid(spec, &entry);
        }
        let shared = SharedResponse {
            head,
            status: StatusCode::NOT_MODIFIED,
            failure: None,
            stored,
            variant: entry.variant.clone(),
            shareable: plan.lifetimes.is_shareable(),
            unstored_fields: HeaderMap::new(),
            received_at: response.received_at,
            initial_age: Some(initial_age(&view)),
            body: SharedBody::Stored(entry),
        };
        leader.complete(FetchResult::Shared(Arc::new(shared)));
    }

    /// Announces a response, streams its body to all who joined, and stores it when it is complete.
    async fn deliver(&self, mut leader: Leader, spec: &FetchSpec, delivery: Delivery) {
        let Delivery { mut response, plan, failure, by } = delivery;
        let body = std::mem::replace(response.response.body_mut(), Body::Empty);
        let body = match body.begun(BODY_PATIENCE).await {
            Ok(body) => body,
            Err(error) => return self.fail(leader, spec, body::failure_of(error)),
        };
        let head = response.head(spec, &plan);
        let (received_at, headers) = (response.received_at, response.response.headers());
        let length = declared_length(headers);
        let fanout = Fanout::new(&self.inflight, self.max_entry_bytes, self.shared_write_stall, length);
        let shared = SharedResponse {
            head: head.clone(),
            status: response.response.status(),
            failure,
            stored: if failure.is_some() { Err(NotStored::Status) } else { Ok(()) },
            variant: Variant::of(plan.vary.clone(), &spec.request.parts.headers),
            shareable: failure.is_some() || plan.lifetimes.is_shareable(),
            unstored_fields: pick(&plan.drop, headers),
            received_at,
            initial_age: headers.contains_key(AGE).then_some(plan.lifetimes.initial_age),
            body: SharedBody::Streaming(fanout.clone()),
        };
        if !shared.shareable {
            self.store.mark_hit_for_miss(spec, None);
        }
        leader.announce(Arc::new(shared), &fanout);
        let storing = body::Storing { spec, plan: &plan, head, received_at, stores: failure.is_none() };
        self.copy_body(&mut leader, body, &fanout, by, &storing).await;
    }
}

/// Delivers a response to the leader only.
fn deliver_to_leader(leader: Leader, mut response: Response<Body>, reason: NotStored) {
    response.extensions_mut().insert(reason);
    leader.complete_unshared(response);
}
