//! A request that needs a fetch: board the flight for its key, wait for the landing within the deadline, take
//! what came or go down the ladder. And the refresh that nobody waits for.

use std::sync::Arc;

use http::request::Parts;
use http::{Method, Request, Response};
use tokio::time::{Instant, timeout_at};

use super::fallback::Instead;
use super::fetch::Job;
use super::flights::{Arrival, Landing, Lead, Seat, Waited, Waiter};
use super::lookup::{Lookup, Miss};
use super::site::Place;
use super::visit::Visit;
use super::{Commons, Proxy};
use crate::body::Body;
use crate::policy::entry::{Entry, Variant};
use crate::policy::freshness::Demands;
use crate::policy::key::KeyBuf;
use crate::policy::outcome::{Failure, Fetched, Forward, Outcome, Skip};
use crate::policy::plan::Plan;

/// A flight can be lost, or be for another variant, so often before we give up.
const ATTEMPTS: usize = 4;

/// One request on its way to an answer from upstream.
#[derive(Debug)]
pub(super) struct Quest<'a> {
    pub(super) asked: Arc<Parts>,
    pub(super) place: &'a Place,
    pub(super) plan: &'a Arc<Plan>,
    pub(super) key: KeyBuf,
    pub(super) miss: Miss,
    pub(super) visit: &'a Visit,
}

/// A seat on some flight.
struct Boarded {
    waiter: Waiter,
    collapsed: bool,
}

impl Proxy {
    /// Fetches what the cache does not have.
    pub(super) async fn fetch(
        self: Arc<Self>,
        request: Request<Body>,
        place: &Place,
        plan: &Arc<Plan>,
        key: KeyBuf,
        miss: Miss,
        visit: &Visit,
    ) -> Response<Body> {
        let (parts, _empty) = request.into_parts();
        let quest = Quest { asked: Arc::new(parts), place, plan, key, miss, visit };
        let deadline = Instant::from_std(visit.begun) + plan.deadline;
        let mut flight_key = quest.key.clone();
        let mut alone =
            quest.asked.method == Method::HEAD || self.commons.flights.is_hit_for_miss(&quest.key, visit.now);
        for _ in 0..ATTEMPTS {
            let boarded = match self.board(&quest, &flight_key, alone) {
                Ok(boarded) => boarded,
                Err(entry) => return self.hit(&*quest.asked, &entry, plan, visit),
            };
            let collapsed = boarded.collapsed;
            match timeout_at(deadline, boarded.waiter.landing()).await {
                Err(_elapsed) => return self.ladder(&quest, Failure::Timeout, None, collapsed),
                Ok(Waited::Landed(Landing::Failed(failure))) => {
                    return self.ladder(&quest, failure, None, collapsed);
                }
                Ok(Waited::Landed(Landing::Shared(arrival))) => {
                    if !arrival.variant.selected_by(&quest.asked.headers) {
                        flight_key = variant_key(&quest, &arrival.variant);
                    } else if let Some(body) = arrival.body() {
                        return self.take(&quest, arrival, body, collapsed);
                    } else {
                        alone = true;
                    }
                }
                Ok(Waited::Private(response)) => return self.take_private(&quest, response),
                Ok(Waited::Landed(Landing::Released)) => alone = true,
                Ok(Waited::Lost) => {}
            }
        }
        self.ladder(&quest, Failure::Internal, None, false)
    }

    /// Refreshes an entry behind a client's back, unless somebody does already.
    pub(super) fn refresh(
        self: &Arc<Self>,
        request: &Request<Body>,
        place: &Place,
        plan: &Arc<Plan>,
        key: &[u8],
        entry: &Arc<Entry>,
    ) {
        let (parts, ()) = copy_of(request).into_parts();
        let Commons { flights, invalidations, .. } = &*self.commons;
        let position = invalidations.position();
        let address = self.site.address(place, request.uri(), plan);
        if let Seat::Lead(lead, _nobody_waits) = flights.board(key, &address, position, invalidations) {
            let (asked, place, plan, stale) = (Arc::new(parts), place.clone(), plan.clone(), Some(entry.clone()));
            self.spawn(lead, Job { asked, place, plan, key: key.into(), address, position, stale });
        }
    }

    /// A seat on the flight for a key; as its leader, if there is none. Or, if one landed just now, what it
    /// brought.
    fn board(self: &Arc<Self>, quest: &Quest<'_>, flight_key: &[u8], alone: bool) -> Result<Boarded, Arc<Entry>> {
        let Commons { flights, invalidations, .. } = &*self.commons;
        let position = invalidations.position();
        let address = self.site.address(quest.place, &quest.asked.uri, quest.plan);
        let (lead, waiter) = if alone {
            flights.alone()
        } else {
            match flights.board(flight_key, &address, position, invalidations) {
                Seat::Lead(lead, waiter) => (lead, waiter),
                Seat::Follow(waiter) => return Ok(Boarded { waiter, collapsed: true }),
            }
        };
        let refused = quest.miss.forward == Forward::Request;
        if !alone
            && !refused
            && let Lookup::Fresh(entry) =
                self.look_up(&quest.key, &quest.asked.headers, &Demands::default(), quest.visit.later())
        {
            return Err(entry);
        }
        let (asked, place, plan) = (quest.asked.clone(), quest.place.clone(), quest.plan.clone());
        let (key, stale) = (quest.key.to_vec().into(), quest.miss.stale.clone());
        self.spawn(lead, Job { asked, place, plan, key, address, position, stale });
        Ok(Boarded { waiter, collapsed: false })
    }

    /// A flight is a task: nobody's leaving ends it.
    fn spawn(self: &Arc<Self>, lead: Lead, job: Job) {
        tokio::spawn(self.clone().fly(lead, job));
    }

    /// A shared answer.
    fn take(&self, quest: &Quest<'_>, arrival: Arc<Arrival>, body: Body, collapsed: bool) -> Response<Body> {
        match arrival.failure {
            Some(failure) => self.ladder(quest, failure, Some(Instead::Shared(arrival, body)), collapsed),
            None => self.arrived(quest, &arrival, body, collapsed),
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

/// The key of a flight for those who ask with other values in the headers that turned out to matter.
fn variant_key(quest: &Quest<'_>, variant: &Variant) -> KeyBuf {
    let names = variant.0.iter().map(|(name, _)| name.clone()).collect();
    let own = Variant::of(names, &quest.asked.headers);
    let mut key = quest.key.clone();
    key.push(0xfe);
    for (name, values) in &own.0 {
        key.extend_from_slice(name.as_str().as_bytes());
        for value in values {
            key.extend_from_slice(&(value.len() as u64).to_be_bytes());
            key.extend_from_slice(value.as_bytes());
        }
        key.push(0xff);
    }
    key
}

fn copy_of(request: &Request<Body>) -> Request<()> {
    let mut copy = Request::new(());
    *copy.method_mut() = Method::GET;
    copy.uri_mut().clone_from(request.uri());
    copy.headers_mut().clone_from(request.headers());
    *copy.version_mut() = request.version();
    *copy.extensions_mut() = request.extensions().clone();
    copy
}
