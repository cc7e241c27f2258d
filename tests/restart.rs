//! A restart brings back what was cached, and nothing else.

use std::collections::BTreeSet;

use crate::common::{Block, Cluster, Shutdown};

/// A table of some hundred blocks, and an index.
fn fill(cluster: &Cluster, database: &str, table: &str, options: &str) {
    cluster.sql_in(
        database,
        &format!(
            "CREATE TABLE {table} {options} AS \
             SELECT g AS id, repeat('x', 500) AS filler FROM generate_series(1, 2000) g; \
             CREATE INDEX {table}_id ON {table} (id)"
        ),
    );
    cluster.sql_in(database, &format!("VACUUM {table}"));
}

fn of_relation(blocks: &BTreeSet<Block>, relation: Block) -> BTreeSet<Block> {
    blocks
        .iter()
        .copied()
        .filter(|block| block.same_relation(&relation))
        .collect()
}

#[test]
fn a_restart_restores_exactly_the_cached_blocks_of_every_database_and_tablespace() {
    let cluster = Cluster::build().start();
    cluster.create_tablespace("space");
    cluster.sql("CREATE DATABASE other");
    fill(&cluster, "postgres", "a", "");
    fill(&cluster, "postgres", "b", "TABLESPACE space");
    fill(&cluster, "other", "c", "");
    let relations: Vec<_> = [
        ("postgres", "a"),
        ("postgres", "a_id"),
        ("postgres", "b"),
        ("other", "c"),
        ("other", "c_id"),
    ]
    .map(|(database, relation)| cluster.file_of(database, relation))
    .into();

    // Nothing is cached at the start, so only the blocks that the test reads are.
    cluster.stop(Shutdown::Fast);
    cluster.write_list("<<0>>\n");
    cluster.start();
    cluster.sql("CREATE EXTENSION pg_prewarm");
    cluster.sql_in("other", "CREATE EXTENSION pg_prewarm");
    cluster.sql(
        "SELECT pg_prewarm('a', 'buffer', 'main', 10, 19), \
                pg_prewarm('a', 'buffer', 'main', 100, 100), \
                pg_prewarm('a', 'buffer', 'fsm'), pg_prewarm('a', 'buffer', 'vm'), \
                pg_prewarm('b', 'buffer', 'main', 0, 49)",
    );
    cluster.sql_in(
        "other",
        "SELECT pg_prewarm('c'), pg_prewarm('c_id', 'buffer', 'main', 1, 2)",
    );
    let before = cluster.cached();

    let mark = cluster.log_end();
    cluster.restart();
    let (loaded, total) = cluster.wait_for_load(mark);
    assert_eq!(loaded, total);
    let after = cluster.cached();
    for relation in relations {
        assert_eq!(
            of_relation(&after, relation),
            of_relation(&before, relation),
            "{relation:?}"
        );
    }
    let missing: Vec<_> = before.difference(&after).collect();
    assert!(missing.is_empty(), "not restored: {missing:?}");
}
