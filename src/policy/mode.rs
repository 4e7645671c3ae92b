//! The operating mode (normal, bypass, shadow) and its sources.
//!
//! A mode that an operator sets on this sidecar takes precedence over one set for the fleet, then the environment,
//! then the configuration file.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::Tick;

/// How the sidecar handles requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// All features are active.
    #[default]
    Normal,
    /// The kill switch: all requests are passed through, without lookup, storing, coalescing, pacing, deadline or
    /// fallback. Invalidations are still processed, so that no outdated entry is served after bypass ends.
    Bypass,
    /// All requests are passed through, and the responses compared with those that the cache would have served.
    Shadow,
}

impl Mode {
    /// All modes.
    pub const ALL: [Mode; 3] = [Mode::Normal, Mode::Bypass, Mode::Shadow];

    /// Returns the mode's name.
    pub fn token(self) -> &'static str {
        match self {
            Mode::Normal => "normal",
            Mode::Bypass => "bypass",
            Mode::Shadow => "shadow",
        }
    }

    /// Returns the mode with this name, if there is one.
    pub fn of(token: &str) -> Option<Mode> {
        Mode::ALL.into_iter().find(|mode| mode.token() == token)
    }
}

/// The source of the mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ModeSource {
    /// Set by an operator on this sidecar.
    Local,
    /// Set by an operator for all sidecars that share a Redis.
    Fleet,
    /// The environment variable `SIDECACHE_MODE`.
    Environment,
    /// The configuration file.
    File,
    /// The built-in default: no source sets a mode.
    #[default]
    Default,
}

impl ModeSource {
    const ALL: [ModeSource; 5] =
        [ModeSource::Local, ModeSource::Fleet, ModeSource::Environment, ModeSource::File, ModeSource::Default];

    /// Returns the source's name.
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

/// The modes set by each source, from which the effective one is computed.
#[derive(Debug, Default)]
pub struct ModeSwitch {
    local: ModeSlot,
    fleet: ModeSlot,
    configured: ModeSlot,
}

/// The effective mode, as displayed to operators.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModeState {
    /// The effective mode.
    pub mode: Mode,
    /// The source that sets it.
    pub source: ModeSource,
    /// Milliseconds until it expires and the next source applies, if it was set for a limited time.
    pub for_ms: Option<u64>,
}

impl ModeSwitch {
    /// Creates a switch with the configured mode.
    pub fn new(configured: Mode, source: ModeSource) -> ModeSwitch {
        let switch = ModeSwitch::default();
        switch.configure(configured, source);
        switch
    }

    /// Replaces the configured mode, when the configuration is reloaded.
    pub fn configure(&self, configured: Mode, source: ModeSource) {
        self.configured.set(configured, source, FOR_EVER);
    }

    /// Sets the mode for `time`, or until it is set again or cleared if `None`. `source` is local or fleet.
    pub fn set(&self, mode: Mode, source: ModeSource, now: Tick, time: Option<Duration>) {
        let until = time.map_or(FOR_EVER, |time| now.plus(time).0.min(FOR_EVER));
        self.slot(source).set(mode, source, until);
    }

    /// Clears the mode set by `source`.
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

    /// Returns the effective mode. Costs at most three atomic loads.
    pub fn mode(&self, now: Tick) -> Mode {
        self.in_force(now).map_or(Mode::Normal, |packed| packed.0)
    }

    /// Returns the effective mode, its source and the time until it expires.
    pub fn state(&self, now: Tick) -> ModeState {
        let (mode, source, until) = self.in_force(now).unwrap_or((Mode::Normal, ModeSource::Default, FOR_EVER));
        ModeState { mode, source, for_ms: (until != FOR_EVER).then(|| until.saturating_sub(now.0)) }
    }

    fn in_force(&self, now: Tick) -> Option<(Mode, ModeSource, u64)> {
        self.local.get(now).or_else(|| self.fleet.get(now)).or_else(|| self.configured.get(now))
    }
}

/// The expiry of a mode without a time limit: the largest tick that fits a [`ModeSlot`].
const FOR_EVER: u64 = u64::MAX >> 5;

/// The mode set by one source, as `until << 5 | source << 2 | mode + 1` with `until` in ticks; 0 if none is set.
#[derive(Debug, Default)]
struct ModeSlot(AtomicU64);

impl ModeSlot {
    fn set(&self, mode: Mode, source: ModeSource, until: u64) {
        self.0.store(until << 5 | (source as u64) << 2 | (mode as u64 + 1), Ordering::Relaxed);
    }

    fn get(&self, now: Tick) -> Option<(Mode, ModeSource, u64)> {
        let packed = self.0.load(Ordering::Relaxed);
        if packed == 0 {
            return None;
        }
        let until = packed >> 5;
        let mode = *Mode::ALL.get(usize::try_from((packed & 3) - 1).unwrap_or(0))?;
        let source = *ModeSource::ALL.get(usize::try_from(packed >> 2 & 7).unwrap_or(0))?;
        (now.0 < until).then_some((mode, source, until))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn local_mode_applies_until_its_duration_ends_or_it_is_cleared() {
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
    fn local_mode_overrides_fleet_mode_and_both_override_the_initial_mode() {
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
