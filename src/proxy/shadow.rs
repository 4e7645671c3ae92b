//! The rehearsal, `mode = "shadow"`: every request is handed through, and what the cache would have answered is compared
//! with what the upstream did. What a fetch would have stored is stored, so that the next one would have been a hit.

use std::sync::Arc;

use http::header::ETAG;
use http::request::Parts;
use http::{HeaderMap, Method, Request, Response, StatusCode};
use tracing::warn;

use super::Proxy;
use super::fetch::{declared_length, head};
use super::job::Job;
use super::lookup::Lookup;
use super::site::Place;
use super::visit::Visit;
use crate::body::Body;
use crate::body::overheard::overheard;
use crate::policy::asked::Asked;
use crate::policy::entry::Entry;
use crate::policy::head::Casing;
use crate::policy::inspect::{Answer, Comparison, compare, is_empty_at};
use crate::policy::invalidation::Position;
use crate::policy::outcome::{Failure, Rehearsed};
use crate::policy::plan::Plan;
use crate::policy::storage::decide;

/// Larger answers are not compared, plain or unfolded, in bytes.
const MAX_COMPARED: usize = 1 << 20;

/// What would have become of a request.
pub(super) struct Rehearsal {
    plan: Arc<Plan>,
    key: Box<[u8]>,
    /// What would have been served.
    served: Option<Arc<Entry>>,
    /// Would the upstream have been asked, now or behind the answer?
    fetches: bool,
    /// Before the request went out.
    position: Position,
}

impl Proxy {
    /// Looks what the cache would do with a request; none: it would hand it through.
    pub(super) fn rehearse(&self, request: &Request<Body>, place: &Place, visit: &Visit) -> Option<Rehearsal> {
        let (plan, demands, key) = self.cacheable(request, place).ok()?;
        let position = self.commons.invalidations.position();
        let (served, fetches) = match self.look_up(&key, request.headers(), &demands, visit.now) {
            Lookup::Fresh(entry) => (Some(entry), false),
            Lookup::WhileRevalidate(entry) => (Some(entry), true),
            Lookup::Fetch(_) => (None, true),
        };
        Some(Rehearsal { plan: plan.clone(), key: key.to_vec().into(), served, fetches, position })
    }

    /// Lets the upstream's answer pass, and compares it with what would have been served.
    pub(super) fn compared(
        self: &Arc<Self>,
        rehearsal: Rehearsal,
        asked: &Parts,
        place: &Place,
        visit: &Visit,
        response: Response<Body>,
    ) -> Response<Body> {
        let judged = match &rehearsal.served {
            None => Some(Rehearsed::Miss),
            // A failure that the cache would have kept from the client.
            Some(_) if Failure::from_status(response.status()).is_some() => Some(Rehearsed::Hit),
            Some(served) if asked.method != Method::GET || response.status() != StatusCode::OK => {
                Some(by_head(served, &response))
            }
            Some(served) if served.body.len().max(declared(&response)) > MAX_COMPARED => Some(Rehearsed::NotCompared),
            Some(_) => None,
        };
        if let Some(judged) = judged {
            self.site.meter.rehearsed(&rehearsal.plan.name, judged);
        }
        let storing = rehearsal.fetches && asked.method == Method::GET;
        if judged.is_some() && !storing {
            return response;
        }
        let (parts, body) = response.into_parts();
        let (proxy, asked, place, visit) = (self.clone(), asked.clone(), place.clone(), visit.clone());
        let came = Response::from_parts(parts.clone(), Body::Empty);
        let most = usize::try_from(self.commons.max_entry_bytes).unwrap_or(usize::MAX);
        let heard = move |whole: bytes::Bytes| {
            if let (Some(served), None) = (rehearsal.served.clone(), judged) {
                let (proxy, plan, visit) = (proxy.clone(), rehearsal.plan.clone(), visit.clone());
                let (path, fresh, whole) = (asked.uri.path().to_owned(), came.headers().clone(), whole.clone());
                // It may take milliseconds, which nobody's requests should wait for.
                tokio::task::spawn_blocking(move || proxy.judge(&plan, &path, &served, (&fresh, &whole), &visit));
            }
            if storing {
                proxy.store_rehearsed(rehearsal, &asked, &place, &visit, came, whole);
            }
        };
        Response::from_parts(parts, overheard(body, most, &self.commons.purse, heard))
    }

    /// Compares a whole answer with what would have been served, and counts.
    fn judge(&self, plan: &Plan, path: &str, served: &Entry, fresh: (&HeaderMap, &[u8]), visit: &Visit) {
        let stored = served.head.headers();
        let (stored, fresh) =
            (Answer { headers: &stored, body: &served.body }, Answer { headers: fresh.0, body: fresh.1 });
        let judged = match compare(stored, fresh, &plan.volatile, MAX_COMPARED) {
            Comparison::Same => Rehearsed::Hit,
            Comparison::Unreadable => Rehearsed::NotCompared,
            Comparison::Differ(at) => {
                self.tell_of_wrong_hit(plan, path, served, &at, visit);
                Rehearsed::WrongHit
            }
        };
        self.site.meter.rehearsed(&plan.name, judged);
    }

    fn tell_of_wrong_hit(&self, plan: &Plan, path: &str, served: &Entry, at: &str, visit: &Visit) {
        if self.site.meter.may_tell_of_wrong_hit(visit.now) {
            let (upstream, rule, age) = (&*self.site.name, &*plan.name, served.age(visit.now));
            warn!(upstream, rule, path, differs_at = at, age, "a hit would have been wrong");
        }
    }

    fn store_rehearsed(
        &self,
        rehearsal: Rehearsal,
        asked: &Parts,
        place: &Place,
        visit: &Visit,
        came: Response<Body>,
        body: bytes::Bytes,
    ) {
        let Rehearsal { plan, key, position, served, .. } = rehearsal;
        let job = Job { stale: served, ..self.job_beside(asked, place, plan, key, position) };
        let came = self.came_beside(came, visit);
        let (status, headers) = (came.response.status(), came.response.headers());
        // As a fetch does it: a failure only if it says for how long and nothing is better, an empty list never.
        let failure = Failure::from_status(status);
        let max = usize::try_from(self.commons.max_entry_bytes).unwrap_or(usize::MAX);
        let empty = |pointer: &str| status.is_success() && is_empty_at(pointer, headers, &body, max);
        if failure.is_some_and(|failure| !self.may_store_failure(&job, &came, failure))
            || job.plan.reject_empty.as_deref().is_some_and(empty)
        {
            return;
        }
        if let Ok(store) = decide(&Asked::from(&*job.asked), &came.answered(), &job.plan) {
            let casing = came.response.extensions().get::<Casing>().cloned();
            let head = head(came.response.status(), came.response.headers(), casing, &job, &store, &came);
            self.keep(&job, &self.entry(&job, head, body, &store, came.born));
        }
    }
}

/// Bytes that an answer says it has.
fn declared(response: &Response<Body>) -> usize {
    declared_length(response).map_or(0, |length| usize::try_from(length).unwrap_or(usize::MAX))
}

/// No body to compare: the validators tell, or nobody does.
fn by_head(served: &Entry, response: &Response<Body>) -> Rehearsed {
    let stored = served.head.headers();
    match (stored.get(ETAG), response.headers().get(ETAG)) {
        _ if !response.status().is_redirection() && response.status() != served.head.status => Rehearsed::WrongHit,
        (Some(stored), Some(fresh)) if stored == fresh => Rehearsed::Hit,
        (Some(_), Some(_)) => Rehearsed::WrongHit,
        _ => Rehearsed::NotCompared,
    }
}
