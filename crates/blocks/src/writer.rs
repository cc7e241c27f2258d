//! Writing a block list, record by record, without holding it in memory.
//!
//! The header comes first, but the number of records in it is known only at the end. So
//! space is left for the header, with as many digits as the expected number has. If the
//! number turns out to have fewer digits, spaces before it fill the rest; every reader
//! skips them. Only the usage count of each record, one byte, is kept in memory until
//! the trailer is written.

use std::collections::TryReserveError;
use std::io::{self, Seek, SeekFrom, Write};

use crate::trailer::{CARRIED, CHECKSUM, DIGITS_PER_LINE, FIRST_LINES};
use crate::{Age, CarriedCounts, Record, UsageCount};

/// A list that is being written.
pub struct ListWriter<W: Write + Seek> {
    out: ChecksumWriter<W>,
    /// How many digits the header has space for.
    width: usize,
    /// The usage count of each record so far, as a digit.
    usage_counts: Vec<u8>,
    carried: CarriedCounts,
}

/// Why a list was not written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The file could not be written to.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// Memory was refused.
    #[error("out of memory")]
    OutOfMemory(#[from] TryReserveError),
    /// There are more records than the header has space for. Begin again and expect
    /// more.
    #[error("more blocks than expected")]
    TooMany,
}

impl<W: Write + Seek> ListWriter<W> {
    /// Begins a list of about `expected` records at the start of `out`.
    ///
    /// # Errors
    /// If `out` fails, or memory is refused.
    pub fn begin(out: W, expected: usize) -> Result<Self, WriteError> {
        let mut usage_counts = Vec::new();
        usage_counts.try_reserve_exact(expected)?;
        let mut writer = Self {
            out: ChecksumWriter::new(out)?,
            width: expected.max(1).ilog10() as usize + 1,
            usage_counts,
            carried: CarriedCounts::default(),
        };
        let header = writer.header()?;
        writer.out.write_all(&header)?;
        // The header will change, so the checksum begins after it.
        writer.out.flush()?;
        writer.out.restart();
        Ok(writer)
    }

    /// Appends the record of a cached block.
    ///
    /// # Errors
    /// If `out` fails, or memory is refused.
    ///
    /// # Panics
    /// If a record that is carried was appended before.
    pub fn push(&mut self, record: &Record, usage_count: UsageCount) -> Result<(), WriteError> {
        assert!(self.carried.total() == 0, "out of order");
        self.append(record, usage_count)
    }

    fn append(&mut self, record: &Record, usage_count: UsageCount) -> Result<(), WriteError> {
        let fields = [
            record.database,
            record.tablespace,
            record.filenumber,
            record.fork,
            record.block,
        ];
        // Five numbers of at most ten digits, each followed by a separator.
        let mut line = [0; 5 * 11];
        let mut length = 0;
        let mut digits = itoa::Buffer::new();
        for (index, field) in fields.into_iter().enumerate() {
            let text = digits.format(field).as_bytes();
            line[length..length + text.len()].copy_from_slice(text);
            length += text.len();
            line[length] = if index < 4 { b',' } else { b'\n' };
            length += 1;
        }
        self.usage_counts.try_reserve(1)?;
        self.usage_counts.push(usage_count.digit());
        Ok(self.out.write_all(&line[..length])?)
    }

    /// Appends a record that is carried. Such records come last, the youngest first.
    ///
    /// # Errors
    /// If `out` fails, or memory is refused.
    ///
    /// # Panics
    /// If an older one was appended before.
    pub fn push_carried(
        &mut self,
        record: &Record,
        usage_count: UsageCount,
        age: Age,
    ) -> Result<(), WriteError> {
        self.append(record, usage_count)?;
        match age {
            Age::Twice => self.carried.twice += 1,
            _ => {
                assert!(age == Age::Once && self.carried.twice == 0, "out of order");
                self.carried.once += 1;
            }
        }
        Ok(())
    }

    /// Writes the rest of the records, the trailer and the header. Returns the number of
    /// records, and `out` for the caller to close.
    ///
    /// # Errors
    /// If `out` fails, memory is refused, or the number does not fit into the header.
    pub fn finish(mut self) -> Result<(u64, W), WriteError> {
        let header = self.header()?;
        let space = self.width + "<<>>\n".len();
        if header.len() > space {
            return Err(WriteError::TooMany);
        }
        // An empty list has no trailer.
        if !self.usage_counts.is_empty() {
            for line in FIRST_LINES {
                writeln!(self.out, "{line}")?;
            }
            for digits in self.usage_counts.chunks(DIGITS_PER_LINE) {
                self.out.write_all(digits)?;
                self.out.write_all(b"\n")?;
            }
            // A list that carries nothing is as versions without this line wrote it.
            if self.carried.total() > 0 {
                let CarriedCounts { once, twice } = self.carried;
                writeln!(self.out, "{CARRIED}{once} {twice}")?;
            }
            self.out.flush()?;
            let checksum = self.out.checksum_after(&header);
            writeln!(self.out, "{CHECKSUM}{checksum:08x}")?;
        }
        self.out.flush()?;
        let mut out = self.out.out;
        out.seek(SeekFrom::Start(0))?;
        out.write_all(&header)?;
        Ok((self.usage_counts.len() as u64, out))
    }

    fn header(&self) -> Result<Vec<u8>, WriteError> {
        let (number, width) = (self.usage_counts.len(), self.width);
        let mut header = Vec::new();
        header.try_reserve_exact(MOST_DIGITS + "<<>>\n".len())?;
        writeln!(header, "<<{number:>width$}>>")?;
        Ok(header)
    }
}

/// How many digits the number of records can have.
const MOST_DIGITS: usize = usize::MAX.ilog10() as usize + 1;

/// How many bytes are written at a time.
const BUFFER: usize = 256 * 1024;

/// Buffers what is written to `out`, and computes its CRC-32C.
struct ChecksumWriter<W> {
    out: W,
    /// Has a capacity of [`BUFFER`] bytes. [`io::BufWriter`] would do the same, but
    /// aborts if it gets no memory.
    buffer: Vec<u8>,
    /// The checksum and the length of what has been written to `out`.
    checksum: u32,
    length: usize,
}

impl<W> ChecksumWriter<W> {
    fn new(out: W) -> Result<Self, TryReserveError> {
        let mut buffer = Vec::new();
        buffer.try_reserve_exact(BUFFER)?;
        Ok(Self {
            out,
            buffer,
            checksum: 0,
            length: 0,
        })
    }

    /// Starts the checksum here. The buffer must be empty.
    fn restart(&mut self) {
        self.checksum = 0;
        self.length = 0;
    }

    /// The checksum of `bytes` followed by what has been written to `out`.
    fn checksum_after(&self, bytes: &[u8]) -> u32 {
        crc32c::crc32c_combine(crc32c::crc32c(bytes), self.checksum, self.length)
    }
}

impl<W: Write> Write for ChecksumWriter<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.buffer.len() == BUFFER {
            self.flush()?;
        }
        let taken = bytes.len().min(BUFFER - self.buffer.len());
        self.buffer.extend_from_slice(&bytes[..taken]);
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.write_all(&self.buffer)?;
        self.checksum = crc32c::crc32c_append(self.checksum, &self.buffer);
        self.length += self.buffer.len();
        self.buffer.clear();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;
    use crate::{BlockList, UsageCounts};

    fn record(block: u32) -> Record {
        Record {
            database: u32::MAX,
            tablespace: 1663,
            filenumber: 0,
            fork: 0,
            block,
        }
    }

    fn write(count: u32, expected: usize) -> Result<String, WriteError> {
        let mut writer = ListWriter::begin(Cursor::new(Vec::new()), expected)?;
        for block in 0..count {
            writer.push(&record(block), UsageCount::new(block % 6))?;
        }
        let (written, out) = writer.finish()?;
        assert_eq!(written, u64::from(count));
        Ok(String::from_utf8(out.into_inner()).unwrap())
    }

    #[test]
    fn an_empty_list_is_a_header() {
        assert_eq!(write(0, 0).unwrap(), "<<0>>\n");
    }

    #[test]
    fn a_list_is_written_in_the_format_that_contrib_reads() {
        assert_eq!(
            write(2, 2).unwrap(),
            "<<2>>\n4294967295,1663,0,0,0\n4294967295,1663,0,0,1\n\
             # pg_prewarm 2.0\n# usage counts\n01\n# crc32c 0x5cc8f833\n"
        );
    }

    #[test]
    fn a_list_says_how_many_records_it_carries() {
        let mut writer = ListWriter::begin(Cursor::new(Vec::new()), 4).unwrap();
        writer.push(&record(7), UsageCount::new(5)).unwrap();
        for (block, age) in [(8, Age::Once), (9, Age::Once), (6, Age::Twice)] {
            let pushed = writer.push_carried(&record(block), UsageCount::ONCE, age);
            pushed.unwrap();
        }
        let text = String::from_utf8(writer.finish().unwrap().1.into_inner()).unwrap();
        let (before, after) = text.split_at(text.find("# pg").unwrap());
        assert!(before.ends_with(
            ",0,7
4294967295,1663,0,0,8
4294967295,1663,0,0,9
4294967295,1663,0,0,6
"
        ));
        assert!(after.starts_with(
            "# pg_prewarm 2.0
# usage counts
5111
# carried 2 1
# crc32c 0x"
        ));
    }

    #[test]
    fn the_checksum_is_that_of_all_bytes_before_its_line() {
        let text = write(1000, 1000).unwrap();
        let (before, after) = text.split_at(text.find(CHECKSUM).unwrap());
        let checksum = u32::from_str_radix(after.trim_end().strip_prefix(CHECKSUM).unwrap(), 16);
        assert_eq!(checksum, Ok(crc32c::crc32c(before.as_bytes())));
        assert!(text.lines().all(|line| line.len() <= DIGITS_PER_LINE));
    }

    #[test]
    fn a_header_that_is_too_long_is_filled_with_spaces() {
        let text = write(9, 100).unwrap();
        assert!(text.starts_with("<<  9>>\n"), "{text}");
        let list = BlockList::read(text.as_bytes(), text.len() as u64).unwrap();
        assert_eq!((list.entries.len(), list.first_bad_line), (9, None));
        assert_eq!(list.usage_counts, UsageCounts::Saved);
    }

    #[test]
    fn a_header_that_is_too_short_is_an_error() {
        assert!(matches!(write(10, 9), Err(WriteError::TooMany)));
        assert!(write(10, 10).is_ok());
        assert!(matches!(write(1000, 999), Err(WriteError::TooMany)));
        assert!(write(999, 100).is_ok());
    }
}
