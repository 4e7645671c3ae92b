//! The ladder: what a client gets when a fetch failed or took too long. Stale, then last known good, then the
//! configured payload, then what the upstream did say, then a clear error of ours.

use std::sync::Arc;

use http::{Response, StatusCode};

use super::Proxy;
use super::flights::Arrival;
use super::visit::Quest;
use crate::body::Body;
use crate::policy::entry::Entry;
use crate::policy::freshness::stands_in;
use crate::policy::outcome::{Failure, Fetched, Outcome};

/// The failing answer itself, relayed if no rung holds.
#[derive(Debug)]
pub(super) enum Instead {
    /// One that others got too.
    Shared(Arc<Arrival>, Body),
    /// One for this request alone.
    Private(Response<Body>),
}

impl Instead {
    fn status(&self) -> StatusCode {
        match self {
            Instead::Shared(arrival, _) => arrival.status,
            Instead::Private(response) => response.status(),
        }
    }
}

impl Proxy {
    /// What the flight may have found in the fleet's store while this request waited.
    fn found_since(&self, quest: &Quest<'_>) -> Option<Arc<Entry>> {
        self.commons.fleet.as_ref()?;
        self.commons.memory.get(&quest.key)?.select(&quest.asked.headers).cloned()
    }

    /// While the upstream wants to hear nothing, what is stale stands in for it at once.
    pub(super) fn stale_while_closed(&self, quest: &Quest<'_>) -> Option<Response<Body>> {
        let entry = quest.miss.stale.as_ref()?;
        self.closed_for(quest.place, &quest.asked.headers)?;
        let now = quest.visit.now;
        let reason = stands_in(entry, self.commons.invalidations.standing(entry, now), Failure::Throttled, now)?;
        Some(self.stale(&*quest.asked, entry, reason, quest.plan, quest.visit))
    }

    /// Down the ladder.
    pub(super) fn ladder(
        &self,
        quest: &Quest<'_>,
        failure: Failure,
        instead: Option<Instead>,
        collapsed: bool,
    ) -> Response<Body> {
        let (asked, plan, visit) = (&*quest.asked, quest.plan, quest.visit);
        if let Some(entry) = quest.miss.stale.clone().or_else(|| self.found_since(quest)) {
            let now = visit.later();
            let standing = self.commons.invalidations.standing(&entry, now);
            if let Some(reason) = stands_in(&entry, standing, failure, now) {
                return self.stale(asked, &entry, reason, plan, visit);
            }
        }
        let status = instead.as_ref().map(Instead::status);
        let fetched = Fetched { forward: quest.miss.forward, status, collapsed, stored: Err(None) };
        if let Some(payload) = plan.fallback.as_ref().filter(|payload| payload.covers(failure)) {
            return self.payload(asked, payload, &Outcome::Fallback { fetched, failure }, plan, visit);
        }
        let outcome = Outcome::Relayed { fetched, failure: Some(failure) };
        match instead {
            Some(Instead::Shared(arrival, body)) => self.shared(asked, &arrival, body, &outcome, plan, visit),
            Some(Instead::Private(response)) => self.relayed(asked, response, &outcome, Some(plan), visit),
            None => self.failure(asked, &Outcome::Failed { fetched, failure }, failure, Some(plan), visit),
        }
    }
}
