//! Block lists: what is read from `autoprewarm.blocks`, planned, and written there.
//!
//! A list goes one way: [`BlockList`] holds the records of the file, with the usage
//! count that each block had; [`Plan`] chooses and orders what is loaded, and lays it
//! out for shared memory; [`ListWriter`] writes the next file from what is cached and
//! what is [`Carried`], since the load has left it.
//! [`ListReader`] hands out the records one by one, for those who only want to look.
//!
//! Nothing here calls PostgreSQL, so that all of it runs under plain `cargo test` and
//! under a fuzzer.
//!
//! All memory is asked for in ways that can fail: where an allocator refuses some,
//! the result is an error that says so, never the end of the process.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod carried;
mod hottest;
mod list;
mod parser;
mod plan;
mod reader;
mod record;
mod skip;
mod trailer;
mod writer;

pub use carried::{Carried, CarriedBuilder};
pub use list::{BlockList, Entry, FileFork};
pub use parser::ReadError;
pub use plan::{
    CHUNK_BLOCKS, Chunk, ChunkBlocks, DatabasePlan, OverBudget, Plan, PlanError, PlanView,
};
pub use reader::ListReader;
pub use record::{Age, BlockNumber, CarriedCounts, Fork, Oid, Record, UsageCount};
pub use skip::{SkipCounts, SkipReason};
pub use trailer::UsageCounts;
pub use writer::{ListWriter, WriteError};
