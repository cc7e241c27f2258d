//! Plans: which blocks are loaded, in which order, and how they are divided into chunks.
//!
//! A plan has the blocks of a list in the order in which they are loaded, as [`Chunk`]s:
//! at most [`CHUNK_BLOCKS`] blocks of one fork, in ascending order. One worker loads a
//! chunk. The chunks of a database are consecutive, since a worker is connected to one
//! database and claims the next chunk of it.
//!
//! The blocks of a database are in two tiers. The first has those with a higher usage
//! count, so that clients soon find the blocks that they use most. Each tier is in
//! physical order. If the list is larger than the budget, the blocks with the lowest
//! usage counts are left out.
//!
//! The plan is laid out as 32-bit words without pointers, so that the leader can put it
//! into shared memory and workers can read it there. It takes about five bytes a block:
//!
//! ```text
//! chunks, blocks │ chunks: 6 words each │ block numbers: a word each │ usage counts and ages: a byte each
//! ```

use std::collections::TryReserveError;
use std::ops::Range;

use rustc_hash::FxHashMap;

use crate::list::{BlockList, Entry, FileFork};
use crate::rank::{keep_highest_ranks, rank};
use crate::sort::sort;
use crate::{Age, BlockNumber, ByUsageCount, Fork, Oid, Record, UsageCount};

/// The most blocks of a chunk. If a worker dies, part of its chunk may be lost, so a
/// chunk must be small; a worker claims one at a time, so it should not be too small.
pub const CHUNK_BLOCKS: u32 = 512;

/// The number of tiers.
const TIERS: usize = 2;

/// The words of a chunk, and the words before the first chunk.
const CHUNK_WORDS: usize = 6;
const HEADER_WORDS: usize = 2;

/// Where the record's age begins in a block's byte; the usage count is before it.
const AGE_SHIFT: u32 = 4;

/// Blocks of one fork, which one worker loads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// The database's OID; 0 for a shared catalog.
    pub database: Oid,
    /// The tablespace's OID.
    pub tablespace: Oid,
    /// The relation's file number (`relfilenode`), not its OID.
    pub filenumber: Oid,
    /// The fork.
    pub fork: Fork,
    /// The index of its first block in the plan, and how many blocks it has.
    first: u32,
    count: u32,
}

/// The blocks to load, in their order.
#[derive(Debug, Default)]
pub struct Plan {
    chunks: Vec<Chunk>,
    keys: Vec<Key>,
    illegal: u64,
    cached: u64,
    list_has_first_tier: bool,
    /// The blocks left out because they exceed the budget, or do not fit into what the
    /// plan was shrunk to.
    over_budget: Vec<Key>,
    files: Vec<FileFork>,
    /// The index of the file at each place of the [`LoadOrder`].
    file_at: Vec<u32>,
}

/// The blocks of a list that its plan leaves out because they exceed the budget, or do not
/// fit into what the plan was shrunk to.
#[derive(Debug, Default)]
pub struct OverBudget {
    keys: Vec<Key>,
    files: Vec<FileFork>,
    /// The index of the file at each place of the [`LoadOrder`].
    file_at: Vec<u32>,
}

/// The chunks of one database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DatabasePlan {
    /// The database's OID; 0 for shared catalogs.
    pub database: Oid,
    /// Their indexes in the plan.
    pub chunks: Range<u32>,
    /// How many blocks they have.
    pub blocks: u64,
}

/// Why a plan could not be made.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// Memory was refused.
    #[error("out of memory")]
    OutOfMemory(#[from] TryReserveError),
    /// The list names more files than are supported: 67 million.
    #[error("too many relations")]
    TooManyFiles,
}

/// The sort key of a block: the place of its file and tier in the [`LoadOrder`], and the
/// block number. The usage count and the record's age are in the lowest bits, to keep them
/// with the block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Key(u64);

impl Key {
    const AGE_BITS: u32 = 2;
    const AGE: u64 = (1 << Self::AGE_BITS) - 1;
    const USAGE_COUNT_BITS: u32 = 3;
    const USAGE_COUNT: u64 = ((1 << Self::USAGE_COUNT_BITS) - 1) << Self::AGE_BITS;
    const BLOCK_SHIFT: u32 = Self::AGE_BITS + Self::USAGE_COUNT_BITS;
    const PLACE_SHIFT: u32 = Self::BLOCK_SHIFT + 32;
    const MAX_FILES: usize = (1 << (64 - Self::PLACE_SHIFT)) / TIERS;

    fn new(place: u32, block: BlockNumber, usage_count: UsageCount, age: Age) -> Self {
        Self(
            u64::from(place) << Self::PLACE_SHIFT
                | u64::from(block) << Self::BLOCK_SHIFT
                | u64::from(usage_count.get()) << Self::AGE_BITS
                | age as u64,
        )
    }

    /// The lowest key that a block can have.
    fn lowest(place: u32, block: BlockNumber) -> Self {
        Self::new(place, block, UsageCount::new(0), Age::Cached)
    }

    fn place(self) -> usize {
        (self.0 >> Self::PLACE_SHIFT) as usize
    }

    #[expect(
        clippy::cast_possible_truncation,
        reason = "the 32 bits above the usage count are the block number"
    )]
    fn block(self) -> BlockNumber {
        (self.0 >> Self::BLOCK_SHIFT) as BlockNumber
    }

    fn usage_count(self) -> UsageCount {
        UsageCount::new(((self.0 & Self::USAGE_COUNT) >> Self::AGE_BITS) as u32)
    }

    fn age(self) -> Age {
        Age::from_number((self.0 & Self::AGE) as u32)
    }

    fn is_same_block(self, other: Self) -> bool {
        self.0 >> Self::BLOCK_SHIFT == other.0 >> Self::BLOCK_SHIFT
    }

    /// Marks the block as cached: sets all bits of the usage count, which no usage count
    /// has.
    fn mark_cached(&mut self) {
        self.0 |= Self::USAGE_COUNT;
    }

    fn is_marked_cached(self) -> bool {
        self.0 & Self::USAGE_COUNT == Self::USAGE_COUNT
    }
}

impl Plan {
    /// Plans to load those blocks of the list that are not cached already. `budget` is
    /// passed how many these are for each usage count, and returns how many may be loaded.
    /// If they are more, those with the lowest usage counts are left out; of these, those
    /// that have been carried for longest.
    ///
    /// # Errors
    /// If memory is refused, or the list names too many files.
    pub fn new(
        list: BlockList,
        cached: impl Iterator<Item = Record>,
        budget: impl FnOnce(&ByUsageCount) -> u64,
    ) -> Result<Self, PlanError> {
        Self::new_with_ticks(list, cached, budget, &mut || ())
    }

    /// The same, and calls `tick` now and then, since it takes seconds for a
    /// very large list.
    ///
    /// # Errors
    /// As of [`Plan::new`].
    pub fn new_with_ticks(
        list: BlockList,
        cached: impl Iterator<Item = Record>,
        budget: impl FnOnce(&ByUsageCount) -> u64,
        tick: &mut dyn FnMut(),
    ) -> Result<Self, PlanError> {
        let BlockList { files, entries, .. } = list;
        let order = LoadOrder::of(&files)?;
        let mut plan = Self::default();
        let mut keys = plan.keys_of(entries, &files, &order);
        sort(&mut keys, |key| key.0, tick);
        plan.cached = remove_cached(&mut keys, &files, &order, cached)?;
        tick();
        plan.keys = keys;
        plan.files = files;
        plan.file_at = order.file_at;
        plan.leave_out(budget)?;
        tick();
        plan.divide_into_chunks()?;
        Ok(plan)
    }

    /// The keys of the valid entries, in the memory of the entries: the standard library
    /// collects elements of the same size in place. `tests/refused_memory.rs` checks that.
    fn keys_of(&mut self, entries: Vec<Entry>, files: &[FileFork], order: &LoadOrder) -> Vec<Key> {
        let total = entries.len();
        let keys: Vec<Key> = entries
            .into_iter()
            .filter(|entry| files[entry.file()].record(entry.block()).is_legal())
            .map(|entry| {
                let usage_count = entry.usage_count();
                Key::new(
                    order.find(entry.file(), usage_count),
                    entry.block(),
                    usage_count,
                    entry.age(),
                )
            })
            .collect();
        self.illegal = (total - keys.len()) as u64;
        self.list_has_first_tier = keys.iter().any(|key| is_hot(key.usage_count()));
        keys
    }

    /// Leaves out the blocks that exceed `budget`, which is passed how many there are of each
    /// usage count. Those with the highest usage counts stay, in their order.
    fn leave_out(
        &mut self,
        budget: impl FnOnce(&ByUsageCount) -> u64,
    ) -> Result<(), TryReserveError> {
        let mut by_usage_count = ByUsageCount::default();
        for key in &self.keys {
            by_usage_count[key.usage_count().get() as usize] += 1;
        }
        // A plan's indexes have 32 bits.
        let budget = budget(&by_usage_count).min(u32::MAX.into());
        let most = usize::try_from(budget).unwrap_or(usize::MAX);
        let over_budget = &mut self.over_budget;
        over_budget.try_reserve_exact(self.keys.len().saturating_sub(most))?;
        keep_highest_ranks(
            &mut self.keys,
            budget,
            |key| rank(key.usage_count(), key.age()),
            |key| over_budget.push(*key),
        );
        Ok(())
    }

    fn divide_into_chunks(&mut self) -> Result<(), TryReserveError> {
        let mut last_place = usize::MAX;
        for (key, index) in self.keys.iter().zip(0..) {
            if let Some(last) = self.chunks.last_mut()
                && last_place == key.place()
                && last.count < CHUNK_BLOCKS
            {
                last.count += 1;
                continue;
            }
            last_place = key.place();
            let file = self.files[self.file_at[last_place] as usize];
            self.chunks.try_reserve(1)?;
            self.chunks.push(Chunk {
                database: file.database,
                tablespace: file.tablespace,
                filenumber: file.filenumber,
                fork: Fork::from_number(file.fork).expect("invalid forks were left out"),
                first: index,
                count: 1,
            });
        }
        Ok(())
    }

    /// The number of records with an invalid fork, file or block number.
    pub fn illegal(&self) -> u64 {
        self.illegal
    }

    /// Whether the list has blocks of the first tier, be they cached already or not.
    pub fn list_has_first_tier(&self) -> bool {
        self.list_has_first_tier
    }

    /// The number of blocks left out because they are cached already.
    pub fn cached(&self) -> u64 {
        self.cached
    }

    /// The number of blocks left out because they exceed the budget, or do not fit into what
    /// the plan was shrunk to.
    pub fn over_budget(&self) -> u64 {
        self.over_budget.len() as u64
    }

    /// The blocks left out, when the rest of the plan is not needed any more.
    pub fn into_over_budget(self) -> OverBudget {
        OverBudget {
            keys: self.over_budget,
            files: self.files,
            file_at: self.file_at,
        }
    }

    /// The databases, in the order of their OIDs. If there are shared catalogs, their
    /// OID 0 is the first.
    #[expect(
        clippy::cast_possible_truncation,
        reason = "there are no more chunks than blocks, at most u32::MAX"
    )]
    pub fn databases(&self) -> impl Iterator<Item = DatabasePlan> {
        let mut next = 0;
        self.chunks
            .chunk_by(|one, other| one.database == other.database)
            .map(move |chunks| {
                let first = next;
                next += chunks.len() as u32;
                DatabasePlan {
                    database: chunks[0].database,
                    chunks: first..next,
                    blocks: chunks.iter().map(|chunk| u64::from(chunk.count)).sum(),
                }
            })
    }

    /// How many blocks each chunk has.
    pub fn chunk_sizes(&self) -> impl ExactSizeIterator<Item = u32> {
        self.chunks.iter().map(|chunk| chunk.count)
    }

    /// How many words [`Plan::encode`] fills.
    pub fn words(&self) -> usize {
        HEADER_WORDS
            + self.chunks.len() * CHUNK_WORDS
            + self.keys.len()
            + self.keys.len().div_ceil(size_of::<u32>())
    }

    /// Lays the plan out in `words`, which must have the length [`Plan::words`].
    #[expect(
        clippy::cast_possible_truncation,
        reason = "there are at most u32::MAX blocks, and no more chunks"
    )]
    pub fn encode(&self, words: &mut [u32]) {
        let (header, rest) = words.split_at_mut(HEADER_WORDS);
        let (chunks, rest) = rest.split_at_mut(self.chunks.len() * CHUNK_WORDS);
        let (blocks, usage_counts) = rest.split_at_mut(self.keys.len());
        header.copy_from_slice(&[self.chunks.len() as u32, self.keys.len() as u32]);
        for (chunk, words) in self.chunks.iter().zip(chunks.chunks_exact_mut(CHUNK_WORDS)) {
            words.copy_from_slice(&[
                chunk.database,
                chunk.tablespace,
                chunk.filenumber,
                chunk.fork as u32,
                chunk.first,
                chunk.count,
            ]);
        }
        for (key, block) in self.keys.iter().zip(blocks) {
            *block = key.block();
        }
        for (keys, usage_counts) in self.keys.chunks(size_of::<u32>()).zip(usage_counts) {
            let mut bytes = [0; size_of::<u32>()];
            for (key, byte) in keys.iter().zip(&mut bytes) {
                *byte = (key.usage_count().get() | (key.age() as u32) << AGE_SHIFT) as u8;
            }
            *usage_counts = u32::from_le_bytes(bytes);
        }
    }
}

/// The load order: for each database, the files of the first tier, then those of the
/// second. So each file has one place in each tier.
struct LoadOrder {
    /// The index of the file at each place.
    file_at: Vec<u32>,
    /// The places of each file.
    places_of: Vec<[u32; TIERS]>,
}

impl LoadOrder {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "there are at most MAX_FILES * TIERS places, which is 2^29"
    )]
    fn of(files: &[FileFork]) -> Result<Self, PlanError> {
        if files.len() > Key::MAX_FILES {
            return Err(PlanError::TooManyFiles);
        }
        let mut sorted: Vec<u32> = Vec::new();
        sorted.try_reserve_exact(files.len())?;
        sorted.extend(0..files.len() as u32);
        sorted.sort_unstable_by_key(|&index| files[index as usize]);
        let mut order = Self {
            file_at: Vec::new(),
            places_of: Vec::new(),
        };
        order.file_at.try_reserve_exact(files.len() * TIERS)?;
        order.places_of.try_reserve_exact(files.len())?;
        order.places_of.resize(files.len(), [0; TIERS]);
        let database = |&index: &u32| files[index as usize].database;
        for of_database in sorted.chunk_by(|one, other| database(one) == database(other)) {
            for tier in 0..TIERS {
                for &index in of_database {
                    order.places_of[index as usize][tier] = order.file_at.len() as u32;
                    order.file_at.push(index);
                }
            }
        }
        Ok(order)
    }

    /// The place of those blocks of a file that have that usage count.
    fn find(&self, file: usize, usage_count: UsageCount) -> u32 {
        self.places_of[file][usize::from(!is_hot(usage_count))]
    }
}

/// Whether a block with that usage count is in the first tier.
fn is_hot(usage_count: UsageCount) -> bool {
    usage_count >= UsageCount::HOT
}

/// Removes the keys of cached blocks, and returns how many it has removed.
fn remove_cached(
    keys: &mut Vec<Key>,
    files: &[FileFork],
    order: &LoadOrder,
    cached: impl Iterator<Item = Record>,
) -> Result<u64, TryReserveError> {
    let mut by_file: FxHashMap<&FileFork, usize> = FxHashMap::default();
    by_file.try_reserve(files.len())?;
    by_file.extend(files.iter().zip(0..));
    for record in cached {
        let Some(&file) = by_file.get(&FileFork::of(&record)) else {
            continue;
        };
        for place in order.places_of[file] {
            let block = Key::lowest(place, record.block);
            let start = keys.partition_point(|key| *key < block);
            // A list may name a block more than once, and `cached` may too: a block that
            // moves to another buffer during the scan of the buffers is seen twice.
            for key in &mut keys[start..] {
                if !key.is_same_block(block) {
                    break;
                }
                key.mark_cached();
            }
        }
    }
    let total = keys.len();
    keys.retain(|key| !key.is_marked_cached());
    Ok((total - keys.len()) as u64)
}

impl OverBudget {
    /// The blocks' records, each with its usage count and age.
    pub fn records(&self) -> impl Iterator<Item = (Record, UsageCount, Age)> {
        self.keys.iter().map(|key| {
            let file = self.files[self.file_at[key.place()] as usize];
            (file.record(key.block()), key.usage_count(), key.age())
        })
    }
}

/// A plan in shared memory, as workers read it.
#[derive(Clone, Copy, Debug)]
pub struct PlanView<'a> {
    chunks: &'a [u32],
    blocks: &'a [BlockNumber],
    usage_counts: &'a [u32],
}

/// The blocks of a chunk.
#[derive(Clone, Copy, Debug)]
pub struct ChunkBlocks<'a> {
    plan: PlanView<'a>,
    first: usize,
    blocks: &'a [BlockNumber],
}

impl<'a> PlanView<'a> {
    /// The plan that [`Plan::encode`] laid out.
    pub fn new(words: &'a [u32]) -> Self {
        let (header, rest) = words.split_at(HEADER_WORDS);
        let (chunks, rest) = rest.split_at(header[0] as usize * CHUNK_WORDS);
        let (blocks, usage_counts) = rest.split_at(header[1] as usize);
        Self {
            chunks,
            blocks,
            usage_counts,
        }
    }

    /// How many chunks there are.
    #[expect(
        clippy::cast_possible_truncation,
        reason = "a plan's indexes have 32 bits"
    )]
    pub fn chunks(self) -> u32 {
        (self.chunks.len() / CHUNK_WORDS) as u32
    }

    /// The records of a chunk but for its first `done`, each with its usage count and
    /// age.
    pub fn records_from(
        self,
        index: u32,
        done: usize,
    ) -> impl Iterator<Item = (Record, UsageCount, Age)> {
        let (chunk, blocks) = self.chunk(index);
        (done..blocks.numbers().len()).map(move |at| {
            let record = Record {
                database: chunk.database,
                tablespace: chunk.tablespace,
                filenumber: chunk.filenumber,
                fork: chunk.fork as u32,
                block: blocks.numbers()[at],
            };
            (record, blocks.usage_count(at), blocks.age(at))
        })
    }

    /// Whether a chunk is of the first tier. In each database's chunks, these come first.
    pub fn is_first_tier(self, index: u32) -> bool {
        is_hot(self.chunk(index).1.usage_count(0))
    }

    /// The chunk at that index, and its blocks.
    pub fn chunk(self, index: u32) -> (Chunk, ChunkBlocks<'a>) {
        let words = &self.chunks[index as usize * CHUNK_WORDS..][..CHUNK_WORDS];
        let [database, tablespace, filenumber, fork, first, count] = *words else {
            unreachable!("a chunk has CHUNK_WORDS words");
        };
        let chunk = Chunk {
            database,
            tablespace,
            filenumber,
            fork: Fork::from_number(fork).expect("a plan has valid forks only"),
            first,
            count,
        };
        let blocks = ChunkBlocks {
            plan: self,
            first: first as usize,
            blocks: &self.blocks[first as usize..][..count as usize],
        };
        (chunk, blocks)
    }
}

impl<'a> ChunkBlocks<'a> {
    /// The block numbers, in ascending order.
    pub fn numbers(self) -> &'a [BlockNumber] {
        self.blocks
    }

    /// The usage count of the block at that index of the chunk.
    pub fn usage_count(self, index: usize) -> UsageCount {
        UsageCount::new(u32::from(self.byte(index)) & ((1 << AGE_SHIFT) - 1))
    }

    /// How long the record of the block at that place has been carried.
    pub fn age(self, index: usize) -> Age {
        Age::from_number(u32::from(self.byte(index) >> AGE_SHIFT))
    }

    fn byte(self, index: usize) -> u8 {
        let at = self.first + index;
        self.plan.usage_counts[at / size_of::<u32>()].to_le_bytes()[at % size_of::<u32>()]
    }
}

mod shrink;
#[cfg(test)]
mod tests;
