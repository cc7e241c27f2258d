//! `pg_prewarm_relation()`, `pg_prewarm_schema()` and `pg_prewarm_database()`: which
//! relations belong to a call, their order, the privileges, the limits, and relations
//! that change during a call.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use postgres::{Client, NoTls};

use crate::common::{
    Cluster, Shutdown, SqlError, cached_pages, drop_pages, error, value, wait_until,
};

/// A row of the result: the relation's name, and its counters.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Row {
    relation: String,
    fork: String,
    blocks: i64,
    cached: i64,
}

/// What a call returned, and the notices that the client received.
#[derive(Debug)]
struct Outcome {
    rows: Vec<Row>,
    notices: Vec<String>,
}

impl Outcome {
    fn names(&self) -> Vec<&str> {
        self.rows.iter().map(|row| row.relation.as_str()).collect()
    }

    fn blocks(&self) -> i64 {
        self.rows.iter().map(|row| row.blocks).sum()
    }
}

/// A client that keeps the notices it receives.
struct Caller {
    client: Client,
    notices: Arc<Mutex<Vec<String>>>,
}

impl Caller {
    fn of(cluster: &Cluster, user: &str) -> Self {
        let notices = Arc::new(Mutex::new(Vec::new()));
        let keep = notices.clone();
        let mut config = cluster.config();
        config.user(user).notice_callback(move |notice| {
            keep.lock().unwrap().push(notice.message().to_owned());
        });
        Self {
            client: config.connect(NoTls).unwrap(),
            notices,
        }
    }

    fn try_call(&mut self, call: &str) -> Result<Outcome, SqlError> {
        self.notices.lock().unwrap().clear();
        let sql = format!(
            "SELECT CASE WHEN c.oid IS NULL THEN 'gone' \
                         WHEN relkind = 't' THEN 'toast of ' || (SELECT relname FROM pg_class \
                                                                WHERE reltoastrelid = c.oid) \
                         WHEN relname LIKE 'pg_toast_%_index' THEN 'toast index of ' || \
                              (SELECT h.relname FROM pg_class h JOIN pg_index i \
                               ON i.indrelid = h.reltoastrelid WHERE i.indexrelid = c.oid) \
                         ELSE relname::text END, fork, blocks, already_cached, \
                    elapsed >= '0' AND elapsed < '1 hour' \
             FROM {call} WITH ORDINALITY p LEFT JOIN pg_class c ON c.oid = p.relation \
             ORDER BY ordinality"
        );
        let rows = self.client.query(&sql, &[])?;
        let rows = rows
            .iter()
            .map(|row| {
                assert!(row.get::<_, bool>(4));
                Row {
                    relation: row.get(0),
                    fork: row.get(1),
                    blocks: row.get(2),
                    cached: row.get(3),
                }
            })
            .collect();
        Ok(Outcome {
            rows,
            notices: self.notices.lock().unwrap().clone(),
        })
    }

    fn call(&mut self, call: &str) -> Outcome {
        self.try_call(call)
            .unwrap_or_else(|error| panic!("{call}: {error:?}"))
    }

    fn pid(&mut self) -> i32 {
        value(&mut self.client, "SELECT pg_backend_pid()")
    }
}

fn cluster() -> Cluster {
    cluster_with_buffers("32MB")
}

fn cluster_with_buffers(buffers: &str) -> Cluster {
    let cluster = Cluster::build()
        .not_preloaded()
        .setting(&format!("shared_buffers = {buffers}"))
        .start();
    cluster.sql("CREATE EXTENSION pg_prewarm; CREATE EXTENSION pg_buffercache");
    cluster
}

/// A partition tree of three levels, `top`, with an index and TOAST values. Its leaves
/// are `leaf1`, which is smaller, and `leaf2`.
const TREE: &str = "CREATE TABLE top (id int, part int, filler text) PARTITION BY LIST (part); \
    CREATE INDEX top_id ON top (id); \
    CREATE TABLE middle PARTITION OF top FOR VALUES IN (1, 2) PARTITION BY LIST (part); \
    CREATE TABLE leaf1 PARTITION OF middle FOR VALUES IN (1); \
    CREATE TABLE leaf2 PARTITION OF middle FOR VALUES IN (2); \
    ALTER TABLE leaf1 ALTER filler SET STORAGE EXTERNAL; \
    ALTER TABLE leaf2 ALTER filler SET STORAGE EXTERNAL; \
    INSERT INTO top SELECT g, 1, repeat('x', 300) FROM generate_series(1, 1000) g; \
    INSERT INTO top SELECT g, 2, repeat('x', 300) FROM generate_series(1, 5000) g; \
    INSERT INTO top SELECT g, g % 2 + 1, repeat('x', 9000) FROM generate_series(1, 20) g";

/// The number of blocks in shared buffers, by file number.
fn cached_blocks(client: &mut Client) -> BTreeMap<u32, i64> {
    client
        .query(
            "SELECT c.oid, count(*) FROM pg_buffercache b \
             JOIN pg_class c ON pg_relation_filenode(c.oid) = b.relfilenode \
             WHERE b.relforknumber = 0 AND c.oid >= 16384 GROUP BY 1",
            &[],
        )
        .unwrap()
        .iter()
        .map(|row| (row.get(0), row.get(1)))
        .collect()
}

#[test]
fn a_partition_tree_includes_indexes_and_toast_and_options_leave_them_out() {
    let cluster = cluster();
    cluster.sql(TREE);
    cluster.sql("CREATE TABLE other AS SELECT 1 AS a");
    cluster.restart();
    let mut caller = Caller::of(&cluster, "postgres");
    let all = caller.call("pg_prewarm_relation('top')");
    assert_eq!(
        all.names().iter().copied().collect::<BTreeSet<_>>(),
        [
            "leaf1",
            "leaf1_id_idx",
            "leaf2",
            "leaf2_id_idx",
            "toast index of leaf1",
            "toast index of leaf2",
            "toast of leaf1",
            "toast of leaf2"
        ]
        .into()
    );
    assert_eq!(all.rows.len(), 8, "{all:?}");
    assert_eq!(all.notices, [""; 0]);
    // Exactly these blocks are cached.
    let sizes: Vec<(String, i64)> = caller
        .client
        .query(
            "SELECT relname::text, pg_relation_size(oid) / 8192 FROM pg_class \
             WHERE relname IN ('leaf1', 'leaf2', 'leaf1_id_idx', 'leaf2_id_idx')",
            &[],
        )
        .unwrap()
        .iter()
        .map(|row| (row.get(0), row.get(1)))
        .collect();
    assert_eq!(sizes.len(), 4);
    for (name, size) in sizes {
        let row = all.rows.iter().find(|row| row.relation == name).unwrap();
        assert_eq!((row.blocks, row.fork.as_str()), (size, "main"), "{row:?}");
    }
    let cached = cached_blocks(&mut caller.client);
    assert_eq!(cached.len(), 8, "{cached:?}");
    assert_eq!(cached.values().sum::<i64>(), all.blocks());

    // A second call finds all of them cached already.
    let again = caller.call("pg_prewarm_relation('top', workers => 2)");
    assert_eq!(again.blocks(), all.blocks());
    for row in &again.rows {
        assert_eq!(row.cached, row.blocks, "{row:?}");
    }

    let mut names = |arguments: &str| -> Vec<String> {
        let outcome = caller.call(&format!("pg_prewarm_relation({arguments})"));
        outcome.names().into_iter().map(str::to_owned).collect()
    };
    assert_eq!(
        names("'top', indexes => false, toast => false"),
        ["leaf1", "leaf2"]
    );
    assert_eq!(names("'leaf1', toast => false"), ["leaf1_id_idx", "leaf1"]);
    assert_eq!(
        names("'leaf1', indexes => false"),
        ["toast of leaf1", "leaf1"]
    );
    assert_eq!(names("'top', partitions => false"), [""; 0]);
    assert_eq!(names("'top_id'"), ["leaf1_id_idx", "leaf2_id_idx"]);
    assert_eq!(names("'leaf2_id_idx'"), ["leaf2_id_idx"]);
}

#[test]
fn indexes_come_first_their_upper_levels_before_everything_else_and_small_before_large() {
    let cluster = cluster();
    // The second index has at least two levels above the leaves.
    cluster.sql(
        "CREATE TABLE t (id int, wide text); \
         INSERT INTO t SELECT g, repeat('x', 450) || g FROM generate_series(1, 3000) g; \
         CREATE INDEX t_id ON t (id); CREATE INDEX t_wide ON t (wide); \
         CREATE INDEX t_hash ON t USING hash (id)",
    );
    cluster.sql("CHECKPOINT");
    // Bytes of its pages: the root's level, in the metapage; and whether a page is a
    // leaf.
    let byte = |block: &str, at: u32| {
        format!(
            "get_byte(pg_read_binary_file(pg_relation_filepath('t_wide'), {block} * 8192, 8192), {at})"
        )
    };
    let levels: i32 = cluster.value(&format!("SELECT {}", byte("0", 36)));
    assert!(levels >= 2, "{levels}");
    let is_leaf = |block: &str| format!("{} & 1 = 1", byte(block, 8188));
    let upper: i64 = cluster.value(&format!(
        "SELECT count(*) FROM generate_series(1, pg_relation_size('t_wide') / 8192 - 1) b \
         WHERE NOT {}",
        is_leaf("b")
    ));
    cluster.restart();
    let mut caller = Caller::of(&cluster, "postgres");
    // The metapage of each index, and the levels above the leaves of B-trees.
    let first = upper + 1 + 2 + 1;
    let outcome = caller.call(&format!(
        "pg_prewarm_relation('t', toast => false, max_blocks => {first})"
    ));
    assert_eq!(outcome.names(), ["t_id", "t_hash", "t_wide"]);
    assert_eq!(
        outcome
            .rows
            .iter()
            .map(|row| row.blocks)
            .collect::<Vec<_>>(),
        [2, 1, upper + 1],
        "{outcome:?}"
    );
    let leaves: i64 = value(
        &mut caller.client,
        &format!(
            "SELECT count(*) FROM pg_buffercache \
             WHERE relfilenode = pg_relation_filenode('t_wide') AND relforknumber = 0 \
               AND relblocknumber > 0 AND {}",
            is_leaf("relblocknumber")
        ),
    );
    assert_eq!(leaves, 0);
    // Then the rest of the indexes, then the table.
    let outcome = caller.call(&format!(
        "pg_prewarm_relation('t', toast => false, max_blocks => {})",
        first + 2
    ));
    assert_eq!(outcome.blocks(), first + 2);
    let sizes = "SELECT sum(pg_relation_size(indexrelid)) / 8192 FROM pg_index \
                 WHERE indrelid = 't'::regclass";
    let indexes: i64 = value(&mut caller.client, &format!("SELECT ({sizes})::int8"));
    let outcome = caller.call(&format!(
        "pg_prewarm_relation('t', toast => false, max_blocks => {indexes})"
    ));
    assert_eq!(outcome.names(), ["t_id", "t_hash", "t_wide"]);
    assert_eq!(outcome.blocks(), indexes);
    let outcome = caller.call(&format!(
        "pg_prewarm_relation('t', toast => false, max_blocks => {})",
        indexes + 1
    ));
    assert_eq!(outcome.rows[3].relation, "t");
    assert_eq!(outcome.rows[3].blocks, 1);
}

#[test]
fn max_blocks_is_exact_in_every_mode_with_and_without_workers() {
    let cluster = cluster();
    cluster.table("t", 2000);
    cluster.sql("CREATE INDEX t_id ON t (id)");
    let all: i64 = cluster.value(
        "SELECT (pg_relation_size('t') + pg_relation_size('t_id') \
                 + pg_indexes_size(reltoastrelid))::int8 / 8192 FROM pg_class WHERE relname = 't'",
    );
    let mut caller = Caller::of(&cluster, "postgres");
    for mode in ["buffer", "read", "prefetch"] {
        for workers in [0, 2] {
            for (most, expected) in [
                (0, 0),
                (1, 1),
                (1500, 1500),
                (all, all),
                (all + 1, all),
                (i64::MAX, all),
            ] {
                let outcome = caller.call(&format!(
                    "pg_prewarm_relation('t', '{mode}', max_blocks => {most}, workers => {workers})"
                ));
                assert_eq!(
                    outcome.blocks(),
                    expected,
                    "{mode}, {workers}, {most}: {outcome:?}"
                );
                assert_eq!(outcome.notices, [""; 0]);
            }
        }
    }
}

#[test]
fn forks_that_exist_are_read() {
    let cluster = cluster();
    cluster.sql(
        "CREATE UNLOGGED TABLE t (id int PRIMARY KEY); INSERT INTO t SELECT generate_series(1, 9)",
    );
    cluster.sql("VACUUM t");
    let mut caller = Caller::of(&cluster, "postgres");
    let mut forks = |forks: &str| -> Vec<(String, String, i64)> {
        let outcome = caller.call(&format!("pg_prewarm_relation('t', forks => '{forks}')"));
        let rows = outcome.rows.into_iter();
        rows.map(|row| (row.relation, row.fork, row.blocks))
            .collect()
    };
    let row = |relation: &str, fork: &str, blocks| (relation.to_owned(), fork.to_owned(), blocks);
    assert_eq!(forks("{vm,fsm}"), [row("t", "vm", 1), row("t", "fsm", 3)]);
    assert_eq!(
        forks("{init}"),
        [row("t_pkey", "init", 1), row("t", "init", 0)]
    );
    assert_eq!(
        forks("{main,main}"),
        [row("t_pkey", "main", 2), row("t", "main", 1)]
    );
    assert_eq!(forks("{}"), []);
}

#[test]
fn a_bad_argument_is_an_error_before_anything_is_read() {
    let cluster = cluster();
    cluster.sql(
        "CREATE TABLE t (id int PRIMARY KEY); CREATE VIEW v AS SELECT 1 AS a; \
         CREATE FOREIGN DATA WRAPPER w; CREATE SERVER s FOREIGN DATA WRAPPER w; \
         CREATE FOREIGN TABLE f (a int) SERVER s; CREATE ROLE plain LOGIN; \
         INSERT INTO t VALUES (1)",
    );
    cluster.restart();
    let invalid = |message: &str| SqlError::new("22023", message);
    let mode = invalid("invalid prewarm type")
        .hint("Valid prewarm types are \"prefetch\", \"read\", and \"buffer\".");
    let fork = invalid("invalid fork name")
        .hint("Valid fork names are \"main\", \"fsm\", \"vm\", and \"init\".");
    let without_storage = |relation: &str, kinds: &str| {
        SqlError::new(
            "42809",
            format!("relation \"{relation}\" does not have storage"),
        )
        .detail(&format!("This operation is not supported for {kinds}."))
    };
    let mut caller = Caller::of(&cluster, "postgres");
    for (call, expected) in [
        ("relation(NULL)", invalid("relation cannot be null")),
        (
            "relation('t', NULL)",
            invalid("prewarm type cannot be null"),
        ),
        ("relation('t', 'Buffer')", mode.clone()),
        (
            "relation('t', forks => NULL)",
            invalid("relation fork cannot be null"),
        ),
        (
            "relation('t', forks => '{main,NULL}')",
            invalid("relation fork cannot be null"),
        ),
        ("relation('t', forks => '{main,x}')", fork.clone()),
        (
            "relation('t', indexes => NULL)",
            invalid("indexes cannot be null"),
        ),
        (
            "relation('t', toast => NULL)",
            invalid("toast cannot be null"),
        ),
        (
            "relation('t', partitions => NULL)",
            invalid("partitions cannot be null"),
        ),
        (
            "relation('t', max_blocks => -1)",
            invalid("max_blocks must not be negative"),
        ),
        (
            "relation('t', workers => NULL)",
            invalid("workers cannot be null"),
        ),
        (
            "relation('t', workers => -1)",
            invalid("workers must be between 0 and 1024"),
        ),
        (
            "relation('t', workers => 1025)",
            invalid("workers must be between 0 and 1024"),
        ),
        (
            "relation(4000000000::oid::regclass)",
            SqlError::new("XX000", "could not open relation with OID 4000000000"),
        ),
        ("relation('v')", without_storage("v", "views")),
        ("relation('f')", without_storage("f", "foreign tables")),
        ("schema(NULL)", invalid("schema cannot be null")),
        (
            "schema(4000000000::oid::regnamespace)",
            SqlError::new("3F000", "schema with OID 4000000000 does not exist"),
        ),
        ("schema('public', 'x')", mode.clone()),
        ("schema('public', forks => '{x}')", fork.clone()),
        (
            "schema('public', max_blocks => -1)",
            invalid("max_blocks must not be negative"),
        ),
        ("database('x')", mode),
        ("database(forks => '{vm,x}')", fork),
        (
            "database(catalogs => NULL)",
            invalid("catalogs cannot be null"),
        ),
    ] {
        let result = caller.try_call(&format!("pg_prewarm_{call}"));
        assert_eq!(result.unwrap_err(), expected, "{call}");
    }
    let mut plain = Caller::of(&cluster, "plain");
    assert_eq!(
        plain.try_call("pg_prewarm_relation('t')").unwrap_err(),
        SqlError::new("42501", "permission denied for table t")
    );
    assert_eq!(cached_blocks(&mut caller.client), BTreeMap::new());
}

#[test]
fn empty_relations_give_no_blocks_and_no_error() {
    let cluster = cluster();
    cluster.sql(
        "CREATE TABLE t (id int PRIMARY KEY); CREATE SCHEMA empty; \
         CREATE TABLE parted (id int PRIMARY KEY) PARTITION BY LIST (id)",
    );
    let mut caller = Caller::of(&cluster, "postgres");
    for workers in [0, 1] {
        let outcome = caller.call(&format!("pg_prewarm_relation('t', workers => {workers})"));
        assert_eq!(outcome.names(), ["t_pkey", "t"]);
        assert_eq!(outcome.blocks(), 1);
        for call in ["relation('parted'", "schema('empty'"] {
            let outcome = caller.call(&format!("pg_prewarm_{call}, workers => {workers})"));
            assert_eq!(outcome.rows, []);
            assert_eq!(outcome.notices, [""; 0]);
        }
    }
}

#[test]
fn select_on_a_table_covers_its_indexes_and_toast_and_the_rest_is_counted() {
    let cluster = cluster();
    cluster.sql(TREE);
    cluster.sql(
        "CREATE ROLE plain LOGIN; CREATE TABLE mine AS SELECT 1 AS a; CREATE SEQUENCE s; \
         CREATE MATERIALIZED VIEW m AS SELECT 1 AS a; CREATE TABLE secret AS SELECT 1 AS a; \
         CREATE UNLOGGED TABLE u AS SELECT 1 AS a; \
         CREATE SCHEMA other; CREATE TABLE other.elsewhere AS SELECT 1 AS a",
    );
    let mut plain = Caller::of(&cluster, "plain");
    let mut superuser = Caller::of(&cluster, "postgres");
    assert_eq!(
        plain.try_call("pg_prewarm_relation('top')").unwrap_err(),
        SqlError::new("42501", "permission denied for table top")
    );
    let outcome = plain.call("pg_prewarm_schema('public')");
    assert_eq!(outcome.rows, []);
    assert_eq!(
        outcome.notices,
        ["skipped 7 relations for which the SELECT privilege is missing"]
    );

    cluster.sql("GRANT SELECT ON top, mine, s, m, u TO plain");
    let tree = plain.call("pg_prewarm_relation('top', workers => 1)");
    assert_eq!(tree.rows.len(), 8);
    assert_eq!(tree.notices, [""; 0]);
    let schema = plain.call("pg_prewarm_schema('public')");
    assert_eq!(schema.rows.len(), 12, "{schema:?}");
    assert_eq!(
        schema.notices,
        ["skipped 1 relation for which the SELECT privilege is missing"]
    );
    for name in ["mine", "s", "m", "u", "leaf1", "toast of leaf2"] {
        assert!(schema.names().contains(&name), "{name}");
    }
    let mut count = |call: &str| superuser.call(call).rows.len();
    assert_eq!(count("pg_prewarm_schema('public')"), 13);
    assert_eq!(count("pg_prewarm_schema('other', workers => 2)"), 1);
    assert_eq!(count("pg_prewarm_database()"), 14);
    assert!(count("pg_prewarm_database(catalogs => true)") > 150);
    assert_eq!(
        count("pg_prewarm_database(indexes => false, toast => false)"),
        8
    );
}

#[test]
fn partitions_that_are_foreign_tables_are_left_out_and_counted() {
    let cluster = cluster();
    cluster.sql(TREE);
    cluster.sql(
        "CREATE FOREIGN DATA WRAPPER nowhere; \
         CREATE SERVER far_away FOREIGN DATA WRAPPER nowhere; \
         CREATE TABLE plain (id int) PARTITION BY LIST (id); \
         CREATE TABLE near PARTITION OF plain FOR VALUES IN (1); \
         CREATE FOREIGN TABLE far PARTITION OF plain FOR VALUES IN (2) SERVER far_away",
    );
    let mut caller = Caller::of(&cluster, "postgres");
    let outcome = caller.call("pg_prewarm_relation('plain')");
    assert_eq!(outcome.names(), ["near"]);
    assert_eq!(outcome.notices, ["skipped 1 foreign table"]);
}

/// A table with inheritance children, one of them twice and one below another: `base` has
/// one row, as `old_base`, its parent, has none.
const FAMILY: &str = "CREATE TABLE old_base (id int, filler text); \
    CREATE TABLE base (PRIMARY KEY (id)) INHERITS (old_base); \
    CREATE TABLE chunk1 (PRIMARY KEY (id)) INHERITS (base); \
    CREATE TABLE chunk2 () INHERITS (base); \
    CREATE TABLE below (CHECK (id > 0)) INHERITS (chunk1, chunk2); \
    CREATE TABLE stranger (LIKE base); \
    ALTER TABLE chunk2 ALTER filler SET STORAGE EXTERNAL; \
    INSERT INTO base VALUES (1, 'x'); \
    INSERT INTO chunk1 SELECT g, repeat('x', 300) FROM generate_series(1, 1000) g; \
    INSERT INTO chunk2 SELECT g, repeat('x', 9000) FROM generate_series(1, 10) g; \
    INSERT INTO below SELECT g, repeat('x', 300) FROM generate_series(1, 2000) g; \
    INSERT INTO stranger VALUES (1, 'x')";

#[test]
fn inheritance_children_come_with_their_parent_each_once_with_indexes_and_toast() {
    let cluster = cluster();
    cluster.sql(FAMILY);
    cluster.restart();
    let mut caller = Caller::of(&cluster, "postgres");
    let all = caller.call("pg_prewarm_relation('base', toast => false)");
    // Their parents are not asked for.
    assert_eq!(
        all.names(),
        [
            "base_pkey",
            "chunk1_pkey",
            "base",
            "chunk2",
            "chunk1",
            "below"
        ]
    );
    assert_eq!(all.notices, [""; 0]);
    for row in &all.rows {
        let size = format!("SELECT pg_relation_size('{}') / 8192", row.relation);
        assert_eq!(
            row.blocks,
            value::<i64>(&mut caller.client, &size),
            "{row:?}"
        );
    }
    let names = |outcome: &Outcome| -> BTreeSet<String> {
        outcome.names().into_iter().map(str::to_owned).collect()
    };
    let outcome = caller.call("pg_prewarm_relation('base', workers => 2)");
    assert!(names(&outcome).contains("toast of chunk2"));
    assert!(names(&outcome).contains("toast index of chunk2"));
    assert_eq!(outcome.rows.len(), names(&outcome).len());
    let above = caller.call("pg_prewarm_relation('old_base')");
    let mut expected = names(&outcome);
    expected
        .extend(["old_base", "toast of old_base", "toast index of old_base"].map(str::to_owned));
    assert_eq!(names(&above), expected);
    let alone = caller.call("pg_prewarm_relation('base', partitions => false, toast => false)");
    assert_eq!(alone.names(), ["base_pkey", "base"]);
    let child = caller.call("pg_prewarm_relation('chunk2', toast => false)");
    assert_eq!(child.names(), ["chunk2", "below"]);
    // The limit is for all of them.
    let limited = caller.call("pg_prewarm_relation('base', max_blocks => 20)");
    assert_eq!(limited.blocks(), 20);
}

#[test]
fn select_on_a_parent_covers_its_children_where_the_parent_is_named() {
    let cluster = cluster();
    cluster.sql(FAMILY);
    cluster.sql("CREATE ROLE plain LOGIN");
    let mut plain = Caller::of(&cluster, "plain");
    let denied =
        |table: &str| SqlError::new("42501", format!("permission denied for table {table}"));
    let base = "pg_prewarm_relation('base', indexes => false, toast => false)";
    assert_eq!(plain.try_call(base).unwrap_err(), denied("base"));
    cluster.sql("GRANT SELECT ON base TO plain");
    // As in a query of it.
    let rows = "SELECT count(*) FROM base";
    assert_eq!(value::<i64>(&mut plain.client, rows), 3011);
    let outcome = plain.call(base);
    assert_eq!(outcome.names(), ["base", "chunk2", "chunk1", "below"]);
    assert_eq!(outcome.notices, [""; 0]);
    assert_eq!(
        plain.try_call("pg_prewarm_relation('chunk1')").unwrap_err(),
        denied("chunk1")
    );
    // No parent is named.
    for call in [
        "pg_prewarm_schema('public', toast => false)",
        "pg_prewarm_database(toast => false)",
    ] {
        let outcome = plain.call(call);
        assert_eq!(outcome.names(), ["base_pkey", "base"], "{call}");
        assert_eq!(
            outcome.notices,
            ["skipped 5 relations for which the SELECT privilege is missing"]
        );
    }
    cluster.sql("GRANT SELECT ON below TO plain");
    let outcome = plain.call("pg_prewarm_schema('public', indexes => false, toast => false)");
    assert_eq!(outcome.names(), ["base", "below"]);
}

#[test]
fn children_that_are_foreign_or_temporary_in_other_sessions_are_left_out() {
    let cluster = cluster();
    cluster.sql(
        "CREATE FOREIGN DATA WRAPPER nowhere; \
         CREATE SERVER far_away FOREIGN DATA WRAPPER nowhere; \
         CREATE TABLE base (id int); INSERT INTO base VALUES (1); \
         CREATE FOREIGN TABLE far () INHERITS (base) SERVER far_away; \
         CREATE TABLE near () INHERITS (base); INSERT INTO near VALUES (1); \
         CREATE TABLE below () INHERITS (far); INSERT INTO below VALUES (1)",
    );
    let mut owner = Caller::of(&cluster, "postgres");
    owner
        .client
        .batch_execute(
            "CREATE TEMPORARY TABLE short () INHERITS (base); INSERT INTO short VALUES (1)",
        )
        .unwrap();
    let base = "pg_prewarm_relation('base')";
    let mut other = Caller::of(&cluster, "postgres");
    for (caller, more) in [(&mut owner, Some("short")), (&mut other, None)] {
        for mode in ["buffer", "read", "prefetch"] {
            let outcome = caller.call(&base.replace(')', &format!(", '{mode}')")));
            let names: BTreeSet<_> = outcome.names().into_iter().collect();
            let expected = ["base", "near", "below"].into_iter().chain(more).collect();
            assert_eq!(names, expected, "{mode}");
            assert_eq!(outcome.notices, ["skipped 1 foreign table"]);
        }
    }
    assert_eq!(
        other.try_call("pg_prewarm_relation('far')").unwrap_err(),
        SqlError::new("42809", "relation \"far\" does not have storage")
            .detail("This operation is not supported for foreign tables.")
    );
}

#[test]
fn a_child_that_is_dropped_or_rewritten_meanwhile_does_not_fail_the_call_of_its_parent() {
    let cluster = cluster();
    cluster.sql(
        "CREATE TABLE base (id int, filler text); \
         SELECT FROM generate_series(1, 1)",
    );
    let mut client = cluster.connect("postgres");
    client
        .batch_execute(
            "DO $$ BEGIN FOR i IN 1..40 LOOP \
               EXECUTE format('CREATE TABLE c%s () INHERITS (base)', i); \
               EXECUTE format('INSERT INTO c%s SELECT g FROM generate_series(1, 500) g', i); \
             END LOOP; END $$",
        )
        .unwrap();
    let mut caller = Caller::of(&cluster, "postgres");
    let changes = thread::spawn(move || {
        for child in 1..=40 {
            let change = match child % 2 {
                0 => format!("DROP TABLE c{child}"),
                _ => format!("VACUUM FULL c{child}"),
            };
            client.batch_execute(&change).unwrap();
        }
    });
    while !changes.is_finished() {
        caller.call("pg_prewarm_relation('base', workers => 1)");
    }
    changes.join().unwrap();
    let outcome = caller.call("pg_prewarm_relation('base', toast => false)");
    assert_eq!(outcome.rows.len(), 21);
}

#[test]
fn blocks_that_were_read_do_not_count_as_cached_already() {
    let cluster = cluster();
    cluster.table("t", 2000);
    for workers in [0, 2] {
        cluster.restart();
        // A new session, whose caches are empty.
        let cached: i64 = cluster.value(&format!(
            "SELECT sum(already_cached)::int8 FROM pg_prewarm_relation('t', workers => {workers})"
        ));
        assert_eq!(cached, 0, "workers: {workers}");
        let cached: i64 =
            cluster.value("SELECT sum(already_cached)::int8 FROM pg_prewarm_relation('t')");
        assert!(cached >= 2000, "{cached}");
    }
}

#[test]
fn blocks_in_shared_buffers_are_not_read_from_disk() {
    let cluster = cluster();
    cluster.table("t", 2000);
    cluster.restart();
    let mut caller = Caller::of(&cluster, "postgres");
    caller.call("pg_prewarm_relation('t')");
    let path: String = cluster.value("SELECT pg_relation_filepath('t')");
    let file = File::open(cluster.data(&path)).unwrap();
    file.sync_all().unwrap();
    for workers in [0, 2] {
        drop_pages(&file, 0, 2000);
        let pages = cached_pages(&file);
        let outcome = caller.call(&format!("pg_prewarm_relation('t', workers => {workers})"));
        assert_eq!(outcome.rows.last().unwrap().cached, 2000, "{outcome:?}");
        assert!(
            cached_pages(&file) == pages,
            "with {workers} workers, the file was read"
        );
    }
}

#[test]
fn a_parallel_worker_that_makes_a_call_starts_no_workers() {
    let cluster = cluster();
    cluster.table("t", 2000);
    let mut client = cluster.connect("postgres");
    let force = match cluster.major() {
        15 => "force_parallel_mode",
        _ => "debug_parallel_query",
    };
    client
        .batch_execute(&format!(
            "CREATE FUNCTION mislabelled() RETURNS int8 LANGUAGE plpgsql PARALLEL SAFE AS $$ \
                 BEGIN RETURN (SELECT sum(blocks) FROM pg_prewarm_relation('t', workers => 2)); \
                 END $$; \
             CREATE FUNCTION process() RETURNS int LANGUAGE sql PARALLEL SAFE \
                 AS 'SELECT pg_backend_pid()'; \
             SET {force} = on"
        ))
        .unwrap();
    let session: i32 = value(&mut client, "SELECT pg_backend_pid() WHERE random() >= 0");
    let row = client
        .query_one("SELECT mislabelled(), process()", &[])
        .unwrap();
    assert!(row.get::<_, i64>(0) >= 2000);
    assert_ne!(row.get::<_, i32>(1), session, "not in a worker");
    client.batch_execute("BEGIN; LOCK TABLE t; COMMIT").unwrap();
    drop(client);
    wait_until("the session's end", || {
        cluster.value::<i64>(&format!(
            "SELECT count(*) FROM pg_stat_activity WHERE pid = {session}"
        )) == 0
    });
}

#[test]
fn a_call_sees_the_uncommitted_changes_of_its_transaction() {
    let cluster = cluster();
    let mut caller = Caller::of(&cluster, "postgres");
    caller
        .client
        .batch_execute(
            "CREATE TABLE old AS SELECT g AS a, repeat('x', 900) FROM generate_series(1, 9000) g; \
             BEGIN; LOCK TABLE old; CREATE TABLE new AS SELECT * FROM old; \
             CREATE INDEX ON new (a)",
        )
        .unwrap();
    for table in ["old", "new"] {
        let outcome = caller.call(&format!("pg_prewarm_relation('{table}', workers => 2)"));
        assert!(outcome.blocks() >= 1000, "{outcome:?}");
    }
    caller.client.batch_execute("TRUNCATE new").unwrap();
    let outcome = caller.call("pg_prewarm_relation('new', workers => 2)");
    assert!(outcome.blocks() < 5, "{outcome:?}");
    caller.client.batch_execute("COMMIT").unwrap();
}

#[test]
fn temporary_tables_of_other_sessions_are_left_out() {
    let cluster = cluster();
    let mut caller = Caller::of(&cluster, "postgres");
    caller
        .client
        .batch_execute(
            "CREATE TEMPORARY TABLE parted (id int) PARTITION BY LIST (id); \
             CREATE TEMPORARY TABLE part PARTITION OF parted FOR VALUES IN (1); \
             CREATE TEMPORARY TABLE temp (id int PRIMARY KEY, filler text); \
             INSERT INTO temp SELECT g, repeat('x', 500) FROM generate_series(1, 1500) g",
        )
        .unwrap();
    for mode in ["buffer", "read", "prefetch"] {
        let outcome = caller.call(&format!(
            "pg_prewarm_relation('temp', '{mode}', workers => 2)"
        ));
        assert_eq!(outcome.names().last(), Some(&"temp"));
        assert!(outcome.rows.last().unwrap().blocks >= 100, "{outcome:?}");
    }
    // More than fit into the local buffers.
    caller
        .client
        .batch_execute(
            "INSERT INTO temp SELECT g, repeat('x', 500) FROM generate_series(1501, 30000) g",
        )
        .unwrap();
    let outcome = caller.call("pg_prewarm_relation('temp')");
    assert!((800..1100).contains(&outcome.blocks()), "{outcome:?}");
    assert!(
        outcome.notices[0].starts_with("temporary buffers are full: "),
        "{outcome:?}"
    );
    let mut other = Caller::of(&cluster, "postgres");
    for name in ["temp", "parted"] {
        let oid: u32 = value(
            &mut caller.client,
            &format!("SELECT '{name}'::regclass::oid"),
        );
        for mode in ["buffer", "read", "prefetch"] {
            assert_eq!(
                other
                    .try_call(&format!("pg_prewarm_relation({oid}, '{mode}')"))
                    .unwrap_err(),
                SqlError::new("0A000", "cannot access temporary tables of other sessions")
            );
        }
    }
    let outcome = other.call("pg_prewarm_database()");
    assert!(!outcome.names().contains(&"temp"), "{outcome:?}");
    assert_eq!(outcome.notices, [""; 0]);
}

#[test]
fn cached_blocks_are_counted_even_if_no_buffer_is_free() {
    let cluster = cluster_with_buffers("8MB");
    cluster.table("t", 900);
    cluster.table("other", 200);
    cluster.restart();
    let mut caller = Caller::of(&cluster, "postgres");
    caller.call("pg_prewarm_relation('other')");
    let first = caller.call("pg_prewarm_relation('t')").blocks();
    // Now no buffer is free, and a call could evict only blocks that it has found
    // itself.
    for workers in [0, 1] {
        let again = caller.call(&format!(
            "pg_prewarm_relation('t', max_blocks => {first}, workers => {workers})"
        ));
        assert_eq!(again.blocks(), first);
        assert_eq!(again.notices, [""; 0]);
    }
}

#[test]
fn a_call_stops_when_it_has_filled_shared_buffers() {
    let cluster = cluster_with_buffers("8MB");
    cluster.sql("CREATE TABLE t (id int, filler text) WITH (autovacuum_enabled = off)");
    cluster.sql("INSERT INTO t SELECT g, repeat('x', 500) FROM generate_series(1, 60000) g");
    cluster.sql("CREATE INDEX t_id ON t (id)");
    let indexes: i64 = cluster.value("SELECT pg_relation_size('t_id') / 8192");
    // One more for the index of the TOAST table.
    let all: i64 = cluster.value::<i64>("SELECT pg_relation_size('t') / 8192") + indexes + 1;
    for workers in [0, 1i64] {
        cluster.restart();
        let mut caller = Caller::of(&cluster, "postgres");
        // The catalog reads of the call need buffers as well, so they are made before.
        cached_blocks(&mut caller.client);
        let outcome = caller.call(&format!("pg_prewarm_relation('t', workers => {workers})"));
        let done = outcome.blocks();
        assert!((600..=1024).contains(&done), "{outcome:?}");
        assert_eq!(
            outcome.notices,
            [format!(
                "shared buffers are full: {done} of {all} blocks were prewarmed"
            )]
        );
        // The index is still cached, except for what was evicted by reads ahead.
        let cached = cached_blocks(&mut caller.client);
        let index: u32 = value(&mut caller.client, "SELECT 't_id'::regclass::oid");
        assert!(
            cached[&index] > indexes - 32 - 64 * workers,
            "{} of {indexes}",
            cached[&index]
        );
        // A limit that is not reached makes no difference.
        let again = caller.call(&format!(
            "pg_prewarm_relation('t', max_blocks => 1000000, workers => {workers})"
        ));
        assert_eq!(again.notices.len(), 1, "{again:?}");
        // The other modes need no buffers.
        let outcome = caller.call("pg_prewarm_relation('t', 'read')");
        assert_eq!(outcome.blocks(), all);
        assert_eq!(outcome.notices, [""; 0]);
    }
}

/// A cluster in which each read of a block takes so many milliseconds, with a table `t`
/// of 3000 blocks. Its function `plain` is `pg_prewarm()` with the columns of the
/// others.
fn slow_cluster(milliseconds: u32) -> Cluster {
    let cluster = Cluster::build().not_preloaded().checksums().create();
    if cluster.major() >= 17 {
        cluster.configure("io_combine_limit = 1");
    }
    if cluster.major() >= 18 {
        cluster.configure("io_method = worker");
    }
    cluster.slow_reads(0);
    cluster.start();
    cluster.sql(
        "CREATE EXTENSION pg_prewarm; CREATE EXTENSION pg_buffercache; \
         CREATE FUNCTION plain(regclass) \
             RETURNS TABLE (relation regclass, fork text, blocks int8, already_cached int8, \
                            elapsed interval) \
             LANGUAGE sql AS $$ SELECT $1, 'main', pg_prewarm($1), 0::int8, '0'::interval $$",
    );
    cluster.table("t", 3000);
    cluster.sql("CREATE TABLE small AS SELECT 1 AS a");
    cluster.restart();
    // The library is loaded, and the catalogs are cached.
    cluster.sql("SELECT * FROM pg_prewarm_relation('small')");
    cluster.slow_reads(milliseconds);
    cluster
}

/// Runs a call, and an action once the call is reading.
fn during_call<T>(
    caller: &mut Caller,
    cluster: &Cluster,
    call: &str,
    act: impl FnOnce(&mut Client) -> T,
) -> (Result<Outcome, SqlError>, T) {
    let pid = caller.pid();
    let mut other = cluster.connect("postgres");
    thread::scope(|scope| {
        let running = scope.spawn(|| caller.try_call(call));
        wait_until("the call", || {
            value(
                &mut other,
                &format!(
                    "SELECT EXISTS (SELECT FROM pg_stat_progress_prewarm \
                                    WHERE pid = {pid} AND blocks_done > 0)"
                ),
            )
        });
        let value = act(&mut other);
        (running.join().unwrap(), value)
    })
}

#[test]
fn a_relation_that_is_changed_during_a_call_is_left_with_what_was_read() {
    let cluster = slow_cluster(20);
    let path = |relation: &str| {
        let path: String = cluster.value(&format!("SELECT pg_relation_filepath('{relation}')"));
        cluster.data(&path)
    };
    for call in [
        "plain('t')",
        "pg_prewarm_relation('t', toast => false)",
        "pg_prewarm_relation('t', toast => false, workers => 2)",
    ] {
        for (change, what) in [
            ("ALTER TABLE t ALTER id TYPE int8", "rewritten"),
            ("TRUNCATE t", "rewritten"),
            ("DROP TABLE t", "dropped"),
            ("", "truncated"),
        ] {
            let mut caller = Caller::of(&cluster, "postgres");
            let file = path("t");
            let (outcome, ()) = during_call(&mut caller, &cluster, call, |other| {
                // A session can have this lock only during the call, which takes
                // seconds.
                other
                    .batch_execute("BEGIN; LOCK TABLE t IN ACCESS EXCLUSIVE MODE")
                    .unwrap();
                cluster.slow_reads(0);
                if what == "truncated" {
                    // Like VACUUM, which truncates without waiting for a lock.
                    let file = std::fs::File::options().write(true).open(&file).unwrap();
                    file.set_len(2000 * 8192).unwrap();
                }
                other.batch_execute(change).unwrap();
                other.batch_execute("COMMIT").unwrap();
            });
            let outcome = outcome.unwrap();
            assert_eq!(
                outcome.notices,
                [format!(
                    "relation \"t\" was {what} while it was being prewarmed"
                )],
                "{call}, {outcome:?}"
            );
            let blocks = outcome.blocks();
            assert!((1..3000).contains(&blocks), "{call}, {outcome:?}");
            cluster.sql("DROP TABLE IF EXISTS t");
            cluster.table("t", 3000);
            cluster.restart();
            cluster.sql("SELECT * FROM pg_prewarm_relation('small')");
            cluster.slow_reads(20);
        }
    }
}

/// How long sessions waited for an exclusive lock on a relation during a call, sorted.
fn times_until_locked(cluster: &Cluster, call: &str, relation: &str) -> Vec<Duration> {
    let lock = format!("BEGIN; LOCK TABLE {relation} IN ACCESS EXCLUSIVE MODE; COMMIT");
    let mut caller = Caller::of(cluster, "postgres");
    let (outcome, mut times) = during_call(&mut caller, cluster, call, |other| {
        (0..5)
            .map(|_| {
                let start = Instant::now();
                other.batch_execute(&lock).unwrap();
                start.elapsed()
            })
            .collect::<Vec<_>>()
    });
    let outcome = outcome.unwrap();
    assert_eq!(outcome.notices, [""; 0]);
    let blocks = outcome.rows.last().unwrap().blocks;
    assert!(blocks > 1000, "{call}: {outcome:?}");
    times.sort();
    times
}

#[test]
fn a_session_that_waits_for_a_relation_gets_its_lock_soon() {
    let cluster = slow_cluster(0);
    cluster.sql(
        "CREATE TABLE n AS SELECT repeat(md5(g::text), 15) AS a FROM generate_series(1, 20000) g; \
         CREATE INDEX n_a ON n (a)",
    );
    // From 18 on, I/O workers read as well.
    let buffer = if cluster.major() >= 18 { 10 } else { 2 };
    // A call, how long each of its reads takes, and what another session waits for.
    for (call, milliseconds, wanted) in [
        ("plain('t')", buffer, "t"),
        ("plain('n_a')", buffer, "n"),
        ("pg_prewarm_relation('t')", buffer, "t"),
        ("pg_prewarm_relation('t', 'read')", 20, "t"),
        ("pg_prewarm_relation('t', workers => 2)", buffer, "t"),
        ("pg_prewarm_relation('t', 'read', workers => 2)", 40, "t"),
    ] {
        // Once at least, since a process may have to wait for a processor.
        let mut tried = Vec::new();
        let is_soon = (0..3).any(|_| {
            cluster.restart();
            cluster.slow_reads(0);
            cluster.sql("SELECT * FROM pg_prewarm_relation('small')");
            cluster.slow_reads(milliseconds);
            let times = times_until_locked(&cluster, call, wanted);
            let is_soon =
                times[2] < Duration::from_millis(100) && times[4] < Duration::from_secs(1);
            tried.push(times);
            is_soon
        });
        assert!(is_soon, "{call}: {tried:?}");
    }
}

#[test]
fn workers_share_the_work_and_end_with_their_caller() {
    let cluster = slow_cluster(10);
    let mut caller = Caller::of(&cluster, "postgres");
    let call = "pg_prewarm_relation('t', workers => 2)";
    const CANCEL: &str = "SELECT pg_cancel_backend(pid) FROM pg_stat_progress_prewarm \
                          WHERE kind = 'pg_prewarm_relation'";
    const WORKERS: &str = "SELECT count(*) FROM pg_stat_activity \
                           WHERE backend_type = 'parallel worker'";
    let (result, ()) = during_call(&mut caller, &cluster, call, |other| {
        wait_until("two workers and their caller to read the table", || {
            let rows: Vec<String> = other
                .query(
                    "SELECT kind || ' ' || relid::regclass || ' ' || fork \
                         FROM pg_stat_progress_prewarm \
                         WHERE datname = 'postgres' AND blocks_done > 0 ORDER BY 1",
                    &[],
                )
                .unwrap()
                .iter()
                .map(|row| row.get(0))
                .collect();
            rows == [
                "pg_prewarm worker t main",
                "pg_prewarm worker t main",
                "pg_prewarm_relation t main",
            ]
        });
        assert!(value::<bool>(other, CANCEL));
    });
    assert_eq!(
        result.unwrap_err(),
        SqlError::new("57014", "canceling statement due to user request")
    );
    let mut times: Vec<Duration> = (0..5)
        .map(|_| {
            let (_, took) = during_call(&mut caller, &cluster, call, |other| {
                wait_until("two workers", || value::<i64>(other, WORKERS) == 2);
                let start = Instant::now();
                assert!(value::<bool>(other, CANCEL));
                wait_until("the workers' end", || value::<i64>(other, WORKERS) == 0);
                start.elapsed()
            });
            took
        })
        .collect();
    times.sort();
    assert!(times[2] < Duration::from_millis(200), "{times:?}");
    // If they went on to the end of their work, each time would be one of seconds.
    assert!(times[4] < Duration::from_secs(5), "{times:?}");

    // The same with a timeout.
    caller
        .client
        .batch_execute("BEGIN; SET LOCAL statement_timeout = '300ms'")
        .unwrap();
    assert_eq!(
        caller.try_call(call).unwrap_err(),
        SqlError::new("57014", "canceling statement due to statement timeout")
    );
    caller.client.batch_execute("ROLLBACK").unwrap();
    assert_eq!(value::<i64>(&mut caller.client, WORKERS), 0);
    cluster.slow_reads(0);
    assert_eq!(caller.call(call).rows.last().unwrap().blocks, 3000);
}

#[test]
fn workers_leave_temporary_tables_to_the_caller() {
    let cluster = slow_cluster(0);
    let mut caller = Caller::of(&cluster, "postgres");
    caller
        .client
        .batch_execute(
            "SET temp_buffers = '32MB'; \
             CREATE TEMPORARY TABLE temp (id int, filler text) WITH (fillfactor = 10); \
             INSERT INTO temp SELECT g, repeat('x', 700) FROM generate_series(1, 3100) g",
        )
        .unwrap();
    // A worker claims the last run of the table before the temporary one, which is
    // short, and then looks for more.
    cluster.slow_reads(1);
    let outcome = caller.call("pg_prewarm_database(toast => false, workers => 2)");
    assert_eq!(outcome.names(), ["small", "t", "temp"]);
    let blocks: Vec<_> = outcome.rows.iter().map(|row| row.blocks).collect();
    assert_eq!(blocks, [1, 3000, 3100]);
}

#[test]
fn an_error_in_a_worker_reaches_the_caller() {
    let cluster = slow_cluster(0);
    let file: String = cluster.value("SELECT pg_relation_filepath('t')");
    cluster.stop(Shutdown::Fast);
    let mut bytes = std::fs::read(cluster.data(&file)).unwrap();
    for block in 512..3000 {
        bytes[block * 8192 + 4000] ^= 1;
    }
    std::fs::write(cluster.data(&file), bytes).unwrap();
    cluster.configure("max_parallel_workers = 2");
    for workers in [2, 100] {
        let call = format!("pg_prewarm_relation('t', toast => false, workers => {workers})");
        // As a rule the caller claims the first blocks, which are good, and is busy
        // reading them.
        let client = (0..10).find_map(|_| {
            cluster.start();
            cluster.sql("SELECT * FROM pg_prewarm_relation('small')");
            cluster.slow_reads(5);
            let mut client = cluster.connect("postgres");
            let raised = client.batch_execute(&format!("SELECT {call}")).unwrap_err();
            let raised = raised.as_db_error().unwrap();
            assert_eq!(raised.code().code(), "XX001", "{raised:?}");
            assert!(
                raised.message().starts_with("invalid page in block "),
                "{raised:?}"
            );
            cluster.slow_reads(0);
            if raised.where_() == Some("parallel worker") {
                return Some(client);
            }
            cluster.stop(Shutdown::Immediate);
            None
        });
        let mut client = client.expect("an error in a worker");
        // The transaction can continue without the call, and with other calls.
        client
            .batch_execute(&format!(
                "BEGIN; \
                 DO $$ BEGIN BEGIN PERFORM {call}; RAISE 'no error'; \
                     EXCEPTION WHEN data_corrupted THEN NULL; END; \
                     PERFORM pg_prewarm_database(catalogs => true, indexes => false, \
                                                 max_blocks => 600, workers => 2); \
                 END $$; CREATE TABLE after (id int); DROP TABLE after; COMMIT"
            ))
            .unwrap();
        cluster.stop(Shutdown::Immediate);
    }
}

#[test]
fn a_call_continues_with_fewer_workers_than_requested() {
    let cluster = cluster();
    cluster.table("t", 3000);
    let mut caller = Caller::of(&cluster, "postgres");
    for most in [0, 1] {
        let setting = format!("SET max_parallel_workers = {most}");
        caller.client.batch_execute(&setting).unwrap();
        for workers in [1, 100, 1024] {
            let outcome = caller.call(&format!("pg_prewarm_relation('t', workers => {workers})"));
            assert_eq!(outcome.rows.last().unwrap().blocks, 3000);
            assert_eq!(outcome.notices, [""; 0]);
        }
    }
}

#[test]
fn prefetching_with_direct_io_is_an_error() {
    let cluster = Cluster::build().not_preloaded().create();
    if cluster.major() < 16 {
        return;
    }
    cluster.configure("debug_io_direct = 'data'");
    if !cluster.try_start() {
        // The file system does not support it.
        assert!(cluster.log().contains("debug_io_direct is not supported"));
        return;
    }
    cluster.sql("CREATE EXTENSION pg_prewarm; CREATE TABLE t AS SELECT 1 AS a");
    let refused = SqlError::new(
        "0A000",
        "prewarm type \"prefetch\" is not supported with direct I/O",
    )
    .detail("With \"debug_io_direct\", the server bypasses the operating system's cache.")
    .hint("Use the prewarm type \"buffer\".");
    let mut client = cluster.connect("postgres");
    for call in [
        "pg_prewarm('t', 'prefetch')",
        "pg_prewarm_relation('t', 'prefetch')",
    ] {
        assert_eq!(error(&mut client, &format!("SELECT {call}")), refused);
    }
    for mode in ["read", "buffer"] {
        let call = format!("SELECT pg_prewarm('t', '{mode}')");
        assert_eq!(value::<i64>(&mut client, &call), 1);
    }
}
