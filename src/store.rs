//! Where entries are kept. In this version: memory.

pub mod memory;

pub use memory::Memory;
