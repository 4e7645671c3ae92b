//! The fleet's mode as it is kept in Redis: authenticated, so that access to Redis alone can't change it.

use super::authenticated::{open, seal};
use crate::policy::mode::Mode;
use crate::store::authentication::{Keyring, SALT};

const FORMAT: u8 = 1;

/// The context that the MAC is bound to.
const CONTEXT: &[u8] = b"fleet mode";

/// A mode that is set for the fleet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModeMessage {
    /// The mode.
    pub mode: Mode,
    /// The fleet time at which it expires, in milliseconds. `None`: when another is set.
    pub until: Option<u64>,
}

impl ModeMessage {
    /// Encodes the message and authenticates it with the current key.
    pub fn seal(&self, ring: &Keyring, salt: [u8; SALT]) -> Vec<u8> {
        let until = self.until.unwrap_or(u64::MAX).to_be_bytes();
        seal(CONTEXT, FORMAT, &[&until[..], self.mode.token().as_bytes()].concat(), ring, salt)
    }

    /// Verifies and decodes a message. Returns `None` if the MAC, the format or the encoding is wrong.
    pub fn open(body: &[u8], ring: &Keyring) -> Option<ModeMessage> {
        let (format, payload) = open(CONTEXT, body, ring)?;
        let (until, mode) = payload.split_first_chunk()?;
        let until = Some(u64::from_be_bytes(*until)).filter(|until| *until != u64::MAX);
        let mode = Mode::of(std::str::from_utf8(mode).ok()?)?;
        (format == FORMAT).then_some(ModeMessage { mode, until })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mode_message_round_trips_and_others_are_rejected() {
        let ring = Keyring::new([&b"secret"[..]]);
        for until in [None, Some(1_763_700_000_000)] {
            let message = ModeMessage { mode: Mode::Bypass, until };
            let sealed = message.seal(&ring, [1; SALT]);
            assert_eq!(ModeMessage::open(&sealed, &ring), Some(message));
            assert_eq!(ModeMessage::open(&sealed, &Keyring::new([&b"other"[..]])), None);
        }
        assert_eq!(ModeMessage::open(b"normal", &ring), None);
    }
}
