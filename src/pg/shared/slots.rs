//! The slots of `max_worker_processes`, which all background workers of the server share.

use pgrx::pg_sys;

use crate::pg::process::recovery;

/// How many slots are free, counted by the processes that run. A worker that has been
/// asked for and does not run yet is not counted.
pub fn count_free() -> usize {
    count_without_process().saturating_sub(usize::from(launcher_is_to_start()))
}

/// Whether the logical replication launcher has a slot, but no process: it starts when the
/// server has recovered.
fn launcher_is_to_start() -> bool {
    // SAFETY: a setting that does not change while the server runs.
    recovery::is_in_progress() && unsafe { pg_sys::max_logical_replication_workers } > 0
}

fn count_without_process() -> usize {
    // SAFETY: the array of processes is there for as long as the server is. Its entries
    // for background workers do not change that role, and an ID that is read while it
    // changes is that of the former process or the new one.
    unsafe {
        let all = pg_sys::ProcGlobal;
        let for_workers = &raw mut (*all).bgworkerFreeProcs;
        (0..(*all).allProcCount as usize)
            .map(|index| (*all).allProcs.add(index))
            .filter(|&process| (*process).procgloballist == for_workers && !runs(process))
            .count()
    }
}

/// Whether a process runs that has this entry. An entry keeps the ID of its last process
/// on some versions.
///
/// # Safety
/// `process` is an entry of the array of processes.
unsafe fn runs(process: *mut pg_sys::PGPROC) -> bool {
    // SAFETY: it reads an entry, and looks its ID up among those of running processes.
    unsafe {
        let pid = (&raw const (*process).pid).read_volatile();
        pid != 0 && pg_sys::BackendPidGetProc(pid) == process
    }
}
