//! A flight: sends the request, decides whether the answer may be stored, and brings it home.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{AGE, CONTENT_LENGTH, HeaderMap};
use http::{Method, Response, StatusCode};
use http_body::Body as _;
use tokio::time::{Instant, timeout, timeout_at};
use tracing::debug;

use super::Proxy;
use super::fleet::Next;
use super::flights::{Arrival, Content, Landing, Lead};
use super::job::Job;
use super::site::tags;
use crate::body::fanout::{Ending, Fanout, Held};
use crate::body::{Body, BodyError};
use crate::policy::Tick;
use crate::policy::asked::Asked;
use crate::policy::entry::{About, Entry, Terms};
use crate::policy::freshness::{Demands, Verdict, judge, stands_in};
use crate::policy::head::{Casing, Head};
use crate::policy::headers::{add_date, only, strip_hop_by_hop};
use crate::policy::inspect::is_empty_at;
use crate::policy::invalidation::Standing;
use crate::policy::key::short_name;
use crate::policy::links;
use crate::policy::outcome::{Failure, Skip};
use crate::policy::plan::CacheMode;
use crate::policy::revalidate::{Heads, freshen, heads, of_another};
use crate::policy::storage::{Answered, Store, decide, failure_vary, initial_age};
use crate::policy::variant::Variant;

/// An answer's head, with the time of its arrival.
pub(super) struct Came {
    pub(super) response: Response<Body>,
    pub(super) born: Tick,
    pub(super) at: std::time::SystemTime,
    pub(super) delay: Duration,
}

impl Came {
    pub(super) fn answered(&self) -> Answered<'_> {
        Answered { status: self.response.status(), headers: self.response.headers(), at: self.at, delay: self.delay }
    }
}

impl Proxy {
    /// The whole flight. Ends when the answer is stored, passed on, or known not to come.
    pub(super) async fn fly(self: Arc<Self>, mut lead: Lead, mut job: Job) {
        let by = Instant::now() + self.site.timeouts.fetch;
        match self.ask_fleet(&mut lead, &mut job, by).await {
            Next::Found(entry) => return lead.land(Landing::Found(entry)),
            Next::Fetch(lease) => *job.lease() = lease,
        }
        // What is purged from here on is later than this fetch.
        job.position = self.commons.invalidations.position();
        let sending = self.send_for(&job);
        let sent = if job.asked.method == Method::HEAD {
            // It can't be stored: when nobody waits any more, nobody needs it.
            tokio::select! {
                sent = sending => sent,
                () = lead.left_alone() => return,
            }
        } else {
            sending.await
        };
        let delay = self.commons.clock.instant().saturating_duration_since(sent.at);
        let by = Instant::from_std(sent.at) + self.site.timeouts.fetch;
        match sent.answer {
            Err(error) => {
                if error.was_tried() {
                    self.upstream_ended(Some(error.failure), delay, &error.message);
                }
                lead.land(Landing::Failed(error.failure));
            }
            Ok(mut response) => {
                strip_hop_by_hop(response.headers_mut());
                let failure = Failure::from_status(response.status());
                self.upstream_ended(failure, delay, response.status().as_str());
                let (born, at) = (self.commons.clock.now(), self.commons.clock.wall());
                self.came(lead, &job, Came { response, born, at, delay }, by).await;
            }
        }
    }

    /// An answer's head is here: what is it good for?
    async fn came(&self, lead: Lead, job: &Job, came: Came, by: Instant) {
        if came.response.status() == StatusCode::NOT_MODIFIED
            && let Some(stale) = job.stale.as_ref().filter(|_| job.asked.method == Method::GET)
        {
            if of_another(&stale.head.headers(), came.response.headers()) {
                return lead.land(Landing::Failed(Failure::Malformed));
            }
            return self.validated(lead, job, stale, &came);
        }
        let failure = Failure::from_status(came.response.status());
        if let Some(failure) = failure.filter(|failure| !self.may_store_failure(job, &came, *failure)) {
            let shared = failure_vary(&came.answered(), &job.plan).filter(|_| job.asked.method == Method::GET);
            let Some(vary) = shared else { return self.released(lead, job, came.response, Skip::Status) };
            let store = Store { terms: Terms::default(), vary, drop: Vec::new() };
            return self.stream(lead, job, came, store, Some(failure), by).await;
        }
        let asked = Asked::from(&*job.asked);
        if *asked.method == Method::HEAD
            && came.response.status() == StatusCode::OK
            && let Some(stored) = &job.stale
        {
            self.headed(job, stored, &came);
        }
        match decide(&asked, &came.answered(), &job.plan) {
            Err(skip) => self.released(lead, job, came.response, skip),
            Ok(_) if declared_length(&came.response) > Some(self.commons.max_entry_bytes) => {
                self.released(lead, job, came.response, Skip::TooLarge);
            }
            Ok(store) if job.plan.reject_empty.is_some() && came.response.status().is_success() => {
                self.inspect(lead, job, came, store, by).await;
            }
            Ok(store) => self.stream(lead, job, came, store, None, by).await,
        }
    }

    /// Does the upstream itself say for how long its failure is good (RFC 9111 §3), and is there nothing better?
    pub(super) fn may_store_failure(&self, job: &Job, came: &Came, failure: Failure) -> bool {
        let now = self.commons.clock.now();
        let better = |stored: &Arc<Entry>| {
            let standing = self.commons.invalidations.standing(stored, now);
            self.is_fresh(stored) || stands_in(stored, standing, failure, now).is_some()
        };
        let covered = job.plan.fallback.as_ref().is_some_and(|payload| payload.covers(failure));
        matches!(failure, Failure::Status(_))
            && job.plan.mode == CacheMode::Http
            && !covered
            && !job.stale.as_ref().is_some_and(better)
            && decide(&Asked::from(&*job.asked), &came.answered(), &job.plan)
                .is_ok_and(|store| store.terms.fresh_for > 0)
    }

    /// Not for sharing. Next time nobody waits for it.
    fn released(&self, lead: Lead, job: &Job, mut response: Response<Body>, skip: Skip) {
        // A failure says nothing about what the next answer will be.
        if job.asked.method == Method::GET && Failure::from_status(response.status()).is_none() {
            self.commons.flights.mark_hit_for_miss(&job.key, self.commons.clock.now(), Some(skip));
            self.displace(job);
        }
        response.extensions_mut().insert(skip);
        lead.release(response);
    }

    /// The answer to a HEAD freshens what is stored, or shows that it is no longer current (RFC 9111 §4.3.5).
    fn headed(&self, job: &Job, stored: &Arc<Entry>, came: &Came) {
        let headers = stored.head.headers();
        match heads(&headers, stored.body.len(), came.response.headers()) {
            Heads::Unknown => {}
            // What is stale already will be validated.
            Heads::Another if self.is_fresh(stored) => self.displace(job),
            Heads::Another => {}
            Heads::Same => {
                let headers = freshen(&headers, came.response.headers());
                let answered = Answered { status: stored.head.status, headers: &headers, ..came.answered() };
                let asked = Asked { method: &Method::GET, ..Asked::from(&*job.asked) };
                if let Ok(store) = decide(&asked, &answered, &job.plan) {
                    let casing = stored.head.casing().cloned();
                    let head = head(stored.head.status, &headers, casing, job, &store, came);
                    self.keep(job, &self.entry(job, head, stored.body.clone(), &store, came.born));
                }
            }
        }
    }

    /// Would it be served to a request that makes no demands?
    fn is_fresh(&self, entry: &Entry) -> bool {
        let now = self.commons.clock.now();
        let standing = self.commons.invalidations.standing(entry, now);
        let verdict = judge(entry, standing, &Demands::default(), now);
        matches!(verdict, Verdict::Fresh | Verdict::WhileRevalidate)
    }

    /// 304: what is stored is good for another while (RFC 9111 §4.3.4).
    fn validated(&self, lead: Lead, job: &Job, stale: &Arc<Entry>, came: &Came) {
        let headers = freshen(&stale.head.headers(), came.response.headers());
        let answered = Answered { status: stale.head.status, headers: &headers, at: came.at, delay: came.delay };
        let asked = Asked::from(&*job.asked);
        let (store, stored) = match decide(&asked, &answered, &job.plan) {
            Ok(store) => (store, Ok(())),
            // The upstream has taken its leave to store back: good for those who wait, and for nobody else.
            Err(skip) => {
                self.displace(job);
                (Store { terms: Terms::default(), vary: Vec::new(), drop: Vec::new() }, Err(skip))
            }
        };
        let head = head(stale.head.status, &headers, stale.head.casing().cloned(), job, &store, came);
        let entry = self.entry(job, head.clone(), stale.body.clone(), &store, came.born);
        if stored.is_ok() {
            self.keep(job, &entry);
        }
        let arrival = Arrival {
            head,
            status: StatusCode::NOT_MODIFIED,
            failure: None,
            stored,
            variant: entry.variant.clone(),
            for_others: store.terms.for_others(),
            first_hand: HeaderMap::new(),
            born: came.born,
            initial_age: Some(initial_age(&answered)),
            content: Content::Stored(entry),
        };
        lead.land(Landing::Shared(Arc::new(arrival)));
    }

    /// Reads the whole body first, because the rule looks into it. One that is too large to look into is not
    /// empty, and streams on.
    async fn inspect(&self, lead: Lead, job: &Job, mut came: Came, store: Store, by: Instant) {
        let max = usize::try_from(self.commons.max_entry_bytes).unwrap_or(usize::MAX);
        let mut held = Held::of(&self.commons.purse);
        let mut whole = Vec::new();
        loop {
            match timeout_at(by, came.response.body_mut().next()).await {
                Ok(None) => break,
                Ok(Some(Ok(chunk))) if whole.len() + chunk.len() <= max && held.take(chunk.len() as u64) => {
                    whole.extend_from_slice(&chunk);
                }
                Ok(Some(Ok(chunk))) => {
                    whole.extend_from_slice(&chunk);
                    let rest = std::mem::replace(came.response.body_mut(), Body::Empty);
                    *came.response.body_mut() = Body::prefixed(Bytes::from(whole), rest);
                    return self.released(lead, job, came.response, Skip::TooLarge);
                }
                Ok(Some(Err(BodyError::Upstream(failure)))) => return lead.land(Landing::Failed(failure)),
                Ok(Some(Err(_))) => return lead.land(Landing::Failed(Failure::Connect)),
                Err(_elapsed) => return lead.land(Landing::Failed(Failure::Timeout)),
            }
        }
        let pointer = job.plan.reject_empty.as_deref().unwrap_or_default();
        let empty = is_empty_at(pointer, came.response.headers(), &whole, max);
        *came.response.body_mut() = Body::Full(Bytes::from(whole));
        drop(held);
        self.stream(lead, job, came, store, empty.then_some(Failure::Empty), by).await;
    }

    /// Lands, streams the body to all who came, and stores it when it is whole.
    async fn stream(
        &self,
        mut lead: Lead,
        job: &Job,
        came: Came,
        store: Store,
        failure: Option<Failure>,
        by: Instant,
    ) {
        let casing = came.response.extensions().get::<Casing>().cloned();
        let status = came.response.status();
        let head = head(status, came.response.headers(), casing, job, &store, &came);
        let length = declared_length(&came.response);
        let (purse, stall) = (&self.commons.purse, self.commons.shared_write_stall);
        let fanout = Fanout::new(purse, self.commons.max_entry_bytes, stall, length);
        let arrival = Arrival {
            head: head.clone(),
            status,
            failure,
            stored: if failure.is_some() { Err(Skip::Status) } else { Ok(()) },
            variant: Variant::of(store.vary.clone(), &job.asked.headers),
            for_others: failure.is_some() || store.terms.for_others(),
            first_hand: only(&store.drop, came.response.headers()),
            born: came.born,
            initial_age: came.response.headers().contains_key(AGE).then_some(store.terms.initial_age),
            content: Content::Coming(fanout.clone()),
        };
        if !arrival.for_others {
            self.commons.flights.mark_hit_for_miss(&job.key, came.born, None);
        }
        lead.announce(Arc::new(arrival), &fanout);
        let _ending = Ending(&fanout);
        let born = came.born;
        let keep = |whole: Option<Bytes>| {
            if let (Some(body), None) = (whole, failure) {
                let entry = self.entry(job, head.clone(), body, &store, born);
                fanout.settle(&entry.body);
                self.keep(job, &entry);
            }
        };
        self.pump(&mut lead, job, came.response.into_body(), &fanout, by, &keep).await;
    }

    /// Moves the body over. It is stored, and the flight left, before the last of it goes out: a client that has
    /// the whole answer finds it in the cache.
    async fn pump(
        &self,
        lead: &mut Lead,
        job: &Job,
        mut body: Body,
        fanout: &Fanout,
        by: Instant,
        keep: &(dyn Fn(Option<Bytes>) + Sync),
    ) {
        loop {
            // Once it is too large to be stored, only standing still ends it.
            let next = if fanout.outgrown() {
                lead.leave();
                self.outgrown(job);
                timeout(self.site.timeouts.idle, body.next()).await
            } else {
                timeout_at(by, body.next()).await
            };
            let end = match next {
                Ok(Some(Ok(chunk))) => {
                    let last = body.is_end_stream();
                    if last {
                        keep(fanout.whole_with(&chunk));
                        lead.leave();
                    }
                    match fanout.push(chunk).await {
                        Ok(()) if last => Ok(()),
                        Ok(()) => continue,
                        Err(_abandoned) => return,
                    }
                }
                Ok(None) => {
                    keep(fanout.whole_with(b""));
                    Ok(())
                }
                Ok(Some(Err(error))) => Err(error),
                Err(_elapsed) => Err(BodyError::Upstream(Failure::Timeout)),
            };
            if let Err(error) = end {
                debug!(upstream = &*self.site.name, %error, "the answer ended early");
            }
            lead.leave();
            return fanout.finish(end);
        }
    }

    /// Stores an entry, unless it was purged while it was fetched.
    pub(super) fn keep(&self, job: &Job, entry: &Arc<Entry>) {
        if self.commons.invalidations.standing(entry, self.commons.clock.now()) == Standing::Valid {
            self.store(job, entry);
            if entry.terms.for_others() {
                self.commons.flights.unmark_hit_for_miss(&job.key);
            }
            self.commons.telemetry.stored();
        } else {
            debug!(upstream = &*self.site.name, "not stored: {}", Skip::Invalidated.token());
        }
    }

    /// What is stored.
    pub(super) fn entry(&self, job: &Job, head: Head, body: Bytes, store: &Store, born: Tick) -> Arc<Entry> {
        let about = About {
            key_name: short_name(&job.key),
            tags: tags(&job.plan, job.asked.uri.path()).into(),
            rule: job.plan.name.clone(),
        };
        let variant = Variant::of(store.vary.clone(), &job.asked.headers);
        let (address, position) = (job.address.clone(), job.position);
        self.commons.memory.pack(Entry::new(head, body, variant, born, store.terms, address, position, about))
    }
}

/// A head made ready to be sent many times.
pub(super) fn head(
    status: StatusCode,
    headers: &HeaderMap,
    casing: Option<Casing>,
    job: &Job,
    store: &Store,
    came: &Came,
) -> Head {
    let mut headers = headers.clone();
    for name in store.drop.iter().chain([&AGE]) {
        headers.remove(name);
    }
    add_date(&mut headers, came.at);
    let links = links::find(&headers, &job.place.host);
    Head::new(status, &headers, casing, links)
}

pub(super) fn declared_length(response: &Response<Body>) -> Option<u64> {
    response.headers().get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}
