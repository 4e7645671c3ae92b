//! What is stored for a request, and what may be done with it.

use std::sync::Arc;

use http::HeaderMap;

use super::Proxy;
use crate::policy::Tick;
use crate::policy::entry::Entry;
use crate::policy::freshness::{Demands, Verdict, judge};
use crate::policy::outcome::Forward;

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
}

impl Proxy {
    /// Looks into memory.
    pub(super) fn look_up(&self, key: &[u8], headers: &HeaderMap, demands: &Demands, now: Tick) -> Lookup {
        let Some(resource) = self.commons.memory.get(key) else {
            return Lookup::Fetch(Miss { forward: Forward::UriMiss, stale: None });
        };
        let Some(entry) = resource.select(headers) else {
            return Lookup::Fetch(Miss { forward: Forward::VaryMiss, stale: None });
        };
        let standing = self.commons.invalidations.standing(entry);
        let miss = |forward| Lookup::Fetch(Miss { forward, stale: Some(entry.clone()) });
        match judge(entry, standing, demands, now) {
            Verdict::Fresh => Lookup::Fresh(entry.clone()),
            Verdict::WhileRevalidate => Lookup::WhileRevalidate(entry.clone()),
            Verdict::Stale => miss(Forward::Stale),
            Verdict::Refused => miss(Forward::Request),
            Verdict::Gone => Lookup::Fetch(Miss { forward: Forward::UriMiss, stale: None }),
        }
    }
}
