//! What passes by and is worth keeping: the beginning of an answer, to be completed when somebody asks for the whole;
//! the answer to a POST that says what a GET would bring.

use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http::header::CONTENT_LOCATION;
use http::request::Parts;
use http::{Method, Request, Response, StatusCode};

use super::Proxy;
use super::fetch::{Came, declared_length, head};
use super::job::{Help, Job};
use super::lookup::Miss;
use super::relay::named_target;
use super::send::Sent;
use super::site::Place;
use super::visit::{Quest, Visit};
use super::wait::copy_of;
use crate::body::Body;
use crate::body::overheard::overheard;
use crate::policy::asked::Asked;
use crate::policy::freshness::{Demands, Verdict, judge};
use crate::policy::headers::strip_hop_by_hop;
use crate::policy::invalidation::Position;
use crate::policy::key::KeyBuf;
use crate::policy::outcome::Bypass;
use crate::policy::partial::{Partial, begins};
use crate::policy::plan::{CacheMode, Plan};
use crate::policy::revalidate::{condition, of_another};
use crate::policy::route::Route;
use crate::policy::storage::{Answered, Store, decide, has_explicit_lifetime};
use crate::policy::target::target;

/// What passes by is kept if it is not larger, in bytes.
const MAX_ASIDE: u64 = 256 << 10;

/// What an answer that passes by may be kept as.
enum Kept {
    /// The first bytes, so many, of a whole of that length.
    Beginning(u64, u64),
    /// What a GET would bring.
    ForGet,
}

impl Proxy {
    /// A part of what is not in memory: from what the fleet has, or from the upstream.
    pub(super) async fn part(
        self: Arc<Self>,
        request: Request<Body>,
        place: Place,
        plan: Arc<Plan>,
        key: KeyBuf,
        miss: Miss,
        visit: Visit,
    ) -> Response<Body> {
        if self.commons.fleet.is_some() {
            let asked = Arc::new(copy_of(&request).into_parts().0);
            let quest = Quest { asked, place: &place, plan: &plan, key, miss, visit: &visit };
            if let Some(response) = self.found_in_fleet(&quest).await {
                return response;
            }
        }
        self.relay(request, place, Bypass::Range, visit).await
    }

    /// Lets an answer pass, and keeps a copy if it is one to keep. `position`: before the request for it went out.
    pub(super) fn aside(
        self: &Arc<Self>,
        asked: &Parts,
        place: &Place,
        position: Position,
        visit: &Visit,
        response: Response<Body>,
    ) -> Response<Body> {
        let Some(kept) = worth_keeping(asked, place, &response) else { return response };
        let Route::Cache(plan) =
            self.site.router.route(&Method::GET, asked.uri.path(), asked.uri.query(), &asked.headers)
        else {
            return response;
        };
        let unwanted = Demands::of(plan, &asked.headers).no_store() || plan.reject_empty.is_some();
        if plan.mode != CacheMode::Http || unwanted {
            return response;
        }
        let Ok(key) = self.key(&asked.uri, &asked.headers, place, plan) else { return response };
        let job = self.job_beside(asked, place, plan.clone(), key.to_vec().into(), position);
        let (parts, body) = response.into_parts();
        let came = self.came_beside(Response::from_parts(parts.clone(), Body::Empty), visit);
        let most = MAX_ASIDE.min(self.commons.max_entry_bytes);
        let answered = Answered { status: StatusCode::OK, ..came.answered() };
        // RFC 9110 §9.3.3: a POST's answer needs a lifetime of its own. A beginning without one is not worth it.
        let lasting = |store: &Store| store.terms.fresh_for > 0 && has_explicit_lifetime(&answered);
        let store = decide(&Asked::from(&*job.asked), &answered, &job.plan).ok().filter(lasting);
        let too_large = declared_length(&came.response) > Some(most);
        let Some(store) = store.filter(|_| !too_large) else { return Response::from_parts(parts, body) };
        let (proxy, most) = (self.clone(), usize::try_from(most).unwrap_or(0));
        let keep = move |body| proxy.put_aside(&job, &came, &store, &kept, body);
        Response::from_parts(parts, overheard(body, most, &self.commons.purse, keep))
    }

    /// What a flight for the same would have to bring: a GET.
    pub(super) fn job_beside(
        &self,
        asked: &Parts,
        place: &Place,
        plan: Arc<Plan>,
        key: Box<[u8]>,
        position: Position,
    ) -> Job {
        let mut get = Request::new(());
        get.uri_mut().clone_from(&asked.uri);
        get.headers_mut().clone_from(&asked.headers);
        Job {
            asked: Arc::new(get.into_parts().0),
            place: place.clone(),
            address: self.site.address(place, &asked.uri, &plan),
            plan,
            key,
            position,
            stale: None,
            help: Help::None,
            ahead: None,
            lease: Mutex::default(),
        }
    }

    /// An answer that has just come, to a request that was handed through.
    pub(super) fn came_beside(&self, response: Response<Body>, visit: &Visit) -> Came {
        Came { response, born: visit.later(), at: self.commons.clock.wall(), delay: visit.elapsed() }
    }

    fn put_aside(&self, job: &Job, came: &Came, store: &Store, kept: &Kept, body: Bytes) {
        let came_all = body.len() as u64;
        let head = head(came.response.status(), came.response.headers(), None, job, store, came);
        let entry = self.entry(job, head, body, store, came.born);
        match kept {
            Kept::Beginning(bytes, length) => {
                if came_all == *bytes {
                    self.commons.partials.put(&job.key, Partial { start: entry, length: *length });
                }
            }
            Kept::ForGet => self.keep(job, &entry),
        }
    }

    /// Sends a flight's request: for the rest only, if the beginning is here.
    pub(super) async fn send_for(&self, job: &Job) -> Sent {
        let beginning = self.beginning(job);
        let sent = self.send(&job.asked, &job.place, Body::Empty, |request| {
            job.shape(request);
            if let Some(partial) = &beginning {
                partial.ask_for_rest(request.headers_mut());
            }
        });
        let sent = sent.await;
        let Some(partial) = beginning else { return self.unless_of_another(job, sent).await };
        match sent.answer {
            Ok(mut response)
                if matches!(response.status(), StatusCode::PARTIAL_CONTENT | StatusCode::RANGE_NOT_SATISFIABLE) =>
            {
                strip_hop_by_hop(response.headers_mut());
                if let Some(whole) = partial.completed(response.status(), response.headers()) {
                    let mut response = response.map(|rest| Body::prefixed(partial.start.body.clone(), rest));
                    *response.status_mut() = StatusCode::OK;
                    *response.headers_mut() = whole;
                    return Sent { answer: Ok(response), ..sent };
                }
                // It may be of another representation: the whole, then.
                self.send(&job.asked, &job.place, Body::Empty, |request| job.shape(request)).await
            }
            answer => Sent { answer, ..sent },
        }
    }

    /// A 304 that names another strong validator than was asked about says nothing of what is stored (RFC 9111 §4.3.4):
    /// asked again, without conditions.
    async fn unless_of_another(&self, job: &Job, sent: Sent) -> Sent {
        let of_another = |response: &Response<Body>| {
            let stored = job.stale.as_ref().map(|stale| stale.head.headers());
            response.status() == StatusCode::NOT_MODIFIED
                && stored.is_some_and(|stored| of_another(&stored, response.headers()))
        };
        if !sent.answer.as_ref().is_ok_and(of_another) {
            return sent;
        }
        self.send(&job.asked, &job.place, Body::Empty, |request| {
            job.shape(request);
            condition(request.headers_mut(), None);
        })
        .await
    }

    /// What is here of what a flight is to bring, if it still counts.
    fn beginning(&self, job: &Job) -> Option<Arc<Partial>> {
        if job.asked.method != Method::GET || job.stale.is_some() {
            return None;
        }
        let partial = self.commons.partials.take(&job.key)?;
        let now = self.commons.clock.now();
        let standing = self.commons.invalidations.standing(&partial.start, now);
        let fresh = judge(&partial.start, standing, &Demands::default(), now) == Verdict::Fresh;
        (fresh && partial.start.variant.selected_by(&job.asked.headers)).then_some(partial)
    }
}

fn worth_keeping(asked: &Parts, place: &Place, response: &Response<Body>) -> Option<Kept> {
    let (status, headers) = (response.status(), response.headers());
    if asked.method == Method::GET {
        return begins(status, headers).map(|(bytes, length)| Kept::Beginning(bytes, length));
    }
    let of_same = || named_target(place, headers.get(CONTENT_LOCATION)?);
    let same = || of_same().as_deref() == Some(target(&asked.uri));
    (asked.method == Method::POST && status == StatusCode::OK && same()).then_some(Kept::ForGet)
}
