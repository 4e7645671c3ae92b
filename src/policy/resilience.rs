//! Protection of an upstream: circuit breaker, retries, budget, and the failures that they react to.

pub mod backoff;
pub mod budget;
pub mod circuit_breaker;
pub mod failure;
pub mod retry;
