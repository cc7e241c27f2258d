//! The SQL functions that contrib's module has as well: arguments, errors and effects
//! of `pg_prewarm()`, privileges, and autoprewarm's two functions, with and without
//! preloading the library.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::FileExt;
use std::thread;

use postgres::Client;

use crate::common::{
    Block, Cluster, LIST, Paused, Shutdown, SqlError, cached_pages, drop_pages, error,
    give_to_server, value, wait_until,
};

/// The blocks of table `t`: three chunks of 32, and a part of one.
const BLOCKS: u32 = 100;

/// A server in which only the test reads blocks into shared buffers. The first call
/// loads the library.
fn lazy_cluster() -> Cluster {
    let cluster = Cluster::build().not_preloaded().start();
    cluster.sql("CREATE EXTENSION pg_prewarm");
    cluster
}

/// Table `t` with index `t_id`.
fn make_table(cluster: &Cluster) {
    cluster.sql(
        "CREATE TABLE t (id int, filler text); \
         INSERT INTO t SELECT g, repeat('x', 500) FROM generate_series(1, 1500) g; \
         CREATE INDEX t_id ON t (id)",
    );
    cluster.sql("VACUUM t");
    let blocks: i64 = cluster.value("SELECT pg_relation_size('t') / 8192");
    assert_eq!(blocks, i64::from(BLOCKS));
}

/// Calls `pg_prewarm()` with these arguments.
fn prewarm(client: &mut Client, arguments: &str) -> Result<i64, SqlError> {
    let row = client.query_one(&format!("SELECT pg_prewarm({arguments})"), &[])?;
    Ok(row.get(0))
}

/// Calls it with the arguments of each case, and compares the results.
fn check(client: &mut Client, cases: impl IntoIterator<Item = (String, Result<i64, SqlError>)>) {
    for (arguments, expected) in cases {
        assert_eq!(prewarm(client, &arguments), expected, "{arguments}");
    }
}

fn invalid(message: &str) -> SqlError {
    SqlError::new("22023", message)
}

fn invalid_mode() -> SqlError {
    invalid("invalid prewarm type")
        .hint("Valid prewarm types are \"prefetch\", \"read\", and \"buffer\".")
}

fn invalid_fork() -> SqlError {
    invalid("invalid fork name")
        .hint("Valid fork names are \"main\", \"fsm\", \"vm\", and \"init\".")
}

fn out_of_range(which: &str, last: i64) -> SqlError {
    invalid(&format!(
        "{which} block number must be between 0 and {last}"
    ))
}

fn denied(object: &str) -> SqlError {
    SqlError::new("42501", format!("permission denied for {object}"))
}

fn without_storage(relation: &str, kinds: &str) -> SqlError {
    SqlError::new(
        "42809",
        format!("relation \"{relation}\" does not have storage"),
    )
    .detail(&format!("This operation is not supported for {kinds}."))
}

#[test]
fn a_bad_argument_is_an_error_and_the_first_of_two_is_reported() {
    let cluster = lazy_cluster();
    make_table(&cluster);
    cluster.sql(
        "CREATE ROLE plain LOGIN; CREATE VIEW v AS SELECT 1 AS a; \
         CREATE TABLE parted (id int) PARTITION BY RANGE (id); \
         CREATE TABLE mine AS SELECT 1 AS a; ALTER TABLE mine OWNER TO plain",
    );
    const GONE: &str = "4000000000::oid::regclass";
    let null_relation = || invalid("relation cannot be null");
    let null_mode = || invalid("prewarm type cannot be null");
    let null_fork = || invalid("relation fork cannot be null");
    let gone = || SqlError::new("XX000", "could not open relation with OID 4000000000");
    let no_fork = |name| invalid(&format!("fork \"{name}\" does not exist for this relation"));
    let first = |last| out_of_range("starting", last);
    let last = |last| out_of_range("ending", last);
    let refused = |(arguments, error): (&str, SqlError)| (arguments.to_owned(), Err(error));

    // Each check alone.
    let mut superuser = cluster.connect("postgres");
    check(
        &mut superuser,
        [
            ("NULL", null_relation()),
            ("'t', NULL", null_mode()),
            ("'t', ''", invalid_mode()),
            ("'t', 'BUFFER'", invalid_mode()),
            ("'t', 'buffer '", invalid_mode()),
            ("'t', 'buffe'", invalid_mode()),
            ("'t', 'buffers'", invalid_mode()),
            ("'t', repeat('buffer', 100000)", invalid_mode()),
            ("'t', 'buffer', NULL", null_fork()),
            ("'t', 'buffer', ''", invalid_fork()),
            ("'t', 'buffer', 'Main'", invalid_fork()),
            ("'t', 'buffer', 'mainly'", invalid_fork()),
            (GONE, gone()),
            (
                "0",
                SqlError::new("XX000", "could not open relation with OID 0"),
            ),
            ("'v'", without_storage("v", "views")),
            ("'parted'", without_storage("parted", "partitioned tables")),
            ("'t', 'buffer', 'init'", no_fork("init")),
            ("'mine', 'buffer', 'vm'", no_fork("vm")),
            ("'t', 'buffer', 'main', 100", first(99)),
            ("'t', 'buffer', 'main', -1", first(99)),
            ("'t', 'buffer', 'main', 4294967296", first(99)),
            ("'t', 'buffer', 'main', 9223372036854775807", first(99)),
            ("'t', 'buffer', 'main', -9223372036854775808", first(99)),
            ("'t', 'buffer', 'main', NULL, 100", last(99)),
            ("'t', 'buffer', 'main', NULL, -1", last(99)),
            ("'t', 'buffer', 'main', NULL, 4294967296", last(99)),
            ("'t', 'buffer', 'main', NULL, 9223372036854775807", last(99)),
            ("'t', 'buffer', 'main', 99, 100", last(99)),
            ("'t', 'buffer', 'vm', 1", first(0)),
        ]
        .map(refused),
    );

    // Each check together with the next one that the same call can fail.
    check(
        &mut superuser,
        [
            ("NULL, NULL", null_relation()),
            ("NULL, 'x'", null_relation()),
            ("'t', NULL, NULL", null_mode()),
            ("'t', 'x', NULL", invalid_mode()),
            ("'t', 'x', 'x'", invalid_mode()),
            (&format!("{GONE}, 'x'"), invalid_mode()),
            (&format!("{GONE}, 'buffer', NULL"), null_fork()),
            (&format!("{GONE}, 'buffer', 'x'"), invalid_fork()),
            (&format!("{GONE}, 'buffer', 'main', -1"), gone()),
            ("'v', 'buffer', 'init'", without_storage("v", "views")),
            ("'t', 'buffer', 'init', -1", no_fork("init")),
            ("'t', 'buffer', 'main', 100, -1", first(99)),
            ("'t', 'buffer', 'main', -1, 5", first(99)),
        ]
        .map(refused),
    );
    let mut plain = cluster.connect_as("plain", "postgres");
    check(
        &mut plain,
        [
            ("'t', 'buffer', 'x'", invalid_fork()),
            ("'v'", denied("view v")),
            ("'t', 'buffer', 'init'", denied("table t")),
            ("'t', 'buffer', 'main', -1", denied("table t")),
        ]
        .map(refused),
    );

    // The session goes on after each error.
    assert_eq!(prewarm(&mut superuser, "'t'"), Ok(100));
}

#[test]
fn an_index_without_a_table_is_an_error_before_privileges_are_checked() {
    let cluster = lazy_cluster();
    cluster.sql("CREATE ROLE plain");
    // The server keeps this index open, so it can be opened although no row of
    // `pg_index` names its table.
    let call = "SELECT pg_prewarm('pg_catalog.pg_trigger_tgrelid_tgname_index')";
    let mut client = cluster.connect("postgres");
    assert!(value::<i64>(&mut client, call) > 0);
    client
        .batch_execute(
            "SET allow_system_table_mods = on; BEGIN; \
             DELETE FROM pg_index \
             WHERE indexrelid = 'pg_catalog.pg_trigger_tgrelid_tgname_index'::regclass; \
             SET LOCAL ROLE plain",
        )
        .unwrap();
    assert_eq!(
        error(&mut client, call),
        SqlError::new(
            "42P01",
            "could not find parent table of index \"pg_trigger_tgrelid_tgname_index\""
        )
    );
    client.batch_execute("ROLLBACK").unwrap();
    assert!(value::<i64>(&mut client, call) > 0);
}

#[test]
fn a_role_needs_select_on_the_table_for_the_table_and_its_indexes() {
    let cluster = lazy_cluster();
    cluster.sql(
        "CREATE ROLE owner LOGIN; CREATE ROLE plain LOGIN; CREATE ROLE writer LOGIN; \
         GRANT CREATE ON SCHEMA public TO owner; \
         CREATE FOREIGN DATA WRAPPER wrapper; CREATE SERVER server FOREIGN DATA WRAPPER wrapper; \
         GRANT USAGE ON FOREIGN SERVER server TO owner; \
         SET ROLE owner; \
         CREATE TABLE t (id int PRIMARY KEY, filler text); \
         ALTER TABLE t ALTER filler SET STORAGE EXTERNAL; \
         INSERT INTO t VALUES (1, repeat('x', 7000)); \
         CREATE TABLE parted (id int) PARTITION BY RANGE (id); \
         CREATE INDEX parted_id ON parted (id); \
         CREATE TABLE part PARTITION OF parted FOR VALUES FROM (0) TO (9); \
         INSERT INTO part VALUES (1); \
         CREATE VIEW v AS SELECT 1 AS a; \
         CREATE MATERIALIZED VIEW m AS SELECT 1 AS a; \
         CREATE SEQUENCE s; \
         CREATE TYPE c AS (a int); \
         CREATE FOREIGN TABLE f (a int) SERVER server",
    );
    let toast: i64 = cluster.value("SELECT reltoastrelid::int8 FROM pg_class WHERE relname = 't'");
    let toast_index: i64 = cluster.value(&format!(
        "SELECT indexrelid::int8 FROM pg_index WHERE indrelid = {toast}"
    ));
    let toast_name: String = cluster.value(&format!(
        "SELECT relname::text FROM pg_class WHERE oid = {toast}"
    ));
    let quoted = |name: &str| format!("'{name}'");

    // Each with its kind, as the server words it, and what a role with privileges gets.
    let relations = [
        (quoted("t"), "table t", Ok(1)),
        (quoted("t_pkey"), "index t_pkey", Ok(2)),
        (quoted("part"), "table part", Ok(1)),
        (quoted("part_id_idx"), "index part_id_idx", Ok(2)),
        (
            quoted("parted"),
            "table parted",
            Err(without_storage("parted", "partitioned tables")),
        ),
        (
            quoted("parted_id"),
            "index parted_id",
            Err(without_storage("parted_id", "partitioned indexes")),
        ),
        (quoted("v"), "view v", Err(without_storage("v", "views"))),
        (quoted("m"), "materialized view m", Ok(1)),
        (quoted("s"), "sequence s", Ok(1)),
        (
            quoted("f"),
            "foreign table f",
            Err(without_storage("f", "foreign tables")),
        ),
    ];
    // SELECT cannot be granted on these; only their owner has it.
    let table_toast = format!("table {toast_name}");
    let index_toast = format!("index {toast_name}_index");
    let owners_only = [
        (
            quoted("c"),
            "table c",
            Err(without_storage("c", "composite types")),
        ),
        (toast.to_string(), table_toast.as_str(), Ok(1)),
        (toast_index.to_string(), index_toast.as_str(), Ok(2)),
    ];
    let all = || relations.iter().chain(&owners_only).cloned();
    let granted = |(arguments, _, result)| (arguments, result);
    let refused = |(arguments, object, _): (String, &str, _)| (arguments, Err(denied(object)));

    for user in ["postgres", "owner"] {
        check(
            &mut cluster.connect_as(user, "postgres"),
            all().map(granted),
        );
    }
    let mut plain = cluster.connect_as("plain", "postgres");
    check(&mut plain, all().map(refused));

    // Neither other privileges nor SELECT on a column are enough.
    cluster.sql(
        "GRANT INSERT, UPDATE, DELETE, TRUNCATE, REFERENCES, TRIGGER \
         ON ALL TABLES IN SCHEMA public TO writer; \
         GRANT USAGE ON SEQUENCE s TO writer; GRANT SELECT (id) ON t TO writer",
    );
    check(
        &mut cluster.connect_as("writer", "postgres"),
        all().map(refused),
    );

    cluster.sql(
        "GRANT SELECT ON ALL TABLES IN SCHEMA public TO plain; \
         GRANT SELECT ON SEQUENCE s TO plain",
    );
    check(&mut plain, relations.iter().cloned().map(granted));
    check(&mut plain, owners_only.iter().cloned().map(refused));
}

/// The blocks of a fork that are in shared buffers.
fn cached(cluster: &Cluster, relation: Block, fork: u32) -> BTreeSet<u32> {
    let blocks = cluster.cached();
    blocks
        .iter()
        .filter(|block| block.same_relation(&relation) && block.fork == fork)
        .map(|block| block.block)
        .collect()
}

#[test]
fn buffer_caches_exactly_the_requested_blocks_and_read_and_prefetch_cache_none() {
    let cluster = lazy_cluster();
    make_table(&cluster);
    cluster.sql("CREATE UNLOGGED TABLE u (id int PRIMARY KEY)");
    cluster.restart();
    let table = cluster.file_of("postgres", "t");
    let mut client = cluster.connect("postgres");
    for mode in ["prefetch", "read"] {
        for (fork, blocks) in [("main", 100), ("fsm", 3), ("vm", 1)] {
            let arguments = format!("'t', '{mode}', '{fork}'");
            assert_eq!(prewarm(&mut client, &arguments), Ok(blocks), "{arguments}");
        }
        assert_eq!(
            prewarm(&mut client, &format!("'u_pkey', '{mode}', 'init'")),
            Ok(1)
        );
    }
    for fork in 0..3 {
        assert_eq!(cached(&cluster, table, fork), BTreeSet::new(), "{fork}");
    }

    let mut expected = BTreeSet::new();
    for (bounds, blocks) in [
        ("7, 7", 7..8),
        ("8, 7", 0..0),
        ("99, 0", 0..0),
        ("NULL, 2", 0..3),
        ("97, NULL", 97..100),
        ("40, 49", 40..50),
        ("0, 0", 0..1),
        ("99, 99", 99..100),
        ("0, 99", 0..100),
        ("NULL, NULL", 0..100),
    ] {
        assert_eq!(
            prewarm(&mut client, &format!("'t', 'buffer', 'main', {bounds}")),
            Ok(blocks.len() as i64),
            "{bounds}"
        );
        expected.extend(blocks);
        assert_eq!(cached(&cluster, table, 0), expected, "{bounds}");
    }

    for (number, fork, blocks) in [(1, "fsm", 3), (2, "vm", 1)] {
        assert_eq!(cached(&cluster, table, number), BTreeSet::new(), "{fork}");
        assert_eq!(
            prewarm(&mut client, &format!("'t', 'buffer', '{fork}'")),
            Ok(blocks.into())
        );
        assert_eq!(cached(&cluster, table, number), (0..blocks).collect());
    }
    let index = cluster.file_of("postgres", "u_pkey");
    assert_eq!(cached(&cluster, index, 3), BTreeSet::new());
    assert_eq!(prewarm(&mut client, "'u_pkey', 'buffer', 'init'"), Ok(1));
    assert_eq!(cached(&cluster, index, 3), [0].into());

    // The default is the main fork, and shared buffers.
    let index = cluster.file_of("postgres", "t_id");
    assert_eq!(cached(&cluster, index, 0), BTreeSet::new());
    let blocks: i64 = cluster.value("SELECT pg_relation_size('t_id') / 8192");
    assert_eq!(prewarm(&mut client, "'t_id'"), Ok(blocks));
    assert_eq!(
        cached(&cluster, index, 0),
        (0..u32::try_from(blocks).unwrap()).collect()
    );
    assert_eq!(prewarm(&mut client, "'t', last_block => 4"), Ok(5));
}

/// How many bytes a process has read from files.
fn bytes_read(pid: i32) -> i64 {
    let counters = fs::read_to_string(format!("/proc/{pid}/io")).unwrap();
    let line = counters
        .lines()
        .find_map(|line| line.strip_prefix("rchar: "));
    line.unwrap().parse().unwrap()
}

#[test]
fn read_reads_every_block_of_the_range_and_prefetch_reads_none() {
    let cluster = lazy_cluster();
    make_table(&cluster);
    cluster.restart();
    let mut client = cluster.connect("postgres");
    let pid: i32 = value(&mut client, "SELECT pg_backend_pid()");
    for (mode, bounds, blocks, read) in [
        ("read", "0, 99", 100, 100),
        ("read", "3, 98", 96, 96),
        ("read", "0, 31", 32, 32),
        ("read", "31, 32", 2, 2),
        ("read", "64, 64", 1, 1),
        ("prefetch", "0, 99", 100, 0),
    ] {
        let arguments = format!("'t', '{mode}', 'main', {bounds}");
        // The first call reads catalogs as well.
        prewarm(&mut client, &arguments).unwrap();
        let before = bytes_read(pid);
        assert_eq!(prewarm(&mut client, &arguments), Ok(blocks));
        let pages = (bytes_read(pid) - before) / 8192;
        assert_eq!(pages, read, "{arguments}");
    }
}

#[test]
fn prefetch_makes_the_system_read_what_it_has_not_cached() {
    let cluster = lazy_cluster();
    cluster.sql(
        "CREATE TABLE t (filler text); ALTER TABLE t ALTER filler SET STORAGE PLAIN; \
         INSERT INTO t SELECT repeat('x', 7000) FROM generate_series(1, 1000)",
    );
    cluster.restart();
    let path: String = cluster.value("SELECT pg_relation_filepath('t')");
    let file = fs::File::open(cluster.data(&path)).unwrap();
    file.sync_all().unwrap();
    let mut client = cluster.connect("postgres");
    // All of them, some, the last ones. A large page of which a part is dropped may
    // stay.
    for (first, blocks) in [(0, 1000), (120, 300), (872, 128)] {
        prewarm(&mut client, "'t', 'read'").unwrap();
        assert!(cached_pages(&file).into_iter().all(|cached| cached));
        drop_pages(&file, first, blocks);
        let are_cached = || cached_pages(&file).into_iter().all(|cached| cached);
        assert!(!are_cached(), "blocks from {first} on are cached still");
        assert_eq!(prewarm(&mut client, "'t', 'prefetch'"), Ok(1000));
        wait_until("all of the file is cached", are_cached);
    }
}

#[test]
fn an_empty_fork_has_no_blocks_and_no_valid_bounds() {
    let cluster = lazy_cluster();
    cluster.sql("CREATE TABLE t (id int); CREATE UNLOGGED TABLE u (id int)");
    let mut client = cluster.connect("postgres");
    for fork in ["'t', 'buffer', 'main'", "'u', 'read', 'init'"] {
        check(
            &mut client,
            [
                ("", Ok(0)),
                (", 0", Err(out_of_range("starting", -1))),
                (", NULL, 0", Err(out_of_range("ending", -1))),
            ]
            .map(|(bounds, expected)| (format!("{fork}{bounds}"), expected)),
        );
    }
}

#[test]
fn a_temporary_table_can_be_prewarmed_only_in_its_own_session() {
    let cluster = lazy_cluster();
    let mut client = cluster.connect("postgres");
    client
        .batch_execute(
            "CREATE TEMPORARY TABLE temp (filler text); \
             INSERT INTO temp SELECT repeat('x', 500) FROM generate_series(1, 1500); \
             CREATE TEMPORARY TABLE empty (id int)",
        )
        .unwrap();
    for mode in ["prefetch", "read", "buffer"] {
        assert_eq!(prewarm(&mut client, &format!("'temp', '{mode}'")), Ok(100));
        assert_eq!(prewarm(&mut client, &format!("'empty', '{mode}'")), Ok(0));
    }
    let oid: u32 = value(&mut client, "SELECT 'temp'::regclass::oid");
    let mut other = cluster.connect("postgres");
    for mode in ["prefetch", "buffer"] {
        assert_eq!(
            prewarm(&mut other, &format!("{oid}, '{mode}'")),
            Err(SqlError::new(
                "0A000",
                "cannot access temporary tables of other sessions"
            )),
            "{mode}"
        );
    }
}

#[test]
fn text_arguments_may_come_from_a_table() {
    let cluster = lazy_cluster();
    make_table(&cluster);
    // Short values have another header there than constants have. Long values are
    // compressed or stored in the TOAST table.
    cluster.sql(
        "CREATE TABLE arguments (mode text, fork text); \
         INSERT INTO arguments VALUES ('read', 'main'), ('buffer', 'vm'); \
         CREATE TABLE long (compressed text, elsewhere text); \
         ALTER TABLE long ALTER elsewhere SET STORAGE EXTERNAL; \
         INSERT INTO long VALUES (repeat('x', 10000), repeat('x', 10000))",
    );
    let mut client = cluster.connect("postgres");
    assert_eq!(
        value::<Vec<i64>>(
            &mut client,
            "SELECT array_agg(pg_prewarm('t', mode, fork) ORDER BY fork) FROM arguments"
        ),
        [100, 1]
    );
    for (arguments, expected) in [
        ("compressed", invalid_mode()),
        ("elsewhere", invalid_mode()),
        ("'read', compressed", invalid_fork()),
        ("'read', elsewhere", invalid_fork()),
    ] {
        let sql = format!("SELECT pg_prewarm('t', {arguments}) FROM long");
        assert_eq!(error(&mut client, &sql), expected, "{arguments}");
    }
}

/// Creates a database of that encoding with objects of that name, and returns a
/// connection.
fn database_of_encoding(cluster: &Cluster, encoding: &str, name: &str) -> Client {
    cluster.sql(&format!(
        "CREATE DATABASE {encoding} ENCODING '{encoding}' LOCALE 'C' TEMPLATE template0"
    ));
    cluster.sql_in(
        encoding,
        &format!(
            "CREATE EXTENSION pg_prewarm; CREATE TABLE \"{name}\" (id int); \
             CREATE VIEW \"{name}_v\" AS SELECT 1 AS a"
        ),
    );
    cluster.connect(encoding)
}

#[test]
fn arguments_need_not_be_utf_8() {
    let cluster = lazy_cluster();
    let mut client = database_of_encoding(&cluster, "latin1", "größe");
    check(
        &mut client,
        [
            ("'größe'", Ok(0)),
            ("'größe', 'büffer'", Err(invalid_mode())),
            ("'größe', 'read', 'mäin'", Err(invalid_fork())),
        ]
        .map(|(arguments, expected)| (arguments.to_owned(), expected)),
    );
}

#[test]
fn names_in_messages_need_not_be_utf_8() {
    let cluster = lazy_cluster();
    cluster.sql("CREATE ROLE plain");
    for (encoding, name) in [("latin1", "größe"), ("euc_jp", "磧")] {
        let mut client = database_of_encoding(&cluster, encoding, name);
        let view = format!("{name}_v");
        assert_eq!(
            prewarm(&mut client, &format!("'{view}'")),
            Err(without_storage(&view, "views"))
        );
        client.batch_execute("SET ROLE plain").unwrap();
        assert_eq!(
            prewarm(&mut client, &format!("'{name}'")),
            Err(denied(&format!("table {name}")))
        );
    }
}

/// Makes a table's file huge without using the disk: so many segment files of 1 GB,
/// which are sparse after the first block.
fn inflate(cluster: &Cluster, table: &str, segments: u32) {
    let path: String = cluster.value(&format!("SELECT pg_relation_filepath('{table}')"));
    for segment in 0..segments {
        let path = cluster.data(&match segment {
            0 => path.clone(),
            segment => format!("{path}.{segment}"),
        });
        let file = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .unwrap();
        file.set_len(1 << 30).unwrap();
        give_to_server(&path);
    }
}

#[test]
fn a_call_ends_within_the_relation_when_cancelled_and_the_session_goes_on() {
    let cluster = lazy_cluster();
    cluster.sql("CREATE TABLE big AS SELECT 1 AS a; CREATE SEQUENCE after");
    inflate(&cluster, "big", 32);
    let mut client = cluster.connect("postgres");
    // A vectored read must not cross the end of a segment file.
    let border = "'big', 'read', 'main', 131060, 131083";
    assert_eq!(prewarm(&mut client, border), Ok(24));

    // If the cancel were noticed only after the call, the sequence would have been
    // called as well.
    let call = |mode| format!("SELECT pg_prewarm('big', '{mode}'), nextval('after')");
    let not_called = |client: &mut Client| {
        assert!(!value::<bool>(client, "SELECT is_called FROM after"));
        assert_eq!(prewarm(client, border), Ok(24));
    };
    for mode in ["prefetch", "read", "buffer"] {
        client
            .batch_execute("SET statement_timeout = '200ms'")
            .unwrap();
        assert_eq!(
            error(&mut client, &call(mode)),
            SqlError::new("57014", "canceling statement due to statement timeout"),
            "{mode}"
        );
        client.batch_execute("RESET statement_timeout").unwrap();
        not_called(&mut client);
    }

    let pid: i32 = value(&mut client, "SELECT pg_backend_pid()");
    let mut other = cluster.connect("postgres");
    thread::scope(|scope| {
        let cancelled = scope.spawn(|| error(&mut client, &call("buffer")));
        wait_until("the call", || {
            value(
                &mut other,
                &format!("SELECT state = 'active' FROM pg_stat_activity WHERE pid = {pid}"),
            )
        });
        assert!(value::<bool>(
            &mut other,
            &format!("SELECT pg_cancel_backend({pid})")
        ));
        assert_eq!(
            cancelled.join().unwrap(),
            SqlError::new("57014", "canceling statement due to user request")
        );
    });
    not_called(&mut client);
}

#[test]
fn an_error_that_is_caught_leaks_nothing() {
    let cluster = lazy_cluster();
    make_table(&cluster);
    cluster.sql("CREATE VIEW v AS SELECT 1 AS a; CREATE ROLE plain");
    let mut client = cluster.connect("postgres");
    client
        .batch_execute(
            "BEGIN; SET LOCAL ROLE plain; \
             DO $$ DECLARE caught int := 0; relation regclass; \
             BEGIN \
                 FOREACH relation IN ARRAY ARRAY['t', 't_id', 'v']::regclass[] LOOP \
                     BEGIN PERFORM pg_prewarm(relation); \
                     EXCEPTION WHEN insufficient_privilege THEN caught := caught + 1; END; \
                 END LOOP; \
                 RESET ROLE; \
                 BEGIN PERFORM pg_prewarm('v'); \
                 EXCEPTION WHEN wrong_object_type THEN caught := caught + 1; END; \
                 BEGIN PERFORM pg_prewarm('t_id', 'read', 'main', 1000); \
                 EXCEPTION WHEN invalid_parameter_value THEN caught := caught + 1; END; \
                 ASSERT caught = 5, caught; \
             END $$",
        )
        .unwrap();
    let locks = "SELECT count(*) FROM pg_locks \
                 WHERE relation IN ('t'::regclass, 't_id'::regclass, 'v'::regclass)";
    assert_eq!(value::<i64>(&mut client, locks), 0);
    client.batch_execute("COMMIT").unwrap();
    // The server warns about a relation that was not closed.
    let log = cluster.log();
    assert!(!log.contains("WARNING"), "{log}");
}

#[test]
fn a_corrupt_page_is_an_error_only_if_it_is_read() {
    let cluster = lazy_cluster();
    make_table(&cluster);
    cluster.restart();
    let path: String = cluster.value("SELECT pg_relation_filepath('t')");
    let file = fs::OpenOptions::new()
        .write(true)
        .open(cluster.data(&path))
        .unwrap();
    file.write_all_at(&[0x55; 8192], 70 * 8192).unwrap();
    let mut client = cluster.connect("postgres");
    for mode in ["prefetch", "read"] {
        assert_eq!(prewarm(&mut client, &format!("'t', '{mode}'")), Ok(100));
    }
    let raised = prewarm(&mut client, "'t'").unwrap_err();
    assert_eq!(raised.sqlstate, "XX001", "{raised:?}");
    assert!(
        raised
            .message
            .starts_with("invalid page in block 70 of relation "),
        "{raised:?}"
    );
    assert_eq!(prewarm(&mut client, "'t', 'buffer', 'main', 71"), Ok(29));
}

#[test]
fn no_lock_is_left_after_a_call() {
    let cluster = lazy_cluster();
    make_table(&cluster);
    let mut client = cluster.connect("postgres");
    client.batch_execute("BEGIN").unwrap();
    for relation in ["t", "t_id"] {
        for mode in ["prefetch", "read", "buffer"] {
            prewarm(&mut client, &format!("'{relation}', '{mode}'")).unwrap();
        }
    }
    let locks = "SELECT count(*) FROM pg_locks \
                 WHERE relation IN ('t'::regclass, 't_id'::regclass)";
    assert_eq!(value::<i64>(&mut client, locks), 0);
}

#[test]
fn an_index_waits_for_its_table_first_and_may_be_dropped_meanwhile() {
    let cluster = lazy_cluster();
    make_table(&cluster);
    let mut owner = cluster.connect("postgres");
    let mut caller = cluster.connect("postgres");
    let pid: i32 = value(&mut caller, "SELECT pg_backend_pid()");
    let oid: u32 = value(&mut caller, "SELECT 't_id'::regclass::oid");

    owner
        .batch_execute("BEGIN; LOCK TABLE t IN ACCESS EXCLUSIVE MODE")
        .unwrap();
    caller.batch_execute("SET lock_timeout = '50ms'").unwrap();
    for relation in ["t", "t_id"] {
        assert_eq!(
            prewarm(&mut caller, &format!("'{relation}'")),
            Err(SqlError::new(
                "55P03",
                "canceling statement due to lock timeout"
            )),
            "{relation}"
        );
    }
    owner.batch_execute("COMMIT").unwrap();
    caller.batch_execute("RESET lock_timeout").unwrap();
    assert_eq!(prewarm(&mut caller, "'t', 'read'"), Ok(100));
    assert!(prewarm(&mut caller, "'t_id', 'read'").is_ok());

    owner.batch_execute("BEGIN; DROP INDEX t_id").unwrap();
    let arguments = format!("{oid}::regclass");
    thread::scope(|scope| {
        let call = scope.spawn(|| prewarm(&mut caller, &arguments));
        // It locks catalogs for a moment before.
        wait_until("the call's lock of the table, and of nothing else", || {
            let locks: Vec<String> = owner
                .query(
                    "SELECT relation::regclass::text || ' ' || mode || ' ' || granted \
                     FROM pg_locks WHERE pid = $1 AND locktype = 'relation' AND database <> 0",
                    &[&pid],
                )
                .unwrap()
                .iter()
                .map(|row| row.get(0))
                .collect();
            locks == ["t AccessShareLock false"]
        });
        owner.batch_execute("COMMIT").unwrap();
        assert_eq!(
            call.join().unwrap(),
            Err(SqlError::new(
                "XX000",
                format!("could not open relation with OID {oid}")
            ))
        );
    });
    assert_eq!(prewarm(&mut caller, "'t', 'read'"), Ok(100));
}

#[test]
fn the_catalog_describes_the_functions_as_contrib_does() {
    let cluster = lazy_cluster();
    let rows: Vec<String> = cluster.value(
        "SELECT array_agg(concat_ws(' | ', proname, pg_get_function_arguments(p.oid), \
                                    prorettype::regtype, lanname, prokind, provolatile, \
                                    proparallel, CASE WHEN proisstrict THEN 'strict' END, \
                                    CASE WHEN prosecdef OR proretset OR proleakproof THEN '!' END, \
                                    probin, prosrc) ORDER BY proname DESC) \
         FROM pg_proc p JOIN pg_language l ON l.oid = prolang \
         WHERE proname IN ('pg_prewarm', 'autoprewarm_start_worker', 'autoprewarm_dump_now')",
    );
    assert_eq!(
        rows,
        [
            "pg_prewarm | regclass, mode text DEFAULT 'buffer'::text, \
             fork text DEFAULT 'main'::text, first_block bigint DEFAULT NULL::bigint, \
             last_block bigint DEFAULT NULL::bigint | bigint | c | f | v | s \
             | $libdir/pg_prewarm | pg_prewarm",
            "autoprewarm_start_worker |  | void | c | f | v | u | strict \
             | $libdir/pg_prewarm | autoprewarm_start_worker",
            "autoprewarm_dump_now |  | bigint | c | f | v | u | strict \
             | $libdir/pg_prewarm | autoprewarm_dump_now",
        ]
    );
}

#[test]
fn new_functions_run_with_their_callers_privileges_and_not_in_parallel_workers() {
    let cluster = lazy_cluster();
    let rows: Vec<String> = cluster.value(
        "SELECT array_agg(concat_ws(' ', proname, provolatile, proparallel, \
                                    CASE WHEN proisstrict THEN 'strict' END, \
                                    CASE WHEN prosecdef OR proleakproof THEN '!' END) \
                          ORDER BY proname) \
         FROM pg_proc WHERE probin = '$libdir/pg_prewarm' \
           AND proname NOT IN ('pg_prewarm', 'autoprewarm_start_worker', 'autoprewarm_dump_now')",
    );
    assert_eq!(
        rows,
        [
            "autoprewarm_blocks v r strict",
            "autoprewarm_cancel v u strict",
            "autoprewarm_failover_ready v u strict",
            "autoprewarm_follow_now v u strict",
            "autoprewarm_load_now v u strict",
            "autoprewarm_wait v u",
            "pg_prewarm_database v u",
            "pg_prewarm_relation v u",
            "pg_prewarm_schema v u",
            "pg_stat_get_autoprewarm v u strict",
            "pg_stat_get_autoprewarm_follow v u strict",
            "pg_stat_get_progress_prewarm v u strict",
        ]
    );
}

#[test]
fn a_parallel_worker_may_call_it() {
    let cluster = lazy_cluster();
    make_table(&cluster);
    let setting = match cluster.major() {
        15 => "force_parallel_mode",
        _ => "debug_parallel_query",
    };
    let mut client = cluster.connect("postgres");
    client
        .batch_execute(&format!("SET {setting} = on"))
        .unwrap();
    let call = "SELECT pg_prewarm('t', 'read')";
    let plan = client.query(&format!("EXPLAIN {call}"), &[]).unwrap();
    let plan: String = plan[0].get(0);
    assert!(plan.starts_with("Gather"), "{plan}");
    assert_eq!(value::<i64>(&mut client, call), 100);
    // An error in it reaches the caller.
    assert_eq!(
        error(&mut client, "SELECT pg_prewarm('t', 'x')"),
        invalid_mode()
    );
}

#[test]
fn the_extension_can_be_moved_dropped_and_created_again() {
    let cluster = Cluster::build().start();
    cluster
        .sql("CREATE TABLE public.t AS SELECT 1 AS a; CREATE SCHEMA extensions; CREATE SCHEMA s");
    let mut client = cluster.connect("postgres");
    for (sql, schema) in [
        (
            "CREATE EXTENSION pg_prewarm SCHEMA extensions",
            "extensions",
        ),
        ("ALTER EXTENSION pg_prewarm SET SCHEMA s", "s"),
        (
            "DROP EXTENSION pg_prewarm; CREATE EXTENSION pg_prewarm",
            "public",
        ),
    ] {
        client.batch_execute(sql).unwrap();
        let call = format!("SELECT {schema}.autoprewarm_wait('1 min')");
        assert!(value::<bool>(&mut client, &call));
        let call = format!("SELECT {schema}.pg_prewarm('public.t')");
        assert_eq!(value::<i64>(&mut client, &call), 1, "{sql}");
        let call = format!("SELECT {schema}.autoprewarm_dump_now()");
        assert!(value::<i64>(&mut client, &call) > 0, "{sql}");
        assert_eq!(
            error(
                &mut client,
                &format!("SELECT {schema}.autoprewarm_start_worker()")
            )
            .sqlstate,
            "55000",
            "{sql}"
        );
    }
    client
        .batch_execute("DROP EXTENSION pg_prewarm; DROP SCHEMA extensions; DROP SCHEMA s")
        .unwrap();
}

fn already_running(leader: i32) -> SqlError {
    SqlError::new(
        "55000",
        format!("autoprewarm worker is already running under PID {leader}"),
    )
}

#[test]
fn a_leader_can_be_started_in_a_server_that_did_not_preload_the_library() {
    let cluster = Cluster::build()
        .not_preloaded()
        .setting("pg_prewarm.autoprewarm_interval = 1")
        .start();
    cluster.sql("CREATE EXTENSION pg_prewarm; CREATE TABLE first AS SELECT 1 AS a");
    assert_eq!(cluster.leader(), None);
    let mark = cluster.log_end();
    cluster.sql("SELECT autoprewarm_start_worker()");
    let leader = cluster.wait_for_leader();
    let start = "SELECT autoprewarm_start_worker()";
    assert_eq!(
        error(&mut cluster.connect("postgres"), start),
        already_running(leader)
    );

    // It obeys the interval, and reloads the configuration.
    cluster.wait_for_log(mark, "wrote block details");
    assert!(cluster.lists(cluster.file_of("postgres", "first")));
    cluster.configure("pg_prewarm.autoprewarm_interval = 0");
    cluster.reload();
    cluster.sql("CREATE TABLE second AS SELECT 1 AS a");
    let second = cluster.file_of("postgres", "second");
    cluster.stop(Shutdown::Fast);
    assert!(cluster.lists(second));

    // It ends with the server, and the next server loads the list.
    let mark = cluster.log_end();
    cluster.start();
    assert_eq!(cluster.leader(), None);
    cluster.sql(start);
    let (loaded, total) = cluster.wait_for_load(mark);
    assert!(loaded > 0 && loaded <= total, "{loaded} of {total}");
    assert_eq!(cached(&cluster, second, 0), [0].into());
}

#[test]
fn of_two_leaders_started_at_the_same_time_one_stays() {
    let cluster = lazy_cluster();
    let mut observer = cluster.connect("postgres");
    let mut callers = [(); 2].map(|()| cluster.connect("postgres"));
    let pids = callers
        .each_mut()
        .map(|caller| value::<i32>(caller, "SELECT pg_backend_pid()"));
    let mark = cluster.log_end();
    let mut results = thread::scope(|scope| {
        let postmaster = Paused::new(cluster.postmaster());
        let calls = callers.each_mut().map(|caller| {
            scope.spawn(|| {
                caller
                    .batch_execute("SELECT autoprewarm_start_worker()")
                    .map_err(SqlError::from)
            })
        });
        wait_until("both calls", || {
            value::<i64>(
                &mut observer,
                "SELECT count(*) FROM pg_stat_activity WHERE wait_event ILIKE 'BgWorkerStartup'",
            ) == 2
        });
        // Neither call goes on before one of the two leaders has exited.
        let waiting = pids.map(Paused::new);
        drop(postmaster);
        cluster.wait_for_log(mark, "autoprewarm worker is already running under PID");
        cluster.wait_for_log(mark, "exited with exit code 0");
        drop(waiting);
        calls.map(|call| call.join().unwrap())
    });
    results.sort_by_key(Result::is_err);
    assert_eq!(
        results,
        [
            Ok(()),
            Err(SqlError::new("53000", "could not start background process")
                .hint("More details may be available in the server log.")),
        ]
    );
    let leader = cluster.wait_for_leader();
    assert_eq!(
        error(&mut callers[0], "SELECT autoprewarm_start_worker()"),
        already_running(leader)
    );
}

#[test]
fn a_leader_that_is_switched_off_or_has_no_slot_is_not_started() {
    let no_slot = SqlError::new("53000", "could not register background process")
        .hint("You may need to increase \"max_worker_processes\".");
    let disabled = SqlError::new("55000", "autoprewarm is disabled")
        .hint("Set \"pg_prewarm.autoprewarm\" to on, and restart the server.");
    for (builder, expected) in [
        (
            Cluster::build()
                .not_preloaded()
                .setting("max_worker_processes = 0"),
            no_slot.clone(),
        ),
        // The launcher of logical replication takes the slot.
        (
            Cluster::build()
                .not_preloaded()
                .setting("max_worker_processes = 1"),
            no_slot,
        ),
        (
            Cluster::build().setting("pg_prewarm.autoprewarm = off"),
            disabled,
        ),
    ] {
        let cluster = builder.start();
        let mut client = cluster.connect("postgres");
        client.batch_execute("CREATE EXTENSION pg_prewarm").unwrap();
        assert_eq!(
            error(&mut client, "SELECT autoprewarm_start_worker()"),
            expected
        );
        assert_eq!(cluster.leader(), None);
        assert_eq!(value::<i32>(&mut client, "SELECT 1"), 1);
    }
}

#[test]
fn a_dump_on_demand_lists_what_is_cached_with_and_without_a_leader() {
    for builder in [
        Cluster::build().not_preloaded(),
        Cluster::build().setting("pg_prewarm.autoprewarm = off"),
        Cluster::build().setting("pg_prewarm.autoprewarm_interval = 0"),
    ] {
        let cluster = builder.start();
        make_table(&cluster);
        cluster.sql(
            "CREATE EXTENSION pg_prewarm; \
             SELECT autoprewarm_wait('1 min'); \
             CREATE UNLOGGED TABLE u AS SELECT 1 AS a",
        );
        // By now, the blocks that this query reads are cached.
        cluster.cached();
        let mut client = cluster.connect("postgres");
        let dump = "SELECT autoprewarm_dump_now()";
        value::<i64>(&mut client, dump);
        let records: i64 = value(&mut client, dump);
        let listed = cluster.listed();
        assert_eq!(listed.len() as i64, records);
        assert_eq!(listed, cluster.cached());
        for table in ["t", "u"] {
            assert!(cluster.lists(cluster.file_of("postgres", table)), "{table}");
        }
        assert!(!cluster.data(&format!("{LIST}.tmp")).exists());
    }
}

#[test]
fn functions_that_act_on_the_server_can_be_called_by_those_who_have_the_privilege() {
    let cluster = lazy_cluster();
    cluster.sql("CREATE ROLE plain LOGIN");
    let mut plain = cluster.connect_as("plain", "postgres");
    let functions = ["autoprewarm_dump_now", "autoprewarm_start_worker"];
    for function in functions {
        assert_eq!(
            error(&mut plain, &format!("SELECT {function}()")),
            denied(&format!("function {function}"))
        );
    }
    assert!(prewarm(&mut plain, "'pg_class'").is_ok());
    assert!(!cluster.data(LIST).exists());
    for function in functions {
        cluster.sql(&format!("GRANT EXECUTE ON FUNCTION {function}() TO plain"));
        plain
            .batch_execute(&format!("SELECT {function}()"))
            .unwrap();
    }
    assert!(cluster.data(LIST).exists());
    cluster.wait_for_leader();
}

#[test]
fn a_dump_on_demand_does_not_replace_a_list_that_is_being_loaded() {
    let cluster = Cluster::build()
        .not_preloaded()
        .setting("max_worker_processes = 1")
        .setting("max_logical_replication_workers = 0")
        .start();
    cluster.sql("CREATE EXTENSION pg_prewarm");
    make_table(&cluster);
    let dump = "SELECT autoprewarm_dump_now()";
    assert!(cluster.value::<i64>(dump) > 100);
    let list = cluster.list();
    cluster.restart();

    // The leader has taken the only slot, so its load waits for one.
    let mark = cluster.log_end();
    let mut client = cluster.connect("postgres");
    client
        .batch_execute("SELECT autoprewarm_start_worker()")
        .unwrap();
    let leader = cluster.wait_for_leader();
    cluster.wait_for_log(mark, "autoprewarm is waiting for a background worker slot");
    assert_eq!(
        error(&mut client, dump),
        SqlError::new(
            "XX000",
            format!("could not perform block dump because dump file is being used by PID {leader}")
        )
    );
    let end = format!("SELECT pg_terminate_backend({leader}, 60000)");
    assert!(value::<bool>(&mut client, &end));
    assert_eq!(cluster.list(), list, "a load cut short replaced the list");
    assert!(value::<i64>(&mut client, dump) > 0);
    assert_ne!(cluster.list(), list);
}
