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
//! Numbers are big-endian. Meta is a postcard record ([`Meta`]) that begins with the address, so that a walk needs to
//! read no more. All of it is bound to the key it lies under. Request headers are not in here: those an answer
//! depends on are in the key, as a digest.
//!
//! A *signpost* says that the answers of a URL depend on other request headers than its rule suggests: they lie
//! under keys made with these.

use bytes::Bytes;
use http::StatusCode;
use http::header::{HeaderMap, HeaderName, HeaderValue};
use serde::{Deserialize, Serialize};

use super::pack::Packing;
use super::seal::{Forged, KEY_ID, Ring, SALT, TAG};
use crate::policy::chain::LogId;
use crate::policy::entry::{Entry, Terms};
use crate::policy::headers::without_room;
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

/// What a walk needs to know of a record.
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
    /// Of a version that this program does not know: leave it alone.
    OtherVersion,
    /// Not a record of ours, broken, or not for this key.
    Forged,
}

impl From<Forged> for Unreadable {
    fn from(_: Forged) -> Unreadable {
        Unreadable::Forged
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct MetaAddress<'a> {
    upstream: u64,
    authority: &'a str,
    target: &'a str,
}

#[derive(Debug, Serialize, Deserialize)]
struct MetaTerms {
    initial_age: u64,
    fresh_for: i64,
    while_revalidate: u64,
    if_error: u64,
    disconnected: u64,
    last_known_good: u64,
    validation: u64,
    always_validate: bool,
}

/// The meta part.
#[derive(Debug, Serialize, Deserialize)]
struct Meta<'a> {
    #[serde(borrow)]
    address: MetaAddress<'a>,
    status: u16,
    born: u64,
    seen: (u64, u64),
    terms: MetaTerms,
    #[serde(borrow)]
    vary: Vec<&'a str>,
    #[serde(borrow)]
    headers: Vec<(&'a str, &'a [u8])>,
    casing: &'a [u8],
    #[serde(borrow)]
    tags: Vec<&'a str>,
    rule: &'a str,
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
        let headers = without_room(&entry.head.headers);
        let Terms { initial_age, fresh_for, while_revalidate, if_error, .. } = entry.terms;
        let Terms { disconnected, last_known_good, validation, always_validate, .. } = entry.terms;
        let meta = Meta {
            address: MetaAddress {
                upstream: entry.address.upstream.0,
                authority: &entry.address.authority,
                target: &entry.address.target,
            },
            status: entry.head.status.as_u16(),
            born,
            seen: (seen.ms, seen.seq),
            terms: MetaTerms {
                initial_age,
                fresh_for,
                while_revalidate,
                if_error,
                disconnected,
                last_known_good,
                validation,
                always_validate,
            },
            vary: entry.variant.0.iter().map(|(name, _)| name.as_str()).collect(),
            headers: headers.map(|(name, value)| (name.as_str(), value.as_bytes())).collect(),
            casing: entry.head.casing.as_ref().map_or(&[], |casing| &casing.names),
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
            return Err(Unreadable::Forged);
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

    /// The address in the first bytes of what lay under the key `place`: for walks, so not verified unless
    /// encrypted. `Ok(None)`: there is none, or more bytes are needed than these.
    pub fn peek(&self, record: &[u8], place: &str) -> Option<WireAddress> {
        let head = Head::read(record).ok()?;
        if head.flags & SIGNPOST != 0 {
            return None;
        }
        let meta = record.get(HEAD..)?;
        if !head.encrypted() {
            return postcard::take_from_bytes::<MetaAddress<'_>>(meta).ok().map(|(address, _)| address.into());
        }
        let bound = bound(&record[..HEAD], place);
        let meta = self.ring.decrypt(head.id, &head.salt, 0, &bound, meta.get(..head.meta)?).ok()?;
        postcard::take_from_bytes::<MetaAddress<'_>>(&meta).ok().map(|(address, _)| address.into())
    }
}

impl From<MetaAddress<'_>> for WireAddress {
    fn from(meta: MetaAddress<'_>) -> WireAddress {
        let MetaAddress { upstream, authority, target } = meta;
        WireAddress { upstream: UpstreamId(upstream), authority: authority.to_owned(), target: target.to_owned() }
    }
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
            return Err(Unreadable::OtherVersion);
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
    let mut headers = HeaderMap::with_capacity(meta.headers.len() + 4);
    for (name, value) in meta.headers {
        let name = HeaderName::from_bytes(name.as_bytes()).map_err(|_| Unreadable::Forged)?;
        headers.append(name, HeaderValue::from_bytes(value).map_err(|_| Unreadable::Forged)?);
    }
    let MetaTerms { initial_age, fresh_for, while_revalidate, if_error, .. } = meta.terms;
    let MetaTerms { disconnected, last_known_good, validation, always_validate, .. } = meta.terms;
    Ok(Record::Answer(Box::new(Answer {
        address: meta.address.into(),
        status: StatusCode::from_u16(meta.status).map_err(|_| Unreadable::Forged)?,
        headers,
        casing: meta.casing.to_vec(),
        body,
        born: meta.born,
        seen: LogId { ms: meta.seen.0, seq: meta.seen.1 },
        terms: Terms {
            initial_age,
            fresh_for,
            while_revalidate,
            if_error,
            disconnected,
            last_known_good,
            validation,
            always_validate,
        },
        vary: names(meta.vary).ok_or(Unreadable::Forged)?,
        tags: meta.tags.into_iter().map(str::to_owned).collect(),
        rule: meta.rule.to_owned(),
    })))
}
