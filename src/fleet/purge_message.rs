//! The wire format of a purge in the invalidation log: versioned, and authenticated with a MAC.
//!
//! A message that does not verify, or that this version can't decode, makes all stored entries unverified, because a
//! cold cache is better than a wrong one.

use serde::{Deserialize, Serialize};

use super::SidecarId;
use super::authenticated::{open, seal};
use crate::policy::invalidation::ledger::{Matcher, PurgeKind, Selector, TargetMatch};
use crate::policy::invalidation::tag::{Subject, UpstreamId};
use crate::policy::routing::pattern::Glob;
use crate::store::authentication::{Keyring, SALT};

/// The first byte of a message: its format, which says what it is.
const PURGE: u8 = 1;
const RESET: u8 = 2;
const REPEATED_PURGE: u8 = 3;

/// The context that the MAC of a log entry is bound to.
const CONTEXT: &[u8] = b"invalidation log";

/// A message in the invalidation log.
#[derive(Debug, Clone)]
pub enum LogMessage {
    /// A purge.
    Purge(PurgeMessage),
    /// Purges before this entry may have been lost: all that was stored before is unverified.
    Reset,
}

/// A purge and the sidecar that made it.
#[derive(Debug, Clone)]
pub struct PurgeMessage {
    /// The sidecar that made the purge.
    pub from: SidecarId,
    /// The sequence number of the purge at that sidecar.
    pub number: u64,
    /// Whether the purge is soft or hard.
    pub kind: PurgeKind,
    /// The selectors of what is purged.
    pub selectors: Vec<Selector>,
    /// The name under which sidecars confirm that they have applied the purge, if a confirmation is wanted.
    pub confirmation: Option<u64>,
    /// Set if the purge is logged once more, because the log may have lost it: the fleet time at which it was made, in
    /// milliseconds. Entries received since are stale, not gone.
    pub repeated: Option<u64>,
}

#[derive(Serialize, Deserialize)]
struct PurgePayload {
    from: u64,
    number: u64,
    hard: bool,
    confirmation: Option<u64>,
    selectors: Vec<SelectorPayload>,
}

#[derive(Serialize, Deserialize)]
enum SelectorPayload {
    Subject([u8; 16]),
    Prefix(MatcherPayload),
    Glob(MatcherPayload),
    Everything,
    ScopedSubject { subject: [u8; 16], scope: [u8; 16] },
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
            Selector::Subject { subject, scope } => {
                SelectorPayload::ScopedSubject { subject: subject.to_bytes(), scope: scope.to_bytes() }
            }
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
            // Written by earlier versions: a scope of its own.
            SelectorPayload::Subject(bytes) => {
                Selector::Subject { subject: Subject::from_bytes(bytes), scope: Subject::from_bytes(bytes) }
            }
            SelectorPayload::ScopedSubject { subject, scope } => {
                Selector::Subject { subject: Subject::from_bytes(subject), scope: Subject::from_bytes(scope) }
            }
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
            hard: self.kind == PurgeKind::Hard,
            confirmation: self.confirmation,
            selectors: self.selectors.iter().map(SelectorPayload::from).collect(),
        };
        let payload = postcard::to_allocvec(&payload).unwrap_or_default();
        match self.repeated {
            None => seal(CONTEXT, PURGE, &payload, ring, salt),
            Some(made_at) => seal(CONTEXT, REPEATED_PURGE, &[&made_at.to_be_bytes(), &*payload].concat(), ring, salt),
        }
    }
}

impl LogMessage {
    /// Encodes a reset for the log and authenticates it with the current key.
    pub fn seal_reset(ring: &Keyring, salt: [u8; SALT]) -> Vec<u8> {
        seal(CONTEXT, RESET, &[], ring, salt)
    }

    /// Verifies and decodes a log entry. Returns `None` if the MAC, the format or the encoding is wrong.
    pub fn open(body: &[u8], ring: &Keyring) -> Option<LogMessage> {
        let (format, payload) = open(CONTEXT, body, ring)?;
        let (repeated, payload) = match format {
            RESET => return Some(LogMessage::Reset),
            PURGE => (None, payload),
            REPEATED_PURGE => {
                let (made_at, payload) = payload.split_first_chunk()?;
                (Some(u64::from_be_bytes(*made_at)), payload)
            }
            _ => return None,
        };
        let payload: PurgePayload = postcard::from_bytes(payload).ok()?;
        Some(LogMessage::Purge(PurgeMessage {
            repeated,
            from: SidecarId(payload.from),
            number: payload.number,
            kind: if payload.hard { PurgeKind::Hard } else { PurgeKind::Soft },
            selectors: payload.selectors.into_iter().map(Selector::from).collect(),
            confirmation: payload.confirmation,
        }))
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
            kind: PurgeKind::Soft,
            selectors: vec![
                Selector::tag(scope, "products"),
                Selector::Matching(matcher(TargetMatch::Prefix("/a".into()))),
                Selector::Matching(matcher(TargetMatch::Glob(Glob::new("*b*")))),
                Selector::Everything,
            ],
            confirmation: Some(5),
            repeated: None,
        };
        let sealed = purge.seal(&ring, [1; SALT]);
        let opened = LogMessage::open(&sealed, &ring).expect("ours");
        assert_eq!(format!("{opened:?}"), format!("Purge({purge:?})"));
        // Other versions of the program read these formats: a change of the layout needs another first byte.
        let hex = crate::policy::testing::hex;
        assert_eq!(
            hex(&sealed),
            "01347d1312010101010101010101010101010101010309000105040421474a48eaa0072cdee2caacd7832c04fa822e97d634fc89498ad6adf072c8500101070109612e6578616d706c65022f610201070109612e6578616d706c65032a622a03c59f428791cafd6bbfa9f880de0e345e"
        );
        let late = PurgeMessage { repeated: Some(7), selectors: Vec::new(), ..purge };
        let late = late.seal(&ring, [1; SALT]);
        assert_eq!(
            hex(&late),
            "03347d13120101010101010101010101010101010100000000000000070309000105009bf528a278edbca1d3b481eb9e137478"
        );
        let opened = LogMessage::open(&late, &ring);
        assert!(matches!(opened, Some(LogMessage::Purge(PurgeMessage { repeated: Some(7), number: 9, .. }))));
        let reset = LogMessage::seal_reset(&ring, [1; SALT]);
        assert_eq!(hex(&reset), "02347d131201010101010101010101010101010101ddc8243977b7d74e50ece1d69dc8e994");
        assert!(matches!(LogMessage::open(&reset, &ring), Some(LogMessage::Reset)));
        assert!(LogMessage::open(&sealed, &Keyring::new([&b"other"[..]])).is_none());
        for at in 0..sealed.len() {
            let mut broken = sealed.clone();
            broken[at] ^= 1;
            assert!(LogMessage::open(&broken, &ring).is_none(), "byte {at}");
            assert!(LogMessage::open(&sealed[..at], &ring).is_none(), "cut at {at}");
        }
    }
}
