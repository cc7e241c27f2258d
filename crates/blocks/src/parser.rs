//! Parsing the text of a block list, into memory or record by record.
//!
//! ```text
//! <<N>>
//! database,tablespace,filenumber,fork,block      (N records, unsigned decimal)
//! ```
//!
//! and, after the records, a trailer with their usage counts (see [`crate::trailer`]).
//!
//! The file outlives the server that wrote it, and may have been edited, or truncated by
//! a full disk. So nothing in it is trusted: N is only a claim, and a bad line costs
//! that line only. Any white space separates records (such as CRLF), and spaces may
//! precede a number. What follows the Nth record is ignored unless it is a valid
//! trailer. Records go to a [`Sink`] as they are read; the parser keeps none.

use std::collections::TryReserveError;
use std::io::{self, Read};

use crate::trailer::{TrailerReader, UsageCounts};
use crate::{CarriedCounts, Record, UsageCount};

/// How many bytes of the file are read at a time.
pub(super) const CHUNK: usize = 256 * 1024;

/// The length of the shortest record, `0,0,0,0,0` and a separator: a file has no more
/// records than its size divided by this.
pub(super) const SHORTEST_RECORD: usize = 10;

/// The length of the longest record without leading zeros, and its line break.
const LONGEST_RECORD: usize = 5 * 11;

/// Why a list could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The file could not be read.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// Memory was refused.
    #[error("out of memory")]
    OutOfMemory(#[from] TryReserveError),
    /// The list names more files than are supported: 134 million.
    #[error("too many relations")]
    TooManyFiles,
}

/// Receives the records of a list, in the file's order.
pub(super) trait Sink {
    /// The header claims so many records.
    fn expect(&mut self, _records: u64) -> Result<(), ReadError> {
        Ok(())
    }

    fn record(&mut self, record: Record) -> Result<(), ReadError>;
}

/// What is known about a list after all of it has been read.
pub(super) struct Summary {
    /// See [`BlockList::first_bad_line`](crate::BlockList::first_bad_line).
    pub first_bad_line: Option<u64>,
    pub usage_counts: UsageCounts,
    /// How many lines were taken for records.
    pub records: u64,
    /// How many of these, the last ones, are carried.
    pub carried: CarriedCounts,
    /// The offset in the file at which the digits of a trailer begin.
    pub digits_at: u64,
}

/// Memory for `size` bytes of the file.
pub(super) fn new_chunk(size: usize) -> Result<Vec<u8>, TryReserveError> {
    let mut chunk = Vec::new();
    chunk.try_reserve_exact(size)?;
    chunk.resize(size, 0);
    Ok(chunk)
}

/// Reads a list to its end, `chunk` bytes at a time. `set_usage_count` gets the number of
/// each record and its usage count, and returns whether there is such a record. Whether
/// the usage counts are valid is known only from the summary.
pub(super) fn read_all<S: Sink>(
    mut input: impl Read,
    chunk: usize,
    sink: S,
    mut set_usage_count: impl FnMut(&mut S, u64, UsageCount) -> bool,
) -> Result<(S, Summary), ReadError> {
    let mut parser = Parser::new(sink);
    let mut trailer = TrailerReader::default();
    let mut checksum = 0;
    let mut list_length = 0;
    let mut chunk = new_chunk(chunk)?;
    loop {
        let filled = fill(&mut input, &mut chunk)?;
        let bytes = &chunk[..filled];
        let at = parser.read(bytes)?;
        list_length += at as u64;
        checksum = crc32c::crc32c_append(checksum, &bytes[..at]);
        trailer.read(&bytes[at..], &mut checksum, |index, digit| {
            UsageCount::from_digit(digit)
                .is_some_and(|count| set_usage_count(&mut parser.sink, index, count))
        })?;
        if filled < chunk.len() || trailer.has_ended() {
            break;
        }
    }
    parser.end()?;
    let digits_at = list_length + trailer.before_digits();
    let (usage_counts, carried) = trailer.finish(checksum, parser.seen);
    let summary = Summary {
        first_bad_line: parser.first_bad_line,
        usage_counts,
        records: parser.seen,
        carried,
        digits_at,
    };
    Ok((parser.sink, summary))
}

/// Fills `buffer`, and returns how many bytes it has: fewer than its length only at the
/// end of the input.
pub(super) fn fill(input: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
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

/// The parser's state. A record may begin in one chunk and end in the next.
pub(super) struct Parser<S> {
    pub sink: S,
    /// The header has been read, if there is one.
    begun: bool,
    /// How many records the header claims. `None` if there is no usable header; then
    /// everything up to a trailer is read.
    claimed: Option<u64>,
    /// How many records and bad lines have been read: `claimed` counts both.
    seen: u64,
    /// How many line breaks have been read.
    breaks: u64,
    first_bad_line: Option<u64>,
    ended: bool,
    state: State,
    /// The fields of the current record, and the index of the current field.
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
    /// Within a bad line, up to its end.
    BadLine,
}

impl<S: Sink> Parser<S> {
    pub fn new(sink: S) -> Self {
        Self {
            sink,
            begun: false,
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

    /// Reads the next bytes of the file, and returns how many of them belong to the list.
    /// The first call must get the complete header.
    pub fn read(&mut self, bytes: &[u8]) -> Result<usize, ReadError> {
        let header = match std::mem::replace(&mut self.begun, true) {
            false => self.header(bytes)?,
            true => 0,
        };
        Ok(header + self.records(&bytes[header..])?)
    }

    /// Whether the following bytes do not belong to the list.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// Reads the header at the start of the file, and returns its length.
    fn header(&mut self, bytes: &[u8]) -> Result<usize, ReadError> {
        let Some((claimed, length)) = parse_header(bytes) else {
            self.first_bad_line = Some(1);
            return Ok(0);
        };
        // There may be line breaks before the number.
        let breaks = bytes[..length].iter().filter(|&&byte| byte == b'\n');
        self.breaks = breaks.count() as u64;
        self.claimed = u64::try_from(claimed).ok();
        match self.claimed {
            None => self.first_bad_line = Some(1),
            Some(0) => self.ended = true,
            Some(claimed) => self.sink.expect(claimed)?,
        }
        Ok(length)
    }

    /// Reads records up to the end of the bytes or of the list, and returns how many
    /// bytes it has read.
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
                // The byte that ends the list may be the first of the trailer.
                at += usize::from(bytes[at] != b'#' || !self.ended);
            }
        }
        Ok(at)
    }

    /// Reads the fields of a record at the start of the bytes, if it has the usual form,
    /// and returns its length. `None` if it has not; then [`Parser::byte`] reads it.
    fn plain_record(&mut self, bytes: &[u8]) -> Option<usize> {
        // Every number of nine digits fits into 32 bits.
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
                // A trailer begins.
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

    /// Ends the list at the end of the file.
    pub fn end(&mut self) -> Result<(), ReadError> {
        if self.ended {
            return Ok(());
        }
        match self.state {
            // The last record need not end with a line break.
            State::InField if self.field == 4 => self.record()?,
            State::InField | State::BeforeField => self.bad_line(0),
            State::Between | State::BadLine => {}
        }
        self.list_ends();
        Ok(())
    }

    /// Ends the list, which may have fewer records than the header claims.
    fn list_ends(&mut self) {
        if self.claimed.is_some_and(|claimed| self.seen < claimed) {
            self.first_bad_line.get_or_insert(self.breaks + 1);
        }
        self.ended = true;
    }

    /// Passes the current record to the sink.
    fn record(&mut self) -> Result<(), ReadError> {
        let [database, tablespace, filenumber, fork, block] = self.fields;
        self.sink.record(Record {
            database,
            tablespace,
            filenumber,
            fork,
            block,
        })?;
        self.state = State::Between;
        self.saw_one();
        Ok(())
    }

    /// Counts the current line as a bad one. `byte` is the first that is invalid.
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
}

/// The number in a header `<<N>>`, and the header's length. `None` if the bytes do not
/// begin with a header.
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
    // No file has as many records as the largest number here.
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

/// Whether C's `isspace` is true for the byte: contrib's module separates records by
/// that.
fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\n' | 0x0b | 0x0c | b'\r')
}
