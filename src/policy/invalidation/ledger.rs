//! The invalidation ledger: which purges were made, ordered by position rather than by clock.
//!
//! Every purge gets the next [`Position`]. An entry carries the position read *before its fetch began*, and is
//! invalidated by every matching purge with a later position. Purging a tag is therefore one map insertion, however
//! many entries have the tag, and needs no search for them.
//!
//! The ledger's size is bounded: when it is full, the older half of the purges is dropped and the floor rises, so that
//! everything fetched before the floor counts as purged.
//!
//! Positions are local to this process. [`super::log_position`] maps them to positions in the fleet's log.

use std::collections::HashMap;
use std::sync::Arc;

use super::tag::{Subject, UpstreamId};
use crate::policy::routing::pattern::Glob;

/// A position in the sequence of purges. Larger is later. 0 is before all known purges.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Position(pub u64);

/// The effect of a purge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PurgeKind {
    /// The entry becomes stale: it may still be served within its stale windows or as a fallback.
    Soft,
    /// The entry is never served again.
    Hard,
}

/// The state of an entry after all purges. Ordered: the worst state applies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum InvalidationState {
    /// No purge matches the entry.
    Valid,
    /// A soft purge matches the entry.
    Stale,
    /// It is unknown whether a purge matches the entry, which is served only if there is nothing else.
    Unverified,
    /// A hard purge matches the entry.
    Gone,
}

impl InvalidationState {
    /// Returns the state's name in the admin API.
    pub fn token(self) -> &'static str {
        match self {
            InvalidationState::Valid => "valid",
            InvalidationState::Stale => "stale",
            InvalidationState::Unverified => "unverified",
            InvalidationState::Gone => "gone",
        }
    }
}

/// What a purge selects.
#[derive(Debug, Clone)]
pub enum Selector {
    /// A tag, a URL, a path, or a whole scope.
    Subject(Subject),
    /// URLs that match a pattern.
    Matching(Matcher),
    /// All entries.
    Everything,
}

/// A URL pattern of a purge.
#[derive(Debug, Clone)]
pub struct Matcher {
    /// Restricts the pattern to this upstream.
    pub upstream: Option<UpstreamId>,
    /// Restricts the pattern to this authority.
    pub authority: Option<Box<str>>,
    /// How path and query must match.
    pub target: TargetMatch,
}

/// How a [`Matcher`] matches path and query.
#[derive(Debug, Clone)]
pub enum TargetMatch {
    /// They begin with this prefix.
    Prefix(Box<str>),
    /// They match this glob.
    Glob(Glob),
}

/// The properties of an entry or a running fetch that purges are matched against.
#[derive(Debug, Clone)]
pub struct ResourceId {
    /// The upstream.
    pub upstream: UpstreamId,
    /// The upstream's authority.
    pub authority: Arc<str>,
    /// Path and query.
    pub target: Box<str>,
    /// All subjects that a purge can name it by.
    pub subjects: Box<[Subject]>,
}

impl Matcher {
    /// Returns true if the pattern matches this URL.
    pub fn matches(&self, address: &ResourceId) -> bool {
        self.upstream.is_none_or(|upstream| upstream == address.upstream)
            && self.authority.as_deref().is_none_or(|authority| authority.eq_ignore_ascii_case(&address.authority))
            && match &self.target {
                TargetMatch::Prefix(prefix) => address.target.starts_with(&**prefix),
                TargetMatch::Glob(glob) => glob.matches(address.target.as_bytes()),
            }
    }
}

#[derive(Debug, Clone, Copy, Default)]
struct PurgePositions {
    soft: Position,
    hard: Position,
}

impl PurgePositions {
    fn set(&mut self, strength: PurgeKind, at: Position) {
        match strength {
            PurgeKind::Soft => self.soft = at,
            PurgeKind::Hard => self.hard = at,
        }
    }

    fn latest(self) -> Position {
        self.soft.max(self.hard)
    }

    fn state_of(self, position: Position) -> InvalidationState {
        if self.hard > position {
            InvalidationState::Gone
        } else if self.soft > position {
            InvalidationState::Stale
        } else {
            InvalidationState::Valid
        }
    }
}

/// The ledger of purges. One writer at a time; the owner does the locking.
#[derive(Debug)]
pub struct Ledger {
    position: Position,
    /// Entries with an earlier position can't be verified.
    unverified_before: Position,
    subjects: HashMap<Subject, PurgePositions>,
    matchers: Vec<(Matcher, PurgePositions)>,
    everything: PurgePositions,
    max_subjects: usize,
    max_matchers: usize,
}

impl Ledger {
    /// Creates an empty ledger that holds at most this many subjects and URL matchers.
    pub fn new(max_subjects: usize, max_matchers: usize) -> Ledger {
        Ledger {
            position: Position(1),
            unverified_before: Position(1),
            subjects: HashMap::new(),
            matchers: Vec::new(),
            everything: PurgePositions::default(),
            max_subjects: max_subjects.max(2),
            max_matchers: max_matchers.max(2),
        }
    }

    /// Returns the current position: the one that a fetch carries if it begins now.
    pub fn position(&self) -> Position {
        self.position
    }

    /// Records a purge. Returns its position.
    pub fn record(&mut self, selectors: impl IntoIterator<Item = Selector>, strength: PurgeKind) -> Position {
        self.position.0 += 1;
        for selector in selectors {
            match selector {
                Selector::Subject(subject) => {
                    if self.subjects.len() >= self.max_subjects && !self.subjects.contains_key(&subject) {
                        self.forget_older_subjects();
                    }
                    self.subjects.entry(subject).or_default().set(strength, self.position);
                }
                Selector::Matching(matcher) => {
                    if self.matchers.len() >= self.max_matchers {
                        self.forget_older_matchers();
                    }
                    let mut mark = PurgePositions::default();
                    mark.set(strength, self.position);
                    self.matchers.push((matcher, mark));
                }
                Selector::Everything => {
                    self.everything.set(strength, self.position);
                    if strength == PurgeKind::Hard {
                        self.subjects.clear();
                        self.matchers.clear();
                    }
                }
            }
        }
        self.position
    }

    /// Marks all earlier entries as unverified, because purges may have been missed. Returns the new position.
    pub fn mark_unverified(&mut self) -> Position {
        self.position.0 += 1;
        self.unverified_before = self.position;
        self.position
    }

    /// Returns the state of an entry whose fetch began at `position`.
    pub fn state_of(&self, address: &ResourceId, position: Position) -> InvalidationState {
        let of_subjects =
            address.subjects.iter().filter_map(|s| self.subjects.get(s)).map(|m| m.state_of(position)).max();
        let of_matchers = self
            .matchers
            .iter()
            .filter(|(matcher, mark)| mark.latest() > position && matcher.matches(address))
            .map(|(_, mark)| mark.state_of(position))
            .max();
        let doubt =
            if position < self.unverified_before { InvalidationState::Unverified } else { InvalidationState::Valid };
        let named = of_subjects.max(of_matchers).unwrap_or(InvalidationState::Valid);
        doubt.max(named).max(self.everything.state_of(position))
    }

    fn forget_older_subjects(&mut self) {
        let mut positions: Vec<Position> = self.subjects.values().map(|mark| mark.latest()).collect();
        let middle = positions.len() / 2;
        let floor = *positions.select_nth_unstable(middle).1;
        self.subjects.retain(|_, mark| mark.latest() > floor);
        self.everything.hard = self.everything.hard.max(floor);
    }

    fn forget_older_matchers(&mut self) {
        let older = self.matchers.len() / 2 + 1;
        let floor = self.matchers.drain(..older).map(|(_, mark)| mark.latest()).max().unwrap_or_default();
        self.everything.hard = self.everything.hard.max(floor);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::invalidation::tag::{TagScope, subjects};

    const SCOPE: TagScope<'static> = TagScope { upstream: UpstreamId(0), authority: None };

    fn address(target: &str, tags: &[&str]) -> ResourceId {
        let tags: Vec<String> = tags.iter().map(ToString::to_string).collect();
        ResourceId {
            upstream: UpstreamId(0),
            authority: "shop.example".into(),
            target: target.into(),
            subjects: subjects(SCOPE, target, &tags).into(),
        }
    }

    fn tag(name: &str) -> Selector {
        Selector::Subject(Subject::tag(SCOPE, name))
    }

    fn prefix(text: &str) -> Selector {
        let target = TargetMatch::Prefix(text.into());
        Selector::Matching(Matcher { upstream: None, authority: None, target })
    }

    #[test]
    fn purge_affects_only_matching_entries_stored_before_it() {
        let mut ledger = Ledger::new(100, 100);
        let shoe = address("/shoe?x=1", &["shoe"]);
        let before = ledger.position();
        let at = ledger.record([tag("shoe")], PurgeKind::Hard);
        assert_eq!(ledger.state_of(&shoe, before), InvalidationState::Gone);
        assert_eq!(ledger.state_of(&shoe, at), InvalidationState::Valid);
        assert_eq!(ledger.state_of(&address("/hat", &["hat"]), before), InvalidationState::Valid);
    }

    #[test]
    fn soft_purge_makes_only_entries_that_match_the_selector_stale() {
        let table: Vec<(Selector, InvalidationState)> = vec![
            (tag("shoe"), InvalidationState::Stale),
            (tag("hat"), InvalidationState::Valid),
            (Selector::Subject(Subject::target(SCOPE, "/shoe?x=1")), InvalidationState::Stale),
            (Selector::Subject(Subject::target(SCOPE, "/shoe")), InvalidationState::Valid),
            (Selector::Subject(Subject::path(SCOPE, "/shoe")), InvalidationState::Stale),
            (Selector::Subject(Subject::everything(SCOPE)), InvalidationState::Stale),
            (Selector::Everything, InvalidationState::Stale),
            (prefix("/sh"), InvalidationState::Stale),
            (prefix("/ha"), InvalidationState::Valid),
        ];
        for (selector, expected) in table {
            let mut ledger = Ledger::new(100, 100);
            ledger.record([selector.clone()], PurgeKind::Soft);
            let state = ledger.state_of(&address("/shoe?x=1", &["shoe"]), Position(1));
            assert_eq!(state, expected, "{selector:?}");
        }
    }

    #[test]
    fn entry_stays_gone_when_a_soft_purge_follows_a_hard_purge() {
        let mut ledger = Ledger::new(100, 100);
        ledger.record([tag("shoe")], PurgeKind::Hard);
        ledger.record([tag("shoe")], PurgeKind::Soft);
        assert_eq!(ledger.state_of(&address("/shoe", &["shoe"]), Position(1)), InvalidationState::Gone);
    }

    #[test]
    fn entry_that_may_have_missed_a_purge_is_unverified() {
        let mut ledger = Ledger::new(100, 100);
        let (shoe, hat) = (address("/shoe", &["shoe"]), address("/hat", &["hat"]));
        assert_eq!(ledger.state_of(&hat, Position(0)), InvalidationState::Unverified, "before everything known");
        let before = ledger.record([tag("shoe")], PurgeKind::Soft);
        assert_eq!(ledger.state_of(&hat, before), InvalidationState::Valid);
        let since = ledger.mark_unverified();
        assert_eq!(ledger.state_of(&hat, before), InvalidationState::Unverified);
        assert_eq!(ledger.state_of(&hat, since), InvalidationState::Valid);
        ledger.record([tag("shoe")], PurgeKind::Hard);
        assert_eq!(ledger.state_of(&shoe, before), InvalidationState::Gone, "a hard purge is more than a doubt");
    }

    #[test]
    fn ledger_overflow_keeps_the_effect_of_every_purge() {
        let mut ledger = Ledger::new(10, 10);
        for i in 0..25 {
            ledger.record([tag(&format!("tag{i}")), prefix(&format!("/p{i}"))], PurgeKind::Hard);
        }
        assert!(ledger.subjects.len() <= 10 && ledger.matchers.len() <= 10);
        for i in 0..25 {
            let position = Position(i + 1);
            let entry = address("/x", &[&format!("tag{i}")]);
            assert_eq!(ledger.state_of(&entry, position), InvalidationState::Gone, "tag{i}");
            assert_eq!(ledger.state_of(&address(&format!("/p{i}"), &[]), position), InvalidationState::Gone, "/p{i}");
        }
        assert_eq!(ledger.state_of(&address("/x", &[]), ledger.position()), InvalidationState::Valid);
    }
}
