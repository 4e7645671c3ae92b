//! The wire format of a refresh request that any sidecar can perform: versioned and encrypted.
//!
//! Only requests without credentials are queued: credentials are never written to Redis, encrypted or not.

use http::header::{HeaderMap, HeaderName, HeaderValue};
use serde::{Deserialize, Serialize};

use crate::store::authentication::{KEY_ID, Keyring, SALT};

const VERSION: u8 = 1;

/// The context that the encryption of a refresh request is bound to.
const BOUND_TO: &[u8] = b"work";

/// A request to be sent to the upstream again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RefreshRequest {
    /// The ID of the upstream.
    pub upstream: u64,
    /// The host that the client requested, which selects the origin if the upstream has several.
    pub host: String,
    /// Path and query.
    pub target: String,
    /// The request headers, without Host.
    pub headers: HeaderMap,
    /// When the response to be replaced was received, by the fleet's clock. A newer stored one makes this obsolete.
    pub received_at: u64,
}

#[derive(Serialize, Deserialize)]
struct RefreshPayload<'a> {
    upstream: u64,
    host: &'a str,
    target: &'a str,
    #[serde(borrow)]
    headers: Vec<(&'a str, &'a [u8])>,
    received_at: u64,
}

impl RefreshRequest {
    /// Encodes and encrypts the request for the stream. Returns `None` if that fails.
    pub fn seal(&self, ring: &Keyring, salt: [u8; SALT]) -> Option<Vec<u8>> {
        let payload = RefreshPayload {
            upstream: self.upstream,
            host: &self.host,
            target: &self.target,
            headers: self.headers.iter().map(|(name, value)| (name.as_str(), value.as_bytes())).collect(),
            received_at: self.received_at,
        };
        let mut body = postcard::to_allocvec(&payload).ok()?;
        ring.encrypt(ring.current_id(), &salt, 0, BOUND_TO, &mut body).ok()?;
        Some([&[VERSION][..], &ring.current_id(), &salt, &body].concat())
    }

    /// Decrypts and decodes a message. Returns `None` if the version, the key or the encoding is wrong.
    pub fn open(sealed: &[u8], ring: &Keyring) -> Option<RefreshRequest> {
        let (version, rest) = sealed.split_first()?;
        let (id, rest) = rest.split_first_chunk::<KEY_ID>()?;
        let (salt, rest) = rest.split_first_chunk::<SALT>()?;
        if *version != VERSION {
            return None;
        }
        let body = ring.decrypt(*id, salt, 0, BOUND_TO, rest).ok()?;
        let payload: RefreshPayload<'_> = postcard::from_bytes(&body).ok()?;
        let mut headers = HeaderMap::new();
        for (name, value) in payload.headers {
            headers.append(HeaderName::from_bytes(name.as_bytes()).ok()?, HeaderValue::from_bytes(value).ok()?);
        }
        let (host, target) = (payload.host.to_owned(), payload.target.to_owned());
        Some(RefreshRequest { upstream: payload.upstream, host, target, headers, received_at: payload.received_at })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refresh_request_round_trips_and_modified_ones_are_rejected() {
        let ring = Keyring::new([&b"secret"[..]]);
        let headers = HeaderMap::from_iter([(http::header::ACCEPT, HeaderValue::from_static("*/*"))]);
        let refresh =
            RefreshRequest { upstream: 7, host: "a.example".into(), target: "/x?y".into(), headers, received_at: 9 };
        let sealed = refresh.seal(&ring, [3; SALT]).expect("sealed");
        assert!(!sealed.windows(4).any(|w| w == b"/x?y"));
        // Other versions of the program read this format: a change of the layout needs a new VERSION.
        let hex = crate::policy::testing::hex(&sealed);
        assert_eq!(
            hex,
            "01347d131203030303030303030303030303030303e3e585562a97d7903dd618e5b15021f28b51ea857815f815f76aea063c7543c233f3868d4638a39f1d33dd49e2"
        );
        assert_eq!(RefreshRequest::open(&sealed, &ring).as_ref(), Some(&refresh));
        for at in 0..sealed.len() {
            let mut broken = sealed.clone();
            broken[at] ^= 1;
            assert!(RefreshRequest::open(&broken, &ring).is_none(), "byte {at}");
        }
    }
}
