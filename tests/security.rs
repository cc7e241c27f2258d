//! Who can call what; and that no role can read relations without privileges, or make
//! others run their functions.

use std::collections::{BTreeMap, BTreeSet};

use postgres::Client;

use crate::common::{Cluster, error, value};
use crate::upgrade::objects;

/// The outcome of a query.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    /// It returned true.
    Yes,
    /// It returned false.
    No,
    /// Permission is denied.
    Denied,
}

impl Answer {
    /// The outcome of a query that returns a boolean. Errors other than a lack of
    /// privileges count as true: the role had the privilege.
    fn to(client: &mut Client, query: &str) -> Self {
        match client.query_one(query, &[]) {
            Ok(row) if row.get(0) => Self::Yes,
            Ok(_) => Self::No,
            Err(error) => match error.as_db_error().unwrap().code().code() {
                "42501" => Self::Denied,
                "55000" => Self::Yes,
                _ => panic!("{query}: {error:?}"),
            },
        }
    }
}

/// The roles, in the order of the expected answers. `granted` has all privileges on the
/// extension's objects and on the table, whose owner is `owner`.
const ROLES: [&str; 5] = ["postgres", "monitor", "owner", "plain", "granted"];

/// Each object of the extension, a query that uses it, and the answer for each role.
const EXPECTED: [(&str, &str, [Answer; 5]); 18] = {
    use Answer::{Denied, No, Yes};
    let of_table = [Yes, Denied, Yes, Denied, Yes];
    let what_is_readable = [Yes, No, Yes, No, Yes];
    let control = [Yes, Denied, Denied, Denied, Yes];
    let monitoring = [Yes, Yes, Denied, Denied, Yes];
    [
        (
            "pg_prewarm(regclass,text,text,bigint,bigint)",
            "SELECT pg_prewarm('t') > 0",
            of_table,
        ),
        (
            "pg_prewarm_relation(regclass,text,boolean,boolean,boolean,text[],bigint,integer)",
            "SELECT count(*) > 0 FROM pg_prewarm_relation('t')",
            of_table,
        ),
        (
            "pg_prewarm_schema(regnamespace,text,boolean,boolean,text[],bigint,integer)",
            "SELECT count(*) > 0 FROM pg_prewarm_schema('public')",
            what_is_readable,
        ),
        (
            "pg_prewarm_database(text,boolean,boolean,text[],bigint,integer,boolean)",
            "SELECT count(*) > 0 FROM pg_prewarm_database()",
            what_is_readable,
        ),
        (
            "autoprewarm_start_worker()",
            "SELECT autoprewarm_start_worker() IS NOT NULL",
            control,
        ),
        (
            "autoprewarm_dump_now()",
            "SELECT autoprewarm_dump_now() > 0",
            control,
        ),
        (
            "autoprewarm_load_now()",
            "SELECT autoprewarm_load_now() IS NOT NULL",
            control,
        ),
        (
            "autoprewarm_cancel()",
            "SELECT autoprewarm_cancel() IS NOT NULL",
            control,
        ),
        (
            "autoprewarm_wait(interval)",
            "SELECT autoprewarm_wait()",
            monitoring,
        ),
        (
            "autoprewarm_blocks()",
            "SELECT count(*) > 0 FROM autoprewarm_blocks()",
            monitoring,
        ),
        (
            "pg_stat_get_autoprewarm()",
            "SELECT count(*) = 1 FROM pg_stat_get_autoprewarm()",
            monitoring,
        ),
        (
            "pg_stat_get_progress_prewarm()",
            "SELECT count(*) >= 0 FROM pg_stat_get_progress_prewarm()",
            monitoring,
        ),
        (
            "autoprewarm_follow_now()",
            "SELECT autoprewarm_follow_now() IS NOT NULL",
            control,
        ),
        (
            "autoprewarm_failover_ready(double precision,interval)",
            "SELECT NOT autoprewarm_failover_ready()",
            monitoring,
        ),
        (
            "pg_stat_get_autoprewarm_follow()",
            "SELECT count(*) = 1 FROM pg_stat_get_autoprewarm_follow()",
            monitoring,
        ),
        (
            "view pg_stat_autoprewarm_follow",
            "SELECT count(*) = 1 FROM pg_stat_autoprewarm_follow",
            monitoring,
        ),
        (
            "view pg_stat_autoprewarm",
            "SELECT count(*) = 1 FROM pg_stat_autoprewarm",
            monitoring,
        ),
        (
            "view pg_stat_progress_prewarm",
            "SELECT count(*) >= 0 FROM pg_stat_progress_prewarm",
            monitoring,
        ),
    ]
};

/// All objects of the extension, as the catalogs describe them, except the row types of
/// its views.
fn members(client: &mut Client) -> BTreeSet<String> {
    value::<Vec<String>>(
        client,
        "SELECT array_agg(CASE classid WHEN 'pg_proc'::regclass THEN objid::regprocedure::text \
                          ELSE pg_describe_object(classid, objid, objsubid) END) \
         FROM pg_depend WHERE classid <> 'pg_type'::regclass \
           AND deptype = 'e' AND refclassid = 'pg_extension'::regclass \
           AND refobjid = (SELECT oid FROM pg_extension WHERE extname = 'pg_prewarm')",
    )
    .into_iter()
    .collect()
}

#[test]
fn every_function_and_view_can_be_used_by_the_intended_roles_and_no_others() {
    let cluster = Cluster::build().start();
    cluster.sql(
        "CREATE EXTENSION pg_prewarm; SELECT autoprewarm_wait(); SELECT autoprewarm_dump_now(); \
         CREATE ROLE monitor LOGIN IN ROLE pg_monitor; CREATE ROLE owner LOGIN; \
         CREATE ROLE plain LOGIN; CREATE ROLE granted LOGIN; \
         CREATE TABLE t AS SELECT 1 AS a; ALTER TABLE t OWNER TO owner; \
         GRANT SELECT ON ALL TABLES IN SCHEMA public TO granted; \
         GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA public TO granted",
    );
    let expected: BTreeSet<String> = EXPECTED
        .iter()
        .map(|(object, ..)| (*object).to_owned())
        .collect();
    assert_eq!(members(&mut cluster.connect("postgres")), expected);
    for (index, role) in ROLES.into_iter().enumerate() {
        let mut client = cluster.connect_as(role, "postgres");
        for (object, query, answers) in EXPECTED {
            let answer = Answer::to(&mut client, query);
            assert_eq!(answer, answers[index], "{object} for {role}");
        }
    }
}

/// Relations of all kinds with several blocks each, and their indexes and TOAST tables.
const RELATIONS: &str = "CREATE SCHEMA s; GRANT USAGE ON SCHEMA s TO plain; \
    CREATE TABLE s.t (a int PRIMARY KEY, filler text); \
    ALTER TABLE s.t ALTER filler SET STORAGE EXTERNAL; \
    INSERT INTO s.t SELECT g, repeat('x', 3000) FROM generate_series(1, 500) g; \
    CREATE MATERIALIZED VIEW s.m AS SELECT * FROM s.t; CREATE SEQUENCE s.q; \
    CREATE TABLE s.top (a int, filler text) PARTITION BY RANGE (a); \
    CREATE INDEX top_a ON s.top (a); \
    CREATE TABLE s.leaf PARTITION OF s.top DEFAULT; INSERT INTO s.top SELECT * FROM s.t";

/// The number of cached blocks by relation, without catalogs.
const CACHED: &str = "SELECT c.oid::regclass::text, count(*) FROM pg_buffercache b \
    JOIN pg_class c ON pg_relation_filenode(c.oid) = b.relfilenode \
    JOIN pg_database d ON d.oid = b.reldatabase AND d.datname = current_database() \
    WHERE c.oid >= 16384 AND c.relnamespace <> 'pg_catalog'::regnamespace GROUP BY 1";

fn cached(cluster: &Cluster) -> BTreeMap<String, i64> {
    let rows = cluster.connect("postgres").query(CACHED, &[]).unwrap();
    rows.iter().map(|row| (row.get(0), row.get(1))).collect()
}

#[test]
fn no_function_reads_a_relation_without_the_select_privilege() {
    let cluster = Cluster::build().not_preloaded().start();
    cluster.sql(
        "CREATE EXTENSION pg_prewarm; CREATE EXTENSION pg_buffercache; CREATE ROLE plain LOGIN",
    );
    cluster.sql(RELATIONS);
    // Privileges that do not cover the whole table.
    cluster.sql(
        "GRANT SELECT (a) ON s.t TO plain; GRANT INSERT, UPDATE, DELETE ON s.t, s.leaf TO plain; \
         GRANT USAGE ON s.q TO plain",
    );
    let relations: Vec<u32> = value(
        &mut cluster.connect("postgres"),
        "WITH named AS (SELECT * FROM pg_class WHERE relnamespace = 's'::regnamespace), \
              toast AS (SELECT reltoastrelid AS oid FROM named WHERE reltoastrelid <> 0) \
         SELECT array_agg(oid) FROM (SELECT oid FROM named UNION ALL SELECT oid FROM toast \
             UNION ALL SELECT indexrelid FROM pg_index JOIN toast ON indrelid = oid) every",
    );
    assert_eq!(relations.len(), 14);
    // Nothing is cached then.
    cluster.restart();

    let mut plain = cluster.connect_as("plain", "postgres");
    for relation in &relations {
        for mode in ["prefetch", "read", "buffer"] {
            for call in [
                format!("pg_prewarm({relation}, '{mode}')"),
                format!("pg_prewarm_relation({relation}, '{mode}', workers => 1)"),
            ] {
                let raised = error(&mut plain, &format!("SELECT * FROM {call}"));
                assert_eq!(raised.sqlstate, "42501", "{call}: {raised:?}");
            }
        }
    }
    for call in [
        "pg_prewarm_schema('s')",
        "pg_prewarm_schema('pg_toast')",
        "pg_prewarm_database()",
        "pg_prewarm_database(workers => 1)",
    ] {
        let rows = plain.query(&format!("SELECT * FROM {call}"), &[]).unwrap();
        assert_eq!(rows.len(), 0, "{call}");
    }
    assert_eq!(cached(&cluster), BTreeMap::new());

    // The privilege on the table is enough for its indexes and TOAST table. Row
    // security policies restrict rows, and a call shows none.
    cluster.sql(
        "GRANT SELECT ON s.t TO plain; ALTER TABLE s.t ENABLE ROW LEVEL SECURITY; \
         GRANT SELECT ON s.top TO plain",
    );
    plain
        .batch_execute("SELECT * FROM pg_prewarm_schema('s')")
        .unwrap();
    assert_eq!(value::<i64>(&mut plain, "SELECT count(*) FROM s.t"), 0);
    let cached = cached(&cluster);
    for name in ["s.t", "s.t_pkey", "s.leaf", "s.leaf_a_idx"] {
        assert!(cached.contains_key(name), "{name}: {cached:?}");
    }
    assert!(cached.keys().any(|name| name.starts_with("pg_toast.")));
    for name in ["s.m", "s.q"] {
        assert!(!cached.contains_key(name), "{name}: {cached:?}");
    }
}

/// A schema of `attacker` with a namesake of everything that a script or a view could
/// look up. Each logs that it was called, and by whom.
const TRAPS: &str = "CREATE ROLE attacker LOGIN; CREATE SCHEMA evil AUTHORIZATION attacker; \
    SET ROLE attacker; SET search_path = evil; \
    CREATE TABLE evil.caught (who text, what text); \
    GRANT INSERT ON evil.caught TO PUBLIC; \
    CREATE FUNCTION evil.spring(what text) RETURNS text LANGUAGE sql AS \
        $$ INSERT INTO evil.caught SELECT current_user, what; SELECT NULL $$; \
    CREATE FUNCTION evil.same(a oid, b oid) RETURNS bool LANGUAGE sql AS \
        $$ SELECT evil.spring('='); SELECT true $$; \
    CREATE OPERATOR evil.= (LEFTARG = oid, RIGHTARG = oid, FUNCTION = evil.same); \
    CREATE FUNCTION evil.pg_stat_get_autoprewarm(VARIADIC a int[]) RETURNS SETOF record \
        LANGUAGE sql AS $$ SELECT evil.spring('statistics'); SELECT 1 $$; \
    CREATE FUNCTION evil.pg_stat_get_progress_prewarm(VARIADIC a int[]) RETURNS SETOF record \
        LANGUAGE sql AS $$ SELECT evil.spring('progress'); SELECT 1 $$; \
    CREATE FUNCTION evil.autoprewarm_dump_now(VARIADIC a int[]) RETURNS int8 \
        LANGUAGE sql AS $$ SELECT evil.spring('dump'); SELECT 1::int8 $$; \
    CREATE FUNCTION evil.autoprewarm_wait(a text DEFAULT NULL) RETURNS bool \
        LANGUAGE sql AS $$ SELECT evil.spring('wait'); SELECT true $$; \
    CREATE VIEW evil.pg_database AS SELECT 1::oid AS oid, evil.spring('pg_database') AS datname; \
    CREATE DOMAIN evil.text AS pg_catalog.text CHECK (evil.spring('text') IS NULL); \
    CREATE DOMAIN evil.int8 AS pg_catalog.int8 CHECK (evil.spring('int8') IS NULL); \
    CREATE DOMAIN evil.bool AS pg_catalog.bool CHECK (evil.spring('bool') IS NULL); \
    CREATE DOMAIN evil.oid AS pg_catalog.oid; CREATE DOMAIN evil.regclass AS pg_catalog.regclass; \
    CREATE DOMAIN evil.regnamespace AS pg_catalog.regnamespace; \
    CREATE DOMAIN evil.interval AS pg_catalog.interval; \
    CREATE DOMAIN evil.int2 AS pg_catalog.int2; \
    RESET ROLE; RESET search_path";

/// The search path of a careless superuser: the attacker's schema before the server's.
const CARELESS: &str = "SET search_path = evil, pg_catalog, public";

#[test]
fn scripts_and_calls_run_nothing_that_an_attacker_has_put_into_the_search_path() {
    let clean = Cluster::build().not_preloaded().start();
    clean.sql(
        "CREATE ROLE attacker LOGIN; CREATE SCHEMA evil AUTHORIZATION attacker; \
         CREATE EXTENSION pg_prewarm SCHEMA evil",
    );
    let clean = objects(&mut clean.connect("postgres"));

    let cluster = Cluster::build().not_preloaded().start();
    cluster.sql(TRAPS);
    let mut client = cluster.connect("postgres");
    client.batch_execute(CARELESS).unwrap();
    for steps in [
        &["CREATE EXTENSION pg_prewarm SCHEMA evil"][..],
        // The extension is created in the first schema of the path.
        &["CREATE EXTENSION pg_prewarm"],
        &[
            "CREATE EXTENSION pg_prewarm VERSION '1.1'",
            "ALTER EXTENSION pg_prewarm UPDATE TO '1.2'",
            "ALTER EXTENSION pg_prewarm UPDATE",
        ],
        &[
            "CREATE EXTENSION pg_prewarm SCHEMA public",
            "ALTER EXTENSION pg_prewarm SET SCHEMA evil",
        ],
    ] {
        for step in steps {
            client.batch_execute(step).unwrap();
        }
        assert_eq!(
            objects(&mut cluster.connect("postgres")),
            clean,
            "{steps:?}"
        );
        client.batch_execute("DROP EXTENSION pg_prewarm").unwrap();
    }

    // In another schema, called by qualified names. A view's names were resolved when
    // it was created.
    client
        .batch_execute("CREATE EXTENSION pg_prewarm SCHEMA public")
        .unwrap();
    client
        .batch_execute("CREATE TEMP TABLE pg_database (oid int)")
        .unwrap();
    client
        .batch_execute(
            "SELECT public.pg_prewarm('pg_catalog.pg_class'); \
             SELECT * FROM public.pg_prewarm_relation('pg_catalog.pg_class', workers => 1); \
             SELECT * FROM public.pg_prewarm_schema('pg_catalog'); \
             SELECT * FROM public.pg_prewarm_database(); \
             SELECT public.autoprewarm_dump_now(); \
             SELECT * FROM public.autoprewarm_blocks(); \
             SELECT public.autoprewarm_start_worker(); \
             SELECT public.autoprewarm_wait(); \
             SELECT public.autoprewarm_load_now(); \
             SELECT public.autoprewarm_cancel(); \
             SELECT * FROM public.pg_stat_autoprewarm; \
             SELECT * FROM public.pg_stat_progress_prewarm",
        )
        .unwrap();
    let caught: i64 = value(
        &mut cluster.connect("postgres"),
        "SELECT count(*) FROM evil.caught",
    );
    assert_eq!(caught, 0);
}

#[test]
fn an_object_with_the_name_of_a_function_or_view_is_not_taken_over() {
    let cluster = Cluster::build().not_preloaded().start();
    cluster.sql("CREATE ROLE attacker; CREATE SCHEMA evil AUTHORIZATION attacker");
    let mut client = cluster.connect("postgres");
    for (kind, name, definition) in [
        (
            "FUNCTION",
            "evil.autoprewarm_wait(interval)",
            "CREATE FUNCTION evil.autoprewarm_wait(interval) RETURNS bool LANGUAGE sql AS 'SELECT true'",
        ),
        (
            "FUNCTION",
            "evil.autoprewarm_dump_now()",
            "CREATE FUNCTION evil.autoprewarm_dump_now() RETURNS int8 LANGUAGE sql AS 'SELECT 1::int8'",
        ),
        (
            "VIEW",
            "evil.pg_stat_autoprewarm",
            "CREATE VIEW evil.pg_stat_autoprewarm AS SELECT 1 AS a",
        ),
    ] {
        client
            .batch_execute(&format!("SET ROLE attacker; {definition}; RESET ROLE"))
            .unwrap();
        for create in [
            "CREATE EXTENSION pg_prewarm SCHEMA evil",
            "CREATE EXTENSION pg_prewarm SCHEMA evil VERSION '1.1'; \
             ALTER EXTENSION pg_prewarm UPDATE",
        ] {
            let raised = error(&mut client, create);
            assert!(raised.message.contains("already exists"), "{raised:?}");
            client
                .batch_execute("DROP EXTENSION IF EXISTS pg_prewarm")
                .unwrap();
        }
        client
            .batch_execute(&format!("DROP {kind} {name}"))
            .unwrap();
    }
}
