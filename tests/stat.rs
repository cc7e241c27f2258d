//! What the server reports about loads, dumps and calls.

use std::fs;
use std::thread;
use std::time::Duration;

use postgres::Client;

use crate::common::{
    Block, Cluster, LIST, LoadStats, Shutdown, error, give_to_server, list_of, set_rate, signal,
    value, wait_until,
};

const LOAD: &str = "SELECT autoprewarm_load_now()";
const CANCEL: &str = "SELECT autoprewarm_cancel()";

/// A column of the one row of `pg_stat_autoprewarm`, as text.
fn shown(client: &mut Client, column: &str) -> Option<String> {
    value(
        client,
        &format!("SELECT ({column})::text FROM pg_stat_autoprewarm"),
    )
}

#[test]
fn the_views_have_the_documented_columns() {
    let cluster = Cluster::build().start();
    cluster.sql("CREATE EXTENSION pg_prewarm");
    let mut client = cluster.connect("postgres");
    let mut columns = |view: &str| -> String {
        value(
            &mut client,
            &format!(
                "SELECT string_agg(attname || ' ' || format_type(atttypid, -1), ', ' \
                                   ORDER BY attnum) \
                 FROM pg_attribute WHERE attrelid = '{view}'::regclass AND attnum > 0"
            ),
        )
    };
    assert_eq!(
        columns("pg_stat_autoprewarm"),
        "pid integer, state text, load_start_time timestamp with time zone, \
         load_end_time timestamp with time zone, load_result text, blocks_total bigint, \
         blocks_loaded bigint, blocks_cached bigint, blocks_skipped bigint, \
         skipped_illegal bigint, skipped_template_database bigint, skipped_no_database bigint, \
         skipped_no_relation bigint, skipped_no_block bigint, skipped_unreadable bigint, \
         skipped_locked bigint, skipped_no_free_buffer bigint, skipped_no_shared_memory bigint, skipped_interrupted bigint, \
         skipped_cancelled bigint, blocks_carried bigint, connections_held bigint, last_dump_time timestamp with time zone, \
         last_dump_blocks bigint, last_dump_duration interval, last_error text, \
         last_error_time timestamp with time zone"
    );
    assert_eq!(
        columns("pg_stat_progress_prewarm"),
        "pid integer, datid oid, datname name, kind text, relid oid, fork text, \
         blocks_total bigint, blocks_done bigint, blocks_skipped bigint, \
         start_time timestamp with time zone"
    );
}

#[test]
fn columns_are_null_before_the_first_load_and_dump() {
    let cluster = Cluster::build().not_preloaded().start();
    cluster.sql("CREATE EXTENSION pg_prewarm");
    let mut client = cluster.connect("postgres");
    // Also in a read-only transaction.
    client
        .batch_execute("SET default_transaction_read_only = on")
        .unwrap();
    let row: String = value(&mut client, "SELECT s::text FROM pg_stat_autoprewarm s");
    assert_eq!(
        row,
        "(,\"not running\",,,,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,,0,,,,,)"
    );
    assert_eq!(
        value::<i64>(&mut client, "SELECT count(*) FROM pg_stat_progress_prewarm"),
        0
    );
    assert!(value::<bool>(&mut client, "SELECT autoprewarm_wait()"));
    assert!(!value::<bool>(&mut client, "SELECT autoprewarm_cancel()"));
}

#[test]
fn the_counters_of_a_load_grow_and_add_up() {
    // The load takes eight seconds.
    let cluster = Cluster::build()
        .setting("pg_prewarm.autoprewarm_max_rate = 1000")
        .start();
    for sql in [
        "CREATE EXTENSION pg_prewarm",
        "CREATE DATABASE other",
        "CREATE DATABASE gone",
    ] {
        cluster.sql(sql);
    }
    let table = cluster.table("t", 500);
    let other = cluster.table_of_blocks("other", "o", 500);
    let gone = cluster.table_of_blocks("gone", "g", 10);
    let short = cluster.table("s", 10);
    cluster.sql("DROP DATABASE gone");
    let template = Block {
        database: 1,
        tablespace: 1663,
        filenumber: 1259,
        ..table
    };
    let list = table
        .first(500)
        .chain(other.first(500))
        .chain(gone.first(10))
        .chain(short.first(17))
        .chain(template.first(5))
        .chain([
            Block { fork: 9, ..table },
            Block {
                filenumber: 4_000_000,
                ..table
            },
        ]);
    cluster.stop(Shutdown::Fast);
    cluster.write_list(list_of(list));
    cluster.start();

    let mut client = cluster.connect("postgres");
    let mut polls = 0;
    let mut last: Option<LoadStats> = None;
    loop {
        let stats = LoadStats::get(&mut client);
        let done = stats.loaded + stats.cached + stats.skipped;
        assert!(done <= stats.total, "{stats:?}");
        // The leader may not have started the load, or may not know the number of
        // blocks yet.
        if let Some(last) = last.filter(|last| last.total > 0) {
            assert!(
                stats.total == last.total
                    && stats.loaded >= last.loaded
                    && stats.cached >= last.cached
                    && stats.skipped >= last.skipped,
                "{last:?}, then {stats:?}"
            );
        }
        if stats.result.is_some() {
            assert_eq!(done, stats.total);
            assert_eq!(stats.state, "idle");
            break;
        }
        polls += usize::from(stats.loaded > 0);
        last = Some(stats);
        thread::sleep(Duration::from_millis(2));
    }
    assert!(polls > 20, "{polls}");
    let row: String = value(
        &mut client,
        "SELECT concat_ws(' ', load_result, blocks_total, blocks_loaded + blocks_cached, \
                          blocks_skipped, skipped_illegal, skipped_template_database, \
                          skipped_no_database, skipped_no_relation, skipped_no_block, \
                          skipped_unreadable, skipped_locked, skipped_no_free_buffer, \
                          skipped_no_shared_memory, skipped_interrupted, skipped_cancelled) \
         FROM pg_stat_autoprewarm",
    );
    assert_eq!(row, "completed 1034 1010 24 1 5 10 1 7 0 0 0 0 0 0");
    let times = "load_start_time >= pg_postmaster_start_time() \
                 AND load_end_time - load_start_time BETWEEN '100ms' AND '1 min' \
                 AND load_end_time <= clock_timestamp() AND last_error IS NULL";
    assert_eq!(shown(&mut client, times).unwrap(), "true");
    let cached = cluster.cached();
    for block in table
        .first(500)
        .chain(other.first(500))
        .chain(short.first(10))
    {
        assert!(cached.contains(&block), "{block:?}");
    }
}

#[test]
fn skipped_blocks_are_counted_by_reason() {
    let cluster = Cluster::build().checksums().start();
    cluster.sql("CREATE EXTENSION pg_prewarm");
    let table = cluster.table("t", 10);
    let broken = cluster.table("broken", 6);
    let locked = cluster.table("locked", 7);
    let path: String = cluster.value("SELECT pg_relation_filepath('broken')");
    cluster.stop(Shutdown::Fast);
    let mut data = fs::read(cluster.data(&path)).unwrap();
    data.chunks_mut(8192)
        .for_each(|page| page[100..200].fill(0xff));
    fs::write(cluster.data(&path), data).unwrap();
    cluster.write_list("<<0>>\n");
    cluster.start();
    // Otherwise the load at the start might read the list below.
    cluster.sql("SELECT autoprewarm_wait()");
    let mut holder = cluster.connect("postgres");
    holder.batch_execute("BEGIN; LOCK TABLE locked").unwrap();

    let of_template = Block {
        database: 1,
        ..table
    };
    let of_nothing = Block {
        database: 99999,
        ..table
    };
    let gone = Block {
        filenumber: 99999,
        ..table
    };
    let blocks = Block { fork: 9, ..table }
        .first(1)
        .chain(of_template.first(2))
        .chain(of_nothing.first(3))
        .chain(gone.first(4))
        .chain((100..105).map(|block| table.at(block)))
        .chain(broken.first(6))
        .chain(locked.first(7))
        .chain(table.first(10));
    cluster.write_list(list_of(blocks));
    let mut client = cluster.connect("postgres");
    client.batch_execute(LOAD).unwrap();
    let stats = LoadStats::wait_for_end(&mut client);
    assert_eq!((stats.total, stats.loaded, stats.skipped), (38, 10, 28));
    assert_eq!(
        shown(
            &mut client,
            "ARRAY[skipped_illegal, skipped_template_database, skipped_no_database, \
                   skipped_no_relation, skipped_no_block, skipped_unreadable, skipped_locked, \
                   skipped_no_free_buffer, skipped_no_shared_memory, skipped_interrupted, skipped_cancelled]"
        )
        .unwrap(),
        "{1,2,3,4,5,6,7,0,0,0,0}"
    );
}

#[test]
fn every_state_of_the_leader_is_reported() {
    let cluster = Cluster::build().start();
    cluster.sql("CREATE EXTENSION pg_prewarm");
    let table = cluster.table("t", 100);
    cluster.stop(Shutdown::Fast);
    cluster.write_list(list_of(table.first(100)));
    cluster.configure("pg_prewarm.autoprewarm_max_rate = 80");
    cluster.start();
    let mut client = cluster.connect("postgres");
    let pid_and_state = |client: &mut Client| {
        (
            shown(client, "pid").map(|pid| pid.parse::<i32>().unwrap()),
            shown(client, "state").unwrap(),
        )
    };
    LoadStats::wait_for(&mut client, |stats| stats.loaded > 0);
    assert_eq!(
        pid_and_state(&mut client),
        (cluster.leader(), "loading".to_owned())
    );
    assert_eq!(shown(&mut client, "load_result"), None);
    assert_eq!(shown(&mut client, "load_end_time"), None);

    client.batch_execute(CANCEL).unwrap();
    assert_eq!(
        pid_and_state(&mut client),
        (cluster.leader(), "idle".to_owned())
    );
    assert_eq!(shown(&mut client, "load_result").unwrap(), "cancelled");

    // Requested, but not noticed by the leader yet.
    let leader = cluster.leader().unwrap();
    signal(leader, libc::SIGSTOP);
    thread::scope(|scope| {
        let asked = scope.spawn(|| cluster.sql(LOAD));
        wait_until("the request", || {
            pid_and_state(&mut client) == (Some(leader), "load pending".to_owned())
        });
        let ready = value::<bool>(&mut client, "SELECT autoprewarm_wait('0')");
        let refused = error(&mut client, LOAD);
        let returned = asked.is_finished();
        signal(leader, libc::SIGCONT);
        assert!(!ready && !returned);
        assert_eq!(refused.message, "autoprewarm load is already in progress");
    });
    LoadStats::wait_for(&mut client, |stats| stats.state == "loading");
    client.batch_execute(CANCEL).unwrap();

    fs::remove_file(cluster.data(LIST)).unwrap();
    fs::create_dir(cluster.data(LIST)).unwrap();
    give_to_server(&cluster.data(LIST));
    client.batch_execute(LOAD).unwrap();
    LoadStats::wait_for_end(&mut client);
    assert_eq!(
        pid_and_state(&mut client),
        (cluster.leader(), "load failed".to_owned())
    );
    assert_eq!(shown(&mut client, "load_result").unwrap(), "failed");
    fs::remove_dir(cluster.data(LIST)).unwrap();

    let leader = cluster.leader().unwrap();
    client
        .batch_execute(&format!("SELECT pg_terminate_backend({leader}, 60000)"))
        .unwrap();
    assert_eq!(pid_and_state(&mut client), (None, "not running".to_owned()));
}

#[test]
fn each_worker_reports_its_database_its_relation_and_its_progress() {
    let cluster = Cluster::build()
        .setting("pg_prewarm.autoprewarm_max_rate = 400")
        .start();
    cluster.sql("CREATE EXTENSION pg_prewarm");
    cluster.sql("CREATE DATABASE \"größe\"");
    let table = cluster.table("t", 400);
    let other = cluster.table_of_blocks("größe", "o", 400);
    cluster.stop(Shutdown::Fast);
    cluster.write_list(list_of(table.first(400).chain(other.first(400))));
    cluster.start();
    let mut client = cluster.connect("postgres");
    let relations: Vec<u32> = ["postgres", "größe"]
        .map(|database| {
            let name = if database == "postgres" { "t" } else { "o" };
            value(
                &mut cluster.connect(database),
                &format!("SELECT '{name}'::regclass::oid"),
            )
        })
        .into();
    let rows = "SELECT datname::text, p.datid, relid, fork, kind, blocks_total, blocks_done, \
                       blocks_skipped, a.backend_type, a.query, a.state, \
                       start_time BETWEEN pg_postmaster_start_time() AND clock_timestamp(), \
                       a.wait_event_type, a.wait_event \
                FROM pg_stat_progress_prewarm p JOIN pg_stat_activity a USING (pid, datname) \
                WHERE relid IS NOT NULL ORDER BY p.datid";
    let mut done = [0; 2];
    let mut waits = 0;
    for _ in 0..50 {
        let mut all = client.query(rows, &[]).unwrap();
        wait_until("both workers", || {
            all = client.query(rows, &[]).unwrap();
            all.len() == 2
        });
        for (index, row) in all.iter().enumerate() {
            let (name, block) = [("postgres", table), ("größe", other)][index];
            assert_eq!(row.get::<_, &str>(0), name);
            assert_eq!(row.get::<_, u32>(1), block.database);
            assert_eq!(row.get::<_, u32>(2), relations[index]);
            assert_eq!(row.get::<_, &str>(3), "main");
            assert_eq!(row.get::<_, &str>(4), "autoprewarm worker");
            assert_eq!(row.get::<_, i64>(5), 400);
            let now_done: i64 = row.get(6);
            assert!((done[index]..=400).contains(&now_done), "{now_done}");
            done[index] = now_done;
            assert_eq!(row.get::<_, i64>(7), 0);
            assert_eq!(row.get::<_, &str>(8), "autoprewarm worker");
            let query: &str = row.get(9);
            assert!(
                query.starts_with(&format!("loading {name}, ")) && query.ends_with(" %"),
                "{query}"
            );
            assert_eq!(row.get::<_, &str>(10), "active");
            assert!(row.get::<_, bool>(11));
            let expected = match cluster.major() {
                17.. => "AutoprewarmRateLimit",
                _ => "Extension",
            };
            waits += i32::from(row.get::<_, Option<&str>>(13) == Some(expected));
        }
        thread::sleep(Duration::from_millis(5));
    }
    assert!(done.iter().all(|&done| done > 0), "{done:?}");
    assert!(waits > 10, "{waits}");

    // It waits for its workers, and wakes up now and then.
    let expected = match cluster.major() {
        17.. => "AutoprewarmLoad",
        _ => "Extension",
    };
    wait_until("the leader's row", || {
        let row = client
            .query_one(
                "SELECT query, wait_event FROM pg_stat_activity \
                 WHERE backend_type = 'autoprewarm leader'",
                &[],
            )
            .unwrap();
        let query: &str = row.get(0);
        query.starts_with("loading, ")
            && query.ends_with(" of 800 blocks")
            && row.get::<_, Option<&str>>(1) == Some(expected)
    });
    // The process title has the same.
    let pid: i32 = value(
        &mut client,
        "SELECT pid FROM pg_stat_progress_prewarm WHERE datname <> 'postgres'",
    );
    let title = fs::read(format!("/proc/{pid}/cmdline")).unwrap();
    let title = String::from_utf8_lossy(&title);
    assert!(title.contains("loading größe, "), "{title}");

    let mut waiter = cluster.connect("postgres");
    let waiting = thread::spawn(move || value::<bool>(&mut waiter, "SELECT autoprewarm_wait()"));
    let expected = match cluster.major() {
        17.. => "AutoprewarmLoadEnd",
        _ => "Extension",
    };
    wait_until("the waiter's wait event", || {
        value::<bool>(
            &mut client,
            &format!(
                "SELECT EXISTS (SELECT FROM pg_stat_activity \
                                WHERE query LIKE '%autoprewarm_wait%' \
                                  AND wait_event = '{expected}' \
                                  AND pid <> pg_backend_pid())"
            ),
        )
    });
    client.batch_execute(CANCEL).unwrap();
    assert!(waiting.join().unwrap());
    wait_until("no row", || {
        value::<i64>(&mut client, "SELECT count(*) FROM pg_stat_progress_prewarm") == 0
    });
    let idle = "SELECT concat(query, state) FROM pg_stat_activity \
                WHERE backend_type = 'autoprewarm leader'";
    wait_until("an idle leader", || {
        value::<String>(&mut client, idle) == "idle"
    });
}

/// How many milliseconds a read takes, so that a call for all of the table takes some
/// seconds. Mode `read` reads 32 blocks at once.
const ONE_BLOCK: u32 = 2;
const MANY_BLOCKS: u32 = 40;

/// A cluster with a table of 2000 blocks, which is read slowly; so slowly in mode `read`.
fn cluster_with_slow_table() -> Cluster {
    let cluster = Cluster::build()
        .setting("pg_prewarm.autoprewarm = off")
        .create();
    if cluster.major() >= 17 {
        cluster.configure("io_combine_limit = 1");
    }
    cluster.slow_reads(0);
    cluster.start();
    cluster.sql("CREATE EXTENSION pg_prewarm");
    cluster.table("t", 2000);
    // None of it is cached then.
    cluster.restart();
    cluster.slow_reads(MANY_BLOCKS);
    cluster
}

const ROW: &str = "SELECT concat_ws(' ', kind, relid::regclass, fork, blocks_total, \
                                    blocks_skipped, datname), blocks_done, pid, \
                          start_time BETWEEN now() - interval '1 min' AND clock_timestamp() \
                   FROM pg_stat_progress_prewarm";

/// Waits until a call reports that it has read some of its blocks, and returns its row.
fn wait_for_row(client: &mut Client) -> (String, i64, i32) {
    let mut found = None;
    wait_until("a call's row", || {
        let row = client.query_opt(ROW, &[]).unwrap();
        found = row
            .map(|row| {
                assert!(row.get::<_, bool>(3));
                (row.get(0), row.get(1), row.get(2))
            })
            .filter(|(_, done, _)| *done > 0);
        found.is_some()
    });
    found.unwrap()
}

fn no_row(client: &mut Client) {
    assert!(client.query_opt(ROW, &[]).unwrap().is_none());
}

/// A client receives an error before its transaction has been aborted.
fn wait_for_no_row(client: &mut Client) {
    wait_until("no row", || client.query_opt(ROW, &[]).unwrap().is_none());
}

#[test]
fn a_call_of_pg_prewarm_reports_its_progress_until_it_ends() {
    let cluster = cluster_with_slow_table();
    let mut observer = cluster.connect("postgres");
    let mut client = cluster.connect("postgres");
    let pid: i32 = value(&mut client, "SELECT pg_backend_pid()");
    for (call, total, delay) in [
        ("pg_prewarm('t', 'read')", 2000, MANY_BLOCKS),
        (
            "pg_prewarm('t', 'buffer', 'main', 100, 1299)",
            1200,
            ONE_BLOCK,
        ),
    ] {
        cluster.slow_reads(delay);
        thread::scope(|scope| {
            let calling = scope.spawn(|| value::<i64>(&mut client, &format!("SELECT {call}")));
            let (row, done, row_pid) = wait_for_row(&mut observer);
            assert_eq!(row, format!("pg_prewarm t main {total} 0 postgres"));
            assert!(done <= total, "{done}");
            assert_eq!(row_pid, pid);
            wait_until("more", || {
                observer
                    .query_opt(ROW, &[])
                    .unwrap()
                    .is_none_or(|row| row.get::<_, i64>(1) > done)
            });
            assert_eq!(calling.join().unwrap(), total);
        });
        no_row(&mut observer);
    }

    // `prefetch` takes no time for each block, so it needs many of them.
    let path: String = cluster.value("SELECT pg_relation_filepath('t')");
    cluster.slow_reads(0);
    for segment in 0..8 {
        let path = match segment {
            0 => cluster.data(&path),
            _ => cluster.data(&format!("{path}.{segment}")),
        };
        let file = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .unwrap();
        file.set_len(1 << 30).unwrap();
        give_to_server(&path);
    }
    thread::scope(|scope| {
        let calling =
            scope.spawn(|| value::<i64>(&mut client, "SELECT pg_prewarm('t', 'prefetch')"));
        let (row, _, _) = wait_for_row(&mut observer);
        assert_eq!(row, "pg_prewarm t main 1048576 0 postgres");
        assert_eq!(calling.join().unwrap(), 1_048_576);
    });
    no_row(&mut observer);
}

#[test]
fn a_call_for_a_schema_or_a_database_reports_the_progress_of_all_of_it() {
    let cluster = cluster_with_slow_table();
    cluster.sql("CREATE TABLE small AS SELECT 1 AS a; CREATE INDEX ON small (a)");
    let mut observer = cluster.connect("postgres");
    let mut client = cluster.connect("postgres");
    for (kind, schema) in [
        ("pg_prewarm_schema", "'public', "),
        ("pg_prewarm_database", ""),
    ] {
        let sum = |mode| format!("SELECT sum(blocks)::int8 FROM {kind}({schema}'{mode}')");
        let total: i64 = value(&mut client, &sum("prefetch"));
        assert!(total > 2000, "{kind}: {total}");
        thread::scope(|scope| {
            let calling = scope.spawn(|| value::<i64>(&mut client, &sum("read")));
            let expected = format!("{kind} t main {total} 0 postgres");
            wait_until(&expected, || wait_for_row(&mut observer).0 == expected);
            assert_eq!(calling.join().unwrap(), total);
        });
        no_row(&mut observer);
    }
}

#[test]
fn a_call_that_fails_or_is_cancelled_leaves_no_row() {
    let cluster = cluster_with_slow_table();
    let mut observer = cluster.connect("postgres");
    let mut client = cluster.connect("postgres");
    // The whole transaction fails, or only a subtransaction.
    let caught = "DO $$ BEGIN \
                    BEGIN PERFORM pg_prewarm('t', 'read'); \
                    EXCEPTION WHEN query_canceled THEN \
                      IF EXISTS (SELECT FROM pg_stat_progress_prewarm) THEN \
                        RAISE 'a row is left'; \
                      END IF; \
                    END; \
                    PERFORM pg_prewarm('t', 'buffer', 'main', 0, 3); \
                  END $$";
    for (call, succeeds) in [("SELECT pg_prewarm('t', 'read')", false), (caught, true)] {
        thread::scope(|scope| {
            let calling = scope.spawn(|| client.batch_execute(call));
            let (_, _, pid) = wait_for_row(&mut observer);
            observer
                .batch_execute(&format!("SELECT pg_cancel_backend({pid})"))
                .unwrap();
            assert_eq!(calling.join().unwrap().is_ok(), succeeds, "{call}");
        });
        wait_for_no_row(&mut observer);
    }

    // A page that cannot be read.
    let path: String = cluster.value("SELECT pg_relation_filepath('t')");
    let mut data = fs::read(cluster.data(&path)).unwrap();
    data[1500 * 8192..1501 * 8192].fill(0xff);
    fs::write(cluster.data(&path), data).unwrap();
    cluster.slow_reads(ONE_BLOCK);
    for call in [
        "SELECT pg_prewarm('t')".to_owned(),
        "DO $$ BEGIN BEGIN PERFORM pg_prewarm('t'); RAISE 'read'; \
                     EXCEPTION WHEN data_corrupted THEN NULL; END; \
                     IF EXISTS (SELECT FROM pg_stat_progress_prewarm) THEN RAISE 'row'; END IF; \
         END $$"
            .to_owned(),
    ] {
        let result = client.batch_execute(&call);
        assert_eq!(result.is_ok(), call.starts_with("DO"), "{call}: {result:?}");
        wait_for_no_row(&mut observer);
    }
    // A session that is terminated.
    cluster.slow_reads(MANY_BLOCKS);
    thread::scope(|scope| {
        let calling = scope.spawn(|| client.batch_execute("SELECT pg_prewarm('t', 'read')"));
        let (_, _, pid) = wait_for_row(&mut observer);
        observer
            .batch_execute(&format!("SELECT pg_terminate_backend({pid}, 60000)"))
            .unwrap();
        assert!(calling.join().unwrap().is_err());
    });
    no_row(&mut observer);
}

#[test]
fn the_progress_of_another_command_is_not_disturbed() {
    let cluster = cluster_with_slow_table();
    let mut observer = cluster.connect("postgres");
    let mut client = cluster.connect("postgres");
    thread::scope(|scope| {
        let copying = scope.spawn(|| {
            client.batch_execute(
                "COPY (SELECT g, CASE WHEN g >= 3 THEN pg_prewarm('t', 'read') END \
                       FROM generate_series(1, 4) g) TO '/dev/null'",
            )
        });
        let copy = "SELECT tuples_processed FROM pg_stat_progress_copy";
        wait_until("the first rows", || {
            let row = observer.query_opt(copy, &[]).unwrap();
            row.is_some_and(|row| row.get::<_, i64>(0) == 2)
        });
        no_row(&mut observer);
        wait_until("the next row", || {
            let row = observer.query_opt(copy, &[]).unwrap();
            row.is_some_and(|row| row.get::<_, i64>(0) == 3)
        });
        no_row(&mut observer);
        copying.join().unwrap().unwrap();
    });
    // The next call reports its progress again.
    thread::scope(|scope| {
        let calling = scope.spawn(|| client.batch_execute("SELECT pg_prewarm('t', 'read')"));
        wait_for_row(&mut observer);
        calling.join().unwrap().unwrap();
    });
    no_row(&mut observer);
}

#[test]
fn without_track_activities_nothing_is_reported_and_everything_works() {
    let cluster = cluster_with_slow_table();
    let mut client = cluster.connect("postgres");
    client.batch_execute("SET track_activities = off").unwrap();
    let mut observer = cluster.connect("postgres");
    thread::scope(|scope| {
        let calling = scope.spawn(|| value::<i64>(&mut client, "SELECT pg_prewarm('t', 'read')"));
        while !calling.is_finished() {
            no_row(&mut observer);
            thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(calling.join().unwrap(), 2000);
    });
    // Switched off and on within the query of a call.
    cluster.slow_reads(ONE_BLOCK);
    client
        .batch_execute(
            "SET track_activities = on; \
             SELECT set_config('track_activities', 'off', false), \
                    pg_prewarm('t', 'buffer', 'main', 0, 300), \
                    set_config('track_activities', 'on', false), \
                    pg_prewarm('t', 'buffer', 'main', 0, 300)",
        )
        .unwrap();
    no_row(&mut observer);

    let list = cluster.file_of("postgres", "t").first(300);
    cluster.slow_reads(0);
    cluster.stop(Shutdown::Fast);
    cluster.configure("track_activities = off\npg_prewarm.autoprewarm = on");
    cluster.write_list(list_of(list));
    cluster.start();
    let mut client = cluster.connect("postgres");
    let stats = LoadStats::wait_for_end(&mut client);
    assert_eq!((stats.result(), stats.loaded), ("completed", 300));
}

#[test]
fn a_call_for_a_temporary_table_reports_its_progress() {
    let cluster = Cluster::build().setting("temp_buffers = 32MB").start();
    cluster.sql("CREATE EXTENSION pg_prewarm");
    let mut client = cluster.connect("postgres");
    client
        .batch_execute(
            "CREATE TEMP TABLE t (id int, filler text) WITH (fillfactor = 10); \
             INSERT INTO t SELECT g, repeat('x', 700) FROM generate_series(1, 1000) g",
        )
        .unwrap();
    for mode in ["prefetch", "read", "buffer"] {
        let call = format!("SELECT pg_prewarm('t', '{mode}')");
        assert_eq!(value::<i64>(&mut client, &call), 1000, "{mode}");
        no_row(&mut client);
    }
}

#[test]
fn a_call_in_a_parallel_worker_is_reported_with_the_workers_process_id() {
    let cluster = cluster_with_slow_table();
    let forced = match cluster.major() {
        15 => "force_parallel_mode",
        _ => "debug_parallel_query",
    };
    let mut observer = cluster.connect("postgres");
    let mut client = cluster.connect("postgres");
    client.batch_execute(&format!("SET {forced} = on")).unwrap();
    thread::scope(|scope| {
        let calling = scope.spawn(|| client.batch_execute("SELECT pg_prewarm('t', 'read')"));
        let (_, _, pid) = wait_for_row(&mut observer);
        let kind: String = value(
            &mut observer,
            &format!("SELECT backend_type FROM pg_stat_activity WHERE pid = {pid}"),
        );
        assert_eq!(kind, "parallel worker");
        calling.join().unwrap().unwrap();
    });
    no_row(&mut observer);
}

#[test]
fn the_last_dump_is_described_as_it_was_written() {
    let cluster = Cluster::build()
        .setting("pg_prewarm.autoprewarm_interval = 0")
        .start();
    cluster.sql("CREATE EXTENSION pg_prewarm");
    let mut client = cluster.connect("postgres");
    // The leader looks for a list first.
    client.batch_execute("SELECT autoprewarm_wait()").unwrap();
    assert_eq!(shown(&mut client, "last_dump_time"), None);
    assert_eq!(shown(&mut client, "last_dump_blocks"), None);
    let records: i64 = value(&mut client, "SELECT autoprewarm_dump_now()");
    let described = |client: &mut Client| {
        let blocks = shown(client, "last_dump_blocks").unwrap();
        assert_eq!(
            shown(
                client,
                "last_dump_duration BETWEEN '1 microsecond' AND '1 min' \
                 AND last_dump_time BETWEEN now() - interval '1 min' AND clock_timestamp() \
                 AND abs(extract(epoch FROM last_dump_time \
                                   - (pg_stat_file('autoprewarm.blocks')).modification)) < 10"
            )
            .unwrap(),
            "true"
        );
        blocks.parse::<i64>().unwrap()
    };
    assert_eq!(described(&mut client), records);
    assert_eq!(cluster.listed().len() as i64, records);

    // The leader's dump as well. A dump that fails changes nothing.
    client
        .batch_execute("CREATE TABLE t AS SELECT 1 AS a")
        .unwrap();
    let mark = cluster.log_end();
    cluster.configure("pg_prewarm.autoprewarm_interval = 1");
    cluster.reload();
    cluster.wait_for_log(mark, "wrote block details");
    wait_until("the list of the last dump", || {
        cluster.listed().len() as i64 == described(&mut client)
    });
    assert!(cluster.lists(cluster.file_of("postgres", "t")));
    assert_eq!(shown(&mut client, "last_error"), None);

    // A dump may be under way.
    wait_until("no unfinished list", || {
        fs::create_dir(cluster.data(&format!("{LIST}.tmp"))).is_ok()
    });
    let mark = cluster.log_end();
    cluster.wait_for_log(mark, "could not open file");
    let before = shown(&mut client, "last_dump_time");
    assert_eq!(
        shown(&mut client, "last_error").unwrap(),
        "could not open file \"autoprewarm.blocks.tmp\": Is a directory"
    );
    assert_eq!(
        shown(&mut client, "last_error_time > last_dump_time").unwrap(),
        "true"
    );
    let mark = cluster.log_end();
    cluster.wait_for_log(mark, "could not open file");
    assert_eq!(shown(&mut client, "last_dump_time"), before);
}

#[test]
fn the_last_error_is_kept_from_any_process_and_in_any_encoding() {
    let cluster = Cluster::build().checksums().start();
    for sql in [
        "CREATE EXTENSION pg_prewarm",
        "CREATE DATABASE \"größe\" ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0",
        "CREATE DATABASE bytes ENCODING 'SQL_ASCII' LOCALE 'C' TEMPLATE template0",
        "CREATE TABLE t AS SELECT g FROM generate_series(1, 1000) g",
    ] {
        cluster.sql(sql);
    }
    let table = cluster.file_of("postgres", "t");
    let path: String = cluster.value("SELECT pg_relation_filepath('t')");
    cluster.stop(Shutdown::Fast);
    let mut data = fs::read(cluster.data(&path)).unwrap();
    data[2 * 8192 + 100..2 * 8192 + 200].fill(0xff);
    fs::write(cluster.data(&path), data).unwrap();
    cluster.write_list(list_of(table.first(4)));
    cluster.start();
    let mut client = cluster.connect("postgres");
    let stats = LoadStats::wait_for_end(&mut client);
    assert_eq!(
        (stats.result(), stats.total, stats.skipped),
        ("completed", 4, 1)
    );
    assert_eq!(shown(&mut client, "skipped_unreadable").unwrap(), "1");
    let message = shown(&mut client, "last_error").unwrap();
    assert!(
        message.starts_with("invalid page in block 2 of relation"),
        "{message}"
    );
    assert_eq!(
        shown(
            &mut client,
            "last_error_time BETWEEN load_start_time AND load_end_time"
        )
        .unwrap(),
        "true"
    );
    for database in ["größe", "bytes"] {
        cluster.sql_in(database, "CREATE EXTENSION pg_prewarm");
        let mut client = cluster.connect(database);
        assert_eq!(shown(&mut client, "last_error").unwrap(), message);
        assert_eq!(shown(&mut client, "state").unwrap(), "idle");
        client
            .batch_execute("SELECT * FROM pg_stat_progress_prewarm")
            .unwrap();
    }

    // A worker's database makes no difference either.
    let table = cluster.table_of_blocks("größe", "t", 100);
    cluster.stop(Shutdown::Fast);
    cluster.write_list(list_of(table.first(100)));
    cluster.configure("pg_prewarm.autoprewarm_max_rate = 80");
    cluster.start();
    let mut client = cluster.connect("postgres");
    LoadStats::wait_for(&mut client, |stats| stats.loaded > 0);
    let row = client
        .query_one(
            "SELECT p.datname::text, a.query FROM pg_stat_progress_prewarm p \
             JOIN pg_stat_activity a USING (pid)",
            &[],
        )
        .unwrap();
    assert_eq!(row.get::<_, &str>(0), "größe");
    assert!(row.get::<_, &str>(1).starts_with("loading größe, "));
    set_rate(&cluster, 0);
    assert_eq!(LoadStats::wait_for_end(&mut client).loaded, 100);
}

#[test]
fn the_error_of_a_caller_is_not_the_leaders_last_error() {
    let cluster = Cluster::build().start();
    cluster.sql("CREATE EXTENSION pg_prewarm");
    let mut client = cluster.connect("postgres");
    client.batch_execute("SELECT autoprewarm_wait()").unwrap();
    fs::create_dir(cluster.data(&format!("{LIST}.tmp"))).unwrap();
    for (call, sqlstate) in [
        ("SELECT autoprewarm_wait('-1 s')", "22023"),
        ("SELECT autoprewarm_start_worker()", "55000"),
        ("SELECT autoprewarm_dump_now()", "42809"),
    ] {
        assert_eq!(error(&mut client, call).sqlstate, sqlstate, "{call}");
    }
    assert_eq!(shown(&mut client, "last_error"), None);
    assert_eq!(shown(&mut client, "last_dump_time"), None);
}
