//! What the sidecar does with requests, and who says so. What a person sets on this sidecar counts before what is set for
//! the fleet, that before the environment, and that before the file.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::Tick;

/// What the sidecar does with requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// All it can.
    #[default]
    Normal,
    /// The kill switch: it hands everything through. No look-up, storing, coalescing, pacing, deadline, fallback.
    /// Invalidations go on, so that coming back serves nothing old.
    Bypass,
    /// A rehearsal: everything is handed through, and compared with what the cache would have answered.
    Shadow,
}

impl Mode {
    /// All of them.
    pub const ALL: [Mode; 3] = [Mode::Normal, Mode::Bypass, Mode::Shadow];

    /// Its word.
    pub fn token(self) -> &'static str {
        match self {
            Mode::Normal => "normal",
            Mode::Bypass => "bypass",
            Mode::Shadow => "shadow",
        }
    }

    /// The mode with that word.
    pub fn of(token: &str) -> Option<Mode> {
        Mode::ALL.into_iter().find(|mode| mode.token() == token)
    }
}

/// Who says which mode it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ModeSource {
    /// A person, on this sidecar.
    Local,
    /// A person, for all sidecars that share a Redis.
    Fleet,
    /// `SIDECACHE_MODE`.
    Environment,
    /// The file.
    File,
    /// Nobody.
    #[default]
    Default,
}

impl ModeSource {
    const ALL: [ModeSource; 5] =
        [ModeSource::Local, ModeSource::Fleet, ModeSource::Environment, ModeSource::File, ModeSource::Default];

    /// Its word.
    pub fn token(self) -> &'static str {
        match self {
            ModeSource::Local => "local",
            ModeSource::Fleet => "fleet",
            ModeSource::Environment => "environment",
            ModeSource::File => "file",
            ModeSource::Default => "default",
        }
    }
}

/// The mode, and what it comes from.
#[derive(Debug, Default)]
pub struct ModeSwitch {
    local: ModeSlot,
    fleet: ModeSlot,
    configured: ModeSlot,
}

/// The mode now, for people.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModeState {
    /// The mode.
    pub mode: Mode,
    /// Who says so.
    pub source: ModeSource,
    /// Milliseconds until somebody else counts again, if it was set for a time.
    pub for_ms: Option<u64>,
}

impl ModeSwitch {
    /// As configured.
    pub fn new(configured: Mode, source: ModeSource) -> ModeSwitch {
        let switch = ModeSwitch::default();
        switch.configure(configured, source);
        switch
    }

    /// The configuration says so now.
    pub fn configure(&self, configured: Mode, source: ModeSource) {
        self.configured.set(configured, source, FOR_EVER);
    }

    /// A person says so; for a time, or until it is said again. `source`: local or fleet.
    pub fn set(&self, mode: Mode, source: ModeSource, now: Tick, time: Option<Duration>) {
        let until = time.map_or(FOR_EVER, |time| now.plus(time).0.min(FOR_EVER));
        self.slot(source).set(mode, source, until);
    }

    /// From now on that one says nothing.
    pub fn clear(&self, source: ModeSource) {
        self.slot(source).0.store(0, Ordering::Relaxed);
    }

    fn slot(&self, source: ModeSource) -> &ModeSlot {
        match source {
            ModeSource::Local => &self.local,
            ModeSource::Fleet => &self.fleet,
            ModeSource::Environment | ModeSource::File | ModeSource::Default => &self.configured,
        }
    }

    /// The mode now: three atomic loads.
    pub fn mode(&self, now: Tick) -> Mode {
        self.in_force(now).map_or(Mode::Normal, |said| said.0)
    }

    /// The mode, and why.
    pub fn state(&self, now: Tick) -> ModeState {
        let (mode, source, until) = self.in_force(now).unwrap_or((Mode::Normal, ModeSource::Default, FOR_EVER));
        ModeState { mode, source, for_ms: (until != FOR_EVER).then(|| until.saturating_sub(now.0)) }
    }

    fn in_force(&self, now: Tick) -> Option<(Mode, ModeSource, u64)> {
        self.local.get(now).or_else(|| self.fleet.get(now)).or_else(|| self.configured.get(now))
    }
}

/// Set for ever, as good as.
const FOR_EVER: u64 = u64::MAX >> 5;

/// What one of them says: `until << 5 | source << 2 | mode + 1`, `until` in ticks; 0: nothing.
#[derive(Debug, Default)]
struct ModeSlot(AtomicU64);

impl ModeSlot {
    fn set(&self, mode: Mode, source: ModeSource, until: u64) {
        self.0.store(until << 5 | (source as u64) << 2 | (mode as u64 + 1), Ordering::Relaxed);
    }

    fn get(&self, now: Tick) -> Option<(Mode, ModeSource, u64)> {
        let said = self.0.load(Ordering::Relaxed);
        if said == 0 {
            return None;
        }
        let until = said >> 5;
        let mode = *Mode::ALL.get(usize::try_from((said & 3) - 1).unwrap_or(0))?;
        let source = *ModeSource::ALL.get(usize::try_from(said >> 2 & 7).unwrap_or(0))?;
        (now.0 < until).then_some((mode, source, until))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_set_by_hand_counts_for_its_time() {
        let switch = ModeSwitch::new(Mode::Normal, ModeSource::Default);
        assert_eq!(switch.mode(Tick(0)), Mode::Normal);
        switch.set(Mode::Bypass, ModeSource::Local, Tick(1000), Some(Duration::from_secs(5)));
        assert_eq!((switch.mode(Tick(5999)), switch.mode(Tick(6000))), (Mode::Bypass, Mode::Normal));
        let state = ModeState { mode: Mode::Bypass, source: ModeSource::Local, for_ms: Some(4000) };
        assert_eq!(switch.state(Tick(2000)), state);
        switch.set(Mode::Shadow, ModeSource::Local, Tick(1000), None);
        assert_eq!(switch.mode(Tick(u64::MAX >> 6)), Mode::Shadow);
        switch.clear(ModeSource::Local);
        assert_eq!(switch.mode(Tick(1000)), Mode::Normal);
    }

    #[test]
    fn this_sidecar_counts_before_the_fleet_and_both_before_the_configuration() {
        let switch = ModeSwitch::new(Mode::Shadow, ModeSource::Environment);
        let state = |mode, source| ModeState { mode, source, for_ms: None };
        assert_eq!(switch.state(Tick(0)), state(Mode::Shadow, ModeSource::Environment));
        switch.set(Mode::Bypass, ModeSource::Fleet, Tick(0), None);
        assert_eq!(switch.state(Tick(1)), state(Mode::Bypass, ModeSource::Fleet));
        switch.set(Mode::Normal, ModeSource::Local, Tick(0), None);
        assert_eq!(switch.state(Tick(1)), state(Mode::Normal, ModeSource::Local));
        switch.clear(ModeSource::Local);
        switch.clear(ModeSource::Fleet);
        assert_eq!(switch.state(Tick(1)), state(Mode::Shadow, ModeSource::Environment));
    }
}
