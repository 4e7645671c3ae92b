//! Storing of responses: builds entries, and keeps them in memory and for the fleet.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::header::{AGE, CONTENT_LENGTH, HeaderMap, HeaderName};
use http::{Response, StatusCode};
use tracing::debug;

use super::coalesce::Coalescer;
use super::fleet::vary_names;
use super::spec::FetchSpec;
use crate::body::Body;
use crate::clock::Clock;
use crate::fleet::Fleet;
use crate::policy::Tick;
use crate::policy::entry::{Entry, EntryState};
use crate::policy::http::freshness::stale_on_failure;
use crate::policy::http::hop_by_hop::add_date;
use crate::policy::http::link_rewrite;
use crate::policy::http::storage::{ResponseView, StorePlan, decide};
use crate::policy::http::vary::Variant;
use crate::policy::invalidation::ledger::InvalidationState;
use crate::policy::outcome::{Failure, NotStored};
use crate::policy::packed_head::{HeaderCase, PackedHead};
use crate::policy::routing::cache_key::short_name;
use crate::policy::routing::rule::CacheMode;
use crate::proxy::lookup::Lookup;
use crate::proxy::upstream_state::rule_tags;
use crate::telemetry::Telemetry;

/// Stores responses.
#[derive(Debug)]
pub(crate) struct ResponseStore {
    /// The upstream's name, for logs.
    pub(crate) upstream: Arc<str>,
    pub(crate) clock: Clock,
    pub(crate) lookup: Arc<Lookup>,
    pub(crate) coalescer: Arc<Coalescer>,
    pub(crate) fleet: Option<Arc<Fleet>>,
    pub(crate) telemetry: Arc<Telemetry>,
}

/// A response's head, with the times of its arrival.
pub(crate) struct UpstreamResponse {
    pub(crate) response: Response<Body>,
    pub(crate) received_at: Tick,
    /// Wall time of arrival.
    pub(crate) date: SystemTime,
    /// Time from the request to the head (RFC 9111 §4.2.3, `response_delay`).
    pub(crate) delay: Duration,
}

impl UpstreamResponse {
    pub(crate) fn view(&self) -> ResponseView<'_> {
        ResponseView {
            status: self.response.status(),
            headers: self.response.headers(),
            at: self.date,
            delay: self.delay,
        }
    }

    /// Returns the head as it will be stored.
    pub(crate) fn head(&self, spec: &FetchSpec, plan: &StorePlan) -> PackedHead {
        let case = self.response.extensions().get::<HeaderCase>().cloned();
        stored_head(&self.view(), case, spec, &plan.drop)
    }
}

/// Returns the head of a response as it is stored: without `Age` and the `dropped` fields, with `Date`.
pub(crate) fn stored_head(
    response: &ResponseView<'_>,
    case: Option<HeaderCase>,
    spec: &FetchSpec,
    dropped: &[HeaderName],
) -> PackedHead {
    let mut headers = response.headers.clone();
    for name in dropped.iter().chain([&AGE]) {
        headers.remove(name);
    }
    add_date(&mut headers, response.at);
    let links = link_rewrite::find(&headers, &spec.request.destination.host);
    PackedHead::new(response.status, &headers, case, links)
}

/// Returns the Content-Length of a response, if it has one.
pub(crate) fn declared_length(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

impl ResponseStore {
    /// Builds the entry of a response.
    pub(crate) fn entry(
        &self,
        spec: &FetchSpec,
        plan: &StorePlan,
        (head, body): (PackedHead, Bytes),
        received_at: Tick,
    ) -> Arc<Entry> {
        let request = &spec.request;
        self.lookup.memory.intern(Entry {
            head,
            body,
            variant: Variant::of(plan.vary.clone(), &request.parts.headers),
            received_at,
            lifetimes: plan.lifetimes,
            resource: spec.resource.clone(),
            position: spec.position,
            key_name: short_name(&request.key),
            tags: rule_tags(&request.rule, request.parts.uri.path()).into(),
            rule: request.rule.name.clone(),
            owns_shape: true,
            state: EntryState::valid_at(spec.position),
        })
    }

    /// Stores an entry, unless it was purged while it was fetched.
    pub(crate) fn store_if_valid(&self, spec: &FetchSpec, entry: &Arc<Entry>) {
        if self.lookup.invalidations.state_of(entry, self.clock.now()) != InvalidationState::Valid {
            debug!(upstream = &*self.upstream, "not stored: {}", NotStored::Invalidated.token());
            return;
        }
        self.store(spec, entry);
        if entry.lifetimes.is_shareable() {
            self.coalescer.unmark_hit_for_miss(&spec.request.key);
        }
        self.telemetry.stored();
    }

    /// Stores an entry in memory, and for the fleet.
    fn store(&self, spec: &FetchSpec, entry: &Arc<Entry>) {
        self.lookup.memory.put(&spec.request.key, entry.clone());
        let Some(fleet) = &self.fleet else { return };
        let resident = entry.resident_time(self.clock.now());
        let written = fleet.tier.enqueue_write(&spec.request.key, entry, spec.request.rule.expected_vary(), resident);
        if let Some(lease) = spec.lease().as_mut() {
            if entry.lifetimes.is_shareable() {
                lease.finish_stored(written);
            } else {
                lease.finish_not_shareable();
            }
        }
    }

    /// Gives up the lease of a fetch whose response has outgrown its buffer: it is too large to be stored, or there was no
    /// room for it.
    pub(crate) fn give_up_lease(&self, spec: &FetchSpec, too_large: bool) {
        if let Some(mut lease) = spec.lease().take() {
            lease.finish_not_shareable();
            if too_large {
                self.mark_hit_for_miss(spec, Some(NotStored::TooLarge));
            }
        }
    }

    /// Requests for this key don't wait for each other for a while.
    pub(crate) fn mark_hit_for_miss(&self, spec: &FetchSpec, reason: Option<NotStored>) {
        self.coalescer.mark_hit_for_miss(&spec.request.key, self.clock.now(), reason);
    }

    /// Removes what is stored for a request: the upstream has answered it with a response that is not stored.
    pub(crate) fn remove_stored(&self, spec: &FetchSpec) {
        let headers = &spec.request.parts.headers;
        self.lookup.memory.remove(&spec.request.key, headers);
        let Some(fleet) = &self.fleet else { return };
        fleet.tier.enqueue_remove(&spec.request.key, &Variant::of(vary_names(spec), headers));
        if let Some(lease) = spec.lease().as_mut() {
            lease.finish_not_shareable();
        }
    }

    /// Returns true if a failure may be stored: the upstream says for how long it is fresh (RFC 9111 §3), and nothing
    /// stored or configured is better.
    pub(crate) fn may_store_failure(&self, spec: &FetchSpec, response: &ResponseView<'_>, failure: Failure) -> bool {
        let now = self.clock.now();
        let better = |stored: &Arc<Entry>| {
            let state = self.lookup.invalidations.state_of(stored, now);
            self.lookup.is_servable(stored, now) || stale_on_failure(stored, state, failure, now).is_some()
        };
        let rule = &spec.request.rule;
        let covered = rule.fallback.as_ref().is_some_and(|payload| payload.covers(failure));
        matches!(failure, Failure::Status(_))
            && rule.mode == CacheMode::Http
            && !covered
            && !spec.stale.as_ref().is_some_and(better)
            && decide(&spec.view(), response, rule).is_ok_and(|plan| plan.lifetimes.fresh_for > 0)
    }

    /// Returns the time of arrival of a response that arrives now.
    pub(crate) fn received(&self, response: Response<Body>, delay: Duration) -> UpstreamResponse {
        UpstreamResponse { response, received_at: self.clock.now(), date: self.clock.wall(), delay }
    }
}

/// A 200 with the fields of another response.
pub(crate) fn as_complete<'r>(response: &ResponseView<'r>) -> ResponseView<'r> {
    ResponseView { status: StatusCode::OK, ..*response }
}
