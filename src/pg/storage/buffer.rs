//! Shared buffers: how many there are, what is in them, and pins on them.

use std::sync::atomic::Ordering::{AcqRel, Relaxed, Release};

use pgrx::pg_sys;

use crate::blocks::{Record, UsageCount};
use crate::pg::process::check_for_interrupts;
use crate::pg::sys::buffer_state::{self, AtomicWord, Word};
use crate::pg::sys::{ffi, version};

const _: () = assert!(UsageCount::COUNT == pg_sys::BM_MAX_USAGE_COUNT as usize + 1);

/// A copy of a page.
pub type Page = [u8; pg_sys::BLCKSZ as usize];

/// A block in shared buffers.
#[derive(Clone, Copy, Debug)]
pub struct CachedBlock {
    /// Which buffer it is in, counted from 0.
    pub index: usize,
    pub record: Record,
    /// False for a block of an unlogged relation, which a crash would empty.
    pub permanent: bool,
    pub dirty: bool,
    pub usage_count: UsageCount,
}

/// How many shared buffers the server has.
pub fn count() -> usize {
    // SAFETY: the word is set when the server starts, and does not change.
    usize::try_from(unsafe { pg_sys::NBuffers }).unwrap_or(0)
}

/// How many buffers this session has for temporary relations. 0 before it has used one.
pub fn count_local() -> usize {
    // SAFETY: a word of this process's own.
    usize::try_from(unsafe { (&raw const pg_sys::NLocBuffer).read() }).unwrap_or(0)
}

/// About how many blocks are in shared buffers, or of these, how many of permanent
/// relations. Nothing is locked, so blocks may come and go meanwhile. Serves interrupts.
pub fn count_cached(permanent_only: bool) -> usize {
    let wanted = match permanent_only {
        true => buffer_state::BM_TAG_VALID | buffer_state::BM_PERMANENT,
        false => buffer_state::BM_TAG_VALID,
    };
    let states = all().map(|index| state(index).load(Relaxed));
    states.filter(|state| state & wanted == wanted).count()
}

/// How many of the blocks that this process has asked for were in shared buffers already,
/// or in local ones.
pub fn hits() -> u64 {
    // SAFETY: counters of this process's own.
    let hits = unsafe {
        (&raw const pg_sys::pgBufferUsage.shared_blks_hit).read()
            + (&raw const pg_sys::pgBufferUsage.local_blks_hit).read()
    };
    u64::try_from(hits).unwrap_or(0)
}

/// Every block in shared buffers, in the order of the buffers, each as it was when it
/// was looked at: the server goes on meanwhile. Serves interrupts.
pub fn cached_blocks() -> impl Iterator<Item = CachedBlock> {
    all().filter_map(cached_block)
}

/// The indexes of all buffers, of which a large server has more than can be looked at in a
/// moment. Serves interrupts.
pub(super) fn all() -> impl Iterator<Item = usize> {
    const INTERRUPT_INTERVAL: usize = 4096;
    (0..count()).inspect(|index| {
        if index % INTERRUPT_INTERVAL == 0 {
            check_for_interrupts();
        }
    })
}

fn cached_block(index: usize) -> Option<CachedBlock> {
    let header = header(index);
    let state = state(index);
    // Without a lock: an empty buffer is no block that was missed.
    if state.load(Relaxed) & buffer_state::BM_TAG_VALID == 0 {
        return None;
    }
    // SAFETY: a tag does not change while its header is locked. Between locking and
    // unlocking, nothing panics, allocates, or calls the server.
    let (locked, tag) = unsafe {
        let locked = ffi::LockBufHdr(header);
        let tag = (*header).tag;
        state.fetch_and(!buffer_state::BM_LOCKED, Release);
        (locked, tag)
    };
    (locked & buffer_state::BM_TAG_VALID != 0).then(|| CachedBlock {
        index,
        record: version::record(&tag),
        permanent: locked & buffer_state::BM_PERMANENT != 0,
        dirty: locked & buffer_state::BM_DIRTY != 0,
        usage_count: usage_count(locked),
    })
}

/// The identity of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// A shared buffer, counted from 0.
    Shared(usize),
    /// One of this session's own, by the server's number.
    Local(i32),
}

/// A pin on a buffer, which keeps its block in it.
pub struct Pinned(pg_sys::Buffer);

impl Pinned {
    /// Takes over a pin, which is released on drop.
    ///
    /// # Safety
    /// This process has pinned the buffer, and will not release this pin otherwise.
    pub(super) unsafe fn new(buffer: pg_sys::Buffer) -> Self {
        Self(buffer)
    }

    pub fn place(&self) -> Place {
        match self.0 {
            local @ ..0 => Place::Local(local),
            _ => Place::Shared(self.index()),
        }
    }

    /// Which shared buffer it is, counted from 0.
    pub fn index(&self) -> usize {
        self.0 as usize - 1
    }

    /// A consistent copy of the page.
    pub fn copy_page(&self) -> Box<Page> {
        // SAFETY: the buffer is pinned, and no process writes to it while it is share-locked.
        unsafe {
            version::share_lock_buffer(self.0);
            let page = Box::new(pg_sys::BufferGetBlock(self.0).cast::<Page>().read());
            version::unlock_buffer(self.0);
            page
        }
    }

    /// Gives the block of a shared buffer the usage count that it once had, unless its
    /// own is higher.
    pub fn restore_usage_count(&self, usage_count: UsageCount) {
        let state = state(self.index());
        let mut old = state.load(Relaxed);
        loop {
            // Only the process that has locked the header may change the state then,
            // and it will do so soon.
            if old & buffer_state::BM_LOCKED != 0 {
                std::hint::spin_loop();
                old = state.load(Relaxed);
                continue;
            }
            // This pin has counted as a use, unless the count was at its maximum.
            let current = self::usage_count(old);
            let before = if current == UsageCount::MAX {
                current.get()
            } else {
                current.get().saturating_sub(1)
            };
            let new = buffer_state::with_usage_count(old, usage_count.get().max(before));
            match state.compare_exchange_weak(old, new, AcqRel, Relaxed) {
                Ok(_) => return,
                Err(now) => old = now,
            }
        }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            // SAFETY: the pin was taken over by `new`.
            unsafe { pg_sys::ReleaseBuffer(self.0) };
        }
    }
}

/// Gives the block in a buffer a higher usage count, unless its own is as high. The buffer
/// may have got another block since it was looked at.
pub fn raise_usage_count(index: usize, to: UsageCount) {
    change_usage_count(index, |state| (usage_count(state) < to).then_some(to));
}

/// Has the clock hand take a buffer with a clean block that was used once, unless it is in
/// use. Returns whether it will.
pub fn expose(index: usize) -> bool {
    change_usage_count(index, |state| {
        let is_clean = state & buffer_state::BM_DIRTY == 0;
        (is_clean && usage_count(state) == UsageCount::ONCE).then_some(UsageCount::new(0))
    })
}

/// Changes the usage count of a buffer that is neither empty nor pinned, to what `change` makes
/// of its state. Returns whether it was changed.
pub(super) fn change_usage_count(
    index: usize,
    change: impl FnOnce(Word) -> Option<UsageCount>,
) -> bool {
    let state = state(index);
    let old = state.load(Relaxed);
    let others = buffer_state::BUF_REFCOUNT_MASK | buffer_state::BM_LOCKED;
    if old & others != 0 || old & buffer_state::BM_TAG_VALID == 0 {
        return false;
    }
    let Some(count) = change(old) else {
        return false;
    };
    let new = buffer_state::with_usage_count(old, count.get());
    // It fails if the buffer is being used.
    state.compare_exchange(old, new, AcqRel, Relaxed).is_ok()
}

pub(super) fn usage_count(state: Word) -> UsageCount {
    UsageCount::new(buffer_state::usage_count(state))
}

fn header(index: usize) -> *mut pg_sys::BufferDesc {
    assert!(index < count());
    // SAFETY: there are `count()` headers, for as long as the server runs.
    unsafe { &raw mut (*pg_sys::BufferDescriptors.add(index)).bufferdesc }
}

/// The state word of a buffer's header.
pub(super) fn state(index: usize) -> &'static AtomicWord {
    // SAFETY: the header of a shared buffer.
    unsafe { buffer_state::state(header(index)) }
}
