//! This process: its signals, its interrupts, its sleep and its end.

use std::ffi::CStr;
use std::time::Duration;

use pgrx::{pg_guard, pg_sys};

use super::activity::WaitEvent;
use super::compat;
use super::error::catch;

/// This process's ID, as the log and `pg_stat_activity` show it.
pub fn my_pid() -> i32 {
    // SAFETY: set when the process started, and never again.
    unsafe { pg_sys::MyProcPid }
}

/// The server's timestamp of this moment.
pub fn now() -> i64 {
    // SAFETY: it asks the system's clock.
    unsafe { pg_sys::GetCurrentTimestamp() }
}

/// Microseconds of a clock that nobody sets and all processes read alike.
pub fn monotonic_micros() -> i64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: a clock that Linux has, and room for its answer.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time) };
    time.tv_sec * 1_000_000 + time.tv_nsec / 1000
}

/// Acts on what other processes asked for: a cancel or a termination, which do
/// not return, or the release of open files that `DROP DATABASE` waits for.
pub fn check_for_interrupts() {
    pgrx::check_for_interrupts!();
}

/// Takes signals as a worker that decides for itself when it ends:
/// [`shutdown_requested`] tells. A cancel is ignored: what it would interrupt is the
/// service of the whole server, and no query.
pub fn handle_signals_as_leader() {
    // SAFETY: PostgreSQL's own handlers, made for this.
    unsafe {
        compat::signal(libc::SIGINT, compat::ignore_signal);
        compat::signal(libc::SIGTERM, compat::SignalHandlerForShutdownRequest);
        compat::signal(libc::SIGHUP, compat::SignalHandlerForConfigReload);
        pg_sys::BackgroundWorkerUnblockSignals();
    }
}

/// Takes signals as a worker that ends at the next [`check_for_interrupts`].
pub fn handle_signals_as_worker() {
    // SAFETY: as above.
    unsafe {
        compat::signal(libc::SIGINT, compat::ignore_signal);
        compat::signal(libc::SIGTERM, compat::die);
        pg_sys::BackgroundWorkerUnblockSignals();
    }
}

/// Whether this worker was told to end: the server shuts down, or somebody
/// called `pg_terminate_backend`.
pub fn shutdown_requested() -> bool {
    // SAFETY: a flag that only this process's signal handler sets.
    unsafe { (&raw const pg_sys::ShutdownRequestPending).read_volatile() != 0 }
}

/// Reads the configuration again where a reload is due, and tells whether one was.
pub fn reload_configuration_if_due() -> bool {
    // SAFETY: as the server's own main loops do it, between two pieces of work.
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

/// Sleeps until somebody sets this process's latch, or `timeout` is over
/// (without one: for as long as it takes), then serves interrupts. Ends the
/// process when the postmaster is gone.
pub fn sleep(timeout: Option<Duration>, what_for: WaitEvent) {
    let (events, milliseconds) = match timeout {
        Some(timeout) => (
            pg_sys::WL_TIMEOUT,
            i32::try_from(timeout.as_micros().div_ceil(1000))
                .unwrap_or(i32::MAX)
                .into(),
        ),
        None => (0, -1),
    };
    // SAFETY: MyLatch is this process's own.
    unsafe {
        pg_sys::WaitLatch(
            pg_sys::MyLatch,
            (pg_sys::WL_LATCH_SET | pg_sys::WL_EXIT_ON_PM_DEATH | events) as i32,
            milliseconds,
            what_for.id(),
        );
        pg_sys::ResetLatch(pg_sys::MyLatch);
    }
    check_for_interrupts();
}

/// The same for background workers outside of transactions. On a standby before 17,
/// a conflict with recovery may be raised then, after the transaction that it was
/// meant for: there is nothing to undo. What makes it fail may be there the next time
/// as well, so it has slept in any case.
pub fn sleep_as_worker(timeout: Option<Duration>, what_for: WaitEvent) {
    const IN_ANY_CASE: Duration = Duration::from_millis(10);
    if catch(|| sleep(timeout, what_for)).is_err() {
        // SAFETY: outside of transactions it holds none on purpose; but the server may
        // have taken one to look up a wait event's name.
        unsafe { pg_sys::LWLockReleaseAll() };
        std::thread::sleep(timeout.map_or(IN_ANY_CASE, |timeout| timeout.min(IN_ANY_CASE)));
    }
}

/// Sets another process's latch, if that is a background worker of ours, as the
/// postmaster does it.
pub fn wake(pid: i32) {
    // SAFETY: it sends a signal, which such a process handles; one that is gone
    // gets none.
    unsafe { libc::kill(pid, libc::SIGUSR1) };
}

/// Calls `callback` when this process ends, however it ends short of a crash.
pub fn at_exit(callback: fn()) {
    #[pg_guard]
    unsafe extern "C-unwind" fn call(_code: i32, callback: pg_sys::Datum) {
        // SAFETY: the argument is the function pointer registered below.
        let callback: fn() = unsafe { std::mem::transmute(callback.value()) };
        callback();
    }
    // Before, not on: dynamic shared memory is gone when the latter are called.
    // SAFETY: the callback takes the argument that it is registered with.
    unsafe { pg_sys::before_shmem_exit(Some(call), pg_sys::Datum::from(callback as usize)) };
}

/// Puts aside what the configuration says for sessions of users and would harm a
/// worker: being ended by a time limit or by the first error, or overwriting pages that
/// it cannot read. Before connecting, since that is a transaction as well. The
/// autovacuum launcher and its workers do much the same.
fn override_session_settings() {
    for (name, value) in compat::SESSION_SETTINGS {
        // SAFETY: settings of this server's version, with a value of their type.
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

/// Connects this worker to no database: it can read the shared catalogs, is
/// shown in `pg_stat_activity`, and takes part in the server's barriers.
pub fn connect_to_no_database() {
    override_session_settings();
    // SAFETY: once, by a background worker registered for a connection.
    unsafe {
        pg_sys::BackgroundWorkerInitializeConnection(std::ptr::null(), std::ptr::null(), 0);
    }
}

/// Connects this worker to that database. Where it cannot be connected to, the
/// worker ends.
pub fn connect_to_database(database: u32) {
    override_session_settings();
    // SAFETY: as above.
    unsafe {
        pg_sys::BackgroundWorkerInitializeConnectionByOid(
            pg_sys::Oid::from(database),
            pg_sys::InvalidOid,
            0,
        );
    }
}

/// Has the server warn of every setting of that prefix that is not defined.
pub fn reserve_settings(prefix: &CStr) {
    // SAFETY: a C string, which the server copies.
    unsafe { pg_sys::MarkGUCPrefixReserved(prefix.as_ptr()) };
}

/// Whether the postmaster is loading `shared_preload_libraries`.
pub fn is_preloading() -> bool {
    // SAFETY: a flag that the postmaster sets around the loading.
    unsafe { pg_sys::process_shared_preload_libraries_in_progress }
}

/// Whether `pg_upgrade` has started the server, for itself.
pub fn is_upgrading() -> bool {
    // SAFETY: set before anything is loaded, and never changed.
    unsafe { pg_sys::IsBinaryUpgrade }
}
