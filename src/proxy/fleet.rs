//! What the fleet has to do with a flight: look for a record in the store that all share, and ask who fetches.
//!
//! States: *look* (is there a record?), *claim* (who fetches?), *wait* (somebody else does: for word from them, or for
//! their lease to lapse), and then either an entry, or the leave to fetch. Trouble with Redis is the leave to fetch.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use http::header::HeaderName;
use http::{Request, Response};
use tokio::time::{Instant, timeout, timeout_at};
use tracing::{Instrument, debug};

use super::flights::{Landing, Lead};
use super::job::{Help, Job};
use super::lookup::Miss;
use super::visit::{Quest, Visit};
use super::{Handled, Proxy, site};
use crate::body::Body;
use crate::fleet::Fleet;
use crate::fleet::invalidations::Recorded;
use crate::fleet::lease::{self, Claimed, Lease, Word, claim, subject};
use crate::policy::Tick;
use crate::policy::chain::LogId;
use crate::policy::entry::{About, Entry};
use crate::policy::freshness::{Demands, Verdict, judge};
use crate::policy::head::Head;
use crate::policy::invalidation::Address;
use crate::policy::key::{KeyBuf, KeyName};
use crate::policy::links;
use crate::policy::outcome::Skip;
use crate::policy::plan::Plan;
use crate::policy::tags::{Scope, subjects};
use crate::policy::variant::Variant;
use crate::store::shared::{Found, Place};
use crate::store::wire::{Answer, WireAddress};
use crate::telemetry::spans;

/// A record from further in the future than this has a wrong date.
const FUTURE: Duration = Duration::from_secs(5);

/// One record's date, read by two sidecars, differs by less than this.
const SAME: Duration = Duration::from_millis(250);

/// What to do then.
pub(super) enum Next {
    /// Somebody has it.
    Found(Arc<Entry>),
    /// Fetch; with the lease, if there is one.
    Fetch(Option<Lease>),
}

/// What a look-up says.
enum Looked {
    /// To be served as it is.
    Fresh(Arc<Entry>),
    /// To be served, and refreshed.
    WhileRevalidate(Arc<Entry>),
    /// To be validated, or fallen back on.
    Stale(Arc<Entry>),
    Nothing,
    /// Redis can't be asked.
    Trouble,
}

impl Looked {
    fn fresh(self) -> Option<Arc<Entry>> {
        match self {
            Looked::Fresh(entry) => Some(entry),
            Looked::WhileRevalidate(_) | Looked::Stale(_) | Looked::Nothing | Looked::Trouble => None,
        }
    }

    /// Something that was stored just now may have come stale.
    fn servable(self) -> Option<Arc<Entry>> {
        match self {
            Looked::Fresh(entry) | Looked::WhileRevalidate(entry) => Some(entry),
            Looked::Stale(_) | Looked::Nothing | Looked::Trouble => None,
        }
    }
}

impl Proxy {
    /// Looks for a record that can be served. What can't be served at once is announced, or noted in the job.
    pub(super) async fn look_first(&self, lead: &mut Lead, job: &mut Job) -> Option<Arc<Entry>> {
        let fleet = self.commons.fleet.as_ref().filter(|_| matches!(job.help, Help::All | Help::Look))?;
        job.help = if job.help == Help::All { Help::Claim } else { Help::None };
        match self.look_there(fleet, &fleet.shared.place(&job.key), job).await {
            Looked::Fresh(entry) => return Some(entry),
            Looked::WhileRevalidate(entry) => {
                lead.show(Landing::Found(entry.clone()));
                job.stale = Some(entry);
            }
            Looked::Stale(entry) => job.stale = Some(entry),
            Looked::Nothing => {}
            Looked::Trouble => job.help = Help::None,
        }
        None
    }

    /// Looks, claims, waits: until there is an entry or the leave to fetch.
    pub(super) async fn ask_fleet(&self, lead: &mut Lead, job: &mut Job, by: Instant) -> Next {
        if let Some(entry) = self.look_first(lead, job).await {
            return Next::Found(entry);
        }
        match &self.commons.fleet {
            Some(fleet) if job.help == Help::Claim => {
                let place = fleet.shared.place(&job.key);
                timeout_at(by, self.claim(fleet, &place, job)).await.unwrap_or(Next::Fetch(None))
            }
            Some(_) | None => Next::Fetch(None),
        }
    }

    /// Until the lease is ours, or a record is there.
    async fn claim(&self, fleet: &Fleet, place: &Place, job: &mut Job) -> Next {
        let name = lease_name(place, job);
        let mut news = fleet.inbox.expect(&subject(&name));
        let mut instead_of = None;
        loop {
            let seen = self.commons.invalidations.log_position().unwrap_or_default();
            match claim(&fleet.redis, &name, fleet.me, seen, instead_of.take().as_ref()).await {
                Err(trouble) => {
                    debug!(%trouble, "no lease: this sidecar fetches for itself");
                    return Next::Fetch(None);
                }
                // Between the look and the claim somebody may have finished.
                Ok(Claimed::Ours(lease)) => {
                    let found = self.look_there(fleet, place, job).await.fresh().filter(|entry| is_news(job, entry));
                    return found.map_or_else(|| Next::Fetch(Some(lease)), Next::Found);
                }
                // Nobody waits for a fetch that is older than a purge: one takes its place.
                Ok(Claimed::Theirs { holder, .. }) if self.is_outdated(job, holder.seen()) => {
                    instead_of = Some(holder);
                }
                Ok(Claimed::Theirs { left, .. }) => match timeout(left, news.message()).await {
                    Ok(word) if Word::read(&word) == Word::Unshared => return Next::Fetch(None),
                    Ok(word) if Word::read(&word) == Word::Stored => {
                        let found = self.look_there(fleet, place, job).await.servable();
                        if let Some(entry) = found.filter(|entry| is_news(job, entry)) {
                            return Next::Found(entry);
                        }
                    }
                    Ok(_) | Err(_) => {}
                },
            }
        }
    }

    /// Has anything been purged that a fetch is about which had seen the log up to here?
    fn is_outdated(&self, job: &Job, seen: LogId) -> bool {
        let invalidations = &self.commons.invalidations;
        // Who has read further than we have has missed nothing that we know of.
        Some(seen) <= invalidations.log_position()
            && invalidations.outdated(&job.address, invalidations.position_of(seen))
    }

    /// Looks for the record, and keeps in memory what is found.
    async fn look_there(&self, fleet: &Fleet, place: &Place, job: &Job) -> Looked {
        // Before the log has been read nobody knows what a record may have missed; that takes a moment, unless Redis
        // does not answer anyway.
        if !fleet.redis.answers() || timeout(fleet.patience, self.commons.invalidations.caught_up()).await.is_err() {
            return Looked::Trouble;
        }
        let looking = fleet.shared.look(place, job.plan.usual_vary(), &job.asked.headers);
        let found = match looking.instrument(spans::lookup("redis")).await {
            Err(_trouble) => return Looked::Trouble,
            Ok(None) => return Looked::Nothing,
            Ok(Some(Found::Waiting(entry))) => Some(entry),
            Ok(Some(Found::Answer(answer))) => self.adopt(fleet, place, job, *answer).await,
        };
        let now = self.commons.clock.now();
        let Some(entry) = found.filter(|entry| entry.variant.selected_by(&job.asked.headers)) else {
            return Looked::Nothing;
        };
        let verdict = judge(&entry, self.commons.invalidations.standing(&entry, now), &Demands::default(), now);
        let newer = |known: &Arc<Entry>| known.born > entry.born.plus(SAME);
        let known = self.commons.memory.get(&job.key);
        let has_newer = known.is_some_and(|known| known.select(&job.asked.headers).is_some_and(newer));
        if verdict != Verdict::Gone && !has_newer {
            self.commons.memory.put(&job.key, entry.clone());
        }
        match verdict {
            Verdict::Fresh => Looked::Fresh(entry),
            Verdict::WhileRevalidate => Looked::WhileRevalidate(entry),
            Verdict::Stale | Verdict::Refused => Looked::Stale(entry),
            Verdict::Gone => Looked::Nothing,
        }
    }

    /// An entry of ours from a record: with our own times and positions.
    async fn adopt(&self, fleet: &Fleet, place: &Place, job: &Job, answer: Answer) -> Option<Arc<Entry>> {
        let Answer { address, status, headers, casing, body, born, seen, terms, vary, tags, rule } = answer;
        let born: Tick = fleet.redis.time().tick(born)?;
        if born > self.commons.clock.now().plus(FUTURE) {
            return None;
        }
        let casing = self.site.upstream.casing(&casing).await;
        let links = links::find(&headers, &job.place.host);
        // The record may be of another target with the same key: one that differs in parameters that don't count.
        let same = *address.target == *job.address.target && tags == site::tags(&job.plan, job.asked.uri.path());
        let address = if same {
            job.address.clone()
        } else {
            let scope = Scope { upstream: address.upstream, authority: job.place.keyed.as_deref() };
            let subjects = subjects(scope, &address.target, &tags).into();
            let WireAddress { upstream, authority, target } = address;
            Address { upstream, authority: authority.into(), target: target.into(), subjects }
        };
        let rule = if *rule == *job.plan.name { job.plan.name.clone() } else { rule.into() };
        let about = About { key_name: KeyName::from_hex(place.name()), tags: tags.into(), rule };
        let head = Head::new(status, &headers, casing, links);
        let variant = Variant::of(vary, &job.asked.headers);
        let position = self.commons.invalidations.position_of(seen);
        let entry = Entry::new(head, body, variant, born, terms, address, position, about);
        Some(self.commons.memory.pack(entry))
    }

    /// Waits, if there is a fleet that can be told, until a purge of ours is in its log.
    pub(super) async fn told_fleet(&self, recorded: Recorded) {
        if let Some(fleet) = &self.commons.fleet {
            self.commons.invalidations.logged(recorded.number, fleet.patience).await;
        }
    }

    /// An answer from what is stored, here or in the fleet, and from nowhere else (RFC 9111 §5.2.1.7).
    pub(super) fn only_if_cached(
        self: &Arc<Self>,
        request: Request<Body>,
        place: site::Place,
        plan: &Arc<Plan>,
        key: KeyBuf,
        miss: Miss,
        visit: Visit,
    ) -> Handled {
        if self.commons.fleet.is_none() {
            return Handled::Now(self.not_cached(&request, plan, &visit));
        }
        let (proxy, plan) = (self.clone(), plan.clone());
        Handled::later(async move {
            let asked = Arc::new(request.into_parts().0);
            let quest = Quest { asked: asked.clone(), place: &place, plan: &plan, key, miss, visit: &visit };
            let found = proxy.found_in_fleet(&quest).await;
            found.unwrap_or_else(|| proxy.not_cached(&*asked, &plan, &visit))
        })
    }

    /// An answer from what the fleet has stored, without asking the upstream.
    pub(super) async fn found_in_fleet(&self, quest: &Quest<'_>) -> Option<Response<Body>> {
        let fleet = self.commons.fleet.as_ref()?;
        let job = Job {
            asked: quest.asked.clone(),
            place: quest.place.clone(),
            plan: quest.plan.clone(),
            key: quest.key.to_vec().into(),
            address: self.site.address(quest.place, &quest.asked.uri, quest.plan),
            position: self.commons.invalidations.position(),
            stale: quest.miss.stale.clone(),
            help: Help::Look,
            ahead: None,
            lease: Mutex::default(),
        };
        match self.look_there(fleet, &fleet.shared.place(&quest.key), &job).await {
            Looked::Fresh(entry) | Looked::WhileRevalidate(entry) => self.found(quest, &entry),
            Looked::Stale(_) | Looked::Nothing | Looked::Trouble => None,
        }
    }

    /// Stores an entry here and for the fleet.
    pub(super) fn store(&self, job: &Job, entry: &Arc<Entry>) {
        self.commons.memory.put(&job.key, entry.clone());
        let Some(fleet) = &self.commons.fleet else { return };
        let resident = entry.resident(self.commons.clock.now());
        let written = fleet.shared.keep(&job.key, entry, job.plan.usual_vary(), resident);
        if let Some(lease) = job.lease().as_mut() {
            if entry.terms.for_others() { lease.stored(written) } else { lease.unshared() }
        }
    }

    /// The answer has become too large to be stored: nobody should wait for it.
    pub(super) fn outgrown(&self, job: &Job) {
        if let Some(mut lease) = job.lease().take() {
            lease.unshared();
            self.commons.flights.mark_hit_for_miss(&job.key, self.commons.clock.now(), Some(Skip::TooLarge));
        }
    }

    /// What is stored for this request is no longer so: the upstream has answered with something that is not stored.
    pub(super) fn displace(&self, job: &Job) {
        self.commons.memory.remove(&job.key, &job.asked.headers);
        let Some(fleet) = &self.commons.fleet else { return };
        let names = job.stale.as_ref().map(|entry| entry.variant.0.iter().map(|(name, _)| name.clone()).collect());
        let names: Vec<HeaderName> = names.unwrap_or_else(|| job.plan.usual_vary().to_vec());
        fleet.shared.forget(&job.key, &Variant::of(names, &job.asked.headers));
        if let Some(lease) = job.lease().as_mut() {
            lease.unshared();
        }
    }
}

/// Ahead of its time only something newer than what there is will do.
fn is_news(job: &Job, entry: &Entry) -> bool {
    job.ahead.is_none_or(|born| entry.born > born.plus(SAME))
}

/// Those who ask for other variants don't wait for this one.
fn lease_name(place: &Place, job: &Job) -> String {
    let names = job.stale.as_ref().map(|entry| entry.variant.0.iter().map(|(name, _)| name.clone()).collect());
    let names: Vec<HeaderName> = names.unwrap_or_else(|| job.plan.usual_vary().to_vec());
    lease::name(place.name(), &Variant::of(names, &job.asked.headers))
}
