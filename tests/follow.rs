//! A standby that follows its upstream server, and its promotion.

use std::net::TcpListener;
use std::process::Stdio;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use postgres::Client;

use crate::common::{
    Block, Cluster, Installation, LIST, LoadStats, Shutdown, SqlError, error, give_to_server, run,
    signal, value, wait_until,
};

/// The list of the upstream server, in the standby's data directory.
pub const UPSTREAM: &str = "autoprewarm.upstream";

/// A primary with the extensions that the tests need.
pub fn primary(settings: &[&str]) -> Cluster {
    let mut builder = Cluster::build();
    for setting in settings {
        builder = builder.setting(setting);
    }
    let primary = builder.start();
    primary.sql("CREATE EXTENSION pg_prewarm; CREATE EXTENSION pg_buffercache");
    primary
}

/// A standby that follows: when it starts, and after that only once an hour by itself.
pub fn follower_of(upstream: &Cluster) -> Cluster {
    let standby = upstream.standby();
    standby.configure(
        "pg_prewarm.autoprewarm_follow = on\n\
         pg_prewarm.autoprewarm_follow_interval = 3600\n\
         pg_prewarm.autoprewarm_follow_max_rate = 0",
    );
    standby
}

/// A pair whose standby has replayed all that the primary has written, and has fetched the
/// first list. The tables are hot.
pub fn pair(tables: &[(&str, u32)]) -> (Cluster, Cluster) {
    let primary = primary(&[]);
    for (table, blocks) in tables {
        primary.table(table, *blocks);
        heat(&primary, table);
    }
    let standby = follower_of(&primary);
    standby.start();
    standby.wait_for_replay(&primary);
    follow_now(&standby);
    (primary, standby)
}

/// The same with a standby that begins to load a hot table of 400 blocks, and is slow: at so
/// many kB a second.
pub fn slow_pair(rate: u32) -> (Cluster, Cluster, Block) {
    let primary = primary(&[]);
    let table = primary.table("t", 400);
    heat(&primary, "t");
    let standby = follower_of(&primary);
    standby.configure(&format!("pg_prewarm.autoprewarm_follow_max_rate = {rate}"));
    standby.start();
    wait_for_state(&standby, "topping up");
    standby.wait_for_replay(&primary);
    assert!(cached(&standby, table).0 < 300);
    (primary, standby, table)
}

/// Lets a slow standby load as fast as it can.
pub fn hurry(standby: &Cluster) {
    standby.configure("pg_prewarm.autoprewarm_follow_max_rate = 0");
    standby.reload();
}

/// Makes all blocks of a table hot.
pub fn heat(cluster: &Cluster, table: &str) {
    let mut client = cluster.connect("postgres");
    for _ in 0..6 {
        let _: i64 = value(&mut client, &format!("SELECT pg_prewarm('{table}')"));
    }
}

pub fn follow_now(standby: &Cluster) {
    standby.sql("SELECT autoprewarm_follow_now()");
}

/// How many blocks of a relation are cached, and the sum of their usage counts.
pub fn cached(cluster: &Cluster, table: Block) -> (i64, i64) {
    let row = cluster
        .connect("postgres")
        .query_one(
            "SELECT count(*), COALESCE(sum(usagecount), 0)::int8 FROM pg_buffercache \
             WHERE relfilenode = $1 AND relforknumber = 0",
            &[&table.filenumber],
        )
        .unwrap();
    (row.get(0), row.get(1))
}

/// What `pg_stat_autoprewarm_follow` shows: state and last error.
pub fn shown(client: &mut Client) -> (String, Option<String>) {
    let row = client
        .query_one(
            "SELECT state, last_error FROM pg_stat_autoprewarm_follow",
            &[],
        )
        .unwrap();
    (row.get(0), row.get(1))
}

pub fn wait_for_state(standby: &Cluster, state: &str) {
    let mut client = standby.connect("postgres");
    wait_until(state, || shown(&mut client).0 == state);
}

/// The error of `autoprewarm_follow_now()`.
pub fn refusal(standby: &Cluster) -> SqlError {
    error(
        &mut standby.connect("postgres"),
        "SELECT autoprewarm_follow_now()",
    )
}

/// Promotes a standby and waits until it has loaded the rest of the list.
pub fn promote(standby: &Cluster) {
    let mark = standby.log_end();
    standby.promote();
    standby.wait_for_log(mark, "blocks after the promotion;");
    assert!(standby.value::<bool>("SELECT autoprewarm_wait('1 min')"));
}

#[test]
fn a_standby_is_as_warm_as_its_primary_before_and_after_its_promotion() {
    let primary = primary(&[]);
    let (hot, cold) = (primary.table("t", 100), primary.table("cold", 50));
    heat(&primary, "t");
    let standby = follower_of(&primary);
    standby.start();
    standby.wait_for_replay(&primary);
    wait_until("the first list", || {
        standby.value("SELECT list_time IS NOT NULL FROM pg_stat_autoprewarm_follow")
    });
    follow_now(&standby);
    assert_eq!(cached(&standby, hot).0, 100);
    assert_eq!(cached(&standby, cold).0, 50);
    // Until the promotion they are worth no more than other blocks.
    assert!(
        cached(&standby, hot).1 <= 200,
        "{:?}",
        cached(&standby, hot)
    );
    let row = standby
        .connect("postgres")
        .query_one("SELECT * FROM pg_stat_autoprewarm_follow", &[])
        .unwrap();
    assert_eq!(row.get::<_, &str>("state"), "following");
    assert_eq!(row.get::<_, Option<i32>>("pid"), standby.leader());
    assert!(row.get::<_, &str>("upstream_host").contains("cluster"));
    assert_eq!(row.get::<_, i32>("upstream_port"), 5432);
    let [blocks, hot_blocks, hot_cached] =
        ["list_blocks", "hot_blocks", "hot_cached"].map(|name| row.get::<_, i64>(name));
    assert!(blocks >= 150 && hot_blocks >= 100, "{row:?}");
    assert!(hot_cached * 100 >= hot_blocks * 95, "{row:?}");
    assert!(row.get::<_, i64>("blocks_loaded") >= 100, "{row:?}");
    assert!(row.get::<_, i64>("bytes_received") > 500, "{row:?}");
    assert_eq!(row.get::<_, Option<&str>>("last_error"), None);
    assert!(standby.value::<bool>("SELECT autoprewarm_failover_ready()"));
    assert_eq!(
        primary.value::<i64>("SELECT lists_served FROM pg_stat_autoprewarm_follow"),
        2
    );

    promote(&standby);
    assert_eq!(cached(&standby, hot), (100, 500));
    assert_eq!(shown(&mut standby.connect("postgres")).0, "not a standby");
    assert!(!standby.value::<bool>("SELECT autoprewarm_failover_ready()"));
    wait_until("the dump", || standby.data(LIST).exists());
    assert!(standby.lists(hot));
    assert!(!standby.data(UPSTREAM).exists());
}

#[test]
fn what_a_slow_standby_lacks_is_loaded_at_its_promotion() {
    let (_primary, standby, table) = slow_pair(64);
    let mark = standby.log_end();
    let mut client = standby.connect("postgres");
    let request =
        std::thread::spawn(move || client.batch_execute("SELECT autoprewarm_follow_now()"));
    std::thread::sleep(Duration::from_millis(200));
    standby.promote();
    standby.wait_for_log(mark, "blocks after the promotion;");
    assert_eq!(cached(&standby, table), (400, 2000));
    assert!(request.join().unwrap().is_err());
}

#[test]
fn hot_blocks_replace_those_that_nobody_uses_and_no_others() {
    let primary = primary(&["shared_buffers = 16MB"]);
    for table in ["first", "second", "mine"] {
        primary.table(table, 500);
    }
    primary.table("filler", 3000);
    primary.sql("VACUUM");
    primary.sql("CHECKPOINT");
    let standby = follower_of(&primary);
    standby.start();
    standby.wait_for_replay(&primary);
    let file = |table| primary.file_of("postgres", table);
    let (first, second, mine) = (file("first"), file("second"), file("mine"));
    let rounds = |hot: &str, cold: &str| {
        // Out of the primary's buffers, except for what is hot.
        primary.sql("SELECT pg_prewarm('filler', first_block => 0, last_block => 1999)");
        for _ in 0..3 {
            heat(&primary, hot);
            follow_now(&standby);
            assert_eq!(cached(&standby, mine).0, 500, "{hot} after {cold}");
            // Each minute, for a follower that fetches each minute.
            standby.sql("SELECT pg_prewarm('mine')");
        }
    };
    let dirty_before = standby.value::<i64>(DIRTY);
    heat(&standby, "mine");
    // A few buffers are left to others.
    let is_cached = |table| {
        assert!(
            cached(&standby, table).0 >= 450,
            "{:?}",
            cached(&standby, table)
        )
    };
    rounds("first", "second");
    is_cached(first);
    rounds("second", "first");
    is_cached(second);
    rounds("first", "second");
    is_cached(first);
    assert!(
        standby.value::<i64>(DIRTY) >= dirty_before,
        "no dirty block is evicted"
    );
    assert!(standby.value::<i64>("SELECT blocks_replaced FROM pg_stat_autoprewarm_follow") > 0);

    // Without replacing there is no room for others.
    standby.configure("pg_prewarm.autoprewarm_follow_replace = off");
    standby.reload();
    let before = cached(&standby, second).0;
    rounds("second", "first");
    assert!(cached(&standby, second).0 <= before.max(20));
}

const DIRTY: &str = "SELECT count(*) FROM pg_buffercache WHERE isdirty";

#[test]
fn a_cascaded_standby_gets_the_list_of_the_primary() {
    let (primary, first) = pair(&[("t", 100)]);
    let table = primary.file_of("postgres", "t");
    let second = follower_of(&first);
    second.start();
    second.wait_for_replay(&first);
    follow_now(&second);
    assert_eq!(cached(&second, table).0, 100);
    let time = "SELECT list_time::text FROM pg_stat_autoprewarm_follow";
    assert_eq!(second.value::<String>(time), first.value::<String>(time));
    // On its upstream server the blocks of the list are not hot.
    let hot = "SELECT hot_blocks FROM pg_stat_autoprewarm_follow";
    assert_eq!(second.value::<i64>(hot), first.value::<i64>(hot));

    // When its upstream server is promoted, it follows that one.
    primary.stop(Shutdown::Immediate);
    promote(&first);
    follow_now(&second);
    assert!(second.value::<bool>("SELECT list_time IS NOT NULL FROM pg_stat_autoprewarm_follow"));
    promote(&second);
    assert_eq!(cached(&second, table), (100, 500));
}

#[test]
fn a_standby_without_an_upstream_list_has_none_to_pass_on() {
    let primary = primary(&[]);
    let first = follower_of(&primary);
    // It connects to nobody.
    first.configure("pg_prewarm.autoprewarm_follow_conninfo = 'host=/nowhere'");
    first.start();
    let second = follower_of(&first);
    second.configure("pg_prewarm.autoprewarm_follow_conninfo = ''");
    second.start();
    assert_eq!(
        refusal(&second).message,
        "could not follow the upstream server: the upstream server has no block list: it is \
         loading one itself, or has not fetched one yet"
    );
    assert_eq!(
        shown(&mut second.connect("postgres")).0,
        "upstream has no list"
    );
}

#[test]
fn only_replication_connections_are_shown_the_list() {
    let primary = primary(&[]);
    primary.sql("CREATE ROLE plain LOGIN; CREATE ROLE replicator LOGIN REPLICATION");
    for user in ["plain", "replicator", "postgres"] {
        let mut client = primary.connect_as(user, "postgres");
        let list = "SELECT current_setting('pg_prewarm.autoprewarm_list')";
        assert_eq!(value::<String>(&mut client, list), "", "{user}");
        let rows = "SELECT count(*) FROM pg_settings WHERE name = 'pg_prewarm.autoprewarm_list'";
        assert_eq!(value::<i64>(&mut client, rows), 0, "{user}");
        let all = client.query("SHOW ALL", &[]).unwrap();
        let is_list = |row: &postgres::Row| row.get::<_, &str>(0).contains("autoprewarm_list");
        assert!(!all.iter().any(is_list), "{user}");
        assert!(
            client
                .batch_execute("SET pg_prewarm.autoprewarm_list = 'x'")
                .is_err()
        );
    }
    let psql = |user: &str| {
        let conninfo = format!("user={user} dbname=postgres replication=true");
        primary.run_client(
            "psql",
            &["-d", &conninfo, "-Atc", "SHOW pg_prewarm.autoprewarm_list"],
        )
    };
    let list = psql("replicator");
    assert!(list.trim().len() > 200, "{list}");
    // The connection string may have a password.
    primary.configure("pg_prewarm.autoprewarm_follow_conninfo = 'password=secret'");
    primary.reload();
    let mut client = primary.connect_as("plain", "postgres");
    let conninfo = "SHOW pg_prewarm.autoprewarm_follow_conninfo";
    wait_until("the reload", || {
        primary.value::<String>(conninfo) == "password=secret"
    });
    assert_eq!(error(&mut client, conninfo).sqlstate, "42501");
}

#[test]
fn following_writes_no_wal() {
    let (primary, standby) = pair(&[("t", 100)]);
    primary.sql("CHECKPOINT");
    // Nothing writes WAL without a reason: autovacuum is off, and the snapshots that the
    // background writer logs come after changes.
    let position = "SELECT pg_current_wal_insert_lsn()::text";
    // One of these comes up to 15 seconds later.
    wait_until("fetches without WAL", || {
        let before = primary.value::<String>(position);
        for _ in 0..3 {
            follow_now(&standby);
        }
        primary.value::<String>(position) == before
    });
    wait_until("the end of the fetch", || {
        let names = "SELECT string_agg(application_name, ',') FROM pg_stat_replication";
        primary.value::<String>(names) == "walreceiver"
    });
}

#[test]
fn a_fetch_is_not_taken_for_a_synchronous_standby() {
    let (primary, standby) = pair(&[("t", 100)]);
    primary.configure("synchronous_standby_names = 'ANY 1 (*)'");
    primary.reload();
    // Commits wait once the checkpointer has seen it, which it has when it does this.
    primary.sql("CHECKPOINT");
    // What a fetch does, but for longer.
    let conninfo = format!(
        "host={} user=postgres replication=true application_name=pg_prewarm",
        primary.path("").display()
    );
    let mut psql = Installation::ours().program("psql");
    let mut fetch = psql
        .args([
            "-c",
            "SHOW pg_prewarm.autoprewarm_list",
            "-f",
            "-",
            &conninfo,
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut client = primary.connect("postgres");
    let state = "SELECT coalesce(max(sync_state), 'none') FROM pg_stat_replication \
                 WHERE application_name = 'pg_prewarm'";
    wait_until("the fetch", || {
        value::<String>(&mut client, state) != "none"
    });
    assert_eq!(value::<String>(&mut client, state), "async");
    follow_now(&standby);
    primary.sql("CREATE TABLE committed ()");

    let receiver: i32 = standby.value("SELECT pid FROM pg_stat_wal_receiver");
    signal(receiver, libc::SIGSTOP);
    std::thread::scope(|scope| {
        let commit = scope.spawn(|| primary.sql("CREATE TABLE not_yet_committed ()"));
        let waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
        wait_until("a commit that waits", || {
            value::<i64>(&mut client, waits) == 1
        });
        std::thread::sleep(Duration::from_secs(1));
        assert_eq!(value::<i64>(&mut client, waits), 1);
        assert_eq!(value::<String>(&mut client, state), "async");
        signal(receiver, libc::SIGCONT);
        commit.join().unwrap();
    });
    fetch.kill().unwrap();
    fetch.wait().unwrap();
}

#[test]
fn each_reason_for_having_no_list_is_one_clear_line() {
    let (primary, standby) = pair(&[]);
    // Clusters of one kind are copies of one, with its system identifier.
    let other = Cluster::build().checksums().start();
    let unloaded = Cluster::build().not_preloaded().start();
    let mut client = standby.connect("postgres");
    primary.sql("CREATE ROLE plain LOGIN");
    let host = |cluster: &Cluster| {
        let directory = cluster.path("");
        format!("host={} user=postgres", directory.display())
    };
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = silent.local_addr().unwrap().port();
    let swallowed = format!("host=127.0.0.1 port={port} user=postgres");
    for (conninfo, state, sqlstate, message) in [
        (
            host(&unloaded),
            "upstream has no list",
            "55000",
            "it has not preloaded this library",
        ),
        (host(&other), "refused", "55000", "its system identifier is"),
        (
            "host=/nowhere".to_owned(),
            "failed",
            "08006",
            "could not connect to the upstream server",
        ),
        (
            format!("{} user=plain", host(&primary)),
            "failed",
            "08006",
            "to start",
        ),
        (
            "nonsense".to_owned(),
            "failed",
            "42601",
            "\"pg_prewarm.autoprewarm_follow_conninfo\" cannot be parsed as a connection string",
        ),
        (
            swallowed,
            "failed",
            "08006",
            "the upstream server has not answered in time",
        ),
    ] {
        standby.configure(&format!(
            "pg_prewarm.autoprewarm_follow_conninfo = '{conninfo}'\nwal_receiver_timeout = 2s\n\
             log_error_verbosity = verbose"
        ));
        let mark = standby.log_end();
        standby.reload();
        let mut shown_conninfo = standby.connect("postgres");
        wait_until("the reload", || {
            let setting = "SHOW pg_prewarm.autoprewarm_follow_conninfo";
            value::<String>(&mut shown_conninfo, setting) == conninfo
        });
        let refused = refusal(&standby);
        // That of the last connection string may have been tried just before the reload.
        let refused = match refused.message.contains(message) {
            true => refused,
            false => refusal(&standby),
        };
        assert!(refused.message.contains(message), "{conninfo}: {refused:?}");
        let (shown_state, last_error) = shown(&mut client);
        assert_eq!(shown_state, state, "{conninfo}");
        assert!(last_error.unwrap().contains(message));
        let _ = refusal(&standby);
        let log = standby.log_since(mark);
        // The server's own has the same timeout.
        let log: Vec<_> = log
            .lines()
            .filter(|line| !line.starts_with("walreceiver["))
            .collect();
        let log = log.join("\n");
        let primary =
            format!("WARNING:  {sqlstate}: autoprewarm could not follow the upstream server: ");
        let lines = log
            .lines()
            .filter(|line| line.contains(&primary) && line.contains(message));
        assert_eq!(lines.count(), 1, "{conninfo}:\n{log}");
        // A fetch that hangs is cancelled, and its worker ends as others do.
        for other in ["terminating", "exited with exit code 1", "canceling"] {
            assert!(!log.contains(other), "{conninfo}:\n{log}");
        }
    }
    // It goes on as soon as it can.
    standby.configure("pg_prewarm.autoprewarm_follow_conninfo = ''");
    standby.reload();
    wait_for_state(&standby, "following");
    follow_now(&standby);
}

#[test]
fn a_list_that_is_altered_or_of_another_server_is_refused() {
    let (primary, standby) = pair(&[("t", 10)]);
    // Without this library, the setting may be one of the user's own, which has the same value
    // each time: a list without an end.
    let other = Cluster::build().not_preloaded().start();
    standby.configure(&format!(
        "pg_prewarm.autoprewarm_follow_conninfo = 'host={} user=postgres'",
        other.path("").display()
    ));
    let list = std::fs::read(standby.data(UPSTREAM)).unwrap();
    let altered = |line: &str, other_value: &str| {
        let text = String::from_utf8_lossy(&list);
        let start = text.find(line).unwrap() + line.len();
        let end = start
            + list[start..]
                .iter()
                .position(|&byte| byte == b'\n')
                .unwrap();
        [&list[..start], other_value.as_bytes(), &list[end..]].concat()
    };
    let encoded = |bytes: &[u8]| STANDARD.encode(bytes);
    for (value, message) in [
        ("not base64".to_owned(), "Invalid symbol"),
        (
            encoded(b"something else\n\n"),
            "its format is not supported",
        ),
        (
            encoded(&altered("upstream list ", "0")),
            "its format is not supported",
        ),
        (
            encoded(&altered("system_identifier ", "7")),
            "its system identifier is 7",
        ),
        (encoded(&altered("timeline ", "0")), "its timeline is 0"),
        (
            encoded(&altered("block_size ", "4096")),
            "its block size is 4096",
        ),
        (
            encoded(&altered("blocks ", "2000000000")),
            "it has an invalid record",
        ),
        (encoded(&list), "it is longer than it says"),
    ] {
        other.configure(&format!("pg_prewarm.autoprewarm_list = '{value}'"));
        other.restart();
        standby.reload();
        wait_until("the refusal", || {
            let refused = refusal(&standby);
            refused.message.contains(message)
        });
        assert_eq!(
            shown(&mut standby.connect("postgres")).0,
            "refused",
            "{message}"
        );
        assert!(
            std::fs::read(standby.data(UPSTREAM)).unwrap() == list,
            "{message}"
        );
    }
    drop(primary);
}

#[test]
fn a_wrong_password_is_told_and_is_in_no_log() {
    let (primary, standby) = pair(&[]);
    primary.sql("CREATE ROLE follower LOGIN REPLICATION PASSWORD 'right'");
    let rules = "local replication follower scram-sha-256\nlocal all all trust\n\
                 local replication all trust\n";
    std::fs::write(primary.data("pg_hba.conf"), rules).unwrap();
    primary.reload();
    let conninfo = |password: &str| {
        let host = primary.path("");
        let conninfo = format!("host={} user=follower password={password}", host.display());
        standby.configure(&format!(
            "pg_prewarm.autoprewarm_follow_conninfo = '{conninfo}'"
        ));
        standby.reload();
    };
    conninfo("wr0ng");
    wait_until("the refusal", || {
        let refused = refusal(&standby);
        refused.message.contains("password authentication failed")
    });
    let (state, last_error) = shown(&mut standby.connect("postgres"));
    assert_eq!(state, "failed");
    assert!(!last_error.unwrap().contains("wr0ng"));
    // The server itself logs what has changed in its configuration.
    let others = || -> Vec<String> {
        let log = standby.log();
        let lines = log.lines().filter(|line| line.contains("wr0ng"));
        lines
            .filter(|line| !line.contains("parameter"))
            .map(str::to_owned)
            .collect()
    };
    assert_eq!(others(), Vec::<String>::new());
    // libpq quotes what it cannot parse.
    standby.configure(
        "pg_prewarm.autoprewarm_follow_conninfo = 'postgresql://follower:wr0ng%zz@nowhere/'",
    );
    standby.reload();
    wait_until("the refusal", || {
        let refused = refusal(&standby);
        refused.message.contains("cannot be parsed")
    });
    let (_, last_error) = shown(&mut standby.connect("postgres"));
    assert!(!last_error.unwrap().contains("wr0ng"));
    assert_eq!(others(), Vec::<String>::new());
    conninfo("right");
    wait_for_state(&standby, "following");
    follow_now(&standby);
}

#[test]
fn no_slot_for_a_walsender_is_not_fatal_for_replication() {
    let (primary, standby) = pair(&[]);
    primary.configure("max_wal_senders = 1");
    primary.restart();
    wait_until("replication", || {
        primary.value("SELECT count(*) = 1 FROM pg_stat_replication")
    });
    let refused = refusal(&standby);
    assert!(
        refused
            .message
            .contains("number of requested standby connections exceeds"),
        "{refused:?}"
    );
    primary.sql("CREATE TABLE t ()");
    standby.wait_for_replay(&primary);
}

#[test]
fn a_damaged_file_is_ignored_and_replaced() {
    let (primary, standby) = pair(&[("t", 100)]);
    let good = std::fs::read(standby.data(UPSTREAM)).unwrap();
    let mut altered = good.clone();
    *altered.last_mut().unwrap() ^= 1;
    for damaged in [
        &b""[..],
        b"<<1>>\n1,2,3,0,4\n",
        &good[..good.len() / 2],
        &altered,
    ] {
        std::fs::write(standby.data(UPSTREAM), damaged).unwrap();
        standby.restart();
        follow_now(&standby);
        assert!(std::fs::read(standby.data(UPSTREAM)).unwrap().len() > good.len() / 2);
    }
    // At the promotion it is no worse than none.
    std::fs::write(standby.data(UPSTREAM), &altered).unwrap();
    let mark = standby.log_end();
    standby.promote();
    standby.wait_for_log(
        mark,
        "file \"autoprewarm.upstream\" cannot be used: its checksum does not match",
    );
    assert_eq!(cached(&standby, primary.file_of("postgres", "t")).0, 100);
}

#[test]
fn the_functions_say_why_they_cannot_do_it() {
    let (primary, standby) = pair(&[]);
    assert_eq!(
        refusal(&primary),
        SqlError::new("55000", "this server is not a standby")
    );
    standby.configure("pg_prewarm.autoprewarm_follow = off");
    standby.reload();
    wait_for_state(&standby, "off");
    assert_eq!(
        refusal(&standby),
        SqlError::new("55000", "autoprewarm does not follow the upstream server")
            .hint("Set \"pg_prewarm.autoprewarm_follow\" to on, and reload the configuration.")
    );
    assert!(!standby.value::<bool>("SELECT autoprewarm_failover_ready(0, '100 years')"));
    let mut client = standby.connect("postgres");
    assert_eq!(
        error(&mut client, "SELECT autoprewarm_failover_ready(1.1)"),
        SqlError::new("22023", "coverage must be between 0 and 1")
    );
    assert_eq!(
        error(&mut client, "SELECT autoprewarm_failover_ready(1, '-1 s')"),
        SqlError::new("22023", "max_age must not be negative")
    );
    // A promotion without following loads nothing.
    standby.promote();
    wait_until("the promotion", || {
        !standby.value::<bool>("SELECT pg_is_in_recovery()")
    });
    wait_for_state(&standby, "not a standby");
    assert!(!standby.log().contains("after the promotion"));
}

#[test]
fn readiness_is_a_matter_of_coverage_and_age() {
    let (_primary, standby, _) = slow_pair(8);
    let ready = |arguments: &str| {
        standby.value::<bool>(&format!("SELECT autoprewarm_failover_ready({arguments})"))
    };
    assert!(!ready(""));
    assert!(ready("0"));
    hurry(&standby);
    wait_for_state(&standby, "following");
    assert!(ready(""));
    assert!(ready("max_age => '1 min'"));
    assert!(!ready("max_age => '0 s'"));
}

#[test]
fn following_goes_on_after_its_processes_were_killed() {
    let (_primary, mut standby, table) = slow_pair(64);
    // The leader ends; the next one follows.
    let leader = standby.leader().unwrap();
    let mut client = standby.connect("postgres");
    let request =
        std::thread::spawn(move || client.batch_execute("SELECT autoprewarm_follow_now()"));
    std::thread::sleep(Duration::from_millis(200));
    signal(leader, libc::SIGTERM);
    assert!(request.join().unwrap().is_err());
    hurry(&standby);
    wait_until("the next leader", || {
        let mut client = standby.connect("postgres");
        let started = client.batch_execute("SELECT autoprewarm_start_worker()");
        started.is_ok()
    });
    follow_now(&standby);
    assert_eq!(cached(&standby, table).0, 400);
    // The whole server crashes.
    standby.expect_crash();
    let leader = standby.leader().unwrap();
    signal(leader, libc::SIGKILL);
    wait_until("the restart", || {
        standby
            .log()
            .contains("terminating any other active server processes")
    });
    standby.wait_for_leader();
    follow_now(&standby);
    assert_eq!(cached(&standby, table).0, 400);
    promote(&standby);
    assert_eq!(cached(&standby, table), (400, 2000));
}

/// Promotes a standby, and returns how long a session of the role `app` takes to begin then.
fn time_to_connect_after_promotion(standby: &Cluster) -> Duration {
    let mark = standby.log_end();
    standby.promote();
    // It is held as soon as the load is pending, and this comes after that.
    standby.wait_for_log(mark, "autoprewarm loads the block list");
    let start = Instant::now();
    drop(standby.connect_as("app", "postgres"));
    start.elapsed()
}

#[test]
fn new_sessions_can_be_held_after_a_promotion() {
    let (primary, standby, table) = slow_pair(8);
    primary.sql("CREATE ROLE app LOGIN");
    standby.wait_for_replay(&primary);
    standby.configure(
        "pg_prewarm.autoprewarm_max_rate = 400kB\n\
         pg_prewarm.autoprewarm_hold_connections = 30s",
    );
    standby.reload();
    // Nobody waits on the standby.
    drop(standby.connect_as("app", "postgres"));
    // It waited for at least a second's worth of blocks.
    let took = time_to_connect_after_promotion(&standby);
    assert!(took > Duration::from_millis(500), "{took:?}");
    assert_eq!(cached(&standby, table).0, 400);
}

#[test]
fn a_promotion_holds_nobody_if_all_hot_blocks_are_cached_already() {
    let primary = primary(&[]);
    let hot = primary.table("hot", 100);
    let cold = primary.table("cold", 2000);
    primary.sql("CREATE ROLE app LOGIN");
    primary.stop(Shutdown::Fast);
    primary.write_list("<<0>>\n");
    primary.start();
    heat(&primary, "hot");
    primary.sql("SELECT pg_prewarm('cold')");
    let standby = follower_of(&primary);
    standby.configure(
        "pg_prewarm.autoprewarm_follow_max_rate = 400kB\n\
         pg_prewarm.autoprewarm_max_rate = 8\n\
         pg_prewarm.autoprewarm_hold_connections = 30s",
    );
    standby.start();
    standby.wait_for_replay(&primary);
    wait_until("the hot blocks", || cached(&standby, hot).0 == 100);
    let took = time_to_connect_after_promotion(&standby);
    assert!(took < Duration::from_secs(10), "{took:?}");
    assert!(cached(&standby, cold).0 < 2000);
}

#[test]
fn a_former_primary_that_comes_back_as_a_standby_follows() {
    let (primary, standby) = pair(&[("t", 100)]);
    primary.stop(Shutdown::Fast);
    promote(&standby);
    // A switchover leaves nothing to rewind.
    std::fs::write(primary.data("standby.signal"), "").unwrap();
    give_to_server(&primary.data("standby.signal"));
    primary.configure(&format!(
        "primary_conninfo = 'host={} user=postgres'\npg_prewarm.autoprewarm_follow = on",
        standby.path("").display()
    ));
    primary.start();
    primary.wait_for_replay(&standby);
    follow_now(&primary);
    let table = standby.file_of("postgres", "t");
    assert_eq!(cached(&primary, table).0, 100);
    // And back.
    standby.stop(Shutdown::Fast);
    promote(&primary);
    assert_eq!(cached(&primary, table).0, 100);
}

#[test]
fn commands_that_replay_needs_the_relation_for_are_not_kept_waiting() {
    let primary = primary(&["allow_in_place_tablespaces = on"]);
    primary.sql("CREATE TABLESPACE space LOCATION ''");
    let commands = [
        ("t", "TRUNCATE t"),
        ("u", "VACUUM FULL u"),
        ("v", "DROP TABLE v"),
        (
            "w",
            "ALTER TABLE w SET TABLESPACE pg_default; DROP TABLESPACE space",
        ),
    ];
    let mut tables: Vec<(Block, &str)> = Vec::new();
    for (name, command) in commands {
        primary.table(name, 400);
        if name == "w" {
            primary.sql("ALTER TABLE w SET TABLESPACE space");
        }
        tables.push((primary.file_of("postgres", name), command));
        heat(&primary, name);
    }
    primary.sql("CREATE DATABASE doomed");
    primary.table_of_blocks("doomed", "d", 400);
    let standby = follower_of(&primary);
    standby.configure("pg_prewarm.autoprewarm_follow_max_rate = 320");
    standby.start();
    let mut client = standby.connect("postgres");
    let replay = |command: &str| {
        for statement in command.split("; ") {
            primary.sql(statement);
            let start = Instant::now();
            standby.wait_for_replay(&primary);
            let took = start.elapsed();
            // Promised are 100 ms. A load that did not give way would go on for longer than this.
            assert!(took < Duration::from_millis(2500), "{statement}: {took:?}");
        }
    };
    // Each while a worker is connected to the database, or is in the middle of the table.
    wait_until("a worker", || {
        value(
            &mut client,
            "SELECT count(*) > 0 FROM pg_stat_activity WHERE datname = 'doomed'",
        )
    });
    replay("DROP DATABASE doomed");
    wait_until("parts of each table", || {
        let is_partly_cached =
            |&(table, _): &(Block, &str)| (1..150).contains(&cached(&standby, table).0);
        if let Some(at) = tables.iter().position(is_partly_cached) {
            replay(tables.remove(at).1);
        }
        tables.is_empty()
    });
    hurry(&standby);
    follow_now(&standby);
}

#[test]
fn no_dirty_block_is_evicted_for_the_list() {
    let primary = primary(&["shared_buffers = 16MB", "autovacuum = off"]);
    let names = ["t1", "t2", "t3", "t4", "t5"];
    let tables = names.map(|name| primary.table(name, 100));
    primary.table("other", 2000);
    primary.sql("CHECKPOINT");
    let standby = follower_of(&primary);
    // The background writer would write dirty blocks as well.
    standby.configure("bgwriter_lru_maxpages = 0\ncheckpoint_timeout = 1d");
    standby.start();
    primary.table("written", 1700);
    // The server writes this to pg_control before it writes a block that is younger.
    let consistent = "SELECT min_recovery_end_lsn::text FROM pg_control_recovery()";
    let dirty = "SELECT count(*) FROM pg_buffercache \
                 WHERE isdirty AND relfilenode = pg_relation_filenode('written')";
    let state = || {
        (
            standby.value::<i64>(dirty),
            standby.value::<String>(consistent),
        )
    };
    // Any session, and a worker that is just starting, may evict a dirty block when it reads a
    // catalog: so not each round can be without a loss.
    let mut rounds = Vec::new();
    let is_without_loss = names.iter().zip(tables).any(|(name, table)| {
        // More dirty blocks than can be left if those of the list are loaded. What replay itself
        // has evicted, it reads again.
        wait_until("dirty blocks", || {
            primary.sql("SELECT FROM written FOR UPDATE");
            standby.wait_for_replay(&primary);
            standby.value::<i64>(dirty) > 1600
        });
        let before = state();
        heat(&primary, name);
        follow_now(&standby);
        let loaded = cached(&standby, table).0;
        let after = state();
        let is_without_loss = loaded > 0 && after.0 >= before.0 && after.1 == before.1;
        rounds.push((before, loaded, after));
        is_without_loss
    });
    assert!(is_without_loss, "{rounds:?}");
    // Any session evicts dirty blocks.
    let before = state();
    standby.sql("SELECT pg_prewarm('other')");
    assert!(state().0 < before.0);
}

#[test]
fn loading_slows_down_while_replay_lags() {
    let primary = primary(&["shared_buffers = 64MB", "max_wal_size = 1GB"]);
    let table = primary.table("t", 3000);
    heat(&primary, "t");
    let standby = follower_of(&primary);
    standby.configure("pg_prewarm.autoprewarm_follow = off");
    standby.start();
    standby.wait_for_replay(&primary);
    let before = cached(&standby, table).0;
    standby.sql("SELECT pg_wal_replay_pause()");
    primary.sql(
        "SELECT pg_logical_emit_message(false, 'test', repeat('x', 1000000)) \
         FROM generate_series(1, 80)",
    );
    let position: String = primary.value("SELECT pg_current_wal_flush_lsn()::text");
    wait_until("the WAL", || {
        standby.value(&format!("SELECT pg_last_wal_receive_lsn() >= '{position}'"))
    });
    // Without the lag it would take six seconds.
    standby.configure(
        "pg_prewarm.autoprewarm_follow_max_rate = 4MB\npg_prewarm.autoprewarm_follow = on",
    );
    standby.reload();
    wait_for_state(&standby, "topping up");
    std::thread::sleep(Duration::from_secs(8));
    let loaded = cached(&standby, table).0 - before;
    assert!(loaded < 1500, "{loaded}");
    standby.sql("SELECT pg_wal_replay_resume()");
    hurry(&standby);
    follow_now(&standby);
    assert_eq!(cached(&standby, table).0, 3000);
}

#[test]
fn a_promotion_during_the_standbys_own_load_is_noticed_at_once() {
    let primary = primary(&[]);
    let table = primary.table("t", 400);
    heat(&primary, "t");
    let standby = follower_of(&primary);
    standby.start();
    standby.wait_for_replay(&primary);
    follow_now(&standby);
    // Its own list takes minutes.
    standby.configure("pg_prewarm.autoprewarm_max_rate = 8");
    standby.restart();
    let mark = standby.log_end();
    let mut client = standby.connect("postgres");
    wait_until("the load", || {
        let state = "SELECT state FROM pg_stat_autoprewarm";
        value::<String>(&mut client, state) == "loading"
    });
    standby.configure("pg_prewarm.autoprewarm_max_rate = 0");
    standby.promote();
    // A reload comes after the promotion, so that the own load is not what ends soon.
    let start = Instant::now();
    standby.wait_for_log(mark, "autoprewarm loads the block list");
    assert!(start.elapsed() < Duration::from_secs(10));
    standby.reload();
    standby.wait_for_log(mark, "blocks after the promotion;");
    assert_eq!(cached(&standby, table), (400, 2000));
}

#[test]
fn a_load_after_a_promotion_that_is_interrupted_is_done_after_the_next_start() {
    for how in [Shutdown::Fast, Shutdown::Immediate] {
        let (_primary, standby, table) = slow_pair(8);
        standby.configure("pg_prewarm.autoprewarm_max_rate = 8");
        standby.reload();
        let mark = standby.log_end();
        standby.promote();
        standby.wait_for_log(mark, "autoprewarm loads the block list");
        // Until it has ended, it is pending.
        assert!(!standby.value::<bool>("SELECT autoprewarm_wait('0')"));
        standby.stop(how);
        assert!(standby.data(UPSTREAM).exists());
        standby.configure("pg_prewarm.autoprewarm_max_rate = 0");
        let mark = standby.log_end();
        standby.start();
        standby.wait_for_log(mark, "blocks after the promotion;");
        assert_eq!(cached(&standby, table), (400, 2000), "{how:?}");
        wait_until("the end of the list", || !standby.data(UPSTREAM).exists());
    }
}

#[test]
fn a_top_up_that_takes_longer_than_the_interval_is_replaced_quietly() {
    let primary = primary(&[]);
    let table = primary.table("t", 400);
    heat(&primary, "t");
    let standby = follower_of(&primary);
    // It takes five seconds.
    standby.configure(
        "pg_prewarm.autoprewarm_follow_interval = 1\n\
         pg_prewarm.autoprewarm_follow_max_rate = 640",
    );
    standby.start();
    wait_until("all blocks", || cached(&standby, table).0 == 400);
    let log = standby.log();
    let fetches = log.matches("starting background worker process \"autoprewarm follower\"");
    assert!(fetches.count() >= 3, "{log}");
    for sign in ["FATAL", "WARNING", "exited with exit code 1"] {
        assert!(!log.contains(sign), "{log}");
    }
}

#[test]
fn a_standby_that_crashes_while_it_loads_for_the_list_gives_that_up() {
    let (_primary, mut standby, table) = slow_pair(8);
    standby.expect_crash();
    let mark_file = standby.data("pg_stat_tmp/autoprewarm.following");
    for _ in 0..3 {
        wait_for_state(&standby, "topping up");
        wait_until("the mark", || mark_file.exists());
        standby.stop(Shutdown::Immediate);
        standby.start();
    }
    wait_for_state(&standby, "failed");
    let (_, why) = shown(&mut standby.connect("postgres"));
    assert_eq!(
        why.as_deref(),
        Some("the server crashed during the last 3 loads for the upstream server's list")
    );
    // A session that asks for it gets it.
    hurry(&standby);
    follow_now(&standby);
    assert_eq!(cached(&standby, table).0, 400);
    assert!(!mark_file.exists());
}

#[test]
fn a_former_primary_that_was_rewound_and_a_new_standby_follow() {
    let primary = primary(&["wal_log_hints = on", "wal_keep_size = 1GB"]);
    primary.table("t", 100);
    heat(&primary, "t");
    let standby = follower_of(&primary);
    standby.start();
    standby.wait_for_replay(&primary);
    follow_now(&standby);
    promote(&standby);
    standby.sql("CHECKPOINT");
    primary.sql("CREATE TABLE diverged ()");
    primary.stop(Shutdown::Fast);
    let source = format!(
        "host={} user=postgres dbname=postgres",
        standby.path("").display()
    );
    let mut rewind = Installation::ours().program("pg_rewind");
    rewind.arg("--target-pgdata").arg(primary.data(""));
    run(rewind.args(["--source-server", &source]));
    // It has copied the configuration, too.
    std::fs::write(primary.data("postgresql.auto.conf"), "").unwrap();
    let signal = primary.data("standby.signal");
    std::fs::write(&signal, "").unwrap();
    give_to_server(&signal);
    primary.configure(&format!(
        "unix_socket_directories = '{}'\nprimary_conninfo = '{source}'\n\
         pg_prewarm.autoprewarm_follow = on",
        primary.path("").display()
    ));
    primary.start();
    primary.wait_for_replay(&standby);
    let table = standby.file_of("postgres", "t");
    let new = follower_of(&standby);
    new.start();
    for server in [&primary, &new] {
        follow_now(server);
        assert_eq!(cached(server, table).0, 100);
    }
    promote(&primary);
    assert_eq!(cached(&primary, table), (100, 500));
}

#[test]
fn a_promotion_without_a_list_does_not_end_the_load_of_the_own_one() {
    let (_primary, standby) = pair(&[("t", 400)]);
    let table = standby.file_of("postgres", "t");
    standby.configure(
        "pg_prewarm.autoprewarm_follow_conninfo = 'host=/nowhere'\n\
         pg_prewarm.autoprewarm_max_rate = 800",
    );
    standby.stop(Shutdown::Fast);
    std::fs::remove_file(standby.data(UPSTREAM)).unwrap();
    let mark = standby.log_end();
    standby.start();
    standby.promote();
    standby.wait_for_load(mark);
    let interrupted = "SELECT skipped_interrupted FROM pg_stat_autoprewarm";
    assert_eq!(standby.value::<i64>(interrupted), 0);
    assert_eq!(cached(&standby, table).0, 400);
}

#[test]
fn a_call_right_after_the_start_waits_for_the_leader() {
    let (_primary, standby) = pair(&[("t", 100)]);
    for _ in 0..5 {
        standby.restart();
        follow_now(&standby);
    }
    // It finds no slot, which nobody can tell from one that has not started yet.
    let primary = primary(&["max_worker_processes = 0"]);
    let standby = follower_of(&primary);
    standby.start();
    standby.wait_for_replay(&primary);
    let start = Instant::now();
    let refused = refusal(&standby);
    assert_eq!(refused.message, "autoprewarm leader is not running");
    let waited = start.elapsed();
    assert!(waited >= Duration::from_secs(5), "{waited:?}");
    // The first call has waited for it already.
    let start = Instant::now();
    refusal(&standby);
    let waited = start.elapsed();
    assert!(waited < Duration::from_secs(5), "{waited:?}");
}

#[test]
fn a_server_that_is_loading_its_own_list_gives_none() {
    let (primary, standby) = pair(&[("t", 400)]);
    let good = std::fs::read(standby.data(UPSTREAM)).unwrap();
    primary.configure("pg_prewarm.autoprewarm_max_rate = 8");
    primary.restart();
    LoadStats::wait_for(&mut primary.connect("postgres"), |stats| {
        stats.state == "loading"
    });
    let refused = refusal(&standby);
    assert!(
        refused.message.contains("it is loading one itself"),
        "{refused:?}"
    );
    assert_eq!(std::fs::read(standby.data(UPSTREAM)).unwrap(), good);
    assert!(primary.value::<bool>("SELECT autoprewarm_cancel()"));
    follow_now(&standby);
}
