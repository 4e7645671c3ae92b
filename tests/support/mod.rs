//! What the tests are made of: a scripted origin, a client that sees every byte, a sidecar to start.

pub(crate) mod canary;
pub(crate) mod chaos;
pub(crate) mod client;
pub(crate) mod origin;
pub(crate) mod process;
pub(crate) mod redis;
pub(crate) mod sidecar;

pub(crate) use chaos::{Chaos, Mood};
pub(crate) use client::{Answer, Client, get, send};
pub(crate) use origin::{Gate, Origin, Reply};
pub(crate) use redis::Redis;
pub(crate) use sidecar::Sidecar;

use std::time::Duration;

/// Nothing observed within this is a failure.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Waits until something is observed; fails loudly if it never is.
pub(crate) async fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let looking = async {
        let mut every = tokio::time::interval(Duration::from_millis(1));
        loop {
            if let Some(seen) = look() {
                return seen;
            }
            every.tick().await;
        }
    };
    tokio::time::timeout(PATIENCE, looking).await.unwrap_or_else(|_| panic!("never observed: {what}"))
}

/// Waits for a future, but not for ever.
pub(crate) async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("never finished: {what}"))
}
