//! A standby that loads while it replays: what the primary does conflicts with the
//! load, and the standby is promoted during it. Or it follows its primary, while the
//! processes of both that this needs are terminated, and is promoted at some moment; the
//! former primary may follow it then, and take over again. If nothing is disturbed, the
//! standby must become as warm as the primary.

use postgres::NoTls;
use rand::Rng;

use super::arena::{Arena, BUFFERS, DATABASES, has_amcheck};
use super::census::Census;
use super::check::{amcheck_of, check_at_rest, check_census, check_log, wait_for_zero};
use super::churn::{self, Churn};
use super::list::List;
use super::process;
use crate::common::{Cluster, Fault, LIST, LoadStats, Shutdown, give_to_server, value, wait_until};

pub const FAULTS: &[super::Kind] = &[
    ("promotion", promotion),
    ("recovery-conflicts", conflicts),
    ("following", following),
];

/// A standby with the primary's list, which it loads slowly.
fn slow_standby(arena: &mut Arena) -> Cluster {
    // Blocks whose relation replay locks or drops are loaded later, or skipped.
    arena.round.allowed.push("due to conflict with recovery");
    arena.settle();
    let mut standby = arena.cluster.standby();
    standby.expect_crash();
    let delay = arena.round.choose(&["0", "30s"]);
    standby.configure(&format!("max_standby_streaming_delay = {delay}"));
    standby.write_list(arena.cluster.list());
    let milliseconds = arena.round.choose(&[2, 5, 10]);
    standby.set_fault(Fault::ReadDelay, milliseconds);
    standby.start();
    arena.round.pause(400);
    standby
}

/// The load must have ended, and the standby must have the primary's content.
fn check_standby(arena: &Arena, standby: &Cluster) {
    standby.set_fault(Fault::ReadDelay, 0);
    standby.configure("max_standby_streaming_delay = -1");
    standby.reload();
    let mut client = standby.connect("postgres");
    assert!(value::<bool>(
        &mut client,
        "SELECT autoprewarm_wait('30 s')"
    ));
    let stats = LoadStats::get(&mut client);
    assert_eq!(stats.result(), "completed");
    assert_eq!(
        stats.loaded + stats.cached + stats.skipped,
        stats.total,
        "{stats:?}"
    );
    let is_standby: bool = value(&mut client, "SELECT pg_is_in_recovery()");
    if is_standby {
        standby.wait_for_replay(&arena.cluster);
        for table in arena.tables.iter().filter(|table| !table.unlogged) {
            let mut client = standby.connect(table.database);
            let sql = format!("SELECT count(*) FROM {}", table.name);
            assert_eq!(
                value::<i64>(&mut client, &sql),
                table.high - table.low,
                "{table:?}"
            );
        }
    }
    let checked = match is_standby && arena.round.is_busy {
        true => ANCHORS,
        false => ALL,
    };
    check_pages(standby, checked);
    check_at_rest(standby);
    let missing = arena.missing_anchors(&standby.cached_without_extension());
    assert_eq!(missing, 0, "blocks that nothing was done to are not cached");
    standby.stop(Shutdown::Fast);
    process::wait_for_none(&standby.data(""));
    let list = List::read(&standby.data(LIST));
    let missing = arena.missing_anchors(&list.blocks);
    assert_eq!(missing, 0, "blocks that the standby's list lacks");
    check_log(&standby.log(), &arena.round);
}

/// Which tables and indexes amcheck looks at: a condition on `pg_class`. The others come and
/// go while sessions are busy.
const ALL: &str = "true";
const ANCHORS: &str = "c.relname LIKE 'anchor%'";

/// The tables and indexes must be sound.
fn check_pages(server: &Cluster, which: &str) {
    if has_amcheck(server) {
        for database in DATABASES {
            amcheck_of(&mut server.connect(database), which);
        }
    }
}

fn promotion(arena: &mut Arena) {
    let standby = slow_standby(arena);
    // A query could conflict with replay.
    let leader = || process::named(&standby.data(""), "autoprewarm leader");
    wait_until("the leader", || !leader().is_empty());
    let before = leader();
    standby.promote();
    wait_until("the promotion", || {
        let mut client = standby.config().connect(NoTls).unwrap();
        let row = client.query_one("SELECT pg_is_in_recovery()", &[]);
        row.is_ok_and(|row| !row.get::<_, bool>(0))
    });
    assert_eq!(leader(), before, "the promotion cost the leader");
    standby.sql("CREATE TABLE own AS SELECT 1; CHECKPOINT");
    check_standby(arena, &standby);
}

fn conflicts(arena: &mut Arena) {
    let standby = slow_standby(arena);
    let mut churn = vec![Churn::begin(arena, churn::rewrites, 2)];
    if arena.round.coin() {
        churn.push(Churn::begin(arena, churn::databases, 1));
        arena.round.allowed.push("does not exist");
    }
    arena.work();
    arena.round.pause(1500);
    for churn in churn {
        churn.end();
    }
    check_standby(arena, &standby);
}

fn following(arena: &mut Arena) {
    let round = &mut arena.round;
    round.allowed.push("due to conflict with recovery");
    round.allowed.push("could not follow the upstream server");
    arena.settle();
    let is_quiet = !arena.round.is_busy && arena.round.coin() && is_warm(arena);
    let mut standby = arena.cluster.standby();
    standby.expect_crash();
    let rates: &[&str] = match is_quiet {
        true => &["0", "8MB"],
        false => &["0", "1MB", "64kB"],
    };
    let rate = arena.round.choose(rates);
    standby.configure(&format!(
        "pg_prewarm.autoprewarm_follow_interval = 1\n\
         pg_prewarm.autoprewarm_follow_max_rate = {rate}"
    ));
    if is_quiet {
        // Nothing but the primary's list warms it.
        std::fs::remove_file(standby.data(LIST)).unwrap();
    }
    let mut census = Census::default();
    let follow = "pg_prewarm.autoprewarm_follow = on";
    if arena.round.coin() {
        standby.start();
        check_census(&mut census, &standby, wait_for_rest(&standby));
        standby.configure(follow);
        standby.reload();
    } else {
        standby.configure(follow);
        standby.start();
    }
    if is_quiet {
        arena.work();
        wait_until("a standby that is as warm as its primary", || {
            standby.value("SELECT autoprewarm_failover_ready(0.9)")
        });
    } else {
        disturb(arena, &standby);
    }
    wait_for_list(&standby);
    let is_switchover = arena.round.coin();
    if is_switchover {
        // The standby gets all WAL, if it is connected.
        wait_until("replication", || {
            let standbys = "SELECT count(*) = 1 FROM pg_stat_replication WHERE state = 'streaming'";
            arena.cluster.value(standbys)
        });
        arena.cluster.stop(Shutdown::Fast);
    } else {
        arena.round.pause(1000);
    }
    promote(&standby);
    let leader = wait_for_rest(&standby);
    check_census(&mut census, &standby, leader);
    check_files(&standby);
    if is_switchover {
        rejoin(arena, &standby);
    } else {
        let senders = "SELECT count(*) FROM pg_stat_replication \
                       WHERE application_name = 'pg_prewarm'";
        wait_for_zero(&arena.cluster, "fetches that have not ended", senders);
    }
    check_standby(arena, &standby);
    if is_switchover {
        promote(&arena.cluster);
        arena.reset("primary_conninfo");
        arena.reset("pg_prewarm.autoprewarm_follow");
        arena.reset("pg_prewarm.autoprewarm_follow_interval");
        arena.reload();
    }
}

/// Whether the primary has all anchors cached, and no more than a standby has room for.
fn is_warm(arena: &Arena) -> bool {
    let cached = arena.cluster.cached_without_extension();
    arena.missing_anchors(&cached) == 0 && (cached.len() as i64) < BUFFERS - 1000
}

/// Terminates what following needs, again and again.
fn disturb(arena: &mut Arena, standby: &Cluster) {
    let churn = arena
        .round
        .coin()
        .then(|| Churn::begin(arena, churn::rewrites, 2));
    let checked = match churn.is_some() || arena.round.is_busy {
        true => ANCHORS,
        false => ALL,
    };
    arena.work();
    for _ in 0..arena.round.rng.random_range(2..8) {
        arena.round.pause(600);
        let (primary, follower) = (arena.cluster.data(""), standby.data(""));
        let victims = match arena.round.rng.random_range(0..5) {
            0 => process::named(&follower, "autoprewarm follower"),
            1 => process::named(&follower, "autoprewarm worker"),
            2 => process::named(&primary, "walsender"),
            3 => {
                standby.reload();
                Vec::new()
            }
            _ => {
                let how = arena.round.choose(&[Shutdown::Fast, Shutdown::Immediate]);
                standby.stop(how);
                standby.start();
                Vec::new()
            }
        };
        for pid in victims {
            process::signal(pid, libc::SIGTERM);
        }
        check_pages(standby, checked);
    }
    if let Some(churn) = churn {
        churn.end();
    }
}

/// Waits until nothing is loaded, and returns the leader's process ID.
fn wait_for_rest(server: &Cluster) -> i32 {
    assert!(server.value::<bool>("SELECT autoprewarm_wait('30 s')"));
    server.wait_for_leader()
}

/// A server that was promoted must have no file of ours but its list.
fn check_files(server: &Cluster) {
    let files = || -> Vec<String> {
        ["", "pg_stat_tmp"]
            .iter()
            .flat_map(|directory| std::fs::read_dir(server.data(directory)).unwrap())
            .map(|file| file.unwrap().file_name().into_string().unwrap())
            .filter(|name| name.starts_with("autoprewarm."))
            .collect()
    };
    wait_until("no file but the list", || files() == [LIST]);
}

fn wait_for_list(follower: &Cluster) {
    wait_until("a list", || {
        follower.value("SELECT list_time IS NOT NULL FROM pg_stat_autoprewarm_follow")
    });
}

/// Promotes a standby that has a list, and waits until it has loaded the rest of that.
fn promote(standby: &Cluster) {
    let mut client = standby.connect("postgres");
    standby.promote();
    wait_until("the load after the promotion", || {
        !standby.data("autoprewarm.upstream").exists()
            && value(&mut client, "SELECT autoprewarm_wait('0')")
    });
}

/// The former primary, which was shut down, becomes a standby of the new one, and follows.
fn rejoin(arena: &mut Arena, primary: &Cluster) {
    let signal = arena.cluster.data("standby.signal");
    std::fs::write(&signal, "").unwrap();
    give_to_server(&signal);
    let conninfo = format!("'host={} user=postgres'", primary.path("").display());
    arena.set("primary_conninfo", &conninfo);
    arena.set("pg_prewarm.autoprewarm_follow", "on");
    arena.set("pg_prewarm.autoprewarm_follow_interval", "1");
    arena.cluster.start();
    primary.sql("CREATE TABLE own AS SELECT generate_series(1, 1000); DROP TABLE own");
    arena.cluster.wait_for_replay(primary);
    check_pages(&arena.cluster, ALL);
    wait_for_list(&arena.cluster);
}
