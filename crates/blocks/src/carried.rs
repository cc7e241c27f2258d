//! Records that a load has left, and that the next lists carry.
//!
//! A block that could not be loaded for a temporary reason (there was no free buffer,
//! its relation was locked, the load was cancelled) is not in shared buffers, so a list
//! of what is cached would forget it. The lists that follow carry its record instead:
//! after the records of cached blocks, with the usage count that it had, until the block
//! has been loaded, or three starts of the server have left it.
//!
//! Only blocks that are not cached are carried, and each once. Before a list is written,
//! [`Carried::found`] is told of each cached block.

use std::io::Read;

use crate::list::{Entry, FileFork, ListBuilder};
use crate::rank::{RANKS, keep_highest_ranks, rank};
use crate::sort::sort;
use crate::{Age, ListReader, ReadError, Record, UsageCount};

/// The bits of a rank in a sort key: those that a place leaves.
const RANK_BITS: u32 = Entry::PLACE_ZEROS;

/// Gathers the records to be carried.
pub struct CarriedBuilder {
    list: ListBuilder,
    is_start: bool,
}

/// The records to be carried, at most one for each block.
pub struct Carried {
    list: ListBuilder,
    /// How many records are left that were not found in shared buffers.
    left: u64,
}

impl CarriedBuilder {
    /// Begins without any. `is_start` tells whether a start of the server has left the
    /// records, which makes them older.
    pub fn new(is_start: bool) -> Self {
        Self {
            list: ListBuilder::new(usize::MAX),
            is_start,
        }
    }

    /// Makes room for so many records.
    ///
    /// # Errors
    /// If memory is refused.
    pub fn reserve(&mut self, records: u64) -> Result<(), ReadError> {
        let records = usize::try_from(records).unwrap_or(usize::MAX);
        Ok(self.list.entries.try_reserve_exact(records)?)
    }

    /// Adds a record that was left, unless it has been carried for long enough, or no
    /// block can have that number.
    ///
    /// # Errors
    /// If memory is refused, or there are too many files.
    pub fn add(
        &mut self,
        record: Record,
        usage_count: UsageCount,
        age: Age,
    ) -> Result<(), ReadError> {
        match age.when_left(self.is_start) {
            Some(age) if record.is_legal() => self.list.push(record, usage_count, age),
            _ => Ok(()),
        }
    }

    /// Adds the records of a list: all, or only those that the list carries.
    ///
    /// # Errors
    /// If the list cannot be read, memory is refused, or there are too many files.
    pub fn add_list(
        &mut self,
        mut list: ListReader<impl Read>,
        only_carried: bool,
    ) -> Result<(), ReadError> {
        let carried = list.carried().total();
        self.reserve(if only_carried { carried } else { list.length() })?;
        if only_carried && carried == 0 {
            return Ok(());
        }
        while let Some(record) = list.next_aged() {
            let (record, usage_count, age) = record?;
            if age != Age::Cached || !only_carried {
                self.add(record, usage_count, age)?;
            }
        }
        Ok(())
    }

    /// The `most` records of the highest ranks: usage counts, and then ages.
    pub fn finish(self, most: u64) -> Carried {
        self.finish_with_ticks(most, &mut || ())
    }

    /// The same, and calls `tick` now and then, since it takes seconds for very many
    /// records.
    pub fn finish_with_ticks(self, most: u64, tick: &mut dyn FnMut()) -> Carried {
        let mut list = self.list;
        sort(&mut list.entries, sort_key, tick);
        // Of a block that was added more than once, the last entry has the highest rank.
        list.entries.dedup_by(|later, kept| {
            let is_same = later.place() == kept.place();
            if is_same {
                *kept = *later;
            }
            is_same
        });
        keep_highest_ranks(
            &mut list.entries,
            most,
            |entry| rank(entry.usage_count(), entry.age()),
            |_| {},
        );
        let left = list.entries.len() as u64;
        Carried { list, left }
    }
}

/// By which records are sorted: by place, and those of the same place by rank.
fn sort_key(entry: Entry) -> u64 {
    const { assert!(RANKS <= 1 << RANK_BITS) };
    entry.place() << RANK_BITS | rank(entry.usage_count(), entry.age()) as u64
}

impl Carried {
    /// No records.
    pub fn none() -> Self {
        CarriedBuilder::new(false).finish(0)
    }

    /// How many records are left.
    pub fn left(&self) -> u64 {
        self.left
    }

    /// Removes the records of all files for which `exists` returns false. This comes
    /// before [`Carried::found`].
    pub fn retain_files(&mut self, mut exists: impl FnMut(&FileFork) -> bool) {
        let files = &self.list.files;
        let mut last = None;
        // Records of the same file follow one another.
        self.list.entries.retain(|entry| match last {
            Some((file, exists)) if file == entry.file() => exists,
            _ => {
                let exists = exists(&files[entry.file()]);
                last = Some((entry.file(), exists));
                exists
            }
        });
        self.left = self.list.entries.len() as u64;
    }

    /// Removes the record of a block, if there is one: the block is cached.
    pub fn found(&mut self, record: &Record) {
        if self.left == 0 {
            return;
        }
        let Some(file) = self.list.find(record) else {
            return;
        };
        let entries = &mut self.list.entries;
        let place = Entry::place_of(file, record.block);
        let index = entries.partition_point(|entry| entry.place() < place);
        if let Some(entry) = entries.get_mut(index)
            && entry.place() == place
            && entry.age() != Age::Cached
        {
            *entry = entry.with_age(Age::Cached);
            self.left -= 1;
        }
    }

    /// The records that are left, in the order in which a list carries them.
    pub fn records(&self) -> impl Iterator<Item = (Record, UsageCount, Age)> {
        Age::CARRIED.into_iter().flat_map(move |age| {
            let entries = self.list.entries.iter();
            entries
                .filter(move |entry| entry.age() == age)
                .map(move |entry| {
                    let file = self.list.files[entry.file()];
                    (file.record(entry.block()), entry.usage_count(), age)
                })
        })
    }
}

#[cfg(test)]
mod tests;
