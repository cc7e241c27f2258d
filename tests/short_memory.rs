//! What fits into dynamic shared memory is loaded, the most used blocks first.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use postgres::Client;

use crate::common::{
    Block, Cluster, Fault, LIST, LoadStats, Shutdown, limit_file_size, list_of,
    list_with_usage_counts, value, wait_until,
};

const BLOCKS: u32 = 4000;

/// A stopped cluster with a list of a table's blocks, of which the last half is hot.
fn cluster(kind: &str) -> (Cluster, String) {
    let cluster = Cluster::build()
        .setting(&format!("dynamic_shared_memory_type = {kind}"))
        .setting("shared_buffers = 64MB")
        .setting("pg_prewarm.autoprewarm_interval = 0")
        .create();
    cluster.set_fault(Fault::SegmentSize, 0);
    cluster.start();
    cluster.sql("CREATE EXTENSION pg_prewarm; CREATE EXTENSION pg_buffercache");
    let table = cluster.table("t", BLOCKS);
    cluster.stop(Shutdown::Fast);
    let half = BLOCKS as usize / 2;
    let digits = "1".repeat(half) + &"3".repeat(half);
    let list = list_with_usage_counts(table.first(BLOCKS), &digits);
    cluster.write_list(&list);
    (cluster, list)
}

/// Lets segments have so many bytes, from when the server's own are there.
fn limit(cluster: &Cluster, bytes: i64, error: i32) {
    cluster.set_fault(Fault::SegmentError, error.into());
    cluster.set_fault(Fault::SegmentSize, bytes);
}

/// Starts the server, whose own segments are made in time, and has it load the list under
/// the limit. From then on, it dumps every second.
fn load(cluster: &Cluster, list: &str, bytes: i64, error: i32) -> (Client, usize) {
    cluster.write_list("<<0>>\n");
    cluster.start();
    let mut client = cluster.connect("postgres");
    assert_eq!(LoadStats::wait_for_end(&mut client).result(), "completed");
    cluster.write_list(list);
    limit(cluster, bytes, error);
    let mark = cluster.log_end();
    client
        .batch_execute("SELECT autoprewarm_load_now()")
        .unwrap();
    cluster.configure("pg_prewarm.autoprewarm_interval = 1");
    cluster.reload();
    (client, mark)
}

fn cached(client: &mut Client, condition: &str) -> i64 {
    value(
        client,
        &format!(
            "SELECT count(*) FROM pg_buffercache WHERE relforknumber = 0 \
             AND relfilenode = pg_relation_filenode('t') AND {condition}"
        ),
    )
}

#[test]
fn where_shared_memory_is_short_the_most_used_part_that_fits_is_loaded() {
    for (kind, error, reason) in [
        ("posix", libc::ENOSPC, "No space left on device"),
        ("posix", libc::ENOMEM, "Cannot allocate memory"),
        ("sysv", libc::ENOMEM, "Cannot allocate memory"),
        ("sysv", libc::EINVAL, "Invalid argument"),
        ("mmap", libc::ENOSPC, "No space left on device"),
    ] {
        let (cluster, list) = cluster(kind);
        // All of it takes about 25 kB, half of it the half.
        let (mut client, mark) = load(&cluster, &list, 16_000, error);
        let stats = LoadStats::wait_for_end(&mut client);
        assert_eq!(stats.result(), "completed", "{kind} {reason}");
        let half = i64::from(BLOCKS) / 2;
        assert_eq!(
            (stats.total, stats.loaded, stats.skipped),
            (2 * half, half, half)
        );
        assert_eq!(
            cached(&mut client, &format!("relblocknumber >= {half}")),
            half
        );
        assert_eq!(cached(&mut client, &format!("relblocknumber < {half}")), 0);
        let message = format!(
            "loading only {half} of {} blocks because of insufficient dynamic shared memory",
            2 * half
        );
        let log = cluster.log_since(mark);
        let warning = format!("WARNING:  {message}");
        assert_eq!(log.matches(&warning).count(), 1, "{log}");
        assert_eq!(log.matches("WARNING:").count(), 1, "{log}");
        assert!(log.contains(reason), "{log}");
        assert!(log.contains("shared memory segment"), "{log}");
        let counted = "SELECT concat_ws(' ', skipped_no_shared_memory, last_error) \
                       FROM pg_stat_autoprewarm";
        assert_eq!(
            value::<String>(&mut client, counted),
            format!("{half} {message}")
        );
        assert_eq!(
            cluster.wait_for_skipped(mark),
            format!("{half} blocks: {half} because there was not enough dynamic shared memory")
        );
        // What is not loaded stays in the list, and dumps go on.
        let listed = "SELECT count(*) FROM autoprewarm_blocks() \
                      WHERE filenumber = pg_relation_filenode('t') AND fork = 0";
        for _ in 0..2 {
            assert_eq!(value::<i64>(&mut client, listed), 2 * half);
            let carried = "SELECT blocks_carried FROM pg_stat_autoprewarm";
            assert_eq!(value::<i64>(&mut client, carried), half);
            let mark = cluster.log_end();
            cluster.wait_for_log(mark, "wrote block details");
        }
        assert_ne!(cluster.list(), list);
    }
}

#[test]
fn a_limit_of_the_system_is_met_in_the_same_way() {
    let cluster = Cluster::build()
        .setting("dynamic_shared_memory_type = posix")
        .setting("shared_buffers = 256MB")
        .setting("pg_prewarm.autoprewarm_interval = 1")
        .create();
    // The segment for these is larger than any file may be, and any file that
    // the leader writes to, its log, is smaller.
    const LIMIT: u64 = 64 << 10;
    let catalog = Block {
        database: 5,
        tablespace: 1663,
        filenumber: 1259,
        fork: 0,
        block: 0,
    };
    let list = list_of((0..LIMIT as u32).map(|block| catalog.at(block)));
    cluster.write_list(&list);
    let rights = |mode| {
        fs::set_permissions(cluster.data(LIST), fs::Permissions::from_mode(mode)).unwrap();
    };
    // Not to be read before the limit is set.
    rights(0o000);
    cluster.start();
    cluster.wait_for_log(0, "could not read file");
    let leader = cluster.leader().unwrap();
    limit_file_size(leader, Some(LIMIT));
    rights(0o600);
    cluster.wait_for_log(0, "WARNING:  loading only ");
    let (loaded, total) = cluster.wait_for_load(0);
    assert!(loaded > 0);
    assert_eq!(total, LIMIT);
    limit_file_size(leader, None);
    assert_eq!(cluster.leader(), Some(leader));
    wait_until("a dump after the load", || cluster.list() != list);
}

#[test]
fn where_not_even_a_chunk_fits_into_shared_memory_the_load_is_tried_again() {
    let (cluster, list) = cluster("posix");
    let (mut client, mark) = load(&cluster, &list, 100, libc::ENOSPC);
    let warning = "WARNING:  could not resize shared memory segment";
    let warnings = || cluster.log_since(mark).matches(warning).count();
    wait_until("the second try", || warnings() >= 2);
    let stats = LoadStats::wait_for(&mut client, |stats| stats.result.is_some());
    assert_eq!(
        (stats.state.as_str(), stats.result()),
        ("load failed", "failed")
    );
    assert_eq!(cluster.list(), list);
    limit(&cluster, 0, 0);
    let all = BLOCKS.into();
    assert_eq!(cluster.wait_for_load(mark), (all, all));
}
