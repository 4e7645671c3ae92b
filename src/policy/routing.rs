//! Routing: from a request to its rule, its origin, and its cache key.

pub mod cache_key;
pub mod key_headers;
pub mod origin;
pub mod pattern;
pub mod router;
pub mod rule;
pub mod target;
