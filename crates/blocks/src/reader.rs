//! Reading a block list record by record, without holding it in memory.
//!
//! The usage counts follow the last record, and are used only if the whole trailer is
//! valid. So the file is read twice: once to its end, to check it, and once to return
//! the records. The second time it is read at two positions at once, one for the
//! records and one for their usage counts.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::ops::Range;

use crate::parser::{CHUNK, Parser, ReadError, SHORTEST_RECORD, Sink, fill, new_chunk, read_all};
use crate::trailer::UsageCounts;
use crate::{Age, CarriedCounts, Record, UsageCount};

/// How many bytes of the trailer are read at a time.
const USAGE_COUNTS_CHUNK: usize = 8 * 1024;

/// The valid records of a list, in the file's order, each with its usage count.
pub struct ListReader<R> {
    input: R,
    chunk: Vec<u8>,
    /// Its sink has the records of the last chunk that have not been returned yet.
    parser: Parser<VecDeque<Record>>,
    /// The rest of the trailer. `None` if its usage counts are not used.
    usage_counts: Option<Bytes<R>>,
    first_bad_line: Option<u64>,
    carried: CarriedCounts,
    /// How many records the list has, and how many were handed out.
    records: u64,
    handed_out: u64,
}

/// The bytes of an input, one by one. [`io::BufReader`] would do the same, but aborts
/// if it gets no memory.
struct Bytes<R> {
    input: R,
    chunk: Vec<u8>,
    /// The part of the chunk that has not been returned yet.
    left: Range<usize>,
}

impl<R: Read> ListReader<R> {
    /// Reads the list once, to check it. `from` opens the file at an offset.
    ///
    /// # Errors
    /// If the file cannot be read, or memory is refused.
    pub fn new(from: impl Fn(u64) -> R) -> Result<Self, ReadError> {
        Self::in_chunks(from, CHUNK)
    }

    /// The same with chunks of `chunk` bytes. The header must fit into one.
    ///
    /// # Errors
    /// See [`ListReader::new`].
    pub fn in_chunks(from: impl Fn(u64) -> R, chunk: usize) -> Result<Self, ReadError> {
        let (_, summary) = read_all(from(0), chunk, Counter(0), |counter, index, _| {
            index < counter.0
        })?;
        let usage_counts = match summary.usage_counts {
            UsageCounts::Saved => Some(Bytes {
                input: from(summary.digits_at),
                chunk: new_chunk(USAGE_COUNTS_CHUNK)?,
                left: 0..0,
            }),
            _ => None,
        };
        let mut records = VecDeque::new();
        records.try_reserve_exact(chunk / SHORTEST_RECORD + 1)?;
        Ok(Self {
            input: from(0),
            chunk: new_chunk(chunk)?,
            parser: Parser::new(records),
            usage_counts,
            first_bad_line: summary.first_bad_line,
            carried: summary.carried,
            records: summary.records,
            handed_out: 0,
        })
    }

    /// See [`BlockList::carried`](crate::BlockList::carried).
    pub fn carried(&self) -> CarriedCounts {
        self.carried
    }

    /// How many records the list has, or lines in place of one.
    pub fn length(&self) -> u64 {
        self.records
    }

    /// The next record with its age.
    pub fn next_aged(&mut self) -> Option<Result<(Record, UsageCount, Age), ReadError>> {
        let age = self.carried.age_of(self.handed_out, self.records);
        let record = self.next()?;
        Some(record.map(|(record, usage_count)| (record, usage_count, age)))
    }

    /// See [`BlockList::first_bad_line`](crate::BlockList::first_bad_line).
    pub fn first_bad_line(&self) -> Option<u64> {
        self.first_bad_line
    }

    /// Reads the records of the next chunk.
    fn read_chunk(&mut self) -> Result<(), ReadError> {
        let filled = fill(&mut self.input, &mut self.chunk)?;
        self.parser.read(&self.chunk[..filled])?;
        if filled < self.chunk.len() {
            self.parser.end()?;
        }
        Ok(())
    }

    /// The usage count of the next record.
    fn usage_count(&mut self) -> io::Result<UsageCount> {
        for byte in self.usage_counts.iter_mut().flatten() {
            // Line breaks are skipped.
            if let Some(usage_count) = UsageCount::from_digit(byte?) {
                return Ok(usage_count);
            }
        }
        Ok(UsageCount::ONCE)
    }
}

impl<R: Read> Iterator for Bytes<R> {
    type Item = io::Result<u8>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.left.is_empty() {
            match fill(&mut self.input, &mut self.chunk) {
                Ok(filled) => self.left = 0..filled,
                Err(error) => return Some(Err(error)),
            }
        }
        self.left.next().map(|at| Ok(self.chunk[at]))
    }
}

impl<R: Read> Iterator for ListReader<R> {
    type Item = Result<(Record, UsageCount), ReadError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(record) = self.parser.sink.pop_front() {
                self.handed_out += 1;
                return Some(match self.usage_count() {
                    Ok(usage_count) => Ok((record, usage_count)),
                    Err(error) => Err(error.into()),
                });
            }
            if self.parser.has_ended() {
                return None;
            }
            if let Err(error) = self.read_chunk() {
                return Some(Err(error));
            }
        }
    }
}

impl Sink for VecDeque<Record> {
    fn record(&mut self, record: Record) -> Result<(), ReadError> {
        self.try_reserve(1)?;
        self.push_back(record);
        Ok(())
    }
}

/// Counts the records.
struct Counter(u64);

impl Sink for Counter {
    fn record(&mut self, _: Record) -> Result<(), ReadError> {
        self.0 += 1;
        Ok(())
    }
}
