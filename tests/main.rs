//! Integration tests, one module per topic, in one binary so that the crate is linked once.

mod support;

mod admin;
mod architecture;
mod budget;
mod caching;
mod canary;
mod coalescing;
mod config;
mod deadline;
mod docs;
mod explain;
mod fallback;
mod fleet;
mod fleet_faults;
mod framing;
mod limits;
mod malformed;
mod model;
mod modes;
mod protocols;
mod redis;
mod redis_outage;
mod reload;
mod rfc9111;
mod shopify;
mod shutdown;
mod staleness;
mod tenants;
mod tools;
mod topologies;
#[cfg(feature = "otlp")]
mod traces;
mod upstream_http2;
mod writes;
