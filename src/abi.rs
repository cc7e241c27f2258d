//! The C symbols that the catalogs of databases point at.
//!
//! A database where somebody once said `CREATE EXTENSION pg_prewarm` holds the
//! names of contrib's C functions, and must go on working when only the library
//! changes. So the functions, which pgrx exports under names of its own, are
//! exported here under contrib's; new ones likewise, under the names that they
//! have in SQL; and so are the entry points of the workers, which the server finds
//! by name as well.

use pgrx::{pg_guard, pg_sys};

/// Exports an SQL function of ours under a C name, with the record by which the
/// server knows how to call it.
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
                // SAFETY: the server calls both with the same promise.
                unsafe { crate::pg::process::error::with_reserve(|| $wrapper(fcinfo)) }
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
    "autoprewarm_blocks",
    "pg_finfo_autoprewarm_blocks",
    crate::autoprewarm::list::autoprewarm_blocks_wrapper
);

/// Where the leader begins.
///
/// # Safety
/// The server calls it, as the whole of a process.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn autoprewarm_main(_argument: pg_sys::Datum) {
    #[pg_guard]
    extern "C-unwind" fn main() {
        crate::autoprewarm::leader::main();
    }
    // SAFETY: nothing here needs dropping.
    unsafe { crate::pg::process::error::with_reserve(|| main()) };
}

/// Where a per-database worker begins.
///
/// # Safety
/// The server calls it, as the whole of a process, with the worker's argument.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn autoprewarm_database_main(argument: pg_sys::Datum) {
    #[pg_guard]
    extern "C-unwind" fn main(argument: pg_sys::Datum) {
        crate::autoprewarm::worker::main((argument.value() as u64).into());
    }
    // SAFETY: nothing here needs dropping.
    unsafe { crate::pg::process::error::with_reserve(|| main(argument)) };
}

/// Where a parallel worker of a call begins.
///
/// # Safety
/// The server gives it the table of contents that the call's own process made.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn pg_prewarm_parallel_main(
    _segment: *mut pg_sys::dsm_segment,
    toc: *mut pg_sys::shm_toc,
) {
    /// An ERROR leaves Rust here, as it does in an SQL function's wrapper.
    #[pg_guard]
    unsafe extern "C-unwind" fn main(toc: *mut pg_sys::shm_toc) {
        // SAFETY: the server's promise.
        unsafe { crate::prewarm::job::worker_main(toc) };
    }
    // SAFETY: nothing here needs dropping.
    unsafe { crate::pg::process::error::with_reserve(|| main(toc)) };
}
