//! The invalidation ledger: which purges were made, ordered by position rather than by clock.
//!
//! Every purge gets the next [`Position`]. An entry carries the position read *before its fetch began*, and is
//! invalidated by every matching purge with a later position. Purging a tag is therefore one map insertion, however
//! many entries have the tag, and needs no search for them.
//!
//! The ledger's size is bounded. When it is full, the older half of the purges of the largest scope (an upstream, or one
//! of its hosts) is dropped, and everything of that scope that was fetched before counts as unverified: it is validated
//! before it is served, and may stand in for a failed response. Entries that were compared with the dropped purges are
//! not affected: an entry keeps the position and the result of its last check, and only later purges are compared.
//!
//! Positions are local to this process. [`super::log_position`] maps them to positions in the fleet's log.

use std::collections::HashMap;
use std::sync::Arc;

use super::tag::{Subject, TagScope, UpstreamId};
use crate::policy::Tick;
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
    Subject {
        /// What is purged.
        subject: Subject,
        /// The subject of everything in its scope.
        scope: Subject,
    },
    /// URLs that match a pattern.
    Matching(Matcher),
    /// All entries.
    Everything,
}

impl Selector {
    /// Selects everything in the scope.
    pub fn scope(scope: TagScope<'_>) -> Selector {
        Selector::Subject { subject: Subject::everything(scope), scope: Subject::everything(scope) }
    }

    /// Selects everything with this tag.
    pub fn tag(scope: TagScope<'_>, tag: &str) -> Selector {
        Selector::Subject { subject: Subject::tag(scope, tag), scope: Subject::everything(scope) }
    }

    /// Selects one path and query.
    pub fn target(scope: TagScope<'_>, target: &str) -> Selector {
        Selector::Subject { subject: Subject::target(scope, target), scope: Subject::everything(scope) }
    }

    /// Selects one path with any query.
    pub fn path(scope: TagScope<'_>, path: &str) -> Selector {
        Selector::Subject { subject: Subject::path(scope, path), scope: Subject::everything(scope) }
    }
}

/// A URL pattern of a purge.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Matcher {
    /// Restricts the pattern to this upstream.
    pub upstream: Option<UpstreamId>,
    /// Restricts the pattern to this authority.
    pub authority: Option<Box<str>>,
    /// How path and query must match.
    pub target: TargetMatch,
}

/// How a [`Matcher`] matches path and query.
#[derive(Debug, Clone, PartialEq, Eq)]
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

/// The latest purges of one selector.
#[derive(Debug, Clone, Copy, Default)]
struct PurgePositions {
    soft: Position,
    hard: Position,
    /// Purges that may have been made at any time before.
    doubtful: Position,
    /// Entries received up to this tick are gone: the time of a hard purge that was logged once more.
    hard_before: Tick,
}

impl PurgePositions {
    fn set(&mut self, purge: Purge, at: Position) {
        match purge {
            Purge { kind: PurgeKind::Soft, .. } => self.soft = at,
            Purge { kind: PurgeKind::Hard, made_at: None } => self.hard = at,
            Purge { kind: PurgeKind::Hard, made_at: Some(made_at) } => {
                self.doubtful = at;
                self.hard_before = self.hard_before.max(made_at);
            }
        }
    }

    fn latest(self) -> Position {
        self.soft.max(self.hard).max(self.doubtful)
    }

    fn state_of(self, position: Position, received_at: Tick) -> InvalidationState {
        if self.hard > position || received_at <= self.hard_before {
            InvalidationState::Gone
        } else if self.doubtful > position {
            InvalidationState::Unverified
        } else if self.soft > position {
            InvalidationState::Stale
        } else {
            InvalidationState::Valid
        }
    }
}

/// The effect of a purge, and when it was made.
#[derive(Debug, Clone, Copy)]
pub struct Purge {
    /// Soft or hard.
    pub kind: PurgeKind,
    /// Set if the purge is recorded later than it was made: an entry received since may have been fetched before or
    /// after it, and is unverified.
    pub made_at: Option<Tick>,
}

impl From<PurgeKind> for Purge {
    fn from(kind: PurgeKind) -> Purge {
        Purge { kind, made_at: None }
    }
}

#[derive(Debug, Clone, Copy)]
struct SubjectMark {
    positions: PurgePositions,
    scope: Subject,
}

/// The ledger of purges. One writer at a time; the owner does the locking.
#[derive(Debug)]
pub struct Ledger {
    position: Position,
    /// Entries with an earlier position can't be verified.
    unverified_before: Position,
    subjects: HashMap<Subject, SubjectMark>,
    /// The number of marks of each scope, besides the scope's own.
    scopes: HashMap<Subject, usize>,
    /// URL patterns, by their latest purge.
    matchers: Vec<(Matcher, PurgePositions)>,
    everything: PurgePositions,
    max_subjects: usize,
    max_matchers: usize,
    /// How often the ledger was full.
    overflows: u64,
}

impl Ledger {
    /// Creates an empty ledger that holds at most this many subjects and URL matchers.
    pub fn new(max_subjects: usize, max_matchers: usize) -> Ledger {
        Ledger {
            position: Position(1),
            unverified_before: Position(1),
            subjects: HashMap::new(),
            scopes: HashMap::new(),
            matchers: Vec::new(),
            everything: PurgePositions::default(),
            max_subjects: max_subjects.max(2),
            max_matchers: max_matchers.max(2),
            overflows: 0,
        }
    }

    /// Returns the current position: the one that a fetch carries if it begins now.
    pub fn position(&self) -> Position {
        self.position
    }

    /// Returns how often the ledger was full, so that purges were replaced by coarser ones.
    pub fn overflows(&self) -> u64 {
        self.overflows
    }

    /// Records a purge. Returns its position.
    pub fn record(&mut self, selectors: impl IntoIterator<Item = Selector>, purge: impl Into<Purge>) -> Position {
        self.position.0 += 1;
        let (purge, at) = (purge.into(), self.position);
        for selector in selectors {
            match selector {
                Selector::Subject { subject, scope } => self.mark_subject(subject, scope).set(purge, at),
                Selector::Matching(matcher) => {
                    let known = self.matchers.iter().position(|(known, _)| *known == matcher);
                    let mut mark = known.map(|known| self.matchers.remove(known).1).unwrap_or_default();
                    mark.set(purge, at);
                    if self.matchers.len() >= self.max_matchers {
                        self.forget_older_matchers();
                    }
                    self.matchers.push((matcher, mark));
                }
                Selector::Everything => {
                    self.everything.set(purge, at);
                    if purge.kind == PurgeKind::Hard && purge.made_at.is_none() {
                        self.subjects.clear();
                        self.scopes.clear();
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

    /// Returns the state of an entry whose fetch began at `position`, and that was received at `received_at`.
    pub fn state_of(&self, address: &ResourceId, position: Position, received_at: Tick) -> InvalidationState {
        self.state_since(address, position, received_at, position)
    }

    /// Returns the worst state that purges after `checked` give an entry whose fetch began at `position`, and that was
    /// received at `received_at`. Earlier purges are not compared again.
    pub fn state_since(
        &self,
        address: &ResourceId,
        position: Position,
        received_at: Tick,
        checked: Position,
    ) -> InvalidationState {
        let subjects = address.subjects.iter().filter_map(|subject| self.subjects.get(subject));
        let of_subjects = subjects.map(|mark| &mark.positions).filter(|mark| mark.latest() > checked);
        let new_matchers = self.matchers.iter().rev().take_while(|(_, mark)| mark.latest() > checked);
        let of_matchers = new_matchers.filter(|(matcher, _)| matcher.matches(address)).map(|(_, mark)| mark);
        let everything = Some(&self.everything).filter(|mark| mark.latest() > checked);
        let marks = of_subjects.chain(of_matchers).chain(everything);
        let unverified = if self.unverified_before > checked && self.unverified_before > position {
            InvalidationState::Unverified
        } else {
            InvalidationState::Valid
        };
        marks.map(|mark| mark.state_of(position, received_at)).fold(unverified, InvalidationState::max)
    }

    /// Returns true if a quarter of the places for subjects is left, or less.
    pub fn is_nearly_full(&self) -> bool {
        self.subjects.len() >= self.max_subjects / 4 * 3
    }

    /// Returns the mark of a subject, which is added if there is none.
    fn mark_subject(&mut self, subject: Subject, scope: Subject) -> &mut PurgePositions {
        if !self.subjects.contains_key(&subject) {
            if self.subjects.len() >= self.max_subjects {
                self.forget_older_subjects();
            }
            *self.scopes.entry(scope).or_default() += usize::from(subject != scope);
        }
        let new = SubjectMark { positions: PurgePositions::default(), scope };
        &mut self.subjects.entry(subject).or_insert(new).positions
    }

    /// Drops the older half of the marks of the scope that has most. Everything in it that was fetched before becomes
    /// unverified. If nearly all marks are those of whole scopes, the older half of all marks is dropped.
    fn forget_older_subjects(&mut self) {
        self.overflows += 1;
        let largest = self.scopes.iter().max_by_key(|(scope, count)| (**count, **scope));
        let scope = largest.filter(|(_, count)| **count * 8 >= self.max_subjects).map(|(scope, _)| *scope);
        let of_scope = |subject: &Subject, mark: &SubjectMark| {
            scope.is_none_or(|scope| mark.scope == scope && *subject != scope)
        };
        let marks = self.subjects.iter().filter(|(subject, mark)| of_scope(subject, mark));
        let mut positions: Vec<Position> = marks.map(|(_, mark)| mark.positions.latest()).collect();
        let middle = positions.len() / 2;
        let floor = *positions.select_nth_unstable(middle).1;
        self.subjects.retain(|subject, mark| !of_scope(subject, mark) || mark.positions.latest() > floor);
        match scope {
            Some(scope) => {
                let new = SubjectMark { positions: PurgePositions::default(), scope };
                let whole = &mut self.subjects.entry(scope).or_insert(new).positions;
                whole.doubtful = whole.doubtful.max(floor);
            }
            None => self.everything.doubtful = self.everything.doubtful.max(floor),
        }
        self.scopes.clear();
        for (subject, mark) in &self.subjects {
            *self.scopes.entry(mark.scope).or_default() += usize::from(*subject != mark.scope);
        }
    }

    /// Drops the older half of the URL patterns of the upstream that has most. Everything of that upstream that was
    /// fetched before becomes unverified.
    fn forget_older_matchers(&mut self) {
        self.overflows += 1;
        let mut counts: HashMap<Option<UpstreamId>, usize> = HashMap::new();
        for (matcher, _) in &self.matchers {
            *counts.entry(matcher.upstream).or_default() += 1;
        }
        let Some((upstream, count)) = counts.into_iter().max_by_key(|(_, count)| *count) else { return };
        let (mut older, mut floor) = (count / 2 + 1, Position(0));
        self.matchers.retain(|(matcher, mark)| {
            let dropped = older > 0 && matcher.upstream == upstream;
            if dropped {
                (older, floor) = (older - 1, floor.max(mark.latest()));
            }
            !dropped
        });
        match upstream {
            Some(upstream) => {
                let scope = Subject::everything(TagScope { upstream, authority: None });
                let new = SubjectMark { positions: PurgePositions::default(), scope };
                let whole = &mut self.subjects.entry(scope).or_insert(new).positions;
                whole.doubtful = whole.doubtful.max(floor);
            }
            None => self.everything.doubtful = self.everything.doubtful.max(floor),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::invalidation::tag::subjects;

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
        Selector::tag(SCOPE, name)
    }

    /// A tick after all purges.
    const NOW: Tick = Tick(1_000_000);

    fn state(ledger: &Ledger, address: &ResourceId, position: Position) -> InvalidationState {
        ledger.state_of(address, position, NOW)
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
        assert_eq!(state(&ledger, &shoe, before), InvalidationState::Gone);
        assert_eq!(state(&ledger, &shoe, at), InvalidationState::Valid);
        assert_eq!(state(&ledger, &address("/hat", &["hat"]), before), InvalidationState::Valid);
    }

    #[test]
    fn soft_purge_makes_only_entries_that_match_the_selector_stale() {
        let table: Vec<(Selector, InvalidationState)> = vec![
            (tag("shoe"), InvalidationState::Stale),
            (tag("hat"), InvalidationState::Valid),
            (Selector::target(SCOPE, "/shoe?x=1"), InvalidationState::Stale),
            (Selector::target(SCOPE, "/shoe"), InvalidationState::Valid),
            (Selector::path(SCOPE, "/shoe"), InvalidationState::Stale),
            (Selector::scope(SCOPE), InvalidationState::Stale),
            (Selector::Everything, InvalidationState::Stale),
            (prefix("/sh"), InvalidationState::Stale),
            (prefix("/ha"), InvalidationState::Valid),
        ];
        for (selector, expected) in table {
            let mut ledger = Ledger::new(100, 100);
            ledger.record([selector.clone()], PurgeKind::Soft);
            let state = state(&ledger, &address("/shoe?x=1", &["shoe"]), Position(1));
            assert_eq!(state, expected, "{selector:?}");
        }
    }

    #[test]
    fn entry_stays_gone_when_a_soft_purge_follows_a_hard_purge() {
        let mut ledger = Ledger::new(100, 100);
        ledger.record([tag("shoe")], PurgeKind::Hard);
        ledger.record([tag("shoe")], PurgeKind::Soft);
        assert_eq!(state(&ledger, &address("/shoe", &["shoe"]), Position(1)), InvalidationState::Gone);
    }

    #[test]
    fn entry_that_may_have_missed_a_purge_is_unverified() {
        let mut ledger = Ledger::new(100, 100);
        let (shoe, hat) = (address("/shoe", &["shoe"]), address("/hat", &["hat"]));
        assert_eq!(state(&ledger, &hat, Position(0)), InvalidationState::Unverified, "before everything known");
        let before = ledger.record([tag("shoe")], PurgeKind::Soft);
        assert_eq!(state(&ledger, &hat, before), InvalidationState::Valid);
        let since = ledger.mark_unverified();
        assert_eq!(state(&ledger, &hat, before), InvalidationState::Unverified);
        assert_eq!(state(&ledger, &hat, since), InvalidationState::Valid);
        ledger.record([tag("shoe")], PurgeKind::Hard);
        assert_eq!(state(&ledger, &shoe, before), InvalidationState::Gone, "a hard purge is more than a doubt");
    }

    #[test]
    fn overflow_makes_entries_of_the_largest_scope_unverified_and_no_others() {
        let mut ledger = Ledger::new(10, 10);
        let other = TagScope { upstream: UpstreamId(1), authority: None };
        ledger.record([Selector::tag(other, "kept")], PurgeKind::Hard);
        for i in 0..25 {
            ledger.record([tag(&format!("tag{i}")), prefix(&format!("/p{i}"))], PurgeKind::Hard);
        }
        assert!(ledger.subjects.len() <= 11 && ledger.matchers.len() <= 10);
        assert!(ledger.overflows() > 1);
        for i in 0..25 {
            let position = Position(i + 1);
            for entry in [address("/x", &[&format!("tag{i}")]), address(&format!("/p{i}"), &[])] {
                let state = state(&ledger, &entry, position);
                assert!(state >= InvalidationState::Unverified, "{i}: {state:?}");
            }
        }
        assert_eq!(state(&ledger, &address("/x", &[]), ledger.position()), InvalidationState::Valid);
        let elsewhere = |tag: &str| {
            let subjects = subjects(other, "/x", &[tag.to_owned()]).into();
            ResourceId { upstream: other.upstream, subjects, ..address("/x", &[]) }
        };
        assert_eq!(state(&ledger, &elsewhere("kept"), Position(1)), InvalidationState::Gone);
        let scoped = |text: &str| {
            let target = TargetMatch::Prefix(text.into());
            Selector::Matching(Matcher { upstream: Some(UpstreamId(0)), authority: None, target })
        };
        let mut ledger = Ledger::new(10, 10);
        for i in 0..25 {
            ledger.record([scoped(&format!("/p{i}")), tag(&format!("tag{i}"))], PurgeKind::Hard);
        }
        assert_eq!(state(&ledger, &elsewhere("x"), Position(1)), InvalidationState::Valid, "another upstream");
    }

    #[test]
    fn overflow_does_not_affect_entries_checked_since_the_dropped_purges() {
        let mut ledger = Ledger::new(100, 100);
        let (entry, begun) = (address("/x", &["kept"]), ledger.position());
        let (mut checked, mut state) = (begun, InvalidationState::Valid);
        for i in 0..1_000 {
            ledger.record([tag(&format!("tag{i}")), prefix(&format!("/p{i}"))], PurgeKind::Hard);
            if i % 10 == 0 {
                state = state.max(ledger.state_since(&entry, begun, NOW, checked));
                checked = ledger.position();
            }
        }
        assert!(ledger.overflows() > 10);
        assert_eq!(state, InvalidationState::Valid);
        assert_eq!(ledger.state_of(&entry, begun, NOW), InvalidationState::Unverified, "never checked");
        ledger.record([tag("kept")], PurgeKind::Soft);
        assert_eq!(ledger.state_since(&entry, begun, NOW, checked), InvalidationState::Stale);
    }

    #[test]
    fn repeated_purges_of_one_selector_take_one_place() {
        let mut ledger = Ledger::new(10, 10);
        for _ in 0..100 {
            ledger.record([tag("tag"), prefix("/p")], PurgeKind::Soft);
        }
        assert_eq!((ledger.subjects.len(), ledger.matchers.len(), ledger.overflows()), (1, 1, 0));
    }

    #[test]
    fn purge_recorded_late_removes_what_was_received_before_it_and_leaves_the_rest_unverified() {
        let mut ledger = Ledger::new(10, 10);
        let shoe = address("/shoe", &["shoe"]);
        let late = Purge { kind: PurgeKind::Hard, made_at: Some(Tick(500)) };
        let at = ledger.record([tag("shoe"), prefix("/hat")], late);
        for resource in [&shoe, &address("/hat", &[])] {
            assert_eq!(ledger.state_of(resource, Position(1), Tick(500)), InvalidationState::Gone);
            assert_eq!(ledger.state_of(resource, Position(1), Tick(501)), InvalidationState::Unverified);
            assert_eq!(ledger.state_of(resource, at, Tick(501)), InvalidationState::Valid);
        }
        assert_eq!(ledger.state_of(&address("/x", &[]), Position(1), Tick(1)), InvalidationState::Valid);
    }
}
