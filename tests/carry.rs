//! What a load has left for a temporary reason stays in the list until it is loaded,
//! its relation is gone, or two more starts have left it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::PermissionsExt;

use crate::common::{
    Block, Cluster, Fault, Installation, LIST, LoadStats, Shutdown, error, list_of,
    list_with_usage_counts, signal, wait_until,
};

const DUMP: &str = "SELECT autoprewarm_dump_now()";
const LOAD: &str = "SELECT autoprewarm_load_now()";

/// The blocks of a relation that are in the list.
fn listed(cluster: &Cluster, relation: Block) -> BTreeSet<Block> {
    let mut listed = cluster.listed();
    listed.retain(|block| block.same_relation(&relation));
    listed
}

fn cached(cluster: &Cluster, relation: Block) -> BTreeSet<Block> {
    let mut cached = cluster.cached();
    cached.retain(|block| block.same_relation(&relation));
    cached
}

/// What the list says of the records that it carries: how many were left once, and how
/// many twice.
fn carried(cluster: &Cluster) -> (u64, u64) {
    let list = cluster.list();
    let Some(line) = list.lines().find(|line| line.starts_with("# carried")) else {
        return (0, 0);
    };
    let mut numbers = line.split(' ').skip(2).map(|word| word.parse().unwrap());
    (numbers.next().unwrap(), numbers.next().unwrap())
}

/// What the view says of them.
fn shown(cluster: &Cluster) -> Option<i64> {
    cluster.value("SELECT blocks_carried FROM pg_stat_autoprewarm")
}

/// Restarts with so many shared buffers, and waits for the load.
fn restart_with(cluster: &Cluster, shared_buffers: &str) -> (u64, u64) {
    cluster.configure(&format!("shared_buffers = {shared_buffers}"));
    restart(cluster)
}

fn restart(cluster: &Cluster) -> (u64, u64) {
    let mark = cluster.log_end();
    cluster.restart();
    let loaded = cluster.wait_for_load(mark);
    let mut client = cluster.connect("postgres");
    LoadStats::wait_for_end(&mut client);
    loaded
}

/// A cluster with a table of 100 blocks that a prepared transaction has locked. Its list
/// has these, and no other block of the table.
fn cluster_with_locked_table() -> (Cluster, Block) {
    let cluster = Cluster::build()
        .setting("max_prepared_transactions = 2")
        .setting("pg_prewarm.autoprewarm_interval = 0")
        .start();
    cluster.sql("CREATE EXTENSION pg_prewarm");
    let table = cluster.table("t", 100);
    cluster.sql("CHECKPOINT");
    cluster.sql("BEGIN; LOCK TABLE t; PREPARE TRANSACTION 'lock'");
    // What is cached at the shutdown has blocks of other forks as well.
    cluster.configure("pg_prewarm.autoprewarm = off");
    cluster.restart();
    cluster.configure("pg_prewarm.autoprewarm = on");
    cluster.write_list(list_of(table.first(100)));
    (cluster, table)
}

#[test]
fn a_list_is_carried_over_five_restarts_with_changing_shared_buffers() {
    let cluster = Cluster::build()
        .setting("shared_buffers = 24MB")
        .setting("pg_prewarm.autoprewarm_interval = 1")
        .start();
    cluster.sql("CREATE EXTENSION pg_prewarm");
    let table = cluster.table("t", 1500);
    let all = cached(&cluster, table);
    assert!(all.len() > 1500);
    for (shared_buffers, fits) in [
        ("4MB", false),
        ("6MB", false),
        ("24MB", true),
        ("5MB", false),
        ("24MB", true),
    ] {
        restart_with(&cluster, shared_buffers);
        assert_eq!(cached(&cluster, table) == all, fits);
        assert_eq!(shown(&cluster).unwrap() > 0, !fits, "{shared_buffers}");
        // At the end of the load, by a dump at an interval, by one on request.
        assert!(listed(&cluster, table) == all, "{shared_buffers}");
        let mark = cluster.log_end();
        cluster.wait_for_log(mark, "wrote block details");
        assert!(listed(&cluster, table) == all, "{shared_buffers}");
        let written: i64 = cluster.dump();
        assert_eq!(written as usize, cluster.listed().len());
        assert!(listed(&cluster, table) == all, "{shared_buffers}");
        let (once, twice) = carried(&cluster);
        assert_eq!(shown(&cluster), Some((once + twice) as i64));
    }
}

#[test]
fn a_locked_table_stays_in_the_list_over_a_restart_and_is_loaded_later() {
    let (cluster, table) = cluster_with_locked_table();
    let all: BTreeSet<_> = table.first(100).collect();
    for age in [(100, 0), (0, 100)] {
        let (loaded, total) = restart(&cluster);
        assert_eq!(total - loaded, 100);
        assert_eq!(shown(&cluster), Some(100));
        assert_eq!(carried(&cluster), age);
        assert!(
            cluster
                .log()
                .contains("autoprewarm keeps 100 of the skipped blocks")
        );
        assert!(cached(&cluster, table).is_empty());
        assert_eq!(listed(&cluster, table), all);
    }
    cluster.sql("COMMIT PREPARED 'lock'");
    cluster.sql(LOAD);
    LoadStats::wait_for_end(&mut cluster.connect("postgres"));
    assert_eq!(cached(&cluster, table), all);
    assert_eq!(shown(&cluster), Some(0));
    cluster.dump();
    assert_eq!(carried(&cluster), (0, 0));
    assert_eq!(listed(&cluster, table), all);
}

#[test]
fn what_a_later_try_has_loaded_is_carried_no_more() {
    let (cluster, table) = cluster_with_locked_table();
    let all: BTreeSet<_> = table.first(100).collect();
    cluster.configure("pg_prewarm.autoprewarm_interval = 2");
    restart(&cluster);
    // While it is tried again, dumps carry it.
    for _ in 0..2 {
        assert_eq!((carried(&cluster), shown(&cluster)), ((100, 0), Some(100)));
        assert_eq!(listed(&cluster, table), all);
        let mark = cluster.log_end();
        cluster.wait_for_log(mark, "wrote block details");
    }
    let mark = cluster.log_end();
    cluster.sql("COMMIT PREPARED 'lock'");
    cluster.wait_for_log(
        mark,
        "autoprewarm prewarmed 100 blocks of relations that had been locked",
    );
    assert_eq!(cached(&cluster, table), all);
    wait_until("a dump", || shown(&cluster) == Some(0));
    assert_eq!(carried(&cluster), (0, 0));
    assert_eq!(listed(&cluster, table), all);
}

#[test]
fn usage_counts_are_carried_along() {
    let (cluster, table) = cluster_with_locked_table();
    let counts = || -> BTreeMap<i64, i16> {
        let mut client = cluster.connect("postgres");
        let rows = client.query(
            "SELECT block, usagecount FROM autoprewarm_blocks() WHERE filenumber = $1",
            &[&table.filenumber],
        );
        let rows = rows.unwrap();
        rows.iter().map(|row| (row.get(0), row.get(1))).collect()
    };
    cluster.stop(Shutdown::Immediate);
    let digits: String = (0..100).map(|block| (block % 6).to_string()).collect();
    cluster.write_list(list_with_usage_counts(table.first(100), &digits));
    let mark = cluster.log_end();
    cluster.start();
    cluster.wait_for_load(mark);
    restart(&cluster);
    cluster.dump();
    let expected: BTreeMap<_, _> = (0..100).map(|block| (block, (block % 6) as i16)).collect();
    assert_eq!(counts(), expected);
}

#[test]
fn what_three_starts_have_left_is_carried_no_more() {
    let (cluster, table) = cluster_with_locked_table();
    for age in [(100, 0), (0, 100), (0, 0)] {
        restart(&cluster);
        assert_eq!(shown(&cluster), Some((age.0 + age.1) as i64));
        // Neither loads on demand nor dumps make a record older.
        for _ in 0..2 {
            cluster.dump();
            assert_eq!(carried(&cluster), age);
        }
        cluster.sql(LOAD);
        LoadStats::wait_for_end(&mut cluster.connect("postgres"));
        cluster.dump();
        assert_eq!(carried(&cluster), age);
        assert_eq!(cluster.lists(table), age != (0, 0));
    }
}

#[test]
fn what_is_gone_is_not_carried() {
    let (cluster, table) = cluster_with_locked_table();
    let kept = cluster.table("kept", 10);
    let missing = Block {
        filenumber: 4_000_000,
        ..table
    };
    let template = Block {
        database: 1,
        filenumber: 1259,
        ..table
    };
    let dropped = Block {
        database: 4_000_000,
        ..table
    };
    cluster.stop(Shutdown::Fast);
    let list = list_of(
        [missing, template, dropped, kept.at(10), kept.at(3)]
            .into_iter()
            .chain(table.first(100)),
    );
    cluster.write_list(&list);
    let mark = cluster.log_end();
    cluster.start();
    cluster.wait_for_load(mark);
    cluster.dump();
    assert_eq!(carried(&cluster), (100, 0));
    for gone in [missing, template, dropped] {
        assert!(!cluster.lists(gone), "{gone:?}");
    }
    assert!(!cluster.listed().contains(&kept.at(10)));
    assert!(cluster.listed().contains(&kept.at(3)));

    // When its lock is released, the table is dropped.
    cluster.sql("COMMIT PREPARED 'lock'");
    cluster.sql("DROP TABLE t");
    restart(&cluster);
    assert_eq!(shown(&cluster), Some(0));
    cluster.dump();
    assert!(!cluster.lists(table));
}

#[test]
fn four_times_as_many_blocks_as_there_are_buffers_are_carried_the_highest_usage_counts() {
    let cluster = Cluster::build()
        .setting("pg_prewarm.autoprewarm_interval = 0")
        .start();
    cluster.sql("CREATE EXTENSION pg_prewarm");
    let table = cluster.table("t", 3000);
    cluster.stop(Shutdown::Fast);
    let usage_count = |block: u32| block % 3;
    let digits: String = (0..3000)
        .map(|block| usage_count(block).to_string())
        .collect();
    // No line of a trailer has so many digits.
    let mut list = list_of(table.first(3000));
    list.push_str("# pg_prewarm 2.0\n# usage counts\n");
    for line in digits.as_bytes().chunks(120) {
        list.push_str(std::str::from_utf8(line).unwrap());
        list.push('\n');
    }
    list.push_str(&format!(
        "# crc32c 0x{:08x}\n",
        crc32c::crc32c(list.as_bytes())
    ));
    cluster.write_list(&list);
    cluster.configure("shared_buffers = 2MB");
    let mark = cluster.log_end();
    cluster.start();
    cluster.wait_for_load(mark);
    LoadStats::wait_for_end(&mut cluster.connect("postgres"));
    assert_eq!(shown(&cluster), Some(4 * 256));
    cluster.stop(Shutdown::Fast);
    let (once, twice) = carried(&cluster);
    assert!(once <= 4 * 256 && twice == 0, "{once}, {twice}");
    // Nearly all of the thousand blocks of the highest usage count: what was loaded may
    // have been evicted since.
    let mut of_count = [0; 3];
    for block in listed(&cluster, table) {
        if block.fork == 0 {
            of_count[usage_count(block.block) as usize] += 1;
        }
    }
    assert!(of_count[0] == 0 && of_count[2] > 700, "{of_count:?}");
}

#[test]
fn contribs_module_loads_a_list_with_carried_records() {
    let Some(contrib) = Installation::contrib() else {
        return;
    };
    let (mut cluster, table) = cluster_with_locked_table();
    restart(&cluster);
    cluster.sql("COMMIT PREPARED 'lock'");
    cluster.stop(Shutdown::Fast);
    assert_eq!(carried(&cluster), (100, 0));
    let total = cluster.listed().len() as u64;
    cluster.switch_to(contrib);
    let mark = cluster.log_end();
    cluster.start();
    assert_eq!(cluster.wait_for_load(mark), (total, total));
    assert_eq!(cached(&cluster, table).len(), 100);
}

/// A load on demand of 1000 blocks that has loaded some, and goes on slowly.
fn cluster_in_mid_load() -> (Cluster, Block) {
    let cluster = Cluster::build()
        .setting("pg_prewarm.autoprewarm_interval = 0")
        .setting("pg_prewarm.autoprewarm_max_rate = 800")
        .start();
    cluster.sql("CREATE EXTENSION pg_prewarm");
    let table = cluster.table("t", 1000);
    cluster.stop(Shutdown::Fast);
    cluster.write_list(list_of(table.first(1000)));
    cluster.start();
    LoadStats::wait_for(&mut cluster.connect("postgres"), |stats| stats.loaded > 20);
    (cluster, table)
}

#[test]
fn what_a_cancelled_load_has_left_goes_on_in_the_next_list() {
    let (cluster, table) = cluster_in_mid_load();
    assert!(cluster.value::<bool>("SELECT autoprewarm_cancel()"));
    let left = cluster.value::<i64>("SELECT skipped_cancelled FROM pg_stat_autoprewarm");
    assert!(left > 0);
    assert_eq!(shown(&cluster), Some(left));
    assert_eq!(cluster.list(), list_of(table.first(1000)));
    let mark = cluster.log_end();
    cluster.configure("pg_prewarm.autoprewarm_interval = 1");
    cluster.reload();
    cluster.wait_for_log(mark, "wrote block details");
    assert_eq!(listed(&cluster, table).len(), 1000);
    assert_eq!(carried(&cluster), (left as u64, 0));
    assert_eq!(shown(&cluster), Some(left));
    cluster.configure("pg_prewarm.autoprewarm_max_rate = 0\npg_prewarm.autoprewarm_interval = 0");
    assert_eq!(restart(&cluster).0, cluster.listed().len() as u64);
    assert_eq!(cached(&cluster, table).len(), 1000);
}

#[test]
fn a_dump_after_an_interrupted_load_carries_the_list_that_was_to_be_loaded() {
    let (cluster, table) = cluster_in_mid_load();
    let leader = cluster.leader().unwrap();
    signal(leader, libc::SIGTERM);
    wait_until("its end", || cluster.leader().is_none());
    assert_eq!(cluster.list(), list_of(table.first(1000)));
    cluster.dump();
    assert_eq!(listed(&cluster, table).len(), 1000);
    assert_eq!(shown(&cluster), Some(carried(&cluster).0 as i64));
}

#[test]
fn a_dump_that_cannot_read_what_is_carried_keeps_the_list() {
    let (cluster, table) = cluster_with_locked_table();
    restart(&cluster);
    let list = cluster.list();
    let rights = |mode| {
        fs::set_permissions(cluster.data(LIST), fs::Permissions::from_mode(mode)).unwrap();
    };
    rights(0o200);
    let mut client = cluster.connect("postgres");
    let refused = error(&mut client, DUMP);
    assert_eq!(
        (refused.sqlstate.as_str(), refused.message.as_str()),
        (
            "42501",
            "could not open file \"autoprewarm.blocks\": Permission denied"
        )
    );
    let mark = cluster.log_end();
    cluster.configure("pg_prewarm.autoprewarm_interval = 1");
    cluster.reload();
    cluster.wait_for_log(mark, "could not open file \"autoprewarm.blocks\"");
    rights(0o600);
    cluster.wait_for_log(mark, "wrote block details");
    assert!(cluster.list() != list || cluster.lists(table));
    assert_eq!(listed(&cluster, table).len(), 100);
}

#[test]
fn a_list_that_cannot_be_written_after_a_load_is_carried_as_a_whole_later() {
    let (cluster, table) = cluster_with_locked_table();
    cluster.stop(Shutdown::Immediate);
    let tmp = cluster.data("autoprewarm.blocks.tmp");
    fs::create_dir(&tmp).unwrap();
    let list = cluster.list();
    let mark = cluster.log_end();
    cluster.start();
    cluster.wait_for_log(mark, "could not open file \"autoprewarm.blocks.tmp\"");
    LoadStats::wait_for_end(&mut cluster.connect("postgres"));
    assert_eq!(cluster.list(), list);
    fs::remove_dir(&tmp).unwrap();
    cluster.stop(Shutdown::Fast);
    assert_eq!(listed(&cluster, table).len(), 100);
    assert_eq!(carried(&cluster), (100, 0));
}

#[test]
fn a_dump_that_is_refused_memory_forgets_nothing_that_is_carried() {
    let (cluster, table) = cluster_with_locked_table();
    cluster.stop(Shutdown::Immediate);
    cluster.set_fault(Fault::RefusedMemory, 0);
    let mark = cluster.log_end();
    cluster.start();
    cluster.wait_for_load(mark);
    LoadStats::wait_for_end(&mut cluster.connect("postgres"));
    let (mut dumps, mut refused) = (0, 0);
    for round in 0..30 {
        let mut client = cluster.connect("postgres");
        client.batch_execute("LOAD 'pg_prewarm'").unwrap();
        cluster.set_fault(Fault::RefusedMemory, 2 << (round % 10));
        match client.batch_execute(DUMP) {
            Ok(()) => dumps += 1,
            Err(_) => refused += 1,
        }
        cluster.set_fault(Fault::RefusedMemory, 0);
        assert_eq!(carried(&cluster), (100, 0));
        assert_eq!(listed(&cluster, table).len(), 100);
    }
    assert!(dumps > 0 && refused > 0, "{dumps}, {refused}");
}
