//! The list of a server's hot and cold blocks as its standbys fetch it, and as they keep
//! it in a file.
//!
//! ```text
//! pg_prewarm upstream list 1
//! system_identifier 7438492746502938471   of the cluster
//! timeline 1                              of the server that has looked at its buffers
//! time 814000000000000                    when it did so, in µs since 2000-01-01 UTC
//! block_size 8192
//! blocks 12345
//! bytes 23456                             how many bytes follow the header
//! crc32c 0x12345678                       of the header before this line and of these bytes
//! ```
//!
//! An empty line ends the header. After it, each file has its database, tablespace, file
//! number, fork and number of blocks, and then its blocks in ascending order: for each the
//! number of blocks between it and the one before, times 8, plus its usage count. All of
//! them are integers of variable length (LEB128). So a block of a table that is cached
//! completely takes one byte, and a single one of a large table two or three.
//!
//! The list goes over a network and is kept in a file, so nothing in it is trusted: memory
//! is requested only for as many blocks as the bytes can have, and a list that breaks any
//! rule is refused as a whole.

use std::collections::TryReserveError;
use std::io::Write;

use integer_encoding::VarInt;

use crate::list::{BlockList, Entry, FileFork, ListBuilder};
use crate::parser::ReadError;
use crate::sort::sort;
use crate::trailer::UsageCounts;
use crate::{Age, CarriedCounts, Record, UsageCount};

/// The first line.
const FORMAT: &str = "pg_prewarm upstream list 1";

/// The beginning of the last line of the header; eight hexadecimal digits follow.
const CHECKSUM: &str = "crc32c 0x";

/// A header is no longer than this.
const LONGEST_HEADER: usize = 512;

/// How many of a block's bits are its usage count.
const USAGE_COUNT_BITS: u32 = 3;

/// The most bytes that an integer takes.
const LONGEST_INTEGER: usize = 10;

/// The most blocks that a server can cache, which is the maximum of `shared_buffers`.
const MOST_BLOCKS: u64 = 1 << 30;

/// The most bytes that a block takes: the five integers of its file, and its own.
const MOST_BYTES_OF_BLOCK: u64 = 6 * LONGEST_INTEGER as u64;

/// What the header of a list says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Announced {
    /// Where and when it was made.
    pub origin: Origin,
    /// How many bytes the list has, with its header.
    pub length: u64,
}

/// Where and when a list was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The cluster's, which its standbys share.
    pub system_identifier: u64,
    /// The timeline of the server that has looked at its buffers.
    pub timeline: u32,
    /// When it did so: microseconds since 2000-01-01 UTC.
    pub time: i64,
    /// The size of a block in bytes.
    pub block_size: u32,
}

/// Why a list is refused.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    /// It does not begin as a list of this format does.
    #[error("its format is not supported")]
    Format,
    /// The bytes are not as many as the header says.
    #[error("it is incomplete")]
    Incomplete,
    /// The bytes are not those that were written.
    #[error("its checksum does not match")]
    Checksum,
    /// The checksum is right, but a block or a file is not.
    #[error("it has an invalid record")]
    Invalid,
    /// Memory was refused.
    #[error("out of memory")]
    OutOfMemory(#[from] TryReserveError),
}

impl From<ReadError> for UpstreamError {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::OutOfMemory(error) => Self::OutOfMemory(error),
            ReadError::Io(_) | ReadError::TooManyFiles => Self::Invalid,
        }
    }
}

/// Gathers the blocks of a list.
pub struct UpstreamListBuilder(ListBuilder);

impl Default for UpstreamListBuilder {
    fn default() -> Self {
        Self(ListBuilder::new(usize::MAX))
    }
}

impl UpstreamListBuilder {
    /// Adds a cached block.
    ///
    /// # Errors
    /// If memory is refused, or there are too many files.
    pub fn push(&mut self, record: &Record, usage_count: UsageCount) -> Result<(), ReadError> {
        self.0.push(*record, usage_count, Age::Cached)
    }

    /// The bytes of the list. Calls `tick` now and then, since it takes seconds for very
    /// many blocks.
    ///
    /// # Errors
    /// If memory is refused.
    pub fn finish(
        self,
        origin: &Origin,
        tick: &mut dyn FnMut(),
    ) -> Result<Vec<u8>, TryReserveError> {
        let mut list = self.0;
        sort(&mut list.entries, sort_key, tick);
        // A block that has moved to another buffer meanwhile was seen twice. The one with
        // the higher usage count is the last.
        list.entries.dedup_by(|later, kept| {
            let is_same = later.place() == kept.place();
            if is_same {
                *kept = *later;
            }
            is_same
        });
        let mut body = Bytes::default();
        for of_file in list
            .entries
            .chunk_by(|one, other| one.file() == other.file())
        {
            tick();
            let file = list.files[of_file[0].file()];
            for field in [file.database, file.tablespace, file.filenumber, file.fork] {
                body.push(field.into())?;
            }
            body.push(of_file.len() as u64)?;
            let mut next = 0;
            for entry in of_file {
                let block = u64::from(entry.block());
                let usage_count = u64::from(entry.usage_count().get());
                body.push((block - next) << USAGE_COUNT_BITS | usage_count)?;
                next = block + 1;
            }
        }
        let mut bytes = header(origin, list.entries.len() as u64, &body.0)?;
        bytes.try_reserve_exact(body.0.len())?;
        bytes.extend_from_slice(&body.0);
        Ok(bytes)
    }
}

/// By which blocks are sorted: by file and block, and those that are listed twice by their
/// usage counts.
fn sort_key(entry: Entry) -> u64 {
    const { assert!(USAGE_COUNT_BITS <= Entry::PLACE_ZEROS) };
    entry.place() << USAGE_COUNT_BITS | u64::from(entry.usage_count().get())
}

fn header(origin: &Origin, blocks: u64, body: &[u8]) -> Result<Vec<u8>, TryReserveError> {
    let mut header = Vec::new();
    header.try_reserve_exact(LONGEST_HEADER)?;
    let Origin {
        system_identifier,
        timeline,
        time,
        block_size,
    } = origin;
    let bytes = body.len();
    let written = write!(
        header,
        "{FORMAT}\nsystem_identifier {system_identifier}\ntimeline {timeline}\ntime {time}\n\
         block_size {block_size}\nblocks {blocks}\nbytes {bytes}\n"
    );
    written.expect("there is room for a header");
    let checksum = crc32c::crc32c_append(crc32c::crc32c(&header), body);
    write!(header, "{CHECKSUM}{checksum:08x}\n\n").expect("there is room for a header");
    Ok(header)
}

/// Bytes that integers are appended to.
#[derive(Default)]
struct Bytes(Vec<u8>);

impl Bytes {
    fn push(&mut self, number: u64) -> Result<(), TryReserveError> {
        let mut encoded = [0; LONGEST_INTEGER];
        let length = number.encode_var(&mut encoded);
        self.0.try_reserve(length)?;
        self.0.extend_from_slice(&encoded[..length]);
        Ok(())
    }
}

/// A list that was fetched, in memory: eight bytes for each block.
pub struct UpstreamList {
    /// Where and when it was made.
    pub origin: Origin,
    /// The entries are in the order of their places.
    list: ListBuilder,
    hot: u64,
}

impl UpstreamList {
    /// Reads a list.
    ///
    /// # Errors
    /// If it is not exactly what [`UpstreamListBuilder::finish`] returns, or memory is
    /// refused.
    pub fn read(bytes: &[u8]) -> Result<Self, UpstreamError> {
        let Header {
            origin,
            blocks,
            checksum,
            before_checksum,
            body,
        } = Header::read(bytes)?;
        if crc32c::crc32c_append(crc32c::crc32c(before_checksum), body) != checksum {
            return Err(UpstreamError::Checksum);
        }
        // Each block takes a byte at least.
        let blocks = usize::try_from(blocks)
            .ok()
            .filter(|&blocks| blocks <= body.len())
            .ok_or(UpstreamError::Invalid)?;
        let mut list = ListBuilder::new(blocks);
        list.entries.try_reserve_exact(blocks)?;
        let mut hot = 0;
        let mut integers = Integers(body);
        while !integers.0.is_empty() {
            let files = list.files.len();
            let file = FileFork {
                database: integers.next_u32()?,
                tablespace: integers.next_u32()?,
                filenumber: integers.next_u32()?,
                fork: integers.next_u32()?,
            };
            let count = integers.next()?;
            if count == 0 {
                return Err(UpstreamError::Invalid);
            }
            let mut next = 0;
            for _ in 0..count {
                let number = integers.next()?;
                let block = u64::from(next) + (number >> USAGE_COUNT_BITS);
                let usage_count = (number & ((1 << USAGE_COUNT_BITS) - 1)) as u32;
                // The highest block number is none, so the next one can be told.
                let block = u32::try_from(block).map_err(|_| UpstreamError::Invalid)?;
                next = block.checked_add(1).ok_or(UpstreamError::Invalid)?;
                if usage_count > UsageCount::MAX.get() || list.entries.len() == blocks {
                    return Err(UpstreamError::Invalid);
                }
                let usage_count = UsageCount::new(usage_count);
                hot += u64::from(usage_count >= UsageCount::HOT);
                list.push(file.record(block), usage_count, Age::Cached)?;
            }
            // A file that was named before has another index.
            if list.files.len() != files + 1 {
                return Err(UpstreamError::Invalid);
            }
        }
        match list.entries.len() == blocks {
            true => Ok(Self { origin, list, hot }),
            false => Err(UpstreamError::Invalid),
        }
    }

    /// What a list says of itself that begins with these bytes. `None` if its header is not
    /// complete.
    ///
    /// # Errors
    /// If it is no list of this format, or has more than any list can have.
    pub fn announced(beginning: &[u8]) -> Result<Option<Announced>, UpstreamError> {
        let Some(end) = Header::end(beginning) else {
            return match beginning.len() > LONGEST_HEADER {
                true => Err(UpstreamError::Format),
                false => Ok(None),
            };
        };
        let fields = Header::fields(&beginning[..end])?;
        if fields.blocks > MOST_BLOCKS || fields.bytes > fields.blocks * MOST_BYTES_OF_BLOCK {
            return Err(UpstreamError::Invalid);
        }
        Ok(Some(Announced {
            origin: fields.origin,
            length: end as u64 + fields.bytes,
        }))
    }

    /// How many blocks it has.
    pub fn blocks(&self) -> u64 {
        self.list.entries.len() as u64
    }

    /// How many of them are hot: [`UsageCount::HOT`] and higher.
    pub fn hot_blocks(&self) -> u64 {
        self.hot
    }

    /// The usage count of a block. `None` if it is not listed.
    pub fn usage_count(&mut self, record: &Record) -> Option<UsageCount> {
        let file = self.list.find(record)?;
        let place = Entry::place_of(file, record.block);
        let entries = &self.list.entries;
        let index = entries
            .binary_search_by_key(&place, |entry| entry.place())
            .ok()?;
        Some(entries[index].usage_count())
    }

    /// Whether a block is listed as a hot one.
    pub fn is_hot(&mut self, record: &Record) -> bool {
        self.usage_count(record) >= Some(UsageCount::HOT)
    }
}

impl From<UpstreamList> for BlockList {
    fn from(list: UpstreamList) -> Self {
        Self {
            files: list.list.files,
            entries: list.list.entries,
            first_bad_line: None,
            usage_counts: UsageCounts::Saved,
            carried: CarriedCounts::default(),
        }
    }
}

/// A header, and what follows it.
struct Header<'a> {
    origin: Origin,
    blocks: u64,
    checksum: u32,
    before_checksum: &'a [u8],
    body: &'a [u8],
}

/// What the lines of a header say.
struct Fields {
    origin: Origin,
    blocks: u64,
    bytes: u64,
    checksum: u32,
}

impl<'a> Header<'a> {
    fn read(bytes: &'a [u8]) -> Result<Self, UpstreamError> {
        let end = Self::end(bytes).ok_or_else(|| {
            let is_begun = FORMAT
                .as_bytes()
                .starts_with(&bytes[..bytes.len().min(FORMAT.len())]);
            match is_begun && bytes.len() <= LONGEST_HEADER {
                true => UpstreamError::Incomplete,
                false => UpstreamError::Format,
            }
        })?;
        let (header, body) = bytes.split_at(end);
        let fields = Self::fields(header)?;
        if fields.bytes != body.len() as u64 {
            return Err(UpstreamError::Incomplete);
        }
        let last_line = format_args!("{CHECKSUM}{:08x}\n\n", 0).to_string().len();
        Ok(Self {
            origin: fields.origin,
            blocks: fields.blocks,
            checksum: fields.checksum,
            before_checksum: &header[..header.len() - last_line],
            body,
        })
    }

    /// Where the header ends, with its empty line.
    fn end(bytes: &[u8]) -> Option<usize> {
        let beginning = &bytes[..bytes.len().min(LONGEST_HEADER)];
        let at = beginning.windows(2).position(|pair| pair == b"\n\n")?;
        Some(at + 2)
    }

    fn fields(header: &[u8]) -> Result<Fields, UpstreamError> {
        let parse = || {
            let mut lines = str::from_utf8(header).ok()?.lines();
            if lines.next()? != FORMAT {
                return None;
            }
            let mut field = |name| lines.next()?.strip_prefix(name)?.strip_prefix(' ');
            let fields = Fields {
                origin: Origin {
                    system_identifier: field("system_identifier")?.parse().ok()?,
                    timeline: field("timeline")?.parse().ok()?,
                    time: field("time")?.parse().ok()?,
                    block_size: field("block_size")?.parse().ok()?,
                },
                blocks: field("blocks")?.parse().ok()?,
                bytes: field("bytes")?.parse().ok()?,
                checksum: {
                    let digits = lines.next()?.strip_prefix(CHECKSUM)?;
                    let checksum = u32::from_str_radix(digits, 16).ok()?;
                    (format!("{checksum:08x}") == digits).then_some(checksum)?
                },
            };
            (lines.next() == Some("") && lines.next().is_none()).then_some(fields)
        };
        parse().ok_or(UpstreamError::Format)
    }
}

/// Reads integers from the beginning of bytes.
struct Integers<'a>(&'a [u8]);

impl Integers<'_> {
    fn next(&mut self) -> Result<u64, UpstreamError> {
        let (number, length) = u64::decode_var(self.0).ok_or(UpstreamError::Invalid)?;
        self.0 = &self.0[length..];
        Ok(number)
    }

    fn next_u32(&mut self) -> Result<u32, UpstreamError> {
        u32::try_from(self.next()?).map_err(|_| UpstreamError::Invalid)
    }
}

#[cfg(test)]
mod tests;
