//! What is stored for a request, and what may be done with it.

use std::sync::Arc;

use http::HeaderMap;

use super::Proxy;
use crate::policy::Tick;
use crate::policy::entry::Entry;
use crate::policy::freshness::{Demands, Verdict, judge};
use crate::policy::key::KeyBuf;
use crate::policy::outcome::Forward;
use crate::policy::variant::Variant;
use crate::telemetry::spans;

/// The next step.
#[derive(Debug)]
pub enum Lookup {
    /// Serve this.
    Fresh(Arc<Entry>),
    /// Serve this, and refresh it.
    WhileRevalidate(Arc<Entry>),
    /// Fetch.
    Fetch(Miss),
}

/// Why to fetch, and what there is to fall back on or to validate.
#[derive(Debug, Clone)]
pub struct Miss {
    /// The reason.
    pub forward: Forward,
    /// What is stored but may not be served as it is.
    pub stale: Option<Arc<Entry>>,
    /// Something stored for this URL, whoever asked for it: it tells which request headers matter.
    pub sibling: Option<Arc<Entry>>,
}

impl Miss {
    /// The key of the flight that this request waits for: of its URL, and of its values in the request headers
    /// that are known to matter.
    pub fn flight_key(&self, key: &KeyBuf, request: &HeaderMap) -> KeyBuf {
        self.sibling.as_ref().map_or_else(|| key.clone(), |entry| variant_key(key, &entry.variant, request))
    }
}

/// The key of a flight for those who ask with the same values in the headers of `variant`.
pub fn variant_key(key: &[u8], variant: &Variant, request: &HeaderMap) -> KeyBuf {
    let mut longer = KeyBuf::from_slice(key);
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

impl Proxy {
    /// Looks into memory.
    pub(super) fn look_up(&self, key: &[u8], headers: &HeaderMap, demands: &Demands, now: Tick) -> Lookup {
        let _span = spans::lookup("memory").entered();
        let Some(resource) = self.commons.memory.get(key) else {
            return Lookup::Fetch(Miss { forward: Forward::UriMiss, stale: None, sibling: None });
        };
        let Some(entry) = resource.select(headers) else {
            let sibling = resource.variants().first().cloned();
            return Lookup::Fetch(Miss { forward: Forward::VaryMiss, stale: None, sibling });
        };
        let standing = self.commons.invalidations.standing(entry, now);
        let miss = |forward, stale| Lookup::Fetch(Miss { forward, stale, sibling: Some(entry.clone()) });
        match judge(entry, standing, demands, now) {
            Verdict::Fresh => Lookup::Fresh(entry.clone()),
            Verdict::WhileRevalidate => Lookup::WhileRevalidate(entry.clone()),
            Verdict::Stale => miss(Forward::Stale, Some(entry.clone())),
            Verdict::Refused => miss(Forward::Request, Some(entry.clone())),
            Verdict::Gone => miss(Forward::UriMiss, None),
        }
    }
}
