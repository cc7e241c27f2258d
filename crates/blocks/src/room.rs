//! Which part of a list there is room for, by what is in shared buffers.

use crate::UsageCount;

/// Numbers of blocks or buffers, by usage count.
pub type ByUsageCount = [u64; UsageCount::COUNT];

/// The buffers whose content a load may replace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Room {
    /// Empty buffers.
    pub empty: u64,
    /// Buffers with a clean block, by its usage count.
    pub clean: ByUsageCount,
}

/// How much of a list is loaded, and at what cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Budget {
    /// How many blocks: those of the list with the highest usage counts.
    pub blocks: u64,
    /// Clean blocks with a lower usage count than this are replaced.
    pub replaced_below: usize,
}

impl Room {
    /// The budget of a load at a start of the server: it replaces what the server would
    /// evict next anyway.
    #[must_use]
    pub fn at_start(&self) -> Budget {
        Budget {
            blocks: self.empty + self.clean[0],
            replaced_below: 1,
        }
    }

    /// The budget of a load on demand, for a list with so many blocks of each usage count:
    /// a block also replaces one with a lower usage count. The blocks of the list with the
    /// highest usage counts replace those in buffers with the lowest.
    #[must_use]
    pub fn on_demand(&self, listed: &ByUsageCount) -> Budget {
        let mut budget = Budget {
            blocks: 0,
            replaced_below: 1,
        };
        let mut free = self.empty + self.clean[0];
        // The usage count of the buffers that were added last.
        let mut lowest = 0;
        for usage_count in (0..UsageCount::COUNT).rev() {
            // What is left of these has no lower usage count than the next listed blocks.
            if lowest > 0 && lowest >= usage_count {
                break;
            }
            let mut left = listed[usage_count];
            loop {
                let taken = left.min(free);
                budget.blocks += taken;
                free -= taken;
                left -= taken;
                if left == 0 {
                    break;
                }
                if lowest + 1 >= usage_count {
                    return budget;
                }
                lowest += 1;
                free = self.clean[lowest];
                if free > 0 {
                    budget.replaced_below = lowest + 1;
                }
            }
        }
        budget
    }

    /// The room that remains if so many buffers are left to others.
    #[must_use]
    pub fn less(mut self, buffers: u64) -> Self {
        let mut left = buffers;
        for kind in std::iter::once(&mut self.empty).chain(&mut self.clean) {
            let taken = left.min(*kind);
            *kind -= taken;
            left -= taken;
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn room(empty: u64, clean: ByUsageCount) -> Room {
        Room { empty, clean }
    }

    #[test]
    fn a_start_replaces_only_what_the_server_would_evict_next() {
        let budget = room(10, [3, 100, 100, 100, 100, 100]).at_start();
        assert_eq!((budget.blocks, budget.replaced_below), (13, 1));
    }

    #[test]
    fn a_load_on_demand_replaces_only_blocks_with_a_lower_usage_count() {
        let full_of = |usage_count: usize| {
            let mut clean = [0; UsageCount::COUNT];
            clean[usage_count] = 100;
            room(0, clean)
        };
        for buffered in 0..UsageCount::COUNT {
            for listed in 0..UsageCount::COUNT {
                let mut list = [0; UsageCount::COUNT];
                list[listed] = 50;
                let budget = full_of(buffered).on_demand(&list);
                let expected = if buffered == 0 || buffered < listed {
                    50
                } else {
                    0
                };
                assert_eq!(budget.blocks, expected, "{listed} over {buffered}");
                if expected > 0 {
                    assert_eq!(budget.replaced_below, buffered + 1);
                }
            }
        }
    }

    #[test]
    fn the_highest_usage_counts_replace_the_lowest() {
        // Of the list: 5 of usage count 5 and 5 of usage count 2.
        let budget = room(1, [1, 3, 9, 0, 0, 0]).on_demand(&[0, 0, 5, 0, 0, 5]);
        // Those of 5 take the 1 + 1 + 3; for those of 2 only blocks of 2 are left.
        assert_eq!((budget.blocks, budget.replaced_below), (5, 2));
        let budget = room(1, [1, 3, 9, 0, 0, 0]).on_demand(&[0, 0, 5, 0, 0, 7]);
        assert_eq!((budget.blocks, budget.replaced_below), (7, 3));
        assert_eq!(room(100, [0; 6]).on_demand(&[1; 6]).blocks, 6);
        assert_eq!(room(0, [0; 6]).on_demand(&[1; 6]).blocks, 0);
    }

    #[test]
    fn what_is_left_to_others_is_empty_first() {
        assert_eq!(
            room(10, [5, 1, 0, 0, 0, 0]).less(12),
            room(0, [3, 1, 0, 0, 0, 0])
        );
        assert_eq!(room(1, [1, 0, 0, 0, 0, 0]).less(64), Room::default());
    }
}
