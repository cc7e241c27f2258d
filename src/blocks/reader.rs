//! Reading a block list record by record, without holding it in memory.
//!
//! What tells the heat of the first record stands behind the last, and is to be
//! believed only if all of it fits. So the file is read twice: once to its end, to
//! see what it is worth, and once to hand out the records, with a second place in
//! it where the digits of their heat are read.

use std::collections::VecDeque;
use std::io::{self, BufReader, Read};

use super::parser::{CHUNK, Parser, ReadError, SHORTEST_RECORD, Sink, fill, new_chunk, read_all};
use super::trailer::Heats;
use super::{Heat, Record, room};

/// The records of a list that parse, in the file's order, each with its heat.
pub struct ListReader<R> {
    input: R,
    chunk: Vec<u8>,
    /// Reads one chunk at a time; its sink has those records of the last that
    /// were not handed out yet.
    parser: Parser<VecDeque<Record>>,
    /// What is left of the trailer, if its heats are to be believed.
    heats: Option<io::Bytes<BufReader<R>>>,
    first_bad_line: Option<u64>,
}

impl<R: Read> ListReader<R> {
    /// Reads the list once. `from` gives the file's bytes from an offset on.
    pub fn new(from: impl Fn(u64) -> R) -> Result<Self, ReadError> {
        Self::in_chunks(from, CHUNK)
    }

    /// The same with chunks of another size, which hold the header at least.
    pub fn in_chunks(from: impl Fn(u64) -> R, chunk: usize) -> Result<Self, ReadError> {
        let (_, summary) = read_all(from(0), chunk, Counter(0), |counter, index, _| {
            index < counter.0
        })?;
        let heats = (summary.heats == Heats::Saved)
            .then(|| BufReader::new(from(summary.digits_at)).bytes());
        let mut records = VecDeque::new();
        room::ask(|| records.try_reserve_exact(chunk / SHORTEST_RECORD + 1))?;
        Ok(Self {
            input: from(0),
            chunk: new_chunk(chunk)?,
            parser: Parser::new(records),
            heats,
            first_bad_line: summary.first_bad_line,
        })
    }

    /// As [`BlockList::first_bad_line`](super::list::BlockList::first_bad_line).
    pub fn first_bad_line(&self) -> Option<u64> {
        self.first_bad_line
    }

    /// Reads the next chunk's records.
    fn read_chunk(&mut self) -> Result<(), ReadError> {
        let filled = fill(&mut self.input, &mut self.chunk)?;
        self.parser.read(&self.chunk[..filled])?;
        if filled < self.chunk.len() {
            self.parser.end()?;
        }
        Ok(())
    }

    /// The heat of the next record.
    fn heat(&mut self) -> io::Result<Heat> {
        for byte in self.heats.iter_mut().flatten() {
            // There are line breaks between the digits.
            if let Some(heat) = Heat::from_digit(byte?) {
                return Ok(heat);
            }
        }
        Ok(Heat::ONCE)
    }
}

impl<R: Read> Iterator for ListReader<R> {
    type Item = Result<(Record, Heat), ReadError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(record) = self.parser.sink.pop_front() {
                return Some(match self.heat() {
                    Ok(heat) => Ok((record, heat)),
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
        self.push_back(record);
        Ok(())
    }
}

/// Counts records.
struct Counter(u64);

impl Sink for Counter {
    fn record(&mut self, _: Record) -> Result<(), ReadError> {
        self.0 += 1;
        Ok(())
    }
}
