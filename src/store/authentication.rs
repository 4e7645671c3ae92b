//! Record authentication (MAC) and optional encryption.
//!
//! A deployment has a ring of secrets: new records use the first one, and records of any of them are accepted. A
//! record names its secret by a fingerprint and carries a random salt. Its keys are derived from the secret and the
//! salt for this record alone, so no nonce is used twice. Authentication is a keyed BLAKE3 MAC of 128 bits; encryption
//! is AES-256-GCM (the AEAD of ring). Both are bound to the Redis key of the record, so a record that was moved or
//! swapped is rejected.

use std::fmt;

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use subtle::ConstantTimeEq;

/// Size of the ID of a secret, in bytes.
pub const KEY_ID: usize = 4;
/// Size of the random salt of a record, in bytes.
pub const SALT: usize = 16;
/// Size of a MAC, and of the tag that encryption adds to each part, in bytes.
pub const TAG: usize = 16;

/// The secrets of a deployment.
#[derive(Clone)]
pub struct Keyring {
    keys: Vec<SecretKey>,
}

#[derive(Clone)]
struct SecretKey {
    id: [u8; KEY_ID],
    secret: [u8; 32],
}

/// The record was made with a secret that is not in the ring, or for another Redis key, or was changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AuthenticationError;

impl fmt::Debug for Keyring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Ring({} keys)", self.keys.len())
    }
}

impl Keyring {
    /// Creates a ring of these secrets. New records use the first one.
    pub fn new<'s>(secrets: impl IntoIterator<Item = &'s [u8]>) -> Keyring {
        let key = |secret: &[u8]| {
            let secret = blake3::derive_key("sidecache 2026 records", secret);
            let mut id = [0; KEY_ID];
            id.copy_from_slice(&blake3::keyed_hash(&secret, b"id").as_bytes()[..KEY_ID]);
            SecretKey { id, secret }
        };
        Keyring { keys: secrets.into_iter().map(key).collect() }
    }

    /// Returns the ID of the secret for new records.
    pub fn current_id(&self) -> [u8; KEY_ID] {
        self.keys.first().map_or([0; KEY_ID], |key| key.id)
    }

    /// Returns the MAC of a record's parts, bound to the Redis key `place`.
    pub fn mac(
        &self,
        id: [u8; KEY_ID],
        salt: &[u8; SALT],
        place: &[u8],
        parts: &[&[u8]],
    ) -> Result<[u8; TAG], AuthenticationError> {
        let mut hasher = blake3::Hasher::new_keyed(&self.derive(id, b"mac", salt)?);
        hasher.update(&(place.len() as u64).to_be_bytes()).update(place);
        for part in parts {
            hasher.update(part);
        }
        let mut tag = [0; TAG];
        tag.copy_from_slice(&hasher.finalize().as_bytes()[..TAG]);
        Ok(tag)
    }

    /// Verifies the MAC of these parts, in constant time.
    pub fn verify(
        &self,
        id: [u8; KEY_ID],
        salt: &[u8; SALT],
        place: &[u8],
        parts: &[&[u8]],
        tag: &[u8],
    ) -> Result<(), AuthenticationError> {
        let expected = self.mac(id, salt, place, parts)?;
        if bool::from(expected.as_slice().ct_eq(tag)) { Ok(()) } else { Err(AuthenticationError) }
    }

    /// Encrypts part number `part` of a record in place; it grows by [`TAG`] bytes. `bound`: the associated data.
    pub fn encrypt(
        &self,
        id: [u8; KEY_ID],
        salt: &[u8; SALT],
        part: u8,
        bound: &[u8],
        data: &mut Vec<u8>,
    ) -> Result<(), AuthenticationError> {
        let key = self.cipher(id, salt)?;
        key.seal_in_place_append_tag(nonce(part), Aad::from(bound), data).map_err(|_| AuthenticationError)
    }

    /// Verifies and decrypts part number `part` of a record. `bound`: the associated data.
    pub fn decrypt(
        &self,
        id: [u8; KEY_ID],
        salt: &[u8; SALT],
        part: u8,
        bound: &[u8],
        sealed: &[u8],
    ) -> Result<Vec<u8>, AuthenticationError> {
        let mut data = sealed.to_vec();
        let key = self.cipher(id, salt)?;
        let length =
            key.open_in_place(nonce(part), Aad::from(bound), &mut data).map_err(|_| AuthenticationError)?.len();
        data.truncate(length);
        Ok(data)
    }

    fn cipher(&self, id: [u8; KEY_ID], salt: &[u8; SALT]) -> Result<LessSafeKey, AuthenticationError> {
        let key = self.derive(id, b"aead", salt)?;
        UnboundKey::new(&AES_256_GCM, &key).map(LessSafeKey::new).map_err(|_| AuthenticationError)
    }

    /// Derives the key for one purpose and one record.
    fn derive(&self, id: [u8; KEY_ID], purpose: &[u8], salt: &[u8; SALT]) -> Result<[u8; 32], AuthenticationError> {
        let key = self.keys.iter().find(|key| key.id == id).ok_or(AuthenticationError)?;
        let mut hasher = blake3::Hasher::new_keyed(&key.secret);
        hasher.update(purpose).update(salt);
        Ok(*hasher.finalize().as_bytes())
    }
}

/// Returns the nonce of a part. Part numbers suffice, because each record has its own key.
fn nonce(part: u8) -> Nonce {
    let mut nonce = [0; 12];
    nonce[11] = part;
    Nonce::assume_unique_for_key(nonce)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_secret_creates_the_mac_and_any_secret_of_the_keyring_verifies() {
        let (old, both, new) =
            (Keyring::new([&b"old"[..]]), Keyring::new([&b"new"[..], b"old"]), Keyring::new([&b"new"[..]]));
        let salt = [7; SALT];
        let tag = old.mac(old.current_id(), &salt, b"place", &[b"a", b"b"]).expect("sealed");
        assert_eq!(both.verify(old.current_id(), &salt, b"place", &[b"a", b"b"], &tag), Ok(()));
        assert_eq!(new.verify(old.current_id(), &salt, b"place", &[b"a", b"b"], &tag), Err(AuthenticationError));
        assert_eq!(both.current_id(), new.current_id());
        for (place, parts, salt) in [
            (&b"elsewhere"[..], [&b"a"[..], b"b"], salt),
            (b"place", [b"a", b"c"], salt),
            (b"place", [b"a", b"b"], [8; SALT]),
        ] {
            assert_eq!(old.verify(old.current_id(), &salt, place, &parts, &tag), Err(AuthenticationError));
        }
    }

    #[test]
    fn ciphertext_decrypts_only_with_the_same_key_name_part_and_secret() {
        let ring = Keyring::new([&b"secret"[..]]);
        let (id, salt) = (ring.current_id(), [7; SALT]);
        let mut data = b"shpat_canary".to_vec();
        ring.encrypt(id, &salt, 0, b"place", &mut data).expect("sealed");
        assert!(!data.windows(6).any(|w| w == b"canary"));
        assert_eq!(ring.decrypt(id, &salt, 0, b"place", &data).as_deref(), Ok(&b"shpat_canary"[..]));
        assert_eq!(ring.decrypt(id, &salt, 1, b"place", &data), Err(AuthenticationError));
        assert_eq!(ring.decrypt(id, &salt, 0, b"other", &data), Err(AuthenticationError));
        assert_eq!(Keyring::new([&b"other"[..]]).decrypt(id, &salt, 0, b"place", &data), Err(AuthenticationError));
        data[3] ^= 1;
        assert_eq!(ring.decrypt(id, &salt, 0, b"place", &data), Err(AuthenticationError));
    }
}
