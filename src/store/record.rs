//! The Redis record format: one versioned, bounded and authenticated record per stored response.
//!
//! ```text
//!  0  u8      0xFF: never the first byte of UTF-8 text
//!  1  u8      version: 1
//!  2  u8      flags: bits 0-1 body compression (0 none, 1 LZ4, 2 Zstandard), bit 2 encrypted, bit 3 vary marker
//!  3  u8      0
//!  4  [u8;4]  ID of the secret that authenticates or encrypts it
//!  8  [u8;16] salt: random, unique to this record
//! 24  u32     length of the meta part, as stored
//! 28  u32     length of the body part, as stored
//! 32  u32     length of the body when decompressed
//! 36  meta, body, and (unless encrypted) a MAC of 16 bytes
//! ```
//!
//! Numbers are big-endian. Meta is a postcard record (`record/meta.rs`) that begins with the address, so that a scan
//! needs to read no more. The whole record is bound to its Redis key. Values of request headers are not stored: those
//! that a response varies by are in the key, as a digest.
//!
//! A *vary marker* names the request headers that the responses of a URL vary by, where its rule suggests others: the
//! responses are stored under keys made with these.

mod meta;

use bytes::Bytes;
use http::StatusCode;
use http::header::{HeaderMap, HeaderName, HeaderValue};
use meta::{Meta, MetaAddress, MetaStart};

use super::authentication::{AuthenticationError, KEY_ID, Keyring, SALT, TAG};
use super::compression::Compression;
use crate::policy::entry::{Entry, Lifetimes};
use crate::policy::invalidation::log_position::LogId;
use crate::policy::invalidation::tag::UpstreamId;

const MAGIC: u8 = 0xff;
const VERSION: u8 = 1;
/// Size of the fixed header before the meta part, in bytes.
pub const HEADER_BYTES: usize = 36;
const ENCRYPTED: u8 = 1 << 2;
const VARY_MARKER: u8 = 1 << 3;
const MAX_META: usize = 1 << 20;

/// Encodes and decodes records.
#[derive(Debug, Clone)]
pub struct RecordCodec {
    /// Secrets for authentication and encryption.
    pub keyring: Keyring,
    /// Whether to encrypt, rather than only authenticate.
    pub encrypt: bool,
    /// Compression of bodies larger than `compress_above`.
    pub compression: Compression,
    /// Size of the largest body that is not compressed, in bytes.
    pub compress_above: u64,
    /// Maximum size of a body, in bytes.
    pub max_body: u64,
}

/// A decoded record.
#[derive(Debug)]
pub enum Record {
    /// A stored response.
    Response(Box<StoredResponse>),
    /// Responses are stored under keys made with these request headers.
    VaryMarker(Vec<HeaderName>),
}

/// A stored response as kept in Redis, without what is only meaningful within one process.
#[derive(Debug, PartialEq, Eq)]
pub struct StoredResponse {
    /// The resource that it is a response for.
    pub address: RecordAddress,
    /// Status code.
    pub status: StatusCode,
    /// Header fields, as stored.
    pub headers: HeaderMap,
    /// Field names that are not in Title-Case, one per line.
    pub header_case: Vec<u8>,
    /// Body.
    pub body: Bytes,
    /// When it was received: milliseconds since the Unix epoch, by the fleet clock.
    pub received_at: u64,
    /// The last log entry that its fetch had seen.
    pub seen: LogId,
    /// Freshness lifetime and stale windows.
    pub lifetimes: Lifetimes,
    /// The request headers that it varies by.
    pub vary: Vec<HeaderName>,
    /// Its tags.
    pub tags: Vec<String>,
    /// The name of the rule that applied to it.
    pub rule: String,
}

/// The beginning of a record's meta part, which is all that a scan needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordHeader {
    /// The resource that it is a response for.
    pub address: RecordAddress,
    /// The last log entry that its fetch had seen.
    pub seen: LogId,
}

/// The resource of a record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordAddress {
    /// The upstream.
    pub upstream: UpstreamId,
    /// The upstream's authority.
    pub authority: String,
    /// Path and query.
    pub target: String,
}

/// The reason why a record was not decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RecordError {
    /// The version is unknown, or the body larger than the configured maximum. The record must be left alone.
    NotForUs,
    /// Not a record, corrupt, not authenticated by a known secret, or stored under another key.
    Forged,
}

impl From<AuthenticationError> for RecordError {
    fn from(_: AuthenticationError) -> RecordError {
        RecordError::Forged
    }
}

/// Returns a new random salt.
pub fn random_salt() -> [u8; SALT] {
    let mut salt = [0; SALT];
    // Errors are ignored: without a source of randomness the process could not have started.
    let _ = getrandom::fill(&mut salt);
    salt
}

/// The body of a record as it is stored, and its size before compression, in bytes.
struct RecordBody<'b> {
    stored: &'b [u8],
    size: usize,
}

impl RecordCodec {
    /// Encodes an entry received at `received_at` (milliseconds of fleet time), for the Redis key `place`. Returns `None` if it is too large.
    pub fn encode_response(
        &self,
        entry: &Entry,
        received_at: u64,
        seen: LogId,
        redis_key: &str,
        salt: [u8; SALT],
    ) -> Option<Vec<u8>> {
        let meta = Meta {
            start: MetaStart {
                address: MetaAddress {
                    upstream: entry.resource.upstream.0,
                    authority: &entry.resource.authority,
                    target: &entry.resource.target,
                },
                seen: (seen.ms, seen.seq),
            },
            status: entry.head.status.as_u16(),
            received_at,
            lifetimes: entry.lifetimes,
            vary: entry.variant.0.iter().map(|(name, _)| name.as_str()).collect(),
            headers: entry.head.lines().map(|(name, value)| (name.as_str(), value)).collect(),
            header_case: entry.head.header_case().map_or(&[], |header_case| &header_case.names),
            tags: entry.tags.iter().map(String::as_str).collect(),
            rule: &entry.rule,
        };
        let meta = postcard::to_allocvec(&meta).ok()?;
        let packed =
            (entry.body.len() as u64 > self.compress_above).then(|| self.compression.compress(&entry.body)).flatten();
        let flags = if packed.is_some() { self.compression.number() } else { 0 };
        let body = &RecordBody { stored: packed.as_deref().unwrap_or(&entry.body), size: entry.body.len() };
        self.encode(flags, meta, body, redis_key, salt)
    }

    /// Encodes a vary marker for the Redis key `place`.
    pub fn encode_vary_marker(&self, vary: &[HeaderName], redis_key: &str, salt: [u8; SALT]) -> Option<Vec<u8>> {
        let names: Vec<&str> = vary.iter().map(HeaderName::as_str).collect();
        let meta = postcard::to_allocvec(&names).ok()?;
        self.encode(VARY_MARKER, meta, &RecordBody { stored: &[], size: 0 }, redis_key, salt)
    }

    /// Returns the maximum size of a record, in bytes.
    pub fn max_record_bytes(&self) -> usize {
        HEADER_BYTES + MAX_META + 2 * TAG + usize::try_from(self.max_body).unwrap_or(usize::MAX / 2)
    }

    fn encode(
        &self,
        flags: u8,
        mut meta: Vec<u8>,
        body: &RecordBody<'_>,
        redis_key: &str,
        salt: [u8; SALT],
    ) -> Option<Vec<u8>> {
        let &RecordBody { stored: body, size } = body;
        let (id, growth) = (self.keyring.current_id(), if self.encrypt { TAG } else { 0 });
        let mut record = Vec::with_capacity(HEADER_BYTES + meta.len() + body.len() + 2 * TAG);
        record.extend_from_slice(&[MAGIC, VERSION, flags | if self.encrypt { ENCRYPTED } else { 0 }, 0]);
        record.extend_from_slice(&id);
        record.extend_from_slice(&salt);
        for length in [meta.len() + growth, body.len() + growth, size] {
            record.extend_from_slice(&u32::try_from(length).ok()?.to_be_bytes());
        }
        if self.encrypt {
            let aad = associated_data(&record, redis_key);
            let mut body = body.to_vec();
            self.keyring.encrypt(id, &salt, 0, &aad, &mut meta).ok()?;
            self.keyring.encrypt(id, &salt, 1, &aad, &mut body).ok()?;
            record.extend_from_slice(&meta);
            record.extend_from_slice(&body);
        } else {
            record.extend_from_slice(&meta);
            record.extend_from_slice(body);
            let tag = self.keyring.mac(id, &salt, redis_key.as_bytes(), &[&record]).ok()?;
            record.extend_from_slice(&tag);
        }
        Some(record)
    }

    /// Verifies and decodes a record that was read from the Redis key `place`.
    pub fn decode(&self, record: &[u8], redis_key: &str) -> Result<Record, RecordError> {
        let head = FixedHeader::read(record)?;
        let parts = record.get(HEADER_BYTES..).ok_or(RecordError::Forged)?;
        if head.size as u64 > self.max_body {
            return Err(RecordError::NotForUs);
        }
        let (meta, rest) = parts.split_at_checked(head.meta).ok_or(RecordError::Forged)?;
        let (body, tag) = rest.split_at_checked(head.body).ok_or(RecordError::Forged)?;
        if head.encrypted() {
            let aad = associated_data(&record[..HEADER_BYTES], redis_key);
            if !tag.is_empty() {
                return Err(RecordError::Forged);
            }
            let meta = self.keyring.decrypt(head.id, &head.salt, 0, &aad, meta)?;
            let body = self.keyring.decrypt(head.id, &head.salt, 1, &aad, body)?;
            return read(&head, &meta, &body);
        }
        // With encryption configured, an unencrypted record is not accepted.
        if self.encrypt {
            return Err(RecordError::Forged);
        }
        let sealed = &record[..record.len() - tag.len()];
        self.keyring.verify(head.id, &head.salt, redis_key.as_bytes(), &[sealed], tag)?;
        read(&head, meta, body)
    }

    /// Reads the address from the first bytes of a record under the Redis key `place`, for scans. It is not verified
    /// unless encrypted. Returns `None` if the record is no response, or needs more bytes than these ([`meta_end`]).
    pub fn read_header(&self, record: &[u8], redis_key: &str) -> Option<RecordHeader> {
        let head = FixedHeader::read(record).ok().filter(|head| head.flags & VARY_MARKER == 0)?;
        let meta = record.get(HEADER_BYTES..)?;
        let read = |meta: &[u8]| {
            let (MetaStart { address, seen }, _) = postcard::take_from_bytes::<MetaStart<'_>>(meta).ok()?;
            Some(RecordHeader { address: address.into(), seen: LogId { ms: seen.0, seq: seen.1 } })
        };
        if !head.encrypted() {
            return read(meta);
        }
        let aad = associated_data(&record[..HEADER_BYTES], redis_key);
        read(&self.keyring.decrypt(head.id, &head.salt, 0, &aad, meta.get(..head.meta)?).ok()?)
    }
}

/// Returns the length of a record, from its first bytes. 0 if they are no record.
pub fn record_length(record: &[u8]) -> usize {
    FixedHeader::read(record)
        .map_or(0, |head| HEADER_BYTES + head.meta + head.body + if head.encrypted() { 0 } else { TAG })
}

/// Returns the offset of the end of the meta part, from the first bytes of a record.
pub fn meta_end(record: &[u8]) -> Option<usize> {
    FixedHeader::read(record).ok().map(|head| HEADER_BYTES + head.meta)
}

/// Returns the associated data of both encrypted parts: the fixed header and the Redis key.
fn associated_data(head: &[u8], redis_key: &str) -> Vec<u8> {
    [head, redis_key.as_bytes()].concat()
}

/// The fixed header: the first 36 bytes.
struct FixedHeader {
    flags: u8,
    id: [u8; KEY_ID],
    salt: [u8; SALT],
    meta: usize,
    body: usize,
    size: usize,
}

impl FixedHeader {
    fn read(record: &[u8]) -> Result<FixedHeader, RecordError> {
        let head = record.first_chunk::<HEADER_BYTES>().ok_or(RecordError::Forged)?;
        if head[0] != MAGIC {
            return Err(RecordError::Forged);
        }
        if head[1] != VERSION {
            return Err(RecordError::NotForUs);
        }
        let number = |at: usize| {
            let mut bytes = [0; 4];
            bytes.copy_from_slice(&head[at..at + 4]);
            usize::try_from(u32::from_be_bytes(bytes)).unwrap_or(usize::MAX)
        };
        let (mut id, mut salt) = ([0; KEY_ID], [0; SALT]);
        id.copy_from_slice(&head[4..8]);
        salt.copy_from_slice(&head[8..24]);
        let read = FixedHeader { flags: head[2], id, salt, meta: number(24), body: number(28), size: number(32) };
        if read.meta > MAX_META || head[3] != 0 || read.flags & 0xf0 != 0 {
            return Err(RecordError::Forged);
        }
        Ok(read)
    }

    fn encrypted(&self) -> bool {
        self.flags & ENCRYPTED != 0
    }
}

/// Converts the verified parts to a record. An invalid value is an error: this program does not write such records.
fn read(head: &FixedHeader, meta: &[u8], body: &[u8]) -> Result<Record, RecordError> {
    let names = |names: Vec<&str>| -> Option<Vec<HeaderName>> {
        names.into_iter().map(|name| HeaderName::from_bytes(name.as_bytes()).ok()).collect()
    };
    if head.flags & VARY_MARKER != 0 {
        let vary: Vec<&str> = postcard::from_bytes(meta).map_err(|_| RecordError::Forged)?;
        return names(vary).map(Record::VaryMarker).ok_or(RecordError::Forged);
    }
    let meta: Meta<'_> = postcard::from_bytes(meta).map_err(|_| RecordError::Forged)?;
    let packing = Compression::from_number(head.flags & 3).ok_or(RecordError::Forged)?;
    let body = match packing {
        Compression::None if body.len() == head.size => Bytes::copy_from_slice(body),
        Compression::None => return Err(RecordError::Forged),
        Compression::Lz4 | Compression::Zstd => {
            packing.decompress(body, head.size).map(Bytes::from).ok_or(RecordError::Forged)?
        }
    };
    let mut headers = HeaderMap::with_capacity(meta.headers.len());
    for (name, value) in meta.headers {
        let name = HeaderName::from_bytes(name.as_bytes()).map_err(|_| RecordError::Forged)?;
        headers.append(name, HeaderValue::from_bytes(value).map_err(|_| RecordError::Forged)?);
    }
    Ok(Record::Response(Box::new(StoredResponse {
        address: meta.start.address.into(),
        status: StatusCode::from_u16(meta.status).map_err(|_| RecordError::Forged)?,
        headers,
        header_case: meta.header_case.to_vec(),
        body,
        received_at: meta.received_at,
        seen: LogId { ms: meta.start.seen.0, seq: meta.start.seen.1 },
        lifetimes: meta.lifetimes,
        vary: names(meta.vary).ok_or(RecordError::Forged)?,
        tags: meta.tags.into_iter().map(str::to_owned).collect(),
        rule: meta.rule.to_owned(),
    })))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::entry::testing;
    use crate::policy::http::vary::Variant;
    use crate::policy::invalidation::ledger::Position;
    use crate::policy::packed_head::PackedHead as EntryHead;
    use proptest::prelude::*;

    const SALT_OF_TESTS: [u8; SALT] = *b"salt of the test";
    const PLACE: &str = "sidecache:1:s:00";
    const SEEN: LogId = LogId { ms: 1_763_700_000_000, seq: 3 };

    fn codec(encrypt: bool, packing: Compression) -> RecordCodec {
        let ring = Keyring::new([&b"a secret for tests"[..]]);
        RecordCodec { keyring: ring, encrypt, compression: packing, compress_above: 100, max_body: 1 << 20 }
    }

    fn entry(lines: &[(&str, &str)], body: &[u8], tags: &[&str]) -> Entry {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            let name = HeaderName::from_bytes(name.as_bytes()).expect("a name");
            headers.append(name, HeaderValue::from_str(value).expect("a value"));
        }
        let lifetimes =
            Lifetimes { initial_age: 1, fresh_for: -2, if_error: 3, always_validate: true, ..Lifetimes::default() };
        let mut entry = testing::entry(lifetimes);
        entry.body = Bytes::copy_from_slice(body);
        entry.head = EntryHead::new(StatusCode::OK, &headers, None, Vec::new());
        entry.resource.upstream = UpstreamId(7);
        entry.resource.authority = "shop.example".into();
        entry.resource.target = "/products/7?x=1".into();
        entry.tags = tags.iter().map(|&tag| tag.to_owned()).collect();
        entry.rule = "product".into();
        let codings = [HeaderValue::from_static("gzip")];
        entry.variant = Variant([(http::header::ACCEPT_ENCODING, codings.into())].into());
        entry.position = Position(1);
        entry
    }

    fn encode_response(codec: &RecordCodec, record: &[u8]) -> StoredResponse {
        match codec.decode(record, PLACE) {
            Ok(Record::Response(answer)) => *answer,
            other => panic!("{other:?}"),
        }
    }

    /// The format must not change, because later releases read existing records. A new format needs a new version.
    #[test]
    fn record_format_matches_the_golden_file() {
        let entry = entry(&[("etag", "\"1\""), ("x-twice", "1"), ("x-twice", "2")], b"body", &["product:7"]);
        let record =
            codec(false, Compression::Lz4).encode_response(&entry, 1_763_700_000_123, SEEN, PLACE, SALT_OF_TESTS);
        let record = record.expect("a record");
        let golden = include_bytes!("../../tests/golden/record-v1.bin");
        assert_eq!(record, golden, "write it to tests/golden/record-v1.bin only if no release has been made with it");
        let read = encode_response(&codec(false, Compression::None), golden);
        assert_eq!((read.status, read.received_at, read.seen), (StatusCode::OK, 1_763_700_000_123, SEEN));
        assert_eq!(read.headers.get_all("x-twice").iter().collect::<Vec<_>>(), ["1", "2"]);
        assert_eq!((&read.body[..], read.lifetimes, read.rule.as_str()), (&b"body"[..], entry.lifetimes, "product"));
        assert_eq!((read.vary, read.tags), (vec![http::header::ACCEPT_ENCODING], vec!["product:7".to_owned()]));
        assert_eq!((read.address.upstream, read.address.target.as_str()), (UpstreamId(7), "/products/7?x=1"));
    }

    #[test]
    fn record_of_another_version_is_refused_and_vary_marker_round_trips() {
        let codec = codec(false, Compression::None);
        let mut record =
            codec.encode_response(&entry(&[], b"", &[]), 1, SEEN, PLACE, random_salt()).expect("a record");
        record[1] = 2;
        assert!(matches!(codec.decode(&record, PLACE), Err(RecordError::NotForUs)));
        let post = codec.encode_vary_marker(&[http::header::ACCEPT], PLACE, random_salt()).expect("a record");
        assert!(
            matches!(codec.decode(&post, PLACE), Ok(Record::VaryMarker(names)) if names == [http::header::ACCEPT])
        );
        assert!(codec.read_header(&post, PLACE).is_none());
    }

    #[test]
    fn record_header_is_readable_from_the_first_bytes_of_a_record() {
        for encrypt in [false, true] {
            let codec = codec(encrypt, Compression::None);
            let record = codec
                .encode_response(&entry(&[], &[b'x'; 5000], &[]), 1, SEEN, PLACE, random_salt())
                .expect("a record");
            let end = meta_end(&record).expect("a record");
            let glimpse = codec.read_header(&record[..end], PLACE).expect("enough");
            assert_eq!((glimpse.address.target.as_str(), glimpse.seen), ("/products/7?x=1", SEEN));
            assert!(codec.read_header(&record[..50], PLACE).is_none(), "not enough");
        }
    }

    #[test]
    fn unencrypted_record_is_rejected_if_encryption_is_required() {
        let clear =
            codec(false, Compression::None).encode_response(&entry(&[], b"x", &[]), 1, SEEN, PLACE, random_salt());
        assert!(codec(true, Compression::None).decode(&clear.expect("a record"), PLACE).is_err());
    }

    proptest! {
        /// A record decodes to what was encoded; one that is changed, truncated, or under another key does not decode.
        #[test]
        fn record_round_trips_and_changed_or_truncated_ones_are_rejected(
            body in proptest::collection::vec(0u8..4, 0..2000),
            value in "[ -~]{0,40}",
            encrypt in any::<bool>(),
            packing in 0u8..3,
            at in any::<prop::sample::Index>(),
            bit in 0u8..8,
        ) {
            let codec = codec(encrypt, Compression::from_number(packing).expect("a packing"));
            let entry = entry(&[("x-value", value.trim()), ("etag", "\"1\"")], &body, &["a", "b"]);
            let record = codec.encode_response(&entry, 9, SEEN, PLACE, random_salt()).expect("a record");
            let read = encode_response(&codec, &record);
            prop_assert_eq!(&read.body[..], &body[..]);
            prop_assert_eq!(read.headers.iter().map(|(n, v)| (n, v.as_bytes())).collect::<Vec<_>>(), entry.head.lines().collect::<Vec<_>>());
            let mut changed = record.clone();
            changed[at.index(record.len())] ^= 1 << bit;
            prop_assert!(codec.decode(&changed, PLACE).is_err());
            prop_assert!(codec.decode(&record[..at.index(record.len())], PLACE).is_err());
            prop_assert!(codec.decode(&record, "sidecache:1:s:01").is_err());
        }

        #[test]
        fn random_bytes_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300), version in any::<bool>()) {
            let mut bytes = bytes;
            if version && bytes.len() > 2 {
                (bytes[0], bytes[1]) = (MAGIC, VERSION);
            }
            for encrypt in [false, true] {
                let codec = codec(encrypt, Compression::Lz4);
                prop_assert!(codec.decode(&bytes, PLACE).is_err());
                let _ = codec.read_header(&bytes, PLACE);
            }
        }
    }
}
