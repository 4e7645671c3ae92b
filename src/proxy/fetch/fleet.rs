//! Fleet coordination of a fetch: Redis lookup, lease, and waiting for another sidecar's fetch.
//!
//! States: *lookup* (is there a record?), *claim* (who fetches?), *wait* (another sidecar fetches: until its message, or
//! until its lease expires). The result is an entry, or permission to fetch. An error of Redis is permission to fetch.

use std::sync::Arc;
use std::time::Duration;

use http::header::HeaderName;
use tokio::time::{Instant, timeout, timeout_at};
use tracing::{Instrument, debug};

use super::coalesce::{FetchResult, Leader};
use super::spec::{FetchSpec, FleetUse};
use crate::clock::Clock;
use crate::fleet::Fleet;
use crate::fleet::lease::{self, ClaimResult, Lease, LeaseMessage, claim, subject};
use crate::policy::Tick;
use crate::policy::entry::{Entry, EntryState};
use crate::policy::http::freshness::{RequestDirectives, Verdict, evaluate};
use crate::policy::http::link_rewrite;
use crate::policy::http::vary::Variant;
use crate::policy::invalidation::ledger::ResourceId;
use crate::policy::invalidation::log_position::LogId;
use crate::policy::invalidation::tag::{TagScope, subjects};
use crate::policy::packed_head::PackedHead;
use crate::policy::routing::cache_key::KeyName;
use crate::proxy::exchange::CacheRequest;
use crate::proxy::lookup::Lookup;
use crate::proxy::upstream_state::{UpstreamState, rule_tags};
use crate::store::record::{RecordAddress, StoredResponse};
use crate::store::redis_tier::{RecordKey, TierRecord};
use crate::telemetry::spans;

/// A record from further in the future than this has a wrong date.
const MAX_CLOCK_ERROR: Duration = Duration::from_secs(5);

/// The dates of one record, read by two sidecars, differ by less than this.
const RECEIVED_TOLERANCE: Duration = Duration::from_millis(250);

/// Looks up records that the fleet has stored, and coordinates who fetches.
#[derive(Debug)]
pub(crate) struct FleetLookup {
    pub(crate) upstream: Arc<UpstreamState>,
    pub(crate) clock: Clock,
    pub(crate) lookup: Arc<Lookup>,
    /// `None` without `[redis]`: lookups find nothing, and everybody may fetch.
    pub(crate) fleet: Option<Arc<Fleet>>,
}

/// What to do after asking the fleet.
pub(crate) enum LeaseOutcome {
    /// Use this entry.
    Found(Arc<Entry>),
    /// Fetch; under the lease, if there is one.
    Fetch(Option<Lease>),
}

/// The result of a lookup in Redis.
enum TierLookup {
    Fresh(Arc<Entry>),
    WhileRevalidate(Arc<Entry>),
    /// To be validated, or a fallback.
    Stale(Arc<Entry>),
    /// No record of this variant. The request headers that the resource varies by, if a record shows them.
    Nothing(Option<Vec<HeaderName>>),
    /// Redis can't be used.
    Unavailable,
}

impl TierLookup {
    fn fresh(self) -> Option<Arc<Entry>> {
        match self {
            TierLookup::Fresh(entry) => Some(entry),
            TierLookup::WhileRevalidate(_)
            | TierLookup::Stale(_)
            | TierLookup::Nothing(_)
            | TierLookup::Unavailable => None,
        }
    }

    /// Returns the request headers that select a variant, if they are others than those of the fetch's lease.
    fn other_vary(&self, spec: &FetchSpec) -> Option<Vec<HeaderName>> {
        let TierLookup::Nothing(Some(names)) = self else { return None };
        (*names != vary_names(spec)).then(|| names.clone())
    }

    /// A record that was stored just now may have arrived stale.
    fn servable(self) -> Option<Arc<Entry>> {
        match self {
            TierLookup::Fresh(entry) | TierLookup::WhileRevalidate(entry) => Some(entry),
            TierLookup::Stale(_) | TierLookup::Nothing(_) | TierLookup::Unavailable => None,
        }
    }
}

impl FleetLookup {
    /// Returns true if there is a fleet.
    pub(crate) fn is_enabled(&self) -> bool {
        self.fleet.is_some()
    }

    /// Looks up the record of a fetch that has not looked yet. A record that can't be served fresh is published to
    /// followers, or noted in the specification.
    pub(crate) async fn look_up_first(&self, leader: &mut Leader, spec: &mut FetchSpec) -> Option<Arc<Entry>> {
        let looks = matches!(spec.fleet_use, FleetUse::LookupAndLease | FleetUse::Lookup);
        let fleet = self.fleet.as_ref().filter(|_| looks)?;
        spec.fleet_use = if spec.fleet_use == FleetUse::LookupAndLease { FleetUse::Lease } else { FleetUse::None };
        match self.look_up(fleet, &fleet.tier.record_key(&spec.request.key), &spec.request).await {
            TierLookup::Fresh(entry) => return Some(entry),
            TierLookup::WhileRevalidate(entry) => {
                leader.publish(FetchResult::FoundInFleet(entry.clone()));
                spec.stale = Some(entry);
            }
            TierLookup::Stale(entry) => spec.stale = Some(entry),
            TierLookup::Nothing(vary) => spec.vary = spec.vary.take().or(vary),
            TierLookup::Unavailable => spec.fleet_use = FleetUse::None,
        }
        None
    }

    /// Looks up, claims the lease, and waits, until there is an entry or permission to fetch, at the latest at `by`.
    pub(crate) async fn find_or_claim(&self, leader: &mut Leader, spec: &mut FetchSpec, by: Instant) -> LeaseOutcome {
        if let Some(entry) = self.look_up_first(leader, spec).await {
            return LeaseOutcome::Found(entry);
        }
        match &self.fleet {
            Some(fleet) if spec.fleet_use == FleetUse::Lease => {
                let record = fleet.tier.record_key(&spec.request.key);
                timeout_at(by, self.claim(fleet, &record, spec)).await.unwrap_or(LeaseOutcome::Fetch(None))
            }
            Some(_) | None => LeaseOutcome::Fetch(None),
        }
    }

    /// Claims the lease of a variant until it is acquired, or a record is there. When a record shows which request
    /// headers select a variant, goes on with the lease of that variant: other variants are not waited for.
    async fn claim(&self, fleet: &Fleet, record: &RecordKey, spec: &mut FetchSpec) -> LeaseOutcome {
        loop {
            match self.claim_variant(fleet, record, spec).await {
                Ok(outcome) => return outcome,
                Err(vary) => spec.vary = Some(vary),
            }
        }
    }

    /// Claims the lease of the variant that is known. Returns the request headers that select a variant if others than
    /// known do.
    async fn claim_variant(
        &self,
        fleet: &Fleet,
        record: &RecordKey,
        spec: &FetchSpec,
    ) -> Result<LeaseOutcome, Vec<HeaderName>> {
        let name = lease_name(record, spec);
        let mut messages = fleet.inbox.subscribe(&subject(&name));
        let (mut instead_of, mut waited) = (None, false);
        loop {
            let seen = self.lookup.invalidations.log_position().unwrap_or_default();
            match claim(&fleet.redis, &name, fleet.sidecar_id, seen, instead_of.take().as_ref()).await {
                Err(error) => {
                    debug!(%error, "lease not available: fetching without one");
                    return Ok(LeaseOutcome::Fetch(None));
                }
                Ok(ClaimResult::Ours { lease, released_lately: false }) if !waited => {
                    return Ok(LeaseOutcome::Fetch(Some(lease)));
                }
                // Another sidecar may have stored the record between the lookup and the lease: look again.
                Ok(ClaimResult::Ours { lease, .. }) => {
                    let found = self.look_up(fleet, record, &spec.request).await;
                    if let Some(vary) = found.other_vary(spec) {
                        return Err(vary);
                    }
                    let found = found.fresh().filter(|entry| is_newer(spec, entry));
                    return Ok(found.map_or_else(|| LeaseOutcome::Fetch(Some(lease)), LeaseOutcome::Found));
                }
                // A fetch that began before a purge of its resource is not waited for: a new one replaces it.
                Ok(ClaimResult::Theirs { holder, .. }) if self.is_outdated(spec, holder.log_seen()) => {
                    instead_of = Some(holder);
                }
                Ok(ClaimResult::Theirs { left, .. }) => {
                    waited = true;
                    match timeout(left, messages.next_message()).await {
                        Ok(message) if LeaseMessage::read(&message) == LeaseMessage::Unshared => {
                            return Ok(LeaseOutcome::Fetch(None));
                        }
                        Ok(message) if LeaseMessage::read(&message) == LeaseMessage::Stored => {
                            let found = self.look_up(fleet, record, &spec.request).await;
                            if let Some(vary) = found.other_vary(spec) {
                                return Err(vary);
                            }
                            if let Some(entry) = found.servable().filter(|entry| is_newer(spec, entry)) {
                                return Ok(LeaseOutcome::Found(entry));
                            }
                        }
                        Ok(_) | Err(_) => {}
                    }
                }
            }
        }
    }

    /// Returns true if a purge names the resource of a fetch whose sidecar had read the log up to `seen`.
    fn is_outdated(&self, spec: &FetchSpec, seen: LogId) -> bool {
        // A sidecar that has read further than this one has missed nothing that is known here.
        Some(seen) <= self.lookup.invalidations.log_position()
            && self.lookup.invalidations.purged_since(&spec.resource, self.lookup.invalidations.position_of(seen))
    }

    /// Looks up a record, and keeps in memory what is found.
    async fn look_up(&self, fleet: &Fleet, record: &RecordKey, request: &CacheRequest) -> TierLookup {
        // Until the log has been read, it is not known which purges a record has missed.
        let caught_up = timeout(fleet.timeout, self.lookup.invalidations.wait_caught_up());
        if !fleet.redis.is_usable() || caught_up.await.is_err() {
            return TierLookup::Unavailable;
        }
        let headers = &request.parts.headers;
        let looking = fleet.tier.find(record, request.rule.expected_vary(), headers);
        let found = match looking.instrument(spans::lookup("redis")).await {
            Err(_counted) => return TierLookup::Unavailable,
            Ok(TierRecord::Absent(vary)) => return TierLookup::Nothing(vary),
            Ok(TierRecord::Waiting(entry)) => Some(entry),
            Ok(TierRecord::Stored(stored)) => self.entry_from_record(fleet, record, request, *stored).await,
        };
        let now = self.clock.now();
        let entry = match found {
            Some(entry) if entry.variant.selected_by(headers) => entry,
            Some(other) => return TierLookup::Nothing(Some(other.variant.names())),
            None => return TierLookup::Nothing(None),
        };
        let state = self.lookup.invalidations.state_of(&entry, now);
        let verdict = evaluate(&entry, state, &RequestDirectives::default(), now);
        let newer = |known: &Arc<Entry>| known.received_at > entry.received_at.plus(RECEIVED_TOLERANCE);
        let known = self.lookup.memory.get(&request.key);
        let has_newer = known.is_some_and(|known| known.select(headers).is_some_and(newer));
        if verdict != Verdict::Gone && !has_newer {
            self.lookup.memory.put(&request.key, entry.clone());
        }
        match verdict {
            Verdict::Fresh => TierLookup::Fresh(entry),
            Verdict::WhileRevalidate => TierLookup::WhileRevalidate(entry),
            Verdict::Stale | Verdict::Refused => TierLookup::Stale(entry),
            Verdict::Gone => TierLookup::Nothing(None),
        }
    }

    /// Builds an entry from a record: with ticks and ledger positions of this process.
    async fn entry_from_record(
        &self,
        fleet: &Fleet,
        record: &RecordKey,
        request: &CacheRequest,
        stored: StoredResponse,
    ) -> Option<Arc<Entry>> {
        let StoredResponse {
            address,
            status,
            headers,
            header_case,
            body,
            received_at,
            seen,
            lifetimes,
            vary,
            tags,
            rule,
        } = stored;
        let received_at: Tick = fleet.redis.clock().tick(received_at)?;
        if received_at > self.clock.now().plus(MAX_CLOCK_ERROR) {
            return None;
        }
        let case = self.upstream.client.header_case(&header_case).await;
        let links = link_rewrite::find(&headers, &request.destination.host);
        let resource = self.resource_of_record(request, address, &tags);
        let name = &request.rule.name;
        let rule = if *rule == **name { name.clone() } else { rule.into() };
        let position = self.lookup.invalidations.position_of(seen);
        let entry = Entry {
            head: PackedHead::new(status, &headers, case, links),
            body,
            variant: Variant::of(vary, &request.parts.headers),
            received_at,
            lifetimes,
            resource,
            position,
            key_name: KeyName::from_hex(record.digest()),
            tags: tags.into(),
            rule,
            owns_shape: true,
            state: EntryState::valid_at(position),
        };
        Some(self.lookup.memory.intern(entry))
    }

    /// The record may be of another target with the same key: one that differs in parameters that are not keyed.
    fn resource_of_record(&self, request: &CacheRequest, address: RecordAddress, tags: &[String]) -> ResourceId {
        let own = self.upstream.resource_id(&request.destination, &request.parts.uri, &request.rule);
        if *address.target == *own.target && tags == rule_tags(&request.rule, request.parts.uri.path()) {
            return own;
        }
        let scope = TagScope { upstream: address.upstream, authority: request.destination.key_authority.as_deref() };
        let subjects = subjects(scope, &address.target, tags).into();
        let RecordAddress { upstream, authority, target } = address;
        ResourceId { upstream, authority: authority.into(), target: target.into(), subjects }
    }

    /// Returns what the fleet has stored for a request and may be served stale or fresh.
    pub(crate) async fn find(&self, request: &CacheRequest) -> Option<Arc<Entry>> {
        let fleet = self.fleet.as_ref()?;
        self.look_up(fleet, &fleet.tier.record_key(&request.key), request).await.servable()
    }
}

/// A refresh ahead of expiry needs an entry that is newer than the one it refreshes.
fn is_newer(spec: &FetchSpec, entry: &Entry) -> bool {
    spec.newer_than.is_none_or(|known| entry.received_at > known.plus(RECEIVED_TOLERANCE))
}

/// Requests for other variants don't wait for this fetch.
fn lease_name(record: &RecordKey, spec: &FetchSpec) -> String {
    lease::name(record.digest(), &Variant::of(vary_names(spec), &spec.request.parts.headers))
}

/// Returns the request headers that the response to a fetch is expected to depend on.
pub(crate) fn vary_names(spec: &FetchSpec) -> Vec<HeaderName> {
    let stored = || spec.stale.as_ref().map(|entry| entry.variant.names());
    spec.vary.clone().or_else(stored).unwrap_or_else(|| spec.request.rule.expected_vary().to_vec())
}
