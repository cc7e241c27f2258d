//! A load that takes the server down is not begun for ever.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use postgres::Client;

use crate::common::{
    Cluster, LIST, LoadStats, Shutdown, error, give_to_server, list_of, signal, value, wait_until,
};

const MARK: &str = "pg_stat_tmp/autoprewarm.loading";

const SUSPENDED: &str = "skipping prewarm because the server crashed during the last 3 loads";

const BLOCKS: u32 = 1000;

/// A stopped cluster, and its list, which it would load for minutes.
fn cluster_with_slow_load(interval: u32) -> (Cluster, String) {
    let mut cluster = Cluster::build()
        .setting(&format!("pg_prewarm.autoprewarm_interval = {interval}"))
        .start();
    cluster.expect_crash();
    cluster.sql("CREATE EXTENSION pg_prewarm");
    let table = cluster.table("t", BLOCKS);
    cluster.stop(Shutdown::Fast);
    set_rate(&cluster, 8);
    let list = list_of(table.first(BLOCKS));
    cluster.write_list(&list);
    (cluster, list)
}

fn set_rate(cluster: &Cluster, rate: u32) {
    cluster.configure(&format!("pg_prewarm.autoprewarm_max_rate = {rate}"));
}

fn wait_for_worker(client: &mut Client) -> i32 {
    let mut pid = None;
    wait_until("a worker", || {
        pid = value(
            client,
            "SELECT max(pid) FROM pg_stat_activity WHERE backend_type = 'autoprewarm worker'",
        );
        pid.is_some()
    });
    pid.unwrap()
}

/// Kills a worker of the load, and waits until the server has come back.
fn crash_during_load(cluster: &Cluster) {
    let worker = wait_for_worker(&mut cluster.connect("postgres"));
    let mark = cluster.log_end();
    signal(worker, libc::SIGKILL);
    cluster.wait_for_log(mark, "database system is ready to accept connections");
}

fn wait_for_suspension(cluster: &Cluster) -> Client {
    let mut client = cluster.connect("postgres");
    let stats = LoadStats::wait_for(&mut client, |stats| stats.state == "load suspended");
    assert_eq!(stats.result(), "suspended");
    client
}

/// Has three loads crash the server, the last two of which have followed a crash.
fn crash_until_suspended(cluster: &Cluster) -> Client {
    for _ in 0..3 {
        crash_during_load(cluster);
    }
    wait_for_suspension(cluster)
}

fn crashes(cluster: &Cluster) -> Option<String> {
    fs::read_to_string(cluster.data(MARK)).ok()
}

#[test]
fn the_third_load_in_a_row_that_follows_a_crash_is_not_begun_and_the_list_is_kept() {
    let (cluster, list) = cluster_with_slow_load(1);
    let mark = cluster.log_end();
    cluster.start();
    let mut client = crash_until_suspended(&cluster);
    let log = cluster.log_since(mark);
    assert_eq!(log.matches(&format!("WARNING:  {SUSPENDED}")).count(), 1);
    let hint = "HINT:  Use autoprewarm_load_now() to load the blocks";
    assert_eq!(log.matches(hint).count(), 1);
    let last_error = "SELECT last_error FROM pg_stat_autoprewarm";
    assert_eq!(value::<String>(&mut client, last_error), SUSPENDED);
    // Nobody waits for what will not come.
    assert!(value::<bool>(&mut client, "SELECT autoprewarm_wait('0')"));

    // A few intervals, a reload, another leader and a shutdown.
    std::thread::sleep(std::time::Duration::from_millis(2500));
    cluster.reload();
    let leader = cluster.leader().unwrap();
    client
        .batch_execute(&format!("SELECT pg_terminate_backend({leader}, 60000)"))
        .unwrap();
    cluster.sql("SELECT autoprewarm_start_worker()");
    cluster.wait_for_leader();
    wait_for_suspension(&cluster);
    assert_eq!(cluster.list(), list);
    cluster.stop(Shutdown::Fast);
    assert_eq!(cluster.list(), list);

    // Restarts of the postmaster change nothing.
    for how in [Shutdown::Immediate, Shutdown::Fast] {
        let mark = cluster.log_end();
        cluster.start();
        wait_for_suspension(&cluster);
        cluster.wait_for_log(mark, SUSPENDED);
        cluster.stop(how);
        assert_eq!(cluster.list(), list);
    }
}

#[test]
fn a_load_on_request_begins_all_the_same_and_takes_the_count_back() {
    let (cluster, list) = cluster_with_slow_load(0);
    cluster.start();
    for _ in 0..2 {
        let mut client = crash_until_suspended(&cluster);
        assert_eq!(crashes(&cluster).as_deref(), Some("3\n"));
        client
            .batch_execute("SELECT autoprewarm_load_now()")
            .unwrap();
        LoadStats::wait_for(&mut client, |stats| stats.state == "loading");
        wait_until("the mark", || crashes(&cluster).as_deref() == Some("1\n"));
        assert_eq!(cluster.list(), list);
        set_rate(&cluster, 0);
        cluster.reload();
        let stats = LoadStats::wait_for_end(&mut client);
        assert_eq!((stats.result(), stats.skipped), ("completed", 0));
        assert_eq!(crashes(&cluster), None);
        // After the load has ended, a crash does not count.
        set_rate(&cluster, 8);
        cluster.reload();
        cluster.write_list(&list);
        let mark = cluster.log_end();
        signal(value(&mut client, "SELECT pg_backend_pid()"), libc::SIGKILL);
        cluster.wait_for_log(mark, "database system is ready to accept connections");
    }
}

#[test]
fn a_list_that_somebody_replaces_is_loaded_again() {
    let (cluster, list) = cluster_with_slow_load(0);
    cluster.start();
    let mut client = crash_until_suspended(&cluster);
    assert!(value::<i64>(&mut client, "SELECT autoprewarm_dump_now()") > 0);
    assert_ne!(cluster.list(), list);
    // The blocks of the former list are carried.
    let listed = "SELECT count(*) FROM autoprewarm_blocks() \
                  WHERE filenumber = pg_relation_filenode('t') AND fork = 0";
    assert_eq!(value::<i64>(&mut client, listed), i64::from(BLOCKS));
    assert_eq!(LoadStats::get(&mut client).state, "idle");
    assert_eq!(crashes(&cluster), None);
    set_rate(&cluster, 0);
    let mark = cluster.log_end();
    cluster.restart();
    let (loaded, total) = cluster.wait_for_load(mark);
    assert!(loaded > 0 && loaded == total);
}

#[test]
fn a_load_that_ends_takes_the_count_back() {
    let (cluster, list) = cluster_with_slow_load(0);
    for end in ["shutdown", "smart shutdown", "cancel", "termination", "end"] {
        cluster.write_list(&list);
        cluster.start();
        crash_during_load(&cluster);
        let mut client = cluster.connect("postgres");
        wait_for_worker(&mut client);
        assert_eq!(crashes(&cluster).as_deref(), Some("2\n"), "{end}");
        match end {
            "cancel" => assert!(value::<bool>(&mut client, "SELECT autoprewarm_cancel()")),
            "termination" => {
                let leader = cluster.leader().unwrap();
                client
                    .batch_execute(&format!("SELECT pg_terminate_backend({leader}, 60000)"))
                    .unwrap();
            }
            "end" => {
                set_rate(&cluster, 0);
                cluster.reload();
                assert_eq!(LoadStats::wait_for_end(&mut client).result(), "completed");
            }
            _ => {}
        }
        drop(client);
        match end {
            "shutdown" | "smart shutdown" => {
                cluster.stop(match end {
                    "shutdown" => Shutdown::Fast,
                    _ => Shutdown::Smart,
                });
                assert_eq!(crashes(&cluster), None, "{end}");
            }
            _ => {
                assert_eq!(crashes(&cluster), None, "{end}");
                cluster.stop(Shutdown::Immediate);
            }
        }
    }
}

#[test]
fn a_leader_that_fails_alone_is_no_crash_of_the_server() {
    let (cluster, _) = cluster_with_slow_load(0);
    cluster.set_fault(crate::common::Fault::LimitedProcess, 0);
    cluster.start();
    let mut client = cluster.connect("postgres");
    wait_for_worker(&mut client);
    assert_eq!(crashes(&cluster).as_deref(), Some("1\n"));
    let leader = cluster.leader().unwrap();
    cluster.set_fault(crate::common::Fault::LimitedProcess, leader.into());
    wait_until("another leader", || {
        cluster.leader().is_some_and(|pid| pid != leader)
    });
    wait_until("the mark to be gone", || crashes(&cluster).is_none());
}

#[test]
fn a_mark_that_is_odd_or_cannot_be_written_keeps_no_load_from_beginning() {
    let (cluster, list) = cluster_with_slow_load(0);
    set_rate(&cluster, 0);
    let path = cluster.data(MARK);
    for odd in [
        "",
        "x\n",
        "-1\n",
        "99999999999999999999\n",
        "folder",
        "unreadable",
    ] {
        match odd {
            "folder" => {
                fs::create_dir(&path).unwrap();
                fs::write(path.join("file"), "").unwrap();
            }
            "unreadable" => {
                fs::remove_dir_all(&path).unwrap();
                fs::write(&path, "2\n").unwrap();
                fs::set_permissions(&path, fs::Permissions::from_mode(0o0)).unwrap();
            }
            text => fs::write(&path, text).unwrap(),
        }
        give_to_server(&path);
        cluster.write_list(&list);
        let mark = cluster.log_end();
        cluster.start();
        let all = BLOCKS.into();
        assert_eq!(cluster.wait_for_load(mark), (all, all), "{odd}");
        cluster.stop(Shutdown::Fast);
        let log = cluster.log_since(mark);
        let line = format!("LOG:  ignoring file \"{MARK}\": ");
        assert_eq!(log.matches(&line).count(), 1, "{odd}: {log}");
        if odd == "folder" {
            let warning = format!("WARNING:  could not open file \"{MARK}\": Is a directory");
            assert!(log.contains(&warning), "{log}");
            assert!(!cluster.data(&format!("{MARK}.tmp")).exists());
        } else {
            assert!(!path.exists(), "{odd}");
            assert!(!log.contains("WARNING:"), "{log}");
        }
    }
    let folder = path.parent().unwrap();
    fs::set_permissions(folder, fs::Permissions::from_mode(0o500)).unwrap();
    cluster.write_list(&list);
    let mark = cluster.log_end();
    cluster.start();
    cluster.wait_for_load(mark);
    cluster.wait_for_log(
        mark,
        &format!("WARNING:  could not open file \"{MARK}.tmp\": Permission denied"),
    );
    let sql = "SELECT last_error FROM pg_stat_autoprewarm";
    let expected = format!("could not open file \"{MARK}.tmp\": Permission denied");
    assert_eq!(cluster.value::<String>(sql), expected);
    fs::set_permissions(folder, fs::Permissions::from_mode(0o700)).unwrap();
}

#[test]
fn a_standby_made_during_a_load_has_not_crashed() {
    let (primary, list) = cluster_with_slow_load(0);
    primary.start();
    crash_during_load(&primary);
    wait_for_worker(&mut primary.connect("postgres"));
    assert_eq!(crashes(&primary).as_deref(), Some("2\n"));
    let standby = primary.standby();
    assert_eq!(crashes(&standby), None);
    assert_eq!(fs::read_to_string(standby.data(LIST)).unwrap(), list);
    set_rate(&standby, 0);
    standby.start();
    let (loaded, total) = standby.wait_for_load(0);
    assert_eq!((loaded, total), (BLOCKS.into(), BLOCKS.into()));
}

#[test]
fn without_a_list_former_crashes_are_forgotten() {
    let (cluster, list) = cluster_with_slow_load(0);
    cluster.start();
    crash_until_suspended(&cluster);
    cluster.stop(Shutdown::Fast);
    fs::remove_file(cluster.data(LIST)).unwrap();
    cluster.start();
    let mut client = cluster.connect("postgres");
    LoadStats::wait_for(&mut client, |stats| stats.result() == "no list");
    assert_eq!(crashes(&cluster), None);
    cluster.write_list(list);
    let refused = error(&mut client, "SELECT autoprewarm_start_worker()");
    assert!(refused.message.contains("already running"));
    assert!(!value::<bool>(&mut client, "SELECT autoprewarm_cancel()"));
}
