//! Clocks: the only module that reads the time. All others take a [`Tick`] or a wall time as an argument.
//!
//! Times shared by a fleet are those of one clock: the Redis server's ([`FleetClock`]). So neither skew nor jumps of a
//! sidecar's own wall clock matter.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use crate::policy::{Tick, millis};

/// The tick at which a process starts, in milliseconds: 100 years after 0, so that every stored response has a tick,
/// whenever it was received.
const START_TICK: u64 = 100 * 365 * 24 * 3_600_000;

/// A suspension shorter than this is not distinguished from the time between reading two clocks.
const MIN_SUSPENSION: u64 = 1_000;

/// A monotonic clock, which includes the time that the machine was suspended, and the wall clock. Tests can turn them
/// forward.
#[derive(Debug, Clone)]
pub struct Clock {
    start: Instant,
    /// A clock that runs on while the machine is suspended, unlike [`Instant`].
    boottime: fn() -> Duration,
    boot_start: Duration,
    /// Shared by all clones. One allocation: every request clones the clock.
    adjustments: Arc<Adjustments>,
}

/// What is added to the time since the start, in milliseconds.
#[derive(Debug, Default)]
struct Adjustments {
    /// The time for which the machine was suspended.
    suspended: AtomicU64,
    /// The time by which the clock was turned forward: always zero outside of tests.
    turned: AtomicU64,
}

impl Clock {
    /// Starts a clock.
    pub fn start() -> Clock {
        Clock::start_with(boottime)
    }

    #[allow(clippy::disallowed_methods)] // the clock is the only place that reads the time
    fn start_with(boottime: fn() -> Duration) -> Clock {
        let (start, boot_start) = (Instant::now(), boottime());
        Clock { start, boottime, boot_start, adjustments: Arc::default() }
    }

    /// Returns the current instant, for measuring durations.
    #[allow(clippy::disallowed_methods)]
    pub fn instant(&self) -> Instant {
        Instant::now()
    }

    /// Returns the current instant and its tick. Notices if the machine was suspended.
    pub fn instant_and_tick(&self) -> (Instant, Tick) {
        let now = self.instant();
        let passed = millis((self.boottime)().saturating_sub(self.boot_start));
        let suspended = passed.saturating_sub(millis(now.saturating_duration_since(self.start)));
        if suspended > self.adjustments.suspended.load(Ordering::Relaxed) + MIN_SUSPENSION {
            self.adjustments.suspended.fetch_max(suspended, Ordering::Relaxed);
        }
        (now, self.tick(now))
    }

    /// Returns the tick of an instant.
    pub fn tick(&self, at: Instant) -> Tick {
        Tick(self.unturned(at) + self.adjustments.turned.load(Ordering::Relaxed))
    }

    fn unturned(&self, at: Instant) -> u64 {
        let suspended = self.adjustments.suspended.load(Ordering::Relaxed);
        START_TICK + millis(at.saturating_duration_since(self.start)) + suspended
    }

    /// Returns the current tick.
    pub fn now(&self) -> Tick {
        self.instant_and_tick().1
    }

    /// Returns the wall time, for `Date`, `Age` and `Expires` of received responses.
    #[allow(clippy::disallowed_methods)]
    pub fn wall(&self) -> SystemTime {
        SystemTime::now() + Duration::from_millis(self.adjustments.turned.load(Ordering::Relaxed))
    }

    /// Returns the time since the clock was started.
    pub fn uptime(&self) -> Duration {
        self.instant().saturating_duration_since(self.start)
    }

    /// Turns the clock forward, for all its clones.
    pub fn turn(&self, by: Duration) {
        self.adjustments.turned.fetch_add(millis(by), Ordering::Relaxed);
    }
}

/// Returns the time since the machine was started, with the time that it was suspended (`CLOCK_BOOTTIME`).
#[cfg(target_os = "linux")]
fn boottime() -> Duration {
    let time = nix::time::ClockId::CLOCK_BOOTTIME.now();
    time.map_or(Duration::ZERO, Duration::from)
}

/// Other systems have no such clock: a suspension goes unnoticed.
#[cfg(not(target_os = "linux"))]
fn boottime() -> Duration {
    Duration::ZERO
}

/// A server's reply to a request for its time.
#[derive(Debug, Clone, Copy)]
pub struct ServerTime {
    /// Milliseconds since the Unix epoch, rounded down.
    pub server: u64,
    /// When the request was sent.
    pub sent_at: Instant,
}

/// An estimate of the clock of the server that a fleet shares, in milliseconds since the Unix epoch.
///
/// Conversions of the time when a response was received err on one side: no response is taken for younger than it is
/// (as in RFC 9111 §4.2.3).
#[derive(Debug)]
pub struct FleetClock {
    clock: Clock,
    /// The minimum and maximum of the difference between server time and ticks. `None` until the first reply.
    offset: Mutex<Option<(i64, i64)>>,
}

impl FleetClock {
    /// Creates a clock that has not had a reply yet.
    pub fn new(clock: Clock) -> FleetClock {
        FleetClock { clock, offset: Mutex::default() }
    }

    /// Adds a reply of the server. The server read its clock between the request and now, so every quick reply narrows
    /// the bounds. A reply outside of the bounds comes from another server, or its clock was set: it replaces them.
    pub fn update(&self, server_time: ServerTime) {
        let (sent_at, received_at) =
            (self.clock.unturned(server_time.sent_at), self.clock.unturned(self.clock.instant()));
        let ahead_of = |tick: u64| server_time.server.cast_signed() - tick.cast_signed();
        // Rounding errors: of ticks, and of the server's milliseconds.
        let (least, most) = (ahead_of(received_at) - 1, ahead_of(sent_at) + 2);
        let mut offset = self.offset.lock().unwrap_or_else(PoisonError::into_inner);
        *offset = Some(match *offset {
            Some(known) if least <= known.1 && known.0 <= most => (least.max(known.0), most.min(known.1)),
            Some(_) | None => (least, most),
        });
    }

    fn offset(&self) -> Option<(i64, i64)> {
        *self.offset.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the present fleet time. `None` until the first reply.
    pub fn now(&self) -> Option<u64> {
        self.at(self.clock.now())
    }

    /// Returns the present instant.
    pub fn instant(&self) -> Instant {
        self.clock.instant()
    }

    /// Returns the present tick.
    pub fn tick_now(&self) -> Tick {
        self.clock.now()
    }

    /// Returns the earliest fleet time of a tick. `None` until the first reply.
    pub fn at(&self, tick: Tick) -> Option<u64> {
        self.offset().map(|(least, _)| tick.0.saturating_add_signed(least))
    }

    /// Returns the earliest tick of a fleet time. `None` until the first reply.
    pub fn tick(&self, time: u64) -> Option<Tick> {
        self.offset().map(|(_, most)| Tick(time.saturating_add_signed(-most)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_include_the_time_that_the_machine_was_suspended() {
        static AHEAD: AtomicU64 = AtomicU64::new(0);
        let clock = Clock::start_with(|| boottime() + Duration::from_secs(AHEAD.load(Ordering::Relaxed)));
        let before = clock.now();
        AHEAD.store(7_200, Ordering::Relaxed);
        let passed = clock.now().since(before);
        assert!((7_200_000..7_260_000).contains(&passed), "{passed}");
        let again = clock.now().since(before);
        assert!((passed..7_260_000).contains(&again), "it is counted once: {again}");
    }

    const SERVER: u64 = 1_763_700_000_000;
    const DAY: u64 = 86_400_000;

    /// Adds a reply to a request sent `ago` milliseconds ago. The server's time was `server` when the clock started.
    fn update(fleet: &FleetClock, server: u64, ago: u64) {
        let now = fleet.clock.instant();
        let sent_at = now.checked_sub(Duration::from_millis(ago)).expect("the machine is older");
        fleet.update(ServerTime { server: server + millis(now - fleet.clock.start), sent_at });
    }

    /// Returns a clock that started ten seconds before `at`.
    fn started(at: Instant) -> FleetClock {
        let start = at.checked_sub(Duration::from_secs(10)).expect("the machine is older");
        FleetClock::new(Clock { start, boottime: || Duration::ZERO, ..Clock::start() })
    }

    fn fleet() -> FleetClock {
        started(Clock::start().start)
    }

    #[test]
    fn fleet_clock_converts_ticks_and_fleet_time_also_before_process_start() {
        let fleet = fleet();
        assert_eq!(fleet.at(fleet.clock.now()), None);
        update(&fleet, SERVER, 0);
        let a_day_ago = fleet.tick(SERVER - DAY).expect("known");
        assert!(fleet.clock.now().since(a_day_ago) >= DAY);
        assert!(fleet.at(a_day_ago).is_some_and(|time| (SERVER - DAY - 10_000..=SERVER - DAY).contains(&time)));
        fleet.clock.turn(Duration::from_hours(1));
        update(&fleet, SERVER, 0);
        assert!(fleet.now().is_some_and(|now| now >= SERVER + 3_600_000), "turned by hand stays");
    }

    #[test]
    fn age_is_not_reduced_by_conversion_to_the_clock_of_another_sidecar() {
        let epoch = Clock::start().start;
        let (writer, reader) = (started(epoch), started(epoch));
        for slow in [900, 0, 400] {
            update(&writer, SERVER, slow);
            update(&reader, SERVER, slow / 2);
            let born = writer.clock.now();
            let there = writer.at(born).expect("known");
            let here = reader.tick(there).expect("known");
            let age = writer.clock.now().since(born);
            assert!(reader.clock.now().since(here) >= age, "after {slow}");
        }
    }

    #[test]
    fn reply_outside_the_known_bounds_replaces_the_fleet_time() {
        let fleet = fleet();
        update(&fleet, SERVER, 0);
        update(&fleet, SERVER - DAY, 0);
        assert!(fleet.now().is_some_and(|now| (SERVER - DAY..SERVER - DAY + 60_000).contains(&now)));
    }
}
