//! A load gives way: to those who wait for a lock, to commands that need a database for
//! themselves, and to those who need background workers. And what it has put off, it
//! does later.

use std::thread;
use std::time::{Duration, Instant};

use postgres::Client;

use crate::common::{
    Block, Cluster, LIST, LoadStats, Shutdown, assert_holds_no_snapshot, list_of, value, wait_until,
};

const WORKERS: &str = "FROM pg_stat_activity WHERE backend_type = 'autoprewarm worker'";
const LOAD: &str = "SELECT autoprewarm_load_now()";

/// A running cluster with an empty cache, whose list names a table `t` of 500 blocks in
/// that database, and a table `free` of 100 in database `postgres`.
fn cluster_with_tables(database: &str, settings: &[&str]) -> (Cluster, Block) {
    let builder = settings
        .iter()
        .fold(Cluster::build(), |builder, line| builder.setting(line));
    let cluster = builder
        .setting("max_prepared_transactions = 2")
        .setting("shared_buffers = 64MB")
        .start();
    cluster.sql("CREATE EXTENSION pg_prewarm");
    if database != "postgres" {
        cluster.sql(&format!("CREATE DATABASE {database}"));
    }
    let table = cluster.table_of_blocks(database, "t", 500);
    let free = cluster.table("free", 100);
    cluster.stop(Shutdown::Fast);
    cluster.write_list("<<0>>\n");
    cluster.start();
    LoadStats::wait_for_end(&mut cluster.connect("postgres"));
    cluster.write_list(list_of(table.first(500).chain(free.first(100))));
    (cluster, table)
}

fn wait_for_lock_queue(client: &mut Client) {
    wait_until("a worker that waits for a lock", || {
        value(
            client,
            &format!("SELECT EXISTS (SELECT {WORKERS} AND wait_event_type = 'Lock')"),
        )
    });
}

fn skipped_locked(client: &mut Client) -> i64 {
    value(client, "SELECT skipped_locked FROM pg_stat_autoprewarm")
}

#[test]
fn a_worker_queues_behind_a_command_that_waits_for_the_lock_of_a_reader() {
    let (cluster, _) = cluster_with_tables("postgres", &[]);
    let mut reader = cluster.connect("postgres");
    reader
        .batch_execute("BEGIN; SELECT FROM t LIMIT 1")
        .unwrap();
    let mut writer = cluster.connect("postgres");
    let command = thread::spawn(move || writer.batch_execute("ALTER TABLE t ADD COLUMN more int"));
    let mut client = cluster.connect("postgres");
    wait_until("the command", || {
        value(
            &mut client,
            "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)",
        )
    });
    client.batch_execute(LOAD).unwrap();
    wait_for_lock_queue(&mut client);
    // Its snapshot would hold back everybody's vacuum.
    let waiting = format!("{WORKERS} AND wait_event_type = 'Lock'");
    assert_holds_no_snapshot(&mut client, &waiting);
    thread::sleep(Duration::from_secs(2));
    reader.batch_execute("COMMIT").unwrap();
    command.join().unwrap().unwrap();
    let stats = LoadStats::wait_for_end(&mut client);
    assert_eq!((stats.result(), stats.skipped), ("completed", 0));
    // It does not report its wait, as a session would.
    let log = cluster.log();
    let mut waits = log.lines().filter(|line| line.contains("still waiting"));
    assert!(waits.all(|line| !line.starts_with("autoprewarm")), "{log}");
}

#[test]
fn a_worker_that_waits_for_a_lock_is_cancelled_at_once() {
    let (cluster, _) = cluster_with_tables("postgres", &[]);
    cluster.sql("BEGIN; LOCK TABLE t; PREPARE TRANSACTION 'holder'");
    let list = cluster.list();
    let mut client = cluster.connect("postgres");
    // A worker that does not get a processor within 100 ms is terminated.
    let is_cancelled = (0..3).any(|_| {
        cluster.write_list(&list);
        let mark = cluster.log_end();
        client.batch_execute(LOAD).unwrap();
        LoadStats::wait_for(&mut client, |stats| stats.loaded + stats.cached == 100);
        wait_for_lock_queue(&mut client);
        let start = Instant::now();
        assert!(value::<bool>(&mut client, "SELECT autoprewarm_cancel()"));
        // Without that it waits for ten seconds.
        assert!(start.elapsed() < Duration::from_secs(5));
        let stats = LoadStats::wait_for_end(&mut client);
        assert_eq!((stats.result(), stats.skipped), ("cancelled", 500));
        !cluster.log_since(mark).contains("FATAL:")
    });
    assert!(is_cancelled, "{}", cluster.log());
}

#[test]
fn what_is_locked_does_not_hold_the_load_open_and_is_loaded_when_it_is_free() {
    let (cluster, table) = cluster_with_tables("postgres", &[]);
    cluster.sql("BEGIN; LOCK TABLE t; PREPARE TRANSACTION 'holder'");
    let mut client = cluster.connect("postgres");
    let start = Instant::now();
    client.batch_execute(LOAD).unwrap();
    cluster.configure("pg_prewarm.autoprewarm_interval = 2");
    cluster.reload();
    let stats = LoadStats::wait_for_end(&mut client);
    assert!(start.elapsed() < Duration::from_secs(20));
    assert_eq!((stats.result(), stats.skipped), ("completed", 500));
    assert_eq!(skipped_locked(&mut client), 500);
    // Dumps go on, also while it is tried again.
    wait_for_lock_queue(&mut client);
    let dumps = "SELECT last_dump_time FROM pg_stat_autoprewarm";
    let dump = |client: &mut Client| value::<Option<std::time::SystemTime>>(client, dumps);
    for _ in 0..2 {
        let last = dump(&mut client);
        wait_until("a dump", || dump(&mut client) != last);
    }
    assert_eq!(LoadStats::get(&mut client).result(), "completed");

    let mark = cluster.log_end();
    cluster.sql("ROLLBACK PREPARED 'holder'");
    let stats = LoadStats::wait_for(&mut client, |stats| stats.skipped == 0);
    assert_eq!(stats.loaded + stats.cached, stats.total);
    assert_eq!(stats.result(), "completed");
    cluster.wait_for_log(
        mark,
        "autoprewarm prewarmed 500 blocks of relations that had been locked",
    );
    let cached = cluster.cached();
    assert!(table.first(500).all(|block| cached.contains(&block)));
    wait_until("a list with it", || cluster.lists(table));
}

#[test]
fn what_was_locked_and_is_dropped_then_is_counted_so() {
    let (cluster, _) = cluster_with_tables("app", &[]);
    let mut holder = cluster.connect("app");
    holder.batch_execute("BEGIN; LOCK TABLE t").unwrap();
    let mut client = cluster.connect("postgres");
    client.batch_execute(LOAD).unwrap();
    LoadStats::wait_for_end(&mut client);
    assert_eq!(skipped_locked(&mut client), 500);
    holder.batch_execute("DROP TABLE t; COMMIT").unwrap();
    wait_until("the later try", || skipped_locked(&mut client) == 0);
    let gone = "SELECT skipped_no_relation FROM pg_stat_autoprewarm";
    assert_eq!(value::<i64>(&mut client, gone), 500);
}

#[test]
fn another_load_takes_over_what_a_former_one_has_left_locked() {
    let (cluster, _) = cluster_with_tables("postgres", &[]);
    cluster.sql("BEGIN; LOCK TABLE t; PREPARE TRANSACTION 'holder'");
    let list = cluster.list();
    let mut client = cluster.connect("postgres");
    for _ in 0..2 {
        cluster.write_list(&list);
        client.batch_execute(LOAD).unwrap();
        let stats = LoadStats::wait_for_end(&mut client);
        assert_eq!((stats.result(), stats.skipped), ("completed", 500));
        // Its worker is ended.
        wait_for_lock_queue(&mut client);
    }
    cluster.sql("ROLLBACK PREPARED 'holder'");
    LoadStats::wait_for(&mut client, |stats| stats.skipped == 0);
}

#[test]
fn workers_leave_a_database_to_a_command_on_it_and_return_after_it() {
    let (cluster, _) = cluster_with_tables("app", &["pg_prewarm.autoprewarm_max_rate = 400"]);
    cluster.create_tablespace("elsewhere");
    for (database, command, is_loaded) in [
        ("app", "CREATE DATABASE copy TEMPLATE app", true),
        ("app", "ALTER DATABASE app RENAME TO other", true),
        (
            "other",
            "ALTER DATABASE other SET TABLESPACE elsewhere",
            false,
        ),
        ("other", "DROP DATABASE other", false),
    ] {
        let table = cluster.file_of(database, "t");
        cluster.stop(Shutdown::Fast);
        cluster.write_list(list_of(table.first(500)));
        let mark = cluster.log_end();
        cluster.start();
        let mut client = cluster.connect("postgres");
        LoadStats::wait_for(&mut client, |stats| stats.loaded > 0);
        let start = Instant::now();
        client.batch_execute(command).unwrap();
        let took = start.elapsed();
        assert!(took < Duration::from_secs(10), "{command}: {took:?}");
        let stats = LoadStats::wait_for_end(&mut client);
        assert_eq!(stats.result(), "completed", "{command}: {stats:?}");
        assert_eq!(stats.skipped == 0, is_loaded, "{command}: {stats:?}");
        if cluster.major() < 19 {
            assert!(!cluster.log_since(mark).contains("FATAL:"), "{command}");
        }
    }
}

#[test]
fn a_worker_that_waits_for_a_lock_leaves_its_database_to_a_command_on_it() {
    let (cluster, _) = cluster_with_tables("app", &[]);
    let mut client = cluster.connect("postgres");
    // Of a shared catalog, so that no session in the database is needed to lock it.
    let shared = Block {
        database: 0,
        tablespace: 1664,
        filenumber: value(
            &mut client,
            "SELECT pg_relation_filenode('pg_shdescription')",
        ),
        fork: 0,
        block: 0,
    };
    let mut holder = cluster.connect("postgres");
    holder
        .batch_execute("BEGIN; LOCK TABLE pg_shdescription")
        .unwrap();
    let table = cluster.file_of("app", "t");
    cluster.write_list(list_of([shared].into_iter().chain(table.first(500))));
    client.batch_execute(LOAD).unwrap();
    wait_for_lock_queue(&mut client);
    let start = Instant::now();
    client
        .batch_execute("ALTER DATABASE app RENAME TO other")
        .unwrap();
    let took = start.elapsed();
    assert!(took < Duration::from_secs(10), "{took:?}");
    holder.batch_execute("ROLLBACK").unwrap();
    LoadStats::wait_for(&mut client, |stats| {
        stats.result() == "completed" && stats.skipped == 0
    });
}

#[test]
fn no_worker_is_started_in_a_database_that_is_dropped_by_force() {
    for _ in 0..3 {
        let (cluster, _) = cluster_with_tables("app", &["pg_prewarm.autoprewarm_max_rate = 400"]);
        let mark = cluster.log_end();
        let mut client = cluster.connect("postgres");
        client.batch_execute(LOAD).unwrap();
        LoadStats::wait_for(&mut client, |stats| stats.loaded > 100);
        client
            .batch_execute("DROP DATABASE app WITH (FORCE)")
            .unwrap();
        let stats = LoadStats::wait_for_end(&mut client);
        assert_eq!(stats.result(), "completed", "{stats:?}");
        let log = cluster.log_since(mark);
        assert!(!log.contains("does not exist"), "{log}");
        assert!(!log.contains("could not connect"), "{log}");
    }
}

#[test]
fn a_load_without_a_worker_slot_fails_after_an_interval_and_is_retried_with_one() {
    let (cluster, table) = cluster_with_tables(
        "postgres",
        &[
            "max_worker_processes = 2",
            "max_logical_replication_workers = 0",
            "pg_prewarm.autoprewarm_interval = 2",
        ],
    );
    cluster.stop(Shutdown::Immediate);
    cluster.write_list(list_of(table.first(500)));
    let listed = cluster.listed();
    cluster.configure("shared_preload_libraries = ''");
    cluster.start();
    let slot = cluster.take_worker_slot();
    let mut client = cluster.connect("postgres");
    client
        .batch_execute("SELECT autoprewarm_start_worker()")
        .unwrap();
    assert!(value::<bool>(&mut client, "SELECT autoprewarm_wait('20s')"));
    // A list is written at once.
    let stats = LoadStats::wait_for(&mut client, |stats| stats.state != "dumping");
    assert_eq!(
        (stats.state.as_str(), stats.result()),
        ("load failed", "failed")
    );
    let message = "could not load blocks: no background worker slot is free";
    assert_eq!(
        value::<String>(&mut client, "SELECT last_error FROM pg_stat_autoprewarm"),
        message
    );
    // It is not tried in vain at each interval. Dumps go on, and keep what was not loaded.
    let new = cluster.table("new", 50);
    for _ in 0..2 {
        let time = "SELECT last_dump_time::text FROM pg_stat_autoprewarm";
        let last: Option<String> = value(&mut client, time);
        wait_until("a dump", || {
            value::<Option<String>>(&mut client, time) != last
        });
        assert!(listed.is_subset(&cluster.listed()));
    }
    assert!(cluster.listed().contains(&new.at(49)));
    let now = LoadStats::wait_for(&mut client, |stats| stats.state != "dumping");
    assert_eq!(now, stats);
    assert_eq!(cluster.log().matches(message).count(), 1);
    let carried = "SELECT blocks_carried FROM pg_stat_autoprewarm";
    assert!(value::<i64>(&mut client, carried) >= 400);

    drop(slot);
    let stats = LoadStats::wait_for(&mut client, |stats| stats.result() == "completed");
    assert_eq!(stats.skipped, 0, "{stats:?}");
    wait_until("a dump after it", || {
        value::<i64>(&mut client, carried) == 0 && listed.is_subset(&cluster.listed())
    });
}

#[test]
fn over_many_starts_without_a_worker_slot_the_list_keeps_what_was_not_loaded() {
    let (cluster, table) = cluster_with_tables(
        "postgres",
        &[
            "max_logical_replication_workers = 0",
            "pg_prewarm.autoprewarm_interval = 1",
        ],
    );
    cluster.stop(Shutdown::Immediate);
    cluster.write_list(list_of(table.first(500)));
    let listed = cluster.listed();
    cluster.configure("max_worker_processes = 1");
    for start in 0..4 {
        let mark = cluster.log_end();
        cluster.start();
        cluster.wait_for_log(mark, "no background worker slot is free");
        let new = cluster.table(&format!("new_{start}"), 50);
        // The leader writes its last list at the shutdown.
        cluster.stop(Shutdown::Fast);
        assert!(listed.is_subset(&cluster.listed()), "start {start}");
        assert!(cluster.listed().contains(&new.at(49)));
    }
    cluster.configure("max_worker_processes = 8");
    let mark = cluster.log_end();
    cluster.start();
    let (loaded, total) = cluster.wait_for_load(mark);
    assert_eq!(loaded, total);
}

#[test]
fn by_default_four_workers_load_and_a_parallel_query_gets_two() {
    let (cluster, _) = cluster_with_tables("postgres", &["pg_prewarm.autoprewarm_max_rate = 80"]);
    // Enough for many workers.
    let table = cluster.table("many", 10_000);
    cluster.stop(Shutdown::Fast);
    cluster.write_list("<<0>>\n");
    cluster.start();
    let mut client = cluster.connect("postgres");
    LoadStats::wait_for_end(&mut client);
    // It has a slot as well.
    wait_until("the launcher", || {
        let launcher = "SELECT EXISTS (SELECT FROM pg_stat_activity \
                        WHERE backend_type = 'logical replication launcher')";
        value(&mut client, launcher)
    });
    cluster.write_list(list_of(table.first(10_000)));
    client.batch_execute(LOAD).unwrap();
    let count = format!("SELECT count(*) {WORKERS}");
    wait_until("four workers", || value::<i64>(&mut client, &count) == 4);
    client
        .batch_execute(
            "SET parallel_setup_cost = 0; SET parallel_tuple_cost = 0; \
             SET min_parallel_table_scan_size = 0",
        )
        .unwrap();
    let plan: Vec<String> = client
        .query("EXPLAIN (ANALYZE) SELECT count(*) FROM free", &[])
        .unwrap()
        .iter()
        .map(|row| row.get(0))
        .collect();
    assert!(
        plan.iter().any(|line| line.contains("Workers Launched: 2")),
        "{plan:?}"
    );
    assert_eq!(value::<i64>(&mut client, &count), 4);
}

#[test]
fn on_a_standby_the_slot_of_the_logical_replication_launcher_is_left_as_well() {
    let (cluster, _) = cluster_with_tables("postgres", &["wal_level = replica"]);
    let table = cluster.table("many", 10_000);
    let standby = cluster.standby();
    standby.configure("pg_prewarm.autoprewarm_max_rate = 80");
    standby.write_list(list_of(table.first(10_000)));
    standby.start();
    let mut client = standby.connect("postgres");
    let count = format!("SELECT count(*) {WORKERS}");
    wait_until("four workers", || value::<i64>(&mut client, &count) == 4);
    // Another one would be there by now.
    std::thread::sleep(std::time::Duration::from_secs(2));
    assert_eq!(value::<i64>(&mut client, &count), 4);
}

#[test]
fn sixty_four_workers_load_at_the_same_time() {
    let (cluster, _) = cluster_with_tables(
        "postgres",
        &[
            "max_worker_processes = 80",
            "pg_prewarm.autoprewarm_workers = 64",
            "pg_prewarm.autoprewarm_max_rate = 80",
        ],
    );
    // So many that another worker is worth its start until there are 64.
    let tables: Vec<Block> = (0..200)
        .map(|number| cluster.table(&format!("t{number}"), 10))
        .collect();
    cluster.stop(Shutdown::Fast);
    let blocks = tables.into_iter().flat_map(|table| table.first(10));
    cluster.write_list(list_of(blocks));
    let mark = cluster.log_end();
    cluster.start();
    let mut client = cluster.connect("postgres");
    wait_until("64 workers", || {
        value::<i64>(&mut client, &format!("SELECT count(*) {WORKERS}")) == 64
    });
    cluster.configure("pg_prewarm.autoprewarm_max_rate = 0");
    cluster.reload();
    assert_eq!(cluster.wait_for_load(mark), (2000, 2000));
}

#[test]
fn a_load_leaves_two_worker_slots_to_others_and_begins_with_one() {
    let (cluster, _) = cluster_with_tables(
        "postgres",
        &[
            "max_logical_replication_workers = 0",
            "pg_prewarm.autoprewarm_workers = 8",
            "pg_prewarm.autoprewarm_max_rate = 80",
        ],
    );
    // Enough for many workers.
    let table = cluster.table("many", 4000);
    // The free slots beside the leader's, and how many workers there are then.
    for (slots, workers) in [(1, 1), (2, 1), (3, 1), (4, 2), (6, 4)] {
        cluster.stop(Shutdown::Fast);
        cluster.configure(&format!("max_worker_processes = {}", slots + 1));
        cluster.write_list(list_of(table.first(4000)));
        cluster.start();
        let mut client = cluster.connect("postgres");
        let count = format!("SELECT count(*) {WORKERS}");
        wait_until("the workers", || {
            value::<i64>(&mut client, &count) == workers
        });
        let start = Instant::now();
        while start.elapsed() < Duration::from_millis(1500) {
            assert_eq!(value::<i64>(&mut client, &count), workers, "{slots} slots");
        }
        assert_eq!(LoadStats::get(&mut client).state, "loading");
    }
    assert!(cluster.data(LIST).exists());
}
