//! Memory of which there may be too little.

use std::ffi::c_void;
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering::Relaxed};

use pgrx::PgSqlErrorCode;

use super::error::raise;
use crate::blocks::room;

/// A vector with room for so many. Raises an ERROR where there is no memory.
pub fn room_for<T>(count: usize) -> Vec<T> {
    let mut vec = Vec::new();
    reserve(&mut vec, count);
    vec
}

/// Makes room for so many more. Raises an ERROR where there is no memory.
pub fn reserve<T>(vec: &mut Vec<T>, count: usize) {
    if room::ask(|| vec.try_reserve_exact(count)).is_err() {
        let message = "out of memory".to_owned();
        raise(PgSqlErrorCode::ERRCODE_OUT_OF_MEMORY, message, None);
    }
}

/// Kept for the moment when there is no memory: an ERROR that says so takes some on
/// its way through Rust, where it is copied, into two memory contexts. If that failed
/// as well, so would the next ERROR, until the server has had enough and ends all its
/// processes.
static RESERVE: AtomicPtr<c_void> = AtomicPtr::new(ptr::null_mut());

/// Sees to it that there is a reserve. False where there is no memory for it: then
/// nothing should be begun that might raise an ERROR.
#[must_use]
pub fn keep_reserve() -> bool {
    // A context that has grown takes a megabyte at least, if less is not to be had.
    // What is not touched takes no more than addresses.
    const SIZE: usize = (2 << 20) + (256 << 10);
    if RESERVE.load(Relaxed).is_null() {
        // SAFETY: always allowed; a null is kept as no reserve.
        RESERVE.store(unsafe { libc::malloc(SIZE) }, Relaxed);
    }
    !RESERVE.load(Relaxed).is_null()
}

/// Leaves the reserve to whoever needs memory now.
pub fn give_up_reserve() {
    // SAFETY: null, or what `malloc` gave and nobody else has.
    unsafe { libc::free(RESERVE.swap(ptr::null_mut(), Relaxed)) };
}
