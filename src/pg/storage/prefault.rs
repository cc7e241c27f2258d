//! Prefaulting the memory of buffers that are about to be filled, on 15 and 16.
//!
//! With the blocks in the operating system's cache, most of the time of a load would be
//! spent on faults on memory that no process has touched yet. One system call for a
//! megabyte costs far less than a fault for each page. Processes that fill buffers
//! together also divide the work: two that fault on neighbouring pages wait for each
//! other.
//!
//! From 17 on, the server reads many blocks at once, and the system allocates memory for all
//! of them at once. Prefaulting would be work in vain then.

use std::cell::Cell;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use pgrx::pg_sys;

use super::{READS_MANY_AT_ONCE, buffer};

/// How many buffers are prefaulted at once.
const AT_ONCE: usize = (1 << 20) / pg_sys::BLCKSZ as usize;

/// Up to which buffer memory is prefaulted, or about to be. Shared by all processes that
/// fill buffers together.
pub struct Prefaulted(AtomicUsize);

impl Prefaulted {
    pub const fn new() -> Self {
        Self(AtomicUsize::new(0))
    }

    /// The buffers that a process which fills `buffer` should prefault next. `None` if enough
    /// are prefaulted. It is a hint: prefaulting twice does no harm. Buffers are filled in
    /// ascending order, more or less, by all processes together.
    fn next(&self, buffer: usize) -> Option<Range<usize>> {
        const AHEAD: usize = 2 * AT_ONCE;
        let end = |prefaulted: usize| {
            let start = prefaulted.max(buffer);
            (start < buffer + AHEAD).then_some(start + AT_ONCE)
        };
        // Most calls end here, without a write to shared memory.
        end(self.0.load(Relaxed))?;
        let before = self.0.fetch_update(Relaxed, Relaxed, end).ok()?;
        let start = before.max(buffer);
        Some(start..start + AT_ONCE)
    }
}

/// Prefaults the buffers that this process fills.
pub struct Prefaulter<'a> {
    prefaulted: &'a Prefaulted,
    /// Up to which buffer memory is mapped into this process.
    mapped: Cell<usize>,
}

impl<'a> Prefaulter<'a> {
    pub fn new(prefaulted: &'a Prefaulted) -> Self {
        Self {
            prefaulted,
            mapped: Cell::new(0),
        }
    }

    /// Prefaults the memory of the buffers after this one, which was just filled, and
    /// maps what other processes have prefaulted.
    pub fn prefault_after(&self, buffer: usize) {
        if READS_MANY_AT_ONCE {
            return;
        }
        while let Some(buffers) = self.prefaulted.next(buffer) {
            populate(buffers);
        }
        if buffer >= self.mapped.get() {
            let end = buffer + AT_ONCE;
            map(buffer..end);
            self.mapped.set(end);
        }
    }
}

/// Has the system allocate the memory of these buffers now. What is in them stays. Other
/// systems than Linux, and Linux before 5.14, cannot do that, which costs only speed.
fn populate(buffers: Range<usize>) {
    #[cfg(not(target_os = "linux"))]
    let _ = buffers;
    #[cfg(target_os = "linux")]
    if let Some((start, bytes)) = pages(buffers) {
        // SAFETY: the memory of existing buffers, and what is before them on their first page.
        // The advice leaves its content as it is.
        let _ = unsafe {
            use rustix::mm::{Advice, madvise};
            madvise(start.cast_mut().cast(), bytes, Advice::LinuxPopulateWrite)
        };
    }
}

/// Maps memory that another process has prefaulted: if a page is read, Linux maps those
/// around it as well, where a write would fault for each.
fn map(buffers: Range<usize>) {
    const FAULT_AROUND: usize = 64 * 1024;
    if let Some((start, bytes)) = pages(buffers) {
        for offset in (0..bytes).step_by(FAULT_AROUND) {
            // SAFETY: memory of the server's, which is mapped. The byte that is read is not used,
            // so other processes may be writing it.
            unsafe { start.wrapping_add(offset).read_volatile() };
        }
    }
}

/// The memory of those of the buffers that exist, from the beginning of a page on, and
/// its size in bytes.
fn pages(buffers: Range<usize>) -> Option<(*const u8, usize)> {
    let block = pg_sys::BLCKSZ as usize;
    let buffers = buffers.start..buffers.end.min(buffer::count());
    // SAFETY: the word is set when the server starts, and does not change.
    let memory = unsafe { pg_sys::BufferBlocks }.cast::<u8>();
    let first = memory.wrapping_add(buffers.start * block);
    let into_page = first.addr() % rustix::param::page_size();
    (!buffers.is_empty()).then(|| {
        (
            first.wrapping_sub(into_page).cast_const(),
            buffers.len() * block + into_page,
        )
    })
}
