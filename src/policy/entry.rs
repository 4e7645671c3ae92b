//! The cache entry: a stored response with its lifetimes, variant and invalidation state.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::HeaderMap;
use http::header::{ACCEPT_ENCODING, CONTENT_ENCODING};

use super::packed_head::PackedHead;
use super::{Tick, millis};
use crate::policy::http::vary::{Variant, accepts_coding};
use crate::policy::invalidation::ledger::{InvalidationState, Position, ResourceId};
use crate::policy::routing::cache_key::KeyName;

/// The freshness lifetime and the stale windows of an entry, in milliseconds from the arrival of the response.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Lifetimes {
    /// The age at arrival: `corrected_initial_age` (RFC 9111 §4.2.3).
    pub initial_age: u64,
    /// Time for which the entry is fresh. Negative if the response was stale on arrival.
    pub fresh_for: i64,
    /// Time after freshness for which the entry is served while a refresh runs.
    pub while_revalidate: u64,
    /// Time after freshness for which the entry is served when the upstream responds with a failure.
    pub if_error: u64,
    /// Time after freshness for which the entry is served when the upstream sends no response.
    pub disconnected: u64,
    /// Time after freshness for which the entry is served when there is no other replacement for a failure.
    pub last_known_good: u64,
    /// Time after freshness for which the entry is kept because it can be validated.
    pub validation: u64,
    /// Whether the entry is never served without validation (`no-cache`).
    pub always_validate: bool,
}

impl Lifetimes {
    /// Returns true if the entry may be served without validation to a request that did not fetch it.
    pub fn is_shareable(&self) -> bool {
        !self.always_validate && (self.fresh_for > 0 || self.while_revalidate > 0)
    }

    /// Returns the time from arrival after which the entry is removed, in milliseconds.
    pub fn retention(&self) -> u64 {
        let longest =
            [self.while_revalidate, self.if_error, self.disconnected, self.last_known_good, self.validation];
        let beyond = longest.into_iter().max().unwrap_or(0);
        beyond.saturating_add_signed(self.fresh_for)
    }
}

/// A stored response.
#[derive(Debug)]
pub struct Entry {
    /// The head of the response.
    pub head: PackedHead,
    /// The complete body.
    pub body: Bytes,
    /// The request header values that select this entry among those of its key.
    pub variant: Variant,
    /// The arrival of the response.
    pub received_at: Tick,
    /// The freshness lifetime and the stale windows.
    pub lifetimes: Lifetimes,
    /// The subjects by which the entry can be purged.
    pub resource: ResourceId,
    /// The ledger's position before the fetch began.
    pub position: Position,
    /// The short public name of the key.
    pub key_name: KeyName,
    /// The tags, for display.
    pub tags: Box<[String]>,
    /// The name of the rule under which the response was fetched.
    pub rule: Arc<str>,
    /// Whether the shape of the head counts towards this entry's weight: true unless it is another entry's shape.
    pub owns_shape: bool,
    /// What changes while the entry is stored.
    pub state: EntryState,
}

/// The mutable state of an entry.
#[derive(Debug)]
pub struct EntryState {
    /// The ledger's epoch at the last check and the state found then, as `epoch << 2 | standing`.
    checked: AtomicU64,
    /// Whether a refresh before expiry has been claimed.
    refresh_claimed: AtomicBool,
}

impl EntryState {
    /// Returns the state of a new entry: valid at the position where its fetch began.
    pub fn valid_at(position: Position) -> EntryState {
        let checked = AtomicU64::new(pack(position, InvalidationState::Valid));
        EntryState { checked, refresh_claimed: AtomicBool::new(false) }
    }
}

impl Entry {
    /// Returns true if a request selects this entry (RFC 9111 §4.1). `Accept-Encoding` is negotiated: any request that
    /// accepts the content coding of the response selects it.
    pub fn selected_by(&self, request: &HeaderMap) -> bool {
        self.variant.selected_by(request)
            || self.variant.selected_by_all_but(&ACCEPT_ENCODING, request)
                && accepts_coding(request, self.head.get(&CONTENT_ENCODING))
    }

    /// Returns the milliseconds since arrival: `resident_time` (RFC 9111 §4.2.3).
    pub fn resident_time(&self, now: Tick) -> u64 {
        now.since(self.received_at)
    }

    /// Returns `current_age` (RFC 9111 §4.2.3), in whole seconds.
    pub fn age(&self, now: Tick) -> u64 {
        (self.lifetimes.initial_age + self.resident_time(now)) / 1000
    }

    /// Returns the remaining freshness in seconds, rounded down; negative if the entry is stale.
    pub fn ttl(&self, now: Tick) -> i64 {
        let left = self.lifetimes.fresh_for - i64::try_from(self.resident_time(now)).unwrap_or(i64::MAX);
        left.div_euclid(1000)
    }

    /// Returns true if the entry is fresh, but for no longer than a threshold between `ahead / 2` and `ahead`.
    ///
    /// The threshold differs between entries, so that entries fetched together are not refreshed together.
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

    /// Claims the refresh of the entry. Returns true if it was claimed before.
    pub fn claim_refresh(&self) -> bool {
        self.state.refresh_claimed.swap(true, Ordering::Relaxed)
    }

    /// Returns true if the entry is past all of its stale windows.
    pub fn expired(&self, now: Tick) -> bool {
        self.resident_time(now) > self.lifetimes.retention()
    }

    /// Returns the ledger's position at the last check, and the invalidation state found then.
    pub fn last_check(&self) -> (Position, InvalidationState) {
        let checked = self.state.checked.load(Ordering::Relaxed);
        let state = match checked & 3 {
            0 => InvalidationState::Valid,
            1 => InvalidationState::Stale,
            2 => InvalidationState::Unverified,
            _ => InvalidationState::Gone,
        };
        (Position(checked >> 2), state)
    }

    /// Caches the invalidation state that the ledger returned at `epoch`.
    pub fn cache_state(&self, epoch: Position, state: InvalidationState) {
        self.state.checked.store(pack(epoch, state), Ordering::Relaxed);
    }

    /// Returns the memory that the entry takes, in bytes, including overhead.
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

/// Overhead of reference counts and the allocator for the about four allocations of an entry, in bytes.
const ALLOCATIONS: u64 = 112;

fn pack(epoch: Position, state: InvalidationState) -> u64 {
    epoch.0 << 2 | state as u64
}

/// All responses stored under one key: one per variant, the newest first (RFC 9111 §4.1). Most keys have one.
#[derive(Debug, Clone)]
pub enum VariantSet {
    /// A single variant.
    One(Arc<Entry>),
    /// Several variants.
    Many(Arc<Vec<Arc<Entry>>>),
}

/// Maximum number of variants that are kept for a key.
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

    /// Returns the newest entry that this request selects.
    pub fn select(&self, request: &HeaderMap) -> Option<&Arc<Entry>> {
        self.variants().iter().find(|entry| entry.selected_by(request))
    }

    /// Returns all variants.
    pub fn variants(&self) -> &[Arc<Entry>] {
        match self {
            VariantSet::One(entry) => std::slice::from_ref(entry),
            VariantSet::Many(variants) => variants,
        }
    }

    /// Returns a copy in which `entry` replaces the entry of the same variant, limited to [`MAX_VARIANTS`] and
    /// `max_weight` bytes.
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

    /// Returns a copy without the entries that this request selects, or `None` if no entry is left.
    pub fn without(&self, request: &HeaderMap) -> Option<VariantSet> {
        self.filtered(|entry| !entry.selected_by(request))
    }

    /// Returns a copy with only the entries for which `keep` returns true, or `None` if there are none.
    pub fn filtered(&self, keep: impl Fn(&Entry) -> bool) -> Option<VariantSet> {
        VariantSet::of(self.variants().iter().filter(|entry| keep(entry)).cloned().collect())
    }

    /// Returns the memory that all variants take, in bytes.
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
    //! Entries for use in tests.

    use http::StatusCode;

    use crate::policy::invalidation::tag::UpstreamId;

    use super::{
        Bytes, Entry, EntryState, HeaderMap, KeyName, Lifetimes, PackedHead, Position, ResourceId, Tick, Variant,
    };

    /// Returns the entry of a 200 response without header fields and with the body `body`, received at tick 0.
    pub(crate) fn entry(lifetimes: Lifetimes) -> Entry {
        Entry {
            head: PackedHead::new(StatusCode::OK, &HeaderMap::new(), None, Vec::new()),
            body: Bytes::from_static(b"body"),
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
            key_name: KeyName::default(),
            tags: Box::default(),
            rule: "".into(),
            owns_shape: true,
            state: EntryState::valid_at(Position(0)),
        }
    }
}
