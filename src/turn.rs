//! Turns: how blocks are read without standing in anybody's way.
//!
//! Whoever reads a relation gives its lock back after every turn of some
//! milliseconds, so that whoever waits for it is next. Both the workers of a load
//! and the callers of the SQL functions work like that; what they share is here.

use std::cell::Cell;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use crate::pg::buffer;

/// How long a relation's lock is held before whoever waits for it has a turn.
pub const TURN: Duration = Duration::from_millis(20);

/// How many blocks a turn may ask for. What is being read ahead when the time is
/// over is read to its end, so where that takes long, turns ask for fewer.
pub struct Pace(Cell<usize>);

impl Pace {
    pub fn new() -> Self {
        Self(Cell::new(usize::MAX))
    }

    pub fn most_blocks(&self) -> usize {
        self.0.get()
    }

    /// Has the next turn ask for fewer blocks than this one has read, if that took
    /// too long.
    pub fn adapt(&self, time: Duration, blocks: usize) {
        self.0.set(if time > 3 * TURN {
            (blocks / 2).max(1)
        } else {
            self.0.get().saturating_mul(2)
        });
    }
}

/// For how many buffers memory is provided in one go.
const BUFFERS_AT_ONCE: usize = 128;

/// How far buffers have their memory, as all processes that fill them together see
/// it: those before this one have it, or somebody is about to see to that.
pub struct Provided(AtomicUsize);

impl Provided {
    pub const fn new() -> Self {
        Self(AtomicUsize::new(0))
    }

    /// The buffers whose memory is to be provided next, for a process that uses
    /// this one; nothing while there are enough. Buffers are used in order, more
    /// or less, by all processes together, and no two see to the same ones: they
    /// would only wait for each other.
    fn next(&self, buffer: usize) -> Option<Range<usize>> {
        const AHEAD: usize = 2 * BUFFERS_AT_ONCE;
        let next = |provided: usize| {
            let start = provided.max(buffer);
            (start < buffer + AHEAD).then_some(start + BUFFERS_AT_ONCE)
        };
        // Most calls end here.
        next(self.0.load(Relaxed))?;
        let before = self.0.fetch_update(Relaxed, Relaxed, next).ok()?;
        let start = before.max(buffer);
        Some(start..start + BUFFERS_AT_ONCE)
    }
}

/// Memory for the buffers that this process fills.
pub struct Memory<'a> {
    provided: &'a Provided,
    /// Buffers before this one have been mapped into this process.
    mapped: Cell<usize>,
}

impl<'a> Memory<'a> {
    pub fn new(provided: &'a Provided) -> Self {
        Self {
            provided,
            mapped: Cell::new(0),
        }
    }

    /// Has memory provided for the buffers after this one, and for this process
    /// mapped what others had provided: it costs less than a fault for each page.
    pub fn provide_after(&self, buffer: usize) {
        while let Some(buffers) = self.provided.next(buffer) {
            buffer::provide_memory(buffers);
        }
        if buffer >= self.mapped.get() {
            let end = buffer + BUFFERS_AT_ONCE;
            buffer::map_memory(buffer..end);
            self.mapped.set(end);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_turn_that_took_too_long_is_followed_by_one_of_fewer_blocks() {
        let pace = Pace::new();
        pace.adapt(TURN, 512);
        assert_eq!(pace.most_blocks(), usize::MAX);
        pace.adapt(4 * TURN, 64);
        assert_eq!(pace.most_blocks(), 32);
        pace.adapt(4 * TURN, 1);
        assert_eq!(pace.most_blocks(), 1);
        pace.adapt(TURN, 1);
        assert_eq!(pace.most_blocks(), 2);
    }
}
