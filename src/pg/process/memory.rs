//! Memory that may be refused.
//!
//! If the system refuses memory that Rust code cannot do without, the process ends (see
//! [`super::allocator`]). What may be large is asked for by calls that can fail, such as
//! `try_reserve`. The core does so throughout. [`fallible`] tells the allocator that it
//! may return no memory.

use std::collections::TryReserveError;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use pgrx::PgSqlErrorCode;

use super::report::{Message, raise};

static MAY_BE_REFUSED: AtomicBool = AtomicBool::new(false);

/// Whether the allocator may refuse memory now.
pub fn may_be_refused() -> bool {
    MAY_BE_REFUSED.load(Relaxed)
}

/// Runs a call of the core, or other code that asks for memory only by calls that can
/// fail.
pub fn fallible<T>(call: impl FnOnce() -> T) -> T {
    let _former = Former(MAY_BE_REFUSED.swap(true, Relaxed));
    call()
}

/// Runs a callback of a fallible call that calls PostgreSQL: an ERROR allocates memory on
/// its way through Rust, and cannot do without it.
pub fn infallible<T>(call: impl FnOnce() -> T) -> T {
    let _former = Former(MAY_BE_REFUSED.swap(false, Relaxed));
    call()
}

/// Whether memory could be refused before. Dropping it restores that, also when an ERROR
/// unwinds.
struct Former(bool);

impl Drop for Former {
    fn drop(&mut self) {
        MAY_BE_REFUSED.store(self.0, Relaxed);
    }
}

/// A reader, a writer or an iterator for a fallible call. It runs as [`infallible`].
pub struct Infallible<T>(pub T);

impl<T: Read> Read for Infallible<T> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        infallible(|| self.0.read(buffer))
    }
}

impl<T: Write> Write for Infallible<T> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        infallible(|| self.0.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        infallible(|| self.0.flush())
    }
}

impl<T: Seek> Seek for Infallible<T> {
    fn seek(&mut self, position: SeekFrom) -> io::Result<u64> {
        infallible(|| self.0.seek(position))
    }
}

impl<T: Iterator> Iterator for Infallible<T> {
    type Item = T::Item;

    fn next(&mut self) -> Option<T::Item> {
        infallible(|| self.0.next())
    }
}

/// A vector with room for `count` elements. Raises an ERROR if there is no memory.
pub fn room_for<T>(count: usize) -> Vec<T> {
    let mut vec = Vec::new();
    reserve(&mut vec, count);
    vec
}

/// Makes room for `count` more elements. Raises an ERROR if there is no memory.
pub fn reserve<T>(vec: &mut Vec<T>, count: usize) {
    or_raise(|| vec.try_reserve_exact(count));
}

/// Runs a fallible call. Raises an ERROR if there is no memory.
pub fn or_raise<T>(call: impl FnOnce() -> Result<T, TryReserveError>) -> T {
    fallible(call).unwrap_or_else(|_| {
        raise(Message::new(
            PgSqlErrorCode::ERRCODE_OUT_OF_MEMORY,
            "out of memory",
        ))
    })
}
