//! A block list in memory, to be loaded: eight bytes for each record, and some for each
//! file.

use std::collections::TryReserveError;
use std::io::Read;

use rustc_hash::FxHashMap;

use crate::parser::{CHUNK, ReadError, SHORTEST_RECORD, Sink, read_all};
use crate::trailer::UsageCounts;
use crate::{Age, BlockNumber, CarriedCounts, Oid, Record, UsageCount};

/// The file of one fork of a relation: all fields of a record except the block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileFork {
    /// The database's OID; 0 for a shared catalog.
    pub database: Oid,
    /// The tablespace's OID.
    pub tablespace: Oid,
    /// The relation's file number (`relfilenode`), not its OID.
    pub filenumber: Oid,
    /// A fork number, which may be invalid; see [`Fork`](crate::Fork).
    pub fork: u32,
}

impl FileFork {
    /// The file of a record's block.
    pub fn of(record: &Record) -> Self {
        Self {
            database: record.database,
            tablespace: record.tablespace,
            filenumber: record.filenumber,
            fork: record.fork,
        }
    }

    /// The record of one of its blocks.
    pub fn record(self, block: BlockNumber) -> Record {
        Record {
            database: self.database,
            tablespace: self.tablespace,
            filenumber: self.filenumber,
            fork: self.fork,
            block,
        }
    }
}

/// A record in eight bytes: its block number, its file's index in the list, its usage
/// count and its age.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry(u64);

impl Entry {
    /// The most files that a list can name.
    const MAX_FILES: usize = 1 << 27;

    const AGE: u64 = 3;
    const AGE_SHIFT: u32 = 59;
    const USAGE_COUNT_SHIFT: u32 = 61;
    /// How many bits of a place are always zero: the highest ones.
    pub(crate) const PLACE_ZEROS: u32 = u64::BITS - Self::AGE_SHIFT;
    /// The bits of the file and of the block.
    const PLACE: u64 = (1 << Self::AGE_SHIFT) - 1;

    pub(crate) fn new(file: u32, block: BlockNumber, usage_count: UsageCount, age: Age) -> Self {
        Self(
            Self::place_of(file, block)
                | (age as u64) << Self::AGE_SHIFT
                | u64::from(usage_count.get()) << Self::USAGE_COUNT_SHIFT,
        )
    }

    fn with_usage_count(self, usage_count: UsageCount) -> Self {
        let others = self.0 & ((1 << Self::USAGE_COUNT_SHIFT) - 1);
        Self(others | u64::from(usage_count.get()) << Self::USAGE_COUNT_SHIFT)
    }

    pub(crate) fn with_age(self, age: Age) -> Self {
        let others = self.0 & !(Self::AGE << Self::AGE_SHIFT);
        Self(others | (age as u64) << Self::AGE_SHIFT)
    }

    /// A number for a block of a file, in the order of files and blocks.
    pub(crate) fn place_of(file: u32, block: BlockNumber) -> u64 {
        u64::from(file) << 32 | u64::from(block)
    }

    /// Its file and block as one number, see [`Entry::place_of`].
    pub(crate) fn place(self) -> u64 {
        self.0 & Self::PLACE
    }

    /// The index of the block's file in [`BlockList::files`].
    pub fn file(self) -> usize {
        (self.place() >> 32) as usize
    }

    /// The block number within that file.
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the lower 32 bits are the block number"
    )]
    pub fn block(self) -> BlockNumber {
        self.0 as BlockNumber
    }

    /// The block's usage count.
    pub fn usage_count(self) -> UsageCount {
        UsageCount::new((self.0 >> Self::USAGE_COUNT_SHIFT) as u32)
    }

    /// How long the record has been carried.
    pub fn age(self) -> Age {
        Age::from_number((self.0 >> Self::AGE_SHIFT & Self::AGE) as u32)
    }
}

/// The content of a list.
#[derive(Debug, Default)]
pub struct BlockList {
    /// The files that records name, in the order of their first mention.
    pub files: Vec<FileFork>,
    /// The valid records, in the file's order.
    pub entries: Vec<Entry>,
    /// The number, starting at 1, of the first line that should be a header or a record
    /// and is neither. If the file ends too early, it is the line after the last.
    pub first_bad_line: Option<u64>,
    /// Where the usage counts of the entries come from. If that is not the trailer, all
    /// are [`UsageCount::ONCE`].
    pub usage_counts: UsageCounts,
    /// How many of the entries, the last ones, are carried; none where the trailer does
    /// not fit.
    pub carried: CarriedCounts,
}

impl BlockList {
    /// Reads the list of a file of `size` bytes, which limits how much memory is
    /// requested. A bad line is no error: see [`BlockList::first_bad_line`].
    ///
    /// # Errors
    /// If `input` fails, memory is refused, or the list names too many files.
    pub fn read(input: impl Read, size: u64) -> Result<Self, ReadError> {
        Self::read_in_chunks(input, size, CHUNK)
    }

    /// The same with chunks of `chunk` bytes. The header must fit into one.
    ///
    /// # Errors
    /// See [`BlockList::read`].
    pub fn read_in_chunks(input: impl Read, size: u64, chunk: usize) -> Result<Self, ReadError> {
        let most = usize::try_from(size).unwrap_or(usize::MAX) / SHORTEST_RECORD + 1;
        let builder = ListBuilder::new(most);
        let (mut builder, summary) = read_all(input, chunk, builder, ListBuilder::set_usage_count)?;
        if summary.usage_counts != UsageCounts::Saved {
            for entry in &mut builder.entries {
                *entry = entry.with_usage_count(UsageCount::ONCE);
            }
        }
        let records = builder.entries.len() as u64;
        let first_carried = records.saturating_sub(summary.carried.total());
        for (entry, record) in builder.entries.iter_mut().zip(0..records) {
            if record >= first_carried {
                *entry = entry.with_age(summary.carried.age_of(record, records));
            }
        }
        Ok(Self {
            files: builder.files,
            entries: builder.entries,
            first_bad_line: summary.first_bad_line,
            usage_counts: summary.usage_counts,
            carried: summary.carried,
        })
    }

    /// The records in the file's order, each with its usage count.
    pub fn records(&self) -> impl Iterator<Item = (Record, UsageCount)> {
        self.entries.iter().map(|entry| {
            let record = self.files[entry.file()].record(entry.block());
            (record, entry.usage_count())
        })
    }
}

/// Collects the records of a list.
pub(crate) struct ListBuilder {
    pub files: Vec<FileFork>,
    /// The index of each file in `files`, and that of the last record's file.
    indexes: FxHashMap<FileFork, u32>,
    last: u32,
    pub entries: Vec<Entry>,
    /// The most records that a file of this size can have.
    most: usize,
}

impl Sink for ListBuilder {
    /// Requests memory for the number of records in the header, if the file can have so
    /// many.
    fn expect(&mut self, records: u64) -> Result<(), ReadError> {
        let records = usize::try_from(records).unwrap_or(usize::MAX);
        Ok(self.entries.try_reserve_exact(records.min(self.most))?)
    }

    fn record(&mut self, record: Record) -> Result<(), ReadError> {
        self.push(record, UsageCount::ONCE, Age::Cached)
    }
}

impl ListBuilder {
    pub fn new(most: usize) -> Self {
        Self {
            files: Vec::new(),
            indexes: FxHashMap::default(),
            last: 0,
            entries: Vec::new(),
            most,
        }
    }

    pub fn push(
        &mut self,
        record: Record,
        usage_count: UsageCount,
        age: Age,
    ) -> Result<(), ReadError> {
        let file = self.index(FileFork::of(&record))?;
        reserve(&mut self.entries, self.most)?;
        self.entries
            .push(Entry::new(file, record.block, usage_count, age));
        Ok(())
    }

    /// The index of a record's file, if the list names it.
    pub fn find(&mut self, record: &Record) -> Option<u32> {
        let file = FileFork::of(record);
        if self.files.get(self.last as usize) != Some(&file) {
            self.last = *self.indexes.get(&file)?;
        }
        Some(self.last)
    }

    fn index(&mut self, file: FileFork) -> Result<u32, ReadError> {
        // A list has the order of the buffers, and consecutive buffers often have blocks
        // of the same file.
        if self.files.get(self.last as usize) != Some(&file) {
            self.last = match self.indexes.get(&file) {
                Some(index) => *index,
                None => {
                    if self.files.len() == Entry::MAX_FILES {
                        return Err(ReadError::TooManyFiles);
                    }
                    #[expect(
                        clippy::cast_possible_truncation,
                        reason = "it is less than MAX_FILES"
                    )]
                    let index = self.files.len() as u32;
                    reserve(&mut self.files, self.most)?;
                    self.indexes.try_reserve(1)?;
                    self.files.push(file);
                    self.indexes.insert(file, index);
                    index
                }
            };
        }
        Ok(self.last)
    }

    /// Sets a record's usage count. Returns false if there is no such record.
    fn set_usage_count(&mut self, record: u64, usage_count: UsageCount) -> bool {
        let entry = usize::try_from(record)
            .ok()
            .and_then(|index| self.entries.get_mut(index));
        match entry {
            Some(entry) => {
                *entry = entry.with_usage_count(usage_count);
                true
            }
            None => false,
        }
    }
}

/// Reserves space for one more element. The capacity doubles, up to `most`.
fn reserve<T>(vec: &mut Vec<T>, most: usize) -> Result<(), TryReserveError> {
    let length = vec.len();
    if length < vec.capacity() {
        return Ok(());
    }
    vec.try_reserve_exact(length.max(1024).min(most.saturating_sub(length)).max(1))
}

#[cfg(test)]
mod tests;
