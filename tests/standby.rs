//! A standby is loaded and dumped like any other server.

use crate::common::{Cluster, Shutdown, wait_until};

#[test]
fn a_standby_is_warm_after_a_restart_and_after_its_promotion() {
    let primary = Cluster::build().start();
    primary.sql(
        "CREATE EXTENSION pg_prewarm; CREATE EXTENSION pg_buffercache; \
         CREATE TABLE t AS SELECT g AS id, repeat('x', 500) AS filler FROM generate_series(1, 5000) g",
    );
    let table = primary.file_of("postgres", "t");
    let standby = primary.standby();
    standby.start();
    assert!(standby.value::<bool>("SELECT pg_is_in_recovery()"));
    let blocks: i64 = standby.value("SELECT pg_prewarm('t')");
    assert!(blocks > 100);
    let with_workers = "SELECT sum(blocks)::int8 FROM pg_prewarm_relation('t', workers => 2)";
    assert!(standby.value::<i64>(with_workers) > blocks);

    // The dump at shutdown and a dump on demand work during recovery.
    assert!(standby.dump() > blocks);
    let mark = standby.log_end();
    standby.restart();
    standby.wait_for_load(mark);
    assert!(standby.value::<bool>("SELECT pg_is_in_recovery()"));
    let cached_blocks = || {
        let cached = standby.cached_without_extension();
        cached
            .iter()
            .filter(|block| block.same_relation(&table) && block.fork == 0)
            .count() as i64
    };
    assert_eq!(cached_blocks(), blocks);

    let leader = standby.leader();
    assert!(leader.is_some());
    standby.promote();
    wait_until("the promotion", || {
        !standby.value::<bool>("SELECT pg_is_in_recovery()")
    });
    assert_eq!(standby.leader(), leader);
    assert_eq!(cached_blocks(), blocks);
    standby.stop(Shutdown::Fast);
    assert!(
        standby
            .listed()
            .iter()
            .any(|block| block.same_relation(&table))
    );
}
