//! Fetch leases in Redis: one sidecar of the fleet fetches, and releases the lease with a message about the result.
//!
//! A lease has a short TTL, and its holder renews it while the fetch runs. If the holder dies, the lease expires, and
//! the next sidecar that claims it gets it. No response depends on a lease: without Redis every sidecar fetches.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::oneshot;
use tokio::time::timeout;
use tracing::debug;

use super::SidecarId;
use crate::policy::http::vary::Variant;
use crate::policy::invalidation::log_position::LogId;
use crate::redis::{LeaseClaim, Redis, RedisError};

/// TTL of a lease that is not renewed: how long a fleet waits for a sidecar that was killed.
pub const LEASE_TTL: Duration = Duration::from_millis(1500);

/// Interval at which a lease is renewed.
const RENEW_INTERVAL: Duration = Duration::from_millis(500);

/// How long the release of a lease waits for the record to be written.
const WRITE_TIMEOUT: Duration = Duration::from_secs(2);

/// The result of a fetch under a lease, sent to the waiting sidecars.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaseMessage {
    /// The record is in Redis: look it up.
    Stored,
    /// The response must not be shared: each sidecar fetches for itself.
    Unshared,
    /// There is no response: claim the lease.
    Nothing,
}

impl LeaseMessage {
    fn token(self) -> &'static str {
        match self {
            LeaseMessage::Stored => "stored",
            LeaseMessage::Unshared => "unshared",
            LeaseMessage::Nothing => "nothing",
        }
    }

    /// Parses a message. An unknown one is [`LeaseMessage::Nothing`].
    pub fn read(message: &[u8]) -> LeaseMessage {
        let all = [LeaseMessage::Stored, LeaseMessage::Unshared, LeaseMessage::Nothing];
        all.into_iter().find(|outcome| outcome.token().as_bytes() == message).unwrap_or(LeaseMessage::Nothing)
    }
}

/// How a fetch ended. `Stored` has a receiver that resolves when the record is written.
#[derive(Debug)]
enum LeaseEnd {
    Stored(oneshot::Receiver<()>),
    Unshared,
}

/// A lease held by this sidecar. Dropping it releases the lease without a result ([`LeaseMessage::Nothing`]).
#[derive(Debug)]
pub struct Lease(Option<oneshot::Sender<LeaseEnd>>);

/// The token of a lease's holder.
#[derive(Debug, Clone)]
pub struct LeaseHolder(String);

impl LeaseHolder {
    /// Returns the last log entry that the holder had seen when it claimed the lease.
    pub fn log_seen(&self) -> LogId {
        self.0.rsplit(' ').next().and_then(LogId::parse).unwrap_or_default()
    }
}

/// The result of claiming a lease.
#[derive(Debug)]
pub enum ClaimResult {
    /// This sidecar holds the lease.
    Ours {
        /// The lease.
        lease: Lease,
        /// Another sidecar released it lately, and may have stored a record.
        released_lately: bool,
    },
    /// Another holder has the lease, and sends a message when its fetch ends.
    Theirs {
        /// Time until the lease expires, unless it is renewed.
        left: Duration,
        /// The holder.
        holder: LeaseHolder,
    },
}

/// Claims the lease `name`, also if the holder `instead_of` still has it. Spawns a task that renews the lease.
///
/// `log_seen`: the last log entry that this sidecar has seen. Fails if Redis fails.
pub async fn claim(
    redis: &Arc<Redis>,
    name: &str,
    me: SidecarId,
    log_seen: LogId,
    instead_of: Option<&LeaseHolder>,
) -> Result<ClaimResult, RedisError> {
    let token = format!("{me} {:016x} {log_seen}", getrandom::u64().unwrap_or(0));
    match redis.claim(name, &token, LEASE_TTL, &me.to_string(), instead_of.map(|holder| holder.0.as_str())).await? {
        LeaseClaim::Theirs { left, holder } => Ok(ClaimResult::Theirs { left, holder: LeaseHolder(holder) }),
        LeaseClaim::Ours { released_lately } => {
            let (end, ended) = oneshot::channel();
            tokio::spawn(hold_lease(redis.clone(), name.to_owned(), token, ended));
            Ok(ClaimResult::Ours { lease: Lease(Some(end)), released_lately })
        }
    }
}

impl Lease {
    /// Releases the lease once the record is written, and tells the waiting sidecars to look it up.
    pub fn finish_stored(&mut self, written: oneshot::Receiver<()>) {
        self.end(LeaseEnd::Stored(written));
    }

    /// Releases the lease and tells the waiting sidecars that the response must not be shared.
    pub fn finish_not_shareable(&mut self) {
        self.end(LeaseEnd::Unshared);
    }

    fn end(&mut self, end: LeaseEnd) {
        if let Some(holder) = self.0.take() {
            // Sending fails only if the task that renews the lease has ended: then the lease is lost.
            let _ = holder.send(end);
        }
    }
}

/// Renews a lease until the fetch ends, then releases it with a message.
async fn hold_lease(redis: Arc<Redis>, name: String, token: String, mut ended: oneshot::Receiver<LeaseEnd>) {
    let end = loop {
        match timeout(RENEW_INTERVAL, &mut ended).await {
            Ok(end) => break end,
            Err(_elapsed) => {
                if let Ok(false) = redis.renew(&name, &token, LEASE_TTL).await {
                    debug!("a lease was lost: another sidecar may fetch the same key");
                    return;
                }
            }
        }
    };
    let outcome = match end {
        Ok(LeaseEnd::Stored(written)) => match timeout(WRITE_TIMEOUT, written).await {
            Ok(Ok(())) => LeaseMessage::Stored,
            Ok(Err(_)) | Err(_) => LeaseMessage::Nothing,
        },
        Ok(LeaseEnd::Unshared) => LeaseMessage::Unshared,
        Err(_dropped) => LeaseMessage::Nothing,
    };
    let message = Bytes::from(format!("{} {}", subject(&name), outcome.token()));
    if let Err(error) = redis.release(&name, &token, message).await {
        debug!(%error, "a lease could not be released: it expires");
    }
}

/// Returns the name of the lease for fetching one variant of a record: 128 bits of a BLAKE3 digest, in hex.
///
/// `record`: the digest of the record's key, in hex.
pub fn name(record: &str, variant: &Variant) -> String {
    blake3::hash(format!("{record} {}", variant.digest().to_hex()).as_bytes()).to_hex()[..32].to_owned()
}

/// Returns the subject of messages about a lease.
pub fn subject(name: &str) -> String {
    format!("lease:{name}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::header::{ACCEPT_ENCODING, HeaderMap, HeaderValue};

    // All sidecars of a fleet must claim the same lease, whatever version they run.
    #[test]
    fn lease_name_encoding_matches_the_golden_values() {
        let request = HeaderMap::from_iter([(ACCEPT_ENCODING, HeaderValue::from_static("gzip"))]);
        let variant = Variant::of(vec![ACCEPT_ENCODING], &request);
        assert_eq!(name("00ff", &variant), "ee2831793c54f53f6ac9b528572a99c6");
        assert_eq!(name("00ff", &Variant::default()), "6fdaaca213a52fabec4f5766da5122c1");
    }
}
