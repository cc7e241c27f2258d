//! A block list in memory, to be loaded: eight bytes for each record, and some for each
//! file.

use std::collections::TryReserveError;
use std::io::Read;

use rustc_hash::FxHashMap;

use crate::parser::{CHUNK, ReadError, SHORTEST_RECORD, Sink, read_all};
use crate::trailer::UsageCounts;
use crate::{BlockNumber, Oid, Record, UsageCount};

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
}

/// A record in eight bytes: its block number, its file's index in the list, and its usage
/// count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry(u64);

impl Entry {
    /// The most files that a list can name.
    const MAX_FILES: usize = 1 << 29;

    fn new(file: u32, block: BlockNumber) -> Self {
        Self(u64::from(file) << 32 | u64::from(block)).with_usage_count(UsageCount::ONCE)
    }

    fn with_usage_count(self, usage_count: UsageCount) -> Self {
        Self(self.0 & (u64::MAX >> 3) | u64::from(usage_count.get()) << 61)
    }

    /// The index of the block's file in [`BlockList::files`].
    pub fn file(self) -> usize {
        (self.0 >> 32) as usize & (Self::MAX_FILES - 1)
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
        UsageCount::new((self.0 >> 61) as u32)
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
        Ok(Self {
            files: builder.files,
            entries: builder.entries,
            first_bad_line: summary.first_bad_line,
            usage_counts: summary.usage_counts,
        })
    }

    /// The records in the file's order, each with its usage count.
    pub fn records(&self) -> impl Iterator<Item = (Record, UsageCount)> {
        self.entries.iter().map(|entry| {
            let file = self.files[entry.file()];
            let record = Record {
                database: file.database,
                tablespace: file.tablespace,
                filenumber: file.filenumber,
                fork: file.fork,
                block: entry.block(),
            };
            (record, entry.usage_count())
        })
    }
}

/// Collects the records of a list.
struct ListBuilder {
    files: Vec<FileFork>,
    /// The index of each file in `files`, and that of the last record's file.
    indexes: FxHashMap<FileFork, u32>,
    last: u32,
    entries: Vec<Entry>,
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
        let file = self.index(FileFork::of(&record))?;
        reserve(&mut self.entries, self.most)?;
        self.entries.push(Entry::new(file, record.block));
        Ok(())
    }
}

impl ListBuilder {
    fn new(most: usize) -> Self {
        Self {
            files: Vec::new(),
            indexes: FxHashMap::default(),
            last: 0,
            entries: Vec::new(),
            most,
        }
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
