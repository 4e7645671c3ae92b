//! The kill switch: who has set it, and until when. What a person sets on the running sidecar counts before the
//! configuration.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::Tick;

/// What the sidecar does with requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// All it can.
    #[default]
    Normal,
    /// It hands everything through: no look-up, storing, coalescing, pacing, deadline, fallback. Invalidations go on,
    /// so that coming back serves nothing old.
    Bypass,
}

impl Mode {
    /// All of them.
    pub const ALL: [Mode; 2] = [Mode::Normal, Mode::Bypass];

    /// Its word.
    pub fn token(self) -> &'static str {
        match self {
            Mode::Normal => "normal",
            Mode::Bypass => "bypass",
        }
    }
}

/// The mode, and what it comes from.
#[derive(Debug, Default)]
pub struct Switch {
    configured: AtomicU64,
    /// What was set by hand: `until << 2 | 2 | bypass`, `until` in ticks; 0: nothing.
    set: AtomicU64,
}

/// Set for ever, as good as.
const FOR_EVER: u64 = u64::MAX >> 2;

/// The mode now, for people.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct State {
    /// The mode.
    pub mode: Mode,
    /// `admin`: set on this sidecar; `configuration`: in the file or the environment.
    pub source: &'static str,
    /// Milliseconds until the configuration counts again, if it was set for a time.
    pub for_ms: Option<u64>,
}

impl Switch {
    /// As configured.
    pub fn new(configured: Mode) -> Switch {
        let switch = Switch::default();
        switch.configure(configured);
        switch
    }

    /// The configuration says so now.
    pub fn configure(&self, configured: Mode) {
        self.configured.store(u64::from(configured == Mode::Bypass), Ordering::Relaxed);
    }

    fn configured(&self) -> Mode {
        if self.configured.load(Ordering::Relaxed) == 1 { Mode::Bypass } else { Mode::Normal }
    }

    /// Sets it by hand; for a time, or until it is set again.
    pub fn set(&self, mode: Mode, now: Tick, time: Option<Duration>) {
        let until = time.map_or(FOR_EVER, |time| now.plus(time).0.min(FOR_EVER));
        self.set.store(until << 2 | 2 | u64::from(mode == Mode::Bypass), Ordering::Relaxed);
    }

    /// From now on the configuration counts.
    pub fn clear(&self) {
        self.set.store(0, Ordering::Relaxed);
    }

    /// Is everything handed through? Two atomic loads.
    pub fn bypasses(&self, now: Tick) -> bool {
        match self.by_hand(now) {
            Some((mode, _)) => mode == Mode::Bypass,
            None => self.configured() == Mode::Bypass,
        }
    }

    /// The mode, and why.
    pub fn state(&self, now: Tick) -> State {
        match self.by_hand(now) {
            Some((mode, until)) => {
                let for_ms = (until != FOR_EVER).then(|| until.saturating_sub(now.0));
                State { mode, source: "admin", for_ms }
            }
            None => State { mode: self.configured(), source: "configuration", for_ms: None },
        }
    }

    fn by_hand(&self, now: Tick) -> Option<(Mode, u64)> {
        let set = self.set.load(Ordering::Relaxed);
        let until = set >> 2;
        (set != 0 && now.0 < until).then_some((if set & 1 == 1 { Mode::Bypass } else { Mode::Normal }, until))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_set_by_hand_counts_for_its_time() {
        let switch = Switch::new(Mode::Normal);
        assert!(!switch.bypasses(Tick(0)));
        switch.set(Mode::Bypass, Tick(1000), Some(Duration::from_secs(5)));
        assert!(switch.bypasses(Tick(5999)) && !switch.bypasses(Tick(6000)));
        assert_eq!(switch.state(Tick(2000)), State { mode: Mode::Bypass, source: "admin", for_ms: Some(4000) });
        switch.set(Mode::Bypass, Tick(1000), None);
        assert!(switch.bypasses(Tick(u64::MAX >> 3)));
        switch.clear();
        assert!(!switch.bypasses(Tick(1000)));
        let configured = Switch::new(Mode::Bypass);
        assert!(configured.bypasses(Tick(0)));
        configured.set(Mode::Normal, Tick(0), None);
        assert!(!configured.bypasses(Tick(1)), "the hand counts before the file");
    }
}
