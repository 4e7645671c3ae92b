//! Invalidation: the ledger of purges, and the tags and targets that purges name.

pub mod ledger;
pub mod log_position;
pub mod tag;
