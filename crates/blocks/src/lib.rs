//! Block lists: reading, planning and writing `autoprewarm.blocks`.
//!
//! A list flows in one direction: [`BlockList`] holds the records of the file and the
//! usage count of each block; [`Plan`] chooses and orders the blocks to load, and lays
//! them out for shared memory; [`ListWriter`] writes the next file from what is cached and
//! what is [`Carried`], since the load has left it.
//! [`ListReader`] returns the records one by one, without a list in memory.
//! [`UpstreamList`] is a list that a standby has fetched from its upstream server, in a
//! format of its own.
//!
//! Nothing here calls PostgreSQL, so all of it runs under plain `cargo test` and under
//! a fuzzer.
//!
//! All memory is requested in ways that can fail: if the allocator refuses a request,
//! the result is an error, and the process goes on.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

/// The name of the file, in the data directory.
pub const DUMP_FILE: &str = "autoprewarm.blocks";

mod carried;
mod list;
mod parser;
mod plan;
mod rank;
mod reader;
mod record;
mod room;
mod skip;
mod sort;
mod trailer;
mod upstream;
mod writer;

pub use carried::{Carried, CarriedBuilder};
pub use list::{BlockList, Entry, FileFork};
pub use parser::ReadError;
pub use plan::{
    CHUNK_BLOCKS, Chunk, ChunkBlocks, DatabasePlan, OverBudget, Plan, PlanError, PlanView,
};
pub use reader::ListReader;
pub use record::{Age, BlockNumber, CarriedCounts, Fork, Oid, Record, UsageCount};
pub use room::{Budget, ByUsageCount, Room};
pub use skip::{SkipCounts, SkipReason};
pub use trailer::UsageCounts;
pub use upstream::{Announced, Origin, UpstreamError, UpstreamList, UpstreamListBuilder};
pub use writer::{ListWriter, WriteError};
