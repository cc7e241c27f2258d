//! Loads without a free worker slot, memory or locks, and databases to which no worker
//! can connect: the load waits, or skips the blocks, and logs it.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use postgres::{Client, NoTls};

use crate::common::{
    Block, Cluster, Fault, LIST, LoadStats, Shutdown, error, limit, list_of, signal, value,
    wait_until,
};

const WAITING: &str = "LOG:  autoprewarm is waiting for a background worker slot";

/// A cluster whose leader is started by [`start_load`].
fn cluster_without_leader(settings: &[&str]) -> Cluster {
    let builder = settings
        .iter()
        .fold(Cluster::build(), |builder, line| builder.setting(line));
    let cluster = builder.not_preloaded().start();
    cluster.sql("CREATE EXTENSION pg_prewarm");
    cluster
}

/// Blocks that are cached already need no worker.
fn empty_the_cache(cluster: &Cluster) {
    cluster.stop(Shutdown::Fast);
    cluster.start();
}

/// Writes the list, and starts the leader, which loads it.
fn start_load(cluster: &Cluster, list: &str) {
    cluster.write_list(list);
    cluster.sql("SELECT autoprewarm_start_worker()");
}

fn blocks(table: Block, count: u32) -> impl Iterator<Item = Block> {
    (0..count).map(move |block| table.at(block))
}

#[test]
fn without_a_worker_slot_the_list_is_kept_at_every_shutdown() {
    let cluster = Cluster::build()
        .setting("max_worker_processes = 1")
        .setting("max_logical_replication_workers = 0")
        .setting("pg_prewarm.autoprewarm_interval = 60")
        .create();
    // Blocks of a catalog, which a worker would load if it could start.
    let list = "<<2>>\n5,1663,1259,0,0\n5,1663,1249,0,0\n";
    cluster.write_list(list);
    for how in [Shutdown::Fast, Shutdown::Smart, Shutdown::Immediate] {
        let mark = cluster.log_end();
        cluster.start();
        cluster.wait_for_log(mark, WAITING);
        cluster.wait_for_log(
            mark,
            "HINT:  You may need to increase \"max_worker_processes\".",
        );
        let leader = cluster.leader();
        assert!(leader.is_some());
        if how == Shutdown::Fast {
            // A few more tries.
            std::thread::sleep(Duration::from_secs(3));
            assert_eq!(cluster.log_since(mark).matches(WAITING).count(), 1);
        }
        assert_eq!(cluster.leader(), leader);
        assert_eq!(cluster.list(), list);
        cluster.stop(how);
        assert_eq!(cluster.list(), list, "{how:?}");
        assert!(!cluster.log_since(mark).contains("WARNING:"));
    }
    cluster.configure("max_worker_processes = 2");
    let mark = cluster.log_end();
    cluster.start();
    assert_eq!(cluster.wait_for_load(mark), (2, 2));
}

#[test]
fn a_load_continues_when_a_worker_slot_becomes_free() {
    let cluster = cluster_without_leader(&[
        "max_worker_processes = 2",
        "max_logical_replication_workers = 0",
    ]);
    let table = cluster.table_of_blocks("postgres", "t", 20);
    let list = list_of(blocks(table, 20));

    empty_the_cache(&cluster);
    // The leader takes one slot, and a query the other.
    let slot = cluster.take_worker_slot();
    start_load(&cluster, &list);
    cluster.wait_for_log(0, WAITING);
    let leader = cluster.leader();
    assert!(!cluster.log().contains("autoprewarm successfully"));

    drop(slot);
    assert_eq!(cluster.wait_for_load(0), (20, 20));
    assert_eq!(cluster.leader(), leader);
    assert_eq!(cluster.list(), list);
}

/// A load of so many blocks whose worker finds the lock table full until the client is
/// dropped. Returns also where the log ended before.
fn load_without_room_in_the_lock_table() -> (Cluster, Client, u64, usize) {
    let cluster = Cluster::build()
        .setting("max_connections = 10")
        .setting("max_locks_per_transaction = 10")
        .setting("pg_prewarm.autoprewarm_max_rate = 8")
        .start();
    // A lock on one of these is never a fast-path lock.
    let files = "SELECT array_agg(pg_relation_filenode(oid)) FROM pg_class \
                 WHERE relisshared AND relkind IN ('r', 'i') AND pg_relation_size(oid) > 0";
    let list = list_of(
        cluster
            .value::<Vec<u32>>(files)
            .into_iter()
            .map(|file| Block {
                database: 0,
                tablespace: 1664,
                filenumber: file,
                fork: 0,
                block: 0,
            }),
    );
    // Shared catalogs are loaded together with a database.
    let total = list.lines().count() as u64;
    let list = list.replacen(
        &format!("<<{}>>\n", total - 1),
        &format!("<<{total}>>\n5,1663,1255,0,0\n"),
        1,
    );
    cluster.stop(Shutdown::Fast);
    cluster.write_list(&list);
    let mark = cluster.log_end();
    cluster.start();

    let mut client = cluster.connect("postgres");
    wait_until("a worker that waits for its turn", || {
        value(
            &mut client,
            "SELECT EXISTS (SELECT FROM pg_stat_activity \
                            WHERE backend_type = 'autoprewarm worker' \
                              AND wait_event_type = 'Extension')",
        )
    });
    let all = "SELECT pg_advisory_lock(g) FROM generate_series(1, 1000000) g";
    assert_eq!(error(&mut client, all).sqlstate, "53200");
    cluster.configure("pg_prewarm.autoprewarm_max_rate = 0");
    cluster.reload();
    cluster.wait_for_log(mark, "WARNING:  out of shared memory");
    (cluster, client, total, mark)
}

#[test]
fn a_load_continues_when_the_lock_table_has_space_again() {
    let (cluster, client, total, mark) = load_without_room_in_the_lock_table();
    drop(client);
    assert_eq!(cluster.wait_for_load(mark), (total, total));
}

#[test]
fn blocks_whose_locks_do_not_fit_into_the_lock_table_count_as_unreadable() {
    let (cluster, _client, total, mark) = load_without_room_in_the_lock_table();
    let (loaded, of) = cluster.wait_for_load(mark);
    assert_eq!(of, total);
    assert_eq!(
        cluster.wait_for_skipped(mark),
        format!("{0} blocks: {0} that could not be read", total - loaded)
    );
}

#[test]
fn a_caller_without_memory_gets_an_error_and_the_server_continues() {
    let cluster = Cluster::build().start();
    cluster.table("t", 100);
    cluster.sql("CREATE EXTENSION pg_prewarm");
    // The leader does not use the list any more then.
    cluster.sql("SELECT autoprewarm_wait()");
    for sql in [
        "SELECT autoprewarm_dump_now()",
        "SELECT count(*) FROM autoprewarm_blocks()",
        "SELECT pg_prewarm('t', 'read')",
    ] {
        cluster.dump();
        let mut client = cluster.connect("postgres");
        // The library is loaded, and the table is in the session's caches.
        client.batch_execute("SELECT pg_prewarm('t')").unwrap();
        let pid = value(&mut client, "SELECT pg_backend_pid()");
        assert!(limit(pid, "as", Some(address_space(pid))));
        assert_eq!(error(&mut client, sql).sqlstate, "53200", "{sql}");
        assert!(limit(pid, "as", None));
        client.batch_execute(sql).unwrap();
    }
}

#[test]
fn a_process_that_is_refused_memory_exits_and_the_server_continues() {
    let cluster = Cluster::build().create();
    cluster.set_fault(Fault::RefusedMemory, 0);
    cluster.start();
    let table = cluster.table_of_blocks("postgres", "t", 2000);
    cluster.sql("CREATE EXTENSION pg_prewarm");
    let list = list_of(blocks(table, 2000));
    let mut ended = 0;
    for round in 0..20 {
        for sql in [
            "SELECT pg_prewarm('t')",
            "SELECT pg_prewarm('t', 'read')",
            "SELECT pg_prewarm('nothing')",
            "SELECT count(*) FROM pg_prewarm_relation('t', workers => 2)",
            "SELECT count(*) FROM pg_prewarm_database('prefetch', catalogs => true)",
            "SELECT autoprewarm_dump_now()",
            "SELECT count(*) FROM autoprewarm_blocks()",
            "SELECT count(*) FROM pg_stat_autoprewarm, pg_stat_progress_prewarm",
            "SELECT autoprewarm_load_now()",
        ] {
            cluster.set_fault(Fault::RefusedMemory, 0);
            let mut client = cluster.connect("postgres");
            cluster.set_fault(Fault::RefusedMemory, 1 << (round % 10));
            if let Err(error) = client.batch_execute(sql)
                && let Some(error) = error.as_db_error()
                && error.severity() == "FATAL"
            {
                assert_eq!(error.code().code(), "53200", "{error:?}");
                ended += 1;
            }
        }
        cluster.set_fault(Fault::RefusedMemory, 0);
        cluster.stop(Shutdown::Immediate);
        cluster.write_list(&list);
        cluster.set_fault(Fault::RefusedMemory, 1 << (round % 10));
        // If every request failed, the library could not be loaded, and the server
        // would not start.
        while !cluster.try_start() {
            cluster.set_fault(Fault::RefusedMemory, 0);
        }
        cluster.set_fault(Fault::RefusedMemory, 0);
        assert!(cluster.value::<bool>("SELECT autoprewarm_wait('1 min')"));
        cluster.wait_for_leader();
    }
    assert!(ended > 0, "no session was ended");
}

#[test]
fn an_out_of_memory_error_is_raised_even_if_there_is_no_memory_for_it() {
    let cluster = Cluster::build().create();
    cluster.set_fault(Fault::LimitedProcess, 0);
    cluster.start();
    cluster.sql("CREATE EXTENSION pg_prewarm");
    for table in 0..20 {
        cluster.table(&format!("t{table}"), 2);
    }
    // With the library loaded; and with what the server caches for a call, and little more
    // than what a call keeps in reserve.
    const RESERVE: i64 = (2 << 20) + (256 << 10);
    for (before, left, step) in [
        ("LOAD 'pg_prewarm'", 0..3_000_000, 20_000),
        (
            "SELECT pg_prewarm('t0')",
            RESERVE - 2000..RESERVE + 120_000,
            500,
        ),
    ] {
        let mut refused = 0;
        for left in left.step_by(step) {
            let mut client = cluster.connect("postgres");
            client.batch_execute(before).unwrap();
            let pid: i32 = value(&mut client, "SELECT pg_backend_pid()");
            cluster.set_fault(Fault::MemoryLeft, left);
            cluster.set_fault(Fault::LimitedProcess, pid.into());
            let result = client.batch_execute("SELECT pg_prewarm_database('buffer', workers => 2)");
            cluster.set_fault(Fault::LimitedProcess, 0);
            if let Err(error) = result {
                // There may not even be enough memory for the message.
                let code = error.code().map_or("53200", |code| code.code());
                assert_eq!(code, "53200", "{left} bytes left: {error:?}");
                refused += 1;
            }
        }
        assert!(refused > 0);
    }
}

#[test]
fn a_load_whose_leader_died_is_not_started_again_at_once() {
    let cluster = Cluster::build().create();
    cluster.set_fault(Fault::LimitedProcess, 0);
    cluster.start();
    let table = cluster.table("t", 1000);
    cluster.sql("CREATE EXTENSION pg_prewarm");
    cluster.stop(Shutdown::Fast);
    cluster.write_list(list_of(table.first(1000)));
    cluster.configure("pg_prewarm.autoprewarm_max_rate = 80");
    cluster.start();
    let mut client = cluster.connect("postgres");
    LoadStats::wait_for(&mut client, |stats| stats.loaded > 0);
    let leader = cluster.leader().unwrap();
    cluster.set_fault(Fault::LimitedProcess, leader.into());
    wait_until("another leader", || {
        cluster.leader().is_some_and(|pid| pid != leader)
    });
    cluster.wait_for_leader();
    let stats = LoadStats::get(&mut client);
    assert_eq!((&*stats.state, stats.result()), ("load failed", "failed"));

    cluster.configure("pg_prewarm.autoprewarm_max_rate = 0");
    cluster.reload();
    let stats = LoadStats::wait_for(&mut client, |stats| stats.result() == "completed");
    assert_eq!(stats.loaded + stats.cached, 1000);
}

/// The dynamic shared memory segments of a server that keeps them in files.
fn segments(cluster: &Cluster) -> BTreeSet<PathBuf> {
    let files = fs::read_dir(cluster.data("pg_dynshmem")).unwrap();
    files.map(|file| file.unwrap().path()).collect()
}

#[test]
fn a_load_that_has_ended_leaves_no_shared_memory_behind() {
    let cluster = cluster_without_leader(&["dynamic_shared_memory_type = mmap"]);
    let table = cluster.table("t", 100);
    start_load(&cluster, &list_of(blocks(table, 100)));
    let mut client = cluster.connect("postgres");
    LoadStats::wait_for_end(&mut client);
    let workers = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'autoprewarm worker'";
    wait_until("the worker's end", || {
        value::<i64>(&mut client, workers) == 0
    });
    let before = segments(&cluster);
    for _ in 0..3 {
        client
            .batch_execute("SELECT autoprewarm_load_now()")
            .unwrap();
        LoadStats::wait_for_end(&mut client);
    }
    wait_until("the end of the last", || segments(&cluster) == before);
}

#[test]
fn a_worker_that_fails_before_it_is_connected_affects_nothing_else() {
    let cluster = Cluster::build()
        .setting("dynamic_shared_memory_type = mmap")
        .not_preloaded()
        .setting("pg_prewarm.autoprewarm_workers = 1")
        // The load would take more than a minute.
        .setting("pg_prewarm.autoprewarm_max_rate = 80")
        .start();
    let table = cluster.table_of_blocks("postgres", "t", 1000);
    cluster.sql("CREATE EXTENSION pg_prewarm");
    cluster.restart();
    cluster.write_list(list_of(blocks(table, 1000)));
    let mut client = cluster.connect("postgres");
    let segments = || segments(&cluster);
    // The segments of the statistics exist already.
    client
        .batch_execute("SELECT pg_prewarm('t', 'prefetch')")
        .unwrap();
    let before = segments();
    let mark = cluster.log_end();
    client
        .batch_execute("SELECT autoprewarm_load_now()")
        .unwrap();
    let worker = "SELECT max(pid) FROM pg_stat_activity WHERE backend_type = 'autoprewarm worker'";
    wait_until("a worker", || {
        value::<Option<i32>>(&mut client, worker).is_some()
    });
    let leader = cluster.leader();
    // The next worker cannot attach to the load's segment.
    for segment in segments().difference(&before) {
        fs::remove_file(segment).unwrap();
    }
    client
        .batch_execute(&format!("SELECT pg_terminate_backend(({worker}))"))
        .unwrap();
    cluster.wait_for_log(mark, "could not open shared memory segment");
    cluster.wait_for_log(mark, "workers keep exiting before loading any block");
    assert_eq!(cluster.leader(), leader);
}

#[test]
fn a_leader_that_cannot_start_is_tried_again_once_a_second() {
    let cluster = cluster_without_leader(&[]);
    let mut client = cluster.connect("postgres");
    // No process can connect without this file.
    let [map, aside] = ["global/pg_filenode.map", "global/aside"].map(|name| cluster.data(name));
    fs::rename(&map, &aside).unwrap();
    let mark = cluster.log_end();
    let start = Instant::now();
    // The leader may have failed before this checks whether it was started.
    let _ = client.batch_execute("SELECT autoprewarm_start_worker()");
    let failures = || {
        let log = cluster.log_since(mark);
        let ends = log.lines().filter(|line| {
            line.contains("\"autoprewarm leader\" (PID")
                && line.ends_with("exited with exit code 1")
        });
        ends.count() as u64
    };
    wait_until("the third try", || failures() >= 3);
    let (failures, elapsed) = (failures(), start.elapsed());
    fs::rename(&aside, &map).unwrap();
    assert!(
        failures <= elapsed.as_secs() + 1,
        "{failures} in {elapsed:?}"
    );
    cluster.wait_for_leader();
}

/// The size of a process's address space, in bytes.
fn address_space(pid: i32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmSize:"));
    let kilobytes: u64 = line
        .unwrap()
        .split_whitespace()
        .nth(1)
        .unwrap()
        .parse()
        .unwrap();
    kilobytes << 10
}

#[test]
fn a_load_needs_no_connection_of_a_client() {
    let cluster =
        cluster_without_leader(&["max_connections = 4", "superuser_reserved_connections = 0"]);
    let table = cluster.table_of_blocks("postgres", "t", 20);
    cluster.restart();
    cluster.write_list(list_of(blocks(table, 20)));
    let mut clients: Vec<_> = (0..4).map(|_| cluster.connect("postgres")).collect();
    let refused = cluster.config().connect(postgres::NoTls).err().unwrap();
    assert_eq!(refused.as_db_error().unwrap().code().code(), "53300");

    clients[0]
        .batch_execute("SELECT autoprewarm_start_worker()")
        .unwrap();
    assert_eq!(cluster.wait_for_load(0), (20, 20));
    drop(clients);
    // Sessions that are about to exit still count.
    let sessions = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'";
    wait_until("connections to be free", || {
        let client = cluster.config().connect(postgres::NoTls);
        client.is_ok_and(|mut client| value::<i64>(&mut client, sessions) == 1)
    });
    assert!(cluster.cached().is_superset(&blocks(table, 20).collect()));
}

#[test]
fn databases_to_which_no_worker_can_connect_are_skipped_and_counted() {
    let cluster = cluster_without_leader(&[]);
    // Each has a table. The first that can be loaded comes last.
    let make = |database: &str, count| {
        cluster.sql(&format!("CREATE DATABASE {database}"));
        cluster.table_of_blocks(database, "t", count)
    };
    let closed = make("closed", 2);
    let template = make("template", 3);
    let invalid = make("invalid", 5);
    let dropped = make("dropped", 7);
    let limited = make("limited", 11);
    let template1 = cluster.file_of("template1", "pg_class");
    cluster.sql("ALTER DATABASE closed ALLOW_CONNECTIONS false");
    cluster.sql("ALTER DATABASE template IS_TEMPLATE true");
    cluster.sql("UPDATE pg_database SET datconnlimit = -2 WHERE datname = 'invalid'");
    cluster.sql("DROP DATABASE dropped");
    // The limit is for users, not for background workers.
    cluster.sql("ALTER DATABASE limited CONNECTION LIMIT 0");
    let shared = Block {
        database: 0,
        ..cluster.file_of("postgres", "pg_database")
    };
    let list = list_of(
        [shared, template1]
            .into_iter()
            .chain(blocks(closed, 2))
            .chain(blocks(template, 3))
            .chain(blocks(invalid, 5))
            .chain(blocks(dropped, 7))
            .chain(blocks(limited, 11)),
    );
    empty_the_cache(&cluster);
    let mark = cluster.log_end();
    start_load(&cluster, &list);

    assert_eq!(cluster.wait_for_load(mark), (12, 30));
    assert_eq!(
        cluster.wait_for_skipped(mark),
        "18 blocks: 4 in template databases, \
         14 in databases that were dropped or accept no connections"
    );
    let log = cluster.log_since(mark);
    for sign in ["FATAL:", "ERROR:", "WARNING:", "could not connect"] {
        assert!(!log.contains(sign), "{log}");
    }
    assert!(cluster.cached().is_superset(&blocks(limited, 11).collect()));
}

#[test]
fn shared_catalogs_are_loaded_with_the_first_database_that_can_be_loaded() {
    let mut cluster = Cluster::build().start();
    cluster.expect_crash();
    cluster.sql("CREATE DATABASE closed ALLOW_CONNECTIONS false");
    let closed = Block {
        database: cluster.value("SELECT oid FROM pg_database WHERE datname = 'closed'"),
        ..cluster.file_of("postgres", "pg_class")
    };
    // A shared catalog that is read only on request.
    let shared = Block {
        database: 0,
        ..cluster.file_of("postgres", "pg_shdescription")
    };
    let table = cluster.table_of_blocks("postgres", "t", 3);
    cluster.sql("CREATE EXTENSION pg_buffercache");
    let template = cluster.file_of("template1", "pg_class");
    for (others, loaded, reasons) in [
        (
            vec![],
            0,
            "1 block: 1 in databases that were dropped or accept no connections",
        ),
        (
            vec![template, closed],
            0,
            "3 blocks: 1 in template databases, \
             2 in databases that were dropped or accept no connections",
        ),
        (
            vec![template, closed, table],
            2,
            "2 blocks: 1 in template databases, \
             1 in databases that were dropped or accept no connections",
        ),
    ] {
        let total = others.len() as u64 + 1;
        cluster.write_list(list_of(others.into_iter().chain([shared])));
        // The server reinitializes, and nothing is cached.
        let mark = cluster.log_end();
        let mut client = cluster.connect("postgres");
        signal(value(&mut client, "SELECT pg_backend_pid()"), libc::SIGKILL);
        assert_eq!(cluster.wait_for_load(mark), (loaded, total));
        assert_eq!(cluster.wait_for_skipped(mark), reasons);
        assert_eq!(cluster.cached().contains(&shared), loaded > 0);
    }
}

#[test]
fn a_database_can_be_created_during_and_after_the_load_of_a_list_that_names_its_template() {
    let cluster = cluster_without_leader(&[]);
    let template = cluster.file_of("template1", "pg_class");
    let table = cluster.table_of_blocks("postgres", "t", 3);
    let shared = Block {
        database: 0,
        ..cluster.file_of("postgres", "pg_shdescription")
    };
    // The first worker to read this table, whichever it is, has to wait for it.
    let mut holder = cluster.connect("postgres");
    holder
        .batch_execute("BEGIN; LOCK TABLE pg_shdescription")
        .unwrap();
    start_load(&cluster, &list_of([shared, template, table]));
    wait_until("a worker, or the load's end", || {
        cluster.log().contains("autoprewarm successfully")
            || cluster.value(
                "SELECT EXISTS (SELECT FROM pg_stat_activity \
                                WHERE backend_type = 'autoprewarm worker')",
            )
    });
    cluster.sql("CREATE DATABASE first");
    holder.batch_execute("ROLLBACK").unwrap();
    let (_, total) = cluster.wait_for_load(0);
    assert_eq!(total, 3);
    cluster.sql("CREATE DATABASE second");
}

#[test]
fn if_workers_keep_exiting_before_loading_any_block_the_load_ends_and_the_list_is_kept() {
    let cluster = Cluster::build()
        .setting("max_worker_processes = 16")
        .setting("pg_prewarm.autoprewarm_workers = 16")
        .create();
    // Each relation is enough for a worker.
    let catalogs = [
        1247, 1249, 1255, 1259, 2600, 2601, 2602, 2603, 2610, 2616, 2617, 2619,
    ];
    let list = list_of(catalogs.map(|filenumber| Block {
        database: 5,
        tablespace: 1663,
        filenumber,
        fork: 0,
        block: 0,
    }));
    cluster.write_list(&list);
    let set_mode = |mode| {
        fs::set_permissions(cluster.data(LIST), fs::Permissions::from_mode(mode)).unwrap();
    };
    // The list cannot be read before the workers' library function cannot be found.
    set_mode(0o000);
    cluster.start();
    cluster.wait_for_log(0, "could not read file");
    let leader = cluster.leader();
    let search = |path: &str| {
        cluster.configure(&format!("dynamic_library_path = '{path}'"));
        cluster.reload();
        wait_until("the reload", || {
            cluster.value::<String>("SHOW dynamic_library_path") == path
        });
    };
    search("/nowhere");
    set_mode(0o600);
    cluster.reload();
    cluster.wait_for_log(
        0,
        "WARNING:  could not load blocks: autoprewarm workers keep exiting before loading any block",
    );
    assert_eq!(cluster.list(), list);
    assert_eq!(cluster.leader(), leader);

    search("$libdir");
    cluster.sql("CREATE EXTENSION pg_prewarm");
    assert_eq!(
        cluster.value::<String>("SELECT last_error FROM pg_stat_autoprewarm"),
        "could not load blocks: autoprewarm workers keep exiting before loading any block"
    );
    assert_eq!(cluster.wait_for_load(0), (12, 12));
    assert_eq!(cluster.leader(), leader);
}

/// A stopped cluster, and its list of so many blocks, whose load would take hours.
fn cluster_with_endless_load(blocks: u32) -> (Cluster, String) {
    let cluster = Cluster::build()
        .setting("shared_buffers = 128MB")
        .setting("max_worker_processes = 20")
        .setting("pg_prewarm.autoprewarm_interval = 0")
        .start();
    cluster.sql("CREATE EXTENSION pg_prewarm");
    let table = cluster.table("t", blocks);
    cluster.stop(Shutdown::Fast);
    // One block in eight seconds.
    cluster.configure("pg_prewarm.autoprewarm_max_rate = 1");
    let list = list_of(table.first(blocks));
    cluster.write_list(&list);
    (cluster, list)
}

/// Terminates every worker that waits for its first block until the load has ended, and
/// returns how many there were.
fn end_workers_until_the_load_ends(client: &mut Client, mut each_time: impl FnMut()) -> usize {
    let mut ended = BTreeSet::new();
    wait_until("the end of the load", || {
        each_time();
        let rows = client.query(
            "SELECT pid, pg_terminate_backend(pid) FROM pg_stat_activity \
             WHERE backend_type = 'autoprewarm worker' AND wait_event_type = 'Extension'",
            &[],
        );
        ended.extend(rows.unwrap().iter().map(|row| row.get::<_, i32>(0)));
        LoadStats::get(client).result.is_some()
    });
    ended.len()
}

#[test]
fn if_workers_are_terminated_before_loading_any_block_the_load_ends_and_the_list_is_kept() {
    // More chunks than workers that die: each is given to at most two of them.
    const BLOCKS: u32 = 14_000;
    let (cluster, list) = cluster_with_endless_load(BLOCKS);
    for workers in [8, 12] {
        cluster.configure(&format!("pg_prewarm.autoprewarm_workers = {workers}"));
        let mark = cluster.log_end();
        cluster.start();
        let mut client = cluster.connect("postgres");
        let ended = end_workers_until_the_load_ends(&mut client, || ());
        assert_eq!(LoadStats::get(&mut client).result(), "failed");
        cluster.wait_for_log(
            mark,
            "WARNING:  could not load blocks: autoprewarm workers keep exiting before loading any block",
        );
        assert!((10..40).contains(&ended), "{ended}");
        assert_eq!(cluster.list(), list);
        if workers == 8 {
            cluster.stop(Shutdown::Fast);
            assert_eq!(cluster.list(), list);
        }
    }
    let mark = cluster.log_end();
    cluster.configure("pg_prewarm.autoprewarm_max_rate = 0");
    cluster.reload();
    assert_eq!(cluster.wait_for_load(mark), (BLOCKS.into(), BLOCKS.into()));
}

#[test]
fn a_session_that_waits_for_a_load_that_fails_begins() {
    let (cluster, list) = cluster_with_endless_load(14_000);
    cluster.configure(
        "pg_prewarm.autoprewarm_workers = 8\npg_prewarm.autoprewarm_hold_connections = 60s",
    );
    cluster.start();
    cluster.sql("CREATE ROLE app LOGIN");
    cluster.stop(Shutdown::Fast);
    assert_eq!(cluster.list(), list);
    cluster.start();
    let mut config = cluster.config();
    config.user("app");
    let session = std::thread::spawn(move || config.connect(NoTls));
    let mut client = cluster.connect("postgres");
    wait_until("a session that waits", || {
        value::<i64>(
            &mut client,
            "SELECT connections_held FROM pg_stat_autoprewarm",
        ) == 1
    });
    let start = Instant::now();
    end_workers_until_the_load_ends(&mut client, || ());
    assert_eq!(LoadStats::get(&mut client).result(), "failed");
    assert!(session.join().unwrap().is_ok());
    assert!(start.elapsed() < Duration::from_secs(50));
}

#[test]
fn workers_that_died_before_loading_any_block_are_replaced_after_a_second_even_if_the_leader_wakes_up()
 {
    let (cluster, _) = cluster_with_endless_load(4000);
    cluster.configure("pg_prewarm.autoprewarm_workers = 4");
    cluster.start();
    let leader = cluster.wait_for_leader();
    let mut client = cluster.connect("postgres");
    let start = Instant::now();
    let ended = end_workers_until_the_load_ends(&mut client, || signal(leader, libc::SIGUSR1));
    let elapsed = start.elapsed();
    let at_most = 4 * (elapsed.as_secs() as usize + 1);
    assert!(ended <= at_most, "{ended} in {elapsed:?}");
}

#[test]
fn a_database_to_which_no_worker_can_connect_is_skipped_after_a_few_tries() {
    let cluster = cluster_without_leader(&[]);
    cluster.sql("CREATE DATABASE broken");
    let broken = cluster.table_of_blocks("broken", "t", 5);
    let table = cluster.table("t", 3);
    fs::remove_file(cluster.data(&format!("base/{}/PG_VERSION", broken.database))).unwrap();
    empty_the_cache(&cluster);
    let mark = cluster.log_end();
    start_load(&cluster, &list_of(broken.first(5).chain(table.first(3))));
    assert_eq!(cluster.wait_for_load(mark), (3, 8));
    assert_eq!(
        cluster.wait_for_skipped(mark),
        "5 blocks: 5 in databases that were dropped or accept no connections"
    );
    let log = cluster.log_since(mark);
    assert_eq!(log.matches("is not a valid data directory").count(), 3);
    let line = "autoprewarm worker could not connect to database with OID";
    assert_eq!(log.matches(line).count(), 1, "{log}");
}
