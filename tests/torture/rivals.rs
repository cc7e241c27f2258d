//! What others do while a load runs: DDL on the relations that it reads, databases
//! that come and go, commands that steer it, a clock that is set.

use rand::Rng;

use super::arena::Arena;
use super::churn::{self, Churn};
use crate::common::{Fault, Shutdown};

pub const FAULTS: &[super::Kind] = &[
    ("rewrites", rewrites),
    ("drops-and-truncates", drops_and_truncates),
    ("databases", databases),
    ("steering", steering),
    ("many-loads", many_loads),
    ("clock", clock),
];

/// VACUUM FULL, REINDEX, SET TABLESPACE and the like.
fn rewrites(arena: &mut Arena) {
    arena.begin_slow_load();
    let churn = Churn::begin(arena, churn::rewrites, 3);
    arena.round.pause(1500);
    if arena.round.coin() {
        arena.back_to_normal();
        arena.settle();
    }
    churn.end();
    arena.back_to_normal();
    leave_nothing_half_built(arena);
}

/// REINDEX CONCURRENTLY that was cut short leaves an invalid index.
fn leave_nothing_half_built(arena: &Arena) {
    for database in super::arena::DATABASES {
        let rows = arena.query(
            database,
            "SELECT indexrelid::regclass::text FROM pg_index WHERE NOT indisvalid",
        );
        for row in rows {
            arena.run(database, &format!("DROP INDEX {}", row.get::<_, &str>(0)));
        }
    }
}

fn drops_and_truncates(arena: &mut Arena) {
    arena.begin_slow_load();
    for _ in 0..10 {
        arena.work();
    }
    arena.back_to_normal();
}

fn databases(arena: &mut Arena) {
    arena.begin_slow_load();
    let churn = Churn::begin(arena, churn::databases, 3);
    arena.round.pause(1500);
    arena.back_to_normal();
    arena.round.pause(300);
    churn.end();
    if arena.round.coin() {
        // They are in the list now, and then gone.
        arena.restart(Shutdown::Fast);
    }
    // A worker connects to a database that is being dropped.
    arena
        .round
        .allowed
        .extend(["does not exist", "is not currently accepting connections"]);
}

/// Everything that can be asked of the leader, at once. Whoever dumps in mid-load
/// lists what is there so far.
fn steering(arena: &mut Arena) {
    arena.round.may_skip = true;
    arena
        .round
        .allowed
        .push("skipping prewarm because block dump file is being written");
    arena.begin_slow_load();
    let churn = Churn::begin(
        arena,
        |rng, _, _| {
            let sql = match rng.random_range(0..6) {
                0 | 1 => "SELECT autoprewarm_load_now()",
                2 => "SELECT autoprewarm_cancel()",
                3 => "SELECT autoprewarm_dump_now()",
                4 => "SELECT autoprewarm_wait('100 ms')",
                _ => "SELECT count(*) FROM autoprewarm_blocks()",
            };
            ("postgres", sql.to_owned())
        },
        4,
    );
    arena.round.pause(1500);
    churn.end();
    arena.back_to_normal();
    arena.round.list_replaced = true;
    arena.settle();
    // It may have been the last one that was cancelled.
    arena.run("postgres", "SELECT autoprewarm_load_now()");
    arena.settle();
    // Of workers that were ended by a cancel's impatience.
    arena.warm();
}

/// One leader that loads and dumps again and again has no more than one that has
/// done so a few times.
fn many_loads(arena: &mut Arena) {
    let leader = arena.settle();
    load_and_dump(arena, 5);
    let mut in_use = vec![memory_in_use(arena, leader)];
    // What is told to it of changes to catalogs makes some difference, and what the
    // server keeps once it was needed makes more, once.
    const TRIES: usize = 3;
    let has_leaked = |in_use: &[u64]| in_use.windows(2).all(|pair| pair[1] >= pair[0] + 20 * 256);
    while has_leaked(&in_use) && in_use.len() <= TRIES {
        load_and_dump(arena, 20);
        in_use.push(memory_in_use(arena, leader));
    }
    assert!(
        !has_leaked(&in_use),
        "20 loads and dumps again and again cost {in_use:?} bytes"
    );
    assert_eq!(arena.settle(), leader);
}

fn load_and_dump(arena: &Arena, times: u32) {
    for _ in 0..times {
        arena.run("postgres", "SELECT autoprewarm_load_now()");
        arena.settle();
        arena.run("postgres", "SELECT autoprewarm_dump_now()");
    }
}

/// Bytes in use in a process's memory contexts, as it says itself.
fn memory_in_use(arena: &Arena, pid: i32) -> u64 {
    let mark = arena.cluster.log_end();
    arena.run(
        "postgres",
        &format!("SELECT pg_log_backend_memory_contexts({pid})"),
    );
    let line = arena.cluster.wait_for_log(mark, "Grand total: ");
    let used = line.rsplit_once("; ").unwrap().1;
    used.split_once(' ').unwrap().0.parse().unwrap()
}

/// The time of day goes back, forth, and back again.
fn clock(arena: &mut Arena) {
    arena.round.clock_set = true;
    arena.set("pg_prewarm.autoprewarm_interval", "1");
    arena.begin_slow_load();
    for _ in 0..arena.round.rng.random_range(1..6) {
        // By more than that, the server's own checkpointer would come to grief: it
        // sleeps for as many milliseconds as a 32-bit number can hold.
        let hours = arena.round.rng.random_range(-250..250);
        arena
            .cluster
            .set_fault(Fault::Clock, hours * 3600 * 1_000_000);
        arena.round.pause(400);
    }
    if arena.round.coin() {
        let how = arena.round.choose(&[Shutdown::Fast, Shutdown::Immediate]);
        arena.restart(how);
    }
    arena.set("pg_prewarm.autoprewarm_interval", "0");
    arena.back_to_normal();
    // Times that were taken while the clock was wrong are not to be compared with.
    arena.settle();
    arena.restart(Shutdown::Fast);
}
