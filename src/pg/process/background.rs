//! The start of our background workers: signals, settings, connection.

use pgrx::pg_sys;

use crate::blocks::Oid;
use crate::pg::sys::signal::{self, set_handler};
use crate::pg::sys::version::SESSION_SETTINGS;

/// Handles signals as the leader: it ends when it finds [`shutdown_requested`]. It
/// ignores cancels, since it serves the whole server and runs no query.
pub fn handle_signals_as_leader() {
    // SAFETY: PostgreSQL's own handlers, which only set flags and the latch, and one that
    // does nothing.
    unsafe {
        set_handler(libc::SIGINT, signal::ignore_signal);
        set_handler(libc::SIGTERM, signal::SignalHandlerForShutdownRequest);
        set_handler(libc::SIGHUP, signal::SignalHandlerForConfigReload);
        pg_sys::BackgroundWorkerUnblockSignals();
    }
}

/// Handles signals as a worker: if it is terminated, it ends when it next serves
/// interrupts.
pub fn handle_signals_as_worker() {
    // SAFETY: PostgreSQL's own handler, which only sets flags and the latch, and one that
    // does nothing.
    unsafe {
        set_handler(libc::SIGINT, signal::ignore_signal);
        set_handler(libc::SIGTERM, signal::die);
        pg_sys::BackgroundWorkerUnblockSignals();
    }
}

/// Runs `body`, which is cancelled by [`crate::pg::shared::worker::Handle::interrupt`]: the
/// server raises an ERROR when it next serves interrupts.
///
/// For workers only, which ignore SIGINT otherwise. `body` raises no ERROR itself.
pub fn run_cancellable<T>(body: impl FnOnce() -> T) -> T {
    // SAFETY: PostgreSQL's own handler, which only sets flags and the latch.
    unsafe { set_handler(libc::SIGINT, signal::StatementCancelHandler) };
    let result = body();
    // SAFETY: a handler that does nothing, and a flag of this process.
    unsafe {
        set_handler(libc::SIGINT, signal::ignore_signal);
        // The signal may have come when all was over. Nothing else is to be cancelled by it.
        (&raw mut pg_sys::QueryCancelPending).write_volatile(0);
    }
    result
}

/// Terminates another background worker of this library, if it still runs.
pub fn terminate(pid: i32) {
    // SAFETY: an entry of a server process is there for as long as the server is.
    unsafe {
        if !pg_sys::BackendPidGetProc(pid).is_null() {
            libc::kill(pid, libc::SIGTERM);
        }
    }
}

/// Whether the leader is to end: the server shuts down, or `pg_terminate_backend()`
/// was called for it.
pub fn shutdown_requested() -> bool {
    // SAFETY: a flag of this process, which its signal handler sets.
    unsafe { (&raw const pg_sys::ShutdownRequestPending).read_volatile() != 0 }
}

/// Overrides settings that are meant for sessions and would harm a worker: a time limit
/// or the first error would end it, and it would overwrite pages that it cannot read.
/// The autovacuum launcher and its workers do much the same. Done before connecting,
/// since that runs a transaction.
fn override_session_settings() {
    for (name, value) in SESSION_SETTINGS {
        // SAFETY: two C strings: a setting that this version has, and a value for it.
        unsafe {
            pg_sys::SetConfigOption(
                name.as_ptr(),
                value.as_ptr(),
                pg_sys::GucContext::PGC_SUSET,
                pg_sys::GucSource::PGC_S_OVERRIDE,
            );
        }
    }
}

/// Connects this worker to no database. It can read shared catalogs then, is shown in
/// `pg_stat_activity`, and takes part in the server's barriers.
pub fn connect_to_no_database() {
    override_session_settings();
    // SAFETY: called once, at the start of a worker that was registered with
    // `BGWORKER_BACKEND_DATABASE_CONNECTION`.
    unsafe {
        pg_sys::BackgroundWorkerInitializeConnection(std::ptr::null(), std::ptr::null(), 0);
    }
}

/// Connects this worker to that database, as the bootstrap superuser. If that fails,
/// this process ends.
pub fn connect_to_database(database: Oid) {
    override_session_settings();
    // SAFETY: called once, at the start of a worker that was registered with
    // `BGWORKER_BACKEND_DATABASE_CONNECTION`.
    unsafe {
        pg_sys::BackgroundWorkerInitializeConnectionByOid(database.into(), pg_sys::InvalidOid, 0);
    }
}
