//! The core: block lists, without PostgreSQL.
//!
//! A list travels one way: [`list`] holds what the [`parser`] reads of the text of
//! `autoprewarm.blocks`, with the [`trailer`] that says how hot each block was;
//! [`plan`] chooses and orders what is loaded and lays it out for shared memory;
//! and [`writer`] makes the next file from what is cached. Who only wants to look
//! reads it record by record with [`reader`]. Nothing here calls the server, so that all of it runs
//! under plain `cargo test` and under a fuzzer.
#![forbid(unsafe_code)]

pub mod list;
mod parser;
pub mod plan;
pub mod reader;
mod record;
pub mod room;
mod skip;
pub mod trailer;
pub mod writer;

pub use record::{BlockNumber, Fork, Heat, Oid, Record};
pub use skip::{SkipCounts, SkipReason};
