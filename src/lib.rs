//! A caching sidecar: a transparent HTTP reverse proxy in front of a slow, rate-limited HTTP API.
//!
//! # Life of a request
//!
//! 1. [`server`] accepts the connection, parses the request, and rejects what must not go further
//!    ([`policy::http::request_guard`]).
//! 2. [`proxy::Proxy::handle`] runs the pipeline: it locates the origin ([`policy::routing::origin`]), chooses the rule
//!    ([`policy::routing::router`]), builds the cache key ([`policy::routing::cache_key`]), looks the key up in memory
//!    (`proxy/lookup.rs`, [`store`]), and evaluates the freshness of what is stored ([`policy::http::freshness`]).
//! 3. A hit is returned at once ([`proxy::respond`]). A miss joins the one running fetch for its key
//!    (`proxy/miss.rs`, [`proxy::fetch::coalesce`]). The fetch sends the request ([`proxy::send`], [`upstream`]), decides
//!    whether the response is stored ([`policy::http::storage`]), and streams it to all followers ([`body::fanout`]).
//!    With Redis, the fetch first reads the record that the fleet shares, and takes a lease (`proxy/fetch/fleet.rs`,
//!    [`fleet`], [`redis`]).
//! 4. If no response arrives in time, or the upstream fails, the request gets a stale entry, the rule's fallback, or an
//!    error (`proxy/fallback.rs`).
//! 5. The result is one [`policy::outcome::Outcome`], which becomes `Cache-Status`, a log line and counters
//!    ([`telemetry`]).
//!
//! [`app`] assembles the process; [`cli`] is its command line.

pub mod admin;
pub mod app;
pub mod body;
pub mod cli;
pub mod clock;
pub mod config;
#[cfg(feature = "demo")]
pub mod demo;
pub mod fleet;
pub mod policy;
pub mod process;
pub mod proxy;
pub mod redis;
pub mod secret;
pub mod server;
pub mod store;
pub mod telemetry;
pub mod tls;
pub mod upstream;
