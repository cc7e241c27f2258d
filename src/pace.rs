//! Pacing: how long a relation's lock is held while its blocks are read.
//!
//! Workers of a load and processes of a call read in turns. After each turn they release
//! the lock, so that a process that waits for it is next.

use std::cell::Cell;
use std::time::Duration;

/// How long a turn takes.
pub const TURN: Duration = Duration::from_millis(20);

/// How many blocks a turn may ask for. What is being read when the time is over is read to
/// its end. So after a turn that has taken too long, the next asks for fewer.
pub struct Pace(Cell<usize>);

impl Pace {
    pub fn new() -> Self {
        Self(Cell::new(usize::MAX))
    }

    pub fn max_blocks(&self) -> usize {
        self.0.get()
    }

    /// Adapts the next turn to one that has read so many blocks in that time.
    pub fn adapt(&self, time: Duration, blocks: usize) {
        self.0.set(if time > 3 * TURN {
            (blocks / 2).max(1)
        } else {
            self.0.get().saturating_mul(2)
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_turn_that_took_too_long_is_followed_by_one_of_fewer_blocks() {
        let pace = Pace::new();
        pace.adapt(TURN, 512);
        assert_eq!(pace.max_blocks(), usize::MAX);
        pace.adapt(4 * TURN, 64);
        assert_eq!(pace.max_blocks(), 32);
        pace.adapt(4 * TURN, 1);
        assert_eq!(pace.max_blocks(), 1);
        pace.adapt(TURN, 1);
        assert_eq!(pace.max_blocks(), 2);
    }
}
