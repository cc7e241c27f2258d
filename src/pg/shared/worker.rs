//! Background workers of this library: how they are registered, started, watched and
//! terminated.

use std::ffi::{CStr, c_char};

use pgrx::pg_sys;

use crate::pg::process;
use crate::pg::sys::version::BGWORKER_INTERRUPTIBLE;

/// A kind of background worker.
pub struct Kind {
    /// Its name in the process list and in `pg_stat_activity`.
    pub name: &'static CStr,
    /// The C function that it runs.
    pub function: &'static CStr,
    /// How many seconds after it has failed the server starts it again. `None`: never.
    pub restart: Option<i32>,
    /// Whether `CREATE`, `ALTER` and `DROP DATABASE` may terminate it if it is connected
    /// to the database. Before 19, the server cannot do that.
    pub interruptible: bool,
}

/// The library that the server loads the function from.
const LIBRARY: &CStr = c"pg_prewarm";

/// `BGW_NEVER_RESTART`
const NEVER_RESTART: i32 = -1;

impl Kind {
    fn registration(&self, argument: u64, notify: i32) -> pg_sys::BackgroundWorker {
        // SAFETY: it has numbers and arrays of characters only, for which zeros are valid.
        let mut worker: pg_sys::BackgroundWorker = unsafe { std::mem::zeroed() };
        copy_name(&mut worker.bgw_name, self.name);
        copy_name(&mut worker.bgw_type, self.name);
        copy_name(&mut worker.bgw_library_name, LIBRARY);
        copy_name(&mut worker.bgw_function_name, self.function);
        let mut flags =
            pg_sys::BGWORKER_SHMEM_ACCESS | pg_sys::BGWORKER_BACKEND_DATABASE_CONNECTION;
        if self.interruptible {
            flags |= BGWORKER_INTERRUPTIBLE;
        }
        worker.bgw_flags = flags as i32;
        worker.bgw_start_time = pg_sys::BgWorkerStartTime::BgWorkerStart_ConsistentState;
        worker.bgw_restart_time = self.restart.unwrap_or(NEVER_RESTART);
        worker.bgw_main_arg = pg_sys::Datum::from(argument);
        worker.bgw_notify_pid = notify;
        worker
    }

    /// Has the postmaster start one with the server. For `_PG_init` of a preloaded
    /// library.
    pub fn start_with_server(&self) {
        let mut worker = self.registration(0, 0);
        // SAFETY: a complete registration, which the server copies.
        unsafe { pg_sys::RegisterBackgroundWorker(&mut worker) };
    }

    /// Asks the postmaster to start one with that argument. `None` if no slot of
    /// `max_worker_processes` is free. This process's latch is set when it starts and
    /// when it ends.
    pub fn start(&self, argument: u64) -> Option<Handle> {
        let mut worker = self.registration(argument, process::my_pid());
        let mut handle = std::ptr::null_mut();
        // SAFETY: a complete registration, which the server copies. The handle is
        // allocated in the current memory context: for the moment, the one that lives
        // as long as this process.
        let registered = unsafe {
            let previous = pg_sys::MemoryContextSwitchTo(pg_sys::TopMemoryContext);
            let registered = pg_sys::RegisterDynamicBackgroundWorker(&mut worker, &mut handle);
            pg_sys::MemoryContextSwitchTo(previous);
            registered
        };
        registered.then(|| Handle(handle))
    }
}

fn copy_name<const N: usize>(to: &mut [c_char; N], name: &CStr) {
    let bytes = name.to_bytes();
    assert!(bytes.len() < N, "{name:?} is too long");
    for (to, from) in to.iter_mut().zip(bytes) {
        *to = *from as c_char;
    }
}

/// Whether a worker runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// The postmaster has not started it yet.
    NotYetStarted,
    Started,
    /// It has ended, or could not be started.
    Stopped,
}

/// A worker that the postmaster was asked to start.
pub struct Handle(*mut pg_sys::BackgroundWorkerHandle);

impl Handle {
    pub fn status(&self) -> Status {
        let mut pid = 0;
        // SAFETY: the handle was made by the server, and is freed by `drop` only.
        match unsafe { pg_sys::GetBackgroundWorkerPid(self.0, &mut pid) } {
            pg_sys::BgwHandleStatus::BGWH_NOT_YET_STARTED => Status::NotYetStarted,
            pg_sys::BgwHandleStatus::BGWH_STARTED => Status::Started,
            _ => Status::Stopped,
        }
    }

    /// Waits until it runs. Returns false if it could not be started.
    pub fn wait_until_started(&self) -> bool {
        let mut pid = 0;
        // SAFETY: the handle was made by the server, and is freed by `drop` only.
        let status = unsafe { pg_sys::WaitForBackgroundWorkerStartup(self.0, &mut pid) };
        status == pg_sys::BgwHandleStatus::BGWH_STARTED
    }

    /// Cancels what it runs within [`crate::pg::process::background::run_cancellable`], such as a
    /// wait for a lock. Otherwise nothing happens.
    pub fn interrupt(&self) {
        let mut pid = 0;
        // SAFETY: the handle was made by the server, and is freed by `drop` only.
        let status = unsafe { pg_sys::GetBackgroundWorkerPid(self.0, &mut pid) };
        if status == pg_sys::BgwHandleStatus::BGWH_STARTED {
            // SAFETY: the postmaster has started a process of that ID and not noticed its
            // end. Workers handle this signal, or ignore it.
            unsafe { libc::kill(pid, libc::SIGINT) };
        }
    }

    /// Asks the postmaster to terminate it, or not to start it.
    pub fn terminate(&self) {
        // SAFETY: the handle was made by the server, and is freed by `drop` only.
        unsafe { pg_sys::TerminateBackgroundWorker(self.0) };
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            // SAFETY: the server has allocated it, and nothing uses it any more.
            unsafe { pg_sys::pfree(self.0.cast()) };
        }
    }
}
