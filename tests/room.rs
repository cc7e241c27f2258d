//! What a load may replace in shared buffers, and what not.

use std::collections::BTreeMap;

use postgres::Client;

use crate::common::{Block, Cluster, LoadStats, Shutdown, list_of, list_with_usage_counts, value};
use crate::load::load_now;

/// A running cluster whose pages become clean only by `CHECKPOINT`.
fn start() -> Cluster {
    let cluster = Cluster::build()
        .setting("shared_buffers = 16MB")
        .setting("bgwriter_lru_maxpages = 0")
        .setting("checkpoint_timeout = 1h")
        .setting("autovacuum = off")
        .setting("pg_prewarm.autoprewarm_interval = 0")
        .start();
    cluster.sql("CREATE EXTENSION pg_prewarm; CREATE EXTENSION pg_buffercache");
    cluster
}

/// The blocks in shared buffers by their file, fork and number, with their usage counts,
/// and whether they are dirty.
fn buffers(client: &mut Client) -> BTreeMap<(u32, u32, i16, i64), (i16, bool)> {
    client
        .query(
            "SELECT reldatabase, relfilenode, relforknumber, relblocknumber, usagecount, isdirty \
             FROM pg_buffercache WHERE relfilenode IS NOT NULL",
            &[],
        )
        .unwrap()
        .iter()
        .map(|row| {
            let block = (row.get(0), row.get(1), row.get(2), row.get(3));
            (block, (row.get(4), row.get(5)))
        })
        .collect()
}

/// Fills all buffers: with blocks of the table `warm`, which are used again and again; some
/// of `dirty`, which are that as well; and the others with blocks of `cold`.
fn fill(cluster: &Cluster) -> Client {
    cluster.table("warm", 400);
    cluster.table("cold", 2500);
    cluster.table("dirty", 50);
    cluster.stop(Shutdown::Fast);
    cluster.write_list("<<0>>\n");
    cluster.start();
    let mut client = cluster.connect("postgres");
    LoadStats::wait_for_end(&mut client);
    client
        .batch_execute("UPDATE dirty SET id = id; SELECT pg_prewarm('cold')")
        .unwrap();
    for _ in 0..4 {
        client.batch_execute("SELECT pg_prewarm('warm')").unwrap();
    }
    client
}

#[test]
fn a_load_on_demand_replaces_clean_blocks_with_a_lower_usage_count_only() {
    let cluster = start();
    let listed = cluster.table("listed", 300);
    let mut client = fill(&cluster);
    let before = buffers(&mut client);
    assert!(before.len() > 2000, "{}", before.len());

    let list = list_with_usage_counts(listed.first(300), &"3".repeat(300));
    let stats = load_now(&cluster, &mut client, list);
    assert_eq!((stats.total, stats.loaded), (300, 300));
    let after = buffers(&mut client);
    let lost: Vec<_> = before
        .iter()
        .filter(|(block, (usage_count, is_dirty))| {
            (*usage_count >= 3 || *is_dirty) && !after.contains_key(block)
        })
        .collect();
    assert!(lost.is_empty(), "{lost:?}");
}

#[test]
fn a_load_on_demand_of_blocks_with_the_same_usage_count_as_all_others_replaces_none() {
    let cluster = start();
    let listed = cluster.table("listed", 300);
    let mut client = fill(&cluster);
    // The catalogs that a load needs are read now. Later they would need buffers, too.
    load_now(&cluster, &mut client, list_of([]));
    // All that the clock hand would take at once is used once more.
    client
        .batch_execute(
            "SELECT pg_prewarm('cold', 'buffer', 'main', n, n) FROM generate_series(0, 2499) n",
        )
        .unwrap();
    client.batch_execute("SELECT pg_prewarm('warm')").unwrap();
    let before = buffers(&mut client);
    let zero = before.values().filter(|(usage_count, _)| *usage_count == 0);
    let zero = i64::try_from(zero.count()).unwrap();

    let stats = load_now(&cluster, &mut client, list_of(listed.first(300)));
    assert!(stats.loaded <= zero, "{stats:?}, {zero}");
    let after = buffers(&mut client);
    let lost = before
        .iter()
        .filter(|(block, (usage_count, _))| *usage_count > 0 && !after.contains_key(block));
    assert_eq!(lost.count(), 0);
}

#[test]
fn buffers_that_were_emptied_are_filled_though_no_list_has_them() {
    let cluster = start();
    if cluster.major() < 17 {
        println!("before 17 no function empties buffers: not run");
        return;
    }
    let listed: Vec<Block> = cluster.table("listed", 1500).first(1500).collect();
    let mut client = fill(&cluster);
    client
        .batch_execute(
            "SELECT count(pg_buffercache_evict(bufferid)) FROM pg_buffercache \
             WHERE relfilenode IS NOT NULL",
        )
        .unwrap();
    let stats = load_now(&cluster, &mut client, list_of(listed));
    assert_eq!((stats.total, stats.loaded), (1500, 1500));
}

#[test]
fn a_load_fills_buffers_that_others_have_filled_and_emptied_meanwhile() {
    let cluster = start();
    let listed = cluster.table("listed", 300);
    for number in 0..5 {
        cluster.table(&format!("dropped_{number}"), 700);
    }
    cluster.stop(Shutdown::Fast);
    cluster.write_list("<<0>>\n");
    // Fifty blocks a second.
    cluster.configure("pg_prewarm.autoprewarm_max_rate = 400");
    cluster.start();
    let mut client = cluster.connect("postgres");
    LoadStats::wait_for_end(&mut client);
    cluster.write_list(list_of(listed.first(300)));
    client
        .batch_execute("SELECT autoprewarm_load_now()")
        .unwrap();
    // More than all 2,048 buffers, but never all at once.
    for number in 0..5 {
        for sql in ["SELECT pg_prewarm('dropped')", "DROP TABLE dropped"] {
            let sql = sql.replace("dropped", &format!("dropped_{number}"));
            client.batch_execute(&sql).unwrap();
        }
    }
    assert_eq!(LoadStats::get(&mut client).state, "loading");
    let stats = LoadStats::wait_for_end(&mut client);
    assert_eq!((stats.loaded, stats.skipped), (300, 0), "{stats:?}");
}

#[test]
fn a_cache_of_one_megabyte_is_filled() {
    let cluster = Cluster::build().setting("shared_buffers = 1MB").start();
    cluster.sql("CREATE EXTENSION pg_prewarm");
    let table = cluster.table("t", 100);
    cluster.stop(Shutdown::Fast);
    cluster.write_list(list_of(table.first(100)));
    let mark = cluster.log_end();
    cluster.start();
    let (loaded, total) = cluster.wait_for_load(mark);
    assert_eq!(total, 100);
    // Catalogs take about 70 of the 128 buffers, and 8 are left to others.
    assert!(loaded >= 40, "{loaded}");
    let buffers: i64 = value(
        &mut cluster.connect("postgres"),
        "SELECT setting::bigint FROM pg_settings WHERE name = 'shared_buffers'",
    );
    assert_eq!(buffers, 128);
}
