//! A schedule of faults, generated from a seed.

use std::fmt;
use std::time::Duration;

/// A source of random numbers (SplitMix64): the same seed gives the same numbers.
#[derive(Debug, Clone)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Random {
        Random(seed)
    }

    /// Returns a number below `end`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (bits ^ (bits >> 31)) % end.max(1)
    }

    /// Returns an index of a slice of this length.
    pub(crate) fn index(&mut self, length: usize) -> usize {
        usize::try_from(self.below(length as u64)).expect("an index")
    }
}

/// The kind of a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The connections of one sidecar to Redis are cut, and no others are accepted.
    Cut(usize),
    /// Data between one sidecar and Redis is held back, in both directions.
    Silent(usize),
    /// The replies to one sidecar are held back.
    NoReplies(usize),
    /// The connections of one sidecar to Redis are slow.
    Slow(usize),
    /// One sidecar is killed (SIGKILL), and started again.
    Kill(usize),
    /// One sidecar is shut down (SIGTERM), and started again.
    Terminate(usize),
    /// Redis is killed, and started again with the last snapshot, or empty.
    RedisKilled,
    /// Redis is stopped (SIGSTOP).
    RedisStopped,
    /// A replica that stopped following some time ago takes the place of Redis, which is killed.
    Failover,
    /// Redis can't write its snapshot, and refuses writes (MISCONF).
    Misconfigured,
    /// A command of Redis, and the command that ends its effect.
    Command(&'static str, &'static str),
}

const COMMANDS: [(&str, &str); 6] = [
    ("FLUSHALL", "PING"),
    ("DEL {sidecache}:1:log", "PING"),
    ("CONFIG SET maxmemory 1", "CONFIG SET maxmemory 0"),
    ("CONFIG SET min-replicas-to-write 1", "CONFIG SET min-replicas-to-write 0"),
    ("CLIENT PAUSE 3000 WRITE", "CLIENT UNPAUSE"),
    ("SAVE", "PING"),
];

/// A fault.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fault {
    /// When it begins, after the start.
    pub(crate) at: Duration,
    pub(crate) lasts: Duration,
    pub(crate) kind: Kind,
}

impl Fault {
    /// Returns true if it is a fault of Redis, not of one sidecar. Faults of the same sort do not overlap.
    pub(crate) fn is_of_redis(&self) -> bool {
        matches!(
            self.kind,
            Kind::RedisKilled | Kind::RedisStopped | Kind::Failover | Kind::Misconfigured | Kind::Command(..)
        )
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:>6.2} s for {:.2} s: {:?}", self.at.as_secs_f64(), self.lasts.as_secs_f64(), self.kind)
    }
}

/// The faults of one run.
#[derive(Debug, Clone)]
pub(crate) struct Schedule {
    pub(crate) seed: u64,
    pub(crate) length: Duration,
    pub(crate) sidecars: usize,
    pub(crate) faults: Vec<Fault>,
}

impl Schedule {
    /// Generates a schedule.
    pub(crate) fn random(seed: u64, length: Duration, sidecars: usize) -> Schedule {
        let mut random = Random::new(seed);
        let mut faults = Vec::new();
        for of_redis in [true, false] {
            let mut at = Duration::from_millis(1_000 + random.below(3_000));
            while at + Duration::from_secs(4) < length {
                let lasts = Duration::from_millis(200 + random.below(5_000));
                let sidecar = random.index(sidecars);
                let kind = match (of_redis, random.below(12)) {
                    (true, 0..=2) => Kind::RedisKilled,
                    (true, 3) => Kind::RedisStopped,
                    (true, 4) => Kind::Failover,
                    (true, 5) => Kind::Misconfigured,
                    (true, _) => {
                        let (begin, end) = COMMANDS[random.index(COMMANDS.len())];
                        Kind::Command(begin, end)
                    }
                    (false, 0..=3) => Kind::Cut(sidecar),
                    (false, 4 | 5) => Kind::Silent(sidecar),
                    (false, 6 | 7) => Kind::NoReplies(sidecar),
                    (false, 8) => Kind::Slow(sidecar),
                    (false, 9) => Kind::Kill(sidecar),
                    (false, _) => Kind::Terminate(sidecar),
                };
                faults.push(Fault { at, lasts, kind });
                at += lasts + Duration::from_millis(200 + random.below(5_000));
            }
        }
        faults.sort_by_key(|fault| fault.at);
        Schedule { seed, length, sidecars, faults }
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.faults.iter().try_for_each(|fault| writeln!(f, "  {fault}"))
    }
}
