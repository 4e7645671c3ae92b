//! What lies in Redis: one record per stored answer, in a format of its own that is versioned, bounded and sealed.
//!
//! ```text
//!  0  u8      0xFF: no UTF-8 text begins so
//!  1  u8      version: 1
//!  2  u8      flags: bits 0-1 packing of the body (0 none, 1 LZ4, 2 Zstandard), bit 2 encrypted, bit 3 signpost
//!  3  u8      0
//!  4  [u8;4]  which secret sealed it
//!  8  [u8;16] salt: random, names this very record
//! 24  u32     length of the meta part, as it lies here
//! 28  u32     length of the body part, as it lies here
//! 32  u32     length of the body
//! 36  meta, body, and (unless encrypted) a MAC of 16 bytes
//! ```
//!
//! Numbers are big-endian. Meta is a postcard record (`wire/meta.rs`) that begins with the address, so that a walk needs to
//! read no more. All of it is bound to the key it lies under. Request headers are not in here: those an answer
//! depends on are in the key, as a digest.
//!
//! A *signpost* says that the answers of a URL depend on other request headers than its rule suggests: they lie
//! under keys made with these.

mod meta;

use bytes::Bytes;
use http::StatusCode;
use http::header::{HeaderMap, HeaderName, HeaderValue};
use meta::{Meta, MetaAddress, MetaStart};

use super::pack::Packing;
use super::seal::{Forged, KEY_ID, Ring, SALT, TAG};
use crate::policy::chain::LogId;
use crate::policy::entry::{Entry, Terms};
use crate::policy::tags::UpstreamId;

const MAGIC: u8 = 0xff;
const VERSION: u8 = 1;
/// Bytes before the meta part.
pub const HEAD: usize = 36;
const ENCRYPTED: u8 = 1 << 2;
const SIGNPOST: u8 = 1 << 3;
const MAX_META: usize = 1 << 20;

/// How records are made.
#[derive(Debug, Clone)]
pub struct Sealing {
    /// The secrets.
    pub ring: Ring,
    /// Encrypt, rather than only authenticate.
    pub encrypt: bool,
    /// How bodies are packed …
    pub packing: Packing,
    /// … that are larger than this.
    pub pack_above: u64,
    /// Bodies are not larger than this.
    pub max_body: u64,
}

/// A record that opened.
#[derive(Debug)]
pub enum Record {
    /// An answer.
    Answer(Box<Answer>),
    /// Answers lie under keys made with these request headers.
    Signpost(Vec<HeaderName>),
}

/// A stored answer, as it lies in Redis: what only means something in one process is left out.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    /// Whom it is for.
    pub address: WireAddress,
    /// Status.
    pub status: StatusCode,
    /// Fields as stored.
    pub headers: HeaderMap,
    /// Field names that are not in Title-Case, one a line.
    pub casing: Vec<u8>,
    /// Body.
    pub body: Bytes,
    /// When it came: milliseconds since the epoch, by the clock that the fleet shares.
    pub born: u64,
    /// The last log entry that its fetch had seen.
    pub seen: LogId,
    /// What it may be used for.
    pub terms: Terms,
    /// The request headers it depends on.
    pub vary: Vec<HeaderName>,
    /// Its tags.
    pub tags: Vec<String>,
    /// The rule it came under.
    pub rule: String,
}

/// What a walk needs to know of a record: what begins its meta part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Glimpse {
    /// Whom it is for.
    pub address: WireAddress,
    /// The last log entry that its fetch had seen.
    pub seen: LogId,
}

/// Whom a record is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WireAddress {
    /// The upstream.
    pub upstream: UpstreamId,
    /// The upstream's authority.
    pub authority: String,
    /// Path and query.
    pub target: String,
}

/// Why a record did not open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unreadable {
    /// Of a version that this program does not know, or larger than what it takes: leave it alone.
    NotForUs,
    /// Not a record of ours, broken, or not for this key.
    Forged,
}

impl From<Forged> for Unreadable {
    fn from(_: Forged) -> Unreadable {
        Unreadable::Forged
    }
}

/// A new salt.
pub fn salt() -> [u8; SALT] {
    let mut salt = [0; SALT];
    // Without randomness there is nothing to be done but to go on: the process could not have started.
    let _ = getrandom::fill(&mut salt);
    salt
}

impl Sealing {
    /// The record of an entry that was born at `born` (fleet time), for the key `place`.
    pub fn answer(&self, entry: &Entry, born: u64, seen: LogId, place: &str, salt: [u8; SALT]) -> Option<Vec<u8>> {
        let meta = Meta {
            start: MetaStart {
                address: MetaAddress {
                    upstream: entry.address.upstream.0,
                    authority: &entry.address.authority,
                    target: &entry.address.target,
                },
                seen: (seen.ms, seen.seq),
            },
            status: entry.head.status.as_u16(),
            born,
            terms: entry.terms.into(),
            vary: entry.variant.0.iter().map(|(name, _)| name.as_str()).collect(),
            headers: entry.head.lines().map(|(name, value)| (name.as_str(), value)).collect(),
            casing: entry.head.casing().map_or(&[], |casing| &casing.names),
            tags: entry.tags.iter().map(String::as_str).collect(),
            rule: &entry.rule,
        };
        let meta = postcard::to_allocvec(&meta).ok()?;
        let packed = (entry.body.len() as u64 > self.pack_above).then(|| self.packing.pack(&entry.body)).flatten();
        let flags = if packed.is_some() { self.packing.number() } else { 0 };
        let body = packed.as_deref().unwrap_or(&entry.body);
        self.seal(flags, meta, body, entry.body.len(), place, salt)
    }

    /// A signpost for the key `place`.
    pub fn signpost(&self, vary: &[HeaderName], place: &str, salt: [u8; SALT]) -> Option<Vec<u8>> {
        let names: Vec<&str> = vary.iter().map(HeaderName::as_str).collect();
        let meta = postcard::to_allocvec(&names).ok()?;
        self.seal(SIGNPOST, meta, &[], 0, place, salt)
    }

    /// No record that this program takes is longer, in bytes.
    pub fn longest(&self) -> usize {
        HEAD + MAX_META + 2 * TAG + usize::try_from(self.max_body).unwrap_or(usize::MAX / 2)
    }

    fn seal(
        &self,
        flags: u8,
        mut meta: Vec<u8>,
        body: &[u8],
        size: usize,
        place: &str,
        salt: [u8; SALT],
    ) -> Option<Vec<u8>> {
        let (id, growth) = (self.ring.first(), if self.encrypt { TAG } else { 0 });
        let mut record = Vec::with_capacity(HEAD + meta.len() + body.len() + 2 * TAG);
        record.extend_from_slice(&[MAGIC, VERSION, flags | if self.encrypt { ENCRYPTED } else { 0 }, 0]);
        record.extend_from_slice(&id);
        record.extend_from_slice(&salt);
        for length in [meta.len() + growth, body.len() + growth, size] {
            record.extend_from_slice(&u32::try_from(length).ok()?.to_be_bytes());
        }
        if self.encrypt {
            let bound = bound(&record, place);
            let mut body = body.to_vec();
            self.ring.encrypt(id, &salt, 0, &bound, &mut meta).ok()?;
            self.ring.encrypt(id, &salt, 1, &bound, &mut body).ok()?;
            record.extend_from_slice(&meta);
            record.extend_from_slice(&body);
        } else {
            record.extend_from_slice(&meta);
            record.extend_from_slice(body);
            let tag = self.ring.mac(id, &salt, place.as_bytes(), &[&record]).ok()?;
            record.extend_from_slice(&tag);
        }
        Some(record)
    }

    /// Opens what lay under the key `place`.
    pub fn open(&self, record: &[u8], place: &str) -> Result<Record, Unreadable> {
        let head = Head::read(record)?;
        let parts = record.get(HEAD..).ok_or(Unreadable::Forged)?;
        if head.size as u64 > self.max_body {
            return Err(Unreadable::NotForUs);
        }
        let (meta, rest) = parts.split_at_checked(head.meta).ok_or(Unreadable::Forged)?;
        let (body, tag) = rest.split_at_checked(head.body).ok_or(Unreadable::Forged)?;
        if head.encrypted() {
            let bound = bound(&record[..HEAD], place);
            if !tag.is_empty() {
                return Err(Unreadable::Forged);
            }
            let meta = self.ring.decrypt(head.id, &head.salt, 0, &bound, meta)?;
            let body = self.ring.decrypt(head.id, &head.salt, 1, &bound, body)?;
            return read(&head, &meta, &body);
        }
        // Where encryption is asked for, what anyone could have written in the clear does not count.
        if self.encrypt {
            return Err(Unreadable::Forged);
        }
        let sealed = &record[..record.len() - tag.len()];
        self.ring.verify(head.id, &head.salt, place.as_bytes(), &[sealed], tag)?;
        read(&head, meta, body)
    }

    /// What the first bytes of what lay under the key `place` say, for walks: not verified unless encrypted. None: it
    /// is no answer, or more bytes are needed than these ([`meta_end`]).
    pub fn glimpse(&self, record: &[u8], place: &str) -> Option<Glimpse> {
        let head = Head::read(record).ok().filter(|head| head.flags & SIGNPOST == 0)?;
        let meta = record.get(HEAD..)?;
        let read = |meta: &[u8]| {
            let (MetaStart { address, seen }, _) = postcard::take_from_bytes::<MetaStart<'_>>(meta).ok()?;
            Some(Glimpse { address: address.into(), seen: LogId { ms: seen.0, seq: seen.1 } })
        };
        if !head.encrypted() {
            return read(meta);
        }
        let bound = bound(&record[..HEAD], place);
        read(&self.ring.decrypt(head.id, &head.salt, 0, &bound, meta.get(..head.meta)?).ok()?)
    }
}

/// Where the meta part of a record ends, from its first bytes.
pub fn meta_end(record: &[u8]) -> Option<usize> {
    Head::read(record).ok().map(|head| HEAD + head.meta)
}

/// What encryption binds both parts to: the head, and the key the record lies under.
fn bound(head: &[u8], place: &str) -> Vec<u8> {
    [head, place.as_bytes()].concat()
}

/// The first 36 bytes.
struct Head {
    flags: u8,
    id: [u8; KEY_ID],
    salt: [u8; SALT],
    meta: usize,
    body: usize,
    size: usize,
}

impl Head {
    fn read(record: &[u8]) -> Result<Head, Unreadable> {
        let head = record.first_chunk::<HEAD>().ok_or(Unreadable::Forged)?;
        if head[0] != MAGIC {
            return Err(Unreadable::Forged);
        }
        if head[1] != VERSION {
            return Err(Unreadable::NotForUs);
        }
        let number = |at: usize| {
            let mut bytes = [0; 4];
            bytes.copy_from_slice(&head[at..at + 4]);
            usize::try_from(u32::from_be_bytes(bytes)).unwrap_or(usize::MAX)
        };
        let (mut id, mut salt) = ([0; KEY_ID], [0; SALT]);
        id.copy_from_slice(&head[4..8]);
        salt.copy_from_slice(&head[8..24]);
        let read = Head { flags: head[2], id, salt, meta: number(24), body: number(28), size: number(32) };
        if read.meta > MAX_META || head[3] != 0 || read.flags & 0xf0 != 0 {
            return Err(Unreadable::Forged);
        }
        Ok(read)
    }

    fn encrypted(&self) -> bool {
        self.flags & ENCRYPTED != 0
    }
}

/// What opened, in our types. A value that these don't take was not written by us.
fn read(head: &Head, meta: &[u8], body: &[u8]) -> Result<Record, Unreadable> {
    let names = |names: Vec<&str>| -> Option<Vec<HeaderName>> {
        names.into_iter().map(|name| HeaderName::from_bytes(name.as_bytes()).ok()).collect()
    };
    if head.flags & SIGNPOST != 0 {
        let vary: Vec<&str> = postcard::from_bytes(meta).map_err(|_| Unreadable::Forged)?;
        return names(vary).map(Record::Signpost).ok_or(Unreadable::Forged);
    }
    let meta: Meta<'_> = postcard::from_bytes(meta).map_err(|_| Unreadable::Forged)?;
    let packing = Packing::from_number(head.flags & 3).ok_or(Unreadable::Forged)?;
    let body = match packing {
        Packing::None if body.len() == head.size => Bytes::copy_from_slice(body),
        Packing::None => return Err(Unreadable::Forged),
        Packing::Lz4 | Packing::Zstd => packing.unpack(body, head.size).map(Bytes::from).ok_or(Unreadable::Forged)?,
    };
    let mut headers = HeaderMap::with_capacity(meta.headers.len());
    for (name, value) in meta.headers {
        let name = HeaderName::from_bytes(name.as_bytes()).map_err(|_| Unreadable::Forged)?;
        headers.append(name, HeaderValue::from_bytes(value).map_err(|_| Unreadable::Forged)?);
    }
    Ok(Record::Answer(Box::new(Answer {
        address: meta.start.address.into(),
        status: StatusCode::from_u16(meta.status).map_err(|_| Unreadable::Forged)?,
        headers,
        casing: meta.casing.to_vec(),
        body,
        born: meta.born,
        seen: LogId { ms: meta.start.seen.0, seq: meta.start.seen.1 },
        terms: meta.terms.into(),
        vary: names(meta.vary).ok_or(Unreadable::Forged)?,
        tags: meta.tags.into_iter().map(str::to_owned).collect(),
        rule: meta.rule.to_owned(),
    })))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Tick;
    use crate::policy::entry::About;
    use crate::policy::head::Head as EntryHead;
    use crate::policy::invalidation::{Address, Position};
    use crate::policy::key::KeyName;
    use crate::policy::variant::Variant;
    use proptest::prelude::*;

    const SALT_OF_TESTS: [u8; SALT] = *b"salt of the test";
    const PLACE: &str = "sidecache:1:s:00";
    const SEEN: LogId = LogId { ms: 1_763_700_000_000, seq: 3 };

    fn sealing(encrypt: bool, packing: Packing) -> Sealing {
        let ring = Ring::new([&b"a secret for tests"[..]]);
        Sealing { ring, encrypt, packing, pack_above: 100, max_body: 1 << 20 }
    }

    fn entry(lines: &[(&str, &str)], body: &[u8], tags: &[&str]) -> Entry {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            let name = HeaderName::from_bytes(name.as_bytes()).expect("a name");
            headers.append(name, HeaderValue::from_str(value).expect("a value"));
        }
        let head = EntryHead::new(StatusCode::OK, &headers, None, Vec::new());
        let address = Address {
            upstream: UpstreamId(7),
            authority: "shop.example".into(),
            target: "/products/7?x=1".into(),
            subjects: Box::default(),
        };
        let tags = tags.iter().map(|&tag| tag.to_owned()).collect();
        let about = About { key_name: KeyName::default(), tags, rule: "product".into() };
        let variant = Variant([(http::header::ACCEPT_ENCODING, [HeaderValue::from_static("gzip")].into())].into());
        let terms = Terms { initial_age: 1, fresh_for: -2, if_error: 3, always_validate: true, ..Terms::default() };
        let body = Bytes::copy_from_slice(body);
        Entry::new(head, body, variant, Tick(0), terms, address, Position(1), about)
    }

    fn answer(sealing: &Sealing, record: &[u8]) -> Answer {
        match sealing.open(record, PLACE) {
            Ok(Record::Answer(answer)) => *answer,
            other => panic!("{other:?}"),
        }
    }

    /// What lies in a Redis today must be readable tomorrow: these bytes don't change. A new format is a new version.
    #[test]
    fn the_format_is_the_one_on_file() {
        let entry = entry(&[("etag", "\"1\""), ("x-twice", "1"), ("x-twice", "2")], b"body", &["product:7"]);
        let record = sealing(false, Packing::Lz4).answer(&entry, 1_763_700_000_123, SEEN, PLACE, SALT_OF_TESTS);
        let record = record.expect("a record");
        let golden = include_bytes!("../../tests/golden/record-v1.bin");
        assert_eq!(record, golden, "write it to tests/golden/record-v1.bin only if no release has been made with it");
        let read = answer(&sealing(false, Packing::None), golden);
        assert_eq!((read.status, read.born, read.seen), (StatusCode::OK, 1_763_700_000_123, SEEN));
        assert_eq!(read.headers.get_all("x-twice").iter().collect::<Vec<_>>(), ["1", "2"]);
        assert_eq!((&read.body[..], read.terms, read.rule.as_str()), (&b"body"[..], entry.terms, "product"));
        assert_eq!((read.vary, read.tags), (vec![http::header::ACCEPT_ENCODING], vec!["product:7".to_owned()]));
        assert_eq!((read.address.upstream, read.address.target.as_str()), (UpstreamId(7), "/products/7?x=1"));
    }

    #[test]
    fn another_version_is_left_alone_and_a_signpost_points() {
        let sealing = sealing(false, Packing::None);
        let mut record = sealing.answer(&entry(&[], b"", &[]), 1, SEEN, PLACE, salt()).expect("a record");
        record[1] = 2;
        assert!(matches!(sealing.open(&record, PLACE), Err(Unreadable::NotForUs)));
        let post = sealing.signpost(&[http::header::ACCEPT], PLACE, salt()).expect("a record");
        assert!(matches!(sealing.open(&post, PLACE), Ok(Record::Signpost(names)) if names == [http::header::ACCEPT]));
        assert!(sealing.glimpse(&post, PLACE).is_none());
    }

    #[test]
    fn a_walk_sees_whose_a_record_is_from_its_first_bytes() {
        for encrypt in [false, true] {
            let sealing = sealing(encrypt, Packing::None);
            let record = sealing.answer(&entry(&[], &[b'x'; 5000], &[]), 1, SEEN, PLACE, salt()).expect("a record");
            let end = meta_end(&record).expect("a record");
            let glimpse = sealing.glimpse(&record[..end], PLACE).expect("enough");
            assert_eq!((glimpse.address.target.as_str(), glimpse.seen), ("/products/7?x=1", SEEN));
            assert!(sealing.glimpse(&record[..50], PLACE).is_none(), "not enough");
        }
    }

    #[test]
    fn what_is_in_the_clear_does_not_count_where_encryption_is_asked_for() {
        let clear = sealing(false, Packing::None).answer(&entry(&[], b"x", &[]), 1, SEEN, PLACE, salt());
        assert!(sealing(true, Packing::None).open(&clear.expect("a record"), PLACE).is_err());
    }

    proptest! {
        /// Whatever is stored comes back; whatever is changed, cut, or lies elsewhere does not open.
        #[test]
        fn a_record_comes_back_as_it_was_or_not_at_all(
            body in proptest::collection::vec(0u8..4, 0..2000),
            value in "[ -~]{0,40}",
            encrypt in any::<bool>(),
            packing in 0u8..3,
            at in any::<prop::sample::Index>(),
            bit in 0u8..8,
        ) {
            let sealing = sealing(encrypt, Packing::from_number(packing).expect("a packing"));
            let entry = entry(&[("x-value", value.trim()), ("etag", "\"1\"")], &body, &["a", "b"]);
            let record = sealing.answer(&entry, 9, SEEN, PLACE, salt()).expect("a record");
            let read = answer(&sealing, &record);
            prop_assert_eq!(&read.body[..], &body[..]);
            prop_assert_eq!(read.headers.iter().map(|(n, v)| (n, v.as_bytes())).collect::<Vec<_>>(), entry.head.lines().collect::<Vec<_>>());
            let mut changed = record.clone();
            changed[at.index(record.len())] ^= 1 << bit;
            prop_assert!(sealing.open(&changed, PLACE).is_err());
            prop_assert!(sealing.open(&record[..at.index(record.len())], PLACE).is_err());
            prop_assert!(sealing.open(&record, "sidecache:1:s:01").is_err());
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), version in any::<bool>()) {
            let mut bytes = bytes;
            if version && bytes.len() > 2 {
                (bytes[0], bytes[1]) = (MAGIC, VERSION);
            }
            for encrypt in [false, true] {
                let sealing = sealing(encrypt, Packing::Lz4);
                prop_assert!(sealing.open(&bytes, PLACE).is_err());
                let _ = sealing.glimpse(&bytes, PLACE);
            }
        }
    }
}
