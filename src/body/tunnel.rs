//! The upstream's end of a connection that speaks another protocol since its 101 (RFC 9110 §7.8).

use std::fmt;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::{AsyncRead, AsyncWrite};

/// Bytes both ways.
pub trait DuplexStream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> DuplexStream for T {}

type OpeningFuture = Pin<Box<dyn Future<Output = io::Result<Box<dyn DuplexStream>>> + Send>>;

/// Travels with the 101, from the one who spoke with the upstream to the one who speaks with the client.
#[derive(Clone)]
pub struct Tunnel(Arc<Mutex<Option<OpeningFuture>>>);

impl Tunnel {
    /// A tunnel that is open once `opening` is ready.
    pub fn new(opening: impl Future<Output = io::Result<Box<dyn DuplexStream>>> + Send + 'static) -> Tunnel {
        Tunnel(Arc::new(Mutex::new(Some(Box::pin(opening)))))
    }

    /// The upstream's end. It can be had once.
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
