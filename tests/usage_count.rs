//! How hot blocks were is saved, restored, and decides what is loaded.

use std::collections::BTreeMap;

use crate::common::{Block, Cluster, LIST, LoadStats, Shutdown, list_of, list_with_usage_counts};

/// A table of that many blocks, and the extensions that the tests use.
fn table(cluster: &Cluster, blocks: u32) -> Block {
    cluster.sql("CREATE EXTENSION pg_prewarm; CREATE EXTENSION pg_buffercache");
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
    assert!(!cluster.log_since(mark).contains("usage_count"));
}

#[test]
fn what_clients_use_during_a_load_stays_as_hot_as_they_made_it() {
    let cluster = Cluster::build().start();
    let file = table(&cluster, 300);
    cluster.stop(Shutdown::Fast);
    // By the list, all are as cold as can be.
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
fn a_cache_that_has_shrunk_keeps_the_hottest() {
    let cluster = Cluster::build().setting("shared_buffers = 64MB").start();
    let file = table(&cluster, 6000);
    cluster.stop(Shutdown::Fast);
    cluster.write_list("<<0>>\n");
    cluster.start();
    cluster.sql("SELECT pg_prewarm('t')");
    // Every tenth block is hot.
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
    let hot = usage_counts(&cluster)
        .into_iter()
        .filter(|(block, _)| block % 10 == 0)
        .count();
    // All 600, less what made room for the session that asks.
    assert!(hot > 450, "{hot} of {}", file.filenumber);
}

#[test]
fn what_was_used_again_is_loaded_before_all_else() {
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
fn a_list_whose_trailer_does_not_fit_is_loaded_without_usage_count() {
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
