//! x
pub mod body;
pub mod clock;
pub mod config;
pub mod policy;
pub mod proxy;
pub mod store;
pub mod telemetry;
pub mod upstream;
