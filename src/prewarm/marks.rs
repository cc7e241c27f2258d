//! Which shared buffers a call has read blocks into: a set of buffer numbers in words that
//! all processes of the call share.
//!
//! A large call has a bit for each shared buffer. With a terabyte of buffers that is 16 MB,
//! which a call for a small relation would have to clear, and copy for its workers. Such a
//! call has a hash table instead, with two places for each block that it may read.

use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::Relaxed;

/// The set. Its orderings are relaxed: what it says is a hint.
#[derive(Clone, Copy)]
pub enum Marks<'a> {
    Bits(&'a [AtomicU32]),
    /// Each word is the number of a buffer plus one, or 0. The number of words is a power
    /// of two, at most 2^31.
    Table(&'a [AtomicU32]),
}

impl<'a> Marks<'a> {
    /// How many words the set takes for a call that reads at most `blocks` blocks into
    /// `buffers` buffers.
    pub fn words(blocks: u64, buffers: usize) -> usize {
        let bits = buffers.div_ceil(u32::BITS as usize);
        let table = blocks.saturating_mul(2).checked_next_power_of_two();
        match table.and_then(|table| usize::try_from(table).ok()) {
            Some(table) if table < bits => table,
            _ => bits,
        }
    }

    /// The set in words that were zero at first, as many as [`Self::words`] says.
    pub fn new(words: &'a [AtomicU32], buffers: usize) -> Self {
        match words.len() == buffers.div_ceil(u32::BITS as usize) {
            true => Self::Bits(words),
            false => Self::Table(words),
        }
    }

    /// Whether the buffer is in the set.
    pub fn contains(self, buffer: usize) -> bool {
        match self {
            Self::Bits(words) => {
                let (word, bit) = Self::bit(buffer);
                words[word].load(Relaxed) & bit != 0
            }
            Self::Table(words) => Self::places(words, buffer)
                .map(|place| place.load(Relaxed))
                .take_while(|&entry| entry != 0)
                .any(|entry| entry == Self::entry(buffer)),
        }
    }

    /// Adds the buffer. Returns whether it was in the set before.
    pub fn insert(self, buffer: usize) -> bool {
        match self {
            Self::Bits(words) => {
                let (word, bit) = Self::bit(buffer);
                words[word].fetch_or(bit, Relaxed) & bit != 0
            }
            Self::Table(words) => {
                for place in Self::places(words, buffer) {
                    let entry = match place.load(Relaxed) {
                        0 => {
                            let entry = Self::entry(buffer);
                            place.compare_exchange(0, entry, Relaxed, Relaxed).err()
                        }
                        entry => Some(entry),
                    };
                    match entry {
                        None => return false,
                        Some(entry) if entry == Self::entry(buffer) => return true,
                        // Another buffer has the place.
                        Some(_) => {}
                    }
                }
                // A full table, which has twice as many places as the call reads blocks.
                false
            }
        }
    }

    fn bit(buffer: usize) -> (usize, u32) {
        let bits = u32::BITS as usize;
        (buffer / bits, 1 << (buffer % bits))
    }

    #[expect(
        clippy::cast_possible_truncation,
        reason = "the number of buffers has 31 bits"
    )]
    fn entry(buffer: usize) -> u32 {
        buffer as u32 + 1
    }

    /// The places at which the buffer may stand, in the order in which they are tried. The
    /// first is that of Fibonacci hashing: a call fills long runs of buffers, which would
    /// otherwise stand in each other's way.
    fn places(words: &'a [AtomicU32], buffer: usize) -> impl Iterator<Item = &'a AtomicU32> {
        const GOLDEN_RATIO: u32 = 0x9e37_79b9;
        let hash = Self::entry(buffer).wrapping_mul(GOLDEN_RATIO);
        let bits = words.len().max(1).ilog2();
        let first = hash.checked_shr(u32::BITS - bits).unwrap_or(0) as usize;
        let (before, after) = words.split_at(first);
        after.iter().chain(before)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn zeroed(count: usize) -> Vec<AtomicU32> {
        (0..count).map(|_| AtomicU32::new(0)).collect()
    }

    #[test]
    fn a_call_for_a_small_relation_takes_memory_for_its_blocks_only() {
        const TERABYTE: usize = 1 << 27;
        assert_eq!(Marks::words(100, TERABYTE), 256);
        assert_eq!(Marks::words(0, TERABYTE), 1);
        assert_eq!(Marks::words(1 << 30, TERABYTE), TERABYTE / 32);
        assert_eq!(Marks::words(u64::MAX, TERABYTE), TERABYTE / 32);
        assert_eq!(Marks::words(1000, 4096), 128);
    }

    #[test]
    fn both_kinds_contain_what_was_inserted_and_nothing_else() {
        const BUFFERS: usize = 1 << 20;
        for blocks in [1000, u64::from(u32::MAX)] {
            let words = zeroed(Marks::words(blocks, BUFFERS));
            let marks = Marks::new(&words, BUFFERS);
            assert_eq!(matches!(marks, Marks::Table(_)), blocks == 1000);
            // Many of them collide in the table, and one is the last buffer.
            let buffers = || (0..1000).map(|index| BUFFERS - 1 - index * 1024);
            for buffer in buffers() {
                assert!(!marks.contains(buffer));
                assert!(!marks.insert(buffer));
                assert!(marks.insert(buffer));
            }
            assert!(buffers().all(|buffer| marks.contains(buffer)));
            assert!(buffers().all(|buffer| !marks.contains(buffer - 1)));
        }
    }

    #[test]
    fn a_full_table_contains_no_more_and_ends_all_the_same() {
        let words = zeroed(2);
        let marks = Marks::Table(&words);
        assert!(
            ![10, 20, 30]
                .map(|buffer| marks.insert(buffer))
                .contains(&true)
        );
        assert!(marks.contains(10) && marks.contains(20) && !marks.contains(30));
    }
}
