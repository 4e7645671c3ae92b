//! How a sidecar's own positions relate to the fleet's invalidation log.
//!
//! Every entry of the log names the one before it, so a reader knows that it has missed nothing: not by a cut
//! connection, not by a trimmed or lost log, not by a failover to a server that lacked the last entries. What is
//! stored for the fleet carries the id of the last log entry that its fetch had seen. Here such an id becomes a
//! position of our own, and back: two numbers that never depend on anybody's clock.
//!
//! Our own purges count here from the moment they are made, and get their place in the log later. So positions do
//! not quite follow the log's order; each link keeps the lowest position from it on, and the highest up to it.

use std::collections::VecDeque;
use std::fmt;

use super::invalidation::Position;

/// The id of a log entry: of a Redis stream entry. Larger is later, within one log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct LogId {
    /// Milliseconds of the server's clock.
    pub ms: u64,
    /// Number within the millisecond.
    pub seq: u64,
}

impl LogId {
    /// Reads `1763700000000-0`.
    pub fn parse(text: &str) -> Option<LogId> {
        let (ms, seq) = text.split_once('-')?;
        Some(LogId { ms: ms.parse().ok()?, seq: seq.parse().ok()? })
    }
}

impl fmt::Display for LogId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.ms, self.seq)
    }
}

/// What something fetched here had seen of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seen {
    /// All entries up to this one.
    UpTo(LogId),
    /// The log was not read yet.
    NotYet,
    /// Too long ago to be told.
    Forgotten,
}

/// The log is not the continuation of what was read: purges may have been missed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Broken;

#[derive(Debug, Clone, Copy)]
struct Link {
    id: LogId,
    /// The lowest position of this and all later links.
    low: Position,
    /// The highest position of this and all earlier links.
    high: Position,
}

/// What was read of the log without a gap.
#[derive(Debug)]
pub struct Chain {
    links: VecDeque<Link>,
    max: usize,
}

impl Chain {
    /// Nothing is known yet; at most so many links are kept.
    pub fn new(max: usize) -> Chain {
        Chain { links: VecDeque::new(), max: max.max(2) }
    }

    /// The last entry that was read.
    pub fn last(&self) -> Option<LogId> {
        self.links.back().map(|link| link.id)
    }

    /// Forgets everything, and begins after `origin`: what follows it will be read.
    pub fn begin(&mut self, origin: LogId, at: Position) {
        self.links.clear();
        self.links.push_back(Link { id: origin, low: at, high: at });
    }

    /// The entry `id`, whose predecessor is `previous`, counts here from position `at` on.
    pub fn extend(&mut self, previous: LogId, id: LogId, at: Position) -> Result<(), Broken> {
        let last = self.links.back().ok_or(Broken)?;
        if last.id != previous || id <= previous {
            return Err(Broken);
        }
        let high = last.high.max(at);
        for link in self.links.iter_mut().rev().take_while(|link| link.low > at) {
            link.low = at;
        }
        self.links.push_back(Link { id, low: at, high });
        if self.links.len() > self.max {
            self.links.pop_front();
        }
        Ok(())
    }

    /// The position of something whose fetch had seen the log up to `id`: everything purged by later entries is
    /// later than it. `now` is the current position, lowered by purges of ours that are not in the log yet.
    /// None if `id` is not in the chain: then nobody knows what it has missed.
    pub fn position_of(&self, id: LogId, now: Position) -> Option<Position> {
        let index = self.links.binary_search_by_key(&id, |link| link.id).ok()?;
        let before_next = self.links.get(index + 1).map_or(now, |next| Position(next.low.0.saturating_sub(1)));
        Some(before_next.min(now))
    }

    /// The last log entry that something fetched at `position` had seen, with all entries before it. None if that
    /// was too long ago.
    pub fn seen_at(&self, position: Position) -> Option<LogId> {
        let after = self.links.partition_point(|link| link.high <= position);
        after.checked_sub(1).and_then(|index| self.links.get(index)).map(|link| link.id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn id(n: u64) -> LogId {
        LogId { ms: n, seq: 0 }
    }

    fn chain(positions: &[u64]) -> Chain {
        let mut chain = Chain::new(100);
        chain.begin(id(0), Position(1));
        for (n, at) in positions.iter().enumerate() {
            let n = n as u64;
            chain.extend(id(n), id(n + 1), Position(*at)).expect("the next one");
        }
        chain
    }

    #[test]
    fn ids_read_as_they_are_written() {
        let id = LogId { ms: 1_763_700_000_000, seq: 7 };
        assert_eq!(LogId::parse(&id.to_string()), Some(id));
        assert_eq!(LogId::parse("7"), None);
    }

    #[test]
    fn a_gap_another_log_and_a_shortened_log_are_noticed() {
        let mut chain = chain(&[2, 3]);
        assert_eq!(chain.extend(id(3), id(4), Position(4)), Err(Broken), "one was missed");
        assert_eq!(chain.extend(id(0), id(9), Position(4)), Err(Broken), "another log");
        assert_eq!(chain.extend(id(1), id(2), Position(4)), Err(Broken), "the last one was lost, and written anew");
        assert_eq!(chain.extend(id(2), id(3), Position(4)), Ok(()));
        assert_eq!(Chain::new(9).extend(id(0), id(1), Position(1)), Err(Broken), "nothing was begun");
    }

    #[test]
    fn positions_and_ids_translate_both_ways() {
        let chain = chain(&[2, 3, 4]);
        let now = Position(4);
        assert_eq!(chain.position_of(id(1), now), Some(Position(2)));
        assert_eq!(chain.position_of(id(3), now), Some(Position(4)));
        assert_eq!(chain.position_of(id(7), now), None, "not of this log");
        assert_eq!(chain.seen_at(Position(3)), Some(id(2)));
        assert_eq!(chain.seen_at(Position(0)), None);
        assert_eq!(chain.position_of(id(3), Position(2)), Some(Position(2)), "ours that is not in the log yet");
    }

    #[test]
    fn what_is_too_old_is_unknown_rather_than_guessed() {
        let mut chain = Chain::new(2);
        chain.begin(id(0), Position(1));
        chain.extend(id(0), id(1), Position(2)).expect("the next one");
        chain.extend(id(1), id(2), Position(3)).expect("the next one");
        assert_eq!(chain.position_of(id(0), Position(3)), None);
        assert_eq!(chain.seen_at(Position(1)), None);
    }

    proptest! {
        /// Whatever the order in which purges of ours and of others got their places: something that had seen the
        /// log up to an entry is older than every later one, and what is written with an id has seen all up to it.
        #[test]
        fn no_purge_is_ever_missed(positions in proptest::collection::vec(2u64..20, 1..20)) {
            let chain = chain(&positions);
            let now = Position(*positions.iter().max().expect("some"));
            for seen in 0..=positions.len() {
                let born = chain.position_of(id(seen as u64), now).expect("in the chain");
                for at in &positions[seen..] {
                    prop_assert!(*at > born.0);
                }
            }
            for position in 1..25 {
                if let Some(seen) = chain.seen_at(Position(position)) {
                    let seen = usize::try_from(seen.ms).expect("small");
                    prop_assert!(positions[..seen].iter().all(|at| *at <= position));
                }
            }
        }
    }
}
