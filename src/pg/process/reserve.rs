//! Memory in reserve, for an ERROR that says that there is none.
//!
//! Such an ERROR needs memory itself: on its way through Rust it is copied into two
//! memory contexts. If that failed, so would the ERROR about it, and so on, until the
//! server gives up and restarts all its processes.
//!
//! Background processes of ours keep it for their lives. A session has it during a call of
//! ours: it is given up when the call returns, or at the end of the transaction if the call
//! raised an ERROR, or its rows were not fetched to the end.

use std::ffi::c_void;
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering::Relaxed};

static RESERVE: AtomicPtr<c_void> = AtomicPtr::new(ptr::null_mut());

/// A memory context that has grown asks for a megabyte or more. What is not touched
/// takes addresses only.
const SIZE: usize = (2 << 20) + (256 << 10);

/// Makes the reserve, if there is none. Returns false if there is no memory for it:
/// nothing must be started then that could raise an ERROR.
#[must_use]
pub fn keep() -> bool {
    if RESERVE.load(Relaxed).is_null() {
        // Not by `malloc`: after the first `free` it would take this from its heap, and
        // keep it there.
        // SAFETY: a new mapping, which no memory in use is in the way of.
        let memory = unsafe {
            libc::mmap(
                ptr::null_mut(),
                SIZE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if memory == libc::MAP_FAILED {
            return false;
        }
        RESERVE.store(memory, Relaxed);
    }
    true
}

/// Frees the reserve, so that others can allocate it.
pub fn give_up() {
    let memory = RESERVE.swap(ptr::null_mut(), Relaxed);
    if !memory.is_null() {
        // SAFETY: the swap makes this the only owner of what was mapped, and nothing
        // points into it.
        unsafe { libc::munmap(memory, SIZE) };
    }
}
