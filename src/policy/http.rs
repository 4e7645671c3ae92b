//! HTTP semantics and caching: RFC 9110, RFC 9111, RFC 9112 and RFC 9213, as pure functions of requests and responses.

pub mod cache_control;
pub mod conditional;
pub mod date;
pub mod freshness;
pub mod hop_by_hop;
pub mod incomplete;
pub mod link_rewrite;
pub mod list_field;
pub mod range;
pub mod request_guard;
pub mod request_view;
pub mod storage;
pub mod targeted_cache_control;
pub mod vary;
