//! Who fills buffers: a load alone, or others as well, such as sessions and replay.
//!
//! After a start the server fills buffers in their order. So those that a load has passed and
//! has not read, others have filled. Blocks that are found in buffers, and what sequential scans
//! read into their few buffers again and again, do not show.

use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;

use crate::pg::sys::read::READ_BLOCKS_MAX;

/// No buffer.
const NONE: usize = usize::MAX;

/// The buffers into which the processes of one load have read.
#[derive(Debug)]
pub struct Fills {
    /// One of the first.
    first: AtomicUsize,
    count: AtomicUsize,
    /// How many buffers between the first and the last of them others have filled, as far as is
    /// known.
    by_others: AtomicUsize,
}

impl Fills {
    pub const fn new() -> Self {
        Self {
            first: AtomicUsize::new(NONE),
            count: AtomicUsize::new(0),
            by_others: AtomicUsize::new(0),
        }
    }

    /// Counts so many buffers that were filled one after another, the last of which is `last`.
    pub fn add(&self, last: usize, count: usize) {
        let count = self.count.fetch_add(count, Relaxed) + count;
        let first = self.first.compare_exchange(NONE, last, Relaxed, Relaxed);
        let first = first.unwrap_or_else(|first| first);
        let passed = last.saturating_sub(first);
        self.by_others
            .fetch_max(passed.saturating_sub(count), Relaxed);
    }

    /// Whether others have filled more than a few. A guess, on which no more than speed depends:
    /// if a load begins when buffers are full already, it passes some that nobody has filled.
    /// `readers` is how many workers read for the load.
    pub fn are_shared(&self, readers: usize) -> bool {
        /// What the server itself reads when it starts.
        const FEW: usize = 384;
        let being_read = readers * READ_BLOCKS_MAX;
        self.by_others.load(Relaxed) > FEW + being_read + self.count.load(Relaxed) / 64
    }
}

#[cfg(test)]
mod tests {
    use super::Fills;

    #[test]
    fn buffers_that_were_passed_and_not_read_are_those_of_others() {
        let fills = Fills::new();
        assert!(!fills.are_shared(4));
        for run in 1..1000 {
            fills.add(100 + 16 * run, 16);
        }
        assert!(!fills.are_shared(4));
        fills.add(100 + 16 * 1000 + 1000, 16);
        assert!(fills.are_shared(4));
    }

    #[test]
    fn what_comes_after_the_last_buffer_says_nothing() {
        let fills = Fills::new();
        for last in [5000, 10, 5016, 26, 5032] {
            fills.add(last, 16);
        }
        assert!(!fills.are_shared(2));
    }
}
