//! Mapping between a sidecar's own purge positions and the ids of the fleet's invalidation log.
//!
//! Every log entry names its predecessor, so that a reader detects missed entries, whether by a lost connection, a
//! trimmed or lost log, or a failover to a server that lacked the last entries. A record stored for the fleet carries
//! the id of the last log entry that its fetch had seen. This module converts such an id to a position of this process,
//! and back; neither depends on a clock.
//!
//! This sidecar's own purges get a position as soon as they are made, and their place in the log later. Positions
//! therefore do not quite follow the log's order: each segment keeps the lowest position of itself and all later ones,
//! and the highest of itself and all earlier ones.

use std::collections::VecDeque;
use std::fmt;

use super::ledger::Position;

/// The id of a log entry, which is a Redis stream entry. Within one log, larger is later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct LogId {
    /// Milliseconds of the server's clock.
    pub ms: u64,
    /// Sequence number within the millisecond.
    pub seq: u64,
}

impl LogId {
    /// Parses an id like `1763700000000-0`.
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

/// How far an entry fetched by this sidecar had seen the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SeenLog {
    /// All log entries up to this one.
    UpTo(LogId),
    /// The log had not been read yet.
    NotYet,
    /// Unknown, because the fetch was too long ago.
    Forgotten,
}

/// The log does not continue what was read: purges may have been missed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogGap;

#[derive(Debug, Clone, Copy)]
struct LoggedPosition {
    id: LogId,
    /// The lowest position of this and all later segments.
    low: Position,
    /// The highest position of this and all earlier segments.
    high: Position,
}

/// The part of the log that was read without a gap, with the positions of its entries.
#[derive(Debug)]
pub struct LogPositions {
    segments: VecDeque<LoggedPosition>,
    max: usize,
}

impl LogPositions {
    /// Creates an empty mapping that keeps at most `max` segments (at least 2).
    pub fn new(max: usize) -> LogPositions {
        LogPositions { segments: VecDeque::new(), max: max.max(2) }
    }

    /// Returns the last log entry that was read.
    pub fn last(&self) -> Option<LogId> {
        self.segments.back().map(|segment| segment.id)
    }

    /// Clears the mapping and restarts it after log entry `origin`: the next entry read is its successor.
    pub fn begin(&mut self, origin: LogId, at: Position) {
        self.segments.clear();
        self.segments.push_back(LoggedPosition { id: origin, low: at, high: at });
    }

    /// Appends the log entry `id`, whose predecessor is `previous`, at position `at`.
    ///
    /// Returns [`LogGap`] if it does not follow the last one.
    pub fn extend(&mut self, previous: LogId, id: LogId, at: Position) -> Result<(), LogGap> {
        let last = self.segments.back().ok_or(LogGap)?;
        if last.id != previous || id <= previous {
            return Err(LogGap);
        }
        let high = last.high.max(at);
        for segment in self.segments.iter_mut().rev().take_while(|segment| segment.low > at) {
            segment.low = at;
        }
        self.segments.push_back(LoggedPosition { id, low: at, high });
        if self.segments.len() > self.max {
            self.segments.pop_front();
        }
        Ok(())
    }

    /// Returns the position of an entry whose fetch had seen the log up to `id`: all purges by later log entries have
    /// later positions. `now` is the current position, lowered by purges of this sidecar that are not in the log yet.
    /// Returns `None` if `id` is not in the mapping, because it is then unknown which purges the entry has missed.
    pub fn position_of(&self, id: LogId, now: Position) -> Option<Position> {
        let index = self.segments.binary_search_by_key(&id, |segment| segment.id).ok()?;
        let before_next = self.segments.get(index + 1).map_or(now, |next| Position(next.low.0.saturating_sub(1)));
        Some(before_next.min(now))
    }

    /// Returns the last log entry that an entry fetched at `position` had seen, with all log entries before it. Returns
    /// `None` if that was too long ago.
    pub fn seen_at(&self, position: Position) -> Option<LogId> {
        let after = self.segments.partition_point(|segment| segment.high <= position);
        after.checked_sub(1).and_then(|index| self.segments.get(index)).map(|segment| segment.id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn id(n: u64) -> LogId {
        LogId { ms: n, seq: 0 }
    }

    fn chain(positions: &[u64]) -> LogPositions {
        let mut chain = LogPositions::new(100);
        chain.begin(id(0), Position(1));
        for (n, at) in positions.iter().enumerate() {
            let n = n as u64;
            chain.extend(id(n), id(n + 1), Position(*at)).expect("the next one");
        }
        chain
    }

    #[test]
    fn log_id_round_trips_through_text() {
        let id = LogId { ms: 1_763_700_000_000, seq: 7 };
        assert_eq!(LogId::parse(&id.to_string()), Some(id));
        assert_eq!(LogId::parse("7"), None);
    }

    #[test]
    fn missed_entry_other_log_or_rewritten_log_is_reported_as_a_gap() {
        let mut chain = chain(&[2, 3]);
        assert_eq!(chain.extend(id(3), id(4), Position(4)), Err(LogGap), "one was missed");
        assert_eq!(chain.extend(id(0), id(9), Position(4)), Err(LogGap), "another log");
        assert_eq!(chain.extend(id(1), id(2), Position(4)), Err(LogGap), "the last one was lost, and written anew");
        assert_eq!(chain.extend(id(2), id(3), Position(4)), Ok(()));
        assert_eq!(LogPositions::new(9).extend(id(0), id(1), Position(1)), Err(LogGap), "nothing was begun");
    }

    #[test]
    fn log_ids_convert_to_positions_and_back() {
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
    fn ids_and_positions_older_than_the_mapping_are_unknown() {
        let mut chain = LogPositions::new(2);
        chain.begin(id(0), Position(1));
        chain.extend(id(0), id(1), Position(2)).expect("the next one");
        chain.extend(id(1), id(2), Position(3)).expect("the next one");
        assert_eq!(chain.position_of(id(0), Position(3)), None);
        assert_eq!(chain.seen_at(Position(1)), None);
    }

    proptest! {
        /// In whatever order local and remote purges got their positions, an entry that had seen the log up to an id
        /// has a lower position than every later purge, and an entry written with an id has seen all purges up to it.
        #[test]
        fn conversion_of_ids_and_positions_misses_no_purge(positions in proptest::collection::vec(2u64..20, 1..20)) {
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
