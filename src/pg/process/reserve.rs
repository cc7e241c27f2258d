//! Memory in reserve, for an ERROR that says that there is none.
//!
//! Such an ERROR needs memory itself: on its way through Rust it is copied into two
//! memory contexts. If that failed, so would the ERROR about it, and so on, until the
//! server gives up and restarts all its processes.

use std::ffi::c_void;
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering::Relaxed};

static RESERVE: AtomicPtr<c_void> = AtomicPtr::new(ptr::null_mut());

/// Makes the reserve, if there is none. Returns false if there is no memory for it:
/// nothing must be started then that could raise an ERROR.
#[must_use]
pub fn keep() -> bool {
    // A memory context that has grown asks for a megabyte or more. What is not touched
    // takes addresses only.
    const SIZE: usize = (2 << 20) + (256 << 10);
    if RESERVE.load(Relaxed).is_null() {
        // SAFETY: a null that it returns is kept as no reserve.
        RESERVE.store(unsafe { libc::malloc(SIZE) }, Relaxed);
    }
    !RESERVE.load(Relaxed).is_null()
}

/// Frees the reserve, so that others can allocate it.
pub fn give_up() {
    // SAFETY: the swap makes this the only owner of what `malloc` returned, or null.
    unsafe { libc::free(RESERVE.swap(ptr::null_mut(), Relaxed)) };
}
