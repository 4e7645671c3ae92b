//! Who in the fleet fetches: a lease in Redis, kept while the fetch runs, given back with a word about how it ended.
//!
//! A lease is short. Its holder renews it; should the holder die, it lapses, and the next who asks has it. Nobody's
//! answer depends on it being there: without Redis everybody fetches.

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

/// How long a lease lives unless renewed: how long a fleet waits for a sidecar that was killed.
pub const LEASE_TTL: Duration = Duration::from_millis(1500);

/// How often it is renewed.
const RENEW_INTERVAL: Duration = Duration::from_millis(500);

/// How long its end waits for the record to be written.
const WRITE_TIMEOUT: Duration = Duration::from_secs(2);

/// How the holder of a lease fared: what those who wait are told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaseMessage {
    /// There is a record: look.
    Stored,
    /// The answer is not to be shared: fetch for yourself.
    Unshared,
    /// There was none: ask for the lease.
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

    /// From a message.
    pub fn read(message: &[u8]) -> LeaseMessage {
        let all = [LeaseMessage::Stored, LeaseMessage::Unshared, LeaseMessage::Nothing];
        all.into_iter().find(|word| word.token().as_bytes() == message).unwrap_or(LeaseMessage::Nothing)
    }
}

/// How a fetch ended: says when a record is written, if one is.
#[derive(Debug)]
enum LeaseEnd {
    Stored(oneshot::Receiver<()>),
    Unshared,
}

/// A lease that is ours. Dropping it gives it back, with nothing to show.
#[derive(Debug)]
pub struct Lease(Option<oneshot::Sender<LeaseEnd>>);

/// Who has a lease.
#[derive(Debug, Clone)]
pub struct LeaseHolder(String);

impl LeaseHolder {
    /// The last log entry that it had seen when it began.
    pub fn log_seen(&self) -> LogId {
        self.0.rsplit(' ').next().and_then(LogId::parse).unwrap_or_default()
    }
}

/// What comes of asking for one.
#[derive(Debug)]
pub enum ClaimResult {
    /// It is ours.
    Ours(Lease),
    /// Somebody has it. There will be a message.
    Theirs {
        /// For so long, unless it is kept.
        left: Duration,
        /// Its holder.
        holder: LeaseHolder,
    },
}

/// Asks for the lease of a name, also if this holder still has it. `seen`: the last log entry that we have seen.
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
        LeaseClaim::Ours => {
            let (end, ended) = oneshot::channel();
            tokio::spawn(hold_lease(redis.clone(), name.to_owned(), token, ended));
            Ok(ClaimResult::Ours(Lease(Some(end))))
        }
    }
}

impl Lease {
    /// A record is being written; those who wait are told when it is.
    pub fn finish_stored(&mut self, written: oneshot::Receiver<()>) {
        self.end(LeaseEnd::Stored(written));
    }

    /// The answer is not for others.
    pub fn finish_not_shareable(&mut self) {
        self.end(LeaseEnd::Unshared);
    }

    fn end(&mut self, end: LeaseEnd) {
        if let Some(holder) = self.0.take() {
            // If the holder is gone, the lease is lost.
            let _ = holder.send(end);
        }
    }
}

/// Renews a lease until its end, and gives it back.
async fn hold_lease(redis: Arc<Redis>, name: String, token: String, mut ended: oneshot::Receiver<LeaseEnd>) {
    let end = loop {
        match timeout(RENEW_INTERVAL, &mut ended).await {
            Ok(end) => break end,
            Err(_elapsed) => {
                if let Ok(false) = redis.renew(&name, &token, LEASE_TTL).await {
                    debug!("a lease was lost: another sidecar may fetch the same");
                    return;
                }
            }
        }
    };
    let word = match end {
        Ok(LeaseEnd::Stored(written)) => match timeout(WRITE_TIMEOUT, written).await {
            Ok(Ok(())) => LeaseMessage::Stored,
            Ok(Err(_)) | Err(_) => LeaseMessage::Nothing,
        },
        Ok(LeaseEnd::Unshared) => LeaseMessage::Unshared,
        Err(_dropped) => LeaseMessage::Nothing,
    };
    let message = Bytes::from(format!("{} {}", subject(&name), word.token()));
    if let Err(error) = redis.release(&name, &token, message).await {
        debug!(%error, "a lease could not be given back: it lapses");
    }
}

/// Returns the name of the lease for fetching one variant of a record: 128 bits of a BLAKE3 digest, in hex.
///
/// `record`: the digest of the record's key, in hex.
pub fn name(record: &str, variant: &Variant) -> String {
    blake3::hash(format!("{record} {}", variant.digest().to_hex()).as_bytes()).to_hex()[..32].to_owned()
}

/// The subject of messages about a lease.
pub fn subject(name: &str) -> String {
    format!("lease:{name}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::header::{ACCEPT_ENCODING, HeaderMap, HeaderValue};

    // All sidecars of a fleet must ask for the same lease, whatever version they run.
    #[test]
    fn encoding_of_lease_names_is_golden() {
        let request = HeaderMap::from_iter([(ACCEPT_ENCODING, HeaderValue::from_static("gzip"))]);
        let variant = Variant::of(vec![ACCEPT_ENCODING], &request);
        assert_eq!(name("00ff", &variant), "ee2831793c54f53f6ac9b528572a99c6");
        assert_eq!(name("00ff", &Variant::default()), "6fdaaca213a52fabec4f5766da5122c1");
    }
}
