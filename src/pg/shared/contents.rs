//! The contents of a piece of shared memory: a header, an array of cells, one of
//! counters, and one of words, one after another.

use std::sync::atomic::AtomicU32;

/// What may lie in shared memory.
///
/// # Safety
/// It has no pointers, which would mean nothing to another process, and nothing to
/// drop. What changes while it is shared is atomic, and valid with any bits that may be
/// stored there; or only the server's functions change it, under a lock of theirs.
pub unsafe trait Shared: Sync + 'static {}

/// A word of shared memory, valid with any bits.
///
/// # Safety
/// It has the size and alignment of a `u32`, and zero is a valid value.
pub unsafe trait Word: Shared {}

// SAFETY: a number without padding. It does not change while it is shared.
unsafe impl Shared for u32 {}
// SAFETY: a `u32` is one.
unsafe impl Word for u32 {}
// SAFETY: an atomic number without padding.
unsafe impl Shared for AtomicU32 {}
// SAFETY: an `AtomicU32` has the layout of a `u32`.
unsafe impl Word for AtomicU32 {}

/// A header, cells, counters and words, somewhere in memory.
pub struct Contents<'a, H, C, W> {
    pub header: &'a H,
    pub cells: &'a [C],
    pub counters: &'a [AtomicU32],
    pub words: &'a [W],
}

/// How many cells, counters and words there are.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Lengths {
    pub cells: usize,
    pub counters: usize,
    pub words: usize,
}

/// What the memory begins with.
#[repr(C)]
struct Prefix<H> {
    /// What has written the contents, see [`Contents::STAMP`].
    stamp: u64,
    lengths: Lengths,
    header: H,
}

impl<'a, H: Shared, C: Shared, W: Word> Contents<'a, H, C, W> {
    /// Where the cells begin; the counters follow the last cell, and the words the last
    /// counter.
    const CELLS_AT: usize = size_of::<Prefix<H>>().next_multiple_of(align_of::<C>());
    const COUNTERS_ARE_ALIGNED: () = assert!(align_of::<C>() >= align_of::<AtomicU32>());
    const WORDS_ARE_ALIGNED: () = assert!(align_of::<AtomicU32>() >= align_of::<W>());

    /// Stands for the version of the library and the sizes of the types. A process that was
    /// started by another version, of a library that is not preloaded, finds another stamp.
    const STAMP: u64 = {
        let version = env!("CARGO_PKG_VERSION").as_bytes();
        let mut stamp = (size_of::<H>() << 32 | size_of::<C>()) as u64;
        let mut index = 0;
        while index < version.len() {
            stamp = stamp.wrapping_mul(31).wrapping_add(version[index] as u64);
            index += 1;
        }
        stamp
    };

    fn counters_at(lengths: Lengths) -> usize {
        let () = Self::COUNTERS_ARE_ALIGNED;
        Self::CELLS_AT + lengths.cells * size_of::<C>()
    }

    fn words_at(lengths: Lengths) -> usize {
        let () = Self::WORDS_ARE_ALIGNED;
        Self::counters_at(lengths) + lengths.counters * size_of::<AtomicU32>()
    }

    /// How many bytes they take.
    pub fn size(lengths: Lengths) -> usize {
        Self::words_at(lengths) + lengths.words * size_of::<W>()
    }

    /// Writes them: the header, copies of the cells, counters, which are zero, and words,
    /// which are zero until `fill` fills them.
    ///
    /// # Safety
    /// From `base` on there are [`Contents::size`] bytes, aligned for any type, that no
    /// one else uses yet and that stay for `'a`.
    pub unsafe fn write(
        base: *mut u8,
        lengths: Lengths,
        header: H,
        cells: &[C],
        fill: impl FnOnce(&mut [W]),
    ) -> Self {
        assert_eq!(cells.len(), lengths.cells);
        // SAFETY: all four parts lie within the size, each aligned for its type. Cells
        // have nothing to drop, so they may be copied bit by bit.
        unsafe {
            base.cast::<Prefix<H>>().write(Prefix {
                stamp: Self::STAMP,
                lengths,
                header,
            });
            let first_cell: *mut C = base.add(Self::CELLS_AT).cast();
            first_cell.copy_from_nonoverlapping(cells.as_ptr(), cells.len());
            let first_counter: *mut AtomicU32 = base.add(Self::counters_at(lengths)).cast();
            first_counter.write_bytes(0, lengths.counters);
            let first_word: *mut W = base.add(Self::words_at(lengths)).cast();
            first_word.write_bytes(0, lengths.words);
            fill(std::slice::from_raw_parts_mut(first_word, lengths.words));
            Self::at(base)
        }
    }

    /// How many cells, counters and words there are. `None` if another version of this
    /// library has written them.
    ///
    /// # Safety
    /// Contents of some types were written to `base`, by this library or another version of
    /// it, which begins them in the same way.
    pub unsafe fn lengths(base: *const u8) -> Option<Lengths> {
        // SAFETY: they begin with a prefix, whose stamp and lengths do not change.
        unsafe {
            let prefix = base.cast::<Prefix<H>>();
            ((*prefix).stamp == Self::STAMP).then(|| (*prefix).lengths)
        }
    }

    /// Finds them where they were written.
    ///
    /// # Safety
    /// Contents were written to `base`, by this library or another version of it, and stay
    /// there for `'a`.
    pub unsafe fn at(base: *const u8) -> Self {
        // SAFETY: each part lies where `write` has written it.
        unsafe {
            let lengths = Self::lengths(base).expect("another version of this library wrote them");
            let cells = base.add(Self::CELLS_AT).cast();
            let counters = base.add(Self::counters_at(lengths)).cast();
            let words = base.add(Self::words_at(lengths)).cast();
            Self {
                header: &(*base.cast::<Prefix<H>>()).header,
                cells: std::slice::from_raw_parts(cells, lengths.cells),
                counters: std::slice::from_raw_parts(counters, lengths.counters),
                words: std::slice::from_raw_parts(words, lengths.words),
            }
        }
    }
}
