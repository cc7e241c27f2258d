//! Dynamic shared memory that the leader makes and its workers attach to.
//!
//! A segment begins with a fixed structure of atomics, through which both sides
//! talk, and goes on with an array of words, which the leader fills before any
//! worker knows of the segment and which nobody changes afterwards. It lives
//! until the last process that has it mapped lets go.

use std::marker::PhantomData;
use std::ptr::NonNull;

use pgrx::pg_sys;

use super::shmem::Shared;

/// A mapped segment.
pub struct Segment<T: Shared> {
    segment: NonNull<pg_sys::dsm_segment>,
    words: usize,
    _header: PhantomData<T>,
}

impl<T: Shared> Segment<T> {
    /// Where the words begin.
    const WORDS_AT: usize = size_of::<Prefix<T>>();

    /// Makes a segment with room for `words` words, has `fill` fill them, and
    /// keeps it mapped until it is dropped. Raises an ERROR where the system has
    /// no more shared memory.
    pub fn create(header: T, words: usize, fill: impl FnOnce(&mut [u32])) -> Self {
        let size = Self::WORDS_AT + words * size_of::<u32>();
        // SAFETY: the new segment is as large as asked for, aligned for any
        // type, and nobody else knows of it yet.
        let segment = unsafe {
            let segment = pg_sys::dsm_create(size, 0);
            let base = pg_sys::dsm_segment_address(segment);
            let prefix = base.cast::<Prefix<T>>();
            prefix.write(Prefix { words, header });
            let words_at = base.cast::<u8>().add(Self::WORDS_AT).cast::<u32>();
            words_at.write_bytes(0, words);
            fill(std::slice::from_raw_parts_mut(words_at, words));
            pg_sys::dsm_pin_mapping(segment);
            segment
        };
        Self::new(segment, words)
    }

    /// Maps the segment of that handle; nothing where it is gone.
    pub fn attach(handle: u32) -> Option<Self> {
        // SAFETY: a segment of ours begins with a prefix, whose words were
        // written before its handle was given to anybody.
        unsafe {
            let segment = pg_sys::dsm_attach(handle);
            if segment.is_null() {
                return None;
            }
            let prefix = pg_sys::dsm_segment_address(segment).cast::<Prefix<T>>();
            let words = (*prefix).words;
            assert!(
                Self::WORDS_AT + words * size_of::<u32>()
                    <= pg_sys::dsm_segment_map_length(segment)
            );
            Some(Self::new(segment, words))
        }
    }

    fn new(segment: *mut pg_sys::dsm_segment, words: usize) -> Self {
        Self {
            segment: NonNull::new(segment).expect("dsm_create raises an ERROR otherwise"),
            words,
            _header: PhantomData,
        }
    }

    /// What another process attaches to it by.
    pub fn handle(&self) -> u32 {
        // SAFETY: the segment is mapped.
        unsafe { pg_sys::dsm_segment_handle(self.segment.as_ptr()) }
    }

    pub fn header(&self) -> &T {
        // SAFETY: the segment is mapped for as long as `self` lives, and T is
        // made to be shared.
        unsafe { &(*self.base().cast::<Prefix<T>>()).header }
    }

    pub fn words(&self) -> &[u32] {
        // SAFETY: as above; nobody writes the words once the segment is made.
        unsafe {
            std::slice::from_raw_parts(self.base().add(Self::WORDS_AT).cast::<u32>(), self.words)
        }
    }

    fn base(&self) -> *const u8 {
        // SAFETY: the segment is mapped.
        unsafe {
            pg_sys::dsm_segment_address(self.segment.as_ptr())
                .cast_const()
                .cast()
        }
    }
}

impl<T: Shared> Drop for Segment<T> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            // SAFETY: mapped, and not used any more.
            unsafe { pg_sys::dsm_detach(self.segment.as_ptr()) };
        }
    }
}

/// What a segment begins with.
#[repr(C)]
struct Prefix<T> {
    words: usize,
    header: T,
}
