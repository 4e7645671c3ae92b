//! Cache storage: the memory tier, and optionally behind it a Redis tier shared by the fleet.

pub mod authentication;
pub mod compression;
mod incomplete_responses;
mod intern;
pub mod memory;
pub mod record;
mod record_store;
pub mod redis_tier;
mod scan;
mod write_behind;

pub use incomplete_responses::IncompleteResponses;
pub use memory::Memory;
pub use redis_tier::RedisTier;
