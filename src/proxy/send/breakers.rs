//! Circuit breakers of an upstream: one for each host.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::policy::Tick;
use crate::policy::resilience::circuit_breaker::{BreakerConfig, CircuitBreaker};

/// Hosts with a breaker. Beyond that, closed breakers are dropped.
const MAX_HOSTS: usize = 10_000;

/// Circuit breakers by host and port.
#[derive(Debug, Default)]
pub struct Breakers(Mutex<HashMap<Box<str>, CircuitBreaker>>);

impl Breakers {
    fn lock(&self) -> MutexGuard<'_, HashMap<Box<str>, CircuitBreaker>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Admits a request to a host, or returns the time until the next probe.
    pub fn admit(&self, host: &str, config: &BreakerConfig, now: Tick) -> Result<(), Duration> {
        self.lock().get_mut(host).map_or(Ok(()), |breaker| breaker.admit(config, now))
    }

    /// Calls `change` with the breaker of a host.
    pub fn with<T>(&self, host: &str, change: impl FnOnce(&mut CircuitBreaker) -> T) -> T {
        let mut all = self.lock();
        if let Some(breaker) = all.get_mut(host) {
            return change(breaker);
        }
        if all.len() >= MAX_HOSTS {
            all.retain(|_, breaker| !breaker.is_closed());
        }
        change(all.entry(host.into()).or_default())
    }

    /// Returns the time until the next probe of a host, if requests to it are refused now.
    pub fn refuses_for(&self, host: &str, config: &BreakerConfig, now: Tick) -> Option<Duration> {
        self.lock().get(host).and_then(|breaker| breaker.refuses_for(config, now))
    }

    /// Returns the hosts whose breaker is not closed, with its state.
    pub fn open(&self) -> Vec<(String, &'static str)> {
        let all = self.lock();
        let open = all.iter().filter(|(_, breaker)| !breaker.is_closed());
        open.map(|(host, breaker)| (host.to_string(), breaker.name())).collect()
    }
}
