//! Recovery: whether this server is a standby, and how far it is.

use std::ptr;

use pgrx::pg_sys;

/// Whether this server replays WAL: it is a standby, or recovers.
pub fn is_in_progress() -> bool {
    // SAFETY: it reads shared memory.
    unsafe { pg_sys::RecoveryInProgress() }
}

/// Whether this server is not a standby any more, or is about to be none: it was told to
/// promote.
pub fn has_ended_or_will() -> bool {
    // SAFETY: it reads shared memory.
    unsafe { pg_sys::PromoteIsTriggered() || !pg_sys::RecoveryInProgress() }
}

/// The number by which a cluster and its standbys know that they are the same.
pub fn system_identifier() -> u64 {
    // SAFETY: it reads shared memory.
    unsafe { pg_sys::GetSystemIdentifier() }
}

/// The timeline of the last WAL that was replayed, or is written.
pub fn timeline() -> u32 {
    let mut timeline = 0;
    // SAFETY: a place for the timeline; after recovery there is one for insertions.
    unsafe {
        if pg_sys::RecoveryInProgress() {
            pg_sys::GetXLogReplayRecPtr(&mut timeline);
        } else {
            timeline = pg_sys::GetWALInsertionTimeLine();
        }
    }
    timeline
}

/// How many bytes of WAL have been received and not replayed.
pub fn replay_lag() -> u64 {
    // SAFETY: nulls for what is not wanted.
    unsafe {
        let received = pg_sys::GetWalRcvFlushRecPtr(ptr::null_mut(), ptr::null_mut());
        let replayed = pg_sys::GetXLogReplayRecPtr(ptr::null_mut());
        received.saturating_sub(replayed)
    }
}
