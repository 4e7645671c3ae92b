//! Where entries are kept: in memory, and behind it, if the operator wishes, in a Redis that the fleet shares.

mod alike;
mod behind;
pub mod memory;
pub mod pack;
mod partials;
mod records;
pub mod seal;
pub mod shared;
mod walk;
pub mod wire;

pub use memory::Memory;
pub use partials::Partials;
pub use shared::Shared;
