//! The buffers that a call has filled, and how many more it can fill before it would evict
//! a block that it has read itself.

use std::cell::{Cell, RefCell};
use std::ops::ControlFlow::{self, Break, Continue};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::time::Instant;

use rustc_hash::FxHashSet;

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
/// buffers that could be evicted are the call's own. The bits are hints: they decide
/// only whether the call stops a few blocks earlier or later.
pub struct Filled<'a> {
    shared: &'a [AtomicU32],
    local: &'a FilledLocal,
    free: &'a Free,
    /// When this process may count the free buffers again.
    next_count: Cell<Option<Instant>>,
}

impl<'a> Filled<'a> {
    /// How many words hold one bit for each shared buffer.
    pub fn words() -> usize {
        buffer::count().div_ceil(32)
    }

    pub fn new(free: &'a Free, words: &'a [AtomicU32], local: &'a FilledLocal) -> Self {
        Self {
            shared: &words[..Self::words()],
            local,
            free,
            next_count: Cell::new(None),
        }
    }

    /// How many blocks can be read, at most `most`, before one of the call's blocks would
    /// be evicted. This is an estimate, since other sessions use buffers as well.
    pub fn room(&self, is_temporary: bool, most: usize) -> usize {
        if is_temporary {
            let all = match buffer::count_local() {
                0 => most,
                all => all,
            };
            return all.saturating_sub(self.local.borrow().len()).min(most);
        }
        let is_filled =
            |index: usize| self.shared[index / 32].load(Relaxed) & (1 << (index % 32)) != 0;
        let free = self.count_free(most);
        match free >= most {
            true => most,
            false => free + room::count_evictable_before(most - free, is_filled),
        }
    }

    /// How many buffers are free, if the server uses these before it evicts blocks, and 0
    /// if not. They are counted only if the number may matter, and for at most a tenth of
    /// the time.
    fn count_free(&self, most: usize) -> usize {
        if !room::free_list_has_any() {
            return 0;
        }
        let known = self.free.0.load(Relaxed);
        let start = Instant::now();
        let is_due = self.next_count.get().is_none_or(|next| start >= next);
        if known != u64::MAX && (known >= 2 * most as u64 || !is_due) {
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
                let bit = 1 << (index % 32);
                let before = self.shared[index / 32].fetch_or(bit, Relaxed);
                // If the server uses free buffers first and there are some, the buffer's
                // former block was dropped, not evicted.
                if before & bit != 0 && !room::free_list_has_any() {
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
