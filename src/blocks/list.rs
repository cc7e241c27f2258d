//! Reading the text of a block list.
//!
//! ```text
//! <<N>>
//! database,tablespace,filenumber,fork,block      (N records, unsigned decimal)
//! ```
//!
//! The file outlives the server that wrote it, may be edited, and may have been
//! cut short by a full disk, so nothing in it is believed: N is only a claim, and
//! a line that is no record costs that line alone. Any white space separates
//! records (so CRLF will do), blanks may stand before a number, and what follows
//! the Nth record is left alone. Memory follows the records that are there.

use std::collections::TryReserveError;
use std::io::{self, Read};

use super::Record;

/// The bytes of the shortest record, `0,0,0,0,0` and what separates it from the
/// next: a file cannot hold more records than its size divided by this.
const SHORTEST_RECORD: usize = 10;

/// How much of the file is looked at in one go.
const CHUNK: usize = 256 * 1024;

/// What a file held.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct BlockList {
    /// The records that parse, in the file's order.
    pub records: Vec<Record>,
    /// The first line that should be a header or a record and is neither,
    /// counted from 1; one past the last line where the file ends too early.
    pub first_bad_line: Option<u64>,
}

/// Why no list could be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("out of memory")]
    OutOfMemory(#[from] TryReserveError),
}

impl BlockList {
    /// Reads the list of a file of `size` bytes, which bounds the memory that
    /// is asked for. Bad lines are no errors: see [`BlockList::first_bad_line`].
    pub fn read(mut input: impl Read, size: u64) -> Result<Self, ReadError> {
        let most = usize::try_from(size).unwrap_or(usize::MAX) / SHORTEST_RECORD + 1;
        let mut chunk = vec![0; CHUNK];
        let mut filled = fill(&mut input, &mut chunk)?;

        let mut parser = Parser::default();
        let mut at = parser.header(&chunk[..filled]);
        loop {
            parser.records(&chunk[at..filled], most)?;
            if parser.ended || filled < CHUNK {
                break;
            }
            filled = fill(&mut input, &mut chunk)?;
            at = 0;
        }
        parser.end(most)?;
        Ok(Self {
            records: parser.records,
            first_bad_line: parser.first_bad_line,
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
#[derive(Debug, Default)]
struct Parser {
    records: Vec<Record>,
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
    /// Reads the header at the start of the file's first `bytes`, and returns
    /// where the records begin.
    fn header(&mut self, bytes: &[u8]) -> usize {
        match parse_header(bytes) {
            Some((claimed, length)) => {
                self.claimed = u64::try_from(claimed).ok();
                if self.claimed.is_none() {
                    self.first_bad_line = Some(1);
                }
                self.ended = self.claimed == Some(0);
                // The number may stand on a line below.
                self.breaks = bytes[..length]
                    .iter()
                    .filter(|&&byte| byte == b'\n')
                    .count() as u64;
                length
            }
            None => {
                self.first_bad_line = Some(1);
                0
            }
        }
    }

    fn records(&mut self, bytes: &[u8], most: usize) -> Result<(), TryReserveError> {
        for &byte in bytes {
            if self.ended {
                break;
            }
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
                        self.record(most)?;
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
        }
        Ok(())
    }

    /// The end of the file.
    fn end(&mut self, most: usize) -> Result<(), TryReserveError> {
        if self.ended {
            return Ok(());
        }
        match self.state {
            // The last record needs no line break after it.
            State::InField if self.field == 4 => self.record(most)?,
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

    fn record(&mut self, most: usize) -> Result<(), TryReserveError> {
        let length = self.records.len();
        if length == self.records.capacity() {
            // Doubling, but never beyond what the file can hold.
            let more = length.max(1024).min(most.saturating_sub(length)).max(1);
            self.records.try_reserve_exact(more)?;
        }
        let [database, tablespace, filenumber, fork, block] = self.fields;
        self.records.push(Record {
            database,
            tablespace,
            filenumber,
            fork,
            block,
        });
        self.saw_one();
        self.state = State::Between;
        Ok(())
    }

    /// The current line is no record; `byte` is what gave it away.
    fn bad_line(&mut self, byte: u8) {
        self.first_bad_line.get_or_insert(self.breaks + 1);
        self.saw_one();
        if byte == b'\n' {
            self.breaks += 1;
            self.state = State::Between;
        } else {
            self.state = State::BadLine;
        }
    }

    fn saw_one(&mut self) {
        self.seen += 1;
        self.ended = self.claimed == Some(self.seen);
    }
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
