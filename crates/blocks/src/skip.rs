//! Why blocks of the list were not loaded, and how many.

use std::fmt;

/// Why the block of a record was not loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SkipReason {
    /// The fork number, file number or block number is invalid.
    Illegal,
    /// The database is a template: a worker in it would make `CREATE DATABASE` fail.
    TemplateDatabase,
    /// The database was dropped, or accepts no connections.
    NoDatabase,
    /// No relation has that file in that tablespace, or none has it any more.
    NoRelation,
    /// The fork does not exist, or ends before the block.
    NoBlock,
    /// Reading the block raised an error.
    Unreadable,
    /// The relation was still locked when the load stopped waiting for it.
    Locked,
    /// There was no free buffer.
    NoFreeBuffer,
    /// There was not enough dynamic shared memory for the whole plan.
    NoSharedMemory,
    /// The worker that had claimed the block exited before it loaded it.
    Interrupted,
    /// The load was cancelled.
    Cancelled,
}

impl SkipReason {
    /// All reasons, in the order of their counters.
    pub const ALL: [Self; 11] = [
        Self::Illegal,
        Self::TemplateDatabase,
        Self::NoDatabase,
        Self::NoRelation,
        Self::NoBlock,
        Self::Unreadable,
        Self::Locked,
        Self::NoFreeBuffer,
        Self::NoSharedMemory,
        Self::Interrupted,
        Self::Cancelled,
    ];

    fn describe(self) -> &'static str {
        match self {
            Self::Illegal => "with an invalid fork, file, or block number",
            Self::TemplateDatabase => "in template databases",
            Self::NoDatabase => "in databases that were dropped or accept no connections",
            Self::NoRelation => "of relations that were dropped or rewritten",
            Self::NoBlock => "beyond the end of their relation",
            Self::Unreadable => "that could not be read",
            Self::Locked => "of locked relations",
            Self::NoFreeBuffer => "because there was no free buffer",
            Self::NoSharedMemory => "because there was not enough dynamic shared memory",
            Self::Interrupted => "because their worker was interrupted",
            Self::Cancelled => "because the load was cancelled",
        }
    }
}

/// The number of skipped blocks, by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SkipCounts([u64; SkipReason::ALL.len()]);

impl SkipCounts {
    /// Adds `blocks` to those skipped for `reason`.
    pub fn count(&mut self, reason: SkipReason, blocks: u64) {
        self.0[reason as usize] += blocks;
    }

    /// The number of blocks skipped for `reason`.
    pub fn of(&self, reason: SkipReason) -> u64 {
        self.0[reason as usize]
    }

    /// The number of blocks skipped for any reason.
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }
}

/// One line: `12 blocks: 7 in template databases, 5 that could not be read`.
impl fmt::Display for SkipCounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let total = self.total();
        write!(f, "{total} block{}", if total == 1 { "" } else { "s" })?;
        let mut separator = ": ";
        for reason in SkipReason::ALL {
            let blocks = self.of(reason);
            if blocks > 0 {
                write!(f, "{separator}{blocks} {}", reason.describe())?;
                separator = ", ";
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_named_by_reason() {
        let mut counts = SkipCounts::default();
        assert_eq!(counts.to_string(), "0 blocks");
        counts.count(SkipReason::Unreadable, 1);
        assert_eq!(counts.to_string(), "1 block: 1 that could not be read");
        counts.count(SkipReason::TemplateDatabase, 7);
        counts.count(SkipReason::Unreadable, 4);
        assert_eq!(
            counts.to_string(),
            "12 blocks: 7 in template databases, 5 that could not be read"
        );
    }

    #[test]
    fn every_reason_has_its_own_counter() {
        for (index, reason) in SkipReason::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, index);
        }
    }
}
