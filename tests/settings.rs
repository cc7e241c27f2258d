//! The settings, how the leader follows them, and its signals.

use std::thread::sleep;
use std::time::Duration;

use postgres::Client;

use crate::common::{
    Cluster, Installation, LIST, Shutdown, SqlError, error, signal, value, wait_until,
};

/// The settings in `pg_settings`, without their descriptions.
fn shown(client: &mut Client) -> Vec<String> {
    value(
        client,
        "SELECT coalesce(array_agg(concat_ws(' ', name, vartype, setting, unit, context, \
                                             min_val || '..' || max_val, boot_val, reset_val, \
                                             source, category, pg_settings_get_flags(name)) \
                                   ORDER BY name), '{}') \
         FROM pg_settings WHERE name LIKE 'pg\\_prewarm.%'",
    )
}

const AUTOPREWARM: &str = "pg_prewarm.autoprewarm bool on postmaster on on default \
                           Customized Options {}";
const FOLLOW: [&str; 5] = [
    "pg_prewarm.autoprewarm_follow bool off sighup off off default Customized Options {}",
    "pg_prewarm.autoprewarm_follow_conninfo string  sighup   default Customized Options {}",
    "pg_prewarm.autoprewarm_follow_interval integer 60 s sighup 1..2147483 60 60 default \
     Customized Options {}",
    "pg_prewarm.autoprewarm_follow_max_rate integer 32768 kB sighup 0..2147483647 32768 32768 \
     default Customized Options {}",
    "pg_prewarm.autoprewarm_follow_replace bool on sighup on on default Customized Options {}",
];
const HOLD: &str = "pg_prewarm.autoprewarm_hold_connections integer 0 ms sighup 0..60000 0 0 \
                    default Customized Options {}";
const INTERVAL: &str = "pg_prewarm.autoprewarm_interval integer 300 s sighup 0..2147483 300 300 \
                        default Customized Options {}";

const MAX_RATE: &str = "pg_prewarm.autoprewarm_max_rate integer 0 kB sighup 0..2147483647 0 0 \
                        default Customized Options {}";

const WORKERS: &str = "pg_prewarm.autoprewarm_workers integer 8 sighup 1..64 8 8 default \
                       Customized Options {}";

#[test]
fn each_setting_is_defined_if_it_can_have_an_effect() {
    let only_ours = [&FOLLOW[..], &[HOLD, MAX_RATE, WORKERS]].concat();
    let installations = [
        (Some(Installation::ours()), &only_ours[..]),
        (Installation::contrib(), &[]),
    ];
    for (installation, only_ours) in installations {
        let Some(installation) = installation else {
            eprintln!("contrib's settings are not compared: there is no contrib");
            continue;
        };
        let build = || Cluster::build().installation(installation.clone());
        let preloaded = build().start();
        let sorted = |expected: &[&'static str]| {
            let mut all = [expected, only_ours].concat();
            all.sort_unstable();
            all
        };
        assert_eq!(
            shown(&mut preloaded.connect("postgres")),
            sorted(&[AUTOPREWARM, INTERVAL])
        );

        // Without preloading, a setting exists once the library has been loaded.
        let lazy = build().not_preloaded().start();
        let mut client = lazy.connect("postgres");
        assert_eq!(shown(&mut client), [""; 0]);
        client.batch_execute("LOAD 'pg_prewarm'").unwrap();
        assert_eq!(shown(&mut client), sorted(&[INTERVAL]));
        assert_eq!(
            error(&mut client, "SHOW pg_prewarm.autoprewarm"),
            SqlError::new(
                "42704",
                "unrecognized configuration parameter \"pg_prewarm.autoprewarm\""
            )
        );
    }
}

#[test]
fn a_session_cannot_change_a_setting() {
    let cluster = Cluster::build().start();
    let mut client = cluster.connect("postgres");
    let fixed = |message: &str| SqlError::new("55P02", message);
    for (sql, expected) in [
        (
            "SET pg_prewarm.autoprewarm_interval = 5",
            fixed("parameter \"pg_prewarm.autoprewarm_interval\" cannot be changed now"),
        ),
        (
            "SET pg_prewarm.autoprewarm = off",
            fixed(
                "parameter \"pg_prewarm.autoprewarm\" cannot be changed without restarting the \
                 server",
            ),
        ),
        (
            "SET pg_prewarm.unknown = 1",
            SqlError::new(
                "42602",
                "invalid configuration parameter name \"pg_prewarm.unknown\"",
            )
            .detail("\"pg_prewarm\" is a reserved prefix."),
        ),
    ] {
        assert_eq!(error(&mut client, sql), expected, "{sql}");
    }
}

/// Values that each setting must reject, and the beginning of the server's message.
const BAD_VALUES: [(&str, &str, &str); 10] = [
    (
        "autoprewarm_interval",
        "-1",
        "-1 s is outside the valid range for parameter \"pg_prewarm.autoprewarm_interval\" (0 ",
    ),
    (
        "autoprewarm_interval",
        "2147484",
        "2147484 s is outside the valid range for parameter \"pg_prewarm.autoprewarm_interval\" (0 ",
    ),
    (
        "autoprewarm_interval",
        "soon",
        "invalid value for parameter \"pg_prewarm.autoprewarm_interval\": \"soon\"",
    ),
    (
        "autoprewarm_interval",
        "1kB",
        "invalid value for parameter \"pg_prewarm.autoprewarm_interval\": \"1kB\"",
    ),
    (
        "autoprewarm",
        "maybe",
        "parameter \"pg_prewarm.autoprewarm\" requires a Boolean value",
    ),
    (
        "autoprewarm_max_rate",
        "-1",
        "-1 kB is outside the valid range for parameter \"pg_prewarm.autoprewarm_max_rate\" (0 ",
    ),
    (
        "autoprewarm_max_rate",
        "3TB",
        "invalid value for parameter \"pg_prewarm.autoprewarm_max_rate\": \"3TB\"",
    ),
    (
        "autoprewarm_max_rate",
        "1s",
        "invalid value for parameter \"pg_prewarm.autoprewarm_max_rate\": \"1s\"",
    ),
    (
        "autoprewarm_workers",
        "0",
        "0 is outside the valid range for parameter \"pg_prewarm.autoprewarm_workers\" (1 ",
    ),
    (
        "autoprewarm_workers",
        "65",
        "65 is outside the valid range for parameter \"pg_prewarm.autoprewarm_workers\" (1 ",
    ),
];

#[test]
fn alter_system_rejects_bad_values_and_accepts_good_ones() {
    let cluster = Cluster::build().start();
    let mut client = cluster.connect("postgres");
    for (setting, bad, message) in BAD_VALUES {
        let raised = error(
            &mut client,
            &format!("ALTER SYSTEM SET pg_prewarm.{setting} = '{bad}'"),
        );
        assert_eq!(raised.sqlstate, "22023", "{raised:?}");
        assert!(raised.message.starts_with(message), "{raised:?}");
    }
    for (value_set, shown) in [("2min", "2min"), ("2147483", "2147483s"), ("0", "0")] {
        client
            .batch_execute(&format!(
                "ALTER SYSTEM SET pg_prewarm.autoprewarm_interval = '{value_set}'"
            ))
            .unwrap();
        cluster.reload();
        wait_until("the reload", || {
            value::<String>(&mut client, "SHOW pg_prewarm.autoprewarm_interval") == shown
        });
    }

    client
        .batch_execute("ALTER SYSTEM SET pg_prewarm.autoprewarm = off")
        .unwrap();
    cluster.reload();
    wait_until("the reload", || {
        value(
            &mut client,
            "SELECT pending_restart FROM pg_settings WHERE name = 'pg_prewarm.autoprewarm'",
        )
    });
    cluster.wait_for_leader();
    cluster.restart();
    assert_eq!(cluster.leader(), None);
}

#[test]
fn bad_values_in_the_configuration_are_reported_and_the_old_ones_stay() {
    let cluster = Cluster::build()
        .setting("pg_prewarm.autoprewarm_interval = 77")
        .start();
    let leader = cluster.wait_for_leader();
    let mark = cluster.log_end();
    // The last line of a setting counts, so each value needs its own reload.
    for (setting, bad, message) in BAD_VALUES {
        cluster.configure(&format!("pg_prewarm.{setting} = '{bad}'"));
        cluster.reload();
        cluster.wait_for_log(mark, message);
    }
    let mut client = cluster.connect("postgres");
    assert_eq!(
        value::<String>(&mut client, "SHOW pg_prewarm.autoprewarm_interval"),
        "77s"
    );
    assert_eq!(cluster.leader(), Some(leader));

    // A server that starts with bad values uses the defaults.
    let mark = cluster.log_end();
    cluster.restart();
    let mut client = cluster.connect("postgres");
    for (setting, default) in [
        ("autoprewarm_interval", "5min"),
        ("autoprewarm", "on"),
        ("autoprewarm_max_rate", "0"),
        ("autoprewarm_workers", "8"),
    ] {
        let show = format!("SHOW pg_prewarm.{setting}");
        assert_eq!(value::<String>(&mut client, &show), default);
    }
    let log = cluster.log_since(mark);
    for last in [3, 4, 7, 9] {
        let (_, _, message) = BAD_VALUES[last];
        let warning = format!("WARNING:  {message}");
        assert!(log.contains(&warning), "no {warning}:\n{log}");
    }
    cluster.wait_for_leader();
}

#[test]
fn an_unknown_setting_with_our_prefix_causes_a_warning_if_preloaded() {
    let cluster = Cluster::build()
        .setting("pg_prewarm.autoprewarm_intervall = 5")
        .start();
    let log = cluster.log();
    assert!(
        log.contains(
            "WARNING:  invalid configuration parameter name \
             \"pg_prewarm.autoprewarm_intervall\", removing it"
        ),
        "{log}"
    );
    assert!(
        log.contains("DETAIL:  \"pg_prewarm\" is now a reserved prefix."),
        "{log}"
    );
    cluster.wait_for_leader();

    let mark = cluster.log_end();
    cluster.configure("pg_prewarm.autoprewarm_interval = 5");
    cluster.reload();
    wait_until("the reload", || {
        cluster.value::<String>("SHOW pg_prewarm.autoprewarm_interval") == "5s"
    });
    let log = cluster.log_since(mark);
    assert!(!log.contains("ERROR"), "{log}");

    let lazy = Cluster::build()
        .not_preloaded()
        .setting("pg_prewarm.autoprewarm_intervall = 5")
        .start();
    lazy.sql("LOAD 'pg_prewarm'");
    let log = lazy.log();
    assert!(!log.contains("WARNING"), "{log}");
}

const DUMPED: &str = "wrote block details";

/// How many times the list has been written since `mark`.
fn dumps_since(cluster: &Cluster, mark: usize) -> usize {
    cluster.log_since(mark).matches(DUMPED).count()
}

#[test]
fn the_list_is_dumped_every_interval_and_a_reload_changes_that_at_once() {
    let cluster = Cluster::build().start();
    let set = |interval: &str| {
        let mark = cluster.log_end();
        cluster.configure(&format!(
            "pg_prewarm.autoprewarm_interval = {interval} # {mark}"
        ));
        cluster.reload();
        mark
    };
    // From five minutes to a second, and from never to a second.
    for former in ["5min", "0"] {
        set(former);
        let mark = set("1s");
        wait_until("two dumps", || dumps_since(&cluster, mark) >= 2);
    }

    // Each dump lists what is cached at that time.
    cluster.sql("CREATE TABLE late AS SELECT 1 AS a");
    let file = cluster.file_of("postgres", "late");
    wait_until("a list with the new table", || cluster.lists(file));
    // A dump may be under way.
    wait_until("no unfinished list", || {
        !cluster.data(&format!("{LIST}.tmp")).exists()
    });
}

#[test]
fn an_interval_of_zero_dumps_at_shutdown_only() {
    let cluster = Cluster::build()
        .setting("pg_prewarm.autoprewarm_interval = 1")
        .start();
    cluster.wait_for_log(0, DUMPED);
    let leader = cluster.wait_for_leader();
    cluster.configure("pg_prewarm.autoprewarm_interval = 0");
    cluster.reload();
    wait_until("the server's reload", || {
        cluster.value::<String>("SHOW pg_prewarm.autoprewarm_interval") == "0"
    });
    wait_until("the leader's reload", || {
        let mark = cluster.log_end();
        sleep(Duration::from_millis(1500));
        dumps_since(&cluster, mark) == 0
    });
    // Waking the leader does not make it dump either.
    let mark = cluster.log_end();
    for _ in 0..3 {
        signal(leader, libc::SIGHUP);
        signal(leader, libc::SIGUSR1);
    }
    cluster.sql("CREATE TABLE t AS SELECT 1 AS a");
    let table = cluster.file_of("postgres", "t");
    std::thread::sleep(std::time::Duration::from_secs(1));
    assert_eq!(dumps_since(&cluster, mark), 0);
    cluster.stop(Shutdown::Fast);
    // The leader may have seen that the server was stopping before it was terminated.
    let dumps = dumps_since(&cluster, mark);
    assert!((1..=2).contains(&dumps), "{dumps}");
    assert!(cluster.lists(table));
}

#[test]
fn if_switched_off_there_is_no_leader_and_the_list_is_neither_read_nor_written() {
    let cluster = Cluster::build()
        .setting("pg_prewarm.autoprewarm = off")
        .setting("pg_prewarm.autoprewarm_interval = 1")
        .start();
    cluster.stop(Shutdown::Fast);
    assert!(!cluster.data(LIST).exists());

    let list = "<<1>>\n1,1663,1,0,0\n";
    cluster.write_list(list);
    cluster.start();
    cluster.stop(Shutdown::Fast);
    assert_eq!(cluster.list(), list);
    assert_eq!(dumps_since(&cluster, 0), 0);
    let log = cluster.log();
    assert!(!log.contains("autoprewarm leader"), "{log}");
}

#[test]
fn the_leader_is_shown_without_a_database_and_does_not_hold_back_vacuum() {
    let cluster = Cluster::build()
        .setting("pg_prewarm.autoprewarm_interval = 1")
        .start();
    cluster.wait_for_log(0, DUMPED);
    // On 17 and later, wait events of extensions have names.
    let wait_event = match Installation::ours().major() {
        17.. => "AutoprewarmLeaderMain",
        _ => "Extension",
    };
    wait_until("the leader's row", || {
        cluster.value::<Vec<String>>(
            "SELECT array_agg(concat_ws(' ', backend_type, datname, backend_xmin, \
                                        xact_start, NULLIF(query, ''), wait_event_type, \
                                        wait_event)) \
             FROM pg_stat_activity WHERE backend_type LIKE '%autoprewarm%'",
        ) == [format!("autoprewarm leader Extension {wait_event}")]
    });
}

#[test]
fn the_leader_ignores_a_cancel() {
    let cluster = Cluster::build().start();
    let leader = cluster.wait_for_leader();
    let mark = cluster.log_end();
    assert!(cluster.value::<bool>(&format!("SELECT pg_cancel_backend({leader})")));
    cluster.configure("pg_prewarm.autoprewarm_interval = 1");
    cluster.reload();
    cluster.wait_for_log(mark, DUMPED);
    assert_eq!(cluster.leader(), Some(leader));
    let log = cluster.log_since(mark);
    assert!(!log.contains("ERROR") && !log.contains("WARNING"), "{log}");
}

#[test]
fn a_terminated_leader_dumps_and_does_not_return_until_it_is_started_again() {
    let cluster = Cluster::build()
        .setting("pg_prewarm.autoprewarm_interval = 0")
        .start();
    cluster.sql("CREATE EXTENSION pg_prewarm; CREATE TABLE t AS SELECT 1 AS a");
    let table = cluster.file_of("postgres", "t");
    let leader = cluster.wait_for_leader();
    let mark = cluster.log_end();
    assert!(cluster.value::<bool>(&format!("SELECT pg_terminate_backend({leader}, 60000)")));
    assert_eq!(dumps_since(&cluster, mark), 1);
    assert!(cluster.lists(table));
    cluster.wait_for_log(mark, "exited with exit code 0");
    assert_eq!(cluster.leader(), None);

    // The next leader does not load again.
    cluster.sql("SELECT autoprewarm_start_worker()");
    let next = cluster.wait_for_leader();
    assert_ne!(next, leader);
    cluster.sql("CREATE TABLE later AS SELECT 1 AS a");
    let later = cluster.file_of("postgres", "later");
    cluster.stop(Shutdown::Fast);
    assert!(cluster.lists(later));
    assert!(!cluster.log_since(mark).contains("previously-loaded"));
}
