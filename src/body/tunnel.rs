//! The upstream end of a connection that has switched protocols with a 101 response (RFC 9110 §7.8).

use std::fmt;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::{AsyncRead, AsyncWrite};

/// A bidirectional byte stream.
pub trait DuplexStream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> DuplexStream for T {}

type OpeningFuture = Pin<Box<dyn Future<Output = io::Result<Box<dyn DuplexStream>>> + Send>>;

/// Response extension of a 101: passes the upstream connection to the code that serves the client connection.
#[derive(Clone)]
pub struct Tunnel(Arc<Mutex<Option<OpeningFuture>>>);

impl Tunnel {
    /// Creates a tunnel that is open once `opening` is ready.
    pub fn new(opening: impl Future<Output = io::Result<Box<dyn DuplexStream>>> + Send + 'static) -> Tunnel {
        Tunnel(Arc::new(Mutex::new(Some(Box::pin(opening)))))
    }

    /// Returns the upstream end. Only the first call succeeds; later ones fail with [`io::ErrorKind::NotConnected`].
    pub async fn open(self) -> io::Result<Box<dyn DuplexStream>> {
        let opening = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        match opening {
            Some(opening) => opening.await,
            None => Err(io::ErrorKind::NotConnected.into()),
        }
    }
}

impl fmt::Debug for Tunnel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tunnel")
    }
}
