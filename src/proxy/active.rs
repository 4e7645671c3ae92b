//! The proxies behind the listeners, replaceable at run time (configuration reload).

use std::sync::Arc;

use arc_swap::{ArcSwap, Guard};

use super::{Proxy, SharedState};
use crate::policy::client_limits::ClientLimits;

/// What a listener serves with.
#[derive(Debug)]
pub struct Serving {
    /// Answers requests.
    pub proxy: Arc<Proxy>,
    /// Limits on clients.
    pub limits: ClientLimits,
}

/// The proxy of one listener.
#[derive(Debug)]
pub struct ActiveProxy(ArcSwap<Serving>);

impl ActiveProxy {
    /// Starts with this proxy.
    pub fn new(proxy: Arc<Proxy>, limits: ClientLimits) -> Arc<ActiveProxy> {
        Arc::new(ActiveProxy(ArcSwap::from_pointee(Serving { proxy, limits })))
    }

    /// Returns what serves now, for the duration of one call: no lock, no reference count.
    pub fn load(&self) -> Guard<Arc<Serving>> {
        self.0.load()
    }

    /// Returns what serves now.
    pub fn load_full(&self) -> Arc<Serving> {
        self.0.load_full()
    }

    /// Returns the proxy that serves now.
    pub fn proxy(&self) -> Arc<Proxy> {
        self.0.load().proxy.clone()
    }

    /// Replaces the proxy for the next requests. Running requests end with the one that they began with.
    pub fn replace(&self, proxy: Arc<Proxy>, limits: ClientLimits) {
        self.0.store(Arc::new(Serving { proxy, limits }));
    }
}

/// The active configuration: the shared state, and the proxies of all listeners.
#[derive(Debug)]
pub struct ActiveConfig {
    shared: ArcSwap<SharedState>,
    listeners: ArcSwap<Vec<Arc<ActiveProxy>>>,
}

impl ActiveConfig {
    /// Starts without listeners.
    pub fn new(shared: Arc<SharedState>) -> Arc<ActiveConfig> {
        Arc::new(ActiveConfig { shared: ArcSwap::new(shared), listeners: ArcSwap::default() })
    }

    /// Returns the shared state.
    pub fn shared(&self) -> Arc<SharedState> {
        self.shared.load_full()
    }

    /// Returns the proxies, in the order of the configuration.
    pub fn proxies(&self) -> Vec<Arc<Proxy>> {
        self.listeners.load().iter().map(|listener| listener.proxy()).collect()
    }

    /// Returns the client limits of the first upstream.
    pub fn limits(&self) -> Option<ClientLimits> {
        self.listeners.load().first().map(|listener| listener.load().limits)
    }

    /// Replaces the shared state.
    pub fn set_shared(&self, shared: Arc<SharedState>) {
        self.shared.store(shared);
    }

    /// Replaces the listeners.
    pub fn set_listeners(&self, listeners: Vec<Arc<ActiveProxy>>) {
        self.listeners.store(Arc::new(listeners));
    }
}
