//! The server's symbols and structures, as each major version has them.
//!
//! Nothing here uses the rest of the library, except for the core's plain types.
//! All version conditionals, `#[cfg(feature = "pg…")]`, are in this directory. They name
//! the older versions, so that a new one is like the newest.

pub mod authentication;
pub mod buffer_state;
pub mod ffi;
pub mod read;
pub mod shmem;
pub mod signal;
pub mod version;
pub mod walreceiver;
