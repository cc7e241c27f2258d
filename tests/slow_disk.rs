//! What a load and a dump promise also applies while they wait for a slow disk: workers
//! exit when terminated, others get their locks, the list is not replaced before all of
//! it is loaded, no list is lost, and no process is prevented from writing the next
//! one.

use std::fs;
use std::path::Path;
use std::thread::{self, available_parallelism, sleep};
use std::time::{Duration, Instant};

use postgres::Client;

use crate::common::{
    Block, Builder, Cluster, Fault, Paused, Shutdown, SqlError, assert_holds_no_snapshot, error,
    list_of, signal, value, wait_until,
};

const BLOCKS: u32 = 4000;

/// A cluster, not started, whose list names a table that would take a minute to load.
/// Each block takes so many milliseconds.
fn cluster_with_slow_load(builder: Builder, milliseconds: u32) -> (Cluster, Block) {
    let cluster = builder.setting("shared_buffers = 64MB").start();
    let table = cluster.table("t", BLOCKS);
    cluster.stop(Shutdown::Fast);
    make_slow(&cluster, table, milliseconds);
    (cluster, table)
}

/// Makes the stopped server load the table slowly when it starts, with two workers.
fn make_slow(cluster: &Cluster, table: Block, milliseconds: u32) {
    cluster.configure("pg_prewarm.autoprewarm_workers = 2");
    if cluster.major() >= 17 {
        cluster.configure("io_combine_limit = 1");
    }
    cluster.write_list(list_of(table.first(BLOCKS)));
    cluster.slow_reads(milliseconds);
}

/// The I/O methods of the server, each as a line of its configuration.
fn io_methods(cluster: &Cluster) -> &'static [&'static str] {
    match cluster.major() {
        18.. => &["io_method = sync", "io_method = worker"],
        _ => &[""],
    }
}

const READING: &str = "FROM pg_stat_activity \
                       WHERE backend_type = 'autoprewarm worker' AND wait_event_type = 'IO'";

/// Waits until so many workers are reading at once, and returns the process ID of one.
fn wait_for_reading(client: &mut Client, workers: i64) -> i32 {
    let mut pid = None;
    wait_until("workers that read", || {
        let row = client
            .query_one(&format!("SELECT count(*), max(pid) {READING}"), &[])
            .unwrap();
        pid = row.get(1);
        row.get::<_, i64>(0) >= workers
    });
    pid.unwrap()
}

/// Starts the server, whose I/O workers take part in the load if there are any.
fn start(cluster: &Cluster, method: &str) -> Client {
    cluster.start();
    let mut client = cluster.connect("postgres");
    if method.ends_with("worker") {
        wait_for_reading(&mut client, 2);
        cluster.fill_buffers();
    }
    client
}

/// How many times are measured for a median.
const TRIES: usize = 7;

/// The median must be as short as promised; a busy test machine may add to some times.
fn assert_short(mut times: Vec<Duration>) {
    times.sort();
    assert!(
        times[times.len() / 2] < Duration::from_millis(100),
        "{times:?}"
    );
    assert!(
        times[times.len() - 1] < Duration::from_secs(10),
        "{times:?}"
    );
}

fn assert_the_rest_was_skipped_with_its_database(cluster: &Cluster, mark: usize) {
    let (loaded, total) = cluster.wait_for_load(mark);
    assert!(loaded < total, "{loaded}");
    assert_eq!(
        cluster.wait_for_skipped(mark),
        format!(
            "{0} blocks: {0} in databases that were dropped or accept no connections",
            total - loaded
        )
    );
}

#[test]
fn io_workers_take_part_in_a_load_once_sessions_fill_buffers_as_well() {
    let (cluster, _) = cluster_with_slow_load(Cluster::build(), 20);
    if cluster.major() < 18 {
        // There are none.
        return;
    }
    cluster.configure("io_method = worker");
    cluster.start();
    let mut client = cluster.connect("postgres");
    let io_worker_reads = "SELECT count(*) > 0 FROM pg_stat_activity \
                           WHERE backend_type = 'io worker' AND wait_event = 'DataFileRead'";
    wait_for_reading(&mut client, 2);
    // With more processors than workers, they take part at once.
    if available_parallelism().unwrap().get() <= 2 {
        // The first worker may have handed over blocks before the second had started.
        let mut without = 0;
        wait_until("no I/O worker that reads", || {
            let reads = value::<bool>(&mut client, io_worker_reads);
            without = if reads { 0 } else { without + 1 };
            without == 10
        });
        for _ in 0..50 {
            assert!(!value::<bool>(&mut client, io_worker_reads));
            sleep(Duration::from_millis(10));
        }
    }
    cluster.fill_buffers();
    wait_until("an I/O worker that reads", || {
        value(&mut client, io_worker_reads)
    });
    cluster.slow_reads(0);
}

#[test]
fn a_worker_that_is_terminated_exits_within_100_ms() {
    let (cluster, _) = cluster_with_slow_load(Cluster::build(), 20);
    for method in io_methods(&cluster) {
        cluster.configure(method);
        let mark = cluster.log_end();
        let mut client = start(&cluster, method);
        let mut times = Vec::new();
        for _ in 0..TRIES {
            let pid = wait_for_reading(&mut client, 2);
            let start = Instant::now();
            client
                .execute("SELECT pg_terminate_backend($1)", &[&pid])
                .unwrap();
            wait_until("the worker's end", || {
                !Path::new(&format!("/proc/{pid}")).exists()
            });
            times.push(start.elapsed());
        }
        assert_short(times);
        // The load continues with other workers.
        wait_for_reading(&mut client, 2);
        cluster.slow_reads(0);
        let (loaded, total) = cluster.wait_for_load(mark);
        assert!(loaded > 1000 && total == u64::from(BLOCKS), "{loaded}");
        cluster.stop(Shutdown::Immediate);
        cluster.slow_reads(20);
    }
}

#[test]
fn a_table_that_is_dropped_truncated_or_rewritten_during_its_load_is_skipped() {
    let (cluster, table) = cluster_with_slow_load(Cluster::build(), 20);
    for ddl in ["VACUUM FULL t", "TRUNCATE t", "DROP TABLE t"] {
        let mark = cluster.log_end();
        cluster.start();
        let mut client = cluster.connect("postgres");
        wait_for_reading(&mut client, 2);
        thread::scope(|scope| {
            let ddl = scope.spawn(|| cluster.sql(ddl));
            // This may have to read the table as well.
            wait_until("the lock", || {
                ddl.is_finished()
                    || value(
                        &mut client,
                        "SELECT EXISTS (SELECT FROM pg_locks WHERE granted \
                                        AND mode = 'AccessExclusiveLock' AND locktype = 'relation')",
                    )
            });
            cluster.slow_reads(0);
        });
        let (loaded, total) = cluster.wait_for_load(mark);
        assert!(loaded > 0 && loaded < total, "{ddl}: {loaded}");
        assert_eq!(
            cluster.wait_for_skipped(mark),
            format!(
                "{0} blocks: {0} of relations that were dropped or rewritten",
                total - loaded
            ),
            "{ddl}"
        );
        assert!(!cluster.log_since(mark).contains("WARNING"), "{ddl}");
        if ddl != "DROP TABLE t" {
            // Load again, with the current file.
            cluster.sql("TRUNCATE t; INSERT INTO t SELECT g, repeat('x', 700) FROM generate_series(1, 4000) g");
            let table = cluster.file_of("postgres", "t");
            cluster.stop(Shutdown::Fast);
            make_slow(&cluster, table, 20);
        }
    }
    assert!(
        !cluster
            .cached()
            .iter()
            .any(|block| block.same_relation(&table))
    );
}

#[test]
fn a_shutdown_during_a_load_takes_effect_at_once_and_keeps_the_list() {
    let (cluster, table) = cluster_with_slow_load(Cluster::build(), 20);
    let list = cluster.list();
    for how in [Shutdown::Smart, Shutdown::Fast, Shutdown::Immediate] {
        cluster.slow_reads(20);
        cluster.write_list(&list);
        cluster.start();
        wait_for_reading(&mut cluster.connect("postgres"), 2);
        let start = Instant::now();
        cluster.stop(how);
        assert!(start.elapsed() < Duration::from_secs(5), "{how:?}");
        assert_eq!(cluster.list(), list, "{how:?}");

        cluster.slow_reads(0);
        let mark = cluster.log_end();
        cluster.start();
        let all = u64::from(BLOCKS);
        assert_eq!(cluster.wait_for_load(mark), (all, all), "{how:?}");
        let cached = cluster.cached();
        assert!(table.first(BLOCKS).all(|block| cached.contains(&block)));
        cluster.stop(Shutdown::Immediate);
    }
}

#[test]
fn a_crash_during_a_load_is_followed_by_a_load_of_everything() {
    let (mut cluster, table) = cluster_with_slow_load(Cluster::build(), 20);
    cluster.expect_crash();
    let list = cluster.list();
    cluster.start();
    for victim in ["worker", "leader"] {
        let mut client = cluster.connect("postgres");
        let worker = wait_for_reading(&mut client, 2);
        let pid = match victim {
            "worker" => worker,
            _ => cluster.leader().unwrap(),
        };
        let mark = cluster.log_end();
        signal(pid, libc::SIGKILL);
        cluster.wait_for_log(mark, "all server processes terminated; reinitializing");
    }
    let mark = cluster.log_end();
    wait_for_reading(&mut cluster.connect("postgres"), 2);
    assert_eq!(cluster.list(), list);
    cluster.slow_reads(0);
    let all = u64::from(BLOCKS);
    assert_eq!(cluster.wait_for_load(mark), (all, all));
    let cached = cluster.cached();
    assert!(table.first(BLOCKS).all(|block| cached.contains(&block)));
}

#[test]
fn a_worker_slot_that_becomes_free_during_a_load_is_used() {
    let (cluster, _) = cluster_with_slow_load(
        Cluster::build()
            .setting("max_worker_processes = 5")
            .setting("max_logical_replication_workers = 0"),
        20,
    );
    cluster.configure("pg_prewarm.autoprewarm_workers = 1");
    let mark = cluster.log_end();
    cluster.start();
    let mut client = cluster.connect("postgres");
    wait_for_reading(&mut client, 1);
    // The leader and a worker have two slots, and a query the third: two are left.
    let slot = cluster.take_worker_slot();
    cluster.configure("pg_prewarm.autoprewarm_workers = 3");
    cluster.reload();
    sleep(Duration::from_millis(1500));
    let workers = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'autoprewarm worker'";
    assert_eq!(value::<i64>(&mut client, workers), 1);

    drop(slot);
    wait_for_reading(&mut client, 2);
    cluster.slow_reads(0);
    let all = u64::from(BLOCKS);
    assert_eq!(cluster.wait_for_load(mark), (all, all));
    // A worker was running all the time.
    assert!(
        !cluster
            .log_since(mark)
            .contains("waiting for a background worker slot")
    );
}

#[test]
fn a_table_that_is_locked_again_and_again_is_loaded() {
    let (cluster, _) = cluster_with_slow_load(Cluster::build(), 20);
    let mark = cluster.log_end();
    cluster.start();
    let mut client = cluster.connect("postgres");
    // Longer than a load waits for a relation that stays locked.
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(5) {
        wait_for_reading(&mut client, 1);
        client.batch_execute("BEGIN; LOCK TABLE t; COMMIT").unwrap();
    }
    cluster.slow_reads(0);
    let all = u64::from(BLOCKS);
    assert_eq!(cluster.wait_for_load(mark), (all, all));
}

#[test]
fn a_cancel_costs_no_block() {
    let (cluster, _) = cluster_with_slow_load(Cluster::build(), 20);
    let mark = cluster.log_end();
    cluster.start();
    let mut client = cluster.connect("postgres");
    for _ in 0..5 {
        let pid = wait_for_reading(&mut client, 2);
        client
            .execute("SELECT pg_cancel_backend($1)", &[&pid])
            .unwrap();
    }
    // A cancel while a worker waits for a lock costs nothing either.
    client.batch_execute("BEGIN; LOCK TABLE t").unwrap();
    for _ in 0..10 {
        client
            .execute(
                "SELECT pg_cancel_backend(pid) FROM pg_stat_activity \
                 WHERE backend_type = 'autoprewarm worker'",
                &[],
            )
            .unwrap();
        sleep(Duration::from_millis(20));
    }
    client.batch_execute("COMMIT").unwrap();
    cluster.slow_reads(0);
    let all = u64::from(BLOCKS);
    assert_eq!(cluster.wait_for_load(mark), (all, all));
    let log = cluster.log_since(mark);
    assert!(!log.contains("WARNING") && !log.contains("ERROR"), "{log}");
}

#[test]
fn workers_read_one_table_in_parallel_and_do_not_hold_back_vacuum() {
    let (cluster, _) = cluster_with_slow_load(Cluster::build(), 20);
    for method in io_methods(&cluster) {
        cluster.configure(method);
        let mut client = start(&cluster, method);
        wait_for_reading(&mut client, 2);
        let locks = "SELECT count(DISTINCT pid) FROM pg_locks \
                     WHERE relation = 't'::regclass AND mode = 'AccessShareLock' AND granted \
                       AND pid <> pg_backend_pid()";
        wait_until("two workers with a lock on the table", || {
            value::<i64>(&mut client, locks) == 2
        });
        assert_holds_no_snapshot(&mut client, READING);
        let xids = format!("SELECT count(backend_xid) {READING}");
        assert_eq!(value::<i64>(&mut client, &xids), 0);
        cluster.stop(Shutdown::Immediate);
    }
}

#[test]
fn the_snapshot_with_which_a_relation_was_found_is_released_before_it_is_read() {
    let (cluster, _) = cluster_with_slow_load(Cluster::build(), 1000);
    cluster.start();
    let mut client = cluster.connect("postgres");
    // The first read: later turns know the relation already.
    wait_for_reading(&mut client, 2);
    assert_holds_no_snapshot(&mut client, READING);
}

#[test]
fn waiting_ddl_gets_its_lock_within_100_ms() {
    let (cluster, _) = cluster_with_slow_load(Cluster::build(), 10);
    for method in io_methods(&cluster) {
        cluster.configure(method);
        let mark = cluster.log_end();
        let mut client = start(&cluster, method);
        let mut times = Vec::new();
        for _ in 0..TRIES {
            wait_for_reading(&mut client, 2);
            let start = Instant::now();
            client.batch_execute("BEGIN; LOCK TABLE t; COMMIT").unwrap();
            times.push(start.elapsed());
        }
        assert_short(times);
        cluster.slow_reads(0);
        // The chunks that were set aside are loaded as well.
        let all = u64::from(BLOCKS);
        assert_eq!(cluster.wait_for_load(mark), (all, all));
        cluster.stop(Shutdown::Immediate);
        cluster.slow_reads(10);
    }
}

#[test]
fn a_database_that_is_dropped_with_force_during_a_load_is_skipped() {
    let cluster = Cluster::build().setting("shared_buffers = 64MB").start();
    cluster.sql("CREATE DATABASE other");
    let table = cluster.table_of_blocks("other", "t", BLOCKS);
    cluster.stop(Shutdown::Fast);
    make_slow(&cluster, table, 20);
    let mark = cluster.log_end();
    cluster.start();
    wait_for_reading(&mut cluster.connect("postgres"), 2);
    let leader = cluster.leader();
    cluster.sql("DROP DATABASE other WITH (FORCE)");
    assert_the_rest_was_skipped_with_its_database(&cluster, mark);
    assert_eq!(cluster.leader(), leader);
    // No worker was started in it again.
    let log = cluster.log_since(mark);
    assert!(!log.contains("could not connect"), "{log}");
    assert!(!log.contains("does not exist"), "{log}");
    assert!(log.matches("FATAL").count() <= 4, "{log}");
}

/// A primary and its standby, which is not started and whose list names a table of
/// `database` that would take a minute to load.
fn standby_with_slow_load(database: &str) -> (Cluster, Cluster) {
    let primary = Cluster::build().setting("shared_buffers = 64MB").start();
    if database != "postgres" {
        primary.sql(&format!("CREATE DATABASE {database}"));
    }
    let table = primary.table_of_blocks(database, "t", BLOCKS);
    // Later checkpoints write, and so replay, only what has changed.
    primary.sql_in(database, "VACUUM t");
    let standby = primary.standby();
    make_slow(&standby, table, 20);
    (primary, standby)
}

fn wait_for_replay(primary: &Cluster, standby: &mut Client) {
    let end: String = primary.value("SELECT pg_current_wal_lsn()::text");
    let sql = format!("SELECT pg_last_wal_replay_lsn() >= '{end}'");
    // Replay may cancel a query.
    wait_until("the standby", || {
        standby.query_one(&sql, &[]).is_ok_and(|row| row.get(0))
    });
}

#[test]
fn dropping_a_table_on_the_primary_ends_its_load_on_a_standby() {
    let (primary, standby) = standby_with_slow_load("postgres");
    standby.configure("max_standby_streaming_delay = 0");
    let mark = standby.log_end();
    standby.start();
    let mut client = standby.connect("postgres");
    wait_for_reading(&mut client, 2);
    primary.sql("DROP TABLE t");
    wait_for_replay(&primary, &mut client);
    let (loaded, total) = standby.wait_for_load(mark);
    assert_eq!(
        standby.wait_for_skipped(mark),
        format!(
            "{0} blocks: {0} of relations that were dropped or rewritten",
            total - loaded
        )
    );
}

#[test]
fn replay_on_a_standby_costs_a_load_no_block() {
    let (primary, standby) = standby_with_slow_load("postgres");
    let list = standby.list();
    for delay in ["0", "30s"] {
        standby.configure(&format!("max_standby_streaming_delay = {delay}"));
        standby.slow_reads(20);
        let mark = standby.log_end();
        standby.start();
        let mut client = standby.connect("postgres");
        wait_for_replay(&primary, &mut client);
        for _ in 0..5 {
            wait_for_reading(&mut client, 1);
            primary.sql("BEGIN; LOCK TABLE t; COMMIT");
            let start = Instant::now();
            wait_for_replay(&primary, &mut client);
            // Replay that waits for a load waits for the whole delay.
            assert!(start.elapsed() < Duration::from_secs(15), "{delay}");
        }
        // Replay of this waits for pins, not for locks.
        primary.sql("DELETE FROM t WHERE id IN (SELECT id FROM t ORDER BY id LIMIT 20)");
        primary.sql("VACUUM t");
        wait_for_replay(&primary, &mut client);
        standby.slow_reads(0);
        let all = u64::from(BLOCKS);
        assert_eq!(standby.wait_for_load(mark), (all, all), "{delay}");
        let log = standby.log_since(mark);
        for sign in ["WARNING", "FATAL"] {
            assert!(!log.contains(sign), "{log}");
        }
        standby.stop(Shutdown::Immediate);
        standby.write_list(&list);
    }
}

#[test]
fn a_database_that_is_dropped_on_the_primary_is_skipped_on_a_standby() {
    let (primary, standby) = standby_with_slow_load("other");
    let mark = standby.log_end();
    standby.start();
    wait_for_reading(&mut standby.connect("postgres"), 2);
    let leader = standby.leader();
    primary.sql("DROP DATABASE other");
    assert_the_rest_was_skipped_with_its_database(&standby, mark);
    assert_eq!(standby.leader(), leader);
    // Only of the two workers, if they have not left the database before replay ended them.
    let log = standby.log_since(mark);
    assert!(log.matches("FATAL").count() <= 2, "{log}");
}

/// A cluster in which flushing a list takes as long as the test sets.
fn cluster_that_flushes() -> Cluster {
    let cluster = Cluster::build().setting("fsync = on").create();
    cluster.set_fault(Fault::FlushDelay, 0);
    cluster.start();
    cluster.sql("CREATE EXTENSION pg_prewarm");
    // It looks for a list first.
    cluster.wait_for_leader();
    cluster
}

#[test]
fn a_timeout_while_a_dump_is_flushed_lets_other_sessions_dump() {
    let cluster = cluster_that_flushes();
    // Whether the message about the dump goes to the client or to the log. It is
    // reported as soon as the list is flushed.
    for settings in [
        "SET client_min_messages = debug1; SET log_min_messages = warning",
        "SET client_min_messages = notice; SET log_min_messages = debug1",
    ] {
        let mut client = cluster.connect("postgres");
        client
            .batch_execute(&format!("{settings}; SET statement_timeout = '200ms'"))
            .unwrap();
        cluster.set_fault(Fault::FlushDelay, 600);
        assert_eq!(
            error(&mut client, "SELECT autoprewarm_dump_now()"),
            SqlError::new("57014", "canceling statement due to statement timeout"),
            "{settings}"
        );
        cluster.set_fault(Fault::FlushDelay, 0);
        let mut other = cluster.connect("postgres");
        let dumped = other.query_one("SELECT autoprewarm_dump_now()", &[]);
        assert!(dumped.is_ok(), "{settings}: {dumped:?}");
        // The timeout is still in force for this statement.
        wait_until("no timeout", || {
            client.batch_execute("RESET statement_timeout").is_ok()
        });
        client
            .batch_execute("SELECT autoprewarm_dump_now()")
            .unwrap();
    }
}

/// Whether a process, which is stopped, was sent a signal.
fn is_pending(pid: i32, signal: i32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let pending = status
        .lines()
        .find_map(|line| line.strip_prefix("ShdPnd:"))
        .unwrap();
    u64::from_str_radix(pending.trim(), 16).unwrap() & (1 << (signal - 1)) != 0
}

#[test]
fn a_fast_shutdown_during_a_sessions_dump_is_followed_by_the_leaders_dump() {
    let cluster = cluster_that_flushes();
    cluster.sql("CREATE EXTENSION pg_buffercache");
    const FLUSH: Duration = Duration::from_secs(4);
    cluster.set_fault(Fault::FlushDelay, FLUSH.as_millis() as i64);
    let mut client = cluster.connect("postgres");
    let pid: i32 = value(&mut client, "SELECT pg_backend_pid()");
    let dump = thread::spawn(move || {
        client
            .batch_execute("SELECT autoprewarm_dump_now()")
            .is_ok()
    });
    // The checksum is the last line.
    wait_until("a list that is about to be flushed", || {
        fs::read_to_string(cluster.data("autoprewarm.blocks.tmp"))
            .is_ok_and(|list| list.contains("# crc32c "))
    });
    // It does not continue before it is told to exit, whenever that is.
    let session = Paused::new(pid);
    let flushed = Instant::now() + FLUSH;
    // These blocks are not in the list.
    let table = cluster.table("t", 100);
    let cached = cluster.cached();
    assert!(table.first(100).all(|block| cached.contains(&block)));
    cluster.set_fault(Fault::FlushDelay, 0);
    // Then it exits at once, and the leader need not wait for it for long.
    sleep(flushed.saturating_duration_since(Instant::now()));
    let mark = cluster.log_end();
    thread::scope(|scope| {
        scope.spawn(|| cluster.stop(Shutdown::Fast));
        wait_until("the session's SIGTERM", || is_pending(pid, libc::SIGTERM));
        drop(session);
    });
    assert!(!dump.join().unwrap());
    let log = cluster.log_since(mark);
    let leader = |line: &&str| line.starts_with("autoprewarm leader");
    let said: Vec<_> = log.lines().filter(leader).collect();
    assert!(
        said.iter().any(|line| line.contains("wrote block details")),
        "{said:?}"
    );
    assert!(cached.is_subset(&cluster.listed()));
}
