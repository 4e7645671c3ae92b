//! The listeners: accept, limit, guard, hand to the proxy, drain.

mod connection;
mod crowd;
mod frames;
pub mod framing;
pub mod guard;
mod intake;
mod interim;
mod normalise;
mod receive;
mod stalls;
mod wire;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tracing::warn;

use crate::config::ListenTls;
use crate::proxy::face::Face;
use crate::tls;
use connection::Door;
use crowd::{Crowd, Place};

/// After a failed `accept` (no file descriptors left, say).
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Binds an address. The error says what to do.
pub async fn bind(address: SocketAddr, what: &str) -> Result<TcpListener, String> {
    TcpListener::bind(address).await.map_err(|error| {
        if error.kind() == io::ErrorKind::AddrInUse {
            format!("{what}: {address} is taken by another process: stop it, or choose another listen address")
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

/// A listener, and what is behind it.
pub struct Listener {
    /// Where clients come in.
    pub socket: TcpListener,
    /// TLS towards them.
    pub tls: Option<TlsAcceptor>,
    /// Who answers, and what they may do.
    pub face: Arc<Face>,
}

impl std::fmt::Debug for Listener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Listener").field("socket", &self.socket).finish_non_exhaustive()
    }
}

/// Serves until `drain` turns true, then lets what runs finish until `grace` has passed.
///
/// Returns how many connections had to be cut.
pub async fn serve(listener: Listener, mut drain: watch::Receiver<bool>, grace: Duration) -> usize {
    let Listener { socket, tls, face } = listener;
    let crowd = Crowd::new(face.now().limits.connections);
    let door = Door { limits: face.now().limits, face, tls };
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
        // Beyond `limits.connections`, one that does nothing is asked to leave for each that comes.
        let place = tokio::select! {
            biased;
            () = turned(&mut drain) => break,
            place = crowd.place() => place,
        };
        if let Some(stream) = waiting.take() {
            admit(&door, stream, place, &mut connections);
        }
    }
    // Who is in the kernel's queue already has been let in.
    while let Some(place) = crowd.take() {
        if waiting.is_none() {
            let queued = tokio::time::timeout(Duration::ZERO, socket.accept()).await;
            waiting = queued.ok().and_then(Result::ok).map(|(stream, _)| stream);
        }
        let Some(stream) = waiting.take() else { break };
        admit(&door, stream, place, &mut connections);
    }
    drop(socket);
    crowd.close();
    let finish = async { while connections.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(grace, finish).await;
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

fn admit(door: &Door, stream: TcpStream, place: Place, connections: &mut JoinSet<()>) {
    let door = Door { limits: door.face.now().limits, ..door.clone() };
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
