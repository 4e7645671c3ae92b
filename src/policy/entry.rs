//! What is stored: an answer's packed head, its body, and what the verdict on it needs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::HeaderMap;

use super::head::Head;
use super::invalidation::{Address, Position, Standing};
use super::key::KeyName;
use super::variant::Variant;
use super::{Tick, millis};

/// How long an entry may be used for what. Milliseconds, from the moment the answer came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Terms {
    /// Its age when it came: RFC 9111 §4.2.3, `corrected_initial_age`.
    pub initial_age: u64,
    /// Fresh until here. Negative: it came stale.
    pub fresh_for: i64,
    /// Beyond freshness, served while a refresh runs.
    pub while_revalidate: u64,
    /// Beyond freshness, served when the upstream answers with a failure.
    pub if_error: u64,
    /// Beyond freshness, served when the upstream gives no answer.
    pub disconnected: u64,
    /// Beyond freshness, served when nothing else is left.
    pub last_known_good: u64,
    /// Beyond freshness, kept because it can be validated.
    pub validation: u64,
    /// `no-cache`: never served without validation.
    pub always_validate: bool,
}

impl Terms {
    /// May it answer a request that did not fetch it, without validation?
    pub fn for_others(&self) -> bool {
        !self.always_validate && (self.fresh_for > 0 || self.while_revalidate > 0)
    }

    /// Kept until here, then swept.
    pub fn keep_for(&self) -> u64 {
        let longest =
            [self.while_revalidate, self.if_error, self.disconnected, self.last_known_good, self.validation];
        let beyond = longest.into_iter().max().unwrap_or(0);
        beyond.saturating_add_signed(self.fresh_for)
    }
}

/// One stored answer.
#[derive(Debug)]
pub struct Entry {
    /// Its head.
    pub head: Head,
    /// Its whole body.
    pub body: Bytes,
    /// Which requests it is for, among those of its key.
    pub variant: Variant,
    /// When it came.
    pub born: Tick,
    /// What it may be used for, and how long.
    pub terms: Terms,
    /// What it can be purged by.
    pub address: Address,
    /// The ledger's position before its fetch began.
    pub position: Position,
    /// The short public name of its key.
    pub key_name: KeyName,
    /// Its tags, for people.
    pub tags: Box<[String]>,
    /// The rule it came under.
    pub rule: Arc<str>,
    /// No other entry was found to have a head of the same shape: it counts as this one's.
    pub owns_shape: bool,
    /// The ledger's epoch at the last check, and what it said: `epoch << 2 | standing`.
    checked: AtomicU64,
    /// Somebody sees to its refresh before it expires.
    seen_to: AtomicBool,
}

impl Entry {
    /// An entry as it is built when its body is complete. `checked` starts at its own position.
    #[allow(clippy::too_many_arguments)] // each is one field, named at the only place that builds entries
    pub fn new(
        head: Head,
        body: Bytes,
        variant: Variant,
        born: Tick,
        terms: Terms,
        address: Address,
        position: Position,
        about: About,
    ) -> Entry {
        let checked = AtomicU64::new(pack(position, Standing::Valid));
        let About { key_name, tags, rule } = about;
        let seen_to = AtomicBool::new(false);
        let owns_shape = true;
        Entry {
            head,
            body,
            variant,
            born,
            terms,
            address,
            position,
            key_name,
            tags,
            rule,
            owns_shape,
            checked,
            seen_to,
        }
    }

    /// Milliseconds since it came.
    pub fn resident(&self, now: Tick) -> u64 {
        now.since(self.born)
    }

    /// RFC 9111 §4.2.3 `current_age`, in whole seconds.
    pub fn age(&self, now: Tick) -> u64 {
        (self.terms.initial_age + self.resident(now)) / 1000
    }

    /// Seconds of freshness left; negative when stale, rounded away from freshness.
    pub fn ttl(&self, now: Tick) -> i64 {
        let left = self.terms.fresh_for - i64::try_from(self.resident(now)).unwrap_or(i64::MAX);
        left.div_euclid(1000)
    }

    /// Fresh, but for less than `ahead`, or for some entries less than half of that: so that what was fetched together
    /// is not refreshed together.
    pub fn is_due(&self, ahead: Duration, now: Tick) -> bool {
        let left = self.terms.fresh_for - i64::try_from(self.resident(now)).unwrap_or(i64::MAX);
        let spread = self
            .key_name
            .as_str()
            .bytes()
            .fold(self.born.0, |spread, byte| spread.wrapping_mul(31) + u64::from(byte));
        let from = millis(ahead) / 2 + millis(ahead) * (spread % 256) / 512;
        left > 0 && left.unsigned_abs() <= from
    }

    /// From now on somebody sees to its refresh. True if somebody did already.
    pub fn see_to(&self) -> bool {
        self.seen_to.swap(true, Ordering::Relaxed)
    }

    /// Has it outlived all its windows?
    pub fn expired(&self, now: Tick) -> bool {
        self.resident(now) > self.terms.keep_for()
    }

    /// The standing found at `epoch`, if it was last checked then.
    pub fn standing_at(&self, epoch: Position) -> Option<Standing> {
        let checked = self.checked.load(Ordering::Relaxed);
        (checked >> 2 == epoch.0).then_some(match checked & 3 {
            0 => Standing::Valid,
            1 => Standing::Stale,
            2 => Standing::Unverified,
            _ => Standing::Gone,
        })
    }

    /// Remembers what the ledger said at `epoch`.
    pub fn remember(&self, epoch: Position, standing: Standing) {
        self.checked.store(pack(epoch, standing), Ordering::Relaxed);
    }

    /// Bytes it takes in memory, overhead counted.
    pub fn weight(&self) -> u64 {
        let variant: usize =
            self.variant.0.iter().map(|(_, v)| 48 + v.iter().map(|v| v.len() + 40).sum::<usize>()).sum();
        let tags: usize = self.tags.iter().map(|tag| tag.len() + 24).sum();
        let address = self.address.target.len() + size_of_val(&*self.address.subjects);
        let shape = if self.owns_shape { self.head.shape().weight() } else { 0 };
        (self.body.len() + self.head.weight() + shape + variant + tags + address) as u64
            + size_of::<Entry>() as u64
            + ALLOCATIONS
    }
}

/// What an entry says of itself to people.
#[derive(Debug, Clone)]
pub struct About {
    /// The short public name of its key.
    pub key_name: KeyName,
    /// Its tags.
    pub tags: Box<[String]>,
    /// Its rule.
    pub rule: Arc<str>,
}

/// What counting and the allocator add to an entry's four or so blocks.
const ALLOCATIONS: u64 = 112;

fn pack(epoch: Position, standing: Standing) -> u64 {
    epoch.0 << 2 | standing as u64
}

/// All answers stored under one key: one per variant, the newest first (RFC 9111 §4.1). Most have one.
#[derive(Debug, Clone)]
pub enum Resource {
    /// The only one.
    One(Arc<Entry>),
    /// Some.
    Many(Arc<Vec<Arc<Entry>>>),
}

/// So many variants of one URL are kept.
pub const MAX_VARIANTS: usize = 16;

impl From<Arc<Entry>> for Resource {
    fn from(entry: Arc<Entry>) -> Resource {
        Resource::One(entry)
    }
}

impl Resource {
    fn of(mut variants: Vec<Arc<Entry>>) -> Option<Resource> {
        match variants.len() {
            0 | 1 => variants.pop().map(Resource::One),
            2.. => Some(Resource::Many(Arc::new(variants))),
        }
    }

    /// The newest answer that this request selects.
    pub fn select(&self, request: &HeaderMap) -> Option<&Arc<Entry>> {
        self.variants().iter().find(|entry| entry.variant.selected_by(request))
    }

    /// All of them.
    pub fn variants(&self) -> &[Arc<Entry>] {
        match self {
            Resource::One(entry) => std::slice::from_ref(entry),
            Resource::Many(variants) => variants,
        }
    }

    /// A copy with `entry` in the place of its like, within `max_weight` bytes.
    #[must_use]
    pub fn with(&self, entry: Arc<Entry>, max_weight: u64) -> Resource {
        let mut weight = entry.weight();
        let mut variants = vec![entry.clone()];
        for other in self.variants().iter().filter(|other| other.variant != entry.variant) {
            weight += other.weight();
            if variants.len() == MAX_VARIANTS || weight > max_weight {
                break;
            }
            variants.push(other.clone());
        }
        Resource::of(variants).unwrap_or(Resource::One(entry))
    }

    /// A copy without what this request selects; `None` if nothing is left.
    pub fn without(&self, request: &HeaderMap) -> Option<Resource> {
        self.filtered(|entry| !entry.variant.selected_by(request))
    }

    /// A copy with only those that `keep` keeps; `None` if that is none.
    pub fn filtered(&self, keep: impl Fn(&Entry) -> bool) -> Option<Resource> {
        Resource::of(self.variants().iter().filter(|entry| keep(entry)).cloned().collect())
    }

    /// Bytes it takes in memory.
    pub fn weight(&self) -> u64 {
        let list = match self {
            Resource::One(_) => 0,
            Resource::Many(variants) => 64 + 8 * variants.len() as u64,
        };
        self.variants().iter().map(|entry| entry.weight()).sum::<u64>() + list
    }
}

#[cfg(test)]
pub(crate) mod testing {
    //! An entry of no particular content.

    use http::StatusCode;

    use crate::policy::tags::UpstreamId;

    use super::{About, Address, Bytes, Entry, Head, HeaderMap, KeyName, Position, Terms, Tick, Variant};

    pub(crate) fn entry(terms: Terms) -> Entry {
        let head = Head::new(StatusCode::OK, &HeaderMap::new(), None, Vec::new());
        let address =
            Address { upstream: UpstreamId(0), authority: "".into(), target: "/".into(), subjects: Box::default() };
        let about = About { key_name: KeyName::default(), tags: Box::default(), rule: "".into() };
        let body = Bytes::from_static(b"body");
        Entry::new(head, body, Variant::default(), Tick(0), terms, address, Position(0), about)
    }
}
