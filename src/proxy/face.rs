//! What a listener shows: a proxy that can be replaced while requests pass through it.

use std::sync::Arc;

use arc_swap::{ArcSwap, Guard};

use super::Proxy;
use crate::config::Limits;

/// Who answers, and what clients may do.
#[derive(Debug)]
pub struct Served {
    /// Who answers.
    pub proxy: Arc<Proxy>,
    /// What clients may do.
    pub limits: Limits,
}

/// One listener's.
#[derive(Debug)]
pub struct Face(ArcSwap<Served>);

impl Face {
    /// This proxy, for now.
    pub fn new(proxy: Arc<Proxy>, limits: Limits) -> Arc<Face> {
        Arc::new(Face(ArcSwap::from_pointee(Served { proxy, limits })))
    }

    /// For one request: no lock, no count.
    pub fn now(&self) -> Guard<Arc<Served>> {
        self.0.load()
    }

    /// For longer.
    pub fn served(&self) -> Arc<Served> {
        self.0.load_full()
    }

    /// The proxy now.
    pub fn proxy(&self) -> Arc<Proxy> {
        self.0.load().proxy.clone()
    }

    /// From the next request on another one answers; those that are under way end with theirs.
    pub fn show(&self, proxy: Arc<Proxy>, limits: Limits) {
        self.0.store(Arc::new(Served { proxy, limits }));
    }
}
