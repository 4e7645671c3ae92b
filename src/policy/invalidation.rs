//! The invalidation ledger: what was purged, and when. Positions, not clocks.
//!
//! Every purge gets the next [`Position`]. An entry carries the position read *before its fetch began*, and
//! what was purged at a later one does not count any more. So purging a tag is one map insertion however many
//! entries have it, and nobody needs to find them.
//!
//! What is remembered is bounded: when full, the older half is forgotten and the floor rises, which takes
//! everything fetched before it for purged.
//!
//! These positions are this process's own. How they relate to those of the log that a fleet shares is the business
//! of [`super::chain`].

use std::collections::HashMap;
use std::sync::Arc;

use super::glob::Glob;
use super::tags::{Subject, UpstreamId};

/// A place in the sequence of purges. Larger is later. 0 is before everything that is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Position(pub u64);

/// How much a purge takes away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strength {
    /// Takes it for stale: the stale windows and the ladder may still use it.
    Soft,
    /// It is never served again.
    Hard,
}

/// Where an entry stands after all purges. Ordered: the worst counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Standing {
    /// No purge names it.
    Valid,
    /// Softly purged.
    Stale,
    /// It can't be known whether a purge names it: not to be served unless there is nothing else.
    Unverified,
    /// Purged.
    Gone,
}

impl Standing {
    /// The word for it in the admin API.
    pub fn token(self) -> &'static str {
        match self {
            Standing::Valid => "valid",
            Standing::Stale => "stale",
            Standing::Unverified => "unverified",
            Standing::Gone => "gone",
        }
    }
}

/// What a purge names.
#[derive(Debug, Clone)]
pub enum Selector {
    /// Tag, URL, path, or all of a scope.
    Subject(Subject),
    /// URLs that look like this.
    Matching(Matcher),
    /// Everything there is.
    Everything,
}

/// A purge by the look of the URL.
#[derive(Debug, Clone)]
pub struct Matcher {
    /// Only this upstream.
    pub upstream: Option<UpstreamId>,
    /// Only this authority.
    pub authority: Option<Box<str>>,
    /// Path and query.
    pub target: TargetMatch,
}

/// How a [`Matcher`] looks at path and query.
#[derive(Debug, Clone)]
pub enum TargetMatch {
    /// Begins with this.
    Prefix(Box<str>),
    /// Matches this glob.
    Glob(Glob),
}

/// What the ledger needs to know of an entry or a running fetch.
#[derive(Debug, Clone)]
pub struct Address {
    /// The upstream.
    pub upstream: UpstreamId,
    /// The upstream's authority.
    pub authority: Arc<str>,
    /// Path and query.
    pub target: Box<str>,
    /// All it can be purged by.
    pub subjects: Box<[Subject]>,
}

impl Matcher {
    /// Is this an URL that it names?
    pub fn matches(&self, address: &Address) -> bool {
        self.upstream.is_none_or(|upstream| upstream == address.upstream)
            && self.authority.as_deref().is_none_or(|authority| authority.eq_ignore_ascii_case(&address.authority))
            && match &self.target {
                TargetMatch::Prefix(prefix) => address.target.starts_with(&**prefix),
                TargetMatch::Glob(glob) => glob.matches(address.target.as_bytes()),
            }
    }
}

#[derive(Debug, Clone, Copy, Default)]
struct Mark {
    soft: Position,
    hard: Position,
}

impl Mark {
    fn set(&mut self, strength: Strength, at: Position) {
        match strength {
            Strength::Soft => self.soft = at,
            Strength::Hard => self.hard = at,
        }
    }

    fn latest(self) -> Position {
        self.soft.max(self.hard)
    }

    fn standing(self, born: Position) -> Standing {
        if self.hard > born {
            Standing::Gone
        } else if self.soft > born {
            Standing::Stale
        } else {
            Standing::Valid
        }
    }
}

/// The ledger itself. One writer at a time; whoever holds it decides how.
#[derive(Debug)]
pub struct Ledger {
    position: Position,
    /// What was born before this can't be verified.
    doubted: Position,
    subjects: HashMap<Subject, Mark>,
    matchers: Vec<(Matcher, Mark)>,
    everything: Mark,
    max_subjects: usize,
    max_matchers: usize,
}

impl Ledger {
    /// An empty ledger that remembers at most so many subjects and URL matchers.
    pub fn new(max_subjects: usize, max_matchers: usize) -> Ledger {
        Ledger {
            position: Position(1),
            doubted: Position(1),
            subjects: HashMap::new(),
            matchers: Vec::new(),
            everything: Mark::default(),
            max_subjects: max_subjects.max(2),
            max_matchers: max_matchers.max(2),
        }
    }

    /// Where the ledger stands: what a fetch that begins now is born at.
    pub fn position(&self) -> Position {
        self.position
    }

    /// Notes a purge.
    pub fn record(&mut self, selectors: impl IntoIterator<Item = Selector>, strength: Strength) -> Position {
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
                    let mut mark = Mark::default();
                    mark.set(strength, self.position);
                    self.matchers.push((matcher, mark));
                }
                Selector::Everything => {
                    self.everything.set(strength, self.position);
                    if strength == Strength::Hard {
                        self.subjects.clear();
                        self.matchers.clear();
                    }
                }
            }
        }
        self.position
    }

    /// Purges may have been missed: nothing of before can be verified any more.
    pub fn doubt(&mut self) -> Position {
        self.position.0 += 1;
        self.doubted = self.position;
        self.position
    }

    /// Where something born at a position stands.
    pub fn standing(&self, address: &Address, born: Position) -> Standing {
        let of_subjects =
            address.subjects.iter().filter_map(|s| self.subjects.get(s)).map(|m| m.standing(born)).max();
        let of_matchers = self
            .matchers
            .iter()
            .filter(|(matcher, mark)| mark.latest() > born && matcher.matches(address))
            .map(|(_, mark)| mark.standing(born))
            .max();
        let doubt = if born < self.doubted { Standing::Unverified } else { Standing::Valid };
        let named = of_subjects.max(of_matchers).unwrap_or(Standing::Valid);
        doubt.max(named).max(self.everything.standing(born))
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
    use crate::policy::tags::{Scope, subjects};

    const SCOPE: Scope<'static> = Scope { upstream: UpstreamId(0), authority: None };

    fn address(target: &str, tags: &[&str]) -> Address {
        let tags: Vec<String> = tags.iter().map(ToString::to_string).collect();
        Address {
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
    fn a_purge_touches_what_was_born_before_it_and_no_other() {
        let mut ledger = Ledger::new(100, 100);
        let shoe = address("/shoe?x=1", &["shoe"]);
        let before = ledger.position();
        let at = ledger.record([tag("shoe")], Strength::Hard);
        assert_eq!(ledger.standing(&shoe, before), Standing::Gone);
        assert_eq!(ledger.standing(&shoe, at), Standing::Valid);
        assert_eq!(ledger.standing(&address("/hat", &["hat"]), before), Standing::Valid);
    }

    #[test]
    fn selectors() {
        let table: Vec<(Selector, Standing)> = vec![
            (tag("shoe"), Standing::Stale),
            (tag("hat"), Standing::Valid),
            (Selector::Subject(Subject::target(SCOPE, "/shoe?x=1")), Standing::Stale),
            (Selector::Subject(Subject::target(SCOPE, "/shoe")), Standing::Valid),
            (Selector::Subject(Subject::path(SCOPE, "/shoe")), Standing::Stale),
            (Selector::Subject(Subject::everything(SCOPE)), Standing::Stale),
            (Selector::Everything, Standing::Stale),
            (prefix("/sh"), Standing::Stale),
            (prefix("/ha"), Standing::Valid),
        ];
        for (selector, expected) in table {
            let mut ledger = Ledger::new(100, 100);
            ledger.record([selector.clone()], Strength::Soft);
            let standing = ledger.standing(&address("/shoe?x=1", &["shoe"]), Position(1));
            assert_eq!(standing, expected, "{selector:?}");
        }
    }

    #[test]
    fn soft_after_hard_stays_hard() {
        let mut ledger = Ledger::new(100, 100);
        ledger.record([tag("shoe")], Strength::Hard);
        ledger.record([tag("shoe")], Strength::Soft);
        assert_eq!(ledger.standing(&address("/shoe", &["shoe"]), Position(1)), Standing::Gone);
    }

    #[test]
    fn what_may_have_been_purged_unseen_is_in_doubt_but_not_gone() {
        let mut ledger = Ledger::new(100, 100);
        let (shoe, hat) = (address("/shoe", &["shoe"]), address("/hat", &["hat"]));
        assert_eq!(ledger.standing(&hat, Position(0)), Standing::Unverified, "before everything known");
        let before = ledger.record([tag("shoe")], Strength::Soft);
        assert_eq!(ledger.standing(&hat, before), Standing::Valid);
        let since = ledger.doubt();
        assert_eq!(ledger.standing(&hat, before), Standing::Unverified);
        assert_eq!(ledger.standing(&hat, since), Standing::Valid);
        ledger.record([tag("shoe")], Strength::Hard);
        assert_eq!(ledger.standing(&shoe, before), Standing::Gone, "a hard purge is more than a doubt");
    }

    #[test]
    fn an_overflow_forgets_names_but_never_a_purge() {
        let mut ledger = Ledger::new(10, 10);
        for i in 0..25 {
            ledger.record([tag(&format!("tag{i}")), prefix(&format!("/p{i}"))], Strength::Hard);
        }
        assert!(ledger.subjects.len() <= 10 && ledger.matchers.len() <= 10);
        for i in 0..25 {
            let born = Position(i + 1);
            let entry = address("/x", &[&format!("tag{i}")]);
            assert_eq!(ledger.standing(&entry, born), Standing::Gone, "tag{i}");
            assert_eq!(ledger.standing(&address(&format!("/p{i}"), &[]), born), Standing::Gone, "/p{i}");
        }
        assert_eq!(ledger.standing(&address("/x", &[]), ledger.position()), Standing::Valid);
    }
}
