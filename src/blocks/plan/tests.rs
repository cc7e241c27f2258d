use proptest::prelude::*;

use super::*;

fn record(database: Oid, filenumber: Oid, fork: u32, block: BlockNumber) -> Record {
    Record {
        database,
        tablespace: 1663,
        filenumber,
        fork,
        block,
    }
}

fn encode(plan: &Plan) -> Vec<u32> {
    let mut words = vec![0; plan.words()];
    plan.encode(&mut words);
    words
}

/// Every block of the encoded plan, as records again.
fn decode(plan: &Plan) -> Vec<Record> {
    let words = encode(plan);
    let view = PlanView::new(&words);
    plan.databases()
        .into_iter()
        .flat_map(|database| view.segments(database.segments))
        .flat_map(|(segment, blocks)| {
            blocks.iter().map(move |&block| Record {
                database: segment.database,
                tablespace: segment.tablespace,
                filenumber: segment.filenumber,
                fork: segment.fork as u32,
                block,
            })
        })
        .collect()
}

#[test]
fn no_records_make_no_databases() {
    let plan = Plan::new(vec![]).unwrap();
    assert_eq!(plan.databases(), []);
    assert_eq!(decode(&plan), []);
}

#[test]
fn blocks_are_loaded_in_physical_order() {
    let plan = Plan::new(vec![
        record(5, 2, 0, 9),
        record(5, 1, 2, 0),
        record(5, 1, 0, 3),
        record(0, 7, 0, 1),
        record(5, 1, 0, 2),
    ])
    .unwrap();
    assert_eq!(
        decode(&plan),
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
fn databases_know_their_segments_and_blocks() {
    let plan = Plan::new(vec![
        record(9, 1, 0, 0),
        record(0, 7, 0, 1),
        record(5, 1, 0, 0),
        record(5, 1, 0, 1),
        record(5, 2, 0, 0),
    ])
    .unwrap();
    let summary: Vec<_> = plan
        .databases()
        .into_iter()
        .map(|database| (database.database, database.segments, database.blocks))
        .collect();
    assert_eq!(summary, [(0, 0..1, 1), (5, 1..3, 3), (9, 3..4, 1)]);
}

#[test]
fn the_same_file_number_in_two_tablespaces_is_two_relations() {
    let mut other = record(5, 1, 0, 0);
    other.tablespace = 20000;
    let plan = Plan::new(vec![record(5, 1, 0, 0), other]).unwrap();
    assert_eq!(plan.databases()[0].segments, 0..2);
}

#[test]
fn what_no_relation_can_have_is_counted_and_left_out() {
    let plan = Plan::new(vec![
        record(5, 1, 4, 0),
        record(5, 1, u32::MAX, 0),
        record(5, 1, 0, u32::MAX),
        record(5, 1, 3, u32::MAX - 1),
    ])
    .unwrap();
    assert_eq!(plan.illegal(), 3);
    assert_eq!(decode(&plan), [record(5, 1, 3, u32::MAX - 1)]);
}

proptest! {
    #[test]
    fn a_plan_holds_every_legal_record_once_and_in_order(
        fields in prop::collection::vec((0u32..4, 0u32..5, 0u32..6, 0u32..50), 0..300)
    ) {
        let records: Vec<_> = fields
            .into_iter()
            .map(|(database, filenumber, fork, block)| record(database, filenumber, fork, block))
            .collect();
        let plan = Plan::new(records.clone()).unwrap();
        let mut legal: Vec<_> = records.iter().copied().filter(|record| record.fork < 4).collect();
        legal.sort();
        prop_assert_eq!(plan.illegal(), (records.len() - legal.len()) as u64);
        prop_assert_eq!(decode(&plan), legal);
    }
}
