use std::io::Cursor;

use proptest::prelude::*;

use super::*;
use crate::ListWriter;

type CountedRecord = (Record, UsageCount);

fn record(database: Oid, filenumber: Oid, fork: u32, block: BlockNumber) -> Record {
    Record {
        database,
        tablespace: 1663,
        filenumber,
        fork,
        block,
    }
}

fn counted(record: Record, usage_count: u32) -> CountedRecord {
    (record, UsageCount::new(usage_count))
}

fn plan_within(records: &[CountedRecord], budget: u64) -> Plan {
    plan_without(records, &[], budget)
}

fn plan_without(records: &[CountedRecord], cached: &[Record], budget: u64) -> Plan {
    let mut writer = ListWriter::begin(Cursor::new(Vec::new()), records.len()).unwrap();
    for (record, usage_count) in records {
        writer.push(record, *usage_count).unwrap();
    }
    let text = writer.finish().unwrap().1.into_inner();
    let list = BlockList::read(&text[..], text.len() as u64).unwrap();
    Plan::new(list, cached.iter().copied(), |_| budget).unwrap()
}

fn plan(records: &[Record]) -> Plan {
    let records: Vec<_> = records.iter().map(|record| counted(*record, 1)).collect();
    plan_within(&records, u64::MAX)
}

/// The records of the blocks of an encoded plan.
fn decode(plan: &Plan) -> Vec<CountedRecord> {
    let mut words = vec![0; plan.words()];
    plan.encode(&mut words);
    let view = PlanView::new(&words);
    let mut records = Vec::new();
    for index in plan.databases().flat_map(|database| database.chunks) {
        let (chunk, blocks) = view.chunk(index);
        assert!(blocks.numbers().len() <= CHUNK_BLOCKS as usize);
        assert!(blocks.numbers().is_sorted());
        for (index, &block) in blocks.numbers().iter().enumerate() {
            let record = Record {
                database: chunk.database,
                tablespace: chunk.tablespace,
                filenumber: chunk.filenumber,
                fork: chunk.fork as u32,
                block,
            };
            records.push((record, blocks.usage_count(index)));
        }
    }
    records
}

fn decoded_records(plan: &Plan) -> Vec<Record> {
    decode(plan).into_iter().map(|(record, _)| record).collect()
}

#[test]
fn the_plan_of_an_empty_list_has_no_databases() {
    let plan = plan(&[]);
    assert_eq!(plan.databases().count(), 0);
    assert_eq!(decode(&plan), []);
}

#[test]
fn blocks_are_loaded_in_physical_order() {
    let plan = plan(&[
        record(5, 2, 0, 9),
        record(5, 1, 2, 0),
        record(5, 1, 0, 3),
        record(0, 7, 0, 1),
        record(5, 1, 0, 2),
    ]);
    assert_eq!(
        decoded_records(&plan),
        [
            record(0, 7, 0, 1),
            record(5, 1, 0, 2),
            record(5, 1, 0, 3),
            record(5, 1, 2, 0),
            record(5, 2, 0, 9),
        ]
    );
}

#[test]
fn blocks_with_a_usage_count_of_2_or_more_are_loaded_before_the_others_of_their_database() {
    let records = [
        counted(record(5, 1, 0, 1), 1),
        counted(record(5, 1, 0, 2), 5),
        counted(record(5, 1, 0, 3), 2),
        counted(record(5, 2, 0, 0), 0),
        counted(record(5, 2, 0, 4), 3),
        counted(record(6, 1, 0, 0), 5),
    ];
    let plan = plan_within(&records, u64::MAX);
    let in_order = [1, 2, 4, 0, 3, 5].map(|index| records[index]);
    assert_eq!(decode(&plan), in_order);
    let chunks: Vec<_> = plan.databases().map(|database| database.chunks).collect();
    assert_eq!(chunks, [0..4, 4..5]);
}

#[test]
fn cached_blocks_are_left_out_and_do_not_count_against_the_budget() {
    let blocks: Vec<_> = (0..6).map(|block| record(5, 1, 0, block)).collect();
    let records: Vec<_> = blocks
        .iter()
        .zip(0..)
        .map(|(&at, usage_count)| counted(at, usage_count))
        .collect();
    let cached = [blocks[5], record(5, 2, 0, 0), blocks[0]];
    let plan = plan_without(&records, &cached, 2);
    assert_eq!(decode(&plan), [records[3], records[4]]);
    assert_eq!((plan.cached(), plan.over_budget()), (2, 2));
}

#[test]
fn the_first_tier_of_a_list_may_be_cached() {
    let [hot, cold] = [1, 2].map(|block| record(5, 100, 0, block));
    let list = [counted(hot, 2), counted(cold, 1)];
    for (records, cached, expected) in [
        (&list[..], &[][..], true),
        (&list, &[hot], true),
        (&list[1..], &[], false),
    ] {
        let plan = plan_without(records, cached, u64::MAX);
        assert_eq!(plan.list_has_first_tier(), expected);
    }
}

#[test]
fn a_block_that_is_seen_in_two_buffers_counts_as_cached_once() {
    let blocks: Vec<_> = (0..4)
        .map(|block| counted(record(5, 1, 0, block), 1))
        .collect();
    let cached = [0, 2, 0].map(|block| blocks[block].0);
    let plan = plan_without(&blocks, &cached, u64::MAX);
    assert_eq!(decode(&plan), [blocks[1], blocks[3]]);
    assert_eq!((plan.cached(), plan.over_budget()), (2, 0));
}

#[test]
fn each_database_has_its_chunks_and_its_number_of_blocks() {
    let plan = plan(&[
        record(9, 1, 0, 0),
        record(0, 7, 0, 1),
        record(5, 1, 0, 0),
        record(5, 1, 0, 1),
        record(5, 2, 0, 0),
    ]);
    let summary: Vec<_> = plan
        .databases()
        .map(|database| (database.database, database.chunks, database.blocks))
        .collect();
    assert_eq!(summary, [(0, 0..1, 1), (5, 1..3, 3), (9, 3..4, 1)]);
}

#[test]
fn a_large_relation_is_divided_into_chunks() {
    let blocks: Vec<_> = (0..CHUNK_BLOCKS * 2 + 1)
        .map(|block| record(5, 1, 0, block))
        .collect();
    let plan = plan(&blocks);
    assert_eq!(plan.databases().next().unwrap().chunks, 0..3);
    assert_eq!(decoded_records(&plan), blocks);
}

#[test]
fn the_same_file_number_in_two_tablespaces_is_two_relations() {
    let here = record(5, 1, 0, 0);
    let there = Record {
        tablespace: 20000,
        ..here
    };
    assert_eq!(
        plan(&[here, there]).databases().next().unwrap().chunks,
        0..2
    );
}

#[test]
fn invalid_records_are_counted_and_left_out() {
    let plan = plan(&[
        record(5, 1, 4, 0),
        record(5, 1, u32::MAX, 0),
        record(5, 1, 0, u32::MAX),
        record(5, 0, 0, 0),
        record(5, 1, 3, u32::MAX - 1),
    ]);
    assert_eq!(plan.illegal(), 4);
    assert_eq!(decoded_records(&plan), [record(5, 1, 3, u32::MAX - 1)]);
}

#[test]
fn blocks_with_the_lowest_usage_counts_are_left_out_if_the_budget_is_exceeded() {
    let records: Vec<_> = [0, 5, 1, 3, 5, 1, 2, 1]
        .into_iter()
        .zip(0..)
        .map(|(usage_count, block)| counted(record(5, 1, 0, block), usage_count))
        .collect();
    let kept = |budget| {
        let plan = plan_within(&records, budget);
        let mut blocks: Vec<_> = decoded_records(&plan)
            .iter()
            .map(|record| record.block)
            .collect();
        blocks.sort_unstable();
        assert_eq!(plan.over_budget(), (records.len() - blocks.len()) as u64);
        blocks
    };
    assert!(kept(0).is_empty());
    assert_eq!(kept(1), [1]);
    assert_eq!(kept(3), [1, 3, 4]);
    // Of blocks with the same usage count, the first are kept.
    assert_eq!(kept(5), [1, 2, 3, 4, 6]);
    assert_eq!(kept(8), [0, 1, 2, 3, 4, 5, 6, 7]);
}

proptest! {
    #[test]
    fn a_plan_has_every_valid_record_once_and_in_order(
        fields in prop::collection::vec((0u32..4, 1u32..6, 0u32..6, 0u32..2000, 0u32..6), 0..1500)
    ) {
        let records: Vec<_> = fields
            .into_iter()
            .map(|(database, filenumber, fork, block, usage_count)| {
                counted(record(database, filenumber, fork, block), usage_count)
            })
            .collect();
        let plan = plan_within(&records, u64::MAX);
        let mut valid: Vec<_> = records.iter().copied().filter(|(record, _)| record.fork < 4).collect();
        valid.sort_by_key(|&(record, usage_count)| {
            (record.database, usage_count < UsageCount::HOT, record, usage_count)
        });
        prop_assert_eq!(plan.illegal(), (records.len() - valid.len()) as u64);
        prop_assert_eq!(decode(&plan), valid);
        prop_assert!(plan.words() * 4 <= 5 * records.len() + 24 * plan.chunks.len() + 12);
    }

    #[test]
    fn no_block_is_left_out_for_one_with_a_lower_usage_count(
        usage_counts in prop::collection::vec(0u32..6, 0..300), budget in 0u64..300
    ) {
        let records: Vec<_> = (0..).zip(&usage_counts)
            .map(|(block, &usage_count)| counted(record(5, 1, 0, block), usage_count))
            .collect();
        let plan = plan_within(&records, budget);
        let kept = decode(&plan);
        prop_assert_eq!(kept.len() as u64, budget.min(records.len() as u64));
        let lowest_kept = kept.iter().map(|(_, usage_count)| *usage_count).min();
        let highest_left_out = records.iter().filter(|record| !kept.contains(record)).map(|(_, usage_count)| *usage_count).max();
        prop_assert!(lowest_kept.is_none() || highest_left_out.is_none() || lowest_kept >= highest_left_out);
    }
}

#[test]
fn a_plan_that_is_made_smaller_is_the_same_as_one_with_that_budget() {
    let records: Vec<CountedRecord> = (0..3000)
        .map(|number| {
            let file = 16384 + number % 3;
            counted(record(5 + number % 2, file, 0, number), number * 7 % 6)
        })
        .collect();
    for most in [2999, 1500, 511, 100, 1] {
        let mut plan = plan_within(&records, u64::MAX);
        assert_eq!(plan.blocks(), 3000);
        let words = plan.words();
        plan.shrink(most).unwrap();
        assert_eq!(plan.blocks(), most);
        assert!(plan.words() < words);
        let expected = plan_within(&records, most);
        assert_eq!(decode(&plan), decode(&expected), "{most}");
        assert_eq!(plan.words(), expected.words(), "{most}");
        assert!(plan.databases().eq(expected.databases()), "{most}");
    }
}

#[test]
fn what_is_over_the_budget_and_what_a_chunk_has_left_keep_usage_count_and_age() {
    let mut writer = ListWriter::begin(Cursor::new(Vec::new()), 6).unwrap();
    for block in 0..3 {
        let usage_count = UsageCount::new(5 - block);
        writer.push(&record(5, 1, 0, block), usage_count).unwrap();
    }
    for (block, age) in [(3, Age::Once), (4, Age::Twice), (5, Age::Twice)] {
        let usage_count = UsageCount::new(8 - block);
        let record = record(5, 1, 0, block);
        writer.push_carried(&record, usage_count, age).unwrap();
    }
    let text = writer.finish().unwrap().1.into_inner();
    let list = BlockList::read(&text[..], text.len() as u64).unwrap();
    let plan = Plan::new(list, std::iter::empty(), |_| 4).unwrap();
    let mut words = vec![0; plan.words()];
    plan.encode(&mut words);
    let view = PlanView::new(&words);
    assert_eq!(plan.chunk_sizes().len(), 1);
    let row = |(record, usage_count, age): (Record, UsageCount, Age)| {
        (record.block, usage_count.get(), age)
    };
    let left: Vec<_> = view.records_from(0, 2).map(row).collect();
    assert_eq!(left, [(3, 5, Age::Once), (4, 4, Age::Twice)]);
    // Of blocks of the same usage count, those that are cached are loaded first.
    let over: Vec<_> = plan.into_over_budget().records().map(row).collect();
    assert_eq!(over, [(2, 3, Age::Cached), (5, 3, Age::Twice)]);
}
