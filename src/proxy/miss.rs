//! Miss handling: joins or starts the fetch for the key, waits up to the deadline, and picks the response or a fallback.

use std::sync::Arc;

use http::header::HeaderName;
use http::{Method, Response};
use tokio::time::{Instant, timeout_at};
use tracing::Instrument;

use super::exchange::{CacheRequest, MissContext};
use super::fallback::{FailedResponse, Fallback};
use super::fetch::Fetcher;
use super::fetch::coalesce::{Coalescer, FetchResult, Follower, FollowerResult, JoinResult, Leader, SharedResponse};
use super::fetch::spec::{FetchSpec, FleetUse};
use super::lookup::{Lookup, LookupResult, Miss, variant_key};
use super::respond::Responder;
use crate::body::Body;
use crate::policy::entry::Entry;
use crate::policy::http::freshness::{RequestDirectives, Verdict, evaluate};
use crate::policy::outcome::{Failure, FetchSummary, ForwardReason, NotStored, Outcome, StaleReason};
use crate::policy::routing::cache_key::CacheKey;
use crate::proxy::fetch::fleet::FleetLookup;
use crate::proxy::upstream_state::UpstreamState;
use crate::telemetry::{Telemetry, spans};

/// A fetch can be lost, or turn out to be for another variant, this often.
const MAX_JOINS: usize = 4;

/// Answers cache misses.
#[derive(Debug)]
pub(crate) struct MissHandler {
    pub(crate) upstream: Arc<UpstreamState>,
    pub(crate) lookup: Arc<Lookup>,
    pub(crate) fleet_lookup: Arc<FleetLookup>,
    pub(crate) coalescer: Arc<Coalescer>,
    pub(crate) fetcher: Arc<Fetcher>,
    pub(crate) fallback: Arc<Fallback>,
    pub(crate) responder: Arc<Responder>,
    pub(crate) telemetry: Arc<Telemetry>,
}

/// How a miss goes on after joining.
enum MissStep {
    /// Another request leads the fetch.
    Follow(Follower),
    /// This request leads the fetch.
    Lead(Box<(Leader, FetchSpec)>, Follower),
    /// A fetch has completed since the lookup, with this entry.
    Hit(Arc<Entry>),
    /// It has become known which request headers select a variant: join with this key.
    Rejoin(Box<CacheKey>),
}

/// Which fetch a miss joins.
struct JoinState {
    key: CacheKey,
    /// The fetch is for this request only.
    unshared: bool,
    /// The request headers that a response was seen to depend on: the key is of this variant.
    vary: Option<Vec<HeaderName>>,
}

impl MissHandler {
    /// Answers a request that needs a fetch.
    pub(crate) async fn run(self: Arc<Self>, context: MissContext) -> Response<Body> {
        let stand_in = self.fallback.stale_while_throttled(&context).or_else(|| self.fallback.while_paused(&context));
        if let Some(response) = stand_in {
            return response;
        }
        let request = &context.request;
        let deadline = Instant::from_std(context.exchange.begun) + request.rule.deadline;
        let mut join = JoinState {
            key: context.miss.fetch_key(&request.key, &request.parts.headers),
            unshared: request.parts.method == Method::HEAD
                || self.coalescer.is_hit_for_miss(&request.key, context.exchange.now),
            vary: None,
        };
        let mut joins = 0;
        while joins < MAX_JOINS {
            joins += 1;
            let (follower, collapsed) = match self.join(&context, &join) {
                MissStep::Follow(follower) => (follower, true),
                MissStep::Lead(fetch, follower) => {
                    if let Some(response) = self.start_fetch(*fetch, &context, deadline).await {
                        return response;
                    }
                    (follower, false)
                }
                MissStep::Hit(entry) => return self.responder.hit(&context.response(), &entry),
                MissStep::Rejoin(key) => {
                    join.key = *key;
                    continue;
                }
            };
            let result = match timeout_at(deadline, follower.wait()).instrument(spans::wait()).await {
                Err(_elapsed) => return self.fallback.respond(&context, Failure::Timeout, None, collapsed),
                Ok(result) => result,
            };
            match result {
                FollowerResult::Completed(FetchResult::Failed(failure), _) => {
                    return self.fallback.respond(&context, failure, None, collapsed);
                }
                FollowerResult::Completed(FetchResult::Shared(shared), own) => {
                    if !shared.variant.selected_by(&request.parts.headers) {
                        join.key = variant_key(&request.key, &shared.variant, &request.parts.headers);
                        join.vary = Some(shared.variant.names());
                    } else if let Some(body) = own.or_else(|| shared.body_for(collapsed)) {
                        return self.respond_shared(&context, shared, body, collapsed);
                    } else {
                        join.unshared = true;
                    }
                }
                FollowerResult::Completed(FetchResult::FoundInFleet(entry), _) => {
                    if !entry.variant.selected_by(&request.parts.headers) {
                        join.key = variant_key(&request.key, &entry.variant, &request.parts.headers);
                        join.vary = Some(entry.variant.names());
                    } else if let Some(response) = self.respond_found(&context, &entry) {
                        return response;
                    } else {
                        join.unshared = true;
                    }
                }
                FollowerResult::Unshared(response) => return self.respond_unshared(&context, response),
                FollowerResult::Completed(FetchResult::NotShareable, _) => join.unshared = true,
                // Leaders that disconnect before their fetch starts don't count.
                FollowerResult::Completed(FetchResult::Retry, _) => joins -= 1,
                FollowerResult::Lost => {}
            }
        }
        self.fallback.respond(&context, Failure::Internal, None, false)
    }

    /// Answers a request from what the fleet has stored, without asking the upstream.
    pub(crate) async fn find_in_fleet(&self, context: &MissContext) -> Option<Response<Body>> {
        let entry = self.fleet_lookup.find(&context.request).await?;
        self.respond_found(context, &entry)
    }

    /// Answers `only-if-cached` from what the fleet has stored, or with 504 (RFC 9111 §5.2.1.7).
    pub(crate) async fn run_only_if_cached(self: Arc<Self>, context: MissContext) -> Response<Body> {
        let found = self.find_in_fleet(&context).await;
        found.unwrap_or_else(|| self.responder.not_cached(&context.response()))
    }

    /// Joins the fetch for a key, as its leader if none is running.
    fn join(&self, context: &MissContext, join: &JoinState) -> MissStep {
        let CacheRequest { parts, destination, rule, .. } = &context.request;
        let resource = self.upstream.resource_id(destination, &parts.uri, rule);
        let position = self.lookup.invalidations.position();
        let (leader, follower) = if join.unshared {
            self.coalescer.start_unshared()
        } else {
            match self.coalescer.join(&join.key, &resource, position, || self.recheck(context, join)) {
                Ok(JoinResult::Lead(leader, follower)) => (leader, follower),
                Ok(JoinResult::Follow(follower)) => return MissStep::Follow(follower),
                Err(step) => return step,
            }
        };
        let mut spec = FetchSpec::for_miss(resource, context, position, self.fleet_use(context, join.unshared));
        spec.vary.clone_from(&join.vary);
        MissStep::Lead(Box::new((leader, spec)), follower)
    }

    /// Starts a fetch with a lookup in the fleet's store, within this request: that is often all that is needed. If the
    /// client disconnects meanwhile, followers join again. Then the fetch becomes a task of its own.
    async fn start_fetch(
        &self,
        (mut leader, mut spec): (Leader, FetchSpec),
        context: &MissContext,
        deadline: Instant,
    ) -> Option<Response<Body>> {
        leader.set_runs_in_request(true);
        let looking = self.fleet_lookup.look_up_first(&mut leader, &mut spec);
        let found = timeout_at(deadline, looking).await.ok().flatten();
        leader.set_runs_in_request(false);
        if let Some(entry) = found {
            leader.complete(FetchResult::FoundInFleet(entry.clone()));
            return self.respond_found(context, &entry);
        }
        self.fetcher.spawn(leader, spec);
        None
    }

    /// A fetch may have completed between lookup and join: returns the hit, or the key of a variant that is known now.
    fn recheck(&self, context: &MissContext, join: &JoinState) -> Option<MissStep> {
        if context.miss.reason == ForwardReason::Request {
            return None;
        }
        let (key, headers) = (&context.request.key, &context.request.parts.headers);
        let now = context.exchange.current_time();
        match self.lookup.find(key, headers, &RequestDirectives::default(), now) {
            LookupResult::Fresh(entry) => Some(MissStep::Hit(entry)),
            LookupResult::WhileRevalidate(_) | LookupResult::Miss(Miss { sibling: None, .. }) => None,
            LookupResult::Miss(_) if join.vary.is_some() => None,
            LookupResult::Miss(miss) => {
                let key = miss.fetch_key(key, headers);
                (key != join.key).then(|| MissStep::Rejoin(Box::new(key)))
            }
        }
    }

    /// Returns how much the fetch for a request involves the fleet.
    fn fleet_use(&self, context: &MissContext, unshared: bool) -> FleetUse {
        if context.miss.reason == ForwardReason::Request {
            FleetUse::None
        } else if context.request.parts.method == Method::HEAD {
            FleetUse::Lookup
        } else if unshared {
            // A response that must be validated each time may be stored in the fleet.
            let mark = self.coalescer.hit_for_miss(&context.request.key, context.exchange.now);
            let validated = mark.is_some_and(|mark| mark.reason.is_none());
            if validated && context.miss.stale.is_none() { FleetUse::Lookup } else { FleetUse::None }
        } else {
            FleetUse::LookupAndLease
        }
    }

    fn respond_shared(
        &self,
        context: &MissContext,
        shared: Arc<SharedResponse>,
        body: Body,
        collapsed: bool,
    ) -> Response<Body> {
        match shared.failure {
            Some(failure) => {
                self.fallback.respond(context, failure, Some(FailedResponse::Shared(shared, body)), collapsed)
            }
            None => self.responder.fetched(context, &shared, body, collapsed),
        }
    }

    /// Responds with a record of the fleet, if it may be served to this request.
    fn respond_found(&self, context: &MissContext, entry: &Arc<Entry>) -> Option<Response<Body>> {
        let now = context.exchange.current_time();
        let directives = RequestDirectives::from_request(&context.request.rule, &context.request.parts.headers);
        let state = self.lookup.invalidations.state_of(entry, now);
        match evaluate(entry, state, &directives, now) {
            Verdict::Fresh => {
                self.telemetry.found_in_fleet();
                Some(self.responder.hit(&context.response(), entry))
            }
            Verdict::WhileRevalidate => {
                self.telemetry.found_in_fleet();
                Some(self.responder.stale(&context.response(), entry, StaleReason::WhileRevalidate))
            }
            Verdict::Stale | Verdict::Refused | Verdict::Gone => None,
        }
    }

    /// Responds with a response that is for this request only.
    fn respond_unshared(&self, context: &MissContext, response: Response<Body>) -> Response<Body> {
        if let Some(failure) = Failure::from_status(response.status()) {
            return self.fallback.respond(context, failure, Some(FailedResponse::Unshared(response)), false);
        }
        let reason = response.extensions().get::<NotStored>().copied();
        let fetched = FetchSummary {
            forward: context.miss.reason,
            status: Some(response.status()),
            collapsed: false,
            stored: Err(reason),
        };
        let outcome = Outcome::Relayed { fetched, failure: None };
        self.responder.relayed(&context.response(), response, &outcome)
    }
}
