//! The listeners: accept client connections, apply the connection limit, serve requests, drain at shutdown.

mod connection;
mod connection_limit;
pub mod framing;
mod guarded_stream;
mod h2_flood;
mod h2_stalled_streams;
mod h2_to_h1;
mod informational;
mod linger;
mod request_body;
mod service;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tracing::warn;

use super::tls;
use super::tls::ServerTls;
use crate::proxy::active::ActiveProxy;
use connection::ConnectionHandler;
use connection_limit::{ConnectionSlot, ConnectionSlots};

/// Maximum number of connections in the kernel's accept queue.
const BACKLOG: u32 = 1024;

/// Pause after a failed `accept` (for example when no file descriptors are left).
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Binds an address. The error message says how to fix the problem.
pub fn bind(address: SocketAddr, what: &str) -> Result<TcpListener, String> {
    let listening = || {
        let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        socket.listen(BACKLOG)
    };
    listening().map_err(|error| {
        if error.kind() == io::ErrorKind::AddrInUse {
            format!("{what}: {address} is in use: stop the process that listens there (in a reload that may be this sidecar itself), or choose another address")
        } else if error.kind() == io::ErrorKind::PermissionDenied {
            format!("{what}: no permission to listen on {address}: choose a port above 1023")
        } else {
            format!("{what}: can't listen on {address}: {error}")
        }
    })
}

/// Returns the TLS acceptor for client connections.
pub fn acceptor(tls: &ServerTls) -> Result<TlsAcceptor, String> {
    Ok(TlsAcceptor::from(Arc::new(tls::server_config(tls)?)))
}

/// TLS acceptor of a listener, or `None` without TLS. A reload replaces it for subsequent connections.
pub type SharedTls = Arc<ArcSwap<Option<TlsAcceptor>>>;

/// Returns the TLS of a listener, for [`serve`].
pub fn shared_tls(tls: Option<TlsAcceptor>) -> SharedTls {
    Arc::new(ArcSwap::from_pointee(tls))
}

/// A listener and the proxy behind it.
pub struct Listener {
    /// The socket that accepts client connections.
    pub socket: TcpListener,
    /// TLS towards clients.
    pub tls: SharedTls,
    /// The proxy that handles the requests, with the client limits.
    pub proxy: Arc<ActiveProxy>,
}

impl std::fmt::Debug for Listener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Listener").field("socket", &self.socket).finish_non_exhaustive()
    }
}

/// Serves until `drain` turns true, then waits for the open connections to finish, for at most `grace` milliseconds
/// (read when the drain starts).
///
/// Returns the number of connections that were cut.
pub async fn serve(listener: Listener, mut drain: watch::Receiver<bool>, grace: Arc<AtomicU64>) -> usize {
    let Listener { socket, tls, proxy: active } = listener;
    let slots = ConnectionSlots::new(active.load().limits.connections);
    let mut connections = JoinSet::new();
    let mut waiting = None;
    loop {
        while connections.try_join_next().is_some() {}
        if waiting.is_none() {
            waiting = tokio::select! {
                biased;
                () = wait_true(&mut drain) => break,
                stream = accept(&socket) => stream,
            };
        }
        slots.resize(active.load().limits.connections);
        // Beyond `limits.connections`, an idle connection is evicted for each new one.
        let slot = tokio::select! {
            biased;
            () = wait_true(&mut drain) => break,
            slot = slots.acquire() => slot,
        };
        if let Some(stream) = waiting.take() {
            spawn_connection(&active, &tls, stream, slot, &mut connections);
        }
    }
    // Connections in the kernel's accept queue are already established: serve them as far as there are free slots.
    while let Some(slot) = slots.try_acquire() {
        if waiting.is_none() {
            let queued = tokio::time::timeout(Duration::ZERO, socket.accept()).await;
            waiting = queued.ok().and_then(Result::ok).map(|(stream, _)| stream);
        }
        let Some(stream) = waiting.take() else { break };
        spawn_connection(&active, &tls, stream, slot, &mut connections);
    }
    drop(socket);
    slots.evict_all();
    let finish = async { while connections.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(Duration::from_millis(grace.load(Ordering::Relaxed)), finish).await;
    let cut = connections.len();
    connections.shutdown().await;
    cut
}

async fn accept(socket: &TcpListener) -> Option<TcpStream> {
    match socket.accept().await {
        Ok((stream, _)) => Some(stream),
        Err(error) => {
            warn!(%error, "can't accept a connection");
            tokio::time::sleep(ACCEPT_PAUSE).await;
            None
        }
    }
}

/// Serves a connection in a new task, with the limits and TLS settings that are current when it is accepted.
fn spawn_connection(
    active: &Arc<ActiveProxy>,
    tls: &SharedTls,
    stream: TcpStream,
    slot: ConnectionSlot,
    connections: &mut JoinSet<()>,
) {
    let handler =
        ConnectionHandler { limits: active.load().limits, proxy: active.clone(), tls: Option::clone(&tls.load()) };
    connections.spawn(async move {
        handler.connection(stream, slot.activity.clone()).await;
        drop(slot);
    });
}

/// Waits until the switch is on or its sender is dropped.
async fn wait_true(switch: &mut watch::Receiver<bool>) {
    let _ = switch.wait_for(|on| *on).await;
}

#[cfg(test)]
pub(crate) mod tests {
    /// Yields to the executor until `holds` returns true. Panics after 10 000 yields.
    pub(crate) async fn until(mut holds: impl FnMut() -> bool) {
        for _ in 0..10_000 {
            if holds() {
                return;
            }
            tokio::task::yield_now().await;
        }
        panic!("it never held");
    }
}
