//! Lets whoever waits for a relation have it, though several processes of one call
//! read it.
//!
//! To the server, a session and its parallel workers are one: while one of them
//! holds a lock, another gets it at once, ahead of those who wait for it. So a
//! process that gives a lock back for which somebody may be waiting asks for a
//! pause: all others give theirs back as well, and none asks for one before all
//! have.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use std::time::Duration;

use crate::pg::process::latch::{self, WaitEvent};

const POLL: Duration = Duration::from_millis(1);

pub struct Gate {
    /// How many processes hold a relation's lock, or are about to ask for one.
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

    /// Waits until no pause is on. The process may ask for a lock then, and has
    /// given it back when it lets go of what this returns.
    pub fn pass(&self) -> Inside<'_> {
        loop {
            // First it is counted: who asks for a pause from here on waits for it.
            self.inside.fetch_add(1, SeqCst);
            let inside = Inside(self);
            if !self.pause.load(SeqCst) {
                return inside;
            }
            drop(inside);
            if self.inside.load(SeqCst) == 0 {
                self.pause.store(false, SeqCst);
            } else {
                latch::sleep(Some(POLL), WaitEvent::Pause);
            }
        }
    }

    pub fn ask_for_pause(&self) {
        self.pause.store(true, SeqCst);
    }

    pub fn pause_is_asked_for(&self) -> bool {
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
