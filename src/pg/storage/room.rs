//! Room: how many blocks may be read without losing one that is to stay.
//!
//! Up to 18 the server takes free buffers from a list, and evicts nothing while that is
//! not empty. After that, and always on 19, it takes the first buffer with usage count 0
//! that its clock hand comes to, and decrements the usage counts of those that it
//! passes. There is no way to choose a victim. So the functions here look ahead of the
//! hand. What they find is a guess, since other processes use buffers as well.
//!
//! - A **load** may fill empty buffers and replace clean blocks with a usage count that is
//!   low enough ([`LoadRoom`]). It reads no further than the hand can go without a block
//!   that must stay. If such a block would be the victim, because it is dirty and has usage
//!   count 0, its usage count is raised to 1, which the hand takes back when it passes. A
//!   clean block that may be replaced gets usage count 0, so that the hand takes it. The
//!   hand goes round once for a load: then all blocks that were there have been passed, and
//!   the load ends, unless buffers have been emptied since. A load for a standby that
//!   follows its upstream server comes again and again, so it must not let the hand wear down
//!   the usage counts of what is used here: before the hand passes a block, its usage count
//!   is raised by one, which the hand takes back.
//! - A **call** may evict any block but those that it has read itself
//!   ([`count_evictable_before`]).

use std::sync::atomic::Ordering::{AcqRel, Relaxed};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, AtomicUsize};

use pgrx::pg_sys;

use super::buffer::{all, change_usage_count, count, state, usage_count};
use super::fills::Fills;
use crate::blocks::{Budget, Room, UsageCount};
use crate::pg::process::{self, check_for_interrupts};
use crate::pg::sys::buffer_state::{self, Word};
use crate::pg::sys::read::{READ_BLOCKS_MAX, READS_MANY_AT_ONCE};
use crate::pg::sys::version::free_list_is_empty;

/// After how many headers interrupts are served.
const INTERRUPT_INTERVAL: usize = 1 << 16;

/// How many buffers a load with so many workers leaves to others. Each worker reads several
/// blocks at once after its look for room, and all find the same buffers.
fn reserve(readers: usize) -> usize {
    const LEAST: usize = 64;
    (count() / 16).min(LEAST.max(at_once(readers)))
}

/// How many blocks so many workers read at the same time.
fn at_once(readers: usize) -> usize {
    match READS_MANY_AT_ONCE {
        true => readers * READ_BLOCKS_MAX,
        false => readers,
    }
}

/// What a load with so many workers may replace now. Serves interrupts.
pub fn survey(readers: usize) -> Room {
    let mut room = Room::default();
    for index in all() {
        let state = state(index).load(Relaxed);
        if state & buffer_state::BUF_REFCOUNT_MASK != 0 {
            continue;
        }
        if is_empty(state) {
            room.empty += 1;
        } else if state & buffer_state::BM_DIRTY == 0 {
            room.clean[usage_count(state).get() as usize] += 1;
        }
    }
    room.less(reserve(readers) as u64)
}

/// The room of one load, which its workers share.
#[derive(Debug)]
pub struct LoadRoom {
    /// Clean blocks with a lower usage count are replaced.
    replaced_below: usize,
    /// Where the clock hand was when the load began, see [`clock_hand`].
    start: AtomicU64,
    /// Whether only empty buffers are filled: the hand goes round again, and has lowered the
    /// usage counts of blocks.
    only_empty: AtomicBool,
    /// How many blocks may be read into free buffers before these are counted again.
    free: AtomicUsize,
    /// When they may be counted again, by the clock that all processes read alike.
    next_count: AtomicI64,
    /// Whether the hand lowers no usage count in the end.
    keeps_usage_counts: bool,
    /// How far usage counts were raised for that, as a position of the clock hand.
    raised_until: AtomicU64,
    /// The buffers that the load has filled.
    pub fills: Fills,
}

impl LoadRoom {
    /// The room of a load that begins now.
    pub fn new(budget: Budget) -> Self {
        Self {
            replaced_below: budget.replaced_below,
            start: AtomicU64::new(clock_hand().0),
            only_empty: AtomicBool::new(false),
            free: AtomicUsize::new(0),
            next_count: AtomicI64::new(0),
            keeps_usage_counts: false,
            raised_until: AtomicU64::new(0),
            fills: Fills::new(),
        }
    }

    /// The same for a load after which the usage counts of what is here are as before, except
    /// that 5, which cannot be raised, becomes 4, and 0 of a dirty block becomes 1.
    /// `raised_until` is what [`Self::raised_until`] of the last such load returned: what was
    /// raised and has not been passed yet is not raised again.
    pub fn keeping_usage_counts(budget: Budget, raised_until: u64) -> Self {
        Self {
            keeps_usage_counts: true,
            raised_until: AtomicU64::new(raised_until),
            ..Self::new(budget)
        }
    }

    /// How far usage counts were raised, as a position of the clock hand.
    pub fn raised_until(&self) -> u64 {
        self.raised_until.load(Relaxed)
    }

    /// Lets the clock hand go round once more, from where it is now.
    pub fn begin_again(&self) {
        self.start.store(clock_hand().0, Relaxed);
    }

    /// How many blocks one of so many workers may read now, at most `max`. Serves interrupts.
    pub fn ahead(&self, max: usize, readers: usize) -> usize {
        if free_list_has_any() {
            let fit = self.fit_into_free_buffers(max, readers);
            if fit > 0 {
                return fit;
            }
        } else {
            // Sessions have taken the others.
            self.free.store(0, Relaxed);
        }
        let reserve = reserve(readers);
        let found = self.look_ahead(max, reserve);
        // Others may have taken the hand round, and emptied buffers since, as commands such
        // as DROP TABLE do.
        if found == 0 && count_free() > reserve {
            self.only_empty.store(true, Relaxed);
            self.begin_again();
            return self.look_ahead(max, reserve);
        }
        found
    }

    /// How many blocks, at most `max`, fit into the buffers of the server's list of free buffers,
    /// as far as is known: then the clock hand does not come to a buffer that was not looked at.
    /// How long the list is cannot be asked, so empty buffers are counted, again and again as they
    /// get fewer: by one process, and in a small part of the time.
    fn fit_into_free_buffers(&self, max: usize, readers: usize) -> usize {
        /// If an ERROR ends a count, the next one is due after this time, in microseconds.
        const COUNT_TIMEOUT: i64 = 60_000_000;
        let take = || {
            let less = |free: usize| (free > 0).then(|| free.saturating_sub(max));
            let before = self.free.fetch_update(Relaxed, Relaxed, less);
            before.map_or(0, |free| free.min(max))
        };
        let fit = take();
        let start = process::monotonic_micros();
        let due = self.next_count.load(Relaxed);
        let begins_count = || {
            let next = start + COUNT_TIMEOUT;
            let counted = self
                .next_count
                .compare_exchange(due, next, Relaxed, Relaxed);
            counted.is_ok()
        };
        if fit > 0 || start < due || !begins_count() {
            return fit;
        }
        let by_others = at_once(readers.saturating_sub(1)).min(count() / 16);
        let free = count_free().saturating_sub(by_others);
        // Sessions take some meanwhile.
        self.free.store(free - free / 4, Relaxed);
        let end = process::monotonic_micros();
        self.next_count.store(end + 10 * (end - start), Relaxed);
        take()
    }

    fn look_ahead(&self, max: usize, reserve: usize) -> usize {
        let (turned, next) = clock_hand();
        let passed =
            usize::try_from(turned.wrapping_sub(self.start.load(Relaxed))).unwrap_or(usize::MAX);
        let not_passed = count().saturating_sub(passed);
        let mut found = 0;
        // How many buffers the hand passes for the blocks that are read now.
        let mut passes = 0;
        for (looked, index) in ahead_of(next).take(not_passed).enumerate() {
            if looked % INTERRUPT_INTERVAL == INTERRUPT_INTERVAL - 1 {
                check_for_interrupts();
            }
            if self.prepare(index) {
                found += 1;
                if found <= max {
                    passes = looked + 1;
                }
            }
            if found >= max + reserve {
                break;
            }
        }
        let found = found.saturating_sub(reserve).min(max);
        if self.keeps_usage_counts && found > 0 {
            self.raise(turned, next, passes);
        }
        found
    }

    /// Raises the usage counts of the buffers that the hand is about to pass, which it lowers,
    /// unless that was done before.
    fn raise(&self, turned: u64, next: usize, passes: usize) {
        const MAX: u32 = UsageCount::MAX.get();
        let raised_until = self.raised_until.load(Relaxed);
        for (index, position) in ahead_of(next).take(passes).zip(turned..) {
            if position >= raised_until {
                change_usage_count(index, |state| {
                    let count = usage_count(state).get();
                    (1..MAX)
                        .contains(&count)
                        .then(|| UsageCount::new(count + 1))
                });
            }
        }
        self.raised_until.fetch_max(turned + passes as u64, Relaxed);
    }

    /// Whether the hand will take this buffer, and may. If it would take it and must not,
    /// or may take it and would not, the usage count is changed.
    fn prepare(&self, index: usize) -> bool {
        let word = state(index);
        let old = word.load(Relaxed);
        if old & (buffer_state::BUF_REFCOUNT_MASK | buffer_state::BM_LOCKED) != 0 {
            return false;
        }
        let count = usage_count(old).get();
        let may_be_taken = is_empty(old)
            || old & buffer_state::BM_DIRTY == 0
                && (count as usize) < self.replaced_below
                && !self.only_empty.load(Relaxed);
        let wanted = match (may_be_taken, count) {
            (true, 0) => return true,
            (true, _) => 0,
            (false, 0) => 1,
            (false, _) => return false,
        };
        let new = buffer_state::with_usage_count(old, wanted);
        let changed = word.compare_exchange(old, new, AcqRel, Relaxed).is_ok();
        changed && may_be_taken
    }
}

/// Whether the server has free buffers that it takes before it evicts any block,
/// wherever the clock hand is.
pub fn free_list_has_any() -> bool {
    free_list_is_empty() == Some(false)
}

/// How many buffers are empty and not pinned. Serves interrupts.
pub fn count_free() -> usize {
    let states = all().map(|index| state(index).load(Relaxed));
    states.filter(|&state| is_empty(state)).count()
}

fn is_empty(state: Word) -> bool {
    state & (buffer_state::BM_TAG_VALID | buffer_state::BUF_REFCOUNT_MASK) == 0
}

/// How many blocks can be read, at most `max`, before the clock hand evicts the block of
/// a buffer for which `keep` returns true. Lists of free buffers are left out of account.
/// If there are very many buffers, only the next ones are looked at.
pub fn count_evictable_before(max: usize, keep: impl Fn(usize) -> bool) -> usize {
    const MAX_EXAMINED: usize = 1 << 16;
    /// How many are allowed if those looked at do not tell.
    const DEFAULT_IF_UNKNOWN: usize = 128;
    let count = count();
    let next = ahead_of(clock_hand().1).take(MAX_EXAMINED);
    let mut evictable = 0;
    for round in 0..=UsageCount::MAX.get() {
        for index in next.clone() {
            let state = state(index).load(Relaxed);
            if state & buffer_state::BUF_REFCOUNT_MASK != 0 || usage_count(state).get() != round {
                continue;
            }
            if keep(index) {
                return evictable;
            }
            evictable += 1;
            if evictable >= max {
                return evictable;
            }
        }
        if count > MAX_EXAMINED {
            return evictable.max(DEFAULT_IF_UNKNOWN).min(max);
        }
    }
    evictable
}

/// How far the clock hand has gone since the server started, in buffers, and the buffer
/// that it comes to next.
fn clock_hand() -> (u64, usize) {
    let mut rounds = 0;
    // A second argument would reset a counter that the background writer needs.
    // SAFETY: a place for the number of rounds, and a null.
    let next = unsafe { pg_sys::StrategySyncStart(&mut rounds, std::ptr::null_mut()) };
    let next = usize::try_from(next).unwrap_or(0);
    (u64::from(rounds) * count() as u64 + next as u64, next)
}

/// How far the clock hand has gone since the server started, in buffers.
pub fn clock_hand_position() -> u64 {
    clock_hand().0
}

/// Which buffers the clock hand has passed, and has lowered the usage counts of.
pub struct Passed {
    from: u64,
    to: u64,
    /// How many buffers there are.
    buffers: usize,
}

impl Passed {
    /// Since the moment when it was at a position.
    pub fn since(position: u64) -> Self {
        Self {
            from: position,
            to: clock_hand_position(),
            buffers: count(),
        }
    }

    /// It has not moved.
    #[cfg(test)]
    pub fn none() -> Self {
        Self {
            from: 0,
            to: 0,
            buffers: 8,
        }
    }

    /// Whether it has passed this buffer.
    pub fn has(&self, index: usize) -> bool {
        let (index, buffers) = (index as u64, self.buffers as u64);
        let passes = self.to.saturating_sub(self.from);
        let after = (index + buffers - self.from % buffers) % buffers;
        after < passes
    }
}

/// All buffers, in the order in which the clock hand comes to them, from that one on.
fn ahead_of(next: usize) -> impl Iterator<Item = usize> + Clone {
    (next..count()).chain(0..next)
}

#[cfg(test)]
mod tests {
    use super::Passed;

    #[test]
    fn the_clock_hand_passes_buffers_in_order_and_round_after_round() {
        let expect = |indexes: &[usize], from, to| {
            let passed = Passed {
                from,
                to,
                ..Passed::none()
            };
            let passed: Vec<usize> = (0..8).filter(|&at| passed.has(at)).collect();
            assert_eq!(passed, indexes, "{from} to {to}");
        };
        expect(&[], 10, 10);
        expect(&[2, 3, 4], 10, 13);
        expect(&[0, 1, 7], 15, 18);
        expect(&[0, 1, 2, 3, 4, 5, 6, 7], 10, 18);
        expect(&[0, 1, 2, 3, 4, 5, 6, 7], 10, 100);
        // Usage counts were raised for passes that are still to come.
        expect(&[], 20, 10);
    }
}
