//! Large servers: what a call, a dump and a session take does not grow with shared buffers
//! where it need not, and nothing that does grow keeps a process from serving interrupts.

use std::fs;
use std::time::{Duration, Instant};

use postgres::{Client, NoTls};

use crate::common::{Cluster, Fault, Shutdown, SqlError, error, limit, signal, value, wait_until};

/// A number in kB that the operating system tells of a process.
fn kilobytes(pid: i32, name: &str) -> u64 {
    number(pid, name)
}

fn number(pid: i32, name: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| {
        line.strip_prefix(name)
            .is_some_and(|rest| rest.starts_with(':'))
    });
    let number = line.unwrap().split_whitespace().nth(1);
    number.unwrap().parse().unwrap()
}

fn pid(client: &mut Client) -> i32 {
    value(client, "SELECT pg_backend_pid()")
}

/// A cluster with 262,144 shared buffers, whose headers are 16 MB. A process's shared
/// memory that is resident tells how much of them it has looked at.
fn large_cluster() -> Cluster {
    let cluster = Cluster::build()
        .not_preloaded()
        .setting("shared_buffers = 2GB")
        .setting("huge_pages = off")
        .start();
    cluster.sql("CREATE EXTENSION pg_prewarm");
    cluster
}

#[test]
fn a_call_for_a_small_relation_does_not_look_at_all_buffers() {
    let cluster = large_cluster();
    cluster.table("t", 200);
    cluster.table("u", 200);
    for mode in ["buffer", "read", "prefetch"] {
        cluster.restart();
        for call in [
            format!("SELECT pg_prewarm('t', '{mode}')"),
            format!("SELECT sum(blocks) FROM pg_prewarm_relation('t', '{mode}')"),
            format!("SELECT sum(blocks) FROM pg_prewarm_relation('u', '{mode}', workers => 2)"),
            format!("SELECT sum(blocks) FROM pg_prewarm_schema('public', '{mode}')"),
            format!("SELECT sum(blocks) FROM pg_prewarm_database('{mode}')"),
        ] {
            let mut client = cluster.connect("postgres");
            // What the server itself looks at.
            client
                .batch_execute("LOAD 'pg_prewarm'; SELECT count(*) FROM pg_class")
                .unwrap();
            let pid = pid(&mut client);
            let before = kilobytes(pid, "RssShmem");
            client.batch_execute(&call).unwrap();
            let grown = kilobytes(pid, "RssShmem").saturating_sub(before);
            assert!(grown < 8 << 10, "{call}: {grown} kB");
        }
    }
}

#[test]
fn a_call_that_may_fill_a_large_part_of_the_buffers_evicts_nothing_of_its_own_there_either() {
    let cluster = large_cluster();
    // More than a sixteenth of the buffers, so that the free ones are counted.
    cluster.sql("CREATE TABLE t (filler text) WITH (fillfactor = 10)");
    cluster.sql("INSERT INTO t SELECT repeat('x', 700) FROM generate_series(1, 20000)");
    cluster.sql("CREATE EXTENSION pg_buffercache");
    cluster.restart();
    let blocks: i64 = cluster.value(
        "SELECT sum(blocks)::int8 FROM pg_prewarm_relation('t', workers => 1, toast => false)",
    );
    assert_eq!(blocks, 20000);
    let cached: i64 = cluster.value(
        "SELECT count(*) FROM pg_buffercache \
         WHERE relfilenode = pg_relation_filenode('t') AND relforknumber = 0",
    );
    assert_eq!(cached, 20000);
}

#[test]
fn a_session_keeps_no_reserve_of_memory_after_a_call() {
    /// The reserve is larger, and what the server caches for a first call is smaller.
    const KEPT: u64 = 1500;
    let cluster = Cluster::build().start();
    cluster.table("t", 100);
    cluster.sql("CREATE EXTENSION pg_prewarm");
    cluster.dump();
    for (call, succeeds) in [
        ("SELECT pg_prewarm('t')", true),
        ("SELECT pg_prewarm('t', 'nonsense')", false),
        ("SELECT count(*) FROM pg_prewarm_relation('t')", true),
        ("SELECT autoprewarm_dump_now()", true),
        ("SELECT autoprewarm_wait('0')", true),
        ("SELECT count(*) FROM autoprewarm_blocks()", true),
        ("SELECT autoprewarm_blocks() LIMIT 1", true),
        (
            "SELECT autoprewarm_blocks(), pg_prewarm('t', 'nonsense')",
            false,
        ),
        ("SELECT count(*) FROM pg_stat_autoprewarm", true),
    ] {
        let mut client = cluster.connect("postgres");
        client
            .batch_execute("LOAD 'pg_prewarm'; SELECT count(*) FROM pg_class")
            .unwrap();
        let pid = pid(&mut client);
        let before = kilobytes(pid, "VmData");
        // Once is enough to keep it, and each time must not add to it.
        for _ in 0..3 {
            assert_eq!(client.batch_execute(call).is_ok(), succeeds, "{call}");
        }
        // An error is told before its transaction has ended.
        client.batch_execute("SELECT").unwrap();
        let grown = kilobytes(pid, "VmData").saturating_sub(before);
        assert!(grown < KEPT, "{call}: {grown} kB");
    }

    // Neither within a transaction that goes on.
    let mut client = cluster.connect("postgres");
    client
        .batch_execute("LOAD 'pg_prewarm'; BEGIN; SELECT count(*) FROM pg_class")
        .unwrap();
    let pid = pid(&mut client);
    let before = kilobytes(pid, "VmData");
    client.batch_execute("SELECT pg_prewarm('t')").unwrap();
    let grown = kilobytes(pid, "VmData").saturating_sub(before);
    assert!(grown < KEPT, "{grown} kB");
}

/// A cluster whose lists are written in steps that take half a second each, from
/// [`write_slowly`] on: what is written at once takes as many as the number of its bytes
/// has binary digits.
fn cluster_that_writes() -> Cluster {
    let cluster = Cluster::build().create();
    cluster.set_fault(Fault::ListDelay, 0);
    cluster.start();
    cluster.sql("CREATE EXTENSION pg_prewarm");
    cluster.sql("CREATE DATABASE other");
    cluster.wait_for_leader();
    cluster.dump();
    cluster
}

fn write_slowly(cluster: &Cluster) {
    cluster.set_fault(Fault::ListDelay, 500);
}

/// Waits until a list is being written that was composed before.
fn wait_for_writing(cluster: &Cluster) {
    wait_until("a list that is being written", || {
        fs::metadata(cluster.data("autoprewarm.blocks.tmp")).is_ok_and(|file| file.len() > 1000)
    });
}

#[test]
fn a_dump_that_is_being_written_can_be_cancelled() {
    let cluster = cluster_that_writes();
    let list = cluster.list();
    let mut client = cluster.connect("postgres");
    let cancel = client.cancel_token();
    write_slowly(&cluster);
    let dump = std::thread::spawn(move || error(&mut client, "SELECT autoprewarm_dump_now()"));
    wait_for_writing(&cluster);
    let start = Instant::now();
    cancel.cancel_query(NoTls).unwrap();
    assert_eq!(
        dump.join().unwrap(),
        SqlError::new("57014", "canceling statement due to user request")
    );
    assert!(
        start.elapsed() < Duration::from_millis(4500),
        "{:?}",
        start.elapsed()
    );
    cluster.set_fault(Fault::ListDelay, 0);
    assert_eq!(cluster.list(), list);
    wait_until("the removal of the new list", || {
        !cluster.data("autoprewarm.blocks.tmp").exists()
    });
    cluster.dump();
}

#[test]
fn a_command_that_waits_for_all_processes_does_not_wait_for_a_list_to_be_written() {
    let cluster = cluster_that_writes();
    let leader = cluster.leader();
    write_slowly(&cluster);
    cluster.configure("pg_prewarm.autoprewarm_interval = 1");
    cluster.reload();
    wait_for_writing(&cluster);
    let start = Instant::now();
    // It has all processes close the files of the database.
    cluster.sql("DROP DATABASE other");
    assert!(
        start.elapsed() < Duration::from_millis(4500),
        "{:?}",
        start.elapsed()
    );
    assert_eq!(cluster.leader(), leader);
    cluster.set_fault(Fault::ListDelay, 0);
    cluster.stop(Shutdown::Fast);
    assert!(!cluster.listed().is_empty());
}

#[test]
fn a_leader_without_memory_waits_for_it_and_does_not_spin() {
    let mut cluster = Cluster::build()
        .setting("pg_prewarm.autoprewarm_interval = 1")
        .start();
    cluster.expect_crash();
    cluster.table("t", 1000);
    cluster.sql("CREATE EXTENSION pg_prewarm");
    let leader = cluster.wait_for_leader();
    // It can get nothing beyond what it has.
    assert!(limit(leader, "as", Some(kilobytes(leader, "VmSize") << 10)));
    let mark = cluster.log_end();
    std::thread::sleep(Duration::from_secs(2));
    let switches = || number(leader, "voluntary_ctxt_switches");
    let before = switches();
    std::thread::sleep(Duration::from_secs(3));
    let woken = switches() - before;
    assert!(woken < 60, "{woken}: {}", cluster.log_since(mark));
    assert_eq!(cluster.leader(), Some(leader));
    assert!(limit(leader, "as", None));
    signal(leader, libc::SIGHUP);
    let mark = cluster.log_end();
    cluster.wait_for_log(mark, "wrote block details");
    assert_eq!(cluster.leader(), Some(leader));
}
