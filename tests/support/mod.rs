//! What the tests are made of: a scripted origin, a client that sees every byte, a sidecar to start.

pub mod client;
pub mod origin;
pub mod process;
pub mod sidecar;

pub use client::{Answer, Client, get, send};
pub use origin::{Ask, Gate, Origin, Reply};
pub use sidecar::Sidecar;

use std::time::Duration;

/// Nothing observed within this is a failure.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Waits until something is observed; fails loudly if it never is.
pub async fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let looking = async {
        loop {
            if let Some(seen) = look() {
                return seen;
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, looking).await.unwrap_or_else(|_| panic!("never observed: {what}"))
}

/// Waits for a future, but not for ever.
pub async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("never finished: {what}"))
}
