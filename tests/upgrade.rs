//! Moving from contrib's module to ours, and back: databases, data directories and
//! lists of one are used with the other.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use postgres::Client;

use crate::common::{Block, Cluster, Installation, LIST, Shutdown, error, value};

/// The installation with contrib's module. `None`, with a note, if there is none to
/// compare with.
fn contrib() -> Option<Installation> {
    let contrib = Installation::contrib();
    if contrib.is_none() {
        println!("no installation with contrib's module: nothing compared");
    }
    contrib
}

/// All objects of the extension in this database, as the catalogs describe them,
/// without OIDs and the extension's version.
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
         UNION ALL SELECT format('initial privileges: %s %s', proname, initprivs) \
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
fn the_library_and_the_names_of_its_shared_memory_have_its_version() {
    let cluster = Cluster::build().start();
    // It has attached to the shared memory.
    cluster.wait_for_leader();
    let mut client = cluster.connect("postgres");
    let is_there = |client: &mut Client, query: &str| value::<bool>(client, query);
    if cluster.major() >= 18 {
        assert!(is_there(
            &mut client,
            "SELECT EXISTS (SELECT FROM pg_get_loaded_modules() \
             WHERE (module_name, version) = ('pg_prewarm', '2.0.0'))"
        ));
    }
    let allocations = match cluster.major() {
        15 | 16 => "pg_shmem_allocations",
        // They do not show dynamic segments.
        17 | 18 => return,
        _ => "pg_dsm_registry_allocations",
    };
    assert!(is_there(
        &mut client,
        &format!("SELECT EXISTS (SELECT FROM {allocations} WHERE name = 'pg_prewarm 2.0.0')")
    ));
}

#[test]
fn every_old_version_has_an_update_path_to_the_new_one() {
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

    // Version 1.0 had one function, which was not marked as parallel safe. No script
    // creates it any more.
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

/// An extension of that name in our installation, until it is dropped: with our control
/// file and the given script as version 2.0.
struct Beside {
    files: [PathBuf; 2],
}

impl Beside {
    fn install(name: &str, script: &str) -> Self {
        let mut pg_config = Installation::ours().program("pg_config");
        let directory = pg_config.arg("--sharedir").output().unwrap().stdout;
        let directory = Path::new(String::from_utf8(directory).unwrap().trim()).join("extension");
        let files = [".control", "--2.0.sql"].map(|end| directory.join(format!("{name}{end}")));
        let control = include_str!("../pg_prewarm.control");
        for (file, text) in files.iter().zip([control, script]) {
            fs::write(file, text).unwrap();
        }
        Self { files }
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        for file in &self.files {
            let _ = fs::remove_file(file);
        }
    }
}

#[test]
fn the_base_script_is_what_pgrx_generates() {
    let generated = std::env::var_os("GENERATED_SQL").filter(|path| !path.is_empty()).expect(
        "GENERATED_SQL must name the script that pgrx generates from the library: run `make test`",
    );
    let generated = fs::read_to_string(generated).unwrap();
    let name = "pg_prewarm_as_generated";
    let _files = Beside::install(name, &generated);
    let cluster = Cluster::build().start();
    let mut client = cluster.connect("postgres");
    client.batch_execute("CREATE EXTENSION pg_prewarm").unwrap();
    let installed = objects(&mut client);
    client
        .batch_execute(&format!(
            "DROP EXTENSION pg_prewarm; CREATE EXTENSION {name}; \
             SET allow_system_table_mods = on; \
             UPDATE pg_extension SET extname = 'pg_prewarm' WHERE extname = '{name}'"
        ))
        .unwrap();
    assert_eq!(installed, objects(&mut client));
}

#[test]
fn an_update_keeps_what_was_granted_to_a_role() {
    let cluster = Cluster::build().start();
    cluster.sql(
        "CREATE ROLE operator LOGIN; CREATE ROLE plain LOGIN; \
         CREATE EXTENSION pg_prewarm VERSION '1.2'; \
         GRANT EXECUTE ON FUNCTION autoprewarm_dump_now TO operator",
    );
    // It looks for a list first.
    cluster.wait_for_leader();
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
fn an_old_version_created_today_is_the_same_as_contribs() {
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

/// Creates logged and unlogged tables and indexes, whose blocks are partly cached, and
/// returns the cached blocks.
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

/// Waits until the leader of either module is running, and ours does not use the list.
fn wait_for_leader(cluster: &Cluster) {
    let is_ours = "SELECT count(*) > 0 FROM pg_settings \
                   WHERE name = 'pg_prewarm.autoprewarm_workers'";
    if cluster.value::<bool>(is_ours) {
        cluster.wait_for_leader();
    } else {
        // Contrib's is not in pg_stat_activity.
        cluster.process_with_title("autoprewarm leader");
    }
}

/// Stops the server, starts it with that installation, and waits for the load of the
/// list, which must be complete. Returns the cached blocks.
fn restart_with(cluster: &mut Cluster, installation: &Installation) -> BTreeSet<Block> {
    // Before its first load has ended, the leader writes no list.
    wait_for_leader(cluster);
    cluster.stop(Shutdown::Fast);
    cluster.switch_to(installation.clone());
    let records = cluster.listed().len() as u64;
    let mark = cluster.log_end();
    cluster.start();
    assert_eq!(cluster.wait_for_load(mark), (records, records));
    // It does not use the list any more then.
    wait_for_leader(cluster);
    cluster.cached()
}

/// Checks that all three functions work. A list was loaded, or there was none.
fn check_functions(cluster: &Cluster) {
    wait_for_leader(cluster);
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
fn a_data_directory_can_move_from_contrib_to_ours_and_back() {
    let Some(contrib) = contrib() else { return };
    let ours = Installation::ours();
    let mut cluster = Cluster::build().installation(contrib.clone()).start();
    cluster.sql("CREATE EXTENSION pg_prewarm; CREATE ROLE plain LOGIN");
    fill(&cluster);
    check_functions(&cluster);
    let made_by_contrib = objects(&mut cluster.connect("postgres"));

    // Only the library changes, nothing in the database.
    restart_with(&mut cluster, &ours);
    check_functions(&cluster);
    assert_eq!(version(&mut cluster.connect("postgres")), "1.2");
    assert_eq!(objects(&mut cluster.connect("postgres")), made_by_contrib);
    let dump = "SELECT autoprewarm_dump_now()";
    assert!(value::<i64>(&mut cluster.connect_as("plain", "postgres"), dump) > 0);

    // Back, without any preparation.
    restart_with(&mut cluster, &contrib);
    check_functions(&cluster);

    // To ours again.
    restart_with(&mut cluster, &ours);
    cluster.sql("ALTER EXTENSION pg_prewarm UPDATE");
    check_functions(&cluster);
    let mut plain = cluster.connect_as("plain", "postgres");
    assert_eq!(error(&mut plain, dump).sqlstate, "42501");
    restart_with(&mut cluster, &ours);
    check_functions(&cluster);

    // Or the extension is dropped before and created again after.
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

/// Roles with privileges on objects of 2.0, and one without.
const GRANTS: &str =
    "CREATE ROLE operator LOGIN; CREATE ROLE viewer LOGIN; CREATE ROLE plain LOGIN";
const GRANT: &str = "GRANT EXECUTE ON FUNCTION autoprewarm_load_now(), autoprewarm_dump_now() \
        TO operator; \
    GRANT SELECT ON pg_stat_autoprewarm TO viewer; \
    GRANT EXECUTE ON FUNCTION pg_stat_get_autoprewarm() TO viewer; \
    REVOKE EXECUTE ON FUNCTION pg_prewarm FROM PUBLIC";

/// Checks that exactly the privileges of `GRANTS` and `GRANT` exist. A list was loaded, or
/// there was none.
fn check_grants(cluster: &Cluster, database: &str) {
    wait_for_leader(cluster);
    let queries = [
        "SELECT autoprewarm_dump_now()",
        "SELECT * FROM pg_stat_autoprewarm",
        "SELECT pg_prewarm('t')",
    ];
    for (role, may) in [
        ("operator", [true, false, false]),
        ("viewer", [false, true, false]),
        ("plain", [false, false, false]),
        ("postgres", [true, true, true]),
    ] {
        let mut client = cluster.connect_as(role, database);
        for (query, may) in queries.into_iter().zip(may) {
            if may {
                client.batch_execute(query).unwrap();
            } else {
                assert_eq!(
                    error(&mut client, query).sqlstate,
                    "42501",
                    "{role}: {query}"
                );
            }
        }
    }
}

#[test]
fn a_dump_of_a_database_restores_the_extension_and_the_privileges() {
    let cluster = Cluster::build().start();
    let dumped = |from: &str, to: &str| {
        let file = cluster.path("dump.sql");
        let file = file.to_str().unwrap();
        cluster.run_client("pg_dump", &["-f", file, from]);
        cluster.sql(&format!("CREATE DATABASE {to}"));
        cluster.run_client(
            "psql",
            &["-q", "-X", "-v", "ON_ERROR_STOP=1", "-f", file, to],
        );
        cluster.connect(to)
    };
    let make = |database: &str, create: &str| {
        cluster.sql(&format!("CREATE DATABASE {database}"));
        cluster.sql_in(
            database,
            &format!("CREATE TABLE t AS SELECT 1 AS a; {create}"),
        );
    };
    cluster.sql(GRANTS);

    make("new", &format!("CREATE EXTENSION pg_prewarm; {GRANT}"));
    let mut copy = dumped("new", "new_copy");
    assert_eq!(version(&mut copy), "2.0");
    assert_eq!(objects(&mut copy), objects(&mut cluster.connect("new")));
    check_grants(&cluster, "new_copy");

    // A dump names no version, so 1.2 is restored as 2.0.
    make(
        "old",
        "CREATE EXTENSION pg_prewarm VERSION '1.2'; \
         GRANT EXECUTE ON FUNCTION autoprewarm_dump_now() TO operator",
    );
    let mut copy = dumped("old", "old_copy");
    assert_eq!(version(&mut copy), "2.0");
    let dump = "SELECT autoprewarm_dump_now()";
    assert!(value::<i64>(&mut cluster.connect_as("operator", "old_copy"), dump) > 0);
    let mut plain = cluster.connect_as("plain", "old_copy");
    assert_eq!(error(&mut plain, dump).sqlstate, "42501");
}

#[test]
fn after_a_downgrade_to_1_2_a_database_works_with_contribs_library() {
    let Some(contrib) = contrib() else { return };
    let mut cluster = Cluster::build().start();
    cluster.sql(GRANTS);
    let mut client = cluster.connect("postgres");
    // In the end, only the form of privileges in the catalog differs.
    let without_privileges = |client: &mut Client| {
        let mut objects = objects(client);
        objects.retain(|line| !line.contains("proacl") && !line.starts_with("initial privileges"));
        objects
    };
    client
        .batch_execute("CREATE EXTENSION pg_prewarm VERSION '1.2'")
        .unwrap();
    let made = without_privileges(&mut client);
    client
        .batch_execute(&format!(
            "DROP EXTENSION pg_prewarm; CREATE EXTENSION pg_prewarm; {GRANT}; \
             CREATE VIEW v AS SELECT * FROM pg_stat_autoprewarm"
        ))
        .unwrap();
    fill(&cluster);

    // The downgrade does not drop what others created from the new objects.
    let back = "ALTER EXTENSION pg_prewarm UPDATE TO '1.2'";
    assert_eq!(error(&mut client, back).sqlstate, "2BP01");
    assert_eq!(version(&mut client), "2.0");
    client.batch_execute("DROP VIEW v").unwrap();
    client.batch_execute(back).unwrap();
    assert_eq!(version(&mut client), "1.2");

    assert_eq!(without_privileges(&mut client), made);
    let check_privileges = |cluster: &Cluster| {
        for (function, may) in [
            ("autoprewarm_dump_now()", true),
            ("autoprewarm_start_worker()", true),
            ("pg_prewarm(regclass,text,text,int8,int8)", false),
        ] {
            let query = format!("SELECT has_function_privilege('plain', '{function}', 'execute')");
            assert_eq!(cluster.value::<bool>(&query), may, "{function}");
        }
    };
    check_privileges(&cluster);
    check_functions(&cluster);
    restart_with(&mut cluster, &contrib);
    check_functions(&cluster);
    check_privileges(&cluster);

    // And updated again.
    restart_with(&mut cluster, &Installation::ours());
    cluster.sql("ALTER EXTENSION pg_prewarm UPDATE; GRANT SELECT ON t TO plain");
    check_functions(&cluster);
}

#[test]
fn what_is_new_in_2_0_is_an_error_with_contribs_library_and_the_rest_works() {
    let Some(contrib) = contrib() else { return };
    let mut cluster = Cluster::build().start();
    cluster.sql("CREATE EXTENSION pg_prewarm");
    fill(&cluster);
    restart_with(&mut cluster, &contrib);
    check_functions(&cluster);
    let mut client = cluster.connect("postgres");
    for (name, query) in [
        ("autoprewarm_wait", "SELECT autoprewarm_wait()"),
        (
            "pg_stat_get_autoprewarm",
            "SELECT * FROM pg_stat_autoprewarm",
        ),
        ("pg_prewarm_database", "SELECT * FROM pg_prewarm_database()"),
    ] {
        let raised = error(&mut client, query);
        assert_eq!(raised.sqlstate, "42883");
        assert!(
            raised
                .message
                .starts_with(&format!("could not find function \"{name}\" in file ")),
            "{raised:?}"
        );
    }
    // Without the new scripts, the extension can only be dropped.
    client
        .batch_execute("DROP EXTENSION pg_prewarm; CREATE EXTENSION pg_prewarm")
        .unwrap();
    assert_eq!(version(&mut client), "1.2");
    check_functions(&cluster);
}

#[test]
fn pg_upgrade_keeps_the_extension_and_a_copied_list_warms_the_new_cluster() {
    let Some(old) = Installation::old() else {
        println!("OLD_PG_CONFIG names no older PostgreSQL: pg_upgrade was not run");
        return;
    };
    let old = Cluster::build().installation(old).start();
    old.sql(GRANTS);
    old.create_tablespace("elsewhere");
    old.sql("CREATE DATABASE old");
    old.sql_in("old", "CREATE EXTENSION pg_prewarm VERSION '1.2'");
    old.sql(&format!("CREATE EXTENSION pg_prewarm; {GRANT}"));
    let tables = [
        old.table("t", 300),
        old.table("away", 100),
        old.table_of_blocks("old", "t", 200),
    ];
    old.sql("ALTER TABLE away SET TABLESPACE elsewhere; SELECT count(*) FROM away");
    let tables = [tables[0], old.file_of("postgres", "away"), tables[2]];
    // Newer versions print views in another way, and record more dependencies.
    let functions = |cluster: &Cluster, database: &str| {
        let mut objects = objects(&mut cluster.connect(database));
        objects.retain(|line| {
            !["view:", "depends:"]
                .iter()
                .any(|kind| line.starts_with(kind))
        });
        objects
    };
    let before = ["postgres", "old"].map(|database| functions(&old, database));
    for database in ["postgres", "old", "template1"] {
        // Some releases of 15 mark every column in a way that 18's pg_dump takes for an
        // option that 18 does not have.
        old.sql_in(
            database,
            "UPDATE pg_attribute SET attoptions = NULLIF(ARRAY(SELECT o FROM unnest(attoptions) o \
                                                      WHERE o NOT LIKE 'pg_attver=%'), '{}') \
             WHERE 'pg_attver' IN (SELECT split_part(o, '=', 1) FROM unnest(attoptions) o)",
        );
    }
    // Before its first load has ended, the leader writes no list.
    wait_for_leader(&old);
    old.stop(Shutdown::Fast);
    let list = old.list();
    assert!(tables.iter().all(|table| old.lists(*table)));

    // pg_upgrade starts both servers several times, without loads and dumps.
    let new = Cluster::build().create();
    assert!(old.major() < new.major());
    new.upgrade_from(&old);
    assert_eq!(old.list(), list);
    assert!(!new.data(LIST).exists());

    // Databases, tablespaces and relations have kept their numbers.
    new.write_list(&list);
    new.start();
    new.wait_for_load(0);
    let cached = new.cached();
    for (table, blocks) in tables.into_iter().zip([300, 100, 200]) {
        let missing = table.first(blocks).filter(|block| !cached.contains(block));
        assert_eq!(missing.count(), 0, "{table:?}");
    }
    let after = ["postgres", "old"].map(|database| functions(&new, database));
    assert_eq!(before, after);
    check_grants(&new, "postgres");
    for (database, is) in [("postgres", "2.0"), ("old", "1.2")] {
        let mut client = new.connect(database);
        assert_eq!(version(&mut client), is);
        assert!(value::<i64>(&mut client, "SELECT pg_prewarm('t')") > 0);
        client
            .batch_execute("ALTER EXTENSION pg_prewarm UPDATE")
            .unwrap();
        assert_eq!(version(&mut client), "2.0");
        assert!(value::<bool>(&mut client, "SELECT autoprewarm_wait()"));
    }
}
