//! The buffers that a call has filled, and how many more it can fill before it would evict
//! a block that it has read itself.

use std::cell::{Cell, RefCell};
use std::ops::ControlFlow::{self, Break, Continue};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::time::Instant;

use rustc_hash::FxHashSet;

use super::marks::Marks;
use crate::pg::storage::buffer::{self, Pinned, Place};
use crate::pg::storage::room;

/// Which buffers hold only blocks that the call has read, so that another read would
/// evict one of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Full {
    Shared = 1,
    /// The buffers for this session's temporary relations.
    Local = 2,
}

/// The local buffers that a call has read blocks into.
pub type FilledLocal = RefCell<FxHashSet<i32>>;

/// How many buffers were free at the last count, less the blocks that the call has read
/// since; [`u64::MAX`] before the first count. All processes of the call share it.
pub struct Free(AtomicU64);

impl Free {
    pub const fn new() -> Self {
        Self(AtomicU64::new(u64::MAX))
    }

    /// The call has read so many blocks into buffers.
    pub fn take(&self, blocks: u64) {
        let less = |free: u64| (free != u64::MAX).then(|| free.saturating_sub(blocks));
        let _ = self.0.fetch_update(Relaxed, Relaxed, less);
    }
}

/// The buffers that a call has read blocks into. When a block is read into one of these
/// again, one of the call's blocks has been evicted, by the call or by others: then all
/// buffers that could be evicted are the call's own. The marks are hints: they decide
/// only whether the call stops a few blocks earlier or later.
pub struct Filled<'a> {
    shared: Marks<'a>,
    local: &'a FilledLocal,
    free: &'a Free,
    /// Whether the call reads so few blocks that counting all free buffers would take a
    /// considerable part of its time.
    is_small: bool,
    /// When this process may count the free buffers again.
    next_count: Cell<Option<Instant>>,
}

impl<'a> Filled<'a> {
    /// How many words a call needs that reads at most `blocks` blocks into shared buffers.
    pub fn words(blocks: u64) -> usize {
        Marks::words(blocks, buffer::count())
    }

    /// The words are those of a call that reads at most `blocks` blocks.
    pub fn new(
        blocks: u64,
        free: &'a Free,
        words: &'a [AtomicU32],
        local: &'a FilledLocal,
    ) -> Self {
        Self {
            shared: Marks::new(&words[..Self::words(blocks)], buffer::count()),
            local,
            free,
            is_small: is_small(blocks, buffer::count()),
            next_count: Cell::new(None),
        }
    }

    /// How many blocks can be read, at most `max`, before one of the call's blocks would
    /// be evicted. This is an estimate, since other sessions use buffers as well.
    pub fn room(&self, is_temporary: bool, max: usize) -> usize {
        if is_temporary {
            let all = match buffer::count_local() {
                0 => max,
                all => all,
            };
            return all.saturating_sub(self.local.borrow().len()).min(max);
        }
        let free = self.count_free(max);
        match free >= max {
            true => max,
            false => {
                let is_filled = |index| self.shared.contains(index);
                free + room::count_evictable_before(max - free, is_filled)
            }
        }
    }

    /// How many buffers are free, if the server uses these before it evicts blocks, and 0
    /// if not. They are counted only if the number may matter, and for at most a tenth of
    /// the time. A small call does not count them at all: it knows of one.
    fn count_free(&self, max: usize) -> usize {
        if !room::free_list_has_any() {
            return 0;
        }
        if self.is_small {
            return 1;
        }
        let known = self.free.0.load(Relaxed);
        let start = Instant::now();
        let is_due = self.next_count.get().is_none_or(|next| start >= next);
        if known != u64::MAX && (known >= 2 * max as u64 || !is_due) {
            return usize::try_from(known).unwrap_or(usize::MAX);
        }
        let free = room::count_free();
        self.free.0.store(free as u64, Relaxed);
        self.next_count
            .set(Some(Instant::now() + 9 * start.elapsed()));
        free
    }

    /// Marks a buffer that a block was read into. `Break` if it was marked before.
    pub fn mark(&self, buffer: &Pinned) -> ControlFlow<Full> {
        match buffer.place() {
            Place::Shared(index) => {
                // If the server uses free buffers first and there are some, the buffer's
                // former block was dropped, not evicted.
                if self.shared.insert(index) && !room::free_list_has_any() {
                    return Break(Full::Shared);
                }
            }
            Place::Local(number) => {
                if !self.local.borrow_mut().insert(number) {
                    return Break(Full::Local);
                }
            }
        }
        Continue(())
    }
}

/// Whether a call that reads so many blocks is small for a server with so many buffers.
/// Looking at a buffer's header takes a few nanoseconds, reading a block a microsecond at
/// least: if each block stands for 16 headers at most, counting takes less than a tenth of
/// the call. Up to 65,536 headers are looked at in less than a millisecond.
fn is_small(blocks: u64, buffers: usize) -> bool {
    const HEADERS_FOR_A_BLOCK: u64 = 16;
    const FEW_BUFFERS: usize = 1 << 16;
    buffers > FEW_BUFFERS && blocks.saturating_mul(HEADERS_FOR_A_BLOCK) < buffers as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_call_that_may_fill_buffers_counts_the_free_ones() {
        const TERABYTE: usize = 1 << 27;
        assert!(is_small(1000, TERABYTE));
        assert!(!is_small(TERABYTE as u64 / 10, TERABYTE));
        assert!(!is_small(1, 16384));
    }
}
