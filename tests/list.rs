//! `autoprewarm_blocks()`, which shows the list.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{BufWriter, Write};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use postgres::{Client, NoTls};

use crate::bad_files::Unreadable;
use crate::common::{
    Block, Builder, Cluster, Fault, Installation, LIST, Shutdown, SqlError, error, give_to_server,
    list_of, value,
};

const ALL: &str = "SELECT * FROM autoprewarm_blocks()";

/// A row: its block, its fork (which can be null), and its usage count.
type Row = (Block, Option<i16>, i16);

/// A server that does not replace the list by itself.
fn start(builder: Builder) -> Cluster {
    let cluster = builder.start();
    cluster.sql("CREATE EXTENSION pg_prewarm");
    cluster
}

fn rows(client: &mut Client) -> Vec<Row> {
    client
        .query(ALL, &[])
        .unwrap()
        .iter()
        .map(|row| {
            let fork: Option<i16> = row.get("fork");
            let block = Block {
                database: row.get("database"),
                tablespace: row.get("tablespace"),
                filenumber: row.get("filenumber"),
                fork: fork.unwrap_or_default() as u32,
                block: row.get::<_, i64>("block").try_into().unwrap(),
            };
            (block, fork, row.get("usagecount"))
        })
        .collect()
}

/// The blocks of the rows, which must all have that usage count.
fn blocks_of_usage_count(rows: Vec<Row>, usage_count: i16) -> BTreeSet<Block> {
    assert!(rows.iter().all(|row| row.2 == usage_count), "{rows:?}");
    rows.into_iter().map(|(block, ..)| block).collect()
}

/// Block `number` of a file that does not exist.
fn block(number: u32) -> Block {
    Block {
        database: 5,
        tablespace: 1663,
        filenumber: 16384,
        fork: 0,
        block: number,
    }
}

/// Writes a list of so many blocks without a trailer, as contrib's module does.
fn write_long_list(cluster: &Cluster, blocks: u32) {
    let path = cluster.data(LIST);
    let mut file = BufWriter::new(File::create(&path).unwrap());
    writeln!(file, "<<{blocks}>>").unwrap();
    for number in 0..blocks {
        writeln!(file, "{}", block(number).record()).unwrap();
    }
    file.flush().unwrap();
    give_to_server(&path);
}

fn pid(client: &mut Client) -> i32 {
    value(client, "SELECT pg_backend_pid()")
}

/// How often a process has the list open, including replaced ones.
fn times_open(pid: i32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .filter_map(|entry| fs::read_link(entry.unwrap().path()).ok())
        .filter(|path| path.to_string_lossy().contains(LIST))
        .count()
}

/// The same for a backend after an error. The client receives the error before the
/// query's resources are released, and the result of the next query after that.
fn times_left_open(client: &mut Client) -> usize {
    times_open(pid(client))
}

/// The most memory that a process has had, in kB.
fn peak_memory(pid: i32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    line.unwrap()
        .split_whitespace()
        .nth(1)
        .unwrap()
        .parse()
        .unwrap()
}

#[test]
fn rows_are_the_blocks_that_were_cached_and_their_usage_counts() {
    let cluster = start(Cluster::build());
    cluster.create_tablespace("elsewhere");
    cluster.sql("CREATE TABLE u TABLESPACE elsewhere AS SELECT generate_series(1, 5000)");
    cluster.sql("VACUUM u");
    cluster.sql("CREATE DATABASE other");
    cluster.sql_in("other", "CREATE TABLE o AS SELECT generate_series(1, 5000)");
    let table = cluster.table("t", 50);
    for first in 0..4 {
        cluster.sql(&format!(
            "SELECT pg_prewarm('t', 'buffer', 'main', {first}, 49)"
        ));
    }
    let before = cluster.cached();
    let mut client = cluster.connect("postgres");
    let records = cluster.dump();
    let rows = rows(&mut client);
    let after = cluster.cached();

    assert_eq!(rows.len() as i64, records);
    assert!(rows.iter().all(|row| row.1.is_some()));
    let listed: BTreeSet<_> = rows.iter().map(|row| row.0).collect();
    assert_eq!(listed.len(), rows.len());
    assert!(before.is_subset(&listed) && listed.is_subset(&after));
    assert_eq!(listed, cluster.listed());
    assert!(listed.iter().any(|block| block.database == 0));
    assert!(listed.iter().any(|block| block.fork == 2));
    assert!(table.first(50).all(|block| listed.contains(&block)));
    let different: i64 = value(
        &mut client,
        "SELECT count(*) FROM pg_buffercache b JOIN autoprewarm_blocks() l \
         ON (reldatabase, reltablespace, relfilenode, relforknumber, relblocknumber) \
          = (database, tablespace, filenumber, fork, block) \
         WHERE relfilenode = pg_relation_filenode('t') AND b.usagecount <> l.usagecount",
    );
    assert_eq!(different, 0);
    let usage_counts: BTreeSet<_> = rows.iter().map(|row| row.2).collect();
    assert!(usage_counts.len() > 2, "{usage_counts:?}");
}

#[test]
fn a_list_that_contrib_wrote_has_no_usage_counts() {
    let Some(contrib) = Installation::contrib() else {
        println!("no installation with contrib's module: nothing compared");
        return;
    };
    let mut cluster = Cluster::build()
        .not_preloaded()
        .installation(contrib)
        .start();
    cluster.table("t", 50);
    cluster.sql("CREATE EXTENSION pg_prewarm");
    cluster.dump();
    cluster.stop(Shutdown::Fast);
    cluster.switch_to(Installation::ours());
    cluster.start();
    cluster.sql("ALTER EXTENSION pg_prewarm UPDATE");
    let rows = rows(&mut cluster.connect("postgres"));
    assert_eq!(blocks_of_usage_count(rows, 1), cluster.listed());
}

#[test]
fn an_edited_list_loses_its_usage_counts_and_a_bad_line_is_left_out() {
    let cluster = start(Cluster::build().not_preloaded());
    let notices = Arc::new(Mutex::new(Vec::new()));
    let mut config = cluster.config();
    config.notice_callback({
        let notices = Arc::clone(&notices);
        move |notice| notices.lock().unwrap().push(notice)
    });
    let mut client = config.connect(NoTls).unwrap();

    client
        .batch_execute("SELECT autoprewarm_dump_now()")
        .unwrap();
    let list = cluster.list();
    let (header, _) = list.split_once('\n').unwrap();
    let mut expected = cluster.listed();
    assert!(rows(&mut client).iter().any(|row| row.2 > 1));
    let edited = list.replace(header, &format!("{header}\n{}", block(77).record()));
    cluster.write_list(edited.replace(header, &format!("<<{}>>", expected.len() + 1)));
    expected.insert(block(77));
    assert_eq!(blocks_of_usage_count(rows(&mut client), 1), expected);
    assert!(notices.lock().unwrap().is_empty());

    let [one, two] = [block(1), block(2)].map(|block| block.record());
    for (text, expected, bad_line) in [
        ("<<0>>\n".to_owned(), &[][..], None),
        (String::new(), &[], Some(1)),
        (
            "<<3>>\r\n1,x\r\n".to_owned() + &one + "\r\n" + &two,
            &[1, 2],
            Some(2),
        ),
        (
            format!("<<9>>\n{one}\nworse\n{two}\nbad\n"),
            &[1, 2],
            Some(3),
        ),
        (format!("<<99999999999>>\n{one}\n"), &[1], Some(3)),
        (format!("{one}\n{two}\n"), &[1, 2], Some(1)),
        (format!("<<1>>\n{one}\n{two}\n"), &[1], None),
    ] {
        cluster.write_list(&text);
        let numbers = expected.iter().map(|&number| block(number)).collect();
        assert_eq!(
            blocks_of_usage_count(rows(&mut client), 1),
            numbers,
            "{text}"
        );
        let notices: Vec<_> = notices.lock().unwrap().drain(..).collect();
        let said: Vec<_> = notices.iter().map(|notice| notice.message()).collect();
        let warning =
            bad_line.map(|line| format!("autoprewarm block dump file is corrupted at line {line}"));
        assert_eq!(said, Vec::from_iter(warning), "{text}");
        for notice in notices {
            assert_eq!(
                (notice.severity(), notice.code().code()),
                ("WARNING", "XX001")
            );
        }
    }
}

#[test]
fn numbers_are_returned_unchanged_and_a_fork_number_that_is_too_large_is_null() {
    let cluster = start(Cluster::build().not_preloaded());
    let most = Block {
        database: u32::MAX,
        tablespace: u32::MAX,
        filenumber: u32::MAX,
        fork: 0,
        block: u32::MAX,
    };
    let forks = [0, 3, 99, 32767, 32768, u32::MAX];
    cluster.write_list(list_of(forks.map(|fork| Block { fork, ..most })));
    let rows = rows(&mut cluster.connect("postgres"));
    let read: Vec<_> = rows.iter().map(|row| row.1).collect();
    assert_eq!(read, [Some(0), Some(3), Some(99), Some(32767), None, None]);
    assert!(rows.iter().all(|row| row.0
        == Block {
            fork: row.0.fork,
            ..most
        }));
}

#[test]
fn a_list_that_is_missing_or_cannot_be_read_is_a_clear_error() {
    let cluster = start(Cluster::build().not_preloaded());
    let mut client = cluster.connect("postgres");
    let could_not_open = |sqlstate, reason| {
        SqlError::new(
            sqlstate,
            format!("could not open file \"{LIST}\": {reason}"),
        )
    };
    assert_eq!(
        error(&mut client, ALL),
        could_not_open("58P01", "No such file or directory").hint(
            "Use autoprewarm_dump_now() to write the file. The autoprewarm leader also writes it, \
             periodically and at shutdown."
        )
    );
    let path = cluster.data(LIST);
    for (unreadable, sqlstate) in [
        (Unreadable::NoPermission, "42501"),
        (Unreadable::Directory, "42809"),
        (Unreadable::Pipe, "XX000"),
        (Unreadable::LinkToItself, "XX000"),
    ] {
        unreadable.put(&cluster, &path);
        let expected = could_not_open(sqlstate, unreadable.reason());
        assert_eq!(error(&mut client, ALL), expected, "{unreadable:?}");
        unreadable.remove(&path);
    }
    assert_eq!(times_left_open(&mut client), 0);
    assert!(value::<i64>(&mut client, "SELECT autoprewarm_dump_now()") > 0);
    assert!(!rows(&mut client).is_empty());
}

#[test]
fn only_roles_that_may_monitor_the_server_may_read_the_list() {
    let cluster = start(Cluster::build().not_preloaded());
    cluster.sql(
        "CREATE ROLE plain LOGIN; CREATE ROLE monitor LOGIN IN ROLE pg_monitor; \
         SELECT autoprewarm_dump_now()",
    );
    assert!(!rows(&mut cluster.connect("postgres")).is_empty());
    assert!(!rows(&mut cluster.connect_as("monitor", "postgres")).is_empty());
    let mut plain = cluster.connect_as("plain", "postgres");
    assert_eq!(
        error(&mut plain, ALL),
        SqlError::new("42501", "permission denied for function autoprewarm_blocks")
    );
    cluster.sql("GRANT EXECUTE ON FUNCTION autoprewarm_blocks TO plain");
    assert!(!rows(&mut plain).is_empty());
}

#[test]
fn a_list_of_any_length_takes_little_memory_and_leaves_no_file_open() {
    const BLOCKS: u32 = 3_000_000;
    // Eight bytes for each record would be six times as much.
    const FEW_MB: u64 = 4 * 1024;
    let cluster = start(Cluster::build().not_preloaded());
    let mut client = cluster.connect("postgres");
    client
        .batch_execute("SET work_mem = '64kB'; SELECT autoprewarm_dump_now()")
        .unwrap();
    let pid = pid(&mut client);
    let queries = [
        "SELECT count(*), sum((b).block)::int8 FROM (SELECT autoprewarm_blocks() AS b) s",
        "SELECT count(*), sum((b).block)::int8 FROM (SELECT autoprewarm_blocks() AS b LIMIT 10) s",
        "SELECT count(*), sum(block)::int8 FROM (SELECT * FROM autoprewarm_blocks() LIMIT 10) s",
    ];
    // What any query takes.
    for query in queries {
        client.query_one(query, &[]).unwrap();
    }
    let before = peak_memory(pid);
    write_long_list(&cluster, BLOCKS);
    let sum = i64::from(BLOCKS - 1) * i64::from(BLOCKS) / 2;
    for (query, expected) in queries
        .into_iter()
        .zip([(i64::from(BLOCKS), sum), (10, 45), (10, 45)])
    {
        let row = client.query_one(query, &[]).unwrap();
        assert_eq!((row.get(0), row.get(1)), expected, "{query}");
        assert_eq!(times_open(pid), 0, "{query}");
        // Linux estimates the memory of a process, so its peak may seem to shrink.
        let grown = peak_memory(pid).saturating_sub(before);
        assert!(grown < FEW_MB, "{grown} kB: {query}");
    }
}

#[test]
fn more_queries_at_once_than_files_can_be_open_are_an_error() {
    let cluster = start(
        Cluster::build()
            .not_preloaded()
            .setting("max_files_per_process = 64"),
    );
    let mut client = cluster.connect("postgres");
    client
        .batch_execute("SELECT autoprewarm_dump_now()")
        .unwrap();
    let many = format!("SELECT {}", ["autoprewarm_blocks()"; 100].join(", "));
    for _ in 0..3 {
        let refused = error(&mut client, &many);
        assert_eq!(refused.sqlstate, "53000", "{refused:?}");
        let message = format!("could not open file \"{LIST}\"");
        assert!(refused.message.starts_with(&message), "{refused:?}");
        assert_eq!(times_left_open(&mut client), 0);
        // Now some more files can be opened.
        let few = "SELECT count(*) FROM (SELECT autoprewarm_blocks(), autoprewarm_blocks()) s";
        assert!(value::<i64>(&mut client, few) > 0);
        assert!(value::<i64>(&mut client, "SELECT count(*) FROM autoprewarm_blocks()") > 0);
    }
}

#[test]
fn a_query_continues_with_the_list_that_it_has_opened() {
    // More than are read at a time.
    const BLOCKS: u32 = 50_000;
    let cluster = start(Cluster::build().not_preloaded());
    write_long_list(&cluster, BLOCKS);
    let mut client = cluster.connect("postgres");
    let pid = pid(&mut client);
    let mut transaction = client.transaction().unwrap();
    transaction
        .batch_execute(
            "DECLARE a CURSOR FOR SELECT (b).block FROM (SELECT autoprewarm_blocks() AS b) s; \
             DECLARE b CURSOR FOR SELECT (b).block FROM (SELECT autoprewarm_blocks() AS b) s",
        )
        .unwrap();
    let mut fetch = |what: &str| -> Vec<i64> {
        let rows = transaction.query(&format!("FETCH {what}"), &[]).unwrap();
        rows.iter().map(|row| row.get(0)).collect()
    };
    assert_eq!(fetch("3 FROM a"), [0, 1, 2]);
    assert_eq!(fetch("2 FROM b"), [0, 1]);
    assert_eq!(times_open(pid), 2);
    let dumped: i64 = cluster.dump();
    assert_eq!(
        cluster.value::<i64>("SELECT count(*) FROM autoprewarm_blocks()"),
        dumped
    );
    let rest: Vec<_> = (3..i64::from(BLOCKS)).collect();
    assert!(fetch("ALL FROM a") == rest);
    assert_eq!(fetch("1 FROM b"), [2]);
    assert_eq!(times_open(pid), 1);
    transaction.rollback().unwrap();
    assert_eq!(times_open(pid), 0);
    assert_eq!(rows(&mut client).len() as i64, dumped);
}

#[test]
fn a_query_can_be_cancelled_at_any_time() {
    let cluster = start(Cluster::build().not_preloaded());
    let mut client = cluster.connect("postgres");
    let pid = pid(&mut client);
    let timeout = SqlError::new("57014", "canceling statement due to statement timeout");

    // While it returns rows.
    write_long_list(&cluster, 1_000_000);
    client
        .batch_execute("BEGIN; DECLARE c CURSOR FOR SELECT autoprewarm_blocks(); FETCH FROM c")
        .unwrap();
    client
        .batch_execute("SET LOCAL statement_timeout = '20ms'")
        .unwrap();
    assert_eq!(error(&mut client, "MOVE ALL FROM c"), timeout);
    client.batch_execute("ROLLBACK").unwrap();
    assert_eq!(times_open(pid), 0);

    // Before the first row: it would take a minute to find that there is none.
    cluster.write_list("<<2>>\n");
    let file = OpenOptions::new().write(true).open(cluster.data(LIST));
    file.unwrap().set_len(1 << 33).unwrap();
    client
        .batch_execute("BEGIN; SET LOCAL statement_timeout = '100ms'")
        .unwrap();
    let start = Instant::now();
    assert_eq!(error(&mut client, ALL), timeout);
    assert!(start.elapsed() < Duration::from_secs(10));
    client.batch_execute("ROLLBACK").unwrap();
    assert_eq!(times_left_open(&mut client), 0);
}

#[test]
fn a_timeout_before_the_warning_of_a_bad_line_leaves_no_file_open() {
    let cluster = Cluster::build().not_preloaded().create();
    cluster.set_fault(Fault::ListEnd, 0);
    cluster.start();
    cluster.sql("CREATE EXTENSION pg_prewarm");
    cluster.write_list("<<2>>\nbad\n1,2,3,0,5\n");
    let mut client = cluster.connect("postgres");
    assert_eq!(rows(&mut client).len(), 1);
    // The warning comes once, when the whole list has been read.
    cluster.set_fault(Fault::ListEnd, 600);
    client
        .batch_execute("BEGIN; SET LOCAL statement_timeout = '200ms'")
        .unwrap();
    assert_eq!(
        error(&mut client, ALL),
        SqlError::new("57014", "canceling statement due to statement timeout")
    );
    client.batch_execute("ROLLBACK").unwrap();
    assert_eq!(times_left_open(&mut client), 0);
    cluster.set_fault(Fault::ListEnd, 0);
    assert_eq!(rows(&mut client).len(), 1);
}
