//! Memory of which there may be too little.
//!
//! Rust can do without memory only where it is asked for in a way that can fail, as
//! `try_reserve` asks. The core does so throughout, and [`fallible`] tells the
//! library's allocator: within it the allocator may refuse memory, and what is called
//! returns an error. For want of any other memory the process ends, see
//! [`super::allocator`].

use std::ffi::c_void;
use std::io::{self, Read};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering::Relaxed};

use pgrx::PgSqlErrorCode;

use super::error::raise;

static MAY_BE_REFUSED: AtomicBool = AtomicBool::new(false);

/// Whether the allocator may refuse memory now.
pub fn may_be_refused() -> bool {
    MAY_BE_REFUSED.load(Relaxed)
}

/// Runs what asks for memory only in ways that can fail: a call of the core.
pub fn fallible<T>(call: impl FnOnce() -> T) -> T {
    let _former = Former(MAY_BE_REFUSED.swap(true, Relaxed));
    call()
}

/// Runs what a fallible call calls back, if that cannot do without the memory that it
/// asks for: all that calls PostgreSQL, since an ERROR takes memory on its way.
pub fn infallible<T>(call: impl FnOnce() -> T) -> T {
    let _former = Former(MAY_BE_REFUSED.swap(false, Relaxed));
    call()
}

/// Whether memory might be refused before. That holds again once this is dropped, be it
/// by an ERROR that unwinds.
struct Former(bool);

impl Drop for Former {
    fn drop(&mut self) {
        MAY_BE_REFUSED.store(self.0, Relaxed);
    }
}

/// A reader or an iterator that is handed to a fallible call: it runs as [`infallible`].
pub struct Infallible<T>(pub T);

impl<T: Read> Read for Infallible<T> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        infallible(|| self.0.read(buffer))
    }
}

impl<T: Iterator> Iterator for Infallible<T> {
    type Item = T::Item;

    fn next(&mut self) -> Option<T::Item> {
        infallible(|| self.0.next())
    }
}

/// A vector with room for so many. Raises an ERROR where there is no memory.
pub fn room_for<T>(count: usize) -> Vec<T> {
    let mut vec = Vec::new();
    reserve(&mut vec, count);
    vec
}

/// Makes room for so many more. Raises an ERROR where there is no memory.
pub fn reserve<T>(vec: &mut Vec<T>, count: usize) {
    if fallible(|| vec.try_reserve_exact(count)).is_err() {
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
