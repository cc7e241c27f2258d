use std::cell::Cell;
use std::{io, iter};

use proptest::prelude::*;

use super::*;
use crate::trailer::{INVALID_LINE, MISMATCH, TOO_MANY_CARRIED};
use crate::{CarriedBuilder, ListReader, ListWriter};

fn read(text: impl AsRef<[u8]>) -> BlockList {
    let text = text.as_ref();
    read_in_steps(text, text.len() + 1)
}

/// Reads a text, of which the input returns a few bytes at a time, as a list and record
/// by record, and checks that both give the same.
fn read_in_steps(text: &[u8], step: usize) -> BlockList {
    let list = BlockList::read(Trickle(text, step), text.len() as u64).unwrap();
    let reader =
        ListReader::new(|at| Trickle(&text[usize::try_from(at).unwrap()..], step)).unwrap();
    assert_eq!(reader.first_bad_line(), list.first_bad_line);
    assert_eq!(reader.carried(), list.carried);
    let mut reader = reader;
    let one_by_one: Vec<_> = iter::from_fn(|| reader.next_aged())
        .map(|record| record.unwrap())
        .collect();
    let ages = list.entries.iter().map(|entry| entry.age());
    let at_once = list.records().zip(ages);
    let at_once = at_once.map(|((record, usage_count), age)| (record, usage_count, age));
    assert!(one_by_one.into_iter().eq(at_once));
    list
}

/// The block number of each record, by which the cases below identify them, and the first
/// bad line.
fn outcome(text: impl AsRef<[u8]>) -> (Vec<u32>, Option<u64>) {
    let list = read(text);
    let blocks = list.entries.iter().map(|entry| entry.block()).collect();
    (blocks, list.first_bad_line)
}

#[test]
fn a_list_is_read_as_it_was_written() {
    let list = read("<<2>>\n5,1663,16384,0,7\n0,1664,1262,2,4294967295\n");
    let records: Vec<_> = list.records().map(|(record, _)| record).collect();
    assert_eq!(
        records,
        [
            Record {
                database: 5,
                tablespace: 1663,
                filenumber: 16384,
                fork: 0,
                block: 7
            },
            Record {
                database: 0,
                tablespace: 1664,
                filenumber: 1262,
                fork: 2,
                block: u32::MAX
            },
        ]
    );
    assert_eq!(list.first_bad_line, None);
}

#[test]
fn every_variant_of_a_good_file_is_read_completely() {
    for (text, blocks) in [
        ("<<0>>\n", vec![]),
        ("<<0>>", vec![]),
        ("<<1>>\n1,2,3,0,4", vec![4]),
        ("<<1>>\n1,2,3,0,4\n", vec![4]),
        ("<<1>>\r\n1,2,3,0,4\r\n", vec![4]),
        ("<<2>>\r\n1,2,3,0,4\r\n1,2,3,0,5\r\n", vec![4, 5]),
        ("<<2>>\n\n\n1,2,3,0,4\n\n1,2,3,0,5\n\n", vec![4, 5]),
        ("<<2>> 1,2,3,0,4 1,2,3,0,5", vec![4, 5]),
        ("<<2>>1,2,3,0,4\t1,2,3,0,5", vec![4, 5]),
        ("<<2>>\n  1,2,3,0,4  \n\t1,2,3,0,5\n", vec![4, 5]),
        ("<<1>>\n1, 2, 3, 0, 4\n", vec![4]),
        ("<<   1>>\n1,2,3,0,4\n", vec![4]),
        ("<<+1>>\n1,2,3,0,4\n", vec![4]),
        ("<<0001>>\n1,2,3,0,4\n", vec![4]),
        ("<<1>>\n0001,2,3,0,0004\n", vec![4]),
        ("<<1>>    \n1,2,3,0,4\n", vec![4]),
        ("<<1>>\n1,2,3,99,4\n", vec![4]),
        // What follows the Nth record is ignored.
        ("<<1>>\n1,2,3,0,4\n1,2,3,0,5\n", vec![4]),
        ("<<1>>\n1,2,3,0,4\ngarbage\n", vec![4]),
        (
            "<<1>>\n1,2,3,0,4\n# pg_prewarm 2.0\n# usage counts\n5\n",
            vec![4],
        ),
        ("<<0>>\n1,2,3,0,4\n", vec![]),
        ("<<-0>>\n1,2,3,0,4\n", vec![]),
    ] {
        assert_eq!(outcome(text), (blocks, None), "{text:?}");
    }
}

#[test]
fn a_bad_line_costs_only_that_line() {
    for (text, blocks, line) in [
        ("<<3>>\n1,2,3,0,4\nbad\n1,2,3,0,6\n", vec![4, 6], 3),
        ("<<3>>\nbad\n1,2,3,0,5\n1,2,3,0,6\n", vec![5, 6], 2),
        ("<<3>>\n1,2,3,0,4\n1,2,3,0,5\nbad\n", vec![4, 5], 4),
        ("<<3>>\n1,2,3,0,4\n1,2,3,0\n1,2,3,0,6\n", vec![4, 6], 3),
        ("<<3>>\n1,2,3,0,4\n1,2,3,0,\n1,2,3,0,6\n", vec![4, 6], 3),
        ("<<3>>\n1,2,3,0,4\n1,,3,0,5\n1,2,3,0,6\n", vec![4, 6], 3),
        ("<<3>>\n1,2,3,0,4\n,2,3,0,5\n1,2,3,0,6\n", vec![4, 6], 3),
        ("<<3>>\n1,2,3,0,4\n1,2,3,0,5,\n1,2,3,0,6\n", vec![4, 6], 3),
        ("<<3>>\n1,2,3,0,4\n1,2,3,0,5,9\n1,2,3,0,6\n", vec![4, 6], 3),
        ("<<3>>\n1,2,3,0,4\n1,2,3,0,5x\n1,2,3,0,6\n", vec![4, 6], 3),
        ("<<3>>\n1,2,3,0,4\n1,2,3,0,-5\n1,2,3,0,6\n", vec![4, 6], 3),
        ("<<3>>\n1,2,3,0,4\n-1,2,3,0,5\n1,2,3,0,6\n", vec![4, 6], 3),
        ("<<3>>\n1,2,3,0,4\n+1,2,3,0,5\n1,2,3,0,6\n", vec![4, 6], 3),
        ("<<3>>\n1,2,3,0,4\n1,2,3,0x0,5\n1,2,3,0,6\n", vec![4, 6], 3),
        ("<<3>>\n1,2,3,0,4\n1;2;3;0;5\n1,2,3,0,6\n", vec![4, 6], 3),
        ("<<3>>\n1,2,3,0,4\n1 2 3 0 5\n1,2,3,0,6\n", vec![4, 6], 3),
        ("<<3>>\n1,2,3,0,4\n1,2 ,3,0,5\n1,2,3,0,6\n", vec![4, 6], 3),
        ("<<3>>\n1,2,3,0,4\n1.0,2,3,0,5\n1,2,3,0,6\n", vec![4, 6], 3),
        (
            "<<3>>\n1,2,3,0,4\n1,2,3,0,4294967296\n1,2,3,0,6\n",
            vec![4, 6],
            3,
        ),
        (
            "<<3>>\n1,2,3,0,4\n99999999999999999999,2,3,0,5\n1,2,3,0,6\n",
            vec![4, 6],
            3,
        ),
        ("<<3>>\n1,2,3,0,4\n<<3>>\n1,2,3,0,6\n", vec![4, 6], 3),
        ("<<3>>\n1,2,3,0,4\n\0\0\0\0\n1,2,3,0,6\n", vec![4, 6], 3),
        ("<<3>>\n1,2,3,0,4\n1,2,\n3,0,5\n", vec![4], 3),
        (
            "<<4>>\n\n1,2,3,0,4\n\nbad\nworse\n1,2,3,0,6\n",
            vec![4, 6],
            5,
        ),
        // The list ends early: the bad line is the first that is missing.
        ("<<3>>\n1,2,3,0,4\n", vec![4], 3),
        ("<<3>>\n1,2,3,0,4", vec![4], 2),
        ("<<3>>\n1,2,3,0,4\n1,2,3", vec![4], 3),
        ("<<3>>\n1,2,3,0,4\n1,2,3,", vec![4], 3),
        ("<<3>>\n1,2,3,0,4\n# pg_prewarm 2.0\n", vec![4], 3),
        ("<<2147483647>>\n1,2,3,0,4\n", vec![4], 3),
        ("<<99999999999>>\n1,2,3,0,4\n", vec![4], 3),
        (
            "<<340282366920938463463374607431768211456>>\n1,2,3,0,4\n",
            vec![4],
            3,
        ),
        ("<<1>>\n", vec![], 2),
        ("<<1>>", vec![], 1),
        // No usable header: everything up to a trailer is read.
        ("<<-5>>\n1,2,3,0,4\n1,2,3,0,5\n", vec![4, 5], 1),
        ("<<-5>>\n1,2,3,0,4\n# usage counts\n1,2,3,0,5\n", vec![4], 1),
        ("", vec![], 1),
        ("\n", vec![], 1),
        ("#\n", vec![], 1),
        ("<<>>\n1,2,3,0,4\n", vec![4], 1),
        ("<<x>>\n1,2,3,0,4\n", vec![4], 1),
        ("<<1>\n1,2,3,0,4\n", vec![4], 1),
        ("<1>\n1,2,3,0,4\n", vec![4], 1),
        ("<<1.5>>\n1,2,3,0,4\n", vec![4], 1),
        ("<<1 >>\n1,2,3,0,4\n", vec![4], 1),
        (" <<1>>\n1,2,3,0,4\n", vec![4], 1),
        ("\u{feff}<<1>>\n1,2,3,0,4\n", vec![4], 1),
        ("1,2,3,0,4\n1,2,3,0,5\n", vec![4, 5], 1),
        ("hello\nworld\n", vec![], 1),
    ] {
        assert_eq!(outcome(text), (blocks, Some(line)), "{text:?}");
    }
}

#[test]
fn a_line_longer_than_a_chunk_is_one_bad_line() {
    let mut text = b"<<2>>\n".to_vec();
    text.extend(std::iter::repeat_n(b'x', 3 * CHUNK));
    text.extend(b"\n1,2,3,0,4\n");
    assert_eq!(outcome(text), (vec![4], Some(2)));
}

#[test]
fn the_number_in_the_header_does_not_decide_how_much_memory_is_requested() {
    for claim in ["2147483647", "18446744073709551615", "-5"] {
        let list = read(format!("<<{claim}>>\n1,2,3,0,4\n"));
        assert!(list.entries.capacity() <= 8, "{claim}");
    }
}

struct Broken;

impl Read for Broken {
    fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
        Err(io::Error::from_raw_os_error(5))
    }
}

#[test]
fn an_error_of_the_input_is_passed_on() {
    let input = || b"<<2>>\n1,2,3,0,4\n".chain(Broken);
    let list = BlockList::read(input(), 100);
    assert!(matches!(list, Err(ReadError::Io(_))));
    let reader = ListReader::new(|_| input());
    assert!(matches!(reader, Err(ReadError::Io(_))));
}

#[test]
fn an_error_while_the_file_is_read_again_is_returned_in_place_of_a_record() {
    let text = write(&records_with(&[5, 0]));
    // The file is opened to check it, then for the records and for their usage counts.
    for broken in [1, 2] {
        let opened = Cell::new(0);
        let from = |at| -> Box<dyn Read> {
            match opened.replace(opened.get() + 1) {
                number if number == broken => Box::new(Broken),
                _ => Box::new(&text[usize::try_from(at).unwrap()..]),
            }
        };
        let mut reader = ListReader::new(from).unwrap();
        assert!(matches!(reader.next(), Some(Err(ReadError::Io(_)))));
    }
}

#[test]
fn a_list_of_many_chunks_is_read_completely() {
    let usage_counts: Vec<_> = (0..100_000).map(|record| record % 6).collect();
    let records = records_with(&usage_counts);
    let text = write(&records);
    assert!(text.len() > 3 * CHUNK);
    let list = read(text);
    assert_eq!(list.usage_counts, UsageCounts::Saved);
    assert!(list.records().eq(records));
}

/// An input that returns a few bytes at a time.
struct Trickle<'a>(&'a [u8], usize);

impl Read for Trickle<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.0.len().min(self.1).min(buffer.len());
        buffer[..n].copy_from_slice(&self.0[..n]);
        self.0 = &self.0[n..];
        Ok(n)
    }
}

#[test]
fn a_valid_trailer_gives_each_record_its_usage_count() {
    let usage_counts = [5, 0, 3, 1];
    let text = String::from_utf8(write(&records_with(&usage_counts))).unwrap();
    let list = read(&text);
    assert_eq!(list.usage_counts, UsageCounts::Saved);
    let read_usage_counts: Vec<_> = list
        .records()
        .map(|(_, usage_count)| usage_count.get())
        .collect();
    assert_eq!(read_usage_counts, usage_counts);
    // The last line break may be missing.
    assert_eq!(read(text.trim_end()).usage_counts, UsageCounts::Saved);
}

/// A list whose last two records are carried.
fn list_with_carried() -> String {
    let records = records_with(&[5, 0, 3, 1]);
    let mut writer = ListWriter::begin(io::Cursor::new(Vec::new()), 4).unwrap();
    let ages = [Age::Cached, Age::Cached, Age::Once, Age::Twice];
    for ((record, usage_count), age) in records.iter().zip(ages) {
        match age {
            Age::Cached => writer.push(record, *usage_count).unwrap(),
            age => writer.push_carried(record, *usage_count, age).unwrap(),
        }
    }
    String::from_utf8(writer.finish().unwrap().1.into_inner()).unwrap()
}

fn ages(list: &BlockList) -> Vec<Age> {
    list.entries.iter().map(|entry| entry.age()).collect()
}

#[test]
fn records_that_are_carried_are_told_from_the_others() {
    let text = list_with_carried();
    for step in 1..20 {
        let list = read_in_steps(text.as_bytes(), step);
        assert_eq!(list.usage_counts, UsageCounts::Saved);
        assert_eq!((list.carried.once, list.carried.twice), (1, 1));
        assert_eq!(
            ages(&list),
            [Age::Cached, Age::Cached, Age::Once, Age::Twice]
        );
    }
    // All records may be carried.
    let all = sign(&text.replace("# carried 1 1", "# carried 1 3"));
    assert_eq!(
        ages(&read(all)),
        [Age::Once, Age::Twice, Age::Twice, Age::Twice]
    );
}

#[test]
fn a_list_whose_trailer_does_not_fit_carries_nothing() {
    let text = list_with_carried();
    let invalid = INVALID_LINE;
    for (line, reason) in [
        ("# carried 1 4", TOO_MANY_CARRIED),
        ("# carried 18446744073709551615 1", TOO_MANY_CARRIED),
        ("# carried 18446744073709551616 1", invalid),
        ("# carried 1", invalid),
        ("# carried 1 1 1", invalid),
        ("# carried 1  1", invalid),
        ("# carried -1 1", invalid),
        ("# carried +1 1", invalid),
        ("# carried 1 ", invalid),
        ("# carried x y", invalid),
        ("# carried 1 1\n# carried 1 1", invalid),
        ("# carried 1 1\n5", invalid),
        ("# carrier 1 1", MISMATCH),
    ] {
        let list = read(sign(&text.replace("# carried 1 1", line)));
        assert_eq!(list.usage_counts, UsageCounts::Ignored(reason), "{line}");
        assert_eq!(ages(&list), [Age::Cached; 4], "{line}");
        assert_eq!(list.carried, CarriedCounts::default(), "{line}");
    }
    let unsigned = read(text.replace("# carried 1 1", "# carried 2 0"));
    assert_eq!(
        unsigned.usage_counts,
        UsageCounts::Ignored("the checksum does not match")
    );
    assert_eq!(ages(&unsigned), [Age::Cached; 4]);
    // The line comes after the digits.
    let early = read(sign(
        &text.replace("5031\n# carried 1 1", "# carried 1 1\n5031"),
    ));
    assert_eq!(early.usage_counts, UsageCounts::Ignored(invalid));
}

#[test]
fn an_invalid_trailer_is_ignored_completely() {
    let text = String::from_utf8(write(&records_with(&[5, 0, 3, 1]))).unwrap();
    for (what, text, usage_counts) in [
        (
            "no trailer",
            text[..text.find('#').unwrap()].to_owned(),
            UsageCounts::Missing,
        ),
        (
            "another trailer",
            text.replace("# pg_prewarm 2.0", "# something else"),
            UsageCounts::Missing,
        ),
        (
            "a line after the records",
            text.replace("# pg_prewarm 2.0", "\n1,2,3,0,9\n# pg_prewarm 2.0"),
            UsageCounts::Missing,
        ),
        (
            "an edited record",
            text.replace("\n0,0,0,0,1\n", "\n0,0,0,0,7\n"),
            UsageCounts::Ignored("the checksum does not match"),
        ),
        (
            "an edited digit",
            text.replace("\n5031\n", "\n5041\n"),
            UsageCounts::Ignored("the checksum does not match"),
        ),
        (
            "an invalid digit",
            text.replace("\n5031\n", "\n5061\n"),
            UsageCounts::Ignored(MISMATCH),
        ),
        (
            "a digit too many",
            text.replace("\n5031\n", "\n50311\n"),
            UsageCounts::Ignored(MISMATCH),
        ),
        (
            "a digit too few",
            sign(&text.replace("\n5031\n", "\n503\n")),
            UsageCounts::Ignored(MISMATCH),
        ),
        (
            "a bad record",
            sign(&text.replace("\n0,0,0,0,1\n", "\nbad\n")),
            UsageCounts::Ignored(MISMATCH),
        ),
        (
            "a truncated trailer",
            text[..text.find("# crc32c").unwrap()].to_owned(),
            UsageCounts::Ignored("the trailer is truncated"),
        ),
        (
            "no usage counts",
            text.replace("# usage counts", "# something else"),
            UsageCounts::Ignored("the trailer has no line \"# usage counts\""),
        ),
        (
            "an invalid checksum",
            text.replace("crc32c 0x", "crc32c 0xg"),
            UsageCounts::Ignored("the checksum does not match"),
        ),
        (
            "a long line",
            text.replace("\n5031\n", &format!("\n{}\n", "5".repeat(200))),
            UsageCounts::Ignored("the trailer has a line that is too long"),
        ),
    ] {
        let list = read(&text);
        assert_eq!(list.usage_counts, usage_counts, "{what}");
        assert!(
            list.records()
                .all(|(_, usage_count)| usage_count == UsageCount::ONCE),
            "{what}"
        );
        assert!(list.entries.len() >= 3, "{what}");
    }
}

/// Records of blocks 0, 1, 2 and so on with those usage counts.
fn records_with(usage_counts: &[u32]) -> Vec<(Record, UsageCount)> {
    let record = |(block, usage_count): (u32, &u32)| {
        let record = Record {
            database: 0,
            tablespace: 0,
            filenumber: 0,
            fork: 0,
            block,
        };
        (record, UsageCount::new(*usage_count))
    };
    (0..).zip(usage_counts).map(record).collect()
}

/// The text with the right checksum.
fn sign(text: &str) -> String {
    let before = &text[..text.find("# crc32c").unwrap()];
    format!(
        "{before}# crc32c 0x{:08x}\n",
        crc32c::crc32c(before.as_bytes())
    )
}

fn records() -> impl Strategy<Value = Vec<(Record, UsageCount)>> {
    let record = (any::<[u32; 5]>(), 0u32..6).prop_map(|(fields, usage_count)| {
        let record = Record {
            database: fields[0] % 3,
            tablespace: fields[1],
            filenumber: fields[2] % 100_000,
            fork: fields[3] % 5,
            block: fields[4],
        };
        (record, UsageCount::new(usage_count))
    });
    prop::collection::vec(record, 0..200)
}

fn write(records: &[(Record, UsageCount)]) -> Vec<u8> {
    let mut writer = ListWriter::begin(io::Cursor::new(Vec::new()), records.len()).unwrap();
    for (record, usage_count) in records {
        writer.push(record, *usage_count).unwrap();
    }
    writer.finish().unwrap().1.into_inner()
}

proptest! {
    #[test]
    fn what_is_carried_is_read_as_it_was_written(
        cached in records(), carried in records(), starts in any::<bool>(), step in 1usize..50
    ) {
        let mut builder = CarriedBuilder::new(starts);
        for (record, usage_count) in carried {
            builder.add(record, usage_count, Age::Once).unwrap();
        }
        let mut carried = builder.finish(100);
        for (record, _) in &cached {
            carried.found(record);
        }
        prop_assert_eq!(carried.records().count() as u64, carried.left());
        let total = cached.len() + usize::try_from(carried.left()).unwrap();
        let mut writer = ListWriter::begin(io::Cursor::new(Vec::new()), total).unwrap();
        for (record, usage_count) in &cached {
            writer.push(record, *usage_count).unwrap();
        }
        for (record, usage_count, age) in carried.records() {
            writer.push_carried(&record, usage_count, age).unwrap();
        }
        let text = writer.finish().unwrap().1.into_inner();
        let list = read_in_steps(&text, step);
        prop_assert_eq!(list.carried.total(), carried.left());
        let expected = cached.into_iter().chain(
            carried.records().map(|(record, usage_count, _)| (record, usage_count)),
        );
        prop_assert!(list.records().eq(expected));
        let mut again = CarriedBuilder::new(false);
        let reader = ListReader::new(|at| &text[usize::try_from(at).unwrap()..]).unwrap();
        again.add_list(reader, true).unwrap();
        prop_assert!(again.finish(100).records().eq(carried.records()));
    }

    #[test]
    fn what_is_written_is_read(records in records(), step in 1usize..50) {
        let text = write(&records);
        let list = read_in_steps(&text, step);
        prop_assert_eq!(list.records().collect::<Vec<_>>(), records);
        prop_assert_eq!(list.first_bad_line, None);
    }

    #[test]
    fn a_truncated_list_keeps_the_records_before_the_cut(
        records in records(), cut in any::<prop::sample::Index>()
    ) {
        let text = write(&records);
        let cut = cut.index(text.len());
        let list = read(&text[..cut]);
        let records: Vec<_> = records.into_iter().map(|(record, _)| record).collect();
        let whole = text[..cut].iter().filter(|&&byte| byte == b'\n').count().saturating_sub(1);
        let whole = whole.min(records.len());
        // The truncated record may still be valid, with fewer digits.
        prop_assert!(list.entries.len() <= whole + 1);
        let read: Vec<_> = list.records().map(|(record, _)| record).take(whole).collect();
        prop_assert_eq!(&read[..], &records[..whole]);
        prop_assert!(cut == text.len() - 1 || list.usage_counts != UsageCounts::Saved);
    }

    #[test]
    fn a_bad_line_costs_one_record(
        records in records().prop_filter("some", |records| !records.is_empty()),
        which in any::<prop::sample::Index>(), rubbish in "[a-z<>;.-][ -~]{0,40}"
    ) {
        let text = String::from_utf8(write(&records)).unwrap();
        let mut lines: Vec<&str> = text.lines().collect();
        let which = which.index(records.len());
        lines[which + 1] = &rubbish;
        let list = read(lines.join("\n"));
        let mut rest: Vec<_> = records.into_iter().map(|(record, _)| record).collect();
        rest.remove(which);
        let read: Vec<_> = list.records().map(|(record, _)| record).collect();
        prop_assert_eq!(read, rest);
        prop_assert_eq!(list.first_bad_line, Some(which as u64 + 2));
        prop_assert_ne!(list.usage_counts, UsageCounts::Saved);
    }

    #[test]
    fn reading_an_edited_list_neither_panics_nor_requests_much_memory(
        records in records(), at in any::<prop::sample::Index>(), removed in 0usize..30,
        inserted in "[0-9,#\n\r ]{0,30}", signed in any::<bool>()
    ) {
        let mut text = String::from_utf8(write(&records)).unwrap();
        let at = at.index(text.len());
        text.replace_range(at..text.len().min(at + removed), &inserted);
        if signed && text.contains("# crc32c") {
            text = sign(&text);
        }
        let list = read(&text);
        prop_assert!(list.entries.capacity() <= text.len() / SHORTEST_RECORD + 1);
    }

    #[test]
    fn reading_any_bytes_neither_panics_nor_requests_much_memory(bytes in prop::collection::vec(any::<u8>(), 0..4096)) {
        let list = read(&bytes);
        prop_assert!(list.entries.capacity() <= bytes.len() / SHORTEST_RECORD + 1);
    }

    #[test]
    fn reading_any_text_of_the_formats_characters_does_not_panic(text in "[<>0-9,#\n\r -]{0,400}") {
        let list = read(&text);
        prop_assert!(list.entries.capacity() <= text.len() / SHORTEST_RECORD + 1);
    }
}
