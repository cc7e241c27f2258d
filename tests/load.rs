//! Loads of relations that changed after the dump, and what happens to the list if a
//! load does not complete.

use std::collections::BTreeSet;
use std::fs;

use postgres::Client;

use crate::common::{
    Block, Cluster, Fault, LoadStats, Shutdown, list_of, signal, value, wait_until,
};

/// Starts the stopped cluster with that list, and waits for the load to end. Returns
/// how many blocks were loaded, how many the list has, and the log line about skipped
/// blocks.
fn load(cluster: &Cluster, list: &str) -> (u64, u64, String) {
    cluster.write_list(list);
    let mark = cluster.log_end();
    cluster.start();
    let (loaded, total) = cluster.wait_for_load(mark);
    let skipped = if loaded < total {
        cluster.wait_for_skipped(mark)
    } else {
        String::new()
    };
    (loaded, total, skipped)
}

#[test]
fn relations_that_changed_after_the_dump_are_skipped_and_counted() {
    let cluster = Cluster::build().start();
    cluster.create_tablespace("space");
    let kept = cluster.table("kept", 5);
    let dropped = cluster.table("dropped", 10);
    let truncated = cluster.table("truncated", 20);
    let rewritten = cluster.table("rewritten", 30);
    let moved = cluster.table("moved", 40);
    let shortened = cluster.table("shortened", 50);
    cluster.sql(
        "DROP TABLE dropped; TRUNCATE truncated; ALTER TABLE moved SET TABLESPACE space; \
         DELETE FROM shortened WHERE id > 20",
    );
    cluster.sql("VACUUM FULL rewritten");
    cluster.sql("VACUUM shortened");
    assert_eq!(
        cluster.value::<i64>("SELECT pg_relation_size('shortened') / 8192"),
        20
    );
    cluster.stop(Shutdown::Fast);

    let list = list_of(
        kept.first(5)
            .chain(dropped.first(10))
            .chain(truncated.first(20))
            .chain(rewritten.first(30))
            .chain(moved.first(40))
            .chain(shortened.first(50))
            .chain(Block { fork: 2, ..kept }.first(1)),
    );
    let (loaded, total, skipped) = load(&cluster, &list);
    assert_eq!((loaded, total), (25, 156));
    assert_eq!(
        skipped,
        "131 blocks: 100 of relations that were dropped or rewritten, \
         31 beyond the end of their relation"
    );
    let cached = cluster.cached();
    for block in kept.first(5).chain(shortened.first(20)) {
        assert!(cached.contains(&block), "{block:?}");
    }
}

#[test]
fn a_record_loads_only_the_relation_of_its_own_database_and_tablespace() {
    let cluster = Cluster::build().start();
    cluster.create_tablespace("space");
    cluster.sql("CREATE DATABASE other");
    let here = cluster.table("here", 10);
    let there = cluster.value("SELECT oid FROM pg_tablespace WHERE spcname = 'space'");
    let other = cluster.value("SELECT oid FROM pg_database WHERE datname = 'other'");
    cluster.stop(Shutdown::Fast);

    let list = list_of(
        Block {
            tablespace: there,
            ..here
        }
        .first(3)
        .chain(
            Block {
                database: other,
                ..here
            }
            .first(4),
        )
        .chain(
            Block {
                database: 0,
                ..here
            }
            .first(5),
        )
        .chain(here.first(10).skip(9)),
    );
    let (loaded, total, skipped) = load(&cluster, &list);
    assert_eq!((loaded, total), (1, 13));
    assert_eq!(
        skipped,
        "12 blocks: 12 of relations that were dropped or rewritten"
    );
    let cached: BTreeSet<_> = cluster
        .cached()
        .into_iter()
        .filter(|block| block.filenumber == here.filenumber)
        .collect();
    assert_eq!(cached, BTreeSet::from([here.at(9)]));
}

#[test]
fn a_load_evicts_nothing_and_stops_when_the_cache_is_full() {
    let cluster = Cluster::build().setting("shared_buffers = 8MB").start();
    cluster.sql("CREATE EXTENSION pg_buffercache");
    let big = cluster.table("big", 2000);
    cluster.stop(Shutdown::Fast);
    let (loaded, total, skipped) = load(&cluster, &list_of(big.first(2000)));
    assert_eq!(total, 2000);
    assert!((700..=1024).contains(&loaded), "{loaded}");
    assert_eq!(
        skipped,
        format!(
            "{0} blocks: {0} because there was no free buffer",
            total - loaded
        )
    );
    // Buffers of relations that were dropped are free. The session of the test takes
    // them, not other blocks of the list.
    let cached = cluster
        .cached_without_extension()
        .into_iter()
        .filter(|block| block.same_relation(&big) && block.fork == 0)
        .count() as u64;
    assert!(cached <= loaded && cached + 300 > loaded, "{cached}");
}

/// A running cluster of 19 or later with 2048 buffers. `None` before 19, since free
/// buffers are on a list there.
fn cluster_without_free_list() -> Option<Cluster> {
    let cluster = Cluster::build().setting("shared_buffers = 16MB").start();
    if cluster.major() < 19 {
        println!("before 19 free buffers are on a list, which all other tests use: not run");
        return None;
    }
    cluster.sql("CREATE EXTENSION pg_prewarm; CREATE EXTENSION pg_buffercache");
    Some(cluster)
}

/// Loads a list on demand.
pub fn load_now(cluster: &Cluster, client: &mut Client, list: String) -> LoadStats {
    cluster.write_list(list);
    client
        .batch_execute("SELECT autoprewarm_load_now()")
        .unwrap();
    let stats = LoadStats::wait_for_end(client);
    assert_eq!(stats.result(), "completed");
    stats
}

#[test]
fn from_19_on_a_load_finds_free_buffers_among_used_ones_and_evicts_none_of_them() {
    let Some(cluster) = cluster_without_free_list() else {
        return;
    };
    let missing = cluster.table("missing", 600);
    let used = cluster.table("used", 1400);
    cluster.stop(Shutdown::Fast);
    cluster.write_list("<<0>>\n");
    cluster.start();
    let mut client = cluster.connect("postgres");
    // The two tables and the catalogs do not fit together, so the clock hand goes
    // round.
    for call in ["pg_prewarm('used')", "pg_prewarm('missing')"] {
        value::<i64>(&mut client, &format!("SELECT {call}"));
    }
    client
        .batch_execute("SELECT pg_buffercache_evict_relation('missing')")
        .unwrap();
    for _ in 0..3 {
        value::<i64>(&mut client, "SELECT pg_prewarm('used')");
    }
    let free = "SELECT count(*) FROM pg_buffercache WHERE relfilenode IS NULL";
    let free: i64 = value(&mut client, free);
    assert!(free > 200, "{free}");
    let is_used = |block: &Block| block.same_relation(&used);
    let before: Vec<_> = cluster.cached().into_iter().filter(is_used).collect();

    let stats = load_now(&cluster, &mut client, list_of(missing.first(600)));
    // A load leaves a reserve, and the buffers after a catalog's block that could be
    // evicted. The query takes some as well.
    let loaded = stats.loaded;
    assert!((free / 2..=free).contains(&loaded), "{loaded} of {free}");
    let cached = cluster.cached();
    let lost = before.iter().filter(|block| !cached.contains(block));
    assert_eq!(lost.count(), 0);
}

#[test]
fn unlogged_relations_are_listed_unless_a_crash_could_follow_the_dump() {
    let cluster = Cluster::build()
        .setting("pg_prewarm.autoprewarm_interval = 1")
        .start();
    cluster.sql("CREATE EXTENSION pg_prewarm; CREATE UNLOGGED TABLE fleeting AS SELECT 1 AS id");
    let fleeting = cluster.file_of("postgres", "fleeting");
    let is_listed = || {
        cluster
            .listed()
            .iter()
            .any(|block| block.same_relation(&fleeting))
    };

    let logged = cluster.table("logged", 1);
    wait_until("a periodic dump", || {
        cluster.data(crate::common::LIST).exists()
            && cluster
                .listed()
                .iter()
                .any(|block| block.same_relation(&logged))
    });
    assert!(!is_listed());

    cluster.configure("pg_prewarm.autoprewarm_interval = 0");
    cluster.reload();
    wait_until("the reload", || {
        cluster.value::<String>("SHOW pg_prewarm.autoprewarm_interval") == "0"
    });
    // A periodic dump that is running may still end after the first of these.
    wait_until("a dump on demand", || {
        cluster.dump();
        is_listed()
    });

    cluster.sql("DROP EXTENSION pg_prewarm");
    std::fs::remove_file(cluster.data(crate::common::LIST)).unwrap();
    cluster.stop(Shutdown::Fast);
    assert!(is_listed());
    let mark = cluster.log_end();
    cluster.start();
    cluster.wait_for_load(mark);
    assert!(
        cluster
            .cached()
            .iter()
            .any(|block| block.same_relation(&fleeting))
    );
}

#[test]
fn a_crash_restart_loads_again() {
    let mut cluster = Cluster::build().start();
    cluster.expect_crash();
    let kept = cluster.table("kept", 10);
    let mark = cluster.log_end();
    cluster.restart();
    cluster.wait_for_load(mark);

    let postmaster = cluster.postmaster();
    for kill_leader in [false, true] {
        let mut client = cluster.connect("postgres");
        let victim = if kill_leader {
            cluster.leader().unwrap()
        } else {
            value(&mut client, "SELECT pg_backend_pid()")
        };
        let mark = cluster.log_end();
        signal(victim, libc::SIGKILL);
        cluster.wait_for_log(mark, "all server processes terminated; reinitializing");
        cluster.wait_for_load(mark);
        assert_eq!(cluster.postmaster(), postmaster);
        let cached = cluster.cached();
        assert!(kept.first(10).all(|block| cached.contains(&block)));
        wait_until("a new leader", || cluster.leader().is_some());
    }
}

#[test]
fn a_leader_that_was_terminated_can_be_started_again_and_loads_nothing() {
    let cluster = Cluster::build().start();
    cluster.sql("CREATE EXTENSION pg_prewarm");
    wait_until("the leader", || cluster.leader().is_some());
    let first = cluster.leader().unwrap();
    let mark = cluster.log_end();
    cluster.sql(&format!("SELECT pg_terminate_backend({first})"));
    wait_until("the leader's end", || cluster.leader().is_none());
    let list = cluster.list();
    cluster.sql("SELECT autoprewarm_start_worker()");
    wait_until("the second leader", || cluster.leader().is_some());
    assert_ne!(cluster.leader(), Some(first));
    cluster.stop(Shutdown::Fast);
    assert!(!cluster.log_since(mark).contains("successfully prewarmed"));
    assert_ne!(cluster.list(), "<<0>>\n");
    assert!(!list.is_empty());
}

/// A cluster and its list. The load does not end, since there is no slot for a worker.
fn cluster_without_slots() -> (Cluster, String) {
    let cluster = Cluster::build()
        .setting("pg_prewarm.autoprewarm_interval = 30")
        .start();
    let table = cluster.table("loaded", 100);
    cluster.sql("CREATE EXTENSION pg_prewarm");
    cluster.stop(Shutdown::Fast);
    cluster.configure("max_worker_processes = 1\nmax_logical_replication_workers = 0");
    let list = list_of(table.first(100));
    cluster.write_list(&list);
    let mark = cluster.log_end();
    cluster.start();
    cluster.wait_for_log(mark, "autoprewarm is waiting for a background worker slot");
    (cluster, list)
}

#[test]
fn a_shutdown_during_a_load_keeps_the_list() {
    let (cluster, list) = cluster_without_slots();
    for how in [Shutdown::Smart, Shutdown::Fast, Shutdown::Immediate] {
        cluster.stop(how);
        assert_eq!(cluster.list(), list, "{how:?}");
        // The list is still complete.
        cluster.configure("max_worker_processes = 8");
        let mark = cluster.log_end();
        cluster.start();
        assert_eq!(cluster.wait_for_load(mark), (100, 100), "{how:?}");

        cluster.stop(Shutdown::Immediate);
        cluster.configure("max_worker_processes = 1");
        cluster.write_list(&list);
        let mark = cluster.log_end();
        cluster.start();
        cluster.wait_for_log(mark, "autoprewarm is waiting for a background worker slot");
    }
}

#[test]
fn nothing_is_dumped_before_the_load_has_ended() {
    let cluster = Cluster::build()
        .setting("pg_prewarm.autoprewarm_interval = 1")
        .start();
    let table = cluster.table("loaded", 1000);
    cluster.sql("CREATE EXTENSION pg_prewarm");
    cluster.stop(Shutdown::Fast);
    // Ten blocks a second.
    cluster.configure("pg_prewarm.autoprewarm_max_rate = 80");
    let list = list_of(table.first(1000));
    cluster.write_list(&list);
    cluster.start();
    let mut client = cluster.connect("postgres");
    LoadStats::wait_for(&mut client, |stats| stats.loaded > 0);
    let refused = crate::common::error(&mut client, "SELECT autoprewarm_dump_now()");
    assert_eq!(
        refused.message,
        format!(
            "could not perform block dump because dump file is being used by PID {}",
            cluster.leader().unwrap()
        )
    );
    // Some intervals.
    std::thread::sleep(std::time::Duration::from_secs(5));
    assert_eq!(cluster.list(), list);
}

#[test]
fn terminating_the_leader_during_a_load_keeps_the_list_from_the_next_one_as_well() {
    let (cluster, list) = cluster_without_slots();
    let leader = cluster.leader().unwrap();
    let mark = cluster.log_end();
    cluster.sql(&format!("SELECT pg_terminate_backend({leader})"));
    wait_until("its end", || cluster.leader().is_none());
    assert_eq!(cluster.list(), list);

    // The next leader loads again, and does not dump.
    cluster.sql("SELECT autoprewarm_start_worker()");
    cluster.wait_for_log(mark, "autoprewarm is waiting for a background worker slot");
    std::thread::sleep(std::time::Duration::from_secs(2));
    assert_eq!(cluster.list(), list);
    cluster.stop(Shutdown::Fast);
    assert_eq!(cluster.list(), list);
}

#[test]
fn time_limits_of_sessions_do_not_end_a_load_or_a_dump() {
    let cluster = Cluster::build()
        .setting("shared_buffers = 256MB")
        .setting("pg_prewarm.autoprewarm_interval = 1")
        .start();
    let table = cluster.table("t", 10_000);
    cluster.stop(Shutdown::Fast);
    cluster.configure("statement_timeout = 5\nlock_timeout = 5");
    if cluster.major() >= 17 {
        cluster.configure("transaction_timeout = 5");
    }
    // Long enough that all limits expire while it reads.
    let gone = Block {
        filenumber: 4_000_000_000,
        ..table
    };
    let mark = cluster.log_end();
    let (loaded, total, _) = load(
        &cluster,
        &list_of(table.first(10_000).chain(gone.first(300_000))),
    );
    assert_eq!((loaded, total), (10_000, 310_000));
    // The limits are in effect for this session as well.
    cluster.configure("statement_timeout = 0\nlock_timeout = 0");
    if cluster.major() >= 17 {
        cluster.configure("transaction_timeout = 0");
    }
    cluster.reload();
    let mut client = cluster.connect("postgres");
    let leader = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'autoprewarm leader'";
    let before: i32 = value(&mut client, leader);
    wait_until("a dump", || !cluster.list().contains(",4000000000,"));
    assert_eq!(value::<i32>(&mut client, leader), before);
    // They do terminate sessions.
    let log = cluster.log_since(mark);
    let mut ours = log.lines().filter(|line| line.starts_with("autoprewarm"));
    assert!(!ours.any(|line| line.contains("FATAL")), "{log}");
}

#[test]
fn exit_on_error_terminates_no_load_and_no_leader() {
    let cluster = Cluster::build()
        .checksums()
        .setting("exit_on_error = on")
        .setting("pg_prewarm.autoprewarm_interval = 1")
        .create();
    cluster.set_fault(Fault::ListRename, 0);
    cluster.start();
    let table = cluster.table("t", 600);
    let path: String = cluster.value("SELECT pg_relation_filepath('t')");
    cluster.stop(Shutdown::Fast);
    let path = cluster.data(&path);
    let mut file = fs::read(&path).unwrap();
    file[300 * 8192 + 5000] ^= 1;
    fs::write(&path, file).unwrap();

    cluster.set_fault(Fault::ListRename, libc::EIO.into());
    let (loaded, total, skipped) = load(&cluster, &list_of(table.first(600)));
    assert_eq!(
        (loaded, total, skipped.as_str()),
        (599, 600, "1 block: 1 that could not be read")
    );
    // A list that cannot be written does not terminate the leader either.
    let leader = cluster.leader();
    let mark = cluster.log_end();
    cluster.wait_for_log(mark, "WARNING:  could not rename file");
    assert_eq!(cluster.leader(), leader);
    cluster.set_fault(Fault::ListRename, 0);
    cluster.wait_for_log(mark, "wrote block details for");
    assert_eq!(cluster.leader(), leader);
}

#[test]
fn a_list_of_very_many_databases_is_skipped_at_once() {
    let cluster = Cluster::build().setting("shared_buffers = 512MB").create();
    let nowhere = Block {
        database: 0,
        tablespace: 1663,
        filenumber: 16384,
        fork: 0,
        block: 0,
    };
    let list = list_of((0..50_000).map(|number| Block {
        database: 1_000_000 + number,
        ..nowhere
    }));
    let (loaded, total, skipped) = load(&cluster, &list);
    assert_eq!((loaded, total), (0, 50_000));
    assert_eq!(
        skipped,
        "50000 blocks: 50000 in databases that were dropped or accept no connections"
    );
}

#[test]
fn every_io_method_loads() {
    let cluster = Cluster::build().setting("shared_buffers = 64MB").start();
    if cluster.major() < 18 {
        // Before 18 there is no choice. All other tests use the default.
        return;
    }
    cluster.sql("CREATE EXTENSION pg_prewarm");
    let table = cluster.table("t", 2000);
    cluster.stop(Shutdown::Fast);
    for method in ["sync", "worker", "io_uring"] {
        cluster.configure(&format!("io_method = {method}"));
        cluster.write_list(list_of(table.first(2000)));
        let mark = cluster.log_end();
        cluster.start_with_shared_buffers_in_use();
        assert_eq!(cluster.wait_for_load(mark), (2000, 2000), "{method}");
        assert_eq!(cluster.value::<String>("SHOW io_method"), method);
        cluster.stop(Shutdown::Immediate);
    }
}

#[test]
fn blocks_that_clients_have_read_are_not_evicted_by_a_load() {
    let cluster = Cluster::build()
        .setting("shared_buffers = 16MB")
        .setting("pg_prewarm.autoprewarm = off")
        .start();
    cluster.sql("CREATE EXTENSION pg_prewarm; CREATE EXTENSION pg_buffercache");
    let mine = cluster.table("mine", 500);
    cluster.table("few", 40);
    let listed = cluster.table("listed", 4000);
    cluster.stop(Shutdown::Fast);
    // Not preloaded, so the load begins after clients have read blocks.
    cluster.configure("shared_preload_libraries = ''\npg_prewarm.autoprewarm_max_rate = 80");
    cluster.write_list(list_of(listed.first(4000)));
    cluster.start();
    cluster.sql("SELECT pg_prewarm('mine')");
    let mark = cluster.log_end();
    let mut client = cluster.connect("postgres");
    client
        .batch_execute("SELECT autoprewarm_start_worker()")
        .unwrap();
    LoadStats::wait_for(&mut client, |stats| stats.loaded > 0);
    // There are buffers for some more.
    client.batch_execute("SELECT pg_prewarm('few')").unwrap();
    let before = cluster.cached_without_extension();
    assert!(mine.first(500).all(|block| before.contains(&block)));
    cluster.configure("pg_prewarm.autoprewarm_max_rate = 0");
    cluster.reload();
    let (loaded, _) = cluster.wait_for_load(mark);
    assert!(loaded > 500, "{loaded}");
    let after = cluster.cached_without_extension();
    let evicted = before.difference(&after).count();
    assert_eq!(evicted, 0);
}

/// What is said at the start without a list: one line, a DETAIL, and the view.
fn assert_no_list(cluster: &Cluster, primary: &str, detail: &str) {
    let mark = cluster.log_end();
    cluster.start();
    let mut client = cluster.connect("postgres");
    // Not while a dump is written.
    let stats = LoadStats::wait_for(&mut client, |stats| stats.state == "idle");
    assert_eq!(stats.result(), "no list");
    assert_eq!(stats.total, 0);
    // A few intervals, and another leader.
    std::thread::sleep(std::time::Duration::from_millis(2500));
    let leader = cluster.leader().unwrap();
    client
        .batch_execute(&format!(
            "SELECT pg_terminate_backend({leader}, 60000), autoprewarm_start_worker()"
        ))
        .unwrap();
    cluster.wait_for_leader();
    let log = cluster.log_since(mark);
    let said: Vec<_> = log
        .lines()
        .filter(|line| line.contains("autoprewarm.blocks"))
        .map(|line| line.split_once("] ").unwrap().1)
        .collect();
    assert_eq!(said, [primary, detail], "{log}");
    assert!(!log.contains("WARNING"), "{log}");
    cluster.stop(Shutdown::Fast);
    let list = std::fs::symlink_metadata(cluster.data(crate::common::LIST)).unwrap();
    assert!(list.is_file());
}

#[test]
fn a_list_that_is_missing_is_said_once_with_where_it_will_be() {
    let cluster = Cluster::build()
        .setting("pg_prewarm.autoprewarm_interval = 1")
        .start();
    cluster.sql("CREATE EXTENSION pg_prewarm");
    cluster.stop(Shutdown::Fast);
    let list = cluster.data(crate::common::LIST);
    std::fs::remove_file(&list).unwrap();
    let path = list.display();
    let detail = format!("DETAIL:  The next block dump writes file \"{path}\".");
    assert_no_list(
        &cluster,
        "LOG:  skipping prewarm because file \"autoprewarm.blocks\" does not exist",
        &detail,
    );

    std::fs::remove_file(&list).unwrap();
    std::os::unix::fs::symlink("/nowhere/at all", &list).unwrap();
    let detail = format!(
        "DETAIL:  The link leads to \"/nowhere/at all\". The next block dump replaces it with \
         file \"{path}\"."
    );
    assert_no_list(
        &cluster,
        "LOG:  skipping prewarm because file \"autoprewarm.blocks\" is a symbolic link to a file \
         that does not exist",
        &detail,
    );
}

#[test]
fn an_idle_server_writes_an_empty_list_and_starts_with_it_without_complaint() {
    let cluster = Cluster::build().create();
    cluster.write_list("<<0>>\n");
    for _ in 0..2 {
        let mark = cluster.log_end();
        cluster.start();
        assert_eq!(cluster.wait_for_load(mark), (0, 0));
        cluster.stop(Shutdown::Fast);
        assert_eq!(cluster.list(), "<<0>>\n");
        assert!(!cluster.log_since(mark).contains("WARNING"));
    }
}
