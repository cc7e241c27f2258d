//! Reading a list of any bytes, which come in pieces of any size.

use std::collections::HashSet;
use std::io::{Cursor, Read};

use pg_prewarm_blocks::{
    Age, BlockList, CarriedBuilder, CarriedCounts, ListReader, ListWriter, Record, UsageCount,
    UsageCounts,
};

use super::memory;

/// How much memory reading may take: so much for each byte of the list, and so much for
/// the chunk and its records.
const MEMORY_FOR_A_BYTE: usize = 16;
const MEMORY_BESIDE: usize = 64 * 1024;

/// Takes the first two bytes as the sizes of chunks and of reads, and the others as a
/// list. If the size of reads is odd, the checksum of the list is corrected, since the
/// fuzzer would never find it.
pub fn check(input: &[u8]) {
    let [chunk, step, text @ ..] = input else {
        return;
    };
    let mut text = text.to_vec();
    if step % 2 == 1 {
        correct_checksum(&mut text);
    }
    let text = &text[..];
    let whole = read_at_once(text);

    // Neither other pieces nor a wrong file size change the result. Reading takes little
    // memory.
    let chunk = header_length(text).max(1 + usize::from(*chunk));
    let piecewise = || Pieces::of(text, *step);
    let limit = MEMORY_FOR_A_BYTE * text.len() + MEMORY_BESIDE;
    for size in [0, text.len()] {
        let list = memory::within(limit, || {
            BlockList::read_in_chunks(piecewise(), size as u64, chunk).unwrap()
        });
        assert_eq!(list.files, whole.files);
        assert_eq!(list.entries, whole.entries);
        assert_eq!(list.first_bad_line, whole.first_bad_line);
        assert_eq!(list.usage_counts, whole.usage_counts);
        assert_eq!(list.carried, whole.carried);
    }
    check_carried(&whole);

    // Records that are read one by one are the same.
    let from = |at| Pieces::of(&text[at as usize..], *step);
    memory::within(MEMORY_BESIDE, || {
        let mut reader = ListReader::in_chunks(from, chunk).unwrap();
        assert_eq!(reader.first_bad_line(), whole.first_bad_line);
        assert_eq!(reader.carried(), whole.carried);
        for ((record, usage_count), entry) in whole.records().zip(&whole.entries) {
            let expected = (record, usage_count, entry.age());
            assert_eq!(reader.next_aged().unwrap().unwrap(), expected);
        }
        assert!(reader.next().is_none());
    });

    // A list that is written and read again is the same.
    let records: Vec<_> = whole.records().collect();
    let copy = write(&records);
    let again = read_at_once(&copy);
    assert!(again.records().eq(records));
    assert_eq!(again.first_bad_line, None);
    let usage_counts = match again.entries.is_empty() {
        true => UsageCounts::Missing,
        false => UsageCounts::Saved,
    };
    assert_eq!(again.usage_counts, usage_counts);
    carry(text, &whole);
}

/// The last records are carried, the youngest first, and no more than there are.
fn check_carried(list: &BlockList) {
    let CarriedCounts { once, twice } = list.carried;
    let of_age = |age| {
        list.entries
            .iter()
            .filter(|entry| entry.age() == age)
            .count() as u64
    };
    assert_eq!((of_age(Age::Once), of_age(Age::Twice)), (once, twice));
    assert!(list.entries.is_sorted_by_key(|entry| entry.age()));
    assert!(list.carried.total() == 0 || list.usage_counts == UsageCounts::Saved);
}

/// Carries what the list carries, at most half of it, while every third block is cached.
fn carry(text: &[u8], list: &BlockList) {
    let mut builder = CarriedBuilder::new(false);
    let reader = ListReader::new(|at| &text[at as usize..]).unwrap();
    builder.add_list(reader, true).unwrap();
    let most = list.carried.total() / 2;
    let mut carried = builder.finish(most);
    let cached: Vec<_> = list.records().step_by(3).collect();
    let cached_blocks: HashSet<_> = cached.iter().map(|(record, _)| *record).collect();
    for (record, _) in &cached {
        carried.found(record);
    }
    let mut writer = ListWriter::begin(Cursor::new(Vec::new()), list.entries.len()).unwrap();
    for (record, usage_count) in &cached {
        writer.push(record, *usage_count).unwrap();
    }
    for (record, usage_count, age) in carried.records() {
        assert!(!cached_blocks.contains(&record));
        writer.push_carried(&record, usage_count, age).unwrap();
    }
    let next = read_at_once(&writer.finish().unwrap().1.into_inner());
    assert_eq!(next.carried.total(), carried.left());
    assert!(carried.left() <= most);
    check_carried(&next);
}

/// A list of these records.
pub fn write(records: &[(Record, UsageCount)]) -> Vec<u8> {
    let mut writer = ListWriter::begin(Cursor::new(Vec::new()), records.len()).unwrap();
    for (record, usage_count) in records {
        writer.push(record, *usage_count).unwrap();
    }
    writer.finish().unwrap().1.into_inner()
}

/// Reads a text as one chunk.
pub fn read_at_once(text: &[u8]) -> BlockList {
    BlockList::read_in_chunks(text, text.len() as u64, text.len() + 1).unwrap()
}

fn correct_checksum(text: &mut [u8]) {
    let name = b"# crc32c 0x";
    let Some(line) = text.windows(name.len()).position(|bytes| bytes == name) else {
        return;
    };
    let digits = format!("{:08x}", crc32c::crc32c(&text[..line]));
    let rest = &mut text[line + name.len()..];
    let length = digits.len().min(rest.len());
    rest[..length].copy_from_slice(&digits.as_bytes()[..length]);
}

/// The length of the header, if there is one: it must fit into a chunk.
fn header_length(text: &[u8]) -> usize {
    let end = text.windows(2).position(|two| two == b">>");
    end.map_or(0, |end| end + 2)
}

/// An input that returns pieces of different sizes, of at most `most` bytes.
struct Pieces<'a> {
    bytes: &'a [u8],
    step: usize,
    most: usize,
}

impl<'a> Pieces<'a> {
    fn of(bytes: &'a [u8], most: u8) -> Self {
        Self {
            bytes,
            step: 0,
            most: usize::from(most) + 1,
        }
    }
}

impl Read for Pieces<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.step = self.step % self.most + 1;
        let length = self.step.min(buffer.len()).min(self.bytes.len());
        let (piece, rest) = self.bytes.split_at(length);
        buffer[..length].copy_from_slice(piece);
        self.bytes = rest;
        Ok(length)
    }
}
