//! The listeners: accept, limit, guard, hand to the proxy, drain.

mod connection;
mod crowd;
mod frames;
pub mod framing;
pub mod guard;
mod intake;
mod interim;
mod linger;
mod normalise;
mod receive;
mod stalls;
mod wire;

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

use crate::config::ListenTls;
use crate::proxy::face::Face;
use crate::tls;
use connection::Door;
use crowd::{Crowd, Place};

/// Connections that may wait in the kernel to be accepted.
const BACKLOG: u32 = 1024;

/// After a failed `accept` (no file descriptors left, say).
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Binds an address. The error says what to do.
pub fn bind(address: SocketAddr, what: &str) -> Result<TcpListener, String> {
    let listening = || {
        let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        socket.listen(BACKLOG)
    };
    listening().map_err(|error| {
        if error.kind() == io::ErrorKind::AddrInUse {
            format!("{what}: {address} is taken: stop who listens there (in a reload that may be this sidecar itself), or choose another address")
        } else if error.kind() == io::ErrorKind::PermissionDenied {
            format!("{what}: no permission to listen on {address}: choose a port above 1023")
        } else {
            format!("{what}: can't listen on {address}: {error}")
        }
    })
}

/// What speaks TLS to clients.
pub fn acceptor(tls: &ListenTls) -> Result<TlsAcceptor, String> {
    Ok(TlsAcceptor::from(Arc::new(tls::server_config(tls)?)))
}

/// TLS of a listener, if it speaks it: certificates can be replaced, for the connections that come.
pub type SharedTls = Arc<ArcSwap<Option<TlsAcceptor>>>;

/// To be replaced later.
pub fn shared_tls(tls: Option<TlsAcceptor>) -> SharedTls {
    Arc::new(ArcSwap::from_pointee(tls))
}

/// A listener, and what is behind it.
pub struct Listener {
    /// Where clients come in.
    pub socket: TcpListener,
    /// TLS towards them.
    pub tls: SharedTls,
    /// Who answers, and what they may do.
    pub face: Arc<Face>,
}

impl std::fmt::Debug for Listener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Listener").field("socket", &self.socket).finish_non_exhaustive()
    }
}

/// Serves until `drain` turns true, then lets what runs finish until `grace` (in milliseconds, as it is then) has passed.
///
/// Returns how many connections had to be cut.
pub async fn serve(listener: Listener, mut drain: watch::Receiver<bool>, grace: Arc<AtomicU64>) -> usize {
    let Listener { socket, tls, face } = listener;
    let crowd = Crowd::new(face.now().limits.connections);
    let mut connections = JoinSet::new();
    let mut waiting = None;
    loop {
        while connections.try_join_next().is_some() {}
        if waiting.is_none() {
            waiting = tokio::select! {
                biased;
                () = turned(&mut drain) => break,
                stream = accept(&socket) => stream,
            };
        }
        crowd.resize(face.now().limits.connections);
        // Beyond `limits.connections`, one that does nothing is asked to leave for each that comes.
        let place = tokio::select! {
            biased;
            () = turned(&mut drain) => break,
            place = crowd.place() => place,
        };
        if let Some(stream) = waiting.take() {
            admit(&face, &tls, stream, place, &mut connections);
        }
    }
    // Who is in the kernel's queue already has been let in.
    while let Some(place) = crowd.take() {
        if waiting.is_none() {
            let queued = tokio::time::timeout(Duration::ZERO, socket.accept()).await;
            waiting = queued.ok().and_then(Result::ok).map(|(stream, _)| stream);
        }
        let Some(stream) = waiting.take() else { break };
        admit(&face, &tls, stream, place, &mut connections);
    }
    drop(socket);
    crowd.close();
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

/// With what counts when it comes.
fn admit(face: &Arc<Face>, tls: &SharedTls, stream: TcpStream, place: Place, connections: &mut JoinSet<()>) {
    let door = Door { limits: face.now().limits, face: face.clone(), tls: Option::clone(&tls.load()) };
    connections.spawn(async move {
        door.connection(stream, place.seat.clone()).await;
        drop(place);
    });
}

/// Until the switch is on, or its owner gone.
async fn turned(switch: &mut watch::Receiver<bool>) {
    let _ = switch.wait_for(|on| *on).await;
}

#[cfg(test)]
pub(crate) mod tests {
    /// Until `holds`, at most a few thousand turns of the executor.
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
