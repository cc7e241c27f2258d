//! The C symbols of the library: SQL functions and the entry points of background
//! workers.
//!
//! A database in which `CREATE EXTENSION pg_prewarm` was run with contrib's module has
//! the names of contrib's C functions in its catalogs, and has to keep working when only
//! the library is replaced. pgrx exports functions under names of its own, so they are
//! exported here again: contrib's under the names that contrib uses, new ones under
//! their SQL names.

use pgrx::{pg_guard, pg_sys};

use crate::pg::shared::parallel::TableOfContents;

/// Exports an SQL function under a C name, with the `pg_finfo_` record that tells the
/// server its calling convention.
macro_rules! export {
    ($name:literal, $finfo:literal, $wrapper:path) => {
        const _: () = {
            #[unsafe(export_name = $finfo)]
            extern "C" fn finfo() -> &'static pg_sys::Pg_finfo_record {
                const RECORD: pg_sys::Pg_finfo_record = pg_sys::Pg_finfo_record { api_version: 1 };
                &RECORD
            }

            #[unsafe(export_name = $name)]
            unsafe extern "C-unwind" fn call(fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
                // SAFETY: the server passes valid call information for this function, which
                // the wrapper gets unchanged. Nothing in this frame needs dropping.
                unsafe {
                    crate::pg::process::reserve::with_reserve_for_call(fcinfo, || $wrapper(fcinfo))
                }
            }
        };
    };
}

export!(
    "pg_prewarm",
    "pg_finfo_pg_prewarm",
    crate::prewarm::pg_prewarm_wrapper
);
export!(
    "pg_prewarm_relation",
    "pg_finfo_pg_prewarm_relation",
    crate::prewarm::pg_prewarm_relation_wrapper
);
export!(
    "pg_prewarm_schema",
    "pg_finfo_pg_prewarm_schema",
    crate::prewarm::pg_prewarm_schema_wrapper
);
export!(
    "pg_prewarm_database",
    "pg_finfo_pg_prewarm_database",
    crate::prewarm::pg_prewarm_database_wrapper
);
export!(
    "autoprewarm_start_worker",
    "pg_finfo_autoprewarm_start_worker",
    crate::autoprewarm::sql::autoprewarm_start_worker_wrapper
);
export!(
    "autoprewarm_dump_now",
    "pg_finfo_autoprewarm_dump_now",
    crate::autoprewarm::sql::autoprewarm_dump_now_wrapper
);
export!(
    "autoprewarm_load_now",
    "pg_finfo_autoprewarm_load_now",
    crate::autoprewarm::sql::autoprewarm_load_now_wrapper
);
export!(
    "autoprewarm_cancel",
    "pg_finfo_autoprewarm_cancel",
    crate::autoprewarm::sql::autoprewarm_cancel_wrapper
);
export!(
    "autoprewarm_wait",
    "pg_finfo_autoprewarm_wait",
    crate::autoprewarm::sql::autoprewarm_wait_wrapper
);
export!(
    "pg_stat_get_autoprewarm",
    "pg_finfo_pg_stat_get_autoprewarm",
    crate::autoprewarm::views::pg_stat_get_autoprewarm_wrapper
);
export!(
    "pg_stat_get_progress_prewarm",
    "pg_finfo_pg_stat_get_progress_prewarm",
    crate::autoprewarm::views::pg_stat_get_progress_prewarm_wrapper
);
export!(
    "autoprewarm_follow_now",
    "pg_finfo_autoprewarm_follow_now",
    crate::autoprewarm::follow::sql::autoprewarm_follow_now_wrapper
);
export!(
    "autoprewarm_failover_ready",
    "pg_finfo_autoprewarm_failover_ready",
    crate::autoprewarm::follow::sql::autoprewarm_failover_ready_wrapper
);
export!(
    "pg_stat_get_autoprewarm_follow",
    "pg_finfo_pg_stat_get_autoprewarm_follow",
    crate::autoprewarm::follow::sql::pg_stat_get_autoprewarm_follow_wrapper
);
export!(
    "autoprewarm_blocks",
    "pg_finfo_autoprewarm_blocks",
    crate::autoprewarm::list::autoprewarm_blocks_wrapper
);

/// The entry point of the leader.
///
/// # Safety
/// The server calls it once, as the main function of a background worker.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn autoprewarm_main(_argument: pg_sys::Datum) {
    #[pg_guard]
    extern "C-unwind" fn main() {
        crate::autoprewarm::leader::main();
    }
    // SAFETY: the server calls this function directly, and nothing in its frame needs
    // dropping.
    unsafe { crate::pg::process::reserve::with_reserve(|| main()) };
}

/// The entry point of per-database workers.
///
/// # Safety
/// The server calls it once, as the main function of a background worker, with the
/// argument that the worker was registered with.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn autoprewarm_database_main(argument: pg_sys::Datum) {
    #[pg_guard]
    extern "C-unwind" fn main(argument: pg_sys::Datum) {
        crate::autoprewarm::worker::main((argument.value() as u64).into());
    }
    // SAFETY: the server calls this function directly, and nothing in its frame needs
    // dropping.
    unsafe { crate::pg::process::reserve::with_reserve(|| main(argument)) };
}

/// The entry point of the worker that fetches the list of the upstream server.
///
/// # Safety
/// The server calls it once, as the main function of a background worker, with the
/// argument that the worker was registered with.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn autoprewarm_fetch_main(argument: pg_sys::Datum) {
    #[pg_guard]
    extern "C-unwind" fn main(argument: pg_sys::Datum) {
        crate::autoprewarm::follow::fetch_main((argument.value() as u64).into());
    }
    // SAFETY: the server calls this function directly, and nothing in its frame needs
    // dropping.
    unsafe { crate::pg::process::reserve::with_reserve(|| main(argument)) };
}

/// The entry point of the parallel workers of a call.
///
/// # Safety
/// The server calls it in a parallel worker, with the table of contents that the
/// launching process made.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn pg_prewarm_parallel_main(
    _segment: *mut pg_sys::dsm_segment,
    toc: *mut pg_sys::shm_toc,
) {
    /// An unwinding ERROR becomes PostgreSQL's own again here, as in an SQL function's
    /// wrapper.
    #[pg_guard]
    unsafe extern "C-unwind" fn main(toc: *mut pg_sys::shm_toc) {
        // SAFETY: `toc` is passed on as the server has given it to the entry point.
        unsafe { crate::prewarm::job::worker_main(&TableOfContents(toc)) };
    }
    // SAFETY: the server calls this function directly, and nothing in its frame needs
    // dropping.
    unsafe { crate::pg::process::reserve::with_reserve(|| main(toc)) };
}
