//! Roles that only one process may have at a time: words in shared memory that hold its
//! process ID. A process acquires a role by changing the word from [`NO_PID`] to its own
//! process ID, and releases it by changing it back.

use std::sync::atomic::AtomicI32;
use std::sync::atomic::Ordering::SeqCst;

use crate::pg::process;

/// In place of a process ID: no process has the role.
pub const NO_PID: i32 = -1;

/// The process that has a role. `None` if none has.
pub fn holder(role: &AtomicI32) -> Option<i32> {
    Some(role.load(SeqCst)).filter(|&pid| pid != NO_PID)
}

/// Acquires a role for this process. `Err` is the process ID of its holder.
pub fn acquire(role: &AtomicI32) -> Result<(), i32> {
    role.compare_exchange(NO_PID, process::my_pid(), SeqCst, SeqCst)
        .map(|_| ())
}

/// Releases a role, if this process has it.
pub fn release(role: &AtomicI32) {
    let _ = role.compare_exchange(process::my_pid(), NO_PID, SeqCst, SeqCst);
}
