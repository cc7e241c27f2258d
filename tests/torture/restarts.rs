//! A server that is restarted again and again with a changing workload.
//!
//! Nothing is ever evicted here, so the expected list is known to the block: after a
//! clean shutdown it has all blocks that were cached, otherwise those that it had
//! before. After the load all of them must be cached again, except those that do not
//! exist any more.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use rand::Rng;

use super::Plan;
use super::arena::{Arena, Round};
use super::census::segments;
use super::process;
use crate::common::{Block, Shutdown};

pub fn run(plan: &Plan) -> usize {
    let mut arena = Arena::new();
    let start = Instant::now();
    let mut done = 0;
    for round in plan.rounds() {
        let result = catch_unwind(AssertUnwindSafe(|| restart(&mut arena, plan.seed, round)));
        if result.is_err() {
            println!("FINDING in restart {round} of seed {}:", plan.seed);
            println!("{}", arena.cluster.log_since(arena.round.mark));
            println!("that was restart {round} of seed {}", plan.seed);
            return 1;
        }
        done += 1;
        if done % 50 == 0 {
            let records = arena.list.as_ref().map_or(0, |list| list.blocks.len());
            println!(
                "{done} restarts in {:.0} s; the list has {records} records",
                start.elapsed().as_secs_f64()
            );
        }
    }
    println!("{done} restarts in {:.0} s", start.elapsed().as_secs_f64());
    println!("{}", arena.census.most);
    let thorough = catch_unwind(AssertUnwindSafe(|| arena.check_thoroughly()));
    usize::from(thorough.is_err())
}

fn restart(arena: &mut Arena, seed: u64, round: u64) {
    arena.round = Round::new(seed, round, arena.cluster.log_end());
    arena.work();
    if arena.round.rng.random_ratio(1, 4) {
        arena.run("postgres", "SELECT autoprewarm_dump_now()");
        arena.round.list_replaced = true;
        arena.list = Some(arena.read_list());
    }
    let how = arena
        .round
        .choose(&[Shutdown::Fast, Shutdown::Smart, Shutdown::Immediate]);
    let cached = arena.cluster.cached_without_extension();
    let data = arena.cluster.data("");
    arena.cluster.stop(how);
    process::wait_for_none(&data);
    assert_eq!(
        segments(&arena.cluster),
        0,
        "dynamic segments that outlive the server"
    );
    let list = arena.read_list();
    match how {
        Shutdown::Immediate => {
            assert!(Some(&list) == arena.list.as_ref(), "the list has changed");
            for table in arena.tables.iter_mut().filter(|table| table.unlogged) {
                table.low = table.high;
            }
        }
        _ => {
            let missing: Vec<&Block> = cached.difference(&list.blocks).collect();
            assert!(missing.is_empty(), "the list lacks {missing:?}");
        }
    }
    arena.cluster.start();
    arena.settle();
    check_loaded(arena, &list.blocks);
    // Every tenth time only, since it takes longer than all other checks.
    if round.is_multiple_of(10) {
        arena.check();
    } else {
        arena.check_log();
    }
    arena.list = Some(list);
}

/// All listed blocks must be cached, except as many as the server reports to be of
/// dropped relations or beyond the end of their relation.
fn check_loaded(arena: &Arena, listed: &BTreeSet<Block>) {
    let cached = arena.cluster.cached_without_extension();
    let row = arena
        .query(
            "postgres",
            "SELECT skipped_no_relation + skipped_no_block + skipped_template_database, \
                    blocks_skipped, blocks_total, load_result \
             FROM pg_stat_autoprewarm",
        )
        .remove(0);
    assert_eq!(row.get::<_, &str>(3), "completed");
    assert_eq!(
        row.get::<_, i64>(2),
        listed.len() as i64,
        "records of the list"
    );
    let excused: i64 = row.get(0);
    assert_eq!(row.get::<_, i64>(1), excused, "skipped blocks");
    let missing = listed.difference(&cached).count() as i64;
    assert!(
        missing <= excused,
        "{missing} blocks are not cached, {excused} are skipped"
    );
}
