//! What this process shows of itself: in `pg_stat_activity`, in its title, and where the
//! server's own commands show their progress.

use std::ffi::{CStr, CString};

use pgrx::pg_sys;

use crate::blocks::Oid;
use crate::pg::sys::version;

/// Shows what this process is doing, as its query and in its title. The text is in the
/// server's encoding, since it may have the name of a database.
pub fn report(text: Vec<u8>) {
    let text = CString::new(text).unwrap_or_default();
    // SAFETY: a C string, which both functions copy.
    unsafe {
        pg_sys::pgstat_report_activity(pg_sys::BackendState::STATE_RUNNING, text.as_ptr());
        pg_sys::set_ps_display(text.as_ptr());
    }
}

/// Shows what this process is doing in its title only.
pub fn report_title(text: &CStr) {
    // SAFETY: a C string, which the server copies.
    unsafe { pg_sys::set_ps_display(text.as_ptr()) };
}

/// Shows that this process is idle.
pub fn report_idle() {
    // SAFETY: a C string, which both functions copy.
    unsafe {
        pg_sys::pgstat_report_activity(pg_sys::BackendState::STATE_IDLE, c"".as_ptr());
        pg_sys::set_ps_display(c"".as_ptr());
    }
}

/// The command number of our progress, which no command of the server has. Progress is
/// kept where the server keeps that of its own commands. So other processes read a row as
/// a whole, a row is removed if the process or its transaction fails, and there is none if
/// `track_activities` is off.
const COMMAND: pg_sys::ProgressCommandType::Type = 0x5057;

/// Shows progress to other processes, unless another command of this process shows its own:
/// `COPY (SELECT pg_prewarm(…)) TO …` does.
#[expect(
    clippy::cast_possible_truncation,
    reason = "there are at most PGSTAT_NUM_PROGRESS_PARAM values"
)]
pub fn show_progress<const N: usize>(values: &[i64; N]) {
    const { assert!(N <= pg_sys::PGSTAT_NUM_PROGRESS_PARAM as usize) };
    let fields: [i32; N] = std::array::from_fn(|index| index as i32);
    // SAFETY: as many fields as values, each less than `PGSTAT_NUM_PROGRESS_PARAM`.
    unsafe {
        match shown_command() {
            Some(COMMAND) => {}
            Some(pg_sys::ProgressCommandType::PROGRESS_COMMAND_INVALID) => {
                pg_sys::pgstat_progress_start_command(COMMAND, pg_sys::InvalidOid);
            }
            _ => return,
        }
        pg_sys::pgstat_progress_update_multi_param(N as i32, fields.as_ptr(), values.as_ptr());
    }
}

/// Shows no progress any more.
pub fn end_progress() {
    // SAFETY: it changes this process's own entry.
    unsafe {
        if shown_command() == Some(COMMAND) {
            pg_sys::pgstat_progress_end_command();
        }
    }
}

/// The command whose progress this process shows. `None` if it has no entry among the
/// server's processes.
fn shown_command() -> Option<pg_sys::ProgressCommandType::Type> {
    // SAFETY: a non-null entry is this process's own, which no other process changes.
    unsafe {
        let entry = pg_sys::MyBEEntry;
        (!entry.is_null()).then(|| (&raw const (*entry).st_progress_command).read_volatile())
    }
}

/// The progress that all processes show: process ID, database and values.
pub fn all_progress<const N: usize>() -> Vec<(i32, Oid, [i64; N])> {
    // SAFETY: as many entries as were counted. They are the server's copies, which stay
    // the same until the end of the transaction.
    unsafe {
        (1..=pg_sys::pgstat_fetch_stat_numbackends())
            .filter_map(|index| {
                let local = version::backend_entry(index);
                if local.is_null() {
                    return None;
                }
                let entry = &(*local).backendStatus;
                if entry.st_progress_command != COMMAND {
                    return None;
                }
                let values = *entry.st_progress_param.first_chunk()?;
                Some((entry.st_procpid, entry.st_databaseid.to_u32(), values))
            })
            .collect()
    }
}
