//! Reading the text of a block list.
//!
//! ```text
//! <<N>>
//! database,tablespace,filenumber,fork,block      (N records, unsigned decimal)
//! ```
//!
//! and, after the records, a trailer with their heat (see [`super::trailer`]).
//!
//! The file outlives the server that wrote it, may be edited, and may have been
//! cut short by a full disk, so nothing in it is believed: N is only a claim, and
//! a line that is no record costs that line alone. Any white space separates
//! records (so CRLF will do), blanks may stand before a number, and what follows
//! the Nth record is left alone unless it is a trailer that fits. Memory follows
//! the records that are there: eight bytes for each, and some for each file.

use std::collections::TryReserveError;
use std::io::{self, Read};

use rustc_hash::FxHashMap;

#[cfg(test)]
use super::Record;
use super::trailer::{Heats, TrailerReader};
use super::{BlockNumber, Heat, Oid};

/// The bytes of the shortest record, `0,0,0,0,0` and what separates it from the
/// next: a file cannot hold more records than its size divided by this.
const SHORTEST_RECORD: usize = 10;

/// The most bytes of a record without leading zeros, and its line break.
const LONGEST_RECORD: usize = 5 * 11;

/// How much of the file is looked at in one go.
const CHUNK: usize = 256 * 1024;

/// The file of one fork of a relation: all of a record but the block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileFork {
    pub database: Oid,
    pub tablespace: Oid,
    pub filenumber: Oid,
    pub fork: u32,
}

/// A record: its block, which of the list's files it is in, and its heat, in
/// eight bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry(u64);

impl Entry {
    /// How many files a list can name.
    const MAX_FILES: usize = 1 << 29;

    fn new(file: u32, block: BlockNumber) -> Self {
        Self(u64::from(file) << 32 | u64::from(block)).with_heat(Heat::ONCE)
    }

    fn with_heat(self, heat: Heat) -> Self {
        Self(self.0 & (u64::MAX >> 3) | u64::from(heat.usage_count()) << 61)
    }

    pub fn file(self) -> usize {
        (self.0 >> 32) as usize & (Self::MAX_FILES - 1)
    }

    pub fn block(self) -> BlockNumber {
        self.0 as BlockNumber
    }

    pub fn heat(self) -> Heat {
        Heat::from_usage_count((self.0 >> 61) as u32)
    }
}

/// What a file held.
#[derive(Debug, Default)]
pub struct BlockList {
    /// The files that records name, in the order of their first mention.
    pub files: Vec<FileFork>,
    /// The records that parse, in the file's order.
    pub entries: Vec<Entry>,
    /// The first line that should be a header or a record and is neither,
    /// counted from 1; one past the last line where the file ends too early.
    pub first_bad_line: Option<u64>,
    /// Where the entries' heat comes from; all have the same where it is not
    /// the trailer.
    pub heats: Heats,
}

/// Why no list could be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("out of memory")]
    OutOfMemory(#[from] TryReserveError),
    #[error("too many relations")]
    TooManyFiles,
}

impl BlockList {
    /// Reads the list of a file of `size` bytes, which bounds the memory that
    /// is asked for. Bad lines are no errors: see [`BlockList::first_bad_line`].
    pub fn read(mut input: impl Read, size: u64) -> Result<Self, ReadError> {
        let most = usize::try_from(size).unwrap_or(usize::MAX) / SHORTEST_RECORD + 1;
        let mut parser = Parser::new(most);
        let mut trailer = TrailerReader::default();
        let mut checksum = 0;
        let mut chunk = vec![0; CHUNK];
        let mut first = true;
        loop {
            let filled = fill(&mut input, &mut chunk)?;
            let bytes = &chunk[..filled];
            let mut at = 0;
            if first {
                at = parser.header(bytes)?;
                first = false;
            }
            at += parser.records(&bytes[at..])?;
            checksum = crc32c::crc32c_append(checksum, &bytes[..at]);
            trailer.read(&bytes[at..], &mut checksum, |index, digit| {
                parser.set_heat(index, digit)
            });
            if filled < CHUNK || trailer.has_ended() {
                break;
            }
        }
        parser.end()?;
        let heats = trailer.finish(checksum, parser.seen);
        Ok(parser.into_list(heats))
    }

    /// The records, each with its heat.
    #[cfg(test)]
    pub fn records(&self) -> impl Iterator<Item = (Record, Heat)> {
        self.entries.iter().map(|entry| {
            let file = self.files[entry.file()];
            let record = Record {
                database: file.database,
                tablespace: file.tablespace,
                filenumber: file.filenumber,
                fork: file.fork,
                block: entry.block(),
            };
            (record, entry.heat())
        })
    }
}

/// Fills `buffer`; less only at the end of the input.
fn fill(input: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match input.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// Where the parser stands. A record may lie across two chunks, so all of it
/// survives the end of one.
struct Parser {
    files: Vec<FileFork>,
    /// Which of `files` each is, and which was named last.
    indexes: FxHashMap<FileFork, u32>,
    last: u32,
    entries: Vec<Entry>,
    /// The most records that the file can hold.
    most: usize,
    /// How many records the header claims; none where there is no header that
    /// could be believed, and then everything up to a trailer is read.
    claimed: Option<u64>,
    /// Records and bad lines so far: both use up the claim.
    seen: u64,
    /// Line breaks so far.
    breaks: u64,
    first_bad_line: Option<u64>,
    /// Nothing that follows belongs to the list.
    ended: bool,
    state: State,
    /// The fields of the record begun, and which of them is next.
    fields: [u32; 5],
    field: usize,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    /// Before a record.
    #[default]
    Between,
    /// Within a record, before the digits of a field.
    BeforeField,
    /// Within the digits of a field.
    InField,
    /// Within a line that is no record, up to its end.
    BadLine,
}

impl Parser {
    fn new(most: usize) -> Self {
        Self {
            files: Vec::new(),
            indexes: FxHashMap::default(),
            last: 0,
            entries: Vec::new(),
            most,
            claimed: None,
            seen: 0,
            breaks: 0,
            first_bad_line: None,
            ended: false,
            state: State::Between,
            fields: [0; 5],
            field: 0,
        }
    }

    /// Reads the header at the start of the file's first `bytes`, and returns
    /// where the records begin.
    fn header(&mut self, bytes: &[u8]) -> Result<usize, TryReserveError> {
        let Some((claimed, length)) = parse_header(bytes) else {
            self.first_bad_line = Some(1);
            return Ok(0);
        };
        // The number may stand on a line below.
        let breaks = bytes[..length].iter().filter(|&&byte| byte == b'\n');
        self.breaks = breaks.count() as u64;
        self.claimed = u64::try_from(claimed).ok();
        match self.claimed {
            None => self.first_bad_line = Some(1),
            Some(0) => self.ended = true,
            // As much as is claimed, if the file can hold it.
            Some(claimed) => {
                let claimed = usize::try_from(claimed).unwrap_or(usize::MAX);
                self.entries.try_reserve_exact(claimed.min(self.most))?;
            }
        }
        Ok(length)
    }

    /// Reads records up to the end of the bytes or of the list, and returns how
    /// many bytes that were.
    fn records(&mut self, bytes: &[u8]) -> Result<usize, ReadError> {
        let mut at = 0;
        while at < bytes.len() && !self.ended {
            if self.state == State::Between
                && let Some(length) = self.plain_record(&bytes[at..])
            {
                at += length;
                self.breaks += 1;
                self.record()?;
            } else {
                self.byte(bytes[at])?;
                // A trailer begins with the byte that ends the list.
                at += usize::from(bytes[at] != b'#' || !self.ended);
            }
        }
        Ok(at)
    }

    /// The length of a record as the server writes it, at the start of the
    /// bytes; nothing where there is none, or something else, which is then left
    /// to [`Parser::byte`].
    fn plain_record(&mut self, bytes: &[u8]) -> Option<usize> {
        // Nine digits fit into 32 bits whatever they are.
        const DIGITS: usize = 9;
        if bytes.len() < LONGEST_RECORD {
            return None;
        }
        let mut at = 0;
        for (index, field) in self.fields.iter_mut().enumerate() {
            let start = at;
            let mut value = 0;
            while let digit @ 0..=9 = bytes[at].wrapping_sub(b'0')
                && at - start < DIGITS
            {
                value = value * 10 + u32::from(digit);
                at += 1;
            }
            let separator = if index < 4 { b',' } else { b'\n' };
            if at == start || bytes[at] != separator {
                return None;
            }
            at += 1;
            *field = value;
        }
        Some(at)
    }

    fn byte(&mut self, byte: u8) -> Result<(), ReadError> {
        match self.state {
            State::Between => match byte {
                b'\n' => self.breaks += 1,
                b'0'..=b'9' => {
                    self.fields[0] = u32::from(byte - b'0');
                    self.field = 0;
                    self.state = State::InField;
                }
                // A trailer: nothing that a record could begin with.
                b'#' => self.list_ends(),
                _ if is_space(byte) => {}
                _ => self.bad_line(byte),
            },
            State::InField => match byte {
                b'0'..=b'9' => {
                    let value = self.fields[self.field]
                        .checked_mul(10)
                        .and_then(|value| value.checked_add(u32::from(byte - b'0')));
                    match value {
                        Some(value) => self.fields[self.field] = value,
                        None => self.bad_line(byte),
                    }
                }
                b',' if self.field < 4 => {
                    self.field += 1;
                    self.state = State::BeforeField;
                }
                _ if self.field == 4 && is_space(byte) => {
                    self.record()?;
                    if byte == b'\n' {
                        self.breaks += 1;
                    }
                }
                _ => self.bad_line(byte),
            },
            State::BeforeField => match byte {
                b'0'..=b'9' => {
                    self.fields[self.field] = u32::from(byte - b'0');
                    self.state = State::InField;
                }
                b' ' | b'\t' => {}
                _ => self.bad_line(byte),
            },
            State::BadLine => {
                if byte == b'\n' {
                    self.breaks += 1;
                    self.state = State::Between;
                }
            }
        }
        Ok(())
    }

    /// The end of the file.
    fn end(&mut self) -> Result<(), ReadError> {
        if self.ended {
            return Ok(());
        }
        match self.state {
            // The last record needs no line break after it.
            State::InField if self.field == 4 => self.record()?,
            State::InField | State::BeforeField => self.bad_line(0),
            State::Between | State::BadLine => {}
        }
        self.list_ends();
        Ok(())
    }

    /// Nothing that follows belongs to the list, which may be shorter than it
    /// claims to be.
    fn list_ends(&mut self) {
        if self.claimed.is_some_and(|claimed| self.seen < claimed) {
            self.first_bad_line.get_or_insert(self.breaks + 1);
        }
        self.ended = true;
    }

    /// The record whose fields have been read.
    fn record(&mut self) -> Result<(), ReadError> {
        let [database, tablespace, filenumber, fork, block] = self.fields;
        let file = self.index(FileFork {
            database,
            tablespace,
            filenumber,
            fork,
        })?;
        reserve(&mut self.entries, self.most)?;
        self.entries.push(Entry::new(file, block));
        self.state = State::Between;
        self.saw_one();
        Ok(())
    }

    fn index(&mut self, file: FileFork) -> Result<u32, ReadError> {
        // Buffers that were filled together often lie together.
        if self.files.get(self.last as usize) != Some(&file) {
            self.last = match self.indexes.get(&file) {
                Some(index) => *index,
                None => {
                    let index = self.files.len();
                    if index == Entry::MAX_FILES {
                        return Err(ReadError::TooManyFiles);
                    }
                    reserve(&mut self.files, self.most)?;
                    self.indexes.try_reserve(1)?;
                    self.files.push(file);
                    self.indexes.insert(file, index as u32);
                    index as u32
                }
            };
        }
        Ok(self.last)
    }

    /// The current line is no record; `byte` is what gave it away.
    fn bad_line(&mut self, byte: u8) {
        self.first_bad_line.get_or_insert(self.breaks + 1);
        if byte == b'\n' {
            self.breaks += 1;
            self.state = State::Between;
        } else {
            self.state = State::BadLine;
        }
        self.saw_one();
    }

    fn saw_one(&mut self) {
        self.seen += 1;
        self.ended = self.claimed == Some(self.seen);
    }

    /// Gives a record the heat of that digit; false where there is no such
    /// record or digit.
    fn set_heat(&mut self, record: u64, digit: u8) -> bool {
        let entry = usize::try_from(record)
            .ok()
            .and_then(|index| self.entries.get_mut(index));
        match (entry, Heat::from_digit(digit)) {
            (Some(entry), Some(heat)) => {
                *entry = entry.with_heat(heat);
                true
            }
            _ => false,
        }
    }

    fn into_list(mut self, heats: Heats) -> BlockList {
        if heats != Heats::Saved {
            for entry in &mut self.entries {
                *entry = entry.with_heat(Heat::ONCE);
            }
        }
        BlockList {
            files: self.files,
            entries: self.entries,
            first_bad_line: self.first_bad_line,
            heats,
        }
    }
}

/// Makes room for one more, doubling, but never beyond `most`.
fn reserve<T>(vec: &mut Vec<T>, most: usize) -> Result<(), TryReserveError> {
    let length = vec.len();
    if length < vec.capacity() {
        return Ok(());
    }
    vec.try_reserve_exact(length.max(1024).min(most.saturating_sub(length)).max(1))
}

/// `<<N>>`: the number claimed and the header's length; nothing where the bytes
/// do not begin with a header.
fn parse_header(bytes: &[u8]) -> Option<(i128, usize)> {
    let mut rest = bytes.strip_prefix(b"<<")?;
    while let [byte, tail @ ..] = rest
        && is_space(*byte)
    {
        rest = tail;
    }
    let negative = rest.first() == Some(&b'-');
    if let [b'+' | b'-', tail @ ..] = rest {
        rest = tail;
    }
    let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
    if digits == 0 || !rest[digits..].starts_with(b">>") {
        return None;
    }
    // A number of more digits than any file has records is as good as none.
    let claimed = rest[..digits]
        .iter()
        .fold(0i128, |value, digit| {
            value
                .saturating_mul(10)
                .saturating_add(i128::from(digit - b'0'))
        })
        .min(i128::from(u64::MAX));
    let length = bytes.len() - rest.len() + digits + 2;
    Some((if negative { -claimed } else { claimed }, length))
}

/// White space as C's `isspace` knows it, which is what contrib separates by.
fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\n' | 0x0b | 0x0c | b'\r')
}

#[cfg(test)]
mod tests;
