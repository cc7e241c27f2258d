//! With `debug_discard_caches`, the server discards its catalog caches whenever it can.
//! So a pointer into a cache that is used for too long makes these tests fail.

use crate::common::{Cluster, LoadStats, Shutdown, value};

#[test]
fn a_load_a_dump_and_every_function_work_while_caches_are_discarded() {
    let cluster = Cluster::build().start();
    if cluster.value::<String>("SHOW debug_assertions") != "on" {
        println!("debug_discard_caches needs a server with assertions: not run");
        return;
    }
    cluster.sql(
        "CREATE EXTENSION pg_prewarm; \
         CREATE TABLE t (a int PRIMARY KEY, filler text) PARTITION BY RANGE (a); \
         CREATE TABLE t1 PARTITION OF t FOR VALUES FROM (0) TO (500); \
         CREATE TABLE t2 PARTITION OF t DEFAULT; \
         INSERT INTO t SELECT g, repeat('x', 500) FROM generate_series(0, 999) g; \
         CREATE ROLE plain",
    );
    let table = cluster.file_of("postgres", "t1");
    cluster.stop(Shutdown::Fast);
    assert!(cluster.lists(table));
    cluster.configure("debug_discard_caches = 1");
    cluster.start();

    let mut client = cluster.connect("postgres");
    let stats = LoadStats::wait_for_end(&mut client);
    assert_eq!(
        (stats.result(), stats.skipped),
        ("completed", 0),
        "{stats:?}"
    );
    for query in [
        "SELECT bool_and(pg_prewarm('t1', mode) > 0 AND pg_prewarm('t1_pkey', mode) > 0) \
         FROM unnest('{prefetch,read,buffer}'::text[]) mode",
        "SELECT count(*) = 8 FROM pg_prewarm_relation('t', workers => 1)",
        "SELECT count(*) = 4 FROM pg_prewarm_schema('public', toast => false)",
        "SELECT count(*) >= 4 FROM pg_prewarm_database(workers => 1)",
        "SELECT count(*) > 0 FROM autoprewarm_blocks()",
        "SELECT autoprewarm_load_now() IS NOT NULL",
        "SELECT autoprewarm_cancel() IS NOT NULL",
        "SELECT autoprewarm_wait()",
        "SELECT autoprewarm_dump_now() > 0",
        "SELECT count(*) = 1 FROM pg_stat_autoprewarm",
        "SELECT count(*) = 0 FROM pg_stat_progress_prewarm",
    ] {
        assert!(value::<bool>(&mut client, query), "{query}");
    }
    // Privileges are looked up again and again, too.
    client.batch_execute("SET ROLE plain").unwrap();
    let readable = "SELECT count(*) FROM pg_prewarm_schema('public')";
    assert_eq!(value::<i64>(&mut client, readable), 0);

    let dumped = cluster.log_end();
    cluster.stop(Shutdown::Fast);
    assert!(
        cluster
            .log_since(dumped)
            .contains("wrote block details for")
    );
    assert!(cluster.lists(table));
}
