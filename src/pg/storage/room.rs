//! Room: how many blocks can be read before the server evicts a block that is to stay.
//!
//! Up to 18 the server takes empty buffers from a list, and evicts nothing while that is
//! not empty. After that, and always on 19, it takes the first buffer with usage count 0
//! that its clock hand comes to, and decrements the usage counts of those that it
//! passes. So the functions here look ahead of the hand. What they find is a guess, since
//! other processes use buffers as well.

use std::sync::atomic::Ordering::Relaxed;

use pgrx::pg_sys;

use super::buffer::{count, state, usage_count};
use crate::blocks::UsageCount;
use crate::pg::sys::buffer_state::{self, Word};
use crate::pg::sys::version::free_list_is_empty;

/// How many blocks can be read without evicting any, at most `most`.
pub fn count_free_ahead(most: usize) -> usize {
    /// Other processes see the same empty buffers ahead of the hand, and may take them
    /// at the same time.
    const LEFT_TO_OTHERS: usize = 64;
    match free_list_is_empty() {
        Some(true) => 0,
        Some(false) => most,
        None => {
            let is_victim = |state: Word| {
                state & (buffer_state::BM_TAG_VALID | buffer_state::BUF_REFCOUNT_MASK)
                    == buffer_state::BM_TAG_VALID
                    && buffer_state::usage_count(state) == 0
            };
            ahead_of_clock_hand()
                .map(|index| state(index).load(Relaxed))
                .take_while(|&state| !is_victim(state))
                .filter(|&state| is_empty(state))
                .take(most + LEFT_TO_OTHERS)
                .count()
                .saturating_sub(LEFT_TO_OTHERS)
        }
    }
}

/// Whether the server has empty buffers that it takes before it evicts any block,
/// wherever the clock hand is.
pub fn free_list_has_any() -> bool {
    free_list_is_empty() == Some(false)
}

/// How many buffers are empty and not pinned.
pub fn count_free() -> usize {
    let states = (0..count()).map(|index| state(index).load(Relaxed));
    states.filter(|&state| is_empty(state)).count()
}

fn is_empty(state: Word) -> bool {
    state & (buffer_state::BM_TAG_VALID | buffer_state::BUF_REFCOUNT_MASK) == 0
}

/// How many blocks can be read, at most `most`, before the clock hand evicts the block of
/// a buffer for which `keep` returns true. Lists of free buffers are left out of account.
/// If there are very many buffers, only the next ones are looked at.
pub fn count_evictable_before(most: usize, keep: impl Fn(usize) -> bool) -> usize {
    const LOOKED_AT: usize = 1 << 16;
    /// How many are allowed if those looked at do not tell.
    const A_FEW: usize = 128;
    let count = count();
    let next = ahead_of_clock_hand().take(LOOKED_AT);
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
            if evictable >= most {
                return evictable;
            }
        }
        if count > LOOKED_AT {
            return evictable.max(A_FEW).min(most);
        }
    }
    evictable
}

/// All buffers, in the order in which the clock hand comes to them next.
fn ahead_of_clock_hand() -> impl Iterator<Item = usize> + Clone {
    // A second argument would reset a counter that the background writer needs.
    // SAFETY: nulls ask for the position of the hand only.
    let start = unsafe { pg_sys::StrategySyncStart(std::ptr::null_mut(), std::ptr::null_mut()) };
    let start = usize::try_from(start).unwrap_or(0);
    (start..count()).chain(0..start)
}
