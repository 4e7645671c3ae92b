//! A fault-injecting TCP proxy: adds delay, holds back data, cuts or refuses connections, flips bits.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{broadcast, watch};
use tokio::task::JoinHandle;

/// The fault that the proxy injects.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Mood {
    /// Forwards all bytes.
    Fine,
    /// Forwards all bytes after a delay.
    Slow(Duration),
    /// Reads from both sides and forwards nothing.
    BlackHole,
    /// Forwards the client's bytes and holds back the server's.
    NoReplies,
    /// Flips a bit in one of every N bytes that the server sends, except in reads of at most 200 bytes.
    Flips(usize),
    /// Closes new connections at once, and all existing ones.
    Refuses,
}

/// A running proxy.
#[derive(Debug)]
pub(crate) struct Chaos {
    pub(crate) address: SocketAddr,
    mood: watch::Sender<Mood>,
    server: watch::Sender<SocketAddr>,
    cuts: broadcast::Sender<()>,
    serving: JoinHandle<()>,
}

impl Chaos {
    /// Starts a proxy in front of a server.
    pub(crate) async fn before(server: SocketAddr) -> Chaos {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a free port");
        let address = listener.local_addr().expect("an address");
        let (mood, cuts) = (watch::Sender::new(Mood::Fine), broadcast::Sender::new(1));
        let server = watch::Sender::new(server);
        let (moods, servers, cutting) = (mood.clone(), server.clone(), cuts.clone());
        let serving = tokio::spawn(async move {
            loop {
                let (client, _) = listener.accept().await.expect("a connection");
                if *moods.borrow() == Mood::Refuses {
                    continue;
                }
                let (moods, cut) = (Arc::new(moods.subscribe()), cutting.subscribe());
                tokio::spawn(connection(client, *servers.borrow(), moods, cut));
            }
        });
        Chaos { address, mood, server, cuts, serving }
    }

    pub(crate) fn set(&self, mood: Mood) {
        self.mood.send_replace(mood);
        if mood == Mood::Refuses {
            self.cut();
        }
    }

    /// Connects to another server from now on.
    #[allow(dead_code)] // a benchmark needs it
    pub(crate) fn set_server(&self, server: SocketAddr) {
        self.server.send_replace(server);
        self.cut();
    }

    /// Closes all connections.
    pub(crate) fn cut(&self) {
        // An error means that there is no connection.
        let _ = self.cuts.send(());
    }

    /// Returns a `[redis]` table that connects through this proxy.
    pub(crate) fn table(&self) -> String {
        format!("[redis]\nurl = \"redis://{}\"\n", self.address)
    }
}

impl Drop for Chaos {
    fn drop(&mut self) {
        self.serving.abort();
        self.cut();
    }
}

async fn connection(
    client: TcpStream,
    server: SocketAddr,
    mood: Arc<watch::Receiver<Mood>>,
    mut cut: broadcast::Receiver<()>,
) {
    let Ok(server) = TcpStream::connect(server).await else { return };
    for stream in [&client, &server] {
        stream.set_nodelay(true).expect("a socket");
    }
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    tokio::select! {
        () = pass(from_client, to_server, &mood, false) => {}
        () = pass(from_server, to_client, &mood, true) => {}
        _ = cut.recv() => {}
    }
}

async fn pass(
    mut from: impl AsyncReadExt + Unpin,
    mut to: impl AsyncWriteExt + Unpin,
    mood: &watch::Receiver<Mood>,
    is_reply: bool,
) {
    let mut buffer = vec![0; 64 << 10];
    let mut passed = 0usize;
    while let Ok(read @ 1..) = from.read(&mut buffer).await {
        let mut moods = mood.clone();
        let now = *moods.borrow_and_update();
        match now {
            Mood::Slow(delay) => drop(tokio::time::timeout(delay, std::future::pending::<()>()).await),
            Mood::BlackHole => {
                // Hold back the bytes until the fault ends.
                let _ = moods.wait_for(|mood| *mood != Mood::BlackHole).await;
            }
            Mood::NoReplies if is_reply => {
                let _ = moods.wait_for(|mood| *mood != Mood::NoReplies).await;
            }
            Mood::Flips(every) if is_reply && read > 200 => {
                for (at, byte) in buffer[..read].iter_mut().enumerate().skip(60) {
                    if (passed + at).is_multiple_of(every) {
                        *byte ^= 1 << (at % 8);
                    }
                }
            }
            Mood::Fine | Mood::NoReplies | Mood::Flips(_) | Mood::Refuses => {}
        }
        passed += read;
        if to.write_all(&buffer[..read]).await.is_err() {
            return;
        }
    }
}
