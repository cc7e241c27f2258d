//! The server's symbols and structures, as each major version has them.
//!
//! Nothing here uses the rest of the library, except for the core's plain types.
//! Every `#[cfg(feature = "pg…")]` stands in this folder: a new major version of
//! PostgreSQL begins here.

pub mod buffer_state;
pub mod ffi;
pub mod read;
pub mod shmem;
pub mod signal;
pub mod version;
