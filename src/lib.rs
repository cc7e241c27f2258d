//! Brings a restarted PostgreSQL server back warm: a drop-in replacement for
//! contrib's `pg_prewarm`.
//!
//! This file has the entry point that PostgreSQL calls when it loads the library. The
//! features are in `prewarm` and `autoprewarm`, the parts that need no PostgreSQL in
//! `blocks`, and all calls of PostgreSQL in `pg`. `ARCHITECTURE.md` describes how they
//! work together.

use pg_prewarm_blocks as blocks;
use pgrx::pg_guard;

mod abi;
mod autoprewarm;
mod error;
mod pace;
mod pg;
mod prewarm;
mod progress;
mod settings;
mod wait_events;

#[cfg(not(panic = "unwind"))]
compile_error!("a PostgreSQL ERROR unwinds through Rust: build with panic = \"unwind\"");

// The package's, by which `pg_get_loaded_modules()` of 18 and later tells this library
// from contrib's.
pgrx::pg_module_magic!(name, version);

// For cargo-pgrx: a fresh 2.0 consists of the functions of 1.2 and the update script.
pgrx::extension_sql_file!(
    "../sql/pg_prewarm--1.2--2.0.sql",
    name = "new_in_2_0",
    finalize
);

/// Defines the parameters, and registers the leader. PostgreSQL calls it when it loads
/// the library: in the postmaster if the library is in `shared_preload_libraries`,
/// otherwise in each process that uses it.
#[pg_guard]
pub extern "C-unwind" fn _PG_init() {
    settings::define();
    autoprewarm::follow::define_list_setting();
    if pg::process::is_preloading() {
        autoprewarm::prepare_with_server();
    }
}

/// The hooks that `cargo pgrx test` requires.
#[cfg(test)]
pub mod pg_test {
    pub fn setup(_options: Vec<&str>) {}

    #[must_use]
    pub fn postgresql_conf_options() -> Vec<&'static str> {
        vec!["shared_preload_libraries = 'pg_prewarm'"]
    }
}
