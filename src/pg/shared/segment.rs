//! Dynamic shared memory that one process makes and others attach to.
//!
//! The process that makes a segment fills it before any other knows of it. The segment
//! lives until the last process that has mapped it detaches.

use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU32;

use pgrx::pg_sys;

use super::contents::{Contents, Lengths, Shared};

/// A mapped segment with a header, cells, counters, and words that do not change.
pub struct Segment<H: Shared, C: Shared> {
    segment: NonNull<pg_sys::dsm_segment>,
    _contents: PhantomData<(H, C)>,
}

impl<H: Shared, C: Shared> Segment<H, C> {
    /// Makes a segment, whose counters are zero and whose words `fill` fills. Raises an
    /// ERROR if the system has no more shared memory.
    pub fn create(
        header: H,
        cells: &[C],
        counters: usize,
        words: usize,
        fill: impl FnOnce(&mut [u32]),
    ) -> Self {
        let lengths = Lengths {
            cells: cells.len(),
            counters,
            words,
        };
        // SAFETY: the new segment has the size asked for, is aligned for any type, and
        // is not known to any other process.
        unsafe {
            let segment = pg_sys::dsm_create(Contents::<H, C, u32>::size(lengths), 0);
            let base = pg_sys::dsm_segment_address(segment).cast();
            Contents::<H, C, u32>::write(base, lengths, header, cells, fill);
            // It stays mapped after the end of the transaction.
            pg_sys::dsm_pin_mapping(segment);
            Self::new(segment).expect("dsm_create raises an ERROR otherwise")
        }
    }

    /// Maps the segment of that handle. `None` if it is gone, or was made by another version
    /// of this library.
    pub fn attach(handle: u32) -> Option<Self> {
        // SAFETY: a segment whose handle was passed on was written by this library, or by
        // another version of it.
        unsafe {
            let segment = Self::new(pg_sys::dsm_attach(handle))?;
            let lengths = Contents::<H, C, u32>::lengths(segment.base())?;
            let size = pg_sys::dsm_segment_map_length(segment.segment.as_ptr());
            assert!(Contents::<H, C, u32>::size(lengths) <= size);
            Some(segment)
        }
    }

    fn new(segment: *mut pg_sys::dsm_segment) -> Option<Self> {
        Some(Self {
            segment: NonNull::new(segment)?,
            _contents: PhantomData,
        })
    }

    /// The handle by which other processes attach to it.
    pub fn handle(&self) -> u32 {
        // SAFETY: the segment is mapped while `self` lives.
        unsafe { pg_sys::dsm_segment_handle(self.segment.as_ptr()) }
    }

    pub fn header(&self) -> &H {
        self.contents().header
    }

    pub fn cells(&self) -> &[C] {
        self.contents().cells
    }

    pub fn counters(&self) -> &[AtomicU32] {
        self.contents().counters
    }

    pub fn words(&self) -> &[u32] {
        self.contents().words
    }

    fn contents(&self) -> Contents<'_, H, C, u32> {
        // SAFETY: `create` has written them, here or in the process that made the
        // segment, and it is mapped while `self` lives.
        unsafe { Contents::at(self.base()) }
    }

    fn base(&self) -> *const u8 {
        // SAFETY: the segment is mapped while `self` lives.
        unsafe { pg_sys::dsm_segment_address(self.segment.as_ptr()) }
            .cast_const()
            .cast()
    }
}

impl<H: Shared, C: Shared> Drop for Segment<H, C> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            // SAFETY: it is mapped, and nothing borrows it any more.
            unsafe { pg_sys::dsm_detach(self.segment.as_ptr()) };
        }
    }
}
