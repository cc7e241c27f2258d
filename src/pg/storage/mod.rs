//! Relations and their blocks: in catalogs, in buffers, in files; and reading them.

pub mod btree;
pub mod buffer;
pub mod catalog;
pub mod database;
pub mod file;
mod fills;
pub mod prefault;
mod read;
mod read_ahead;
pub mod relation;
pub mod room;
pub mod segments;

pub use read::ReadEnd;

/// The size of a block in bytes.
pub const BLOCK_SIZE: u32 = pgrx::pg_sys::BLCKSZ;

pub use super::sys::read::{READ_BLOCKS_MAX, READS_MANY_AT_ONCE};
pub use super::sys::version::reads_directly;
