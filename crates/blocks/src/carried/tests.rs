use std::io::Cursor;

use super::*;
use crate::ListWriter;

fn record(filenumber: u32, block: u32) -> Record {
    Record {
        database: 5,
        tablespace: 1663,
        filenumber,
        fork: 0,
        block,
    }
}

/// The records left of these, each with its usage count and age.
fn left(records: &[(Record, u32, Age)], is_start: bool, most: u64) -> Vec<(Record, u32, Age)> {
    rows(&carried(records, is_start, most))
}

fn carried(records: &[(Record, u32, Age)], is_start: bool, most: u64) -> Carried {
    let mut builder = CarriedBuilder::new(is_start);
    for (record, usage_count, age) in records {
        let usage_count = UsageCount::new(*usage_count);
        builder.add(*record, usage_count, *age).unwrap();
    }
    builder.finish(most)
}

fn rows(carried: &Carried) -> Vec<(Record, u32, Age)> {
    let rows: Vec<_> = carried
        .records()
        .map(|(record, usage_count, age)| (record, usage_count.get(), age))
        .collect();
    assert_eq!(rows.len() as u64, carried.left());
    rows
}

#[test]
fn a_start_makes_a_record_older_and_the_third_ends_it() {
    let records = [
        (record(1, 0), 3, Age::Cached),
        (record(1, 1), 3, Age::Once),
        (record(1, 2), 3, Age::Twice),
    ];
    assert_eq!(
        left(&records, true, 10),
        [(record(1, 0), 3, Age::Once), (record(1, 1), 3, Age::Twice),]
    );
}

#[test]
fn a_load_on_demand_makes_no_record_older() {
    let records = [
        (record(1, 0), 3, Age::Cached),
        (record(1, 1), 3, Age::Once),
        (record(1, 2), 3, Age::Twice),
    ];
    assert_eq!(
        left(&records, false, 10),
        [
            (record(1, 0), 3, Age::Once),
            (record(1, 1), 3, Age::Once),
            (record(1, 2), 3, Age::Twice),
        ]
    );
}

#[test]
fn the_highest_usage_counts_are_carried_and_of_these_the_youngest() {
    let records = [
        (record(1, 0), 0, Age::Once),
        (record(1, 1), 2, Age::Twice),
        (record(2, 2), 2, Age::Once),
        (record(1, 3), 5, Age::Twice),
        (record(1, 4), 1, Age::Once),
    ];
    for (most, blocks) in [
        (0, vec![]),
        (1, vec![3]),
        (2, vec![2, 3]),
        (3, vec![2, 1, 3]),
        (4, vec![4, 2, 1, 3]),
        (5, vec![0, 4, 2, 1, 3]),
    ] {
        let left = left(&records, false, most);
        let left: Vec<_> = left.iter().map(|(record, ..)| record.block).collect();
        assert_eq!(left, blocks, "{most}");
    }
}

#[test]
fn a_block_is_carried_once_and_as_its_record_of_the_highest_rank() {
    let records = [
        (record(1, 0), 1, Age::Once),
        (record(1, 0), 4, Age::Twice),
        (record(1, 0), 4, Age::Once),
        (record(1, 0), 0, Age::Once),
    ];
    assert_eq!(left(&records, false, 10), [(record(1, 0), 4, Age::Once)]);
}

#[test]
fn what_is_found_in_shared_buffers_is_not_carried() {
    let records: Vec<_> = (0..6)
        .map(|block| (record(block % 2 + 1, block), 1, Age::Once))
        .collect();
    let mut carried = carried(&records, true, 10);
    for block in [1, 4, 4] {
        carried.found(&record(block % 2 + 1, block));
    }
    // Others of the same and of another file.
    for other in [
        record(1, 1),
        record(2, 7),
        record(3, 0),
        record(1, u32::MAX),
    ] {
        carried.found(&other);
    }
    let blocks: Vec<_> = rows(&carried).iter().map(|row| row.0.block).collect();
    assert_eq!(blocks, [0, 2, 3, 5]);
}

#[test]
fn what_cannot_be_a_block_is_not_carried() {
    let bad_fork = Record {
        fork: 4,
        ..record(1, 0)
    };
    let records = [bad_fork, record(0, 0), record(1, u32::MAX)];
    let records = records.map(|record| (record, 1, Age::Cached));
    assert_eq!(left(&records, true, 10), []);
}

#[test]
fn a_list_is_carried_as_a_whole_or_only_what_it_carries() {
    let mut writer = ListWriter::begin(Cursor::new(Vec::new()), 3).unwrap();
    let once = UsageCount::ONCE;
    writer.push(&record(1, 0), UsageCount::new(4)).unwrap();
    writer.push_carried(&record(1, 1), once, Age::Once).unwrap();
    writer
        .push_carried(&record(1, 2), once, Age::Twice)
        .unwrap();
    let text = writer.finish().unwrap().1.into_inner();
    for (only_carried, is_start, expected) in [
        (
            false,
            true,
            vec![(record(1, 0), 4, Age::Once), (record(1, 1), 1, Age::Twice)],
        ),
        (
            true,
            false,
            vec![(record(1, 1), 1, Age::Once), (record(1, 2), 1, Age::Twice)],
        ),
    ] {
        let mut builder = CarriedBuilder::new(is_start);
        let reader = ListReader::new(|at| &text[usize::try_from(at).unwrap()..]).unwrap();
        builder.add_list(reader, only_carried).unwrap();
        assert_eq!(rows(&builder.finish(10)), expected);
    }
}

#[test]
fn a_file_that_is_gone_is_asked_for_once_and_takes_its_records_along() {
    let records: Vec<_> = (0..9)
        .map(|block| (record(block % 3 + 1, block), block % 6, Age::Once))
        .collect();
    let mut carried = carried(&records, true, 10);
    let mut asked = Vec::new();
    carried.retain_files(|file| {
        asked.push(file.filenumber);
        file.filenumber != 2
    });
    assert_eq!(asked, [1, 2, 3]);
    carried.found(&record(2, 1));
    carried.found(&record(3, 2));
    let blocks: Vec<_> = rows(&carried).iter().map(|row| row.0.block).collect();
    assert_eq!(blocks, [0, 3, 6, 5, 8]);
}
