//! Which records stay where there is not room for all: those with the highest usage
//! counts, and among these the ones that were cached most recently.

use crate::{Age, UsageCount};

/// How many ranks there are.
pub(super) const RANKS: usize = UsageCount::COUNT * Age::COUNT;

/// The rank of a record; of two records, the one with the higher rank stays.
pub(super) fn rank(usage_count: UsageCount, age: Age) -> usize {
    usage_count.get() as usize * Age::COUNT + (Age::COUNT - 1 - age as usize)
}

/// Keeps the `most` items of the highest ranks, without changing their order, and hands
/// the others to `left_out`. Of those that rank as the lowest kept, the first are kept.
pub(super) fn keep_highest_ranks<T>(
    items: &mut Vec<T>,
    most: u64,
    rank: impl Fn(&T) -> usize,
    mut left_out: impl FnMut(&T),
) {
    if items.len() as u64 <= most {
        return;
    }
    let mut of_rank = [0u64; RANKS];
    for item in items.iter() {
        of_rank[rank(item)] += 1;
    }
    // Each rank has what the higher ones leave.
    let mut left = most;
    for count in of_rank.iter_mut().rev() {
        *count = left.min(*count);
        left -= *count;
    }
    items.retain(|item| {
        let quota = &mut of_rank[rank(item)];
        let keep = *quota > 0;
        *quota -= u64::from(keep);
        if !keep {
            left_out(item);
        }
        keep
    });
}
