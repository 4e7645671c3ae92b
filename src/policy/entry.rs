//! What is stored: an answer's packed head, its body, and what the verdict on it needs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::HeaderMap;

use super::packed_head::PackedHead;
use super::{Tick, millis};
use crate::policy::http::vary::Variant;
use crate::policy::invalidation::ledger::{InvalidationState, Position, ResourceId};
use crate::policy::routing::cache_key::KeyName;

/// How long an entry may be used for what. Milliseconds, from the moment the answer came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Lifetimes {
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

impl Lifetimes {
    /// May it answer a request that did not fetch it, without validation?
    pub fn is_shareable(&self) -> bool {
        !self.always_validate && (self.fresh_for > 0 || self.while_revalidate > 0)
    }

    /// Kept until here, then swept.
    pub fn retention(&self) -> u64 {
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
    pub head: PackedHead,
    /// Its whole body.
    pub body: Bytes,
    /// Which requests it is for, among those of its key.
    pub variant: Variant,
    /// When it came.
    pub received_at: Tick,
    /// What it may be used for, and how long.
    pub lifetimes: Lifetimes,
    /// What it can be purged by.
    pub resource: ResourceId,
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
    cached_state_bits: AtomicU64,
    /// Somebody sees to its refresh before it expires.
    refresh_claimed: AtomicBool,
}

impl Entry {
    /// Builds an entry. Its state is known for its own position: valid.
    pub fn new(parts: EntryParts) -> Entry {
        let EntryParts { head, body, variant, received_at, lifetimes, resource, position, labels } = parts;
        let EntryLabels { key_name, tags, rule } = labels;
        Entry {
            head,
            body,
            variant,
            received_at,
            lifetimes,
            resource,
            position,
            key_name,
            tags,
            rule,
            owns_shape: true,
            cached_state_bits: AtomicU64::new(pack(position, InvalidationState::Valid)),
            refresh_claimed: AtomicBool::new(false),
        }
    }

    /// Milliseconds since it came.
    pub fn resident_time(&self, now: Tick) -> u64 {
        now.since(self.received_at)
    }

    /// RFC 9111 §4.2.3 `current_age`, in whole seconds.
    pub fn age(&self, now: Tick) -> u64 {
        (self.lifetimes.initial_age + self.resident_time(now)) / 1000
    }

    /// Seconds of freshness left; negative when stale, rounded away from freshness.
    pub fn ttl(&self, now: Tick) -> i64 {
        let left = self.lifetimes.fresh_for - i64::try_from(self.resident_time(now)).unwrap_or(i64::MAX);
        left.div_euclid(1000)
    }

    /// Fresh, but for less than `ahead`, or for some entries less than half of that: so that what was fetched together
    /// is not refreshed together.
    pub fn is_refresh_due(&self, ahead: Duration, now: Tick) -> bool {
        let left = self.lifetimes.fresh_for - i64::try_from(self.resident_time(now)).unwrap_or(i64::MAX);
        let spread = self
            .key_name
            .as_str()
            .bytes()
            .fold(self.received_at.0, |spread, byte| spread.wrapping_mul(31) + u64::from(byte));
        let from = millis(ahead) / 2 + millis(ahead) * (spread % 256) / 512;
        left > 0 && left.unsigned_abs() <= from
    }

    /// From now on somebody sees to its refresh. True if somebody did already.
    pub fn claim_refresh(&self) -> bool {
        self.refresh_claimed.swap(true, Ordering::Relaxed)
    }

    /// Has it outlived all its windows?
    pub fn expired(&self, now: Tick) -> bool {
        self.resident_time(now) > self.lifetimes.retention()
    }

    /// The standing found at `epoch`, if it was last checked then.
    pub fn cached_state(&self, epoch: Position) -> Option<InvalidationState> {
        let checked = self.cached_state_bits.load(Ordering::Relaxed);
        (checked >> 2 == epoch.0).then_some(match checked & 3 {
            0 => InvalidationState::Valid,
            1 => InvalidationState::Stale,
            2 => InvalidationState::Unverified,
            _ => InvalidationState::Gone,
        })
    }

    /// Remembers what the ledger said at `epoch`.
    pub fn cache_state(&self, epoch: Position, standing: InvalidationState) {
        self.cached_state_bits.store(pack(epoch, standing), Ordering::Relaxed);
    }

    /// Bytes it takes in memory, overhead counted.
    pub fn weight(&self) -> u64 {
        let variant: usize =
            self.variant.0.iter().map(|(_, v)| 48 + v.iter().map(|v| v.len() + 40).sum::<usize>()).sum();
        let tags: usize = self.tags.iter().map(|tag| tag.len() + 24).sum();
        let address = self.resource.target.len() + size_of_val(&*self.resource.subjects);
        let shape = if self.owns_shape { self.head.shape().weight() } else { 0 };
        (self.body.len() + self.head.weight() + shape + variant + tags + address) as u64
            + size_of::<Entry>() as u64
            + ALLOCATIONS
    }
}

/// What an entry is built from.
#[derive(Debug)]
pub struct EntryParts {
    /// The head.
    pub head: PackedHead,
    /// The complete body.
    pub body: Bytes,
    /// The requests that it is valid for, among those of its key.
    pub variant: Variant,
    /// Arrival of the head.
    pub received_at: Tick,
    /// How long it may be used for what.
    pub lifetimes: Lifetimes,
    /// What it can be purged by.
    pub resource: ResourceId,
    /// The ledger's position before its fetch began.
    pub position: Position,
    /// What it is shown by.
    pub labels: EntryLabels,
}

/// What an entry says of itself to people.
#[derive(Debug, Clone)]
pub struct EntryLabels {
    /// The short public name of its key.
    pub key_name: KeyName,
    /// Its tags.
    pub tags: Box<[String]>,
    /// Its rule.
    pub rule: Arc<str>,
}

/// What counting and the allocator add to an entry's four or so blocks.
const ALLOCATIONS: u64 = 112;

fn pack(epoch: Position, standing: InvalidationState) -> u64 {
    epoch.0 << 2 | standing as u64
}

/// All answers stored under one key: one per variant, the newest first (RFC 9111 §4.1). Most have one.
#[derive(Debug, Clone)]
pub enum VariantSet {
    /// The only one.
    One(Arc<Entry>),
    /// Some.
    Many(Arc<Vec<Arc<Entry>>>),
}

/// So many variants of one URL are kept.
pub const MAX_VARIANTS: usize = 16;

impl From<Arc<Entry>> for VariantSet {
    fn from(entry: Arc<Entry>) -> VariantSet {
        VariantSet::One(entry)
    }
}

impl VariantSet {
    fn of(mut variants: Vec<Arc<Entry>>) -> Option<VariantSet> {
        match variants.len() {
            0 | 1 => variants.pop().map(VariantSet::One),
            2.. => Some(VariantSet::Many(Arc::new(variants))),
        }
    }

    /// The newest answer that this request selects.
    pub fn select(&self, request: &HeaderMap) -> Option<&Arc<Entry>> {
        self.variants().iter().find(|entry| entry.variant.selected_by(request))
    }

    /// All of them.
    pub fn variants(&self) -> &[Arc<Entry>] {
        match self {
            VariantSet::One(entry) => std::slice::from_ref(entry),
            VariantSet::Many(variants) => variants,
        }
    }

    /// A copy with `entry` in the place of its like, within `max_weight` bytes.
    #[must_use]
    pub fn with(&self, entry: Arc<Entry>, max_weight: u64) -> VariantSet {
        let mut weight = entry.weight();
        let mut variants = vec![entry.clone()];
        for other in self.variants().iter().filter(|other| other.variant != entry.variant) {
            weight += other.weight();
            if variants.len() == MAX_VARIANTS || weight > max_weight {
                break;
            }
            variants.push(other.clone());
        }
        VariantSet::of(variants).unwrap_or(VariantSet::One(entry))
    }

    /// A copy without what this request selects; `None` if nothing is left.
    pub fn without(&self, request: &HeaderMap) -> Option<VariantSet> {
        self.filtered(|entry| !entry.variant.selected_by(request))
    }

    /// A copy with only those that `keep` keeps; `None` if that is none.
    pub fn filtered(&self, keep: impl Fn(&Entry) -> bool) -> Option<VariantSet> {
        VariantSet::of(self.variants().iter().filter(|entry| keep(entry)).cloned().collect())
    }

    /// Bytes it takes in memory.
    pub fn weight(&self) -> u64 {
        let list = match self {
            VariantSet::One(_) => 0,
            VariantSet::Many(variants) => 64 + 8 * variants.len() as u64,
        };
        self.variants().iter().map(|entry| entry.weight()).sum::<u64>() + list
    }
}

#[cfg(test)]
pub(crate) mod testing {
    //! Entries for tests.

    use http::StatusCode;

    use crate::policy::invalidation::tag::UpstreamId;

    use super::{
        Bytes, Entry, EntryLabels, EntryParts, HeaderMap, KeyName, Lifetimes, PackedHead, Position, ResourceId, Tick,
        Variant,
    };

    /// Returns the parts of a 200 response without header fields, received at tick 0.
    pub(crate) fn parts(body: Bytes, lifetimes: Lifetimes) -> EntryParts {
        EntryParts {
            head: PackedHead::new(StatusCode::OK, &HeaderMap::new(), None, Vec::new()),
            body,
            variant: Variant::default(),
            received_at: Tick(0),
            lifetimes,
            resource: ResourceId {
                upstream: UpstreamId(0),
                authority: "".into(),
                target: "/".into(),
                subjects: Box::default(),
            },
            position: Position(0),
            labels: EntryLabels { key_name: KeyName::default(), tags: Box::default(), rule: "".into() },
        }
    }

    /// Returns an entry with these lifetimes.
    pub(crate) fn entry(lifetimes: Lifetimes) -> Entry {
        Entry::new(parts(Bytes::from_static(b"body"), lifetimes))
    }
}
