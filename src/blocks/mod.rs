//! The core: block lists, without PostgreSQL.
//!
//! A list travels one way: [`list`] reads the text of `autoprewarm.blocks` into
//! [`Record`]s, [`plan`] sorts them into the order they will be loaded in and
//! lays them out for shared memory, and [`writer`] makes the next file from what
//! is cached. Nothing here calls the server, so that all of it runs under plain
//! `cargo test` and under a fuzzer.
#![forbid(unsafe_code)]

pub mod list;
pub mod plan;
mod record;
mod skip;
pub mod writer;

pub use record::{BlockNumber, Fork, Oid, Record};
pub use skip::{SkipCounts, SkipReason};
