//! This process: what it is, what it waits for, what it reports, and how it fails.

use std::ffi::CStr;
use std::num::NonZero;
use std::sync::LazyLock;
use std::thread::available_parallelism;

use pgrx::{pg_guard, pg_sys};

pub mod activity;
// A test's own program has no server to end with.
#[cfg(not(test))]
mod allocator;
pub mod authentication;
pub mod background;
pub mod error;
pub mod latch;
pub mod lock_timeout;
pub mod memory;
pub mod postmaster;
pub mod recovery;
pub mod report;
pub mod reserve;
pub mod shown;
pub mod transaction;
pub mod upstream;

/// This process's ID, as the log and `pg_stat_activity` show it.
pub fn my_pid() -> i32 {
    // SAFETY: the word is set when the process starts, and does not change.
    unsafe { pg_sys::MyProcPid }
}

/// The server's timestamp of this moment: microseconds since 2000-01-01 UTC.
pub fn now() -> i64 {
    // SAFETY: it reads the system's clock.
    unsafe { pg_sys::GetCurrentTimestamp() }
}

/// Microseconds of a clock that is never set, and that all processes of this system
/// read alike.
pub fn monotonic_micros() -> i64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    time.tv_sec * 1_000_000 + time.tv_nsec / 1000
}

/// How many processors this process may use, as it was when this was first asked.
pub fn processors() -> usize {
    static COUNT: LazyLock<usize> =
        LazyLock::new(|| available_parallelism().map_or(1, NonZero::get));
    *COUNT
}

/// Serves interrupts. Does not return if this process was cancelled or terminated.
pub fn check_for_interrupts() {
    pgrx::check_for_interrupts!();
}

/// Reads the configuration again if a reload was requested. Returns whether it was.
pub fn reload_configuration_if_due() -> bool {
    // SAFETY: a flag of this process, which its signal handler sets. It is cleared, and the
    // file read, outside of commands, as the server's main loops do.
    unsafe {
        let pending = &raw mut pg_sys::ConfigReloadPending;
        let due = pending.read_volatile() != 0;
        if due {
            pending.write_volatile(0);
            pg_sys::ProcessConfigFile(pg_sys::GucContext::PGC_SIGHUP);
        }
        due
    }
}

/// Calls `callback` when this process ends, except by a crash.
pub fn at_exit(callback: fn()) {
    #[pg_guard]
    unsafe extern "C-unwind" fn call(_code: i32, callback: pg_sys::Datum) {
        // SAFETY: the argument is the function pointer that is registered below.
        let callback: fn() = unsafe { std::mem::transmute(callback.value()) };
        callback();
    }
    // Not `on_shmem_exit`: dynamic segments are detached before those are called.
    // SAFETY: `call` takes the argument that it is registered with.
    unsafe { pg_sys::before_shmem_exit(Some(call), pg_sys::Datum::from(callback as usize)) };
}

/// Whether this process serves a replication connection.
pub fn is_walsender() -> bool {
    // SAFETY: the word is set before the client is authenticated, and does not change.
    unsafe { pg_sys::am_walsender }
}

/// Whether the postmaster is loading `shared_preload_libraries`.
pub fn is_preloading() -> bool {
    // SAFETY: the postmaster sets this flag before it loads libraries and clears it
    // afterwards, in the same thread.
    unsafe { pg_sys::process_shared_preload_libraries_in_progress }
}

/// Has the server warn of every setting with that prefix that is not defined.
pub fn reserve_settings(prefix: &CStr) {
    // SAFETY: a C string, which the server copies.
    unsafe { pg_sys::MarkGUCPrefixReserved(prefix.as_ptr()) };
}

/// Whether `pg_upgrade` has started this server.
pub fn is_upgrading() -> bool {
    // SAFETY: the flag is set before any library is loaded, and does not change.
    unsafe { pg_sys::IsBinaryUpgrade }
}
