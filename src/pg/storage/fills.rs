//! Who fills buffers: a load alone, or sessions as well.
//!
//! While there are free buffers, and until the clock hand has gone round once, the server fills
//! them in their order. So those that a load has passed and has not filled, others have.

use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;

/// The buffers that the processes of one load have filled.
#[derive(Debug)]
pub struct Fills {
    /// The first of them.
    first: AtomicUsize,
    count: AtomicUsize,
    /// How many buffers before the last of them others have filled, as far as is known.
    by_others: AtomicUsize,
}

impl Fills {
    pub const fn new() -> Self {
        Self {
            first: AtomicUsize::new(usize::MAX),
            count: AtomicUsize::new(0),
            by_others: AtomicUsize::new(0),
        }
    }

    /// Counts so many buffers that were filled one after another, the last of which is `last`.
    pub fn add(&self, last: usize, count: usize) {
        let count = self.count.fetch_add(count, Relaxed) + count;
        let first = self.first.fetch_min(last, Relaxed).min(last);
        self.by_others
            .fetch_max((last - first).saturating_sub(count), Relaxed);
    }

    /// Whether others have filled more than a few. It is a guess: buffers that are filled in
    /// another order count as well.
    pub fn are_shared(&self) -> bool {
        /// What the processes of a load may be about to fill, and what the server reads when it
        /// starts.
        const FEW: usize = 512;
        self.by_others.load(Relaxed) > FEW + self.count.load(Relaxed) / 64
    }
}

#[cfg(test)]
mod tests {
    use super::Fills;

    #[test]
    fn buffers_that_were_passed_and_not_filled_are_those_of_others() {
        let fills = Fills::new();
        assert!(!fills.are_shared());
        for run in 1..1000 {
            fills.add(100 + 16 * run, 16);
        }
        assert!(!fills.are_shared());
        fills.add(100 + 16 * 1000 + 1000, 16);
        assert!(fills.are_shared());
        // Once the hand is round, it says nothing more.
        let fills = Fills::new();
        fills.add(5000, 16);
        fills.add(10, 16);
        assert!(!fills.are_shared());
    }
}
