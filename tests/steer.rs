//! A load can be requested, waited for, cancelled, and limited in its rate.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::thread;
use std::time::{Duration, Instant};

use postgres::Client;

use crate::common::{
    Block, Builder, Cluster, LIST, LoadStats, Paused, Shutdown, SqlError, error, list_of, set_rate,
    signal, value, wait_until,
};

const BLOCKS: u32 = 1000;

/// In kB per second: ten blocks.
const SLOW: u32 = 80;

const LOAD: &str = "SELECT autoprewarm_load_now()";
const CANCEL: &str = "SELECT autoprewarm_cancel()";
const WAIT: &str = "SELECT autoprewarm_wait()";

/// How many sessions wait in one of these calls.
const WAITING: &str = "SELECT count(*) FROM pg_stat_activity \
                       WHERE backend_type = 'client backend' AND wait_event_type = 'Extension'";

/// A running cluster with a table `t` that is not cached, and a list of its blocks that
/// has not been loaded.
fn cluster_with_list(builder: Builder) -> (Cluster, Block) {
    let cluster = builder.start();
    cluster.sql("CREATE EXTENSION pg_prewarm; CREATE EXTENSION pg_buffercache");
    let table = cluster.table("t", BLOCKS);
    cluster.stop(Shutdown::Fast);
    cluster.write_list("<<0>>\n");
    cluster.start();
    cluster.sql(WAIT);
    cluster.write_list(list_of(table.first(BLOCKS)));
    (cluster, table)
}

/// The same with a rate limit. A load of the list would take minutes.
fn slow_cluster(builder: Builder) -> (Cluster, Block) {
    cluster_with_list(builder.setting(&format!("pg_prewarm.autoprewarm_max_rate = {SLOW}")))
}

/// Waits until some blocks are loaded, and the load is still running.
fn wait_for_load_to_run(client: &mut Client) -> LoadStats {
    LoadStats::wait_for(client, |stats| {
        stats.state == "loading" && stats.loaded + stats.cached > 0
    })
}

/// Requests a load, and waits until it has begun.
fn begin_load(client: &mut Client) {
    client.batch_execute(LOAD).unwrap();
    wait_for_load_to_run(client);
}

fn in_progress() -> SqlError {
    SqlError::new("55006", "autoprewarm load is already in progress")
        .hint("Use autoprewarm_wait() to wait for the end of the load, or autoprewarm_cancel() to cancel it.")
}

fn cached_blocks(client: &mut Client, table: &str) -> i64 {
    value(
        client,
        &format!(
            "SELECT count(*) FROM pg_buffercache b, pg_database d \
             WHERE d.datname = current_database() AND b.reldatabase = d.oid \
               AND relfilenode = pg_relation_filenode('{table}') AND relforknumber = 0"
        ),
    )
}

#[test]
fn a_load_on_demand_loads_the_list_and_counts_the_blocks_cached_already() {
    for builder in [Cluster::build(), Cluster::build().not_preloaded()] {
        let (cluster, _) = cluster_with_list(builder);
        let list = cluster.list();
        let mut client = cluster.connect("postgres");
        assert_eq!(cached_blocks(&mut client, "t"), 0);
        client
            .batch_execute("SELECT pg_prewarm('t', 'buffer', 'main', 100, 599)")
            .unwrap();
        let mark = cluster.log_end();
        client.batch_execute(LOAD).unwrap();
        let stats = LoadStats::wait_for_end(&mut client);
        assert_eq!(
            stats,
            LoadStats {
                state: "idle".to_owned(),
                result: Some("completed".to_owned()),
                total: 1000,
                loaded: 500,
                cached: 500,
                skipped: 0,
            }
        );
        assert_eq!(cached_blocks(&mut client, "t"), 1000);
        assert_eq!(cluster.wait_for_load(mark), (1000, 1000));
        assert_eq!(cluster.list(), list);

        // Another load of another list resets the counters.
        client.batch_execute("TRUNCATE t").unwrap();
        client.batch_execute(LOAD).unwrap();
        let stats = LoadStats::wait_for_end(&mut client);
        assert_eq!((stats.total, stats.loaded + stats.cached), (1000, 0));
        let reason = "SELECT skipped_no_relation FROM pg_stat_autoprewarm";
        assert_eq!(value::<i64>(&mut client, reason), 1000);
    }
}

#[test]
fn blocks_cached_already_need_no_free_buffer() {
    // All buffers are in use, by the listed table and another.
    let (cluster, _) = cluster_with_list(Cluster::build().setting("shared_buffers = 16MB"));
    cluster.table("other", 4000);
    let mut client = cluster.connect("postgres");
    client
        .batch_execute("SELECT pg_prewarm('other'); SELECT pg_prewarm('t')")
        .unwrap();
    client.batch_execute(LOAD).unwrap();
    let stats = LoadStats::wait_for_end(&mut client);
    assert_eq!((stats.loaded, stats.cached, stats.skipped), (0, 1000, 0));
}

#[test]
fn of_many_sessions_that_request_a_load_at_once_one_starts_it() {
    for builder in [Cluster::build(), Cluster::build().not_preloaded()] {
        let (cluster, _) = slow_cluster(builder);
        for _ in 0..3 {
            let mut clients: Vec<_> = (0..8).map(|_| cluster.connect("postgres")).collect();
            let barrier = std::sync::Barrier::new(clients.len());
            let results: Vec<_> = thread::scope(|scope| {
                let calls: Vec<_> = clients
                    .iter_mut()
                    .map(|client| {
                        scope.spawn(|| {
                            barrier.wait();
                            client.batch_execute(LOAD).map_err(SqlError::from)
                        })
                    })
                    .collect();
                calls.into_iter().map(|call| call.join().unwrap()).collect()
            });
            let refused: Vec<_> = results.into_iter().filter_map(Result::err).collect();
            assert_eq!(refused, vec![in_progress(); 7]);
            wait_for_load_to_run(&mut clients[0]);
            assert!(value::<bool>(&mut clients[1], CANCEL));
        }
    }
}

#[test]
fn the_request_of_a_terminated_session_can_be_repeated() {
    let cluster = Cluster::build().not_preloaded().start();
    cluster.sql("CREATE EXTENSION pg_prewarm");
    cluster.write_list("<<0>>\n");
    let [mut first, mut second, mut other] = [(); 3].map(|()| cluster.connect("postgres"));
    let pid: i32 = value(&mut first, "SELECT pg_backend_pid()");
    // No process starts the leader that the first session waits for.
    signal(cluster.postmaster(), libc::SIGSTOP);
    let first = thread::spawn(move || first.batch_execute(LOAD).unwrap_err());
    let waits_for = |other: &mut Client| {
        let sql = "SELECT COALESCE(lower(wait_event), '') FROM pg_stat_activity WHERE pid = $1";
        let row = other.query_opt(sql, &[&pid]).unwrap();
        row.map(|row| row.get::<_, String>(0))
    };
    wait_until("the first to have asked", || {
        waits_for(&mut other).as_deref() == Some("bgworkerstartup")
    });
    other
        .execute("SELECT pg_terminate_backend($1)", &[&pid])
        .unwrap();
    wait_until("the first to be gone", || waits_for(&mut other).is_none());
    first.join().unwrap();
    let second = thread::spawn(move || second.batch_execute(LOAD));
    thread::sleep(Duration::from_millis(100));
    signal(cluster.postmaster(), libc::SIGCONT);
    second.join().unwrap().unwrap();
}

#[test]
fn a_load_on_demand_is_an_error_while_another_runs_or_the_list_is_written() {
    let (cluster, _) = slow_cluster(Cluster::build());
    let mut client = cluster.connect("postgres");
    begin_load(&mut client);
    let leader = cluster.leader().unwrap();
    assert_eq!(error(&mut client, LOAD), in_progress());
    assert_eq!(
        error(&mut client, "SELECT autoprewarm_dump_now()").message,
        format!("could not perform block dump because dump file is being used by PID {leader}")
    );
    assert!(value::<bool>(&mut client, CANCEL));

    // A session that keeps writing the list.
    let mut writer = cluster.connect("postgres");
    let pid: i32 = value(&mut writer, "SELECT pg_backend_pid()");
    let cancel = writer.cancel_token();
    let writing = thread::spawn(move || {
        writer.batch_execute(
            "DO $$ BEGIN LOOP BEGIN PERFORM autoprewarm_dump_now(); \
                                    EXCEPTION WHEN internal_error THEN NULL; END; END LOOP; END $$",
        )
    });
    let expected = SqlError::new(
        "55006",
        format!("could not load blocks because dump file is being used by PID {pid}"),
    );
    wait_until("a refusal", || match client.simple_query(LOAD) {
        Ok(_) => {
            client.batch_execute(CANCEL).unwrap();
            false
        }
        Err(error) => SqlError::from(error) == expected,
    });
    LoadStats::wait_for(&mut client, |stats| stats.state == "dumping");
    cancel.cancel_query(postgres::NoTls).unwrap();
    assert!(writing.join().unwrap().is_err());
}

#[test]
fn a_load_that_cannot_start_is_an_error_and_does_not_start_later() {
    let (cluster, _) = cluster_with_list(Cluster::build());
    cluster.configure("pg_prewarm.autoprewarm = off");
    cluster.restart();
    let mut client = cluster.connect("postgres");
    for _ in 0..2 {
        assert_eq!(
            error(&mut client, LOAD),
            SqlError::new("55000", "autoprewarm is disabled")
                .hint("Set \"pg_prewarm.autoprewarm\" to on, and restart the server.")
        );
    }
    assert!(value::<bool>(&mut client, WAIT));
    assert!(!value::<bool>(&mut client, CANCEL));
    assert_eq!(LoadStats::get(&mut client).state, "not running");

    cluster.configure(
        "pg_prewarm.autoprewarm = on\nshared_preload_libraries = ''\nmax_worker_processes = 0",
    );
    cluster.restart();
    let mut client = cluster.connect("postgres");
    for _ in 0..2 {
        assert_eq!(
            error(&mut client, LOAD),
            SqlError::new("53000", "could not register background process")
                .hint("You may need to increase \"max_worker_processes\".")
        );
    }
    assert!(value::<bool>(&mut client, WAIT));
    assert!(!value::<bool>(&mut client, CANCEL));
}

#[test]
fn a_missing_a_corrupt_and_an_unreadable_list_give_different_results() {
    let (cluster, table) = cluster_with_list(Cluster::build());
    let mut client = cluster.connect("postgres");
    let error_of = |client: &mut Client| -> Option<String> {
        value(client, "SELECT last_error FROM pg_stat_autoprewarm")
    };
    let load = |client: &mut Client| {
        client.batch_execute(LOAD).unwrap();
        let stats = LoadStats::wait_for_end(client);
        (stats.result().to_owned(), stats.total, stats.skipped)
    };
    fs::remove_file(cluster.data(LIST)).unwrap();
    assert_eq!(load(&mut client), ("no list".to_owned(), 0, 0));
    assert_eq!(error_of(&mut client), None);

    cluster.write_list(format!(
        "<<3>>\nnonsense\n{}\n1,1663,1,0,99999999999\n",
        table.record()
    ));
    assert_eq!(load(&mut client).0, "completed");
    assert_eq!(
        error_of(&mut client).unwrap(),
        "autoprewarm block dump file is corrupted at line 2"
    );

    cluster.write_list(list_of(table.first(BLOCKS)));
    fs::set_permissions(cluster.data(LIST), fs::Permissions::from_mode(0o0)).unwrap();
    for _ in 0..2 {
        assert_eq!(load(&mut client), ("failed".to_owned(), 0, 0));
        assert_eq!(LoadStats::get(&mut client).state, "load failed");
        assert_eq!(
            error_of(&mut client).unwrap(),
            "could not read file \"autoprewarm.blocks\": Permission denied"
        );
    }
    let recent = "SELECT last_error_time BETWEEN now() - interval '1 min' AND clock_timestamp() \
                  FROM pg_stat_autoprewarm";
    assert!(value::<bool>(&mut client, recent));
    fs::set_permissions(cluster.data(LIST), fs::Permissions::from_mode(0o600)).unwrap();
    assert_eq!(load(&mut client), ("completed".to_owned(), 1000, 0));
    assert_eq!(LoadStats::get(&mut client).state, "idle");
}

/// Cancels the running load, and returns how long that took.
fn cancel(client: &mut Client) -> Duration {
    let start = Instant::now();
    assert!(value::<bool>(client, CANCEL));
    let took = start.elapsed();
    let stats = LoadStats::wait_for_end(client);
    assert_eq!((&*stats.state, stats.result()), ("idle", "cancelled"));
    took
}

/// The median must be as short as promised; a busy test machine may add to some times.
fn assert_short(mut times: Vec<Duration>) {
    times.sort();
    assert!(
        times[times.len() / 2] < Duration::from_millis(200),
        "{times:?}"
    );
    assert!(
        times[times.len() - 1] < Duration::from_secs(10),
        "{times:?}"
    );
}

#[test]
fn a_cancel_ends_the_load_at_once_and_keeps_the_list_and_the_loaded_blocks() {
    let (cluster, table) = slow_cluster(Cluster::build());
    let list = cluster.list();
    let mut client = cluster.connect("postgres");
    assert!(!value::<bool>(&mut client, CANCEL));
    let mut times = Vec::new();
    for rate in [SLOW, SLOW, 1, SLOW, SLOW] {
        set_rate(&cluster, rate);
        begin_load(&mut client);
        let mark = cluster.log_end();
        times.push(cancel(&mut client));
        let stats = LoadStats::get(&mut client);
        assert_eq!(stats.total, 1000);
        let cancelled = "SELECT skipped_cancelled FROM pg_stat_autoprewarm";
        assert_eq!(value::<i64>(&mut client, cancelled), stats.skipped);
        assert_eq!(cached_blocks(&mut client, "t"), stats.loaded + stats.cached);
        let (loaded, total) = cluster.wait_for_load(mark);
        assert_eq!(loaded as i64, stats.loaded + stats.cached);
        assert_eq!(total, 1000);
        assert_eq!(
            cluster.wait_for_skipped(mark),
            format!(
                "{0} blocks: {0} because the load was cancelled",
                stats.skipped
            )
        );
        assert!(!value::<bool>(&mut client, CANCEL));
    }
    assert_short(times);
    assert_eq!(cluster.list(), list);
    let workers = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'autoprewarm worker'";
    wait_until("the workers' end", || {
        value::<i64>(&mut client, workers) == 0
    });

    // A later request is not affected.
    set_rate(&cluster, 0);
    client.batch_execute(LOAD).unwrap();
    assert_eq!(LoadStats::wait_for_end(&mut client).result(), "completed");
    let cached = cluster.cached();
    assert!(table.first(BLOCKS).all(|block| cached.contains(&block)));
    let log = cluster.log();
    assert!(!log.contains("WARNING"), "{log}");
}

#[test]
fn after_a_cancel_a_shutdown_keeps_the_list_and_the_next_periodic_dump_replaces_it() {
    let (cluster, _) = slow_cluster(Cluster::build());
    let list = cluster.list();
    let mut client = cluster.connect("postgres");
    begin_load(&mut client);
    assert!(value::<bool>(&mut client, CANCEL));
    drop(client);
    cluster.stop(Shutdown::Fast);
    assert_eq!(cluster.list(), list);

    cluster.start();
    let mut client = cluster.connect("postgres");
    wait_for_load_to_run(&mut client);
    assert!(value::<bool>(&mut client, CANCEL));
    let _: i64 = value(&mut client, "SELECT autoprewarm_dump_now()");
    client
        .batch_execute("CREATE TABLE new AS SELECT 1")
        .unwrap();
    drop(client);
    let new = cluster.file_of("postgres", "new");
    cluster.stop(Shutdown::Fast);
    assert!(cluster.lists(new));
}

#[test]
fn a_load_that_has_not_begun_is_cancelled_as_well() {
    let (cluster, _) = slow_cluster(Cluster::build());
    let mut client = cluster.connect("postgres");
    for _ in 0..10 {
        let row = client
            .query_one(
                "SELECT autoprewarm_load_now()::text, autoprewarm_cancel()",
                &[],
            )
            .unwrap();
        assert!(row.get::<_, bool>(1));
        let stats = LoadStats::wait_for_end(&mut client);
        assert_eq!(stats.result(), "cancelled");
    }
    assert!(!value::<bool>(&mut client, CANCEL));
}

const BEGAN: &str = "SELECT load_start_time::text FROM pg_stat_autoprewarm";

/// A running cluster, a client, its leader, which is stopped until SIGCONT, and the
/// time at which the load after the start began.
fn cluster_with_frozen_leader() -> (Cluster, Client, i32, String) {
    let (cluster, _) = cluster_with_list(Cluster::build());
    let mut client = cluster.connect("postgres");
    let began = value(&mut client, BEGAN);
    let leader = cluster.leader().unwrap();
    signal(leader, libc::SIGSTOP);
    (cluster, client, leader, began)
}

#[test]
fn a_requested_load_begins_even_if_the_leader_exits_before_it() {
    let (cluster, mut client, leader, before) = cluster_with_frozen_leader();
    thread::scope(|scope| {
        let asked = scope.spawn(|| cluster.sql(LOAD));
        LoadStats::wait_for(&mut client, |stats| stats.state == "load pending");
        signal(leader, libc::SIGTERM);
        signal(leader, libc::SIGCONT);
        asked.join().unwrap();
    });
    assert_eq!(LoadStats::wait_for_end(&mut client).result(), "completed");
    assert_ne!(value::<String>(&mut client, BEGAN), before);
    assert_ne!(cluster.leader(), Some(leader));
}

#[test]
fn the_request_of_a_session_that_has_ended_is_not_passed_to_the_next_leader() {
    let (cluster, mut client, leader, before) = cluster_with_frozen_leader();
    let mut asking = cluster.connect("postgres");
    let pid: i32 = value(&mut asking, "SELECT pg_backend_pid()");
    thread::scope(|scope| {
        let asked = scope.spawn(|| asking.batch_execute(LOAD));
        LoadStats::wait_for(&mut client, |stats| stats.state == "load pending");
        let end = format!("SELECT pg_terminate_backend({pid}, 60000)");
        assert!(value::<bool>(&mut client, &end));
        assert!(asked.join().unwrap().is_err());
    });
    signal(leader, libc::SIGTERM);
    signal(leader, libc::SIGCONT);
    LoadStats::wait_for(&mut client, |stats| stats.state == "not running");
    client
        .batch_execute("SELECT autoprewarm_start_worker()")
        .unwrap();
    cluster.wait_for_leader();
    assert_eq!(value::<String>(&mut client, BEGAN), before);
}

#[test]
fn two_sessions_can_cancel_one_load() {
    let (cluster, _) = slow_cluster(Cluster::build());
    let mut clients = [(); 2].map(|()| cluster.connect("postgres"));
    let mut observer = cluster.connect("postgres");
    begin_load(&mut clients[0]);
    // The leader notices the requests only after both were made.
    let leader = Paused::new(cluster.leader().unwrap());
    let results = thread::scope(|scope| {
        let calls = clients
            .each_mut()
            .map(|client| scope.spawn(|| value::<bool>(client, CANCEL)));
        wait_until("both to wait", || value::<i64>(&mut observer, WAITING) == 2);
        drop(leader);
        calls.map(|call| call.join().unwrap())
    });
    assert_eq!(results, [true; 2]);
    assert_eq!(
        LoadStats::wait_for_end(&mut clients[0]).result(),
        "cancelled"
    );
}

/// Resets `statement_timeout`, which is still in force for this statement.
fn reset_timeout(client: &mut Client) {
    wait_until("no timeout", || {
        client.batch_execute("RESET statement_timeout").is_ok()
    });
}

#[test]
fn a_cancel_call_that_is_cancelled_itself_still_ends_the_load() {
    let (cluster, _) = slow_cluster(Cluster::build());
    let mut client = cluster.connect("postgres");
    begin_load(&mut client);
    let leader = Paused::new(cluster.leader().unwrap());
    client
        .batch_execute("SET statement_timeout = '2s'")
        .unwrap();
    assert_eq!(error(&mut client, CANCEL).sqlstate, "57014");
    reset_timeout(&mut client);
    drop(leader);
    assert_eq!(LoadStats::wait_for_end(&mut client).result(), "cancelled");
}

#[test]
fn a_load_that_waits_for_a_slow_disk_is_cancelled() {
    let (cluster, _) = cluster_with_list(Cluster::build());
    if cluster.major() >= 17 {
        cluster.configure("io_combine_limit = 1");
    }
    cluster.slow_reads(20);
    cluster.stop(Shutdown::Immediate);
    cluster.start();
    let mut client = cluster.connect("postgres");
    let mut times = Vec::new();
    for _ in 0..5 {
        wait_for_load_to_run(&mut client);
        times.push(cancel(&mut client));
        client.batch_execute(LOAD).unwrap();
    }
    assert_short(times);
}

#[test]
fn a_load_that_waits_for_a_worker_slot_is_cancelled() {
    let (cluster, _) = cluster_with_list(
        Cluster::build()
            .setting("max_worker_processes = 1")
            .setting("max_logical_replication_workers = 0"),
    );
    let mut client = cluster.connect("postgres");
    let mut times = Vec::new();
    for _ in 0..3 {
        let mark = cluster.log_end();
        client.batch_execute(LOAD).unwrap();
        cluster.wait_for_log(mark, "autoprewarm is waiting for a background worker slot");
        assert!(!value::<bool>(
            &mut client,
            "SELECT autoprewarm_wait('50ms')"
        ));
        times.push(cancel(&mut client));
        assert_eq!(LoadStats::get(&mut client).skipped, 1000);
    }
    assert_short(times);
}

#[test]
fn a_load_that_waits_for_locked_relations_is_cancelled() {
    let (cluster, _) = cluster_with_list(Cluster::build());
    let mut holder = cluster.connect("postgres");
    holder.batch_execute("BEGIN; LOCK TABLE t").unwrap();
    let mut client = cluster.connect("postgres");
    let mut times = Vec::new();
    for _ in 0..3 {
        client.batch_execute(LOAD).unwrap();
        wait_until("a worker that waits", || {
            value(
                &mut client,
                "SELECT EXISTS (SELECT FROM pg_stat_activity \
                                WHERE backend_type = 'autoprewarm worker' \
                                  AND wait_event_type = 'Extension')",
            )
        });
        times.push(cancel(&mut client));
        assert_eq!(LoadStats::get(&mut client).skipped, 1000);
    }
    assert_short(times);
}

#[test]
fn a_load_that_waits_for_a_locked_catalog_is_cancelled() {
    let (cluster, _) = slow_cluster(Cluster::build());
    let mut client = cluster.connect("postgres");
    let waits = "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)";
    // The session has these in its caches then.
    client
        .batch_execute("SET statement_timeout = '1min'")
        .unwrap();
    assert!(!value::<bool>(&mut client, waits));
    begin_load(&mut client);
    cancel(&mut client);
    let mut holder = cluster.connect("postgres");
    holder.batch_execute("BEGIN; LOCK TABLE pg_class").unwrap();
    client.batch_execute(LOAD).unwrap();
    wait_until("a worker that waits", || value(&mut client, waits));
    cancel(&mut client);
}

#[test]
fn a_load_is_cancelled_while_its_list_is_read() {
    let (cluster, _) = cluster_with_list(Cluster::build());
    let mut list = String::from("<<3000000>>\n");
    for block in 0..3_000_000 {
        list.push_str(&format!("99999,1663,99999,0,{block}\n"));
    }
    cluster.write_list(list);
    let mut client = cluster.connect("postgres");
    // It may have been read before the call.
    wait_until("a load that is cancelled while its list is read", || {
        client.batch_execute(LOAD).unwrap();
        let start = Instant::now();
        let cancelled: bool = value(&mut client, CANCEL);
        let took = start.elapsed();
        assert!(took < Duration::from_secs(10), "{took:?}");
        let stats = LoadStats::wait_for_end(&mut client);
        if stats.total > 0 {
            return false;
        }
        assert!(cancelled);
        assert_eq!((&*stats.state, stats.result()), ("idle", "cancelled"));
        true
    });
}

#[test]
fn waiting_after_the_start_of_a_leader_waits_for_its_load() {
    let cluster = Cluster::build().not_preloaded().start();
    cluster.sql("CREATE EXTENSION pg_prewarm");
    let table = cluster.table("t", 100);
    cluster.write_list(list_of((0..100).map(|block| table.at(block))));
    let mut client = cluster.connect("postgres");
    client
        .batch_execute("SELECT autoprewarm_start_worker(); SELECT autoprewarm_wait()")
        .unwrap();
    let stats = LoadStats::get(&mut client);
    assert_eq!((stats.result(), stats.total), ("completed", 100));
}

#[test]
fn autoprewarm_wait_returns_whether_the_load_ended_before_the_timeout() {
    let (cluster, _) = slow_cluster(Cluster::build());
    let mut client = cluster.connect("postgres");
    for timeout in ["", "'0'", "'1 month'", "NULL"] {
        let wait = format!("SELECT autoprewarm_wait({timeout})");
        assert!(value::<bool>(&mut client, &wait), "{timeout}");
    }
    begin_load(&mut client);
    assert!(!value::<bool>(&mut client, "SELECT autoprewarm_wait('0')"));
    for milliseconds in [1, 300] {
        let start = Instant::now();
        let wait = format!("SELECT autoprewarm_wait('{milliseconds}ms')");
        assert!(!value::<bool>(&mut client, &wait));
        let took = start.elapsed();
        assert!(took >= Duration::from_millis(milliseconds), "{took:?}");
        assert!(took < Duration::from_secs(5), "{took:?}");
    }
    let mut timeouts = vec!["-1s", "-1 month", "-1 day", "-1 month 29 days"];
    if cluster.major() >= 17 {
        timeouts.push("-infinity");
    }
    for timeout in timeouts {
        assert_eq!(
            error(
                &mut client,
                &format!("SELECT autoprewarm_wait('{timeout}')")
            ),
            SqlError::new("22023", "timeout must not be negative"),
            "{timeout}"
        );
    }

    // The call itself is cancelled, and the session continues.
    client
        .batch_execute("SET statement_timeout = '100ms'")
        .unwrap();
    for timeout in ["", "'1 month'", "'170000000 years'"] {
        let raised = error(&mut client, &format!("SELECT autoprewarm_wait({timeout})"));
        assert_eq!(raised.sqlstate, "57014", "{timeout}: {raised:?}");
    }
    reset_timeout(&mut client);

    let longest = match cluster.major() {
        17.. => "infinity",
        _ => "170000000 years",
    };
    let mut waiter = cluster.connect("postgres");
    let answer = thread::scope(|scope| {
        let waiting = scope.spawn(move || {
            value::<bool>(
                &mut waiter,
                &format!("SELECT autoprewarm_wait('{longest}')"),
            )
        });
        thread::sleep(Duration::from_millis(300));
        assert!(!waiting.is_finished());
        set_rate(&cluster, 0);
        waiting.join().unwrap()
    });
    assert!(answer);
    assert_eq!(LoadStats::get(&mut client).result(), "completed");
}

#[test]
fn two_hundred_sessions_can_wait_at_once() {
    let (cluster, _) = slow_cluster(Cluster::build().setting("max_connections = 230"));
    let mut client = cluster.connect("postgres");
    begin_load(&mut client);
    let waiters: Vec<_> = (0..200)
        .map(|_| {
            let mut waiter = cluster.connect("postgres");
            thread::spawn(move || {
                let answer = value::<bool>(&mut waiter, WAIT);
                (answer, LoadStats::get(&mut waiter).result)
            })
        })
        .collect();
    wait_until("200 who wait", || value::<i64>(&mut client, WAITING) == 200);
    assert_eq!(LoadStats::get(&mut client).state, "loading");
    set_rate(&cluster, 0);
    for waiter in waiters {
        assert_eq!(waiter.join().unwrap(), (true, Some("completed".to_owned())));
    }
}

#[test]
fn a_wait_while_the_server_starts_does_not_return_before_the_load_has_ended() {
    let (cluster, _) = slow_cluster(Cluster::build());
    let list = cluster.list();
    // The third load in a row that followed a crash would not be begun.
    for (crash, rounds) in [(false, 3), (true, 2)] {
        for _ in 0..rounds {
            cluster.stop(if crash {
                Shutdown::Immediate
            } else {
                Shutdown::Fast
            });
            cluster.write_list(&list);
            // From the moment at which the server accepts connections.
            thread::scope(|scope| {
                let asking = scope.spawn(|| {
                    let config = cluster.config();
                    let start = Instant::now();
                    let mut client = loop {
                        match config.connect(postgres::NoTls) {
                            Ok(client) => break client,
                            Err(error) if start.elapsed() > Duration::from_secs(60) => {
                                panic!("{error}")
                            }
                            Err(_) => thread::sleep(Duration::from_millis(1)),
                        }
                    };
                    while LoadStats::get(&mut client).loaded < 5 {
                        assert!(!value::<bool>(&mut client, "SELECT autoprewarm_wait('0')"));
                    }
                });
                cluster.start();
                asking.join().unwrap();
            });
        }
    }
    assert_eq!(cluster.list(), list);
}

#[test]
fn a_wait_in_a_server_without_a_slot_for_the_leader_ends() {
    let cluster = Cluster::build().setting("max_worker_processes = 0").start();
    cluster.sql("CREATE EXTENSION pg_prewarm");
    let mut client = cluster.connect("postgres");
    assert_eq!(LoadStats::get(&mut client).state, "not running");
    // Calls with a short timeout return true in the end, too.
    assert!(!value::<bool>(&mut client, "SELECT autoprewarm_wait('0')"));
    let start = Instant::now();
    wait_until("the answer", || {
        value(&mut client, "SELECT autoprewarm_wait('100ms')")
    });
    assert!(start.elapsed() < Duration::from_secs(40));
    assert!(value::<bool>(&mut client, "SELECT autoprewarm_wait('0')"));
}

#[test]
fn terminating_the_leader_during_a_load_ends_the_wait_and_the_next_leader_loads_again() {
    let (cluster, _) = slow_cluster(Cluster::build());
    let list = cluster.list();
    let mut client = cluster.connect("postgres");
    begin_load(&mut client);
    let leader = cluster.leader().unwrap();
    let mut waiter = cluster.connect("postgres");
    let waiting = thread::spawn(move || value::<bool>(&mut waiter, WAIT));
    assert!(value::<bool>(
        &mut client,
        &format!("SELECT pg_terminate_backend({leader}, 60000)")
    ));
    assert!(waiting.join().unwrap());
    let stats = LoadStats::wait_for_end(&mut client);
    assert_eq!((&*stats.state, stats.result()), ("not running", "failed"));
    assert_eq!(stats.total, 1000);
    assert!(!value::<bool>(&mut client, CANCEL));
    let rows = "SELECT count(*) FROM pg_stat_progress_prewarm";
    wait_until("no rows", || value::<i64>(&mut client, rows) == 0);
    assert_eq!(cluster.list(), list);

    begin_load(&mut client);
    assert_ne!(cluster.leader().unwrap(), leader);
    set_rate(&cluster, 0);
    let stats = LoadStats::wait_for_end(&mut client);
    assert_eq!(
        (stats.result(), stats.loaded + stats.cached),
        ("completed", 1000)
    );
}

#[test]
fn a_shutdown_during_a_load_on_demand_keeps_the_list() {
    let (cluster, _) = slow_cluster(Cluster::build());
    let list = cluster.list();
    for how in [Shutdown::Smart, Shutdown::Fast, Shutdown::Immediate] {
        let mut client = cluster.connect("postgres");
        // From the second time on, the start of the server has begun a load.
        if LoadStats::get(&mut client).state == "idle" {
            client.batch_execute(LOAD).unwrap();
        }
        wait_for_load_to_run(&mut client);
        drop(client);
        let start = Instant::now();
        cluster.stop(how);
        assert!(start.elapsed() < Duration::from_secs(10), "{how:?}");
        assert_eq!(cluster.list(), list, "{how:?}");
        cluster.start();
        wait_for_load_to_run(&mut cluster.connect("postgres"));
    }
}

#[test]
fn a_crash_during_a_load_on_demand_is_followed_by_another_load_with_its_own_counters() {
    let (mut cluster, _) = slow_cluster(Cluster::build());
    cluster.expect_crash();
    let list = cluster.list();
    for victim in ["autoprewarm worker", "autoprewarm leader"] {
        let mut client = cluster.connect("postgres");
        if LoadStats::get(&mut client).state == "idle" {
            client.batch_execute(LOAD).unwrap();
        }
        LoadStats::wait_for(&mut client, |stats| stats.loaded + stats.cached >= 10);
        let before: String = value(&mut client, "SELECT clock_timestamp()::text");
        let pid: i32 = value(
            &mut client,
            &format!("SELECT max(pid) FROM pg_stat_activity WHERE backend_type = '{victim}'"),
        );
        let mark = cluster.log_end();
        signal(pid, libc::SIGKILL);
        cluster.wait_for_log(mark, "all server processes terminated; reinitializing");
        let mut client = cluster.connect("postgres");
        assert!(!value::<bool>(&mut client, "SELECT autoprewarm_wait('0')"));
        let stats = wait_for_load_to_run(&mut client);
        let began_after = format!("SELECT load_start_time > '{before}' FROM pg_stat_autoprewarm");
        assert!(value::<bool>(&mut client, &began_after));
        let age: f64 = value(
            &mut client,
            "SELECT extract(epoch FROM clock_timestamp() - load_start_time)::float8 \
             FROM pg_stat_autoprewarm",
        );
        // Ten blocks a second, and one or two at once.
        let done = (stats.loaded + stats.cached) as f64;
        assert!(done <= 10.0 * age + 2.0, "{stats:?} after {age} s");
        let stale = format!(
            "SELECT EXISTS (SELECT FROM pg_stat_progress_prewarm WHERE pid = {pid} \
                            OR pid NOT IN (SELECT pid FROM pg_stat_activity))"
        );
        assert!(!value::<bool>(&mut client, &stale));
    }
    assert_eq!(cluster.list(), list);
}

#[test]
fn a_worker_that_is_terminated_leaves_no_row_and_the_counters_add_up() {
    let (cluster, _) =
        cluster_with_list(Cluster::build().setting("pg_prewarm.autoprewarm_max_rate = 800"));
    let mut client = cluster.connect("postgres");
    begin_load(&mut client);
    // Each of the two chunks is tried twice.
    for _ in 0..3 {
        let mut pid = None;
        wait_until("a worker's row", || {
            pid = value(&mut client, "SELECT max(pid) FROM pg_stat_progress_prewarm");
            pid.is_some()
        });
        let pid: i32 = pid.unwrap();
        assert!(value::<bool>(
            &mut client,
            &format!("SELECT pg_terminate_backend({pid}, 60000)")
        ));
        let row = format!("SELECT EXISTS (SELECT FROM pg_stat_progress_prewarm WHERE pid = {pid})");
        assert!(!value::<bool>(&mut client, &row));
    }
    set_rate(&cluster, 0);
    let stats = LoadStats::wait_for_end(&mut client);
    assert_eq!((stats.result(), stats.total), ("completed", 1000));
}

#[test]
fn the_rate_limit_is_kept_and_a_reload_changes_it_during_a_load() {
    // 100 and 1600 blocks of 8 kB a second, which two workers share.
    let cluster = Cluster::build()
        .setting("shared_buffers = 256MB")
        .setting("pg_prewarm.autoprewarm_max_rate = 800")
        .start();
    cluster.sql("CREATE EXTENSION pg_prewarm");
    // More than are loaded at the limits.
    let blocks = 30_000;
    let table = cluster.table("t", blocks);
    cluster.stop(Shutdown::Fast);
    cluster.write_list(list_of(table.first(blocks)));
    cluster.start();
    let mut client = cluster.connect("postgres");
    // How many blocks were loaded in at least the first and at most the second time.
    let look = |client: &mut Client| {
        let outer = Instant::now();
        let first = LoadStats::get(client);
        let inner = Instant::now();
        thread::sleep(Duration::from_secs(5));
        let inner = inner.elapsed().as_secs_f64();
        let last = LoadStats::get(client);
        assert_eq!(last.state, "loading");
        let loaded = (last.loaded - first.loaded) as f64;
        (loaded, inner, outer.elapsed().as_secs_f64())
    };
    // On a test machine with a busy processor a load may be slower for a while; nothing
    // makes it faster.
    let measure = |client: &mut Client, rate: f64| {
        let is_fast_enough = (0..3).any(|_| {
            let (loaded, inner, outer) = look(client);
            assert!(
                loaded / outer < 1.1 * rate,
                "{loaded} blocks in {outer} s instead of {rate} a second"
            );
            loaded / inner >= 0.7 * rate
        });
        assert!(is_fast_enough, "less than {rate} blocks a second");
    };
    wait_for_load_to_run(&mut client);
    measure(&mut client, 100.0);
    set_rate(&cluster, 12_800);
    thread::sleep(Duration::from_secs(1));
    measure(&mut client, 1600.0);
    // One block in eight seconds, after a worker has read its last block at the old
    // rate.
    set_rate(&cluster, 1);
    wait_until("the new rate", || {
        let before = LoadStats::get(&mut client).loaded;
        thread::sleep(Duration::from_millis(300));
        LoadStats::get(&mut client).loaded - before <= 1
    });
    let start = Instant::now();
    let before = LoadStats::get(&mut client).loaded;
    thread::sleep(Duration::from_secs(2));
    let stats = LoadStats::get(&mut client);
    let at_most = 1 + start.elapsed().as_secs() as i64 / 8;
    assert!(stats.loaded - before <= at_most, "{before}, then {stats:?}");
    assert_eq!(stats.state, "loading", "{stats:?}");

    set_rate(&cluster, 0);
    let start = Instant::now();
    let stats = LoadStats::wait_for_end(&mut client);
    assert_eq!((stats.loaded, stats.skipped), (i64::from(blocks), 0));
    assert!(start.elapsed() < Duration::from_secs(10));
}

#[test]
fn blocks_that_clients_have_read_do_not_count_against_the_rate_limit() {
    let (cluster, _) = slow_cluster(Cluster::build());
    let mut client = cluster.connect("postgres");
    begin_load(&mut client);
    client.batch_execute("SELECT pg_prewarm('t')").unwrap();
    // Reading them would take longer than this waits.
    let stats = LoadStats::wait_for_end(&mut client);
    assert_eq!(stats.loaded + stats.cached, 1000);
    assert!(stats.cached > 900, "{stats:?}");
}

#[test]
fn a_load_on_a_standby_is_monitored_and_cancelled_like_on_any_other_server() {
    let (primary, table) = slow_cluster(Cluster::build());
    let standby = primary.standby();
    standby.write_list(list_of(table.first(BLOCKS)));
    standby.start();
    let mut client = standby.connect("postgres");
    assert!(!value::<bool>(&mut client, "SELECT autoprewarm_wait('0')"));
    wait_for_load_to_run(&mut client);
    assert_eq!(error(&mut client, LOAD), in_progress());
    let rows = "SELECT count(*) FROM pg_stat_progress_prewarm WHERE datname = 'postgres'";
    assert!(value::<i64>(&mut client, rows) > 0);
    cancel(&mut client);
    begin_load(&mut client);
    set_rate(&standby, 0);
    let stats = LoadStats::wait_for_end(&mut client);
    assert_eq!(
        (stats.result(), stats.loaded + stats.cached),
        ("completed", 1000)
    );
    assert_eq!(cached_blocks(&mut client, "t"), 1000);
}

#[test]
fn loads_can_be_controlled_and_monitored_by_those_who_have_the_privileges() {
    let cluster = Cluster::build().start();
    cluster.sql(
        "CREATE EXTENSION pg_prewarm; CREATE ROLE plain LOGIN; \
         CREATE ROLE monitor LOGIN IN ROLE pg_monitor",
    );
    let control = ["autoprewarm_load_now", "autoprewarm_cancel"];
    let denied =
        |kind, name| SqlError::new("42501", format!("permission denied for {kind} {name}"));
    let mut plain = cluster.connect_as("plain", "postgres");
    let mut monitor = cluster.connect_as("monitor", "postgres");
    for function in control.into_iter().chain([
        "autoprewarm_wait",
        "pg_stat_get_autoprewarm",
        "pg_stat_get_progress_prewarm",
    ]) {
        assert_eq!(
            error(&mut plain, &format!("SELECT {function}()")),
            denied("function", function)
        );
    }
    for view in ["pg_stat_autoprewarm", "pg_stat_progress_prewarm"] {
        let query = format!("SELECT * FROM {view}");
        assert_eq!(error(&mut plain, &query), denied("view", view));
        monitor.batch_execute(&query).unwrap();
    }
    assert!(value::<bool>(&mut monitor, WAIT));
    for function in control {
        assert_eq!(
            error(&mut monitor, &format!("SELECT {function}()")),
            denied("function", function)
        );
        cluster.sql(&format!("GRANT EXECUTE ON FUNCTION {function}() TO plain"));
        plain
            .batch_execute(&format!("SELECT {function}()"))
            .unwrap();
    }
}
