//! Shared buffers.

use std::ops::Range;
use std::sync::atomic::Ordering;

use pgrx::pg_sys;

use super::btree::Page;
pub use super::compat::READS_WANT_MEMORY;
use super::compat::buffer_state::{self, AtomicWord, Word};
use super::{compat, ffi, process};
use crate::blocks::{Heat, Record};

/// A block in shared buffers.
#[derive(Clone, Copy, Debug)]
pub struct CachedBlock {
    pub record: Record,
    /// False for a block of an unlogged relation, which a crash would empty.
    pub permanent: bool,
    pub heat: Heat,
}

/// How many shared buffers the server has.
pub fn count() -> usize {
    // SAFETY: set when the server started.
    usize::try_from(unsafe { pg_sys::NBuffers }).unwrap_or(0)
}

/// How many blocks can be read in now, at most so many, without evicting another, if
/// nobody else uses any buffer.
///
/// Up to 18, the server takes free buffers from a list: while that is not empty, none
/// is evicted. On 19 it takes whatever its clock hand comes to: so this looks ahead of the
/// hand, as far as the first block that it would evict. Others see the same free buffers
/// there and take them at the same time: some are left to them.
pub fn count_free_ahead(most: usize) -> usize {
    const LEFT_TO_OTHERS: usize = 64;
    match compat::free_list_is_empty() {
        Some(true) => 0,
        Some(false) => most,
        None => {
            let states = ahead_of_clock_hand().map(|index| state(index).load(Ordering::Relaxed));
            let is_victim = |state: Word| {
                state & (buffer_state::BM_TAG_VALID | buffer_state::BUF_REFCOUNT_MASK)
                    == buffer_state::BM_TAG_VALID
                    && buffer_state::usage_count(state) == 0
            };
            states
                .take_while(|&state| !is_victim(state))
                .filter(|&state| is_free(state))
                .take(most + LEFT_TO_OTHERS)
                .count()
                .saturating_sub(LEFT_TO_OTHERS)
        }
    }
}

/// Whether there are free buffers that are taken before any block is evicted, wherever
/// the clock hand is.
pub fn free_list_has_any() -> bool {
    compat::free_list_is_empty() == Some(false)
}

/// How many buffers hold nothing and are used by nobody.
pub fn count_free() -> usize {
    count_where(is_free)
}

fn is_free(state: Word) -> bool {
    state & (buffer_state::BM_TAG_VALID | buffer_state::BUF_REFCOUNT_MASK) == 0
}

/// All buffers, in the order in which the server will look at them next for one that it
/// may take.
fn ahead_of_clock_hand() -> impl Iterator<Item = usize> + Clone {
    // SAFETY: it reads where the server stopped, and wants nothing else told.
    let start = unsafe { pg_sys::StrategySyncStart(std::ptr::null_mut(), std::ptr::null_mut()) };
    let start = usize::try_from(start).unwrap_or(0);
    (start..count()).chain(0..start)
}

/// How many blocks could be read in, at most so many, before the server evicts the
/// block of a buffer for which `keep` holds, if nobody else used any: it looks at
/// the buffers in order from where it stopped, takes the first that has not been
/// used since it last passed by, and counts a use of the others less. Where the server
/// takes free ones first, it is taken to have none. Of very many buffers only the next
/// are looked at.
pub fn count_evictable_before(most: usize, keep: impl Fn(usize) -> bool) -> usize {
    const LOOKED_AT: usize = 1 << 16;
    /// What may be read when all that was looked at tells nothing.
    const A_FEW: usize = 128;
    let count = count();
    let next = ahead_of_clock_hand().take(LOOKED_AT);
    let mut evictable = 0;
    for round in 0..=Heat::MAX.usage_count() {
        for index in next.clone() {
            let state = state(index).load(Ordering::Relaxed);
            if state & buffer_state::BUF_REFCOUNT_MASK != 0 || heat(state).usage_count() != round {
                continue;
            }
            if keep(index) {
                return evictable;
            }
            evictable += 1;
            if evictable >= most {
                return evictable;
            }
        }
        if count > LOOKED_AT {
            return evictable.max(A_FEW).min(most);
        }
    }
    evictable
}

/// How many buffers this session has for temporary relations: 0 before it has used
/// one.
pub fn count_local() -> usize {
    // SAFETY: this process's own.
    usize::try_from(unsafe { (&raw const pg_sys::NLocBuffer).read() }).unwrap_or(0)
}

/// About how many blocks are in shared buffers; of permanent relations only, if
/// wanted. Nothing is locked, so that some may come and go meanwhile.
pub fn count_cached(permanent_only: bool) -> usize {
    let wanted = match permanent_only {
        true => buffer_state::BM_TAG_VALID | buffer_state::BM_PERMANENT,
        false => buffer_state::BM_TAG_VALID,
    };
    count_where(|state| state & wanted == wanted)
}

fn count_where(condition: impl Fn(Word) -> bool) -> usize {
    (0..count())
        .filter(|&index| condition(state(index).load(Ordering::Relaxed)))
        .count()
}

/// How many of the blocks that this process asked for were in shared buffers
/// already (those of temporary relations: in local ones).
pub fn hits() -> u64 {
    // SAFETY: this process's own counters.
    let hits = unsafe {
        (&raw const pg_sys::pgBufferUsage.shared_blks_hit).read()
            + (&raw const pg_sys::pgBufferUsage.local_blks_hit).read()
    };
    u64::try_from(hits).unwrap_or(0)
}

/// Has the operating system provide the memory of these buffers now, rather than
/// page by page when they are first written to. What is in them stays.
///
/// It is only about speed: a system that does not know how (Linux before 5.14)
/// provides them later.
pub fn provide_memory(buffers: Range<usize>) {
    if let Some((start, bytes)) = pages(buffers) {
        // SAFETY: the memory of buffers that exist, which the call leaves as it is.
        unsafe { libc::madvise(start.cast_mut().cast(), bytes, libc::MADV_POPULATE_WRITE) };
    }
}

/// Maps memory that another process has provided into this one, which Linux does
/// for several pages at once where one is read; the first write to each would
/// cost a fault of its own.
pub fn map_memory(buffers: Range<usize>) {
    const FAULT_AROUND: usize = 64 * 1024;
    if let Some((start, bytes)) = pages(buffers) {
        for offset in (0..bytes).step_by(FAULT_AROUND) {
            // SAFETY: memory of buffers that exist; what is read is not used, so
            // that it does not matter who is writing there.
            unsafe { start.wrapping_add(offset).read_volatile() };
        }
    }
}

/// The memory of those of the buffers that exist, from the beginning of a page:
/// where it begins, and its size in bytes.
fn pages(buffers: Range<usize>) -> Option<(*const u8, usize)> {
    const PAGE: usize = 4096;
    let block = pg_sys::BLCKSZ as usize;
    let buffers = buffers.start..buffers.end.min(count());
    // SAFETY: set when the server started.
    let memory = unsafe { pg_sys::BufferBlocks }.cast::<u8>();
    let first = memory.wrapping_add(buffers.start * block);
    let into_page = first.addr() % PAGE;
    (!buffers.is_empty()).then(|| {
        (
            first.wrapping_sub(into_page).cast_const(),
            buffers.len() * block + into_page,
        )
    })
}

/// How reading into free buffers ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadEnd {
    /// All is read, or as much as was wanted.
    Over,
    /// There is no free buffer any more.
    Full,
}

/// Which buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    Shared(usize),
    Local(i32),
}

/// A buffer that this process has pinned, so that it keeps its block.
pub struct Pinned(pg_sys::Buffer);

impl Pinned {
    /// Takes over a pin.
    ///
    /// # Safety
    /// This process has the shared buffer pinned once more than anybody else
    /// will unpin it.
    pub(super) unsafe fn new(buffer: pg_sys::Buffer) -> Self {
        Self(buffer)
    }

    /// Which buffer it is: a shared one, as [`Pinned::index`] has it, or one of
    /// this session's own.
    pub fn place(&self) -> Place {
        match self.0 {
            local @ ..0 => Place::Local(local),
            _ => Place::Shared(self.index()),
        }
    }

    /// A copy of the page, as it was at one moment.
    pub fn copy_page(&self) -> Box<Page> {
        // SAFETY: pinned, and locked while it is copied.
        unsafe {
            compat::share_lock_buffer(self.0, true);
            let page = Box::new(pg_sys::BufferGetBlock(self.0).cast::<Page>().read());
            compat::share_lock_buffer(self.0, false);
            page
        }
    }

    /// Which of the server's buffers it is, counted from 0.
    pub fn index(&self) -> usize {
        self.0 as usize - 1
    }

    /// Gives the block the heat that it once had, unless it is hotter already.
    pub fn restore_heat(&self, heat: Heat) {
        let state = state(self.index());
        let mut old = state.load(Ordering::Relaxed);
        loop {
            // Whoever has the header locked changes it as a whole, soon.
            if old & buffer_state::BM_LOCKED != 0 {
                std::hint::spin_loop();
                old = state.load(Ordering::Relaxed);
                continue;
            }
            // The pin itself counts as one use, in a new buffer as in an old one
            // that is not at its maximum.
            let current = self::heat(old);
            let before = if current == Heat::MAX {
                current.usage_count()
            } else {
                current.usage_count().saturating_sub(1)
            };
            let new = buffer_state::with_usage_count(old, heat.usage_count().max(before));
            match state.compare_exchange_weak(old, new, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => return,
                Err(now) => old = now,
            }
        }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            // SAFETY: the pin that was taken over.
            unsafe { pg_sys::ReleaseBuffer(self.0) };
        }
    }
}

fn heat(state: Word) -> Heat {
    Heat::from_usage_count(buffer_state::usage_count(state))
}

fn header(index: usize) -> *mut pg_sys::BufferDesc {
    assert!(index < count());
    // SAFETY: that many descriptors are there for as long as the server is.
    unsafe { &raw mut (*pg_sys::BufferDescriptors.add(index)).bufferdesc }
}

fn state(index: usize) -> &'static AtomicWord {
    // SAFETY: one of the server's descriptors.
    unsafe { buffer_state::state(header(index)) }
}

/// Every block in shared buffers, in the order of the buffers. Each is as it was
/// when it was looked at: the server goes on meanwhile. Serves interrupts.
pub fn cached_blocks() -> impl Iterator<Item = CachedBlock> {
    (0..count()).filter_map(|index| {
        if index % 4096 == 0 {
            process::check_for_interrupts();
        }
        cached_block(index)
    })
}

fn cached_block(index: usize) -> Option<CachedBlock> {
    let header = header(index);
    let state = state(index);
    // An empty buffer needs no lock to be passed over.
    if state.load(Ordering::Relaxed) & buffer_state::BM_TAG_VALID == 0 {
        return None;
    }
    // SAFETY: a buffer's header; the tag is stable while it is locked. Nothing
    // between the lock and its release panics, allocates or calls the server.
    let (locked, tag) = unsafe {
        let locked = ffi::LockBufHdr(header);
        let tag = (*header).tag;
        state.fetch_and(!buffer_state::BM_LOCKED, Ordering::Release);
        (locked, tag)
    };
    (locked & buffer_state::BM_TAG_VALID != 0).then(|| CachedBlock {
        record: compat::record(&tag),
        permanent: locked & buffer_state::BM_PERMANENT != 0,
        heat: heat(locked),
    })
}
