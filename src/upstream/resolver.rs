//! DNS resolver: queried for every new connection; leaves out link-local addresses where clients choose the host.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};

use hyper_util::client::legacy::connect::dns::{GaiResolver, Name};
use tower_service::Service;

use crate::policy::routing::target::is_refused;

/// The system's resolver, with a filter for refused addresses.
#[derive(Debug, Clone)]
pub(super) struct Resolver {
    system: GaiResolver,
    refuse_local: bool,
}

impl Resolver {
    /// Returns a resolver. `guarded`: clients choose the host, so addresses refused by [`is_refused`] are left out.
    pub(super) fn new(guarded: bool) -> Resolver {
        Resolver { system: GaiResolver::new(), refuse_local: guarded }
    }
}

impl Service<Name> for Resolver {
    type Response = std::vec::IntoIter<SocketAddr>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.system.poll_ready(cx)
    }

    fn call(&mut self, name: Name) -> Self::Future {
        let (guarded, found) = (self.refuse_local, self.system.call(name));
        Box::pin(async move {
            let found = found.await?;
            let allowed: Vec<_> = found.filter(|address| !guarded || !is_refused(address.ip())).collect();
            if allowed.is_empty() {
                return Err(io::Error::other("the name resolves to no permitted address"));
            }
            Ok(allowed.into_iter())
        })
    }
}
