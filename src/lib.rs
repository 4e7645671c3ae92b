//! `sidecache`: a caching sidecar in front of a slow, rate-limited HTTP API.
//!
//! # Life of a request
//!
//! 1. A listener accepts it and the guard looks at it: [`server`].
//! 2. [`proxy::Proxy::handle`] takes it from there, one step after the other:
//!    which rule is for it ([`policy::route`]), by which key it is known ([`policy::key`]), what is stored
//!    under that key ([`proxy::lookup`], [`store`]), and whether that may be served ([`policy::freshness`]).
//! 3. A hit is answered at once ([`proxy::respond`]). A miss boards the one flight for its key
//!    ([`proxy::wait`], [`proxy::flights`]), which asks the API ([`proxy::fetch`], [`upstream`]), decides
//!    whether the answer is stored ([`policy::storage`]) and streams it to all who wait ([`body::fanout`]).
//!    With Redis, a flight first looks at what the fleet has, and asks who fetches ([`proxy::fleet`], [`fleet`],
//!    [`redis`]).
//! 4. When nothing comes in time, or nothing good, the request goes down the ladder ([`proxy::fallback`]).
//! 5. What happened is one [`policy::outcome::Outcome`]: it becomes `Cache-Status`, a log line and counters
//!    ([`telemetry`]).
//!
//! [`app`] puts it all together; [`cli`] is what people type.

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
pub mod server;
pub mod store;
pub mod telemetry;
pub mod tls;
pub mod upstream;
