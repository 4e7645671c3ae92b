//! Fallback when a fetch failed or took too long: stale entry, last known good, configured payload, the upstream's own
//! response, error.

use std::sync::Arc;

use http::{Response, StatusCode};

use super::exchange::MissContext;
use super::fetch::coalesce::SharedResponse;
use super::lookup::Lookup;
use super::respond::Responder;
use crate::body::Body;
use crate::policy::entry::Entry;
use crate::policy::http::freshness::stale_on_failure;
use crate::policy::outcome::{Failure, FetchSummary, Outcome};
use crate::proxy::upstream_state::UpstreamState;

/// Picks the best response after a failure.
#[derive(Debug)]
pub(crate) struct Fallback {
    pub(crate) upstream: Arc<UpstreamState>,
    pub(crate) lookup: Arc<Lookup>,
    pub(crate) responder: Arc<Responder>,
    /// Whether a fleet's store may have filled memory while a request waited.
    pub(crate) has_fleet: bool,
}

/// The upstream's response that is a failure, passed on if there is nothing better.
#[derive(Debug)]
pub(crate) enum FailedResponse {
    /// Shared with other requests.
    Shared(Arc<SharedResponse>, Body),
    /// For this request only.
    Unshared(Response<Body>),
}

impl FailedResponse {
    fn status(&self) -> StatusCode {
        match self {
            FailedResponse::Shared(shared, _) => shared.status,
            FailedResponse::Unshared(response) => response.status(),
        }
    }
}

impl Fallback {
    /// Returns what the fetch has found in the fleet's store while this request waited.
    fn found_since(&self, context: &MissContext) -> Option<Arc<Entry>> {
        let request = &context.request;
        let variants = self.lookup.memory.get(&request.key).filter(|_| self.has_fleet)?;
        variants.select(&request.parts.headers).cloned()
    }

    /// While the upstream's `Retry-After` is in force, a stale entry is served at once, without a request.
    pub(crate) fn stale_while_throttled(&self, context: &MissContext) -> Option<Response<Body>> {
        let entry = context.miss.stale.as_ref()?;
        let request = &context.request;
        self.upstream.budget_closed_for(&request.destination, &request.parts.headers)?;
        let now = context.exchange.now;
        let state = self.lookup.invalidations.state_of(entry, now);
        let reason = stale_on_failure(entry, state, Failure::Throttled, now)?;
        Some(self.responder.stale(&context.response(), entry, reason))
    }

    /// While a key is paused after a failed fetch, what can stand in is served at once, without a request. At the end of
    /// the pause one request is let through.
    pub(crate) fn while_paused(&self, context: &MissContext) -> Option<Response<Body>> {
        let (request, now) = (&context.request, context.exchange.now);
        let failed_keys = &self.upstream.failed_keys;
        let failure = failed_keys.last_failure(&request.key)?;
        let state = |entry| self.lookup.invalidations.state_of(entry, now);
        let stale = context.miss.stale.as_ref();
        let stale = stale.and_then(|entry| Some((entry, stale_on_failure(entry, state(entry), failure, now)?)));
        let payload = request.rule.fallback.as_ref().filter(|payload| payload.covers(failure));
        if stale.is_none() && payload.is_none() || !failed_keys.is_paused_or_probe(&request.key, now) {
            return None;
        }
        if let Some((entry, reason)) = stale {
            return Some(self.responder.stale(&context.response(), entry, reason));
        }
        let fetched =
            FetchSummary { forward: context.miss.reason, status: None, collapsed: false, stored: Err(None) };
        let outcome = Outcome::Fallback { fetched, failure };
        payload.map(|payload| self.responder.payload(&context.response(), payload, &outcome))
    }

    /// Responds after a failure; `failed` is the upstream's own response, if there is one.
    pub(crate) fn respond(
        &self,
        context: &MissContext,
        failure: Failure,
        failed: Option<FailedResponse>,
        collapsed: bool,
    ) -> Response<Body> {
        let response_context = context.response();
        if let Some(entry) = context.miss.stale.clone().or_else(|| self.found_since(context)) {
            let now = context.exchange.current_time();
            let state = self.lookup.invalidations.state_of(&entry, now);
            if let Some(reason) = stale_on_failure(&entry, state, failure, now) {
                return self.responder.stale(&response_context, &entry, reason);
            }
        }
        let status = failed.as_ref().map(FailedResponse::status);
        let fetched = FetchSummary { forward: context.miss.reason, status, collapsed, stored: Err(None) };
        let payload = context.request.rule.fallback.as_ref();
        if let Some(payload) = payload.filter(|payload| payload.covers(failure)) {
            let outcome = Outcome::Fallback { fetched, failure };
            return self.responder.payload(&response_context, payload, &outcome);
        }
        let outcome = Outcome::Relayed { fetched, failure: Some(failure) };
        match failed {
            Some(FailedResponse::Shared(shared, body)) => {
                self.responder.shared(&response_context, &shared, body, &outcome)
            }
            Some(FailedResponse::Unshared(response)) => self.responder.relayed(&response_context, response, &outcome),
            None => self.responder.failure(&response_context, &Outcome::Failed { fetched, failure }, failure),
        }
    }
}
