//! A standby that loads while it replays: what the primary does conflicts with the
//! load, and the standby is promoted during it.

use postgres::NoTls;

use super::arena::Arena;
use super::check::check_log;
use super::churn::{self, Churn};
use super::list::List;
use super::process;
use crate::common::{Cluster, Fault, LIST, LoadStats, Shutdown, value, wait_until};

pub const FAULTS: &[super::Kind] = &[("promotion", promotion), ("recovery-conflicts", conflicts)];

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
    if value::<bool>(&mut client, "SELECT pg_is_in_recovery()") {
        let end: String = arena.cluster.value("SELECT pg_current_wal_lsn()::text");
        wait_until("the standby", || {
            value(
                &mut client,
                &format!("SELECT pg_last_wal_replay_lsn() >= '{end}'"),
            )
        });
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
    let cached = standby.cached_without_extension();
    let missing = arena
        .anchors
        .iter()
        .filter(|block| !cached.contains(block))
        .count();
    assert_eq!(missing, 0, "blocks that nothing was done to are not cached");
    standby.stop(Shutdown::Fast);
    process::wait_for_none(&standby.data(""));
    let list = List::read(&standby.data(LIST));
    let missing = arena
        .anchors
        .iter()
        .filter(|block| !list.blocks.contains(block))
        .count();
    assert_eq!(missing, 0, "blocks that the standby's list lacks");
    check_log(&standby.log(), &arena.round);
}

fn promotion(arena: &mut Arena) {
    let standby = slow_standby(arena);
    // A query could conflict with replay.
    let leader = || process::named(&standby.data(""), "autoprewarm leader");
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
