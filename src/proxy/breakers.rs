//! One breaker for each host of an upstream.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::policy::Tick;
use crate::policy::circuit::{Circuit, Tolerance};

/// So many hosts are remembered; then those that are well are forgotten.
const MAX_HOSTS: usize = 10_000;

/// The breakers, by host and port.
#[derive(Debug, Default)]
pub struct Breakers(Mutex<HashMap<Box<str>, Circuit>>);

impl Breakers {
    fn lock(&self) -> MutexGuard<'_, HashMap<Box<str>, Circuit>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// May a request go to this host? If not: when the next may try.
    pub fn admits(&self, host: &str, tolerance: Tolerance, now: Tick) -> Result<(), Duration> {
        self.lock().get_mut(host).map_or(Ok(()), |circuit| circuit.admits(tolerance, now))
    }

    /// Changes the breaker of a host.
    pub fn with<T>(&self, host: &str, change: impl FnOnce(&mut Circuit) -> T) -> T {
        let mut all = self.lock();
        if let Some(circuit) = all.get_mut(host) {
            return change(circuit);
        }
        if all.len() >= MAX_HOSTS {
            all.retain(|_, circuit| circuit.name() != "closed");
        }
        change(all.entry(host.into()).or_default())
    }

    /// When the next request to this host may try, if none may now.
    pub fn opens_in(&self, host: &str, now: Tick) -> Option<Duration> {
        self.lock().get(host).and_then(|circuit| circuit.opens_in(now))
    }

    /// The hosts that are not asked now, or only tried.
    pub fn open(&self) -> Vec<(String, &'static str)> {
        let all = self.lock();
        let open = all.iter().filter(|(_, circuit)| circuit.name() != "closed");
        open.map(|(host, circuit)| (host.to_string(), circuit.name())).collect()
    }
}
