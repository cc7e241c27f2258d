//! Writing a block list, record by record, without holding it in memory.
//!
//! How many records there will be is known only at the end, and the header that
//! says so comes first. Room for it is left, wide enough for the number that is
//! expected; should there be fewer digits, blanks before the number fill it,
//! which every reader skips.

use std::io::{self, Seek, SeekFrom, Write};

use super::Record;

/// A list that is being written.
pub struct ListWriter<W: Write + Seek> {
    out: io::BufWriter<W>,
    /// Digits that the header has room for.
    width: usize,
    written: u64,
}

/// Why a list was not written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    #[error(transparent)]
    Io(#[from] io::Error),
    /// There are more records than the header has room for: begin again,
    /// expecting more.
    #[error("more blocks than expected")]
    TooMany,
}

impl<W: Write + Seek> ListWriter<W> {
    /// Begins a list of about `expected` records at the start of `out`.
    pub fn begin(out: W, expected: u64) -> io::Result<Self> {
        let width = expected.max(1).ilog10() as usize + 1;
        let mut writer = Self {
            out: io::BufWriter::with_capacity(256 * 1024, out),
            width,
            written: 0,
        };
        writer.header()?;
        Ok(writer)
    }

    /// Appends a record.
    pub fn push(&mut self, record: &Record) -> io::Result<()> {
        let fields = [
            record.database,
            record.tablespace,
            record.filenumber,
            record.fork,
            record.block,
        ];
        // Five numbers of at most ten digits, each with what follows it.
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
        self.written += 1;
        self.out.write_all(&line[..length])
    }

    /// Writes the header, and all that is still held back. Returns the number of
    /// records, and what was written to, for the caller to close.
    pub fn finish(mut self) -> Result<(u64, W), WriteError> {
        if self.written > 0 && self.written.ilog10() as usize >= self.width {
            return Err(WriteError::TooMany);
        }
        self.out.seek(SeekFrom::Start(0))?;
        self.header()?;
        let written = self.written;
        let out = self
            .out
            .into_inner()
            .map_err(io::IntoInnerError::into_error)?;
        Ok((written, out))
    }

    fn header(&mut self) -> io::Result<()> {
        writeln!(self.out, "<<{:>width$}>>", self.written, width = self.width)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::super::list::BlockList;
    use super::*;

    fn record(block: u32) -> Record {
        Record {
            database: u32::MAX,
            tablespace: 1663,
            filenumber: 0,
            fork: 0,
            block,
        }
    }

    fn write(count: u32, expected: u64) -> Result<String, WriteError> {
        let mut writer = ListWriter::begin(Cursor::new(Vec::new()), expected)?;
        for block in 0..count {
            writer.push(&record(block))?;
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
            "<<2>>\n4294967295,1663,0,0,0\n4294967295,1663,0,0,1\n"
        );
    }

    #[test]
    fn a_header_with_room_to_spare_is_filled_with_blanks() {
        let text = write(9, 100).unwrap();
        assert!(text.starts_with("<<  9>>\n"), "{text}");
        let list = BlockList::read(text.as_bytes(), text.len() as u64).unwrap();
        assert_eq!((list.records.len(), list.first_bad_line), (9, None));
    }

    #[test]
    fn a_header_without_room_is_an_error_and_not_a_wrong_number() {
        assert!(matches!(write(10, 9), Err(WriteError::TooMany)));
        assert!(write(10, 10).is_ok());
        assert!(matches!(write(1000, 999), Err(WriteError::TooMany)));
        assert!(write(999, 100).is_ok());
    }
}
