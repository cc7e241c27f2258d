//! The server: PostgreSQL's API as small safe types. It knows no list, plan or SQL
//! function.
//!
//! Four modules. Each uses only those above it in this table; `shared` and `storage` do
//! not use each other.
//!
//! | module | what it has |
//! | --- | --- |
//! | [`sys`] | symbols and structures of the server, and all differences between its major versions |
//! | [`process`] | this process: errors, memory, transactions, signals, its latch, its status reports |
//! | [`shared`] | memory that processes share, background workers, parallel workers |
//! | [`storage`] | relations, buffers, catalogs, files, and reading |
//!
//! A PostgreSQL ERROR arrives in Rust as a panic. It unwinds to
//! [`process::error::catch`], or to the entry point that PostgreSQL called. A second
//! ERROR during that would abort the server. So a `Drop` that calls PostgreSQL does
//! nothing while a panic unwinds: the end of the transaction releases what was held.

pub mod process;
pub mod shared;
pub mod storage;
mod sys;
#[cfg(any(test, feature = "pg_test"))]
mod tests;
