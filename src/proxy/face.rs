//! What a listener shows: a proxy that can be replaced while requests pass through it.

use std::sync::Arc;

use arc_swap::{ArcSwap, Guard};

use super::{Commons, Proxy};
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

/// All that is shown, for those who ask about the whole process, or work for it.
#[derive(Debug)]
pub struct Stage {
    commons: ArcSwap<Commons>,
    faces: ArcSwap<Vec<Arc<Face>>>,
}

impl Stage {
    /// Nothing is shown yet.
    pub fn new(commons: Arc<Commons>) -> Arc<Stage> {
        Arc::new(Stage { commons: ArcSwap::new(commons), faces: ArcSwap::default() })
    }

    /// What all upstreams share now.
    pub fn commons(&self) -> Arc<Commons> {
        self.commons.load_full()
    }

    /// Who answers now, in the order of the configuration.
    pub fn proxies(&self) -> Vec<Arc<Proxy>> {
        self.faces.load().iter().map(|face| face.proxy()).collect()
    }

    /// What clients of the first upstream may do.
    pub fn limits(&self) -> Option<Limits> {
        self.faces.load().first().map(|face| face.now().limits)
    }

    /// From now on these are shared.
    pub fn set_commons(&self, commons: Arc<Commons>) {
        self.commons.store(commons);
    }

    /// From now on these are shown.
    pub fn set_faces(&self, faces: Vec<Arc<Face>>) {
        self.faces.store(Arc::new(faces));
    }
}
