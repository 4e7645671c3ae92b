//! What a flight is to bring, and how much of the fleet's help it wants for that.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use http::request::Parts;
use http::{Method, Request};

use super::forward::readable_codings_only;
use super::site::Place;
use crate::body::Body;
use crate::fleet::lease::Lease;
use crate::policy::Tick;
use crate::policy::entry::Entry;
use crate::policy::invalidation::{Address, Position};
use crate::policy::plan::Plan;
use crate::policy::revalidate::condition;
use crate::upstream::MayBeStored;

/// How much of the fleet's help a flight wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Help {
    /// Look, and fetch once in the fleet.
    All,
    /// That it is fetched once: it has looked.
    Claim,
    /// Look only: the answer can't be stored.
    Look,
    /// None: the client insists on its own answer, or answers can't be shared anyway.
    None,
}

/// What a flight is to bring.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) asked: Arc<Parts>,
    pub(super) place: Place,
    pub(super) plan: Arc<Plan>,
    pub(super) key: Box<[u8]>,
    pub(super) address: Address,
    /// The ledger's position before the fetch began.
    pub(super) position: Position,
    /// What is stored: validated, if it can be.
    pub(super) stale: Option<Arc<Entry>>,
    /// How much of the fleet's help it wants.
    pub(super) help: Help,
    /// It refreshes, ahead of its time, something born then.
    pub(super) ahead: Option<Tick>,
    /// The lease under which it is fetched.
    pub(super) lease: Mutex<Option<Lease>>,
}

impl Job {
    /// Makes of a client's request that of the cache.
    pub(super) fn shape(&self, request: &mut Request<Body>) {
        request.extensions_mut().insert(MayBeStored);
        if self.asked.method == Method::GET {
            condition(request.headers_mut(), self.stale.as_deref().map(|entry| entry.head.headers()).as_ref());
        }
        if self.plan.reject_empty.is_some() {
            readable_codings_only(request);
        }
    }

    pub(super) fn lease(&self) -> MutexGuard<'_, Option<Lease>> {
        self.lease.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
