//! The specification of a fetch: the request, what it validates, and how much of the fleet it involves.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use http::header::HeaderName;
use http::{Method, Request};

use crate::body::Body;
use crate::fleet::lease::Lease;
use crate::policy::Tick;
use crate::policy::entry::Entry;
use crate::policy::http::conditional::set_conditions;
use crate::policy::http::request_view::RequestView;
use crate::policy::invalidation::ledger::{Position, ResourceId};
use crate::proxy::exchange::{CacheRequest, MissContext};
use crate::proxy::send::outgoing::readable_codings_only;
use crate::proxy::upstream_state::UpstreamState;
use crate::upstream::RecordHeaderCase;

/// How much a fetch involves the fleet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FleetUse {
    /// Look up the record in Redis, then take the lease.
    LookupAndLease,
    /// Take the lease; the lookup was done.
    Lease,
    /// Look up the record in Redis; the response can't be stored.
    Lookup,
    /// Nothing: the client demands its own response, or responses can't be shared.
    None,
}

/// What a fetch task works on.
#[derive(Debug)]
pub(crate) struct FetchSpec {
    pub(crate) request: CacheRequest,
    /// What the stored response can be purged by.
    pub(crate) resource: ResourceId,
    /// The ledger's position before the fetch began.
    pub(crate) position: Position,
    /// The stored entry, validated if it has a validator.
    pub(crate) stale: Option<Arc<Entry>>,
    pub(crate) fleet_use: FleetUse,
    /// Set for a refresh ahead of expiry: arrival time of the entry that is refreshed. Only a newer one will do.
    pub(crate) newer_than: Option<Tick>,
    /// The request headers that a response of this resource was seen to depend on (`Vary`).
    pub(crate) vary: Option<Vec<HeaderName>>,
    lease: Mutex<Option<Lease>>,
}

impl FetchSpec {
    fn new(upstream: &UpstreamState, request: CacheRequest, position: Position, fleet_use: FleetUse) -> FetchSpec {
        let resource = upstream.resource_id(&request.destination, &request.parts.uri, &request.rule);
        Self::with_resource(resource, request, position, fleet_use)
    }

    fn with_resource(
        resource: ResourceId,
        request: CacheRequest,
        position: Position,
        fleet_use: FleetUse,
    ) -> FetchSpec {
        let lease = Mutex::default();
        FetchSpec { request, resource, position, stale: None, fleet_use, newer_than: None, vary: None, lease }
    }

    /// Returns the fetch for a cache miss. `resource`: that of its request.
    pub(crate) fn for_miss(
        resource: ResourceId,
        context: &MissContext,
        position: Position,
        fleet_use: FleetUse,
    ) -> FetchSpec {
        let spec = FetchSpec::with_resource(resource, context.request.clone(), position, fleet_use);
        FetchSpec { stale: context.miss.stale.clone(), ..spec }
    }

    /// Returns the fetch that refreshes an entry that may be served stale meanwhile.
    pub(crate) fn for_refresh(
        upstream: &UpstreamState,
        request: CacheRequest,
        position: Position,
        entry: &Arc<Entry>,
    ) -> FetchSpec {
        let spec = FetchSpec::new(upstream, request, position, FleetUse::LookupAndLease);
        FetchSpec { stale: Some(entry.clone()), ..spec }
    }

    /// Returns the fetch that refreshes what arrived at `newer_than` before it expires.
    pub(crate) fn for_refresh_ahead(
        upstream: &UpstreamState,
        request: CacheRequest,
        position: Position,
        entry: Option<Arc<Entry>>,
        newer_than: Tick,
    ) -> FetchSpec {
        let spec = FetchSpec::new(upstream, request, position, FleetUse::Lease);
        FetchSpec { stale: entry, newer_than: Some(newer_than), ..spec }
    }

    /// Returns the specification for storing a response that was fetched without one: passed through, or in shadow
    /// mode.
    pub(crate) fn for_copy(upstream: &UpstreamState, request: CacheRequest, position: Position) -> FetchSpec {
        FetchSpec::new(upstream, request, position, FleetUse::None)
    }

    /// Turns the client's request into the cache's own: its own conditions, content codings that it can read.
    pub(crate) fn shape(&self, request: &mut Request<Body>) {
        request.extensions_mut().insert(RecordHeaderCase);
        if self.request.parts.method == Method::GET {
            set_conditions(request.headers_mut(), self.stale.as_deref().map(|entry| entry.head.headers()).as_ref());
        }
        if self.request.rule.reject_empty.is_some() {
            readable_codings_only(request);
        }
    }

    pub(crate) fn view(&self) -> RequestView<'_> {
        RequestView::from(&*self.request.parts)
    }

    /// The lease under which the fetch runs.
    pub(crate) fn lease(&self) -> MutexGuard<'_, Option<Lease>> {
        self.lease.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
