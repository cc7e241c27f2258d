//! The server: PostgreSQL's API as small safe types.
//!
//! Everything that calls into PostgreSQL lies here, each resource as a type that
//! owns it, and every difference between major versions in [`compat`]. What is
//! done with it, and when, is decided by the callers: there is no policy here.
//!
//! A PostgreSQL ERROR arrives in Rust as a panic that unwinds to [`error::catch`]
//! or to the entry point that PostgreSQL called. A `Drop` that ran into a second
//! ERROR on the way would abort the server, so those that call PostgreSQL do
//! nothing while a panic unwinds: the end of the transaction lets go of what they
//! held.

pub mod activity;
// A test's own program has no server to end with.
#[cfg(not(test))]
mod allocator;
pub mod btree;
pub mod buffer;
mod compat;
pub mod database;
pub mod dsm;
pub mod error;
mod ffi;
pub mod file;
pub mod memory;
pub mod parallel;
pub mod process;
pub mod relation;
pub mod shmem;
#[cfg(any(test, feature = "pg_test"))]
mod tests;
pub mod transaction;
pub mod worker;
