//! The only reader of the clocks. Everything else takes a [`Tick`] or a wall time as an argument.
//!
//! What a fleet shares is dated by one clock: that of the server it lies on ([`FleetClock`]). So neither the skew nor a
//! jump of anybody's own wall clock matters.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use crate::policy::{Tick, millis};

/// The tick at which a process starts: so far from 0 that everything stored has a tick, whenever it was born.
const START: u64 = 100 * 365 * 24 * 3_600_000;

/// Tells the time; the real one, or one that a test turns by hand.
#[derive(Debug, Clone)]
pub struct Clock {
    start: Instant,
    /// Milliseconds added by hand. Frozen for the real clock at zero.
    turned: Arc<AtomicU64>,
}

impl Clock {
    /// A clock that starts now.
    #[allow(clippy::disallowed_methods)] // this is the place
    pub fn start() -> Clock {
        Clock { start: Instant::now(), turned: Arc::default() }
    }

    /// The current instant: for measuring how long something takes.
    #[allow(clippy::disallowed_methods)]
    pub fn instant(&self) -> Instant {
        Instant::now()
    }

    /// The tick of an instant.
    pub fn tick(&self, at: Instant) -> Tick {
        Tick(self.unturned(at) + self.turned.load(Ordering::Relaxed))
    }

    fn unturned(&self, at: Instant) -> u64 {
        START + millis(at.saturating_duration_since(self.start))
    }

    /// The tick of now.
    pub fn now(&self) -> Tick {
        self.tick(self.instant())
    }

    /// The wall time, for `Date`, `Age` and `Expires` of answers that arrive.
    #[allow(clippy::disallowed_methods)]
    pub fn wall(&self) -> SystemTime {
        SystemTime::now() + Duration::from_millis(self.turned.load(Ordering::Relaxed))
    }

    /// How long it has been running.
    pub fn uptime(&self) -> Duration {
        self.instant().saturating_duration_since(self.start)
    }

    /// Turns the clock forward, for all its clones.
    pub fn turn(&self, by: Duration) {
        self.turned.fetch_add(millis(by), Ordering::Relaxed);
    }
}

/// What a server said when it was asked for the time.
#[derive(Debug, Clone, Copy)]
pub struct Told {
    /// Milliseconds since the epoch, what was left of one cut off.
    pub server: u64,
    /// When it was asked.
    pub asked: Instant,
}

/// The clock of the server that a fleet shares, as far as it is known here: milliseconds since the epoch. What it tells
/// of when something was born errs on one side: nothing is taken for younger than it is (as in RFC 9111 §4.2.3).
#[derive(Debug)]
pub struct FleetClock {
    clock: Clock,
    /// What is to be added to a tick, at least and at most; none while nothing is known.
    ahead: Mutex<Option<(i64, i64)>>,
}

impl FleetClock {
    /// Nothing is known yet.
    pub fn new(clock: Clock) -> FleetClock {
        FleetClock { clock, ahead: Mutex::default() }
    }

    /// The server has told the time. It looked at its clock between the question and now: what is known gets narrower
    /// with every answer that was quick. One that contradicts it is of another server, or of a clock that was set.
    pub fn hear(&self, told: Told) {
        let (asked, heard) = (self.clock.unturned(told.asked), self.clock.unturned(self.clock.instant()));
        let ahead_of = |tick: u64| told.server.cast_signed() - tick.cast_signed();
        // What was cut off: of our ticks, of the server's milliseconds.
        let (least, most) = (ahead_of(heard) - 1, ahead_of(asked) + 2);
        let mut ahead = self.ahead.lock().unwrap_or_else(PoisonError::into_inner);
        *ahead = Some(match *ahead {
            Some(known) if least <= known.1 && known.0 <= most => (least.max(known.0), most.min(known.1)),
            Some(_) | None => (least, most),
        });
    }

    fn ahead(&self) -> Option<(i64, i64)> {
        *self.ahead.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The fleet's time now; none while nothing is known.
    pub fn now(&self) -> Option<u64> {
        self.at(self.clock.now())
    }

    /// The fleet's time at a tick of ours, at the earliest; none while nothing is known.
    pub fn at(&self, tick: Tick) -> Option<u64> {
        self.ahead().map(|(least, _)| tick.0.saturating_add_signed(least))
    }

    /// Our tick at a time of the fleet, at the earliest; none while nothing is known.
    pub fn tick(&self, time: u64) -> Option<Tick> {
        self.ahead().map(|(_, most)| Tick(time.saturating_add_signed(-most)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SERVER: u64 = 1_763_700_000_000;
    const DAY: u64 = 86_400_000;

    /// It hears a server that was asked so many milliseconds ago, and has come since `SERVER` as far as this clock.
    fn hear(fleet: &FleetClock, server: u64, ago: u64) {
        let now = fleet.clock.instant();
        let asked = now.checked_sub(Duration::from_millis(ago)).expect("the machine is older");
        fleet.hear(Told { server: server + millis(now - fleet.clock.start), asked });
    }

    /// One that started ten seconds ago.
    fn started(at: Instant) -> FleetClock {
        let start = at.checked_sub(Duration::from_secs(10)).expect("the machine is older");
        FleetClock::new(Clock { start, turned: Arc::default() })
    }

    fn fleet() -> FleetClock {
        started(Clock::start().start)
    }

    #[test]
    fn it_translates_both_ways_and_before_our_start() {
        let fleet = fleet();
        assert_eq!(fleet.at(fleet.clock.now()), None);
        hear(&fleet, SERVER, 0);
        let a_day_ago = fleet.tick(SERVER - DAY).expect("known");
        assert!(fleet.clock.now().since(a_day_ago) >= DAY);
        assert!(fleet.at(a_day_ago).is_some_and(|time| (SERVER - DAY - 10_000..=SERVER - DAY).contains(&time)));
        fleet.clock.turn(Duration::from_hours(1));
        hear(&fleet, SERVER, 0);
        assert!(fleet.now().is_some_and(|now| now >= SERVER + 3_600_000), "turned by hand stays");
    }

    #[test]
    fn nothing_is_taken_for_younger_than_it_is_however_slow_the_answers() {
        let epoch = Clock::start().start;
        let (writer, reader) = (started(epoch), started(epoch));
        for slow in [900, 0, 400] {
            hear(&writer, SERVER, slow);
            hear(&reader, SERVER, slow / 2);
            let born = writer.clock.now();
            let there = writer.at(born).expect("known");
            let here = reader.tick(there).expect("known");
            let age = writer.clock.now().since(born);
            assert!(reader.clock.now().since(here) >= age, "after {slow}");
        }
    }

    #[test]
    fn another_server_replaces_what_was_known() {
        let fleet = fleet();
        hear(&fleet, SERVER, 0);
        hear(&fleet, SERVER - DAY, 0);
        assert!(fleet.now().is_some_and(|now| (SERVER - DAY..SERVER - DAY + 60_000).contains(&now)));
    }
}
