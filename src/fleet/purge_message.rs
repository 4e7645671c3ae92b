//! The wire format of a purge in the invalidation log: versioned, and authenticated with a MAC.
//!
//! A message that does not verify, or that this version can't decode, makes all stored entries unverified, because a
//! cold cache is better than a wrong one.

use serde::{Deserialize, Serialize};

use super::SidecarId;
use crate::policy::invalidation::ledger::{Matcher, PurgeKind, Selector, TargetMatch};
use crate::policy::invalidation::tag::{Subject, UpstreamId};
use crate::policy::routing::pattern::Glob;
use crate::store::authentication::{KEY_ID, Keyring, SALT, TAG};

const VERSION: u8 = 1;

/// The context that the MAC of a log entry is bound to.
const BOUND_TO: &[u8] = b"invalidation log";

/// A purge and the sidecar that made it.
#[derive(Debug, Clone)]
pub struct PurgeMessage {
    /// The sidecar that made the purge.
    pub from: SidecarId,
    /// The sequence number of the purge at that sidecar.
    pub number: u64,
    /// Whether the purge is soft or hard.
    pub strength: PurgeKind,
    /// The selectors of what is purged.
    pub selectors: Vec<Selector>,
    /// The name under which sidecars confirm that they have applied the purge, if a confirmation is wanted.
    pub answer: Option<u64>,
}

#[derive(Serialize, Deserialize)]
struct PurgePayload {
    from: u64,
    number: u64,
    hard: bool,
    answer: Option<u64>,
    selectors: Vec<SelectorPayload>,
}

#[derive(Serialize, Deserialize)]
enum SelectorPayload {
    Subject([u8; 16]),
    Prefix(MatcherPayload),
    Glob(MatcherPayload),
    Everything,
}

#[derive(Serialize, Deserialize)]
struct MatcherPayload {
    upstream: Option<u64>,
    authority: Option<String>,
    text: String,
}

impl From<&Selector> for SelectorPayload {
    fn from(selector: &Selector) -> SelectorPayload {
        let payload = |matcher: &Matcher, text: String| MatcherPayload {
            upstream: matcher.upstream.map(|id| id.0),
            authority: matcher.authority.as_deref().map(str::to_owned),
            text,
        };
        match selector {
            Selector::Subject(subject) => SelectorPayload::Subject(subject.to_bytes()),
            Selector::Everything => SelectorPayload::Everything,
            Selector::Matching(matcher) => match &matcher.target {
                TargetMatch::Prefix(text) => SelectorPayload::Prefix(payload(matcher, text.to_string())),
                TargetMatch::Glob(glob) => SelectorPayload::Glob(payload(matcher, glob.to_string())),
            },
        }
    }
}

impl From<SelectorPayload> for Selector {
    fn from(payload: SelectorPayload) -> Selector {
        let matching = |matcher: MatcherPayload, target| {
            let upstream = matcher.upstream.map(UpstreamId);
            Selector::Matching(Matcher { upstream, authority: matcher.authority.map(Into::into), target })
        };
        match payload {
            SelectorPayload::Subject(bytes) => Selector::Subject(Subject::from_bytes(bytes)),
            SelectorPayload::Everything => Selector::Everything,
            SelectorPayload::Prefix(matcher) => {
                let target = TargetMatch::Prefix(matcher.text.as_str().into());
                matching(matcher, target)
            }
            SelectorPayload::Glob(matcher) => {
                let target = TargetMatch::Glob(Glob::new(&matcher.text));
                matching(matcher, target)
            }
        }
    }
}

impl PurgeMessage {
    /// Encodes the purge for the log and authenticates it with the current key.
    pub fn seal(&self, ring: &Keyring, salt: [u8; SALT]) -> Vec<u8> {
        let payload = PurgePayload {
            from: self.from.0,
            number: self.number,
            hard: self.strength == PurgeKind::Hard,
            answer: self.answer,
            selectors: self.selectors.iter().map(SelectorPayload::from).collect(),
        };
        let mut body = vec![VERSION];
        body.extend_from_slice(&ring.current_id());
        body.extend_from_slice(&salt);
        body.extend(postcard::to_allocvec(&payload).unwrap_or_default());
        // The current key of a keyring is always in it, so `mac` can't fail.
        let tag = ring.mac(ring.current_id(), &salt, BOUND_TO, &[&body]).unwrap_or_default();
        body.extend_from_slice(&tag);
        body
    }

    /// Verifies and decodes a log entry. Returns `None` if the MAC, the version or the encoding is wrong.
    pub fn open(body: &[u8], ring: &Keyring) -> Option<PurgeMessage> {
        let (sealed, tag) = body.split_at_checked(body.len().checked_sub(TAG)?)?;
        let (version, rest) = sealed.split_first()?;
        let (id, rest) = rest.split_first_chunk::<KEY_ID>()?;
        let (salt, payload) = rest.split_first_chunk::<SALT>()?;
        if *version != VERSION {
            return None;
        }
        ring.verify(*id, salt, BOUND_TO, &[sealed], tag).ok()?;
        let payload: PurgePayload = postcard::from_bytes(payload).ok()?;
        Some(PurgeMessage {
            from: SidecarId(payload.from),
            number: payload.number,
            strength: if payload.hard { PurgeKind::Hard } else { PurgeKind::Soft },
            selectors: payload.selectors.into_iter().map(Selector::from).collect(),
            answer: payload.answer,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::invalidation::tag::TagScope;

    #[test]
    fn purge_message_round_trips_and_modified_messages_are_rejected() {
        let ring = Keyring::new([&b"secret"[..]]);
        let scope = TagScope { upstream: UpstreamId(7), authority: None };
        let matcher = |target| Matcher { upstream: Some(UpstreamId(7)), authority: Some("a.example".into()), target };
        let purge = PurgeMessage {
            from: SidecarId(3),
            number: 9,
            strength: PurgeKind::Soft,
            selectors: vec![
                Selector::Subject(Subject::tag(scope, "products")),
                Selector::Matching(matcher(TargetMatch::Prefix("/a".into()))),
                Selector::Matching(matcher(TargetMatch::Glob(Glob::new("*b*")))),
                Selector::Everything,
            ],
            answer: Some(5),
        };
        let sealed = purge.seal(&ring, [1; SALT]);
        let opened = PurgeMessage::open(&sealed, &ring).expect("ours");
        assert_eq!(format!("{opened:?}"), format!("{purge:?}"));
        // Other versions of the program read this format: a change of the layout needs a new VERSION.
        let hex = crate::policy::testing::hex(&sealed);
        assert_eq!(
            hex,
            "01347d1312010101010101010101010101010101010309000105040021474a48eaa0072cdee2caacd7832c040101070109612e6578616d706c65022f610201070109612e6578616d706c65032a622a036c759205b12b7315dd07645cfe1cd57c"
        );
        assert!(PurgeMessage::open(&sealed, &Keyring::new([&b"other"[..]])).is_none());
        for at in 0..sealed.len() {
            let mut broken = sealed.clone();
            broken[at] ^= 1;
            assert!(PurgeMessage::open(&broken, &ring).is_none(), "byte {at}");
            assert!(PurgeMessage::open(&sealed[..at], &ring).is_none(), "cut at {at}");
        }
    }
}
