//! What will be loaded, in which order, and how the work is cut.
//!
//! The plan of a list holds its blocks in the order in which they are loaded, as
//! [`Chunk`]s: at most [`CHUNK_BLOCKS`] blocks of one fork, in ascending order,
//! which one worker loads in one go. A database's chunks stand together; so a
//! worker, which is tied to one database, takes the next chunk of its database.
//!
//! A database's blocks stand in two tiers, the hot ones before the others, so that
//! clients find soon what they mostly ask for; within a tier they stand in physical
//! order. Where the list is larger than the budget, the hottest blocks are in the
//! plan and the others are not.
//!
//! The plan is laid out as 32-bit words, so that the leader can put it into shared
//! memory and the workers can read it there without any pointer in it, about five
//! bytes a block:
//!
//! ```text
//! chunks, blocks │ chunks: 6 words each │ block numbers: a word each │ usage counts and ages: a byte each
//! ```

use std::collections::TryReserveError;
use std::ops::Range;

use rustc_hash::FxHashMap;

use crate::hottest::{keep_hottest, rank};
use crate::list::{BlockList, Entry, FileFork};
use crate::{Age, BlockNumber, Fork, Oid, Record, UsageCount};

/// The most blocks of a chunk. What a worker that dies was at is lost, and must
/// be little; what a worker claims should keep it busy for a while.
pub const CHUNK_BLOCKS: u32 = 512;

/// The usage count that the hot tier begins at: of blocks that were used again after they
/// had been read.
const HOT: u32 = 2;

/// How many tiers there are.
const TIERS: usize = 2;

/// Words of a chunk, and of what stands before the first.
const CHUNK_WORDS: usize = 6;
const HEADER_WORDS: usize = 2;

/// Where in a block's byte its record's age begins; the usage count stands before it.
const AGE_SHIFT: u32 = 4;

/// Blocks of one fork, to be loaded in one go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// The database's OID; 0 for a shared catalog.
    pub database: Oid,
    /// The tablespace's OID.
    pub tablespace: Oid,
    /// The relation's file number (`relfilenode`), not its OID.
    pub filenumber: Oid,
    /// The fork that its blocks are of.
    pub fork: Fork,
    /// Where its blocks begin in the plan, and how many they are.
    first: u32,
    count: u32,
}

/// The blocks to load.
#[derive(Debug, Default)]
pub struct Plan {
    chunks: Vec<Chunk>,
    keys: Vec<Key>,
    illegal: u64,
    cached: u64,
    over_budget: OverBudget,
}

/// The blocks of a list that the budget of its plan does not suffice for.
#[derive(Debug, Default)]
pub struct OverBudget {
    keys: Vec<Key>,
    files: Vec<FileFork>,
    /// The file at each place of [`Places`].
    places: Vec<u32>,
}

/// The chunks of one database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DatabasePlan {
    /// The database's OID; 0 for shared catalogs.
    pub database: Oid,
    /// Which of the plan's chunks they are.
    pub chunks: Range<u32>,
    /// How many blocks they have.
    pub blocks: u64,
}

/// Why a list has no plan.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// Memory was refused.
    #[error("out of memory")]
    OutOfMemory(#[from] TryReserveError),
    /// The list names more files than can be told apart: 67 million.
    #[error("too many relations")]
    TooManyFiles,
}

/// A block by which it is sorted: the place of its file's tier among all of these,
/// its number, and (so that they are not lost) its usage count and its record's age.
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

    /// Puts a mark in the place of the usage count, which is never that high.
    fn mark_cached(&mut self) {
        self.0 |= Self::USAGE_COUNT;
    }

    fn is_marked_cached(self) -> bool {
        self.0 & Self::USAGE_COUNT == Self::USAGE_COUNT
    }
}

impl Plan {
    /// Plans to load the hottest `budget` blocks of the list, but for those that
    /// are cached already.
    ///
    /// # Errors
    /// If memory is refused, or the list names too many files.
    pub fn new(
        list: BlockList,
        cached: impl Iterator<Item = Record>,
        budget: u64,
    ) -> Result<Self, PlanError> {
        let BlockList { files, entries, .. } = list;
        let places = Places::of(&files)?;
        let mut plan = Self::default();
        let mut keys = plan.keys_of(entries, &files, &places);
        keys.sort_unstable();
        plan.cached = remove_cached(&mut keys, &files, &places, cached)?;
        let mut over_budget = Vec::new();
        over_budget.try_reserve_exact(
            keys.len()
                .saturating_sub(usize::try_from(budget).unwrap_or(usize::MAX)),
        )?;
        keep_hottest(
            &mut keys,
            budget,
            |key| rank(key.usage_count(), key.age()),
            |key| over_budget.push(*key),
        );
        plan.keys = keys;
        plan.cut_into_chunks(&files, &places)?;
        plan.over_budget = OverBudget {
            keys: over_budget,
            files,
            places: places.files,
        };
        Ok(plan)
    }

    /// The legal entries as keys, in the same memory: the standard library takes no
    /// other for elements of the same size, of which `tests/refused_memory.rs` makes
    /// sure.
    fn keys_of(&mut self, entries: Vec<Entry>, files: &[FileFork], places: &Places) -> Vec<Key> {
        let total = entries.len();
        let keys: Vec<Key> = entries
            .into_iter()
            .filter(|entry| files[entry.file()].record(entry.block()).is_legal())
            .map(|entry| {
                let usage_count = entry.usage_count();
                Key::new(
                    places.find(entry.file(), usage_count),
                    entry.block(),
                    usage_count,
                    entry.age(),
                )
            })
            .collect();
        self.illegal = (total - keys.len()) as u64;
        keys
    }

    fn cut_into_chunks(
        &mut self,
        files: &[FileFork],
        places: &Places,
    ) -> Result<(), TryReserveError> {
        let mut last_place = usize::MAX;
        for (index, key) in self.keys.iter().enumerate() {
            if let Some(last) = self.chunks.last_mut()
                && last_place == key.place()
                && last.count < CHUNK_BLOCKS
            {
                last.count += 1;
                continue;
            }
            last_place = key.place();
            let file = files[places.files[last_place] as usize];
            self.chunks.try_reserve(1)?;
            self.chunks.push(Chunk {
                database: file.database,
                tablespace: file.tablespace,
                filenumber: file.filenumber,
                fork: Fork::from_number(file.fork).expect("illegal forks were left out"),
                first: index as u32,
                count: 1,
            });
        }
        Ok(())
    }

    /// Records that name a fork or a block that cannot be.
    pub fn illegal(&self) -> u64 {
        self.illegal
    }

    /// Blocks left out because they are cached already.
    pub fn cached(&self) -> u64 {
        self.cached
    }

    /// Blocks left out because the budget does not suffice.
    pub fn over_budget(&self) -> u64 {
        self.over_budget.keys.len() as u64
    }

    /// These blocks, when the rest of the plan is not needed any more.
    pub fn into_over_budget(self) -> OverBudget {
        self.over_budget
    }

    /// The databases, in order. That of OID 0 comes first where there is one.
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

    /// How many chunks there are.
    pub fn chunks(&self) -> usize {
        self.chunks.len()
    }

    /// How many words [`Plan::encode`] fills.
    pub fn words(&self) -> usize {
        HEADER_WORDS
            + self.chunks.len() * CHUNK_WORDS
            + self.keys.len()
            + self.keys.len().div_ceil(size_of::<u32>())
    }

    /// Lays the plan out in `words`, which are as many as [`Plan::words`] says.
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

/// The order of the files' tiers: a database's hot tier, file by file, then its
/// other.
struct Places {
    /// The file at each place.
    files: Vec<u32>,
    /// Each file's place in each of the tiers.
    places: Vec<[u32; TIERS]>,
}

impl Places {
    fn of(files: &[FileFork]) -> Result<Self, PlanError> {
        if files.len() > Key::MAX_FILES {
            return Err(PlanError::TooManyFiles);
        }
        let mut sorted: Vec<u32> = Vec::new();
        sorted.try_reserve_exact(files.len())?;
        sorted.extend(0..files.len() as u32);
        sorted.sort_unstable_by_key(|&index| files[index as usize]);
        let mut order = Self {
            files: Vec::new(),
            places: Vec::new(),
        };
        order.files.try_reserve_exact(files.len() * TIERS)?;
        order.places.try_reserve_exact(files.len())?;
        order.places.resize(files.len(), [0; TIERS]);
        let database = |&index: &u32| files[index as usize].database;
        for of_database in sorted.chunk_by(|one, other| database(one) == database(other)) {
            for tier in 0..TIERS {
                for &index in of_database {
                    order.places[index as usize][tier] = order.files.len() as u32;
                    order.files.push(index);
                }
            }
        }
        Ok(order)
    }

    /// The place of a file's blocks of that usage count.
    fn find(&self, file: usize, usage_count: UsageCount) -> u32 {
        self.places[file][usize::from(usage_count.get() < HOT)]
    }
}

/// Removes the keys of cached blocks, and returns how many those are.
fn remove_cached(
    keys: &mut Vec<Key>,
    files: &[FileFork],
    places: &Places,
    cached: impl Iterator<Item = Record>,
) -> Result<u64, TryReserveError> {
    let mut by_file: FxHashMap<&FileFork, usize> = FxHashMap::default();
    by_file.try_reserve(files.len())?;
    by_file.extend(files.iter().zip(0..));
    for record in cached {
        let Some(&file) = by_file.get(&FileFork::of(&record)) else {
            continue;
        };
        for place in places.places[file] {
            let block = Key::lowest(place, record.block);
            let start = keys.partition_point(|key| *key < block);
            // The same block may be listed more than once, and be seen in two buffers
            // when it moves from one to the other meanwhile.
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
            let file = self.files[self.places[key.place()] as usize];
            (file.record(key.block()), key.usage_count(), key.age())
        })
    }
}

/// A plan as a worker sees it in shared memory.
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

    /// The chunk of that index, and its blocks.
    pub fn chunk(self, index: u32) -> (Chunk, ChunkBlocks<'a>) {
        let words = &self.chunks[index as usize * CHUNK_WORDS..][..CHUNK_WORDS];
        let [database, tablespace, filenumber, fork, first, count] = *words else {
            unreachable!("a chunk has as many words");
        };
        let chunk = Chunk {
            database,
            tablespace,
            filenumber,
            fork: Fork::from_number(fork).expect("a plan has legal forks only"),
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
    /// Their numbers, in ascending order.
    pub fn numbers(self) -> &'a [BlockNumber] {
        self.blocks
    }

    /// How hot the block at that place is.
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

#[cfg(test)]
mod tests;
