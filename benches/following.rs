//! What following costs: the primary's clients, the readers of the standby, its replay, and
//! the primary's WAL. All servers share one machine.
//!
//! Each case compares the same pair, or two pairs of one kind, with `autoprewarm_follow` off
//! and on, in the order off, on, on, off. The standby fetches a list every five seconds.

use std::time::{Duration, Instant};

use crate::clients::{Clients, now};
use crate::common::{Cluster, wait_until};
use crate::failover::{self, Figures};
use crate::report::{Report, median};
use crate::{Options, machine};

/// How many clients read on the standby.
const READERS: usize = 4;

/// How long they read before that counts, and how long it counts.
const SETTLED: Duration = Duration::from_secs(20);
const COUNTED: Duration = Duration::from_secs(20);

/// How much WAL is replayed, and how long idle pairs are watched, in a full benchmark.
const REPLAYED: u64 = 5 << 30;
const IDLE: Duration = Duration::from_secs(600);

type Case = fn(&Options, &mut Report);
type Pick = fn(&Figures) -> f64;

const CASES: [(&str, Case); 4] = [
    ("primary", on_primary),
    ("readers", readers),
    ("replay", replay),
    ("wal", wal),
];

/// Whether the standby follows, in the order in which it is measured.
const OFF_AND_ON: [bool; 2] = [false, true];

pub fn run(options: &Options, report: &mut Report) {
    for (name, run) in CASES {
        if options.includes(name) {
            run(options, report);
        }
    }
}

/// Clients read and write on the primary.
fn on_primary(options: &Options, report: &mut Report) {
    let rows = options.size.dense_blocks;
    let (primary, standby) = pair(options);
    let begin = |turn| failover::begin_clients(&primary, rows, 1, turn);
    measure(
        "clients of the primary",
        &primary,
        &standby,
        begin,
        options,
        report,
    );
}

/// Clients read other rows on the standby than are hot on its primary, and fill its buffers.
fn readers(options: &Options, report: &mut Report) {
    let rows = options.size.dense_blocks;
    let (primary, standby) = pair(options);
    warm(&primary, rows);
    let read = failover::read(rows, 2);
    let begin = |turn| Clients::begin(&standby, READERS, "app", &[(&read, 1)], turn);
    measure(
        "readers on the standby",
        &standby,
        &standby,
        begin,
        options,
        report,
    );
}

/// Measures clients of a server, in turn.
fn measure(
    what: &str,
    server: &Cluster,
    standby: &Cluster,
    begin: impl Fn(usize) -> Clients,
    options: &Options,
    report: &mut Report,
) {
    let replaced = "SELECT blocks_replaced FROM pg_stat_autoprewarm_follow";
    let mut results: [Vec<Figures>; 2] = Default::default();
    // The first turn finds cold servers, and does not count.
    for turn in 0..=2 * options.runs {
        let (run, follows) = (turn.div_ceil(2), is_on(turn));
        follow(standby, follows);
        let replaced_before: i64 = standby.value(replaced);
        let clients = begin(turn);
        std::thread::sleep(SETTLED);
        let hits = failover::Hits::of(server);
        let from = now();
        std::thread::sleep(COUNTED);
        let until = now();
        let hit_ratio = failover::Hits::of(server).ratio_since(&hits);
        let (transactions, _) = clients.end();
        let figures = Figures::of(&transactions, from, until, hit_ratio);
        eprintln!(
            "   {what}, run {run}, {}: {figures:.3?}, {} blocks replaced",
            name(follows),
            standby.value::<i64>(replaced) - replaced_before
        );
        if turn > 0 {
            results[usize::from(follows)].push(figures);
        }
    }
    let picks: [(&str, &str, Pick); 3] = [
        ("throughput", "/s", |figures| figures.throughput),
        ("p99 latency", "ms", |figures| figures.p99),
        ("hit ratio", "", |figures| figures.hit_ratio),
    ];
    for (figure, unit, pick) in picks {
        let samples = results
            .each_ref()
            .map(|results| results.iter().map(pick).collect());
        compare(report, &format!("{what}: {figure}"), unit, &samples);
    }
}

/// The standby replays WAL that it has received already.
fn replay(options: &Options, report: &mut Report) {
    let (primary, standby) = pair(options);
    warm(&primary, options.size.dense_blocks);
    let bytes = REPLAYED / u64::from(crate::FULL.buffers) * u64::from(options.size.buffers);
    primary.sql(
        "CREATE TABLE replayed (id int, filler text); CREATE INDEX ON replayed (id); \
         ALTER TABLE replayed ALTER filler SET STORAGE PLAIN",
    );
    let mut results: [Vec<f64>; 2] = Default::default();
    for turn in 0..=2 * options.runs {
        let (run, follows) = (turn.div_ceil(2), is_on(turn));
        primary.sql("TRUNCATE replayed");
        primary.sql("CHECKPOINT");
        wait_for(&primary, &standby, "pg_last_wal_replay_lsn()");
        follow(&standby, follows);
        standby.sql("SELECT pg_wal_replay_pause()");
        let begin = position(&primary);
        let mut first = 0;
        while position(&primary) - begin < bytes as f64 {
            let last = first + 99_999;
            primary.sql(&format!(
                "INSERT INTO replayed SELECT g, repeat('x', 500) \
                     FROM generate_series({first}, {last}) g; \
                     UPDATE replayed SET filler = repeat('y', 500) \
                     WHERE id BETWEEN {first} AND {last}"
            ));
            first = last + 1;
        }
        wait_for(&primary, &standby, "pg_last_wal_receive_lsn()");
        let replayed = position(&primary) - begin;
        let start = Instant::now();
        standby.sql("SELECT pg_wal_replay_resume()");
        wait_for(&primary, &standby, "pg_last_wal_replay_lsn()");
        let rate = replayed / start.elapsed().as_secs_f64() / f64::from(1 << 20);
        eprintln!(
            "   replay, run {run}, {}: {:.0} MB at {rate:.1} MB/s",
            name(follows),
            replayed / f64::from(1 << 20)
        );
        if turn > 0 {
            results[usize::from(follows)].push(rate);
        }
    }
    compare(report, "replay", "MB/s", &results);
}

/// Two pairs, first idle and then with the same work to do.
fn wal(options: &Options, report: &mut Report) {
    let pairs = OFF_AND_ON.map(|follows| {
        let (primary, standby) = pair(options);
        warm(&primary, options.size.dense_blocks);
        follow(&standby, follows);
        primary.sql(
            "CREATE PROCEDURE work(transactions int) LANGUAGE plpgsql AS $$ BEGIN \
               FOR i IN 1 .. transactions LOOP \
                 UPDATE written SET n = n + 1 WHERE id = 1 + i % 1000; COMMIT; \
               END LOOP; END $$",
        );
        primary.sql("CHECKPOINT");
        wait_for(&primary, &standby, "pg_last_wal_replay_lsn()");
        (primary, standby)
    });
    // The background writer logs a snapshot of running transactions after changes.
    std::thread::sleep(Duration::from_secs(20));
    let positions = || pairs.each_ref().map(|(primary, _)| position(primary));
    let written = |before: [f64; 2]| {
        let after = positions();
        [0, 1].map(|at| vec![after[at] - before[at]])
    };
    let before = positions();
    std::thread::sleep(IDLE / crate::FULL.buffers * options.size.buffers);
    compare(report, "WAL of idle primaries", "bytes", &written(before));
    let before = positions();
    for (primary, _) in &pairs {
        primary.sql("CALL work(200000)");
    }
    compare(
        report,
        "WAL of 200,000 transactions",
        "bytes",
        &written(before),
    );
    for (_, standby) in &pairs {
        let fetches = "SELECT bytes_received FROM pg_stat_autoprewarm_follow";
        let received: i64 = standby.value(fetches);
        report.figure("bytes of lists received", received as f64, "bytes");
    }
}

/// Whether the standby follows in a turn: the first, which does not count, and then in turn,
/// so that neither is always the first.
fn is_on(turn: usize) -> bool {
    turn % 4 >= 2
}

fn name(follows: bool) -> &'static str {
    if follows {
        "following"
    } else {
        "not following"
    }
}

/// A primary and a standby, both started.
fn pair(options: &Options) -> (Cluster, Cluster) {
    let buffers = options.size.buffers / 8;
    machine::touch_memory(2 * (buffers + buffers / 4));
    let primary = failover::primary(options.size.dense_blocks, buffers);
    primary.sql("ALTER EXTENSION pg_prewarm UPDATE");
    let standby = primary.standby();
    standby.configure("pg_prewarm.autoprewarm_follow_interval = 5");
    failover::slow_down(&standby);
    standby.start();
    (primary, standby)
}

/// Makes the rows hot that the primary's clients want.
fn warm(primary: &Cluster, rows: u32) {
    let clients = Clients::begin(primary, READERS, "app", &[(&failover::read(rows, 1), 1)], 0);
    std::thread::sleep(SETTLED);
    clients.end();
}

fn follow(standby: &Cluster, follows: bool) {
    let value = if follows { "on" } else { "off" };
    standby.configure(&format!("pg_prewarm.autoprewarm_follow = {value}"));
    standby.reload();
    let is = if follows { "<>" } else { "=" };
    wait_until("the reload", || {
        standby.value(&format!(
            "SELECT state {is} 'off' FROM pg_stat_autoprewarm_follow"
        ))
    });
}

/// How much WAL a primary has written since its beginning, in bytes.
fn position(primary: &Cluster) -> f64 {
    primary.value("SELECT (pg_current_wal_insert_lsn() - '0/0')::float8")
}

/// Waits until that position of the standby is the primary's.
fn wait_for(primary: &Cluster, standby: &Cluster, position: &str) {
    let end: String = primary.value("SELECT pg_current_wal_flush_lsn()::text");
    let sql = format!("SELECT {position} >= '{end}'");
    while !standby.value::<bool>(&sql) {
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Reports what was measured without and with following, and the second relative to the
/// first.
fn compare(report: &mut Report, what: &str, unit: &str, results: &[Vec<f64>; 2]) {
    let medians = results.each_ref().map(|results| median(results));
    for (follows, median) in OFF_AND_ON.into_iter().zip(medians) {
        report.figure(
            &format!("following: {what}, {}", name(follows)),
            median,
            unit,
        );
    }
    if medians[0] > 0.0 {
        let what = format!("following: {what}, following relative to not");
        report.figure(&what, medians[1] / medians[0], "");
    }
}
