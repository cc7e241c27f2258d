//! What will be loaded, in which order.
//!
//! A plan is a list of [`Segment`]s, each a run of blocks of one fork, over one
//! array of block numbers: about four bytes a block, where a record takes twenty.
//! It is laid out as 32-bit words, so that the leader can put it into shared
//! memory and a worker can read it there without any pointer in it:
//!
//! ```text
//! number of segments │ segments, 6 words each │ block numbers, 1 word each
//! ```

use std::collections::TryReserveError;
use std::ops::Range;

use super::{BlockNumber, Fork, Oid, Record};

/// The number that PostgreSQL reserves for "no block".
const INVALID_BLOCK: BlockNumber = BlockNumber::MAX;

/// Words of a segment, and of what stands before the first.
const SEGMENT_WORDS: usize = 6;
const HEADER_WORDS: usize = 1;

/// Blocks of one fork, to be loaded together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// 0 for a shared catalog.
    pub database: Oid,
    pub tablespace: Oid,
    pub filenumber: Oid,
    pub fork: Fork,
    /// Where its blocks begin in the plan's block numbers, and how many they are.
    first: u32,
    count: u32,
}

/// The blocks to load, by database, tablespace, relation and fork.
#[derive(Debug, Default)]
pub struct Plan {
    segments: Vec<Segment>,
    blocks: Vec<BlockNumber>,
    illegal: u64,
}

/// The blocks of one database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DatabasePlan {
    pub database: Oid,
    /// Which of the plan's segments they are.
    pub segments: Range<usize>,
    pub blocks: u64,
}

impl Plan {
    /// Sorts the records into physical order. Those that no relation can have
    /// are left out and counted as [`Plan::illegal`].
    pub fn new(mut records: Vec<Record>) -> Result<Self, TryReserveError> {
        records.sort_unstable();
        let mut plan = Self::default();
        plan.blocks.try_reserve_exact(records.len())?;
        for record in &records {
            match Fork::from_number(record.fork) {
                Some(fork) if record.block != INVALID_BLOCK => plan.push(record, fork)?,
                _ => plan.illegal += 1,
            }
        }
        Ok(plan)
    }

    fn push(&mut self, record: &Record, fork: Fork) -> Result<(), TryReserveError> {
        match self.segments.last_mut() {
            Some(last)
                if last.database == record.database
                    && last.tablespace == record.tablespace
                    && last.filenumber == record.filenumber
                    && last.fork == fork =>
            {
                last.count += 1;
            }
            _ => {
                self.segments.try_reserve(1)?;
                self.segments.push(Segment {
                    database: record.database,
                    tablespace: record.tablespace,
                    filenumber: record.filenumber,
                    fork,
                    first: self.blocks.len() as u32,
                    count: 1,
                });
            }
        }
        self.blocks.push(record.block);
        Ok(())
    }

    /// Records that name a fork or a block that cannot be.
    pub fn illegal(&self) -> u64 {
        self.illegal
    }

    /// The databases, in order. That of OID 0 comes first where there is one.
    pub fn databases(&self) -> Vec<DatabasePlan> {
        let mut databases: Vec<DatabasePlan> = Vec::new();
        for (index, segment) in self.segments.iter().enumerate() {
            match databases.last_mut() {
                Some(last) if last.database == segment.database => {
                    last.segments.end = index + 1;
                    last.blocks += u64::from(segment.count);
                }
                _ => databases.push(DatabasePlan {
                    database: segment.database,
                    segments: index..index + 1,
                    blocks: u64::from(segment.count),
                }),
            }
        }
        databases
    }

    /// How many words [`Plan::encode`] fills.
    pub fn words(&self) -> usize {
        HEADER_WORDS + self.segments.len() * SEGMENT_WORDS + self.blocks.len()
    }

    /// Lays the plan out in `words`, which are as many as [`Plan::words`] says.
    pub fn encode(&self, words: &mut [u32]) {
        let (header, rest) = words.split_at_mut(HEADER_WORDS);
        let (segments, blocks) = rest.split_at_mut(self.segments.len() * SEGMENT_WORDS);
        header[0] = self.segments.len() as u32;
        for (segment, words) in self
            .segments
            .iter()
            .zip(segments.chunks_exact_mut(SEGMENT_WORDS))
        {
            words.copy_from_slice(&[
                segment.database,
                segment.tablespace,
                segment.filenumber,
                segment.fork as u32,
                segment.first,
                segment.count,
            ]);
        }
        blocks.copy_from_slice(&self.blocks);
    }
}

/// A plan as a worker sees it in shared memory.
#[derive(Clone, Copy, Debug)]
pub struct PlanView<'a> {
    segments: &'a [u32],
    blocks: &'a [BlockNumber],
}

impl<'a> PlanView<'a> {
    /// The plan that [`Plan::encode`] laid out.
    pub fn new(words: &'a [u32]) -> Self {
        let (header, rest) = words.split_at(HEADER_WORDS);
        let (segments, blocks) = rest.split_at(header[0] as usize * SEGMENT_WORDS);
        Self { segments, blocks }
    }

    /// The segments of that range, each with its blocks in ascending order.
    pub fn segments(
        self,
        range: Range<usize>,
    ) -> impl Iterator<Item = (Segment, &'a [BlockNumber])> {
        self.segments[range.start * SEGMENT_WORDS..range.end * SEGMENT_WORDS]
            .chunks_exact(SEGMENT_WORDS)
            .map(move |words| {
                let [database, tablespace, filenumber, fork, first, count] = *words else {
                    unreachable!("chunks are exact");
                };
                let segment = Segment {
                    database,
                    tablespace,
                    filenumber,
                    fork: Fork::from_number(fork).expect("a plan has legal forks only"),
                    first,
                    count,
                };
                let blocks = &self.blocks[first as usize..][..count as usize];
                (segment, blocks)
            })
    }
}

#[cfg(test)]
mod tests;
