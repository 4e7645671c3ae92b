//! Authenticated messages: a format byte, the ID of the key, a salt, the payload, and a MAC bound to a context.

use crate::store::authentication::{KEY_ID, Keyring, SALT, TAG};

/// Encodes a message and authenticates it with the current key. `context`: where the message is used.
pub(super) fn seal(context: &[u8], format: u8, payload: &[u8], ring: &Keyring, salt: [u8; SALT]) -> Vec<u8> {
    let mut body = vec![format];
    body.extend_from_slice(&ring.current_id());
    body.extend_from_slice(&salt);
    body.extend_from_slice(payload);
    // The current key of a keyring is always in it, so `mac` can't fail.
    let tag = ring.mac(ring.current_id(), &salt, context, &[&body]).unwrap_or_default();
    body.extend_from_slice(&tag);
    body
}

/// Verifies a message. Returns its format and payload; `None` if the MAC is wrong.
pub(super) fn open<'b>(context: &[u8], body: &'b [u8], ring: &Keyring) -> Option<(u8, &'b [u8])> {
    let (sealed, tag) = body.split_at_checked(body.len().checked_sub(TAG)?)?;
    let (format, rest) = sealed.split_first()?;
    let (id, rest) = rest.split_first_chunk::<KEY_ID>()?;
    let (salt, payload) = rest.split_first_chunk::<SALT>()?;
    ring.verify(*id, salt, context, &[sealed], tag).ok()?;
    Some((*format, payload))
}
