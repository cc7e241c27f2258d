//! The state word of a buffer's header: its type, and the meaning of its bits.
//!
//! It is changed by atomic operations only. Up to 18 it has 32 bits, and only the process
//! that has locked the header changes it. On 19 it has 64 bits, and other processes may
//! unpin the buffer while the header is locked, by an atomic subtraction. So unlocking
//! must not store a whole word.

use pgrx::pg_sys;

pub use word::{
    AtomicWord, BM_DIRTY, BM_LOCKED, BM_PERMANENT, BM_TAG_VALID, BUF_REFCOUNT_MASK,
    BUF_USAGECOUNT_MASK, BUF_USAGECOUNT_ONE, Word,
};

#[cfg(any(feature = "pg15", feature = "pg16", feature = "pg17", feature = "pg18"))]
mod word {
    pub use pgrx::pg_sys::{
        BM_DIRTY, BM_LOCKED, BM_PERMANENT, BM_TAG_VALID, BUF_REFCOUNT_MASK, BUF_USAGECOUNT_MASK,
        BUF_USAGECOUNT_ONE,
    };

    pub type Word = u32;
    pub type AtomicWord = std::sync::atomic::AtomicU32;
}

/// Macros of 19's `buf_internals.h`, which pgrx does not bind.
#[cfg(not(any(feature = "pg15", feature = "pg16", feature = "pg17", feature = "pg18")))]
mod word {
    use pgrx::pg_sys;

    pub type Word = u64;
    pub type AtomicWord = std::sync::atomic::AtomicU64;

    pub const BUF_REFCOUNT_MASK: Word = (1 << pg_sys::BUF_REFCOUNT_BITS) - 1;
    pub const BUF_USAGECOUNT_ONE: Word = 1 << pg_sys::BUF_USAGECOUNT_SHIFT;
    pub const BUF_USAGECOUNT_MASK: Word =
        ((1 << pg_sys::BUF_USAGECOUNT_BITS) - 1) << pg_sys::BUF_USAGECOUNT_SHIFT;

    pub const BM_LOCKED: Word = flag(0);
    pub const BM_DIRTY: Word = flag(1);
    pub const BM_TAG_VALID: Word = flag(3);
    pub const BM_PERMANENT: Word = flag(9);

    const fn flag(number: u32) -> Word {
        1 << (pg_sys::BUF_FLAG_SHIFT + number)
    }
}

/// The usage count, at most `BM_MAX_USAGE_COUNT`.
#[allow(clippy::unnecessary_cast)] // The word is larger on 19.
pub fn usage_count(state: Word) -> u32 {
    ((state & BUF_USAGECOUNT_MASK) >> pg_sys::BUF_USAGECOUNT_SHIFT) as u32
}

/// The state with that usage count instead of its own.
pub fn with_usage_count(state: Word, usage_count: u32) -> Word {
    (state & !BUF_USAGECOUNT_MASK) | (Word::from(usage_count) * BUF_USAGECOUNT_ONE)
}

/// The state word of a buffer's header.
///
/// # Safety
/// `header` is that of a shared buffer.
pub unsafe fn state<'a>(header: *mut pg_sys::BufferDesc) -> &'a AtomicWord {
    // SAFETY: headers of shared buffers outlive this process, and all processes access the
    // word by atomic operations.
    unsafe { AtomicWord::from_ptr(&raw mut (*header).state.value) }
}
