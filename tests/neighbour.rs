//! A load does not wait for locks, makes others wait only briefly, does not hold back
//! vacuum, and continues after errors.

use std::time::{Duration, Instant};

use crate::common::{
    Block, Cluster, LoadStats, Shutdown, assert_holds_no_snapshot, list_of, signal, value,
    wait_until,
};

const WORKERS: &str = "FROM pg_stat_activity WHERE backend_type = 'autoprewarm worker'";

/// A cluster, not started, whose list names a table of 100 blocks and another that a
/// prepared transaction has locked.
fn cluster_with_locked_table() -> (Cluster, Block) {
    let cluster = Cluster::build()
        .setting("max_prepared_transactions = 2")
        .start();
    cluster.sql("CREATE EXTENSION pg_prewarm");
    let free = cluster.table("free", 100);
    let locked = cluster.table("locked", 100);
    cluster.sql("BEGIN; LOCK TABLE locked; PREPARE TRANSACTION 'holder'");
    cluster.stop(Shutdown::Fast);
    cluster.write_list(list_of(locked.first(100).chain(free.first(100))));
    (cluster, free)
}

#[test]
fn a_locked_relation_is_skipped_after_all_others_are_loaded() {
    let (cluster, free) = cluster_with_locked_table();
    let mark = cluster.log_end();
    cluster.start();
    assert_eq!(cluster.wait_for_load(mark), (100, 200));
    assert_eq!(
        cluster.wait_for_skipped(mark),
        "100 blocks: 100 of locked relations"
    );
    let cached = cluster.cached();
    assert!(free.first(100).all(|block| cached.contains(&block)));
    // Dumps continue.
    assert!(cluster.dump() > 100);
}

#[test]
fn a_relation_that_is_unlocked_soon_is_loaded() {
    let (cluster, _) = cluster_with_locked_table();
    let mark = cluster.log_end();
    cluster.start();
    wait_until("a worker", || {
        cluster.value(&format!("SELECT EXISTS (SELECT {WORKERS})"))
    });
    cluster.sql("ROLLBACK PREPARED 'holder'");
    assert_eq!(cluster.wait_for_load(mark), (200, 200));
}

#[test]
fn terminating_a_worker_that_waits_for_a_lock_costs_only_the_locked_relation() {
    let (cluster, _) = cluster_with_locked_table();
    cluster.configure("pg_prewarm.autoprewarm_workers = 1");
    let mark = cluster.log_end();
    cluster.start();
    // It has loaded the other table, and waits for the locked one.
    wait_until("a worker's end", || {
        cluster.value::<i64>(&format!(
            "SELECT count(pg_terminate_backend(pid)) {WORKERS}"
        )) > 0
    });
    assert_eq!(cluster.wait_for_load(mark), (100, 200));
    assert_eq!(
        cluster.wait_for_skipped(mark),
        "100 blocks: 100 of locked relations"
    );
    assert!(cluster.leader().is_some());
}

#[test]
fn a_block_at_which_two_workers_were_terminated_is_not_given_to_a_third() {
    let cluster = Cluster::build().start();
    cluster.sql("CREATE EXTENSION pg_prewarm");
    let table = cluster.table("t", 500);
    cluster.stop(Shutdown::Fast);
    cluster.write_list(list_of(table.first(500)));
    // One block in eight seconds.
    cluster.configure("pg_prewarm.autoprewarm_workers = 1\npg_prewarm.autoprewarm_max_rate = 1");
    cluster.start();
    let mut client = cluster.connect("postgres");
    // Each worker waits for the next block when it is terminated.
    let end_worker = format!(
        "SELECT count(pg_terminate_backend(pid, 60000)) {WORKERS} AND wait_event_type = 'Extension'"
    );
    let mut ended = 0;
    while value::<bool>(&mut client, "SELECT NOT autoprewarm_wait('10ms')") {
        ended += value::<i64>(&mut client, &end_worker);
        assert!(ended < 10, "{ended} workers were started");
    }
    let stats = LoadStats::get(&mut client);
    assert_eq!(stats.result(), "completed");
    assert!(ended >= 2, "{ended}");
    assert!(stats.skipped > 400, "{stats:?}");
}

#[test]
fn terminating_workers_that_make_progress_costs_nothing() {
    let cluster = Cluster::build().start();
    cluster.sql("CREATE EXTENSION pg_prewarm");
    let table = cluster.table("t", 500);
    cluster.stop(Shutdown::Fast);
    cluster.write_list(list_of(table.first(500)));
    // All blocks are in one chunk.
    cluster.configure("pg_prewarm.autoprewarm_workers = 1\npg_prewarm.autoprewarm_max_rate = 400");
    cluster.start();
    let mut client = cluster.connect("postgres");
    let mut loaded = 0;
    for _ in 0..3 {
        LoadStats::wait_for(&mut client, |stats| stats.loaded > loaded);
        client
            .batch_execute(&format!(
                "SELECT pg_terminate_backend(pid, 60000) {WORKERS}"
            ))
            .unwrap();
        // It may have made progress until then.
        loaded = LoadStats::get(&mut client).loaded;
    }
    cluster.configure("pg_prewarm.autoprewarm_max_rate = 0");
    cluster.reload();
    let stats = LoadStats::wait_for_end(&mut client);
    assert_eq!((stats.result(), stats.skipped), ("completed", 0));
}

#[test]
fn from_19_on_a_command_on_a_database_terminates_its_workers_and_the_load_continues_after_it() {
    let cluster = Cluster::build().start();
    if cluster.major() < 19 {
        println!("commands on a database cannot end its workers before 19: not run");
        return;
    }
    cluster.sql("CREATE EXTENSION pg_prewarm");
    cluster.create_tablespace("elsewhere");
    cluster.sql("CREATE DATABASE app");
    cluster.table_of_blocks("app", "t", 500);
    let mut terminated = 0;
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
        cluster.configure("pg_prewarm.autoprewarm_max_rate = 80");
        let mark = cluster.log_end();
        cluster.start();
        let mut client = cluster.connect("postgres");
        LoadStats::wait_for(&mut client, |stats| stats.loaded > 0);
        client.batch_execute(command).unwrap();
        cluster.configure("pg_prewarm.autoprewarm_max_rate = 0");
        cluster.reload();
        let stats = LoadStats::wait_for_end(&mut client);
        // The server logs that it terminated a worker, and nothing else.
        let log = cluster.log_since(mark);
        let fatal: Vec<_> = log.lines().filter(|line| line.contains("FATAL:")).collect();
        let is_ended = |line: &&str| line.contains("terminating background worker");
        assert!(fatal.iter().all(is_ended), "{fatal:?}");
        terminated += fatal.len();
        assert_eq!(stats.result(), "completed", "{command}: {stats:?}");
        assert_eq!(stats.skipped == 0, is_loaded, "{command}: {stats:?}");
    }
    // A worker that sees the command before the server ends it leaves by itself.
    assert!(terminated > 0);
}

#[test]
fn waiting_ddl_gets_its_lock_during_a_load() {
    // Twenty passes over the table, so that the load is still reading it.
    let cluster = Cluster::build().setting("shared_buffers = 128MB").start();
    let table = cluster.table("busy", 8000);
    // The promise is 100 ms, to which a busy test machine adds. If it is not kept, each load
    // shows it.
    let mut times = Vec::new();
    let is_kept = (0..3).any(|_| {
        cluster.stop(Shutdown::Fast);
        cluster.write_list(list_of(table.first(8000)));
        let mark = cluster.log_end();
        cluster.start();
        let mut client = cluster.connect("postgres");
        let mut longest = Duration::ZERO;
        let mut tries = 0;
        while !cluster.log_since(mark).contains("successfully prewarmed") || tries == 0 {
            let start = Instant::now();
            client
                .batch_execute("BEGIN; LOCK TABLE busy; ROLLBACK")
                .unwrap();
            longest = longest.max(start.elapsed());
            tries += 1;
        }
        assert_eq!(cluster.wait_for_load(mark), (8000, 8000));
        times.push(longest);
        longest < Duration::from_millis(500)
    });
    assert!(is_kept, "{times:?}");
}

#[test]
fn several_workers_share_one_database() {
    let cluster = Cluster::build()
        .setting("shared_buffers = 128MB")
        .setting("pg_prewarm.autoprewarm_workers = 3")
        .start();
    let big = cluster.table("big", 8000);
    cluster.stop(Shutdown::Fast);
    cluster.write_list(list_of(big.first(8000)));
    let mark = cluster.log_end();
    cluster.start();
    assert_eq!(cluster.wait_for_load(mark), (8000, 8000));
    // The load ends before the processes of its workers do.
    cluster.wait_for_log(mark, "\"autoprewarm worker\" (PID");
    let log = cluster.log_since(mark);
    let first_end = log.find("\"autoprewarm worker\" (PID").unwrap();
    let started = "starting background worker process \"autoprewarm worker\"";
    assert_eq!(log[..first_end].matches(started).count(), 3, "{log}");
}

#[test]
fn fewer_slots_than_workers_still_load_everything() {
    let cluster = Cluster::build()
        .setting("pg_prewarm.autoprewarm_workers = 8")
        .start();
    let table = cluster.table("t", 3000);
    cluster.stop(Shutdown::Fast);
    cluster.configure("max_worker_processes = 2\nmax_logical_replication_workers = 0");
    cluster.write_list(list_of(table.first(3000)));
    let mark = cluster.log_end();
    cluster.start();
    assert_eq!(cluster.wait_for_load(mark), (3000, 3000));
    assert!(
        !cluster
            .log_since(mark)
            .contains("waiting for a background worker slot")
    );
}

#[test]
fn an_unreadable_page_costs_one_block() {
    /// In either half of what is read at once, on both sides of the middle, and next to each
    /// other.
    const BAD: [u32; 8] = [0, 20, 111, 112, 300, 301, 310, 599];
    // The setting is for sessions that rescue data; a load ignores it.
    let cluster = Cluster::build()
        .checksums()
        .setting("zero_damaged_pages = on")
        .start();
    cluster.sql("CREATE EXTENSION pg_prewarm");
    let table = cluster.table("t", 600);
    let path: String = cluster.value("SELECT pg_relation_filepath('t')");
    cluster.stop(Shutdown::Fast);
    let path = cluster.data(&path);
    let mut file = std::fs::read(&path).unwrap();
    for bad in BAD {
        file[bad as usize * 8192 + 5000] ^= 1;
    }
    std::fs::write(&path, file).unwrap();
    let methods: &[&str] = match cluster.major() {
        ..18 => &[""],
        _ => &[
            "io_method = sync",
            "io_method = worker",
            "io_method = io_uring",
        ],
    };
    for method in methods {
        cluster.configure(method);
        cluster.write_list(list_of(table.first(600)));
        let mark = cluster.log_end();
        cluster.start_with_shared_buffers_in_use();
        assert_eq!(cluster.wait_for_load(mark), (592, 600), "{method}");
        assert_eq!(
            cluster.wait_for_skipped(mark),
            "8 blocks: 8 that could not be read"
        );
        // Those that were read together with an unreadable one were not cached before.
        let stats = LoadStats::get(&mut cluster.connect("postgres"));
        assert_eq!((stats.loaded, stats.cached), (592, 0), "{method}");
        let cached: Vec<_> = cluster
            .cached()
            .into_iter()
            .filter(|block| block.same_relation(&table) && block.fork == 0)
            .map(|block| block.block)
            .collect();
        assert_eq!(cached.len(), 592, "{method}");
        assert!(!BAD.iter().any(|bad| cached.contains(bad)), "{method}");
        cluster.stop(Shutdown::Immediate);
    }
}

#[test]
fn a_missing_segment_file_costs_only_its_relation() {
    let cluster = Cluster::build().start();
    let gone = cluster.table("gone", 50);
    let kept = cluster.table("kept", 50);
    let path: String = cluster.value("SELECT pg_relation_filepath('gone')");
    cluster.stop(Shutdown::Fast);
    std::fs::remove_file(cluster.data(&path)).unwrap();
    cluster.write_list(list_of(gone.first(50).chain(kept.first(50))));
    let mark = cluster.log_end();
    cluster.start();
    assert_eq!(cluster.wait_for_load(mark), (50, 100));
    assert_eq!(
        cluster.wait_for_skipped(mark),
        "50 blocks: 50 beyond the end of their relation"
    );
}

#[test]
fn a_worker_that_is_killed_restarts_the_server_which_then_loads_again() {
    let (mut cluster, _) = cluster_with_locked_table();
    cluster.expect_crash();
    let mark = cluster.log_end();
    cluster.start();
    let mut worker = None;
    wait_until("a worker", || {
        let mut client = cluster.connect("postgres");
        worker = value(&mut client, &format!("SELECT max(pid) {WORKERS}"));
        worker.is_some()
    });
    signal(worker.unwrap(), libc::SIGKILL);
    cluster.wait_for_log(mark, "all server processes terminated; reinitializing");
    assert_eq!(cluster.wait_for_load(mark), (100, 200));
}

#[test]
fn a_worker_that_waits_for_a_locked_relation_holds_no_snapshot() {
    let (cluster, _) = cluster_with_locked_table();
    cluster.start();
    let mut client = cluster.connect("postgres");
    let waiting = format!("{WORKERS} AND wait_event_type IN ('Extension', 'Lock')");
    assert_holds_no_snapshot(&mut client, &waiting);
}
