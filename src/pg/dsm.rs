//! Dynamic shared memory that the leader makes and its workers attach to.
//!
//! A segment holds, one after another, a header and an array of cells, both made
//! of atomics, through which its users talk; and an array of words, which the
//! leader fills before any worker knows of the segment and which nobody changes
//! afterwards. It lives until the last process that has it mapped lets go.

use std::marker::PhantomData;
use std::ptr::NonNull;

use pgrx::pg_sys;

use super::shmem::Shared;

/// A mapped segment.
pub struct Segment<H: Shared, C: Shared> {
    segment: NonNull<pg_sys::dsm_segment>,
    lengths: Lengths,
    _contents: PhantomData<(H, C)>,
}

/// How many cells and words a segment has.
#[derive(Clone, Copy)]
#[repr(C)]
struct Lengths {
    cells: usize,
    words: usize,
}

/// What a segment begins with.
#[repr(C)]
struct Prefix<H> {
    lengths: Lengths,
    header: H,
}

impl<H: Shared, C: Shared> Segment<H, C> {
    /// Where the cells begin; the words begin after the last.
    const CELLS_AT: usize = size_of::<Prefix<H>>().next_multiple_of(align_of::<C>());
    const _ALIGNED: () = assert!(align_of::<C>() >= align_of::<u32>());

    /// Makes a segment of so many cells and words, has `fill` fill the words,
    /// and keeps it mapped until it is dropped. Raises an ERROR where the system
    /// has no more shared memory.
    pub fn create(cells: usize, words: usize, fill: impl FnOnce(&mut [u32])) -> Self {
        let () = Self::_ALIGNED;
        let lengths = Lengths { cells, words };
        // SAFETY: the new segment is as large as asked for and aligned for any
        // type, and nobody else knows of it yet.
        unsafe {
            let segment = pg_sys::dsm_create(Self::size(lengths), 0);
            let base: *mut u8 = pg_sys::dsm_segment_address(segment).cast();
            base.cast::<Prefix<H>>().write(Prefix {
                lengths,
                header: H::INITIAL,
            });
            let first_cell = base.add(Self::CELLS_AT).cast::<C>();
            for index in 0..cells {
                first_cell.add(index).write(C::INITIAL);
            }
            let first_word = base.add(Self::words_at(cells)).cast::<u32>();
            first_word.write_bytes(0, words);
            fill(std::slice::from_raw_parts_mut(first_word, words));
            pg_sys::dsm_pin_mapping(segment);
            Self::new(segment, lengths)
        }
    }

    /// Maps the segment of that handle; nothing where it is gone.
    pub fn attach(handle: u32) -> Option<Self> {
        // SAFETY: a segment of ours begins with a prefix, which was written
        // before its handle was given to anybody.
        unsafe {
            let segment = pg_sys::dsm_attach(handle);
            if segment.is_null() {
                return None;
            }
            let base = pg_sys::dsm_segment_address(segment);
            let lengths = (*base.cast::<Prefix<H>>()).lengths;
            assert!(Self::size(lengths) <= pg_sys::dsm_segment_map_length(segment));
            Some(Self::new(segment, lengths))
        }
    }

    fn new(segment: *mut pg_sys::dsm_segment, lengths: Lengths) -> Self {
        Self {
            segment: NonNull::new(segment).expect("an ERROR would have been raised"),
            lengths,
            _contents: PhantomData,
        }
    }

    fn words_at(cells: usize) -> usize {
        Self::CELLS_AT + cells * size_of::<C>()
    }

    fn size(lengths: Lengths) -> usize {
        Self::words_at(lengths.cells) + lengths.words * size_of::<u32>()
    }

    /// What another process attaches to it by.
    pub fn handle(&self) -> u32 {
        // SAFETY: the segment is mapped.
        unsafe { pg_sys::dsm_segment_handle(self.segment.as_ptr()) }
    }

    pub fn header(&self) -> &H {
        // SAFETY: mapped for as long as `self` lives, and made to be shared.
        unsafe { &(*self.base().cast::<Prefix<H>>()).header }
    }

    pub fn cells(&self) -> &[C] {
        // SAFETY: as above.
        unsafe {
            std::slice::from_raw_parts(self.base().add(Self::CELLS_AT).cast(), self.lengths.cells)
        }
    }

    pub fn words(&self) -> &[u32] {
        let at = Self::words_at(self.lengths.cells);
        // SAFETY: as above; nobody writes the words once the segment is made.
        unsafe { std::slice::from_raw_parts(self.base().add(at).cast(), self.lengths.words) }
    }

    fn base(&self) -> *const u8 {
        // SAFETY: the segment is mapped.
        unsafe { pg_sys::dsm_segment_address(self.segment.as_ptr()) }
            .cast_const()
            .cast()
    }
}

impl<H: Shared, C: Shared> Drop for Segment<H, C> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            // SAFETY: mapped, and not used any more.
            unsafe { pg_sys::dsm_detach(self.segment.as_ptr()) };
        }
    }
}
