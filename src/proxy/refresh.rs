//! Background refreshes: of stale entries that were served, and of entries that expire soon (`refresh_ahead`).
//!
//! Refreshes ahead of expiry are spread over time by key, so that entries that were fetched together are not refreshed
//! together. In a fleet each happens once: a request without credentials is offered to all sidecars
//! ([`crate::fleet::refresh_queue`]); one with credentials is refreshed by the sidecar that received it, under the lease
//! of its key.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http::header::{CACHE_CONTROL, HOST, HeaderValue, PRAGMA};
use http::request::Parts;
use tracing::debug;

use super::admission::{Admission, Admitted};
use super::exchange::CacheRequest;
use super::fetch::Fetcher;
use super::fetch::coalesce::{Coalescer, FetchResult, FollowerResult, JoinResult};
use super::fetch::spec::FetchSpec;
use super::lookup::{Lookup, LookupResult, variant_key};
use super::upstream_state::Destination;
use crate::body::Body;
use crate::clock::Clock;
use crate::fleet::Fleet;
use crate::fleet::refresh_queue::RefreshRequest;
use crate::policy::Tick;
use crate::policy::entry::Entry;
use crate::policy::http::freshness::RequestDirectives;
use crate::policy::routing::rule::Rule;
use crate::policy::routing::target::{client_authority, target};
use crate::proxy::upstream_state::UpstreamState;
use crate::store::record::random_salt;

/// Starts background refreshes.
#[derive(Debug)]
pub(crate) struct Refresher {
    pub(crate) upstream: Arc<UpstreamState>,
    pub(crate) admission: Arc<Admission>,
    pub(crate) lookup: Arc<Lookup>,
    pub(crate) coalescer: Arc<Coalescer>,
    pub(crate) fetcher: Arc<Fetcher>,
    pub(crate) clock: Clock,
    pub(crate) fleet: Option<Arc<Fleet>>,
}

/// An entry that was served, and the request that it was served to.
#[derive(Clone, Copy)]
pub(crate) struct ServedEntry<'r> {
    pub(crate) request: &'r Request<Body>,
    pub(crate) destination: &'r Destination,
    pub(crate) rule: &'r Arc<Rule>,
    pub(crate) key: &'r [u8],
    pub(crate) entry: &'r Arc<Entry>,
}

impl ServedEntry<'_> {
    fn to_cache_request(self) -> CacheRequest {
        CacheRequest {
            parts: Arc::new(without_directives(CacheRequest::to_get(self.request))),
            destination: self.destination.clone(),
            rule: self.rule.clone(),
            key: self.key.into(),
        }
    }
}

/// Returns a request without the client's directives, which do not concern a refresh.
fn without_directives(parts: Arc<Parts>) -> Parts {
    let mut parts = Arc::unwrap_or_clone(parts);
    parts.headers.remove(CACHE_CONTROL);
    parts.headers.remove(PRAGMA);
    parts
}

impl Refresher {
    /// After a hit: refreshes the entry if it expires within the rule's `refresh_ahead`. Once for each entry.
    pub(crate) fn refresh_ahead(&self, served: ServedEntry<'_>, now: Tick) {
        let Some(ahead) = served.rule.refresh_ahead else { return };
        if !served.entry.is_refresh_due(ahead, now) || served.entry.claim_refresh() {
            return;
        }
        let anonymous = !served.request.headers().keys().any(|name| served.rule.key.is_credential(name));
        match &self.fleet {
            Some(fleet) if anonymous && fleet.shares_refreshes => self.offer(fleet.clone(), served, ahead),
            Some(_) | None => self.refresh(served, true),
        }
    }

    /// Offers the refresh to all sidecars of the fleet.
    fn offer(&self, fleet: Arc<Fleet>, served: ServedEntry<'_>, ahead: Duration) {
        let (request, entry) = (served.request, served.entry);
        let Some(received_at) = fleet.redis.clock().at(entry.received_at) else { return };
        // All headers: which of them the upstream uses is not known.
        let mut headers = request.headers().clone();
        headers.remove(HOST);
        let refresh = RefreshRequest {
            upstream: self.upstream.id.0,
            host: client_authority(request.uri(), request.headers()).unwrap_or_default().to_owned(),
            target: target(request.uri()).to_owned(),
            headers,
            received_at,
        };
        let name = format!("{}-{}", entry.key_name.as_str(), &entry.variant.digest().to_hex()[..16]);
        tokio::spawn(async move {
            let Some(body) = refresh.seal(&fleet.keyring.load(), random_salt()) else { return };
            match fleet.redis.offer(&name, Bytes::from(body), ahead / 2).await {
                Ok(offered) => debug!(offered, "refresh ahead of expiry offered to the fleet"),
                Err(error) => debug!(%error, "refresh ahead of expiry not offered"),
            }
        });
    }

    /// Refreshes an entry in the background, unless a fetch for it is running. `ahead`: before it expires.
    pub(crate) fn refresh(&self, served: ServedEntry<'_>, ahead: bool) {
        let ServedEntry { request, destination, key, entry, .. } = served;
        let headers = request.headers();
        if self.upstream.budget_closed_for(destination, headers).is_some() {
            // The next request after the pause refreshes it.
            return;
        }
        if self.upstream.failed_keys.is_paused_or_probe(key, self.clock.now()) {
            return;
        }
        let position = self.lookup.invalidations.position();
        let fetch_key = variant_key(key, &entry.variant, headers);
        let refreshed = || match self.lookup.find(key, headers, &RequestDirectives::default(), self.clock.now()) {
            LookupResult::Fresh(found) if ahead && Arc::ptr_eq(&found, entry) => None,
            LookupResult::Fresh(_) => Some(()),
            LookupResult::WhileRevalidate(_) | LookupResult::Miss(_) => None,
        };
        let joined = self.coalescer.join(&fetch_key, &entry.resource, position, refreshed);
        if let Ok(JoinResult::Lead(leader, _no_follower)) = joined {
            let upstream = &self.upstream;
            // The resource is that of the current rule, whose tags may differ from those that the entry has.
            let spec = if ahead {
                let (entry, known) = (Some(entry.clone()), entry.received_at);
                FetchSpec::for_refresh_ahead(upstream, served.to_cache_request(), position, entry, known)
            } else {
                FetchSpec::for_refresh(upstream, served.to_cache_request(), position, entry)
            };
            self.fetcher.spawn(leader, spec);
        }
    }

    /// Runs a refresh that a sidecar of the fleet has offered. Returns when it is fetched, by any sidecar, or has failed.
    pub(crate) async fn run_offered(&self, fleet: &Fleet, refresh: RefreshRequest) {
        let Ok(uri) = refresh.target.parse() else { return };
        let mut request = Request::new(Body::Empty);
        *request.uri_mut() = uri;
        *request.headers_mut() = refresh.headers;
        if let Ok(host) = HeaderValue::from_str(&refresh.host) {
            request.headers_mut().insert(HOST, host);
        }
        let upstream = &self.upstream;
        let Ok(destination) = upstream.locate(request.uri(), request.headers()) else { return };
        let Ok(admitted) = self.admission.admit(&request, &destination, self.clock.now()) else { return };
        let Some(known) = fleet.redis.clock().tick(refresh.received_at) else { return };
        let Admitted { rule, key, .. } = admitted;
        if upstream.failed_keys.is_paused_or_probe(&key, self.clock.now()) {
            return;
        }
        let directives = RequestDirectives::default();
        let entry = match self.lookup.find(&key, request.headers(), &directives, self.clock.now()) {
            LookupResult::Fresh(entry) | LookupResult::WhileRevalidate(entry) => Some(entry),
            LookupResult::Miss(miss) => miss.stale,
        };
        let position = self.lookup.invalidations.position();
        let resource = upstream.resource_id(&destination, request.uri(), rule);
        let fetch_key =
            entry.as_ref().map_or_else(|| key.clone(), |entry| variant_key(&key, &entry.variant, request.headers()));
        let follower = match self.coalescer.join(&fetch_key, &resource, position, || None::<()>) {
            Ok(JoinResult::Follow(follower)) => follower,
            Ok(JoinResult::Lead(leader, follower)) => {
                let (destination, rule) = (destination.clone().into_owned(), rule.clone());
                let parts = Arc::new(request.into_parts().0);
                let request = CacheRequest { parts, destination, rule, key };
                let spec = FetchSpec::for_refresh_ahead(upstream, request, position, entry, known);
                self.fetcher.spawn(leader, spec);
                follower
            }
            Err(()) => return,
        };
        match follower.wait().await {
            FollowerResult::Completed(FetchResult::Failed(failure), _) => {
                debug!(cause = failure.cause(), "refresh ahead of expiry failed");
            }
            FollowerResult::Completed(_, _) | FollowerResult::Unshared(_) | FollowerResult::Lost => {}
        }
    }
}
