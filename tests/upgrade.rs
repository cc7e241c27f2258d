//! Coming from contrib's module, and going back to it: what databases, data
//! folders and lists made with one are like with the other.

use std::collections::BTreeSet;

use postgres::Client;

use crate::common::{Block, Cluster, Installation, Shutdown, error, value};

/// The installation with contrib's module; nothing, with a note, where there is
/// none to compare with.
fn contrib() -> Option<Installation> {
    let contrib = Installation::contrib();
    if contrib.is_none() {
        println!("no installation with contrib's module: nothing compared");
    }
    contrib
}

/// Everything that the catalogs hold of the extension, its functions and views, in this
/// database, but for OIDs and the extension's version.
pub fn objects(client: &mut Client) -> Vec<String> {
    value(
        client,
        "WITH extension AS (SELECT * FROM pg_extension WHERE extname = 'pg_prewarm'), \
              depending AS (SELECT d.* FROM pg_depend d, extension e \
                            WHERE refclassid = 'pg_extension'::regclass AND refobjid = e.oid), \
              function AS (SELECT p.* FROM pg_proc p JOIN depending d \
                           ON classid = 'pg_proc'::regclass AND objid = p.oid), \
              row(line) AS ( \
         SELECT (to_jsonb(e) - 'oid' - 'extversion')::text FROM extension e \
         UNION ALL SELECT (to_jsonb(p) - 'oid' - 'proargdefaults')::text FROM function p \
         UNION ALL SELECT pg_get_functiondef(p.oid) FROM function p \
         UNION ALL SELECT concat_ws(' ', 'view:', c.oid::regclass, relowner, relacl, \
                                    pg_get_viewdef(c.oid)) \
             FROM pg_class c JOIN depending ON classid = 'pg_class'::regclass AND objid = c.oid \
         UNION ALL SELECT format('comment: %s', description) FROM pg_description \
             WHERE objoid IN (SELECT oid FROM extension UNION SELECT oid FROM function) \
         UNION ALL SELECT format('first rights: %s %s', proname, initprivs) \
             FROM pg_init_privs i JOIN function p \
             ON objoid = p.oid AND classoid = 'pg_proc'::regclass \
         UNION ALL SELECT format('depends: %s %s', deptype, \
                                 pg_describe_object(classid, objid, objsubid)) FROM depending) \
         SELECT array_agg(line ORDER BY line) FROM row",
    )
}

fn version(client: &mut Client) -> String {
    value(
        client,
        "SELECT extversion FROM pg_extension WHERE extname = 'pg_prewarm'",
    )
}

#[test]
fn every_old_version_has_a_way_to_the_new_one() {
    let cluster = Cluster::build().not_preloaded().start();
    let mut client = cluster.connect("postgres");
    assert_eq!(
        value::<Vec<String>>(
            &mut client,
            "SELECT array_agg(source || ': ' || path ORDER BY source) \
             FROM pg_extension_update_paths('pg_prewarm') \
             WHERE target = '2.0' AND path IS NOT NULL"
        ),
        [
            "1.0: 1.0--1.1--1.2--2.0",
            "1.1: 1.1--1.2--2.0",
            "1.2: 1.2--2.0"
        ]
    );
    assert_eq!(
        value::<Vec<String>>(
            &mut client,
            "SELECT array_agg(concat_ws(' ', a.default_version, v.version, superuser, trusted, \
                                        relocatable, requires, v.comment) ORDER BY v.version) \
             FROM pg_available_extension_versions v JOIN pg_available_extensions a USING (name) \
             WHERE name = 'pg_prewarm'"
        ),
        ["1.1", "1.2", "2.0"].map(|version| format!("2.0 {version} t f t prewarm relation data"))
    );
}

#[test]
fn an_updated_extension_is_the_same_as_a_new_one() {
    let cluster = Cluster::build().start();
    let mut client = cluster.connect("postgres");
    client.batch_execute("CREATE EXTENSION pg_prewarm").unwrap();
    let fresh = objects(&mut client);
    assert_eq!(version(&mut client), "2.0");
    assert!(
        fresh.iter().filter(|line| line.contains("proacl")).count() >= 3,
        "{fresh:#?}"
    );

    // Version 1.0 was one function, not marked as parallel safe; no script makes
    // it any more.
    let make_1_0 = "CREATE EXTENSION pg_prewarm VERSION '1.1'; \
                    ALTER FUNCTION pg_prewarm PARALLEL UNSAFE; \
                    SET allow_system_table_mods = on; \
                    UPDATE pg_extension SET extversion = '1.0' WHERE extname = 'pg_prewarm'";
    for (old, make) in [
        ("1.0", make_1_0),
        ("1.1", "CREATE EXTENSION pg_prewarm VERSION '1.1'"),
        ("1.2", "CREATE EXTENSION pg_prewarm VERSION '1.2'"),
    ] {
        client.batch_execute("DROP EXTENSION pg_prewarm").unwrap();
        client.batch_execute(make).unwrap();
        assert_eq!(version(&mut client), old);
        assert_ne!(objects(&mut client), fresh, "{old}");
        assert!(value::<i64>(&mut client, "SELECT pg_prewarm('pg_class')") > 0);
        client
            .batch_execute("ALTER EXTENSION pg_prewarm UPDATE")
            .unwrap();
        assert_eq!(version(&mut client), "2.0");
        assert_eq!(objects(&mut client), fresh, "from {old}");
        assert!(value::<i64>(&mut client, "SELECT pg_prewarm('pg_class')") > 0);
    }
}

#[test]
fn an_update_keeps_what_was_granted_to_a_role() {
    let cluster = Cluster::build().start();
    cluster.sql(
        "CREATE ROLE operator LOGIN; CREATE ROLE plain LOGIN; \
         CREATE EXTENSION pg_prewarm VERSION '1.2'; \
         GRANT EXECUTE ON FUNCTION autoprewarm_dump_now TO operator",
    );
    let dump = "SELECT autoprewarm_dump_now()";
    let mut operator = cluster.connect_as("operator", "postgres");
    let mut plain = cluster.connect_as("plain", "postgres");
    assert!(value::<i64>(&mut operator, dump) > 0);
    assert!(value::<i64>(&mut plain, dump) > 0);
    cluster.sql("ALTER EXTENSION pg_prewarm UPDATE");
    assert!(value::<i64>(&mut operator, dump) > 0);
    assert_eq!(error(&mut plain, dump).sqlstate, "42501");
}

#[test]
fn an_old_version_made_today_is_what_contrib_makes() {
    let Some(contrib) = contrib() else { return };
    let ours = Cluster::build().not_preloaded().start();
    let theirs = Cluster::build()
        .not_preloaded()
        .installation(contrib)
        .start();
    for version in ["1.1", "1.2"] {
        let [ours, theirs] = [&ours, &theirs].map(|cluster| {
            cluster.sql(&format!("CREATE EXTENSION pg_prewarm VERSION '{version}'"));
            let objects = objects(&mut cluster.connect("postgres"));
            cluster.sql("DROP EXTENSION pg_prewarm");
            objects
        });
        assert_eq!(ours, theirs, "{version}");
    }
}

/// Tables and indexes, logged and not, whose blocks are cached in part; returns
/// what is cached.
fn fill(cluster: &Cluster) -> BTreeSet<Block> {
    cluster.sql(
        "CREATE TABLE t AS \
         SELECT g AS id, repeat('x', 500) AS filler FROM generate_series(1, 3000) g; \
         CREATE INDEX t_id ON t (id); \
         CREATE UNLOGGED TABLE u AS SELECT * FROM t",
    );
    cluster.sql("VACUUM t");
    cluster.cached()
}

/// Stops the server, starts it with that installation, and waits for the load of
/// the list, which must be complete. Returns what is cached then.
fn restart_with(cluster: &mut Cluster, installation: &Installation) -> BTreeSet<Block> {
    cluster.stop(Shutdown::Fast);
    cluster.switch_to(installation.clone());
    let records = cluster.listed().len() as u64;
    let mark = cluster.log_end();
    cluster.start();
    assert_eq!(cluster.wait_for_load(mark), (records, records));
    cluster.cached()
}

/// All three functions do what they are for.
fn check_functions(cluster: &Cluster) {
    let mut client = cluster.connect("postgres");
    let blocks: i64 = value(&mut client, "SELECT pg_relation_size('t') / 8192");
    assert!(blocks > 100);
    for mode in ["prefetch", "read", "buffer"] {
        let call = format!("SELECT pg_prewarm('t', '{mode}')");
        assert_eq!(value::<i64>(&mut client, &call), blocks, "{mode}");
    }
    let records: i64 = value(&mut client, "SELECT autoprewarm_dump_now()");
    assert_eq!(cluster.listed().len() as i64, records);
    let raised = error(&mut client, "SELECT autoprewarm_start_worker()");
    assert!(
        raised
            .message
            .starts_with("autoprewarm worker is already running under PID "),
        "{raised:?}"
    );
}

#[test]
fn a_data_folder_goes_from_contrib_to_ours_and_back() {
    let Some(contrib) = contrib() else { return };
    let ours = Installation::ours();
    let mut cluster = Cluster::build().installation(contrib.clone()).start();
    cluster.sql("CREATE EXTENSION pg_prewarm; CREATE ROLE plain LOGIN");
    fill(&cluster);
    check_functions(&cluster);
    let made_by_contrib = objects(&mut cluster.connect("postgres"));

    // Only the library changes: nothing in the database does.
    restart_with(&mut cluster, &ours);
    check_functions(&cluster);
    assert_eq!(version(&mut cluster.connect("postgres")), "1.2");
    assert_eq!(objects(&mut cluster.connect("postgres")), made_by_contrib);
    let dump = "SELECT autoprewarm_dump_now()";
    assert!(value::<i64>(&mut cluster.connect_as("plain", "postgres"), dump) > 0);

    // Back, with nothing to be done before.
    restart_with(&mut cluster, &contrib);
    check_functions(&cluster);

    // And again, this time for good.
    restart_with(&mut cluster, &ours);
    cluster.sql("ALTER EXTENSION pg_prewarm UPDATE");
    check_functions(&cluster);
    let mut plain = cluster.connect_as("plain", "postgres");
    assert_eq!(error(&mut plain, dump).sqlstate, "42501");
    restart_with(&mut cluster, &ours);
    check_functions(&cluster);

    // Or not: dropped before, and made anew after.
    cluster.sql("DROP EXTENSION pg_prewarm");
    restart_with(&mut cluster, &contrib);
    cluster.sql("CREATE EXTENSION pg_prewarm");
    check_functions(&cluster);
    assert_eq!(objects(&mut cluster.connect("postgres")), made_by_contrib);
}

#[test]
fn each_module_loads_all_of_the_list_that_the_other_wrote() {
    let Some(contrib) = contrib() else { return };
    let ours = Installation::ours();
    for (writer, reader) in [(&contrib, &ours), (&ours, &contrib)] {
        let mut cluster = Cluster::build().installation(writer.clone()).start();
        let before = fill(&cluster);
        let after = restart_with(&mut cluster, reader);
        let missing: Vec<_> = before.difference(&after).collect();
        assert!(missing.is_empty(), "{reader:?} lacks {missing:?}");
    }
}
