//! Lookup of a request in the memory tier, and the next step.

use std::sync::Arc;

use http::HeaderMap;

use crate::fleet::invalidations::Invalidations;
use crate::policy::Tick;
use crate::policy::entry::Entry;
use crate::policy::http::freshness::{RequestDirectives, Verdict, evaluate};
use crate::policy::http::vary::Variant;
use crate::policy::outcome::ForwardReason;
use crate::policy::routing::cache_key::CacheKey;
use crate::store::Memory;
use crate::telemetry::spans;

/// Looks up entries in memory. A hit takes one hash, one shared shard lock, and no allocation.
#[derive(Debug)]
pub(crate) struct Lookup {
    pub(crate) memory: Arc<Memory>,
    pub(crate) invalidations: Arc<Invalidations>,
}

/// The next step.
#[derive(Debug)]
pub(crate) enum LookupResult {
    /// Serve this entry.
    Fresh(Arc<Entry>),
    /// Serve this entry, and refresh it in the background.
    WhileRevalidate(Arc<Entry>),
    /// Fetch.
    Miss(Miss),
}

/// Why a fetch is needed, and what it can validate or fall back on.
#[derive(Debug, Clone)]
pub(crate) struct Miss {
    pub(crate) reason: ForwardReason,
    /// The stored entry that may not be served as it is.
    pub(crate) stale: Option<Arc<Entry>>,
    /// An entry of another variant: it tells which request headers the response depends on.
    pub(crate) sibling: Option<Arc<Entry>>,
}

impl Miss {
    /// Returns the key under which requests for the same fetch meet: the cache key, and the values of the request
    /// headers that are known to select a variant.
    pub(crate) fn fetch_key(&self, key: &CacheKey, request: &HeaderMap) -> CacheKey {
        self.sibling.as_ref().map_or_else(|| key.clone(), |entry| variant_key(key, &entry.variant, request))
    }
}

/// Returns the key of a fetch for requests with the same values in the headers of `variant`.
pub(crate) fn variant_key(key: &[u8], variant: &Variant, request: &HeaderMap) -> CacheKey {
    let mut longer = CacheKey::from_slice(key);
    for (name, _) in &variant.0 {
        longer.push(0xfe);
        longer.extend_from_slice(name.as_str().as_bytes());
        for value in request.get_all(name) {
            longer.extend_from_slice(&(value.len() as u64).to_be_bytes());
            longer.extend_from_slice(value.as_bytes());
        }
    }
    longer
}

impl Lookup {
    /// Looks up a key for a request with these headers.
    pub(crate) fn find(
        &self,
        key: &[u8],
        headers: &HeaderMap,
        directives: &RequestDirectives,
        now: Tick,
    ) -> LookupResult {
        let _span = spans::lookup("memory").entered();
        let Some(variants) = self.memory.get(key) else {
            return LookupResult::Miss(Miss { reason: ForwardReason::UriMiss, stale: None, sibling: None });
        };
        let Some(entry) = variants.select(headers) else {
            let sibling = variants.variants().first().cloned();
            return LookupResult::Miss(Miss { reason: ForwardReason::VaryMiss, stale: None, sibling });
        };
        let state = self.invalidations.state_of(entry, now);
        let miss = |reason, stale| LookupResult::Miss(Miss { reason, stale, sibling: Some(entry.clone()) });
        match evaluate(entry, state, directives, now) {
            Verdict::Fresh => LookupResult::Fresh(entry.clone()),
            Verdict::WhileRevalidate => LookupResult::WhileRevalidate(entry.clone()),
            Verdict::Stale => miss(ForwardReason::Stale, Some(entry.clone())),
            Verdict::Refused => miss(ForwardReason::Request, Some(entry.clone())),
            Verdict::Gone => miss(ForwardReason::UriMiss, None),
        }
    }

    fn verdict(&self, entry: &Entry, now: Tick) -> Verdict {
        let state = self.invalidations.state_of(entry, now);
        evaluate(entry, state, &RequestDirectives::default(), now)
    }

    /// Returns true if a request without directives would be served this entry, fresh or while it is revalidated.
    pub(crate) fn is_servable(&self, entry: &Entry, now: Tick) -> bool {
        matches!(self.verdict(entry, now), Verdict::Fresh | Verdict::WhileRevalidate)
    }

    /// Returns true if a request without directives would be served this entry as fresh.
    pub(crate) fn is_fresh(&self, entry: &Entry, now: Tick) -> bool {
        self.verdict(entry, now) == Verdict::Fresh
    }
}
