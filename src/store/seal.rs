//! Who wrote it, and for whom: every record authenticates itself, and is encrypted if the operator wishes.
//!
//! A deployment has a ring of secrets: the first one seals, all of them open. A sealed record names the secret by a
//! fingerprint and carries a random salt; both together give the keys for this record alone, so no nonce is ever
//! used twice. Authentication is a keyed BLAKE3 MAC of 128 bits; encryption is AES-256-GCM (the AEAD of ring). Both
//! are bound to the place where the record lies, so a record that was moved or swapped does not open.

use std::fmt;

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use subtle::ConstantTimeEq;

/// Bytes that name a secret.
pub const KEY_ID: usize = 4;
/// Random bytes of one record.
pub const SALT: usize = 16;
/// Bytes of a MAC, and of what encryption adds to each part.
pub const TAG: usize = 16;

/// The secrets of a deployment.
#[derive(Clone)]
pub struct Ring {
    keys: Vec<Key>,
}

#[derive(Clone)]
struct Key {
    id: [u8; KEY_ID],
    secret: [u8; 32],
}

/// It was not sealed with any secret of this ring, or not for this place, or was changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Forged;

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Ring({} keys)", self.keys.len())
    }
}

impl Ring {
    /// The ring of these secrets; the first one seals.
    pub fn new<'s>(secrets: impl IntoIterator<Item = &'s [u8]>) -> Ring {
        let key = |secret: &[u8]| {
            let secret = blake3::derive_key("sidecache 2026 records", secret);
            let mut id = [0; KEY_ID];
            id.copy_from_slice(&blake3::keyed_hash(&secret, b"id").as_bytes()[..KEY_ID]);
            Key { id, secret }
        };
        Ring { keys: secrets.into_iter().map(key).collect() }
    }

    /// The name of the secret that seals.
    pub fn first(&self) -> [u8; KEY_ID] {
        self.keys.first().map_or([0; KEY_ID], |key| key.id)
    }

    /// The MAC of a record's parts, in this place.
    pub fn mac(
        &self,
        id: [u8; KEY_ID],
        salt: &[u8; SALT],
        place: &[u8],
        parts: &[&[u8]],
    ) -> Result<[u8; TAG], Forged> {
        let mut hasher = blake3::Hasher::new_keyed(&self.derive(id, b"mac", salt)?);
        hasher.update(&(place.len() as u64).to_be_bytes()).update(place);
        for part in parts {
            hasher.update(part);
        }
        let mut tag = [0; TAG];
        tag.copy_from_slice(&hasher.finalize().as_bytes()[..TAG]);
        Ok(tag)
    }

    /// Is this the MAC of these parts? In constant time.
    pub fn verify(
        &self,
        id: [u8; KEY_ID],
        salt: &[u8; SALT],
        place: &[u8],
        parts: &[&[u8]],
        tag: &[u8],
    ) -> Result<(), Forged> {
        let expected = self.mac(id, salt, place, parts)?;
        if bool::from(expected.as_slice().ct_eq(tag)) { Ok(()) } else { Err(Forged) }
    }

    /// Encrypts part number `part` of a record; it grows by [`TAG`] bytes.
    pub fn encrypt(
        &self,
        id: [u8; KEY_ID],
        salt: &[u8; SALT],
        part: u8,
        bound: &[u8],
        data: &mut Vec<u8>,
    ) -> Result<(), Forged> {
        let key = self.cipher(id, salt)?;
        key.seal_in_place_append_tag(nonce(part), Aad::from(bound), data).map_err(|_| Forged)
    }

    /// Decrypts part number `part` of a record.
    pub fn decrypt(
        &self,
        id: [u8; KEY_ID],
        salt: &[u8; SALT],
        part: u8,
        bound: &[u8],
        sealed: &[u8],
    ) -> Result<Vec<u8>, Forged> {
        let mut data = sealed.to_vec();
        let key = self.cipher(id, salt)?;
        let length = key.open_in_place(nonce(part), Aad::from(bound), &mut data).map_err(|_| Forged)?.len();
        data.truncate(length);
        Ok(data)
    }

    fn cipher(&self, id: [u8; KEY_ID], salt: &[u8; SALT]) -> Result<LessSafeKey, Forged> {
        let key = self.derive(id, b"aead", salt)?;
        UnboundKey::new(&AES_256_GCM, &key).map(LessSafeKey::new).map_err(|_| Forged)
    }

    /// The key for one purpose and one record.
    fn derive(&self, id: [u8; KEY_ID], purpose: &[u8], salt: &[u8; SALT]) -> Result<[u8; 32], Forged> {
        let key = self.keys.iter().find(|key| key.id == id).ok_or(Forged)?;
        let mut hasher = blake3::Hasher::new_keyed(&key.secret);
        hasher.update(purpose).update(salt);
        Ok(*hasher.finalize().as_bytes())
    }
}

/// The key is for one record only, so its parts may count.
fn nonce(part: u8) -> Nonce {
    let mut nonce = [0; 12];
    nonce[11] = part;
    Nonce::assume_unique_for_key(nonce)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_secret_seals_and_all_open() {
        let (old, both, new) = (Ring::new([&b"old"[..]]), Ring::new([&b"new"[..], b"old"]), Ring::new([&b"new"[..]]));
        let salt = [7; SALT];
        let tag = old.mac(old.first(), &salt, b"place", &[b"a", b"b"]).expect("sealed");
        assert_eq!(both.verify(old.first(), &salt, b"place", &[b"a", b"b"], &tag), Ok(()));
        assert_eq!(new.verify(old.first(), &salt, b"place", &[b"a", b"b"], &tag), Err(Forged));
        assert_eq!(both.first(), new.first());
        for (place, parts, salt) in [
            (&b"elsewhere"[..], [&b"a"[..], b"b"], salt),
            (b"place", [b"a", b"c"], salt),
            (b"place", [b"a", b"b"], [8; SALT]),
        ] {
            assert_eq!(old.verify(old.first(), &salt, place, &parts, &tag), Err(Forged));
        }
    }

    #[test]
    fn encryption_is_bound_to_place_part_and_secret() {
        let ring = Ring::new([&b"secret"[..]]);
        let (id, salt) = (ring.first(), [7; SALT]);
        let mut data = b"shpat_canary".to_vec();
        ring.encrypt(id, &salt, 0, b"place", &mut data).expect("sealed");
        assert!(!data.windows(6).any(|w| w == b"canary"));
        assert_eq!(ring.decrypt(id, &salt, 0, b"place", &data).as_deref(), Ok(&b"shpat_canary"[..]));
        assert_eq!(ring.decrypt(id, &salt, 1, b"place", &data), Err(Forged));
        assert_eq!(ring.decrypt(id, &salt, 0, b"other", &data), Err(Forged));
        assert_eq!(Ring::new([&b"other"[..]]).decrypt(id, &salt, 0, b"place", &data), Err(Forged));
        data[3] ^= 1;
        assert_eq!(ring.decrypt(id, &salt, 0, b"place", &data), Err(Forged));
    }
}
