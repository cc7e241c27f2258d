//! Shared buffers.

use std::sync::atomic::{AtomicU32, Ordering};

use pgrx::pg_sys;

use super::{compat, ffi, process};
use crate::blocks::Record;

/// A block in shared buffers.
#[derive(Clone, Copy, Debug)]
pub struct CachedBlock {
    pub record: Record,
    /// False for a block of an unlogged relation, which a crash would empty.
    pub permanent: bool,
}

/// How many shared buffers the server has.
pub fn count() -> usize {
    // SAFETY: set when the server started.
    usize::try_from(unsafe { pg_sys::NBuffers }).unwrap_or(0)
}

/// Whether a block can be read in without evicting another.
pub fn have_free_buffer() -> bool {
    // SAFETY: it looks at the head of the free list, without a lock.
    unsafe { pg_sys::have_free_buffer() }
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
    // SAFETY: `index` is less than NBuffers, and the descriptors are there for
    // as long as the server is.
    let header = unsafe { &raw mut (*pg_sys::BufferDescriptors.add(index)).bufferdesc };
    // SAFETY: the state is a word that every process changes atomically.
    let state = unsafe { AtomicU32::from_ptr(&raw mut (*header).state.value) };
    // An empty buffer needs no lock to be passed over.
    if state.load(Ordering::Relaxed) & pg_sys::BM_TAG_VALID == 0 {
        return None;
    }
    // SAFETY: a buffer's header; the tag is stable while it is locked. Nothing
    // between the lock and its release panics, allocates or calls the server.
    let (locked, tag) = unsafe {
        let locked = ffi::LockBufHdr(header);
        let tag = (*header).tag;
        state.store(locked & !pg_sys::BM_LOCKED, Ordering::Release);
        (locked, tag)
    };
    (locked & pg_sys::BM_TAG_VALID != 0).then(|| CachedBlock {
        record: compat::record(&tag),
        permanent: locked & pg_sys::BM_PERMANENT != 0,
    })
}
