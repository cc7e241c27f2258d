//! What other sessions do during a load: DDL on the relations that it reads, locks that
//! queue, databases that are created, renamed, moved and dropped, eviction of buffers,
//! requests to the leader, and changes of the clock.

use postgres::error::SqlState;
use rand::Rng;
use rand::seq::SliceRandom;

use super::arena::Arena;
use super::churn::{self, Churn};
use crate::common::{Fault, Shutdown, wait_until};

pub const FAULTS: &[super::Kind] = &[
    ("rewrites", rewrites),
    ("drops-and-truncates", drops_and_truncates),
    ("queued-locks", queued_locks),
    ("databases", databases),
    ("renamed-databases", renamed_databases),
    ("evictions", evictions),
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

/// REINDEX CONCURRENTLY that was interrupted leaves an invalid index.
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
        // The list names them, and then they are dropped.
        arena.restart(Shutdown::Fast);
    }
    // A worker may connect to a database that is being dropped.
    arena
        .round
        .allowed
        .extend(["does not exist", "is not currently accepting connections"]);
}

/// A reader stays in its transaction, and a lock that conflicts with every other one waits
/// behind it: for a moment, or until the load has ended without the table.
fn queued_locks(arena: &mut Arena) {
    arena.begin_slow_load();
    let mut tables = arena.tables.clone();
    tables.shuffle(&mut arena.round.rng);
    let locked: Vec<_> = tables[..3]
        .iter()
        .map(|table| {
            let mut reader = arena.connect(table.database);
            let read = format!("BEGIN; SELECT FROM {} LIMIT 1", table.name);
            reader.batch_execute(&read).unwrap();
            let lock = format!("BEGIN; LOCK TABLE {}; COMMIT", table.name);
            (reader, arena.call(table.database, &lock))
        })
        .collect();
    let until_the_end = arena.round.rng.random_ratio(1, 8);
    if until_the_end {
        arena.back_to_normal();
        arena.settle();
    } else {
        arena.round.pause(3000);
    }
    for (reader, lock) in locked {
        drop(reader);
        assert_eq!(lock.wait(), None);
    }
    arena.back_to_normal();
    if until_the_end {
        arena.settle();
        wait_until("the blocks that were locked to be loaded", || {
            let locked = "SELECT skipped_locked FROM pg_stat_autoprewarm";
            arena.query("postgres", locked)[0].get::<_, i64>(0) == 0
        });
    }
}

/// Commands that need a database without other connections.
fn renamed_databases(arena: &mut Arena) {
    arena.begin_slow_load();
    for _ in 0..arena.round.rng.random_range(1..4) {
        let database = arena.round.choose(&["one", "two"]);
        let commands = match arena.round.coin() {
            true => [
                format!("ALTER DATABASE {database} RENAME TO passing"),
                format!("ALTER DATABASE passing RENAME TO {database}"),
            ],
            false => [
                format!("CREATE DATABASE passing TEMPLATE {database}"),
                "DROP DATABASE passing".to_owned(),
            ],
        };
        for command in commands {
            // Sessions of clients may be in the database as well.
            let mut client = arena.connect("postgres");
            wait_until(&command, || match client.batch_execute(&command) {
                Ok(()) => true,
                Err(error) if error.code() == Some(&SqlState::OBJECT_IN_USE) => false,
                Err(error) => panic!("{command}: {error:?}"),
            });
            arena.round.pause(300);
        }
    }
    arena.back_to_normal();
}

/// Buffers are evicted during the load, and another load brings back what they had.
fn evictions(arena: &mut Arena) {
    arena.begin_slow_load();
    if arena.cluster.major() >= 17 {
        for _ in 0..3 {
            let part = arena.round.rng.random_range(1..=3);
            arena.query(
                "postgres",
                &format!(
                    "SELECT pg_buffercache_evict(bufferid) FROM pg_buffercache \
                     WHERE bufferid % 3 < {part}"
                ),
            );
            arena.round.pause(300);
        }
        arena.back_to_normal();
    } else {
        // Blocks that were loaded and are evicted before the load ends are not in its
        // list.
        arena.round.may_skip = true;
        arena.run(
            "postgres",
            "CREATE UNLOGGED TABLE churn_filler AS \
             SELECT repeat('x', 7000) FROM generate_series(1, 9000); \
             SELECT pg_prewarm('churn_filler')",
        );
        arena.back_to_normal();
        arena.run("postgres", "DROP TABLE churn_filler");
    }
    arena.settle();
    arena.run("postgres", "SELECT autoprewarm_load_now()");
}

/// All requests to the leader, at the same time. A dump on demand during a load lists
/// what is cached so far.
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
    // The last load may have been cancelled.
    arena.run("postgres", "SELECT autoprewarm_load_now()");
    arena.settle();
    // That load may have skipped blocks whose workers a cancel had terminated.
    arena.warm();
}

/// A leader that loads and dumps many times has no more memory than after a few times.
fn many_loads(arena: &mut Arena) {
    let leader = arena.settle();
    load_and_dump(arena, 5);
    let mut in_use = vec![memory_in_use(arena, leader)];
    // Invalidations of its catalog caches make some difference. What the server keeps
    // after it was first needed makes more, but only once.
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

/// The bytes in use in a process's memory contexts, as the process reports them.
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

/// The time of day is set back, forward, and back again.
fn clock(arena: &mut Arena) {
    arena.round.clock_set = true;
    arena.set("pg_prewarm.autoprewarm_interval", "1");
    arena.begin_slow_load();
    for _ in 0..arena.round.rng.random_range(1..6) {
        // With a larger step the server's checkpointer would fail: it sleeps for a
        // number of milliseconds that must fit into 32 bits.
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
    // Times that were taken while the clock was wrong cannot be compared.
    arena.settle();
    arena.restart(Shutdown::Fast);
}
