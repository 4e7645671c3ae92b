//! A request that needs a fetch: board the flight for its key, wait for the landing within the deadline, take
//! what came or go down the ladder. And the refresh that nobody waits for.

use std::sync::{Arc, Mutex};

use http::{Method, Request, Response};
use tokio::time::{Instant, timeout_at};
use tracing::Instrument;

use super::fallback::Instead;
use super::flights::{Arrival, Landing, Lead, Seat, Waited, Waiter};
use super::job::{Help, Job};
use super::lookup::{Lookup, Miss, variant_key};
use super::site::Place;
use super::visit::{Quest, Visit};
use super::{Commons, Proxy};
use crate::body::Body;
use crate::policy::entry::Entry;
use crate::policy::freshness::{Demands, Verdict, judge};
use crate::policy::key::KeyBuf;
use crate::policy::outcome::{Failure, Fetched, Forward, Outcome, Skip, StaleReason};
use crate::policy::plan::Plan;
use crate::telemetry::spans;

/// A flight can be lost, or be for another variant, so often before we give up.
const ATTEMPTS: usize = 4;

/// What comes of asking for a seat on a flight.
enum Boarding {
    /// Somebody fetches.
    Follow(Waiter),
    /// We do.
    Lead(Box<(Lead, Job)>, Waiter),
    /// One landed just now, with this.
    Hit(Arc<Entry>),
    /// Meanwhile it became known which request headers matter: ask again with this key.
    Rebook(Box<KeyBuf>),
}

impl Proxy {
    /// Fetches what the cache does not have.
    pub(super) async fn fetch(
        self: Arc<Self>,
        request: Request<Body>,
        place: Place,
        plan: Arc<Plan>,
        key: KeyBuf,
        miss: Miss,
        visit: Visit,
    ) -> Response<Body> {
        let (parts, _empty) = request.into_parts();
        let (asked, place, plan, visit) = (Arc::new(parts), &place, &plan, &visit);
        let quest = Quest { asked, place, plan, key, miss, visit };
        if let Some(stale) = self.stale_while_closed(&quest) {
            return stale;
        }
        let deadline = Instant::from_std(visit.begun) + plan.deadline;
        let mut flight_key = quest.miss.flight_key(&quest.key, &quest.asked.headers);
        let mut alone =
            quest.asked.method == Method::HEAD || self.commons.flights.is_hit_for_miss(&quest.key, visit.now);
        let mut learnt = false;
        let mut attempts = 0;
        while attempts < ATTEMPTS {
            attempts += 1;
            let (waiter, collapsed) = match self.board(&quest, &flight_key, alone, learnt) {
                Boarding::Follow(waiter) => (waiter, true),
                Boarding::Lead(flight, waiter) => {
                    if let Some(response) = self.take_off(*flight, &quest, deadline).await {
                        return response;
                    }
                    (waiter, false)
                }
                Boarding::Hit(entry) => return self.hit(&*quest.asked, &entry, plan, visit),
                Boarding::Rebook(key) => {
                    flight_key = *key;
                    continue;
                }
            };
            match timeout_at(deadline, waiter.landing()).instrument(spans::wait()).await {
                Err(_elapsed) => return self.ladder(&quest, Failure::Timeout, None, collapsed),
                Ok(Waited::Landed(Landing::Failed(failure), _)) => {
                    return self.ladder(&quest, failure, None, collapsed);
                }
                Ok(Waited::Landed(Landing::Shared(arrival), own)) => {
                    if !arrival.variant.selected_by(&quest.asked.headers) {
                        flight_key = variant_key(&quest.key, &arrival.variant, &quest.asked.headers);
                        learnt = true;
                    } else if let Some(body) = own.or_else(|| arrival.body_for(collapsed)) {
                        return self.take(&quest, arrival, body, collapsed);
                    } else {
                        alone = true;
                    }
                }
                Ok(Waited::Landed(Landing::Found(entry), _)) => {
                    if !entry.variant.selected_by(&quest.asked.headers) {
                        flight_key = variant_key(&quest.key, &entry.variant, &quest.asked.headers);
                        learnt = true;
                    } else if let Some(response) = self.found(&quest, &entry) {
                        return response;
                    } else {
                        alone = true;
                    }
                }
                Ok(Waited::Private(response)) => return self.take_private(&quest, response),
                Ok(Waited::Landed(Landing::Released, _)) => alone = true,
                // Leaders who leave before they begin are nobody's failure.
                Ok(Waited::Landed(Landing::Again, _)) => attempts -= 1,
                Ok(Waited::Lost) => {}
            }
        }
        self.ladder(&quest, Failure::Internal, None, false)
    }

    /// Refreshes an entry behind a client's back, unless somebody does already. `ahead`: before it has to be.
    pub(super) fn refresh(
        self: &Arc<Self>,
        request: &Request<Body>,
        place: &Place,
        plan: &Arc<Plan>,
        key: &[u8],
        entry: &Arc<Entry>,
        ahead: bool,
    ) {
        let Commons { flights, invalidations, .. } = &*self.commons;
        let (position, headers) = (invalidations.position(), request.headers());
        if self.closed_for(place, headers).is_some() {
            // Nobody waits for it: the next request after the pause refreshes it.
            return;
        }
        let flight_key = variant_key(key, &entry.variant, headers);
        let refreshed = || match self.look_up(key, headers, &Demands::default(), self.commons.clock.now()) {
            Lookup::Fresh(found) if ahead && Arc::ptr_eq(&found, entry) => None,
            Lookup::Fresh(_) => Some(()),
            Lookup::WhileRevalidate(_) | Lookup::Fetch(_) => None,
        };
        let boarded = flights.board(&flight_key, &entry.address, position, invalidations, refreshed);
        if let Ok(Seat::Lead(lead, _nobody_waits)) = boarded {
            let (help, ahead) = if ahead { (Help::Claim, Some(entry.born)) } else { (Help::All, None) };
            // By the rules of now: they may have other tags than those it was stored under.
            let (address, stale) = (self.site.address(place, request.uri(), plan), Some(entry.clone()));
            let (asked, place, plan) = (Arc::new(copy_of(request).into_parts().0), place.clone(), plan.clone());
            let (key, lease) = (key.into(), Mutex::default());
            self.spawn(lead, Job { asked, place, plan, key, address, position, stale, help, ahead, lease });
        }
    }

    /// A seat on the flight for a key; as its leader, if there is none.
    fn board(self: &Arc<Self>, quest: &Quest<'_>, flight_key: &KeyBuf, alone: bool, learnt: bool) -> Boarding {
        let Commons { flights, invalidations, .. } = &*self.commons;
        let position = invalidations.position();
        let address = self.site.address(quest.place, &quest.asked.uri, quest.plan);
        let (lead, waiter) = if alone {
            flights.alone()
        } else {
            let look_again = || self.look_again(quest, flight_key, learnt);
            match flights.board(flight_key, &address, position, invalidations, look_again) {
                Ok(Seat::Lead(lead, waiter)) => (lead, waiter),
                Ok(Seat::Follow(waiter)) => return Boarding::Follow(waiter),
                Err(instead) => return instead,
            }
        };
        let (asked, place, plan) = (quest.asked.clone(), quest.place.clone(), quest.plan.clone());
        let (key, stale) = (quest.key.to_vec().into(), quest.miss.stale.clone());
        let validated =
            alone && flights.why_hit_for_miss(&quest.key, quest.visit.now).is_some_and(|why| why.1.is_none());
        let (help, ahead, lease) = (help(quest, alone, validated), None, Mutex::default());
        let job = Job { asked, place, plan, key, address, position, stale, help, ahead, lease };
        Boarding::Lead(Box::new((lead, job)), waiter)
    }

    /// Begins a flight: with a look at what the fleet has, which may be all that is needed. Until then it ends with
    /// this request, and those who wait board again; from then on it is a task of its own.
    async fn take_off(
        self: &Arc<Self>,
        flight: (Lead, Job),
        quest: &Quest<'_>,
        deadline: Instant,
    ) -> Option<Response<Body>> {
        let (mut lead, mut job) = flight;
        lead.set_grounded(true);
        let found = timeout_at(deadline, self.look_first(&mut lead, &mut job)).await.ok().flatten();
        lead.set_grounded(false);
        if let Some(entry) = found {
            lead.land(Landing::Found(entry.clone()));
            return self.found(quest, &entry);
        }
        self.spawn(lead, job);
        None
    }

    /// Between the look-up and the boarding a flight may have landed: is there a hit now, or is it known now
    /// which request headers matter?
    fn look_again(&self, quest: &Quest<'_>, flight_key: &KeyBuf, learnt: bool) -> Option<Boarding> {
        if quest.miss.forward == Forward::Request {
            return None;
        }
        let headers = &quest.asked.headers;
        match self.look_up(&quest.key, headers, &Demands::default(), quest.visit.later()) {
            Lookup::Fresh(entry) => Some(Boarding::Hit(entry)),
            Lookup::WhileRevalidate(_) => None,
            Lookup::Fetch(Miss { sibling: None, .. }) => None,
            // An answer that is just coming has said more than what is stored.
            Lookup::Fetch(_) if learnt => None,
            Lookup::Fetch(miss) => {
                let key = miss.flight_key(&quest.key, headers);
                (key != *flight_key).then(|| Boarding::Rebook(Box::new(key)))
            }
        }
    }

    /// A flight is a task: nobody's leaving ends it.
    pub(super) fn spawn(self: &Arc<Self>, lead: Lead, job: Job) {
        tokio::spawn(self.clone().fly(lead, job).instrument(spans::flight()));
    }

    /// A shared answer.
    fn take(&self, quest: &Quest<'_>, arrival: Arc<Arrival>, body: Body, collapsed: bool) -> Response<Body> {
        match arrival.failure {
            Some(failure) => self.ladder(quest, failure, Some(Instead::Shared(arrival, body)), collapsed),
            None => self.arrived(quest, &arrival, body, collapsed),
        }
    }

    /// What the fleet had already, if it may be served to this request.
    pub(super) fn found(&self, quest: &Quest<'_>, entry: &Arc<Entry>) -> Option<Response<Body>> {
        let now = quest.visit.later();
        let demands = Demands::of(quest.plan, &quest.asked.headers);
        let standing = self.commons.invalidations.standing(entry, now);
        match judge(entry, standing, &demands, now) {
            Verdict::Fresh => {
                self.commons.telemetry.found_in_fleet();
                Some(self.hit(&*quest.asked, entry, quest.plan, quest.visit))
            }
            Verdict::WhileRevalidate => {
                self.commons.telemetry.found_in_fleet();
                let reason = StaleReason::WhileRevalidate;
                Some(self.stale(&*quest.asked, entry, reason, quest.plan, quest.visit))
            }
            Verdict::Stale | Verdict::Refused | Verdict::Gone => None,
        }
    }

    /// An answer for this request alone.
    fn take_private(&self, quest: &Quest<'_>, response: Response<Body>) -> Response<Body> {
        match Failure::from_status(response.status()) {
            Some(failure) => self.ladder(quest, failure, Some(Instead::Private(response)), false),
            None => {
                let skip = response.extensions().get::<Skip>().copied();
                let status = Some(response.status());
                let fetched = Fetched { forward: quest.miss.forward, status, collapsed: false, stored: Err(skip) };
                let outcome = Outcome::Relayed { fetched, failure: None };
                self.relayed(&*quest.asked, response, &outcome, Some(quest.plan), quest.visit)
            }
        }
    }
}

/// How much of the fleet's help this request wants.
fn help(quest: &Quest<'_>, alone: bool, validated: bool) -> Help {
    if quest.miss.forward == Forward::Request {
        Help::None
    } else if quest.asked.method == Method::HEAD {
        Help::Look
    } else if alone {
        // What must be validated each time may be here to be validated, or there.
        if validated && quest.miss.stale.is_none() { Help::Look } else { Help::None }
    } else {
        Help::All
    }
}

pub(super) fn copy_of(request: &Request<Body>) -> Request<()> {
    let mut copy = Request::new(());
    *copy.method_mut() = Method::GET;
    copy.uri_mut().clone_from(request.uri());
    copy.headers_mut().clone_from(request.headers());
    *copy.version_mut() = request.version();
    *copy.extensions_mut() = request.extensions().clone();
    copy
}
