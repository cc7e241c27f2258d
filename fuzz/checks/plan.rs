//! Planning a load with any records, usage counts, cached blocks and budget.

use std::collections::{HashMap, HashSet};

use pg_prewarm_blocks::{CHUNK_BLOCKS, Fork, Plan, PlanView, Record, UsageCount};

use super::{list, memory};

/// How much memory a plan may take: so much for each record, which includes its file and
/// its chunk, and so much besides.
const MEMORY_FOR_A_RECORD: usize = 160;
const MEMORY_BESIDE: usize = 16 * 1024;

/// A record and its usage count, after the database and the tier: plans are sorted so.
type Place = (u32, bool, Record, UsageCount);

/// How often five bytes are taken as blocks. More take long and find nothing new.
const MOST: usize = 50;

/// Takes the first two bytes as the budget, and every five of the others as blocks that
/// are listed, cached, or both.
pub fn check(input: &[u8]) {
    let Some((budget, blocks)) = input.split_first_chunk() else {
        return;
    };
    let budget = u64::from(u16::from_le_bytes(*budget));
    let (mut listed, mut cached) = (Vec::new(), Vec::new());
    for bytes in blocks.as_chunks().0.iter().take(MOST) {
        add_blocks(*bytes, &mut listed, &mut cached);
    }
    let text = list::write(&listed);
    let list = list::read_at_once(&text);
    let limit = MEMORY_FOR_A_RECORD * (listed.len() + cached.len()) + MEMORY_BESIDE;
    let plan = memory::within(limit, || {
        Plan::new(list, cached.iter().copied(), budget).unwrap()
    });
    let planned = decode(&plan);

    // The plan is sorted, and uses the budget.
    assert!(planned.is_sorted());
    assert!(planned.len() as u64 <= budget);
    assert!(plan.over_budget() == 0 || planned.len() as u64 == budget);

    // Each listed block is in the plan, or in one of the counts.
    let cached: HashSet<_> = cached.into_iter().collect();
    let mut left = HashMap::new();
    let (mut illegal, mut found) = (0, 0);
    for (record, usage_count) in listed.iter().copied() {
        if !is_valid(&record) {
            illegal += 1;
        } else if cached.contains(&record) {
            found += 1;
        } else {
            *left.entry((record, usage_count)).or_insert(0u64) += 1;
        }
    }
    assert_eq!((plan.illegal(), plan.cached()), (illegal, found));
    for &(_, _, record, usage_count) in &planned {
        let times = left
            .get_mut(&(record, usage_count))
            .expect("a planned block that is not listed");
        *times = times
            .checked_sub(1)
            .expect("a block that is planned more often than listed");
    }
    left.retain(|_, times| *times > 0);
    assert_eq!(left.values().sum::<u64>(), plan.over_budget());

    // No block is left out for one with a lower usage count.
    let lowest_planned = planned
        .iter()
        .map(|&(_, _, _, usage_count)| usage_count)
        .min();
    let highest_left = left.keys().map(|&(_, usage_count)| usage_count).max();
    if let (Some(planned), Some(left)) = (lowest_planned, highest_left) {
        assert!(left <= planned);
    }
}

fn add_blocks(bytes: [u8; 5], listed: &mut Vec<(Record, UsageCount)>, cached: &mut Vec<Record>) {
    let [flags, file, fork, block, more] = bytes;
    let first = match (block, more) {
        (255, 255) => u32::MAX,
        _ => u32::from(u16::from_le_bytes([block, more])),
    };
    let count = match flags & 0x20 {
        0 => 1,
        _ => 4 * u32::from(more),
    };
    let usage_count = UsageCount::new(u32::from(fork >> 5));
    for block in (first..=u32::MAX).take(count as usize) {
        let record = Record {
            database: u32::from(flags & 3),
            tablespace: 1663 + u32::from(flags >> 2 & 1),
            filenumber: u32::from(file),
            fork: u32::from(fork & 7),
            block,
        };
        if flags & 0x40 == 0 {
            listed.push((record, usage_count));
        }
        if flags & 0x80 != 0 {
            cached.push(record);
        }
    }
}

fn is_valid(record: &Record) -> bool {
    record.block != u32::MAX && record.filenumber != 0 && Fork::from_number(record.fork).is_some()
}

/// The blocks of a plan in their order, as a worker reads them in shared memory.
fn decode(plan: &Plan) -> Vec<Place> {
    let mut words = vec![u32::MAX; plan.words()];
    plan.encode(&mut words);
    let view = PlanView::new(&words);
    let mut places = Vec::new();
    let mut next = 0;
    for database in plan.databases() {
        assert_eq!(database.chunks.start, next);
        next = database.chunks.end;
        let before = places.len();
        for index in database.chunks {
            let (chunk, blocks) = view.chunk(index);
            assert_eq!(chunk.database, database.database);
            let numbers = blocks.numbers();
            assert!((1..=CHUNK_BLOCKS as usize).contains(&numbers.len()));
            places.extend(numbers.iter().enumerate().map(|(index, &block)| {
                let record = Record {
                    database: chunk.database,
                    tablespace: chunk.tablespace,
                    filenumber: chunk.filenumber,
                    fork: chunk.fork as u32,
                    block,
                };
                let usage_count = blocks.usage_count(index);
                (record.database, usage_count.get() < 2, record, usage_count)
            }));
        }
        assert_eq!((places.len() - before) as u64, database.blocks);
    }
    places
}
