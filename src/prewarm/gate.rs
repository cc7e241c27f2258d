//! The gate: has all processes of a call release their locks together, so that other
//! sessions get the locks they wait for.
//!
//! To the lock manager, a session and its parallel workers are one group: while one of
//! them holds a lock, another is granted it at once, ahead of waiting sessions. So a
//! process that releases a lock for which another session may be waiting requests a
//! pause. All other processes of the call then release theirs as well, and none
//! requests a lock again before all have.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use std::time::Duration;

use crate::pg::process::latch;
use crate::wait_events;

const POLL: Duration = Duration::from_millis(1);

pub struct Gate {
    /// How many processes hold a relation's lock, or are about to request one.
    inside: AtomicU32,
    pause: AtomicBool,
}

impl Gate {
    pub const fn new() -> Self {
        Self {
            inside: AtomicU32::new(0),
            pause: AtomicBool::new(false),
        }
    }

    /// Waits until no pause is requested. The process may then lock a relation, and has
    /// to release the lock before it drops the returned value.
    pub fn pass(&self) -> Inside<'_> {
        loop {
            // The process is counted before it looks for a pause, so that a pause
            // requested from now on does not end before this process has left.
            self.inside.fetch_add(1, SeqCst);
            let inside = Inside(self);
            if !self.pause.load(SeqCst) {
                return inside;
            }
            drop(inside);
            if self.inside.load(SeqCst) == 0 {
                self.pause.store(false, SeqCst);
            } else {
                latch::sleep(Some(POLL), &wait_events::PAUSE);
            }
        }
    }

    /// Requests a pause.
    pub fn request_pause(&self) {
        self.pause.store(true, SeqCst);
    }

    pub fn pause_requested(&self) -> bool {
        self.pause.load(SeqCst)
    }
}

/// Counts a process that may hold a lock.
pub struct Inside<'a>(&'a Gate);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.inside.fetch_sub(1, SeqCst);
    }
}
