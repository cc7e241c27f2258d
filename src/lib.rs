//! Brings a restarted PostgreSQL server back warm: a drop-in replacement for
//! contrib's `pg_prewarm`.
//!
//! This file is the door. What users asked for lies in `prewarm` and
//! `autoprewarm`, what is pure computation in the crate `pg_prewarm_blocks`, and
//! everything that calls PostgreSQL in `pg`. `ARCHITECTURE.md` tells the whole story.

use pg_prewarm_blocks as blocks;
use pgrx::pg_guard;

mod abi;
mod autoprewarm;
mod error;
mod pace;
mod pg;
mod prewarm;
mod settings;

#[cfg(not(panic = "unwind"))]
compile_error!("a PostgreSQL ERROR unwinds through Rust: build with panic = \"unwind\"");

// The package's, by which `pg_get_loaded_modules()` of 18 and later tells this library
// from contrib's.
pgrx::pg_module_magic!(name, version);

// A fresh 2.0 is what 1.2 had and what the update adds.
pgrx::extension_sql_file!(
    "../sql/pg_prewarm--1.2--2.0.sql",
    name = "new_in_2_0",
    finalize
);

/// PostgreSQL calls it when it loads the library: once in the postmaster, where
/// `shared_preload_libraries` names it; in each process that uses it, otherwise.
#[pg_guard]
pub extern "C-unwind" fn _PG_init() {
    settings::define();
    if pg::process::is_preloading() {
        autoprewarm::prepare_with_server();
    }
}

/// What `cargo pgrx test` asks for.
#[cfg(test)]
pub mod pg_test {
    pub fn setup(_options: Vec<&str>) {}

    #[must_use]
    pub fn postgresql_conf_options() -> Vec<&'static str> {
        vec!["shared_preload_libraries = 'pg_prewarm'"]
    }
}
