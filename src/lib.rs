//! x
pub mod config;
pub mod policy;
