//! Usage counts are saved and restored, and decide which blocks are loaded.

use std::collections::BTreeMap;

use crate::common::{Block, Cluster, LIST, LoadStats, Shutdown, list_of, list_with_usage_counts};

/// Creates a table of so many blocks, and the extensions that the tests use.
fn table(cluster: &Cluster, blocks: u32) -> Block {
    cluster.sql("CREATE EXTENSION pg_prewarm; CREATE EXTENSION pg_buffercache");
    // Before its first load has ended, the leader writes no list.
    cluster.sql("SELECT autoprewarm_wait()");
    cluster.table("t", blocks)
}

/// The usage count of each cached block of the table.
fn usage_counts(cluster: &Cluster) -> BTreeMap<i64, i32> {
    cluster
        .connect("postgres")
        .query(
            "SELECT relblocknumber, usagecount::int FROM pg_buffercache \
             WHERE relfilenode = pg_relation_filenode('t') AND relforknumber = 0",
            &[],
        )
        .unwrap()
        .iter()
        .map(|row| (row.get(0), row.get(1)))
        .collect()
}

#[test]
fn a_restart_restores_usage_counts() {
    let cluster = Cluster::build().start();
    table(&cluster, 600);
    cluster.stop(Shutdown::Fast);
    cluster.write_list("<<0>>\n");
    cluster.start();
    cluster.sql("SELECT autoprewarm_wait()");
    // Block n is read n % 5 + 1 times.
    for times in 0..5 {
        cluster.sql(&format!(
            "SELECT pg_prewarm('t', 'buffer', 'main', n, n) \
             FROM generate_series(0, 599) n WHERE n % 5 >= {times}"
        ));
    }
    let before = usage_counts(&cluster);
    assert_eq!(before.len(), 600);
    assert!(
        before.iter().all(|(n, count)| *count == (n % 5 + 1) as i32),
        "{before:?}"
    );

    let mark = cluster.log_end();
    cluster.restart();
    cluster.wait_for_load(mark);
    assert_eq!(usage_counts(&cluster), before);
    assert!(!cluster.log_since(mark).contains("usage counts"));
}

#[test]
fn a_block_that_a_client_uses_during_a_load_keeps_its_higher_usage_count() {
    let cluster = Cluster::build().start();
    let file = table(&cluster, 300);
    cluster.stop(Shutdown::Fast);
    // The list has no usage counts, so all are 1.
    cluster.write_list(list_of(file.first(300)));
    cluster.configure("pg_prewarm.autoprewarm_max_rate = 16");
    cluster.start();
    let mut client = cluster.connect("postgres");
    LoadStats::wait_for(&mut client, |stats| stats.loaded > 0);
    for _ in 0..3 {
        client
            .batch_execute("SELECT pg_prewarm('t', 'buffer', 'main', 250, 299)")
            .unwrap();
    }
    cluster.configure("pg_prewarm.autoprewarm_max_rate = 0");
    cluster.reload();
    let stats = LoadStats::wait_for_end(&mut client);
    assert_eq!((stats.total, stats.cached), (300, 50));
    let counts = usage_counts(&cluster);
    assert_eq!(counts.len(), 300);
    assert!(
        counts
            .iter()
            .all(|(n, count)| *count == if *n < 250 { 1 } else { 3 }),
        "{counts:?}"
    );
}

#[test]
fn if_shared_buffers_have_shrunk_the_blocks_with_the_highest_usage_counts_are_loaded() {
    let cluster = Cluster::build().setting("shared_buffers = 64MB").start();
    let file = table(&cluster, 6000);
    cluster.stop(Shutdown::Fast);
    cluster.write_list("<<0>>\n");
    cluster.start();
    cluster.sql("SELECT autoprewarm_wait()");
    cluster.sql("SELECT pg_prewarm('t')");
    // Every tenth block is used more often.
    for _ in 0..3 {
        cluster.sql(
            "SELECT pg_prewarm('t', 'buffer', 'main', n, n) FROM generate_series(0, 5999, 10) n",
        );
    }
    cluster.stop(Shutdown::Fast);
    cluster.configure("shared_buffers = 8MB");
    let mark = cluster.log_end();
    cluster.start();
    let (loaded, total) = cluster.wait_for_load(mark);
    assert!(loaded < 1100 && total > 6000, "{loaded} of {total}");
    let often_used = usage_counts(&cluster)
        .into_iter()
        .filter(|(block, _)| block % 10 == 0)
        .count();
    // All 600, except those that the session of the test has evicted.
    assert!(often_used > 450, "{often_used} of {}", file.filenumber);
}

#[test]
fn blocks_with_a_usage_count_of_2_or_more_are_loaded_first() {
    let cluster = Cluster::build().start();
    let file = table(&cluster, 100);
    cluster.stop(Shutdown::Fast);
    let digits = format!("{}{}", "1".repeat(60), "2".repeat(40));
    cluster.write_list(list_with_usage_counts(file.first(100), &digits));
    cluster.configure("pg_prewarm.autoprewarm_max_rate = 16");
    cluster.start();
    let mut client = cluster.connect("postgres");
    LoadStats::wait_for(&mut client, |stats| stats.loaded > 0);
    let counts = usage_counts(&cluster);
    assert!(
        counts.iter().all(|(n, count)| *n >= 60 && *count == 2),
        "{counts:?}"
    );
    cluster.configure("pg_prewarm.autoprewarm_max_rate = 0");
    cluster.reload();
    assert_eq!(LoadStats::wait_for_end(&mut client).loaded, 100);
}

#[test]
fn a_list_without_a_valid_trailer_is_loaded_with_usage_count_1() {
    let cluster = Cluster::build().start();
    table(&cluster, 100);
    cluster.sql("SELECT pg_prewarm('t'), pg_prewarm('t'), pg_prewarm('t')");
    cluster.stop(Shutdown::Fast);
    let text = cluster.list();
    let contribs = text[..text.find('#').unwrap()].to_owned();
    let edited = text.replace("# crc32c 0x", "# crc32c 0x0");
    for (list, said) in [
        (
            contribs,
            format!("file \"{LIST}\" contains no usage counts, using 1 for all blocks"),
        ),
        (
            edited,
            format!("ignoring usage counts in \"{LIST}\": the checksum does not match"),
        ),
    ] {
        cluster.write_list(list);
        let mark = cluster.log_end();
        cluster.start();
        let (loaded, total) = cluster.wait_for_load(mark);
        assert_eq!(loaded, total);
        assert_eq!(cluster.log_since(mark).matches("usage counts").count(), 1);
        cluster.wait_for_log(mark, &said);
        let counts = usage_counts(&cluster);
        assert!(
            counts.len() == 100 && counts.values().all(|count| *count == 1),
            "{counts:?}"
        );
        cluster.stop(Shutdown::Immediate);
    }
}
