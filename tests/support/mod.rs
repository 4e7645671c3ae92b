//! Test support: a scripted origin, a byte-level client, a fault-injecting proxy, Redis servers and sidecars.

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

/// The timeout of [`until`] and [`soon`].
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Polls `look` until it returns a value. Panics with `what` after [`PATIENCE`].
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

/// Awaits a future. Panics with `what` after [`PATIENCE`].
pub(crate) async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("never finished: {what}"))
}
