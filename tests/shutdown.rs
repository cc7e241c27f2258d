//! The list is written when a shutdown is requested, and once more at its end.

use crate::common::{Cluster, LIST, LoadStats, signal, wait_until};

/// Asks for a smart shutdown, without waiting for it.
fn ask_for_smart_shutdown(cluster: &Cluster) -> usize {
    let mark = cluster.log_end();
    signal(cluster.postmaster(), libc::SIGTERM);
    cluster.wait_for_log(mark, "received smart shutdown request");
    mark
}

#[test]
fn a_smart_shutdown_that_ends_in_a_kill_leaves_the_list_of_its_beginning() {
    for interval in [0, 300] {
        let mut cluster = Cluster::build()
            .setting(&format!("pg_prewarm.autoprewarm_interval = {interval}"))
            .setting("restart_after_crash = off")
            .start();
        cluster.expect_crash();
        cluster.sql("CREATE EXTENSION pg_prewarm");
        cluster.sql("SELECT autoprewarm_wait()");
        let table = cluster.table("t", 100);
        cluster.sql("CREATE UNLOGGED TABLE u AS SELECT 1 AS a");
        let unlogged = cluster.file_of("postgres", "u");
        let mut session = cluster.connect("postgres");
        assert!(!cluster.data(LIST).exists());
        let mark = ask_for_smart_shutdown(&cluster);
        cluster.wait_for_log(mark, "wrote block details for");
        assert!(cluster.lists(table));
        // What a crash would empty is left out.
        assert!(!cluster.lists(unlogged));
        // The session goes on, and nothing is written again and again.
        std::thread::sleep(std::time::Duration::from_millis(2500));
        session.batch_execute("SELECT 1").unwrap();
        let log = cluster.log_since(mark);
        assert_eq!(log.matches("wrote block details for").count(), 1);
        signal(cluster.postmaster(), libc::SIGKILL);
        drop(session);
        assert!(cluster.lists(table));
    }
}

#[test]
fn a_smart_shutdown_also_dumps_at_its_end() {
    let cluster = Cluster::build()
        .setting("pg_prewarm.autoprewarm_interval = 0")
        .start();
    cluster.sql("CREATE EXTENSION pg_prewarm");
    cluster.sql("SELECT autoprewarm_wait()");
    let first = cluster.table("t", 100);
    let mut session = cluster.connect("postgres");
    let mark = ask_for_smart_shutdown(&cluster);
    cluster.wait_for_log(mark, "wrote block details for");
    session
        .batch_execute("CREATE UNLOGGED TABLE u AS SELECT g FROM generate_series(1, 10000) g")
        .unwrap();
    let file: u32 = session
        .query_one("SELECT pg_relation_filenode('u')", &[])
        .unwrap()
        .get(0);
    drop(session);
    cluster.wait_for_log(mark, "database system is shut down");
    assert!(cluster.lists(first));
    let listed = cluster.listed();
    assert!(listed.iter().any(|block| block.filenumber == file));
}

#[test]
fn a_smart_shutdown_during_a_load_leaves_the_list_alone() {
    let cluster = Cluster::build()
        .setting("pg_prewarm.autoprewarm_interval = 0")
        .start();
    cluster.sql("CREATE EXTENSION pg_prewarm");
    let table = cluster.table("t", 1000);
    cluster.stop(crate::common::Shutdown::Fast);
    cluster.configure("pg_prewarm.autoprewarm_max_rate = 8");
    let list = crate::common::list_of(table.first(1000));
    cluster.write_list(&list);
    cluster.start();
    let mut session = cluster.connect("postgres");
    LoadStats::wait_for(&mut session, |stats| stats.loaded > 0);
    let mark = ask_for_smart_shutdown(&cluster);
    std::thread::sleep(std::time::Duration::from_millis(2500));
    assert_eq!(cluster.list(), list);
    assert_eq!(LoadStats::get(&mut session).state, "loading");
    drop(session);
    wait_until("the end", || {
        cluster
            .log_since(mark)
            .contains("database system is shut down")
    });
    assert_eq!(cluster.list(), list);
}
