//! `pg_prewarm.autoprewarm_hold_connections`: new sessions wait while the blocks used most
//! are loaded, and never longer than allowed.

use std::path::Path;
use std::process::Command;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use postgres::{Client, NoTls};

use crate::common::{
    Block, Builder, Cluster, Installation, LIST, LoadStats, Paused, Shutdown,
    list_with_usage_counts, run, set_rate, signal, value, wait_until,
};

/// The blocks of the table that are in the first tier, and the others.
const HOT: u32 = 30;
const COLD: u32 = 2000;

/// In kB a second: the first tier takes three seconds, and the rest minutes.
const SLOW: u32 = 80;

/// A session that is about to begin, and how long that takes.
type Connecting = JoinHandle<(Result<Client, postgres::Error>, Duration)>;

/// A limit that no test waits for.
const LONG: &str = "60s";

/// A stopped cluster, whose list has blocks that were used often and others.
fn cluster(builder: Builder, limit: &str) -> (Cluster, Block) {
    let cluster = builder
        .setting("shared_buffers = 64MB")
        .setting("pg_prewarm.autoprewarm_interval = 0")
        .setting(&format!("pg_prewarm.autoprewarm_max_rate = {SLOW}"))
        .setting(&format!(
            "pg_prewarm.autoprewarm_hold_connections = {limit}"
        ))
        .start();
    cluster.sql("CREATE EXTENSION pg_prewarm");
    cluster.sql("CREATE ROLE app LOGIN; CREATE ROLE watcher LOGIN; GRANT pg_monitor TO watcher");
    let table = cluster.table("t", HOT + COLD);
    cluster.stop(Shutdown::Fast);
    write_list(&cluster, table);
    (cluster, table)
}

/// The same, whose blocks that were used often take half a minute to load.
fn slow_cluster(limit: &str) -> Cluster {
    let (cluster, _) = cluster(Cluster::build(), limit);
    cluster.configure("pg_prewarm.autoprewarm_max_rate = 8");
    cluster
}

fn write_list(cluster: &Cluster, table: Block) {
    let digits = "5".repeat(HOT as usize) + &"1".repeat(COLD as usize);
    cluster.write_list(list_with_usage_counts(table.first(HOT + COLD), &digits));
}

/// Begins a session of the role `app`.
fn connect(cluster: &Cluster) -> Connecting {
    let mut config = cluster.config();
    config.user("app");
    thread::spawn(move || {
        let start = Instant::now();
        let client = config.connect(NoTls);
        (client, start.elapsed())
    })
}

fn held(client: &mut Client) -> i64 {
    value(client, "SELECT connections_held FROM pg_stat_autoprewarm")
}

/// Waits until a session waits for the load. Before that, it waits for a leader.
fn wait_for_hold(client: &mut Client) {
    wait_until("a session that waits for the load", || {
        held(client) == 1 && LoadStats::get(client).state == "loading"
    });
}

/// Starts the server, and connects as `app`. Returns when that waits, with a session of a
/// superuser, which does not.
fn start_and_hold(cluster: &Cluster) -> (Client, Connecting) {
    cluster.start();
    let waiting = connect(cluster);
    let mut client = cluster.connect("postgres");
    wait_for_hold(&mut client);
    (client, waiting)
}

/// Waits until no session is held any more. Returns how many blocks were in shared buffers
/// when one was last seen to be.
fn blocks_while_held(client: &mut Client) -> i64 {
    let sql = "SELECT connections_held, blocks_loaded + blocks_cached FROM pg_stat_autoprewarm";
    let mut blocks = 0;
    wait_until("the end of the wait", || {
        let row = client.query_one(sql, &[]).unwrap();
        let is_over = row.get::<_, i64>(0) == 0;
        if !is_over {
            blocks = row.get(1);
        }
        is_over
    });
    assert!(blocks > 0, "the wait was over before");
    blocks
}

/// Asserts that a session has begun while the load goes on.
fn assert_let_in(client: &mut Client, waiting: Connecting) -> Duration {
    let (app, waited) = waiting.join().unwrap();
    assert_eq!(value::<i64>(&mut app.unwrap(), "SELECT 1::int8"), 1);
    assert_eq!(held(client), 0);
    assert!(waited < Duration::from_secs(50), "{waited:?}");
    waited
}

#[test]
fn new_sessions_wait_until_the_most_used_blocks_are_loaded() {
    let cluster = slow_cluster(LONG);
    let (mut client, waiting) = start_and_hold(&cluster);
    if cluster.major() >= 18 {
        let event = "SELECT wait_event FROM pg_stat_activity \
                     WHERE state = 'starting' AND backend_type = 'client backend'";
        wait_until("the wait event", || {
            let event: Option<String> = value(&mut client, event);
            event.as_deref() == Some("AutoprewarmHoldConnections")
        });
    }
    set_rate(&cluster, SLOW);
    assert_let_in(&mut client, waiting);
    let stats = LoadStats::get(&mut client);
    assert_eq!(stats.state, "loading");
    assert!(stats.loaded + stats.cached >= i64::from(HOT), "{stats:?}");
    assert!(stats.loaded + stats.cached < i64::from(COLD), "{stats:?}");
    // Nobody waits any more.
    let (app, waited) = connect(&cluster).join().unwrap();
    assert!(
        app.is_ok() && waited < Duration::from_secs(20),
        "{waited:?}"
    );
}

#[test]
fn superusers_monitors_and_walsenders_do_not_wait() {
    let cluster = slow_cluster(LONG);
    cluster.start();
    cluster.sql(
        "CREATE ROLE sender LOGIN REPLICATION; CREATE ROLE indirect LOGIN IN ROLE watcher; \
         CREATE ROLE setter LOGIN NOINHERIT IN ROLE pg_monitor",
    );
    let (mut client, waiting) = {
        cluster.stop(Shutdown::Immediate);
        start_and_hold(&cluster)
    };
    for user in ["postgres", "watcher", "indirect", "setter"] {
        cluster.connect_as(user, "postgres");
    }
    let socket = cluster.path("");
    let replication = format!("host={} user=sender replication=true", socket.display());
    let mut psql = Installation::ours().program("psql");
    let answer = run(psql.args(["-Atc", "IDENTIFY_SYSTEM", &replication]));
    assert!(answer.contains('|'), "{answer}");
    // A role that does not exist is told so at once.
    let error = cluster
        .config()
        .user("nobody")
        .connect(NoTls)
        .err()
        .unwrap();
    assert_eq!(error.code().unwrap().code(), "28000");
    assert_eq!(held(&mut client), 1);
    // Background workers do not wait: the load goes on.
    let loaded = LoadStats::get(&mut client).loaded;
    LoadStats::wait_for(&mut client, |stats| stats.loaded > loaded);
    set_rate(&cluster, 0);
    assert_let_in(&mut client, waiting);
}

#[test]
fn a_session_waits_no_longer_than_the_limit() {
    let cluster = slow_cluster("10s");
    let (mut client, waiting) = start_and_hold(&cluster);
    let waited = assert_let_in(&mut client, waiting);
    // The load began before the session.
    assert!(waited >= Duration::from_secs(2), "{waited:?}");
    assert!(waited < Duration::from_secs(25), "{waited:?}");
    let stats = LoadStats::get(&mut client);
    assert_eq!(stats.state, "loading");
    assert!(stats.loaded < i64::from(HOT), "{stats:?}");
}

#[test]
fn a_session_waits_less_than_authentication_timeout() {
    let (cluster, _) = cluster(
        Cluster::build().setting("authentication_timeout = 8s"),
        LONG,
    );
    cluster.configure("pg_prewarm.autoprewarm_max_rate = 8");
    let (mut client, waiting) = start_and_hold(&cluster);
    let waited = assert_let_in(&mut client, waiting);
    assert!(waited >= Duration::from_secs(1), "{waited:?}");
    assert!(!cluster.log().contains("canceling authentication"));
}

#[test]
fn a_raised_authentication_timeout_is_not_that_of_a_session_that_waits() {
    let (cluster, _) = cluster(
        Cluster::build().setting("authentication_timeout = 8s"),
        LONG,
    );
    cluster.configure("pg_prewarm.autoprewarm_max_rate = 8");
    let (mut client, waiting) = start_and_hold(&cluster);
    for statement in [
        "ALTER SYSTEM SET authentication_timeout = '5min'",
        "SELECT pg_reload_conf()",
    ] {
        client.batch_execute(statement).unwrap();
    }
    // The server still ends it after eight seconds.
    assert_let_in(&mut client, waiting);
    assert!(!cluster.log().contains("canceling authentication"));
}

#[test]
fn a_wait_ends_when_the_load_is_cancelled_or_its_leader_terminated_or_the_limit_lowered() {
    for how in [
        "SELECT autoprewarm_cancel()",
        "SELECT pg_terminate_backend(pid) FROM pg_stat_autoprewarm",
        "ALTER SYSTEM SET pg_prewarm.autoprewarm_hold_connections = 0; SELECT pg_reload_conf()",
    ] {
        let cluster = slow_cluster(LONG);
        let (mut client, waiting) = start_and_hold(&cluster);
        for statement in how.split("; ") {
            client.batch_execute(statement).unwrap();
        }
        let waited = assert_let_in(&mut client, waiting);
        assert!(waited < Duration::from_secs(20), "{how}: {waited:?}");
    }
}

#[test]
fn a_wait_ends_when_the_list_cannot_be_loaded() {
    let (cluster, _) = cluster(Cluster::build(), LONG);
    std::fs::remove_file(cluster.data(LIST)).unwrap();
    std::fs::create_dir(cluster.data(LIST)).unwrap();
    cluster.start();
    let (app, waited) = connect(&cluster).join().unwrap();
    assert!(
        app.is_ok() && waited < Duration::from_secs(20),
        "{waited:?}"
    );
    let mut client = cluster.connect("postgres");
    let stats = LoadStats::wait_for_end(&mut client);
    assert_eq!(stats.result(), "failed");
}

#[test]
fn a_session_that_is_terminated_or_cancelled_is_not_counted_any_more() {
    for function in ["pg_terminate_backend", "pg_cancel_backend"] {
        let cluster = slow_cluster(LONG);
        let (mut client, waiting) = start_and_hold(&cluster);
        // Up to 17, the view does not show sessions that have not begun.
        let pid = cluster.process_with_title("waiting for autoprewarm");
        let ended: bool = value(&mut client, &format!("SELECT {function}({pid})"));
        assert!(ended, "{function}");
        assert!(waiting.join().unwrap().0.is_err(), "{function}");
        // The client is told before the process exits.
        wait_until("the end of the session", || held(&mut client) == 0);
        assert_eq!(LoadStats::get(&mut client).state, "loading");
    }
}

#[test]
fn a_raised_limit_is_that_of_a_session_that_waits() {
    let cluster = slow_cluster("8s");
    let (mut client, waiting) = start_and_hold(&cluster);
    for statement in [
        "ALTER SYSTEM SET pg_prewarm.autoprewarm_hold_connections = '20s'",
        "SELECT pg_reload_conf()",
    ] {
        client.batch_execute(statement).unwrap();
    }
    let waited = assert_let_in(&mut client, waiting);
    // The load began before the session.
    assert!(waited >= Duration::from_secs(10), "{waited:?}");
}

#[test]
fn sessions_wait_while_a_slow_disk_is_read() {
    let (cluster, table) = cluster(Cluster::build(), LONG);
    if cluster.major() >= 17 {
        cluster.configure("io_combine_limit = 1");
    }
    cluster.configure("pg_prewarm.autoprewarm_max_rate = 0");
    cluster.configure("pg_prewarm.autoprewarm_workers = 1");
    write_list(&cluster, table);
    cluster.slow_reads(300);
    let (mut client, waiting) = start_and_hold(&cluster);
    assert_let_in(&mut client, waiting);
    let stats = LoadStats::get(&mut client);
    assert_eq!(stats.state, "loading");
    assert!(stats.loaded + stats.cached >= i64::from(HOT), "{stats:?}");
    assert!(stats.loaded + stats.cached < i64::from(COLD), "{stats:?}");
}

#[test]
fn a_function_of_another_library_in_the_hook_is_called_as_well() {
    let (cluster, _) = cluster(Cluster::build(), LONG);
    if !Installation::ours().has_library("auth_delay") {
        return;
    }
    cluster.configure("pg_prewarm.autoprewarm_max_rate = 8");
    cluster.configure("auth_delay.milliseconds = 2000");
    cluster.start();
    cluster.sql("ALTER ROLE watcher PASSWORD 'right'");
    cluster.stop(Shutdown::Immediate);
    let rules = "local all watcher scram-sha-256\nlocal all all trust\n";
    std::fs::write(cluster.data("pg_hba.conf"), rules).unwrap();
    for libraries in ["auth_delay, pg_prewarm", "pg_prewarm, auth_delay"] {
        cluster.configure(&format!("shared_preload_libraries = '{libraries}'"));
        let (mut client, waiting) = start_and_hold(&cluster);
        let start = Instant::now();
        let mut config = cluster.config();
        assert!(
            config
                .user("watcher")
                .password("wrong")
                .connect(NoTls)
                .is_err()
        );
        assert!(start.elapsed() >= Duration::from_secs(2), "{libraries}");
        client.batch_execute("SELECT autoprewarm_cancel()").unwrap();
        assert_let_in(&mut client, waiting);
        cluster.stop(Shutdown::Immediate);
    }
}

#[test]
fn after_a_crash_sessions_wait_again() {
    let (mut cluster, _) = cluster(Cluster::build(), LONG);
    cluster.expect_crash();
    cluster.configure("pg_prewarm.autoprewarm_max_rate = 8");
    let (client, waiting) = start_and_hold(&cluster);
    signal(cluster.leader().unwrap(), libc::SIGKILL);
    assert!(waiting.join().unwrap().0.is_err());
    drop(client);
    let mut client = cluster.connect("postgres");
    assert_eq!(held(&mut client), 0);
    let waiting = connect(&cluster);
    wait_for_hold(&mut client);
    client.batch_execute("SELECT autoprewarm_cancel()").unwrap();
    assert_let_in(&mut client, waiting);
}

#[test]
fn a_shutdown_ends_the_wait_at_once() {
    let cluster = slow_cluster(LONG);
    let (client, waiting) = start_and_hold(&cluster);
    let start = Instant::now();
    cluster.stop(Shutdown::Fast);
    assert!(start.elapsed() < Duration::from_secs(20));
    assert!(waiting.join().unwrap().0.is_err());
    drop(client);
}

#[test]
fn a_smart_shutdown_ends_the_wait_whatever_the_leader_does() {
    let cluster = slow_cluster(LONG);
    let (client, waiting) = start_and_hold(&cluster);
    let leader = Paused::new(cluster.leader().unwrap());
    thread::scope(|scope| {
        let shutdown = scope.spawn(|| cluster.stop(Shutdown::Smart));
        let (app, waited) = waiting.join().unwrap();
        assert!(
            app.is_ok() && waited < Duration::from_secs(20),
            "{waited:?}"
        );
        drop((app, client, leader));
        shutdown.join().unwrap();
    });
}

#[test]
fn sessions_do_not_wait_for_a_load_that_waits_for_a_worker_slot() {
    let (cluster, _) = cluster(Cluster::build(), LONG);
    // The leader takes the only one.
    cluster.configure("max_worker_processes = 1\nmax_logical_replication_workers = 0");
    let mark = cluster.log_end();
    cluster.start();
    let (app, waited) = connect(&cluster).join().unwrap();
    assert!(
        app.is_ok() && waited < Duration::from_secs(15),
        "{waited:?}"
    );
    cluster.wait_for_log(mark, "autoprewarm is waiting for a background worker slot");
    assert!(cluster.leader().is_some());
}

#[test]
fn the_first_tier_of_every_database_is_loaded_before_the_rest_of_any() {
    let (cluster, table) = cluster(Cluster::build(), LONG);
    cluster.configure("pg_prewarm.autoprewarm_max_rate = 0");
    cluster.start();
    cluster.sql("CREATE DATABASE other");
    let other = cluster.table_of_blocks("other", "t", HOT + COLD);
    // Shared catalogs have both as well, and need a worker in any database.
    let shared = ["pg_database", "pg_shdescription"].map(|catalog| Block {
        database: 0,
        tablespace: 1664,
        filenumber: cluster.value(&format!("SELECT pg_relation_filenode('{catalog}')")),
        ..table
    });
    let digits = "5".repeat(HOT as usize) + &"1".repeat(COLD as usize);
    cluster.stop(Shutdown::Fast);
    cluster.write_list(list_with_usage_counts(
        [shared[0].at(0), shared[1].at(0)]
            .into_iter()
            .chain(table.first(HOT + COLD))
            .chain(other.first(HOT + COLD)),
        &format!("51{}", digits.repeat(2)),
    ));
    cluster.configure(&format!("pg_prewarm.autoprewarm_max_rate = {SLOW}"));
    cluster.configure("pg_prewarm.autoprewarm_workers = 1");
    let (mut client, waiting) = start_and_hold(&cluster);
    assert_let_in(&mut client, waiting);
    let loaded = LoadStats::get(&mut client).loaded;
    assert!((i64::from(2 * HOT)..300).contains(&loaded), "{loaded}");
    // The rest follows.
    LoadStats::wait_for(&mut client, |stats| stats.loaded > loaded + 50);
    set_rate(&cluster, 0);
    let stats = LoadStats::wait_for_end(&mut client);
    assert_eq!(stats.skipped, 0, "{stats:?}");
}

/// A stopped cluster whose two workers load the first tier and the rest of one database, and
/// another database, all of which is of the first tier.
fn cluster_with_other(first: u32, rest: u32, second: u32) -> Cluster {
    let (cluster, table) = cluster(Cluster::build(), LONG);
    cluster.configure("pg_prewarm.autoprewarm_max_rate = 0");
    cluster.start();
    cluster.sql("CREATE DATABASE other");
    let rest_of_it = cluster.table_of_blocks("postgres", "rest", rest);
    let other = cluster.table_of_blocks("other", "t", second);
    cluster.stop(Shutdown::Fast);
    let blocks = table.first(first).chain(rest_of_it.first(rest));
    let digits = [("5", first), ("1", rest), ("5", second)];
    let digits = digits.map(|(digit, blocks)| digit.repeat(blocks as usize));
    cluster.write_list(list_with_usage_counts(
        blocks.chain(other.first(second)),
        &digits.concat(),
    ));
    cluster.configure("pg_prewarm.autoprewarm_workers = 2");
    cluster
}

#[test]
fn a_worker_that_has_done_its_part_of_the_first_tier_helps_another_database_with_its_own() {
    // Each database gets one of the two workers, and the first is done before the second.
    const FIRST: u32 = 1600;
    const SECOND: u32 = 3500;
    const REST: u32 = 2500;
    let cluster = cluster_with_other(FIRST, REST, SECOND);
    // 800 blocks a second.
    cluster.configure("pg_prewarm.autoprewarm_max_rate = 6400");
    let (mut client, waiting) = start_and_hold(&cluster);
    let while_held = blocks_while_held(&mut client);
    assert_let_in(&mut client, waiting);
    let stats = LoadStats::get(&mut client);
    let first_tier = i64::from(FIRST + SECOND);
    assert!(stats.loaded + stats.cached >= first_tier, "{stats:?}");
    // A worker may have begun with a chunk of the rest. If it went on, it would load 1900 blocks.
    assert!(while_held < first_tier + 1200, "{while_held}");
    set_rate(&cluster, 0);
    assert_eq!(LoadStats::wait_for_end(&mut client).skipped, 0);
}

#[test]
fn a_worker_with_a_locked_table_leaves_for_the_first_tier_of_another_database() {
    let builder = Cluster::build().setting("max_prepared_transactions = 1");
    let (cluster, table) = cluster(builder, LONG);
    cluster.configure("pg_prewarm.autoprewarm_max_rate = 0\npg_prewarm.autoprewarm_workers = 1");
    cluster.start();
    cluster.sql("CREATE DATABASE other");
    let other = cluster.table_of_blocks("other", "t", HOT + COLD);
    // Its lock outlives the restart. Of two databases with as much to load, this one comes first.
    let mut client = cluster.connect("other");
    let lock = "BEGIN; LOCK TABLE t; PREPARE TRANSACTION 'lock'";
    client.batch_execute(lock).unwrap();
    drop(client);
    cluster.stop(Shutdown::Fast);
    let digits = "5".repeat(HOT as usize) + &"1".repeat(COLD as usize);
    let blocks = table.first(HOT + COLD).chain(other.first(HOT + COLD));
    cluster.write_list(list_with_usage_counts(blocks, &digits.repeat(2)));
    let mark = cluster.log_end();
    cluster.start();
    let (app, waited) = connect(&cluster).join().unwrap();
    // A worker tries for ten seconds to get a lock.
    assert!(app.is_ok() && waited < Duration::from_secs(7), "{waited:?}");
    let (loaded, _) = cluster.wait_for_load(mark);
    assert!(loaded >= u64::from(HOT + COLD), "{loaded}");
    cluster.sql_in("other", "ROLLBACK PREPARED 'lock'");
}

#[test]
fn a_database_whose_worker_has_died_gets_the_next_one_before_the_rest_of_another() {
    // Of one chunk, and of several.
    for second in [400, 1500] {
        a_database_whose_worker_has_died(second);
    }
}

fn a_database_whose_worker_has_died(second: u32) {
    const FIRST: u32 = 600;
    const REST: u32 = 4000;
    let cluster = cluster_with_other(FIRST, REST, second);
    cluster.configure(&format!("pg_prewarm.autoprewarm_max_rate = {SLOW}"));
    let (mut client, waiting) = start_and_hold(&cluster);
    let terminate = "SELECT coalesce(bool_or(pg_terminate_backend(pid)), false) \
                     FROM pg_stat_activity \
                     WHERE backend_type = 'autoprewarm worker' AND datname = 'other'";
    wait_until("a worker", || value(&mut client, terminate));
    // 400 blocks a second.
    set_rate(&cluster, 3200);
    let while_held = blocks_while_held(&mut client);
    assert_let_in(&mut client, waiting);
    // What the worker had read is cached for the next one.
    let stats = LoadStats::get(&mut client);
    let first_tier = i64::from(FIRST + second);
    assert!(stats.loaded + stats.cached >= first_tier, "{stats:?}");
    // While the database is set aside, each worker may have begun with a chunk or two of the rest.
    assert!(while_held < first_tier + 2100, "{while_held}");
    set_rate(&cluster, 0);
    assert_eq!(LoadStats::wait_for_end(&mut client).skipped, 0);
}

#[test]
fn sessions_do_not_wait_for_a_database_that_a_command_has_locked() {
    let (cluster, table) = cluster(Cluster::build(), LONG);
    cluster.configure("pg_prewarm.autoprewarm_max_rate = 0");
    cluster.start();
    cluster.sql("CREATE DATABASE other");
    let other = cluster.table_of_blocks("other", "t", HOT + COLD);
    cluster.stop(Shutdown::Fast);
    let digits = "5".repeat(HOT as usize) + &"1".repeat(COLD as usize);
    let blocks = table.first(HOT + COLD).chain(other.first(HOT + COLD));
    cluster.write_list(list_with_usage_counts(blocks, &digits.repeat(2)));
    cluster.configure(&format!("pg_prewarm.autoprewarm_max_rate = {SLOW}"));
    let (mut client, waiting) = start_and_hold(&cluster);
    let mut owner = cluster.connect("postgres");
    owner
        .batch_execute("BEGIN; ALTER DATABASE other RENAME TO another")
        .unwrap();
    let waited = assert_let_in(&mut client, waiting);
    assert!(waited < Duration::from_secs(30), "{waited:?}");
    let stats = LoadStats::get(&mut client);
    assert_eq!(stats.state, "loading");
    assert!(stats.loaded + stats.cached < i64::from(COLD), "{stats:?}");
    owner.batch_execute("ROLLBACK").unwrap();
    set_rate(&cluster, 0);
    let stats = LoadStats::wait_for_end(&mut client);
    assert_eq!(stats.skipped, 0, "{stats:?}");
}

#[test]
fn superusers_can_connect_while_all_other_connections_wait() {
    let builder = Cluster::build().setting("max_connections = 12");
    let (cluster, _) = cluster(builder.setting("superuser_reserved_connections = 3"), LONG);
    cluster.configure("pg_prewarm.autoprewarm_max_rate = 8");
    let (mut client, waiting) = start_and_hold(&cluster);
    let mut others = Vec::new();
    // Until one is refused.
    loop {
        let before = held(&mut client);
        let other = connect(&cluster);
        wait_until("a session that waits or is refused", || {
            other.is_finished() || held(&mut client) > before
        });
        if other.is_finished() {
            assert!(other.join().unwrap().0.is_err());
            break;
        }
        others.push(other);
    }
    assert!(others.len() >= 5, "{}", others.len());
    let mut processes = Vec::new();
    for _ in 0..5 {
        // Sessions that are refused, or have just ended, count until their process exits.
        wait_until("a superuser's session", || {
            let session = cluster.config().connect(NoTls);
            session.is_ok_and(|mut session| {
                processes.push(value::<i32>(&mut session, "SELECT pg_backend_pid()"));
                true
            })
        });
    }
    assert!(held(&mut client) >= 5);
    // When the wait ends, the server looks again for connections that are not reserved.
    wait_until("the superusers' sessions to end", || {
        let is_running = |process| Path::new(&format!("/proc/{process}")).exists();
        !processes.iter().any(is_running)
    });
    client.batch_execute("SELECT autoprewarm_cancel()").unwrap();
    let is_ok = |session: Connecting| session.join().unwrap().0.is_ok();
    assert!(is_ok(waiting));
    assert!(others.into_iter().map(is_ok).filter(|&ok| ok).count() >= 5);
}

#[test]
fn a_client_that_leaves_is_not_waited_for() {
    let cluster = slow_cluster(LONG);
    cluster.start();
    let mut psql = Installation::ours().program("psql");
    psql.args(["-d", "postgres", "-U", "app", "-h"]);
    let mut psql = psql.arg(cluster.path("")).spawn().unwrap();
    let mut client = cluster.connect("postgres");
    wait_for_hold(&mut client);
    psql.kill().unwrap();
    psql.wait().unwrap();
    wait_until("the session to end", || held(&mut client) == 0);
    assert_eq!(LoadStats::get(&mut client).state, "loading");
}

#[test]
fn a_session_waits_no_longer_than_the_limit_for_a_leader_that_does_nothing() {
    let cluster = slow_cluster("10s");
    let (mut client, waiting) = start_and_hold(&cluster);
    let leader = cluster.leader().unwrap();
    signal(leader, libc::SIGSTOP);
    assert_eq!(held(&mut client), 1);
    let waited = assert_let_in(&mut client, waiting);
    assert!(waited < Duration::from_secs(30), "{waited:?}");
    // The load has run for as long, so nobody waits for it any more.
    let (app, waited) = connect(&cluster).join().unwrap();
    assert!(app.is_ok() && waited < Duration::from_secs(8), "{waited:?}");
    signal(leader, libc::SIGCONT);
}

#[test]
fn sessions_do_not_wait_for_a_locked_table() {
    let cluster = slow_cluster(LONG);
    let (mut client, waiting) = start_and_hold(&cluster);
    client.batch_execute("BEGIN; LOCK TABLE t").unwrap();
    let waited = assert_let_in(&mut client, waiting);
    // The load itself waits for ten seconds.
    assert_eq!(LoadStats::get(&mut client).state, "loading");
    assert!(waited < Duration::from_secs(9), "{waited:?}");
}

#[test]
fn a_session_with_a_password_waits_after_it_was_checked() {
    let (cluster, _) = cluster(Cluster::build(), LONG);
    cluster.start();
    cluster.sql("ALTER ROLE app PASSWORD 'right'");
    cluster.stop(Shutdown::Immediate);
    cluster.configure("pg_prewarm.autoprewarm_max_rate = 8");
    let rules = "local all postgres trust\nlocal all all scram-sha-256\n";
    std::fs::write(cluster.data("pg_hba.conf"), rules).unwrap();
    cluster.start();
    let connect = |password: &str| {
        let mut config = cluster.config();
        config.user("app").password(password);
        thread::spawn(move || config.connect(NoTls))
    };
    let waiting = connect("right");
    let mut client = cluster.connect("postgres");
    wait_for_hold(&mut client);
    // Who is rejected does not wait.
    assert!(connect("wrong").join().unwrap().is_err());
    assert_eq!(held(&mut client), 1);
    cluster.sql("SELECT autoprewarm_cancel()");
    assert!(waiting.join().unwrap().is_ok());
}

#[test]
fn a_session_waits_less_than_transaction_timeout() {
    let (cluster, _) = cluster(Cluster::build(), LONG);
    if cluster.major() < 17 {
        return;
    }
    cluster.configure("pg_prewarm.autoprewarm_max_rate = 8");
    cluster.configure("transaction_timeout = 20s");
    let (mut client, waiting) = start_and_hold(&cluster);
    // The other half is for the rest of the session's start.
    let waited = assert_let_in(&mut client, waiting);
    let range = Duration::from_secs(5)..Duration::from_secs(18);
    assert!(range.contains(&waited), "{waited:?}");
}

#[test]
fn the_privileges_of_a_session_are_those_after_its_wait() {
    let (cluster, _) = cluster(Cluster::build(), LONG);
    cluster.configure("pg_prewarm.autoprewarm_max_rate = 0");
    cluster.start();
    cluster.sql("CREATE ROLE granted; GRANT granted TO app; ALTER DATABASE postgres OWNER TO app");
    cluster.stop(Shutdown::Immediate);
    cluster.configure("pg_prewarm.autoprewarm_max_rate = 8");
    let (mut client, waiting) = start_and_hold(&cluster);
    client.batch_execute("REVOKE granted FROM app").unwrap();
    client.batch_execute("SELECT autoprewarm_cancel()").unwrap();
    let mut app = waiting.join().unwrap().0.unwrap();
    // Its owner has the privileges of pg_database_owner, who may create this.
    app.batch_execute("CREATE TABLE public.created ()").unwrap();
    let has = "SELECT pg_has_role('granted', 'USAGE')";
    assert!(!value::<bool>(&mut app, has));
}

#[test]
fn without_a_leader_sessions_begin_soon() {
    let (cluster, _) = cluster(Cluster::build(), LONG);
    // There is no slot for the leader either.
    cluster.configure("max_worker_processes = 0");
    cluster.start();
    let (app, waited) = connect(&cluster).join().unwrap();
    // As long as a leader may still start.
    assert!(waited >= Duration::from_secs(1), "{waited:?}");
    assert!(
        app.is_ok() && waited < Duration::from_secs(15),
        "{waited:?}"
    );
    assert_eq!(cluster.leader(), None);
}

#[test]
fn without_autoprewarm_or_preloading_nobody_waits() {
    let (cluster, table) = cluster(Cluster::build(), LONG);
    cluster.configure("pg_prewarm.autoprewarm_max_rate = 8");
    for setting in [
        "pg_prewarm.autoprewarm = off",
        "shared_preload_libraries = ''",
    ] {
        cluster.configure(setting);
        // A session that waits for a leader does so for two seconds, each time.
        let waits = (0..3).map(|_| {
            write_list(&cluster, table);
            cluster.start();
            let (app, waited) = connect(&cluster).join().unwrap();
            assert!(app.is_ok());
            cluster.stop(Shutdown::Fast);
            waited
        });
        let shortest = waits.min().unwrap();
        assert!(shortest < Duration::from_secs(1), "{setting}: {shortest:?}");
    }
    cluster.configure("pg_prewarm.autoprewarm = on");
    cluster.start();
    cluster.sql("SELECT autoprewarm_start_worker()");
    let mut client = cluster.connect("postgres");
    LoadStats::wait_for(&mut client, |stats| stats.state == "loading");
    let (app, waited) = connect(&cluster).join().unwrap();
    assert!(app.is_ok() && waited < Duration::from_secs(5), "{waited:?}");
}

#[test]
fn a_load_on_demand_holds_nobody() {
    let (cluster, table) = cluster(Cluster::build(), LONG);
    cluster.configure("pg_prewarm.autoprewarm_max_rate = 8");
    cluster.write_list("<<0>>\n");
    cluster.start();
    let mut client = cluster.connect("postgres");
    LoadStats::wait_for_end(&mut client);
    write_list(&cluster, table);
    client
        .batch_execute("SELECT autoprewarm_load_now()")
        .unwrap();
    let (app, waited) = connect(&cluster).join().unwrap();
    assert!(app.is_ok() && waited < Duration::from_secs(5), "{waited:?}");
    assert_eq!(LoadStats::get(&mut client).state, "loading");
}

#[test]
fn a_wait_holds_back_no_vacuum() {
    let cluster = slow_cluster(LONG);
    cluster.start();
    cluster.sql("CREATE TABLE dead AS SELECT g FROM generate_series(1, 1000) g");
    cluster.stop(Shutdown::Immediate);
    let (mut client, waiting) = start_and_hold(&cluster);
    client.batch_execute("DELETE FROM dead").unwrap();
    // Workers of the load that are just starting have a snapshot and locks for a moment; a
    // session that waits would keep its own.
    wait_until("VACUUM to remove all rows", || {
        client.batch_execute("VACUUM dead").unwrap();
        value::<i64>(&mut client, "SELECT pg_relation_size('dead')") == 0
    });
    let locks = "SELECT count(*) FROM pg_locks WHERE locktype <> 'virtualxid' \
                 AND pid NOT IN (SELECT pid FROM pg_stat_activity \
                                 WHERE state IS DISTINCT FROM 'starting')";
    wait_until("no lock of a session that is not there yet", || {
        value::<i64>(&mut client, locks) == 0
    });
    assert_eq!(held(&mut client), 1);
    client.batch_execute("SELECT autoprewarm_cancel()").unwrap();
    assert_let_in(&mut client, waiting);
}

#[test]
fn pg_isready_tells_a_role_that_waits_from_one_that_does_not() {
    let cluster = slow_cluster(LONG);
    let (mut client, waiting) = start_and_hold(&cluster);
    let is_ready = |user: &str, seconds: &str| {
        let mut command: Command = Installation::ours().program("pg_isready");
        command.args(["-t", seconds, "-d", "postgres", "-U", user, "-h"]);
        command.arg(cluster.path("")).status().unwrap().code()
    };
    const NO_RESPONSE: Option<i32> = Some(2);
    assert_eq!(is_ready("watcher", "30"), Some(0));
    assert_eq!(is_ready("app", "1"), NO_RESPONSE);
    client.batch_execute("SELECT autoprewarm_cancel()").unwrap();
    assert_let_in(&mut client, waiting);
    assert_eq!(is_ready("app", "30"), Some(0));
}

#[test]
fn two_hundred_sessions_wait_and_begin_together() {
    const SESSIONS: usize = 200;
    let (cluster, _) = cluster(Cluster::build().setting("max_connections = 250"), LONG);
    cluster.configure("pg_prewarm.autoprewarm_max_rate = 1");
    cluster.start();
    let sessions: Vec<_> = (0..SESSIONS).map(|_| connect(&cluster)).collect();
    let mut client = cluster.connect("postgres");
    wait_until("all sessions to wait", || {
        held(&mut client) == SESSIONS as i64
    });
    let start = Instant::now();
    client.batch_execute("SELECT autoprewarm_cancel()").unwrap();
    let sessions: Vec<_> = sessions
        .into_iter()
        .map(|session| session.join().unwrap().0.unwrap())
        .collect();
    assert!(start.elapsed() < Duration::from_secs(20));
    assert_eq!(sessions.len(), SESSIONS);
    assert_eq!(held(&mut client), 0);
}

#[test]
fn sessions_of_a_standby_wait_for_its_own_load() {
    let (cluster, table) = cluster(Cluster::build(), LONG);
    cluster.configure("pg_prewarm.autoprewarm_max_rate = 0");
    cluster.start();
    let standby = cluster.standby();
    standby.configure("pg_prewarm.autoprewarm_max_rate = 8");
    write_list(&standby, table);
    let (mut client, waiting) = start_and_hold(&standby);
    assert!(value::<bool>(&mut client, "SELECT pg_is_in_recovery()"));
    client.batch_execute("SELECT autoprewarm_cancel()").unwrap();
    assert_let_in(&mut client, waiting);
}
