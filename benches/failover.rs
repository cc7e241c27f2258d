//! Failover: the primary is killed while clients read and write, its standby is promoted,
//! and the clients go on there.
//!
//! Three ways in turn: contrib's module on both servers, this one without following, and
//! this one with it; in the variants the last two. Most of what the clients want is in shared
//! buffers, not all of it. The standby's files are not in the operating system's cache when
//! the primary is killed. With `READ_DELAY`, each read of a file takes so many milliseconds
//! more, as with storage in a network.

use std::time::{Duration, Instant};

use crate::clients::{Clients, STEP, Transaction, curve, logged_time, now};
use crate::common::{Cluster, Shutdown, signal, value, wait_until};
use crate::report::{Curve, Report, median};
use crate::side::{self, Side};
use crate::{Options, machine};

/// How many clients there are.
const CLIENTS: usize = 8;

/// How long clients work before the primary is killed, and how long of that counts.
const BEFORE: Duration = Duration::from_secs(30);
const COUNTED_BEFORE: f64 = 10.0;

/// How long clients have wanted other rows before that, where that is so.
const EARLIER: Duration = Duration::from_secs(20);

/// How long they are watched afterwards, and for how much of that hits and latencies count.
const AFTER: Duration = Duration::from_secs(20);
const COUNTED_AFTER: f64 = 5.0;

/// How long the throughput has to stay at nine tenths, in seconds.
const WARM_FOR: f64 = 2.0;

/// What is done, and what else is the case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Case {
    Plain,
    /// The clients want other rows since shortly before.
    Moved,
    /// The standby has half as many buffers.
    Half,
    /// Sessions of the standby read other rows, and fill its buffers.
    Filled,
}

impl Case {
    const ALL: [(&'static str, Self); 4] = [
        ("plain", Self::Plain),
        ("moved", Self::Moved),
        ("half", Self::Half),
        ("filled", Self::Filled),
    ];

    fn ways(self) -> &'static [Way] {
        match self {
            Self::Plain => &[Way::Contrib, Way::NotFollowing, Way::Following],
            Self::Moved | Self::Half | Self::Filled => &[Way::NotFollowing, Way::Following],
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Contrib,
    NotFollowing,
    Following,
}

impl Way {
    fn name(self) -> &'static str {
        match self {
            Self::Contrib => "contrib",
            Self::NotFollowing => "not following",
            Self::Following => "following",
        }
    }

    fn side(self) -> Side {
        match self {
            Self::Contrib => Side::Contrib,
            Self::NotFollowing | Self::Following => Side::Ours,
        }
    }
}

/// What one run has shown.
struct Result {
    /// The old primary's: transactions per second, hit ratio, 99th percentile of the latency
    /// in milliseconds.
    before: Figures,
    /// The new primary's, in the first seconds.
    after: Figures,
    /// From the promotion to nine tenths of the old primary's throughput, in seconds.
    warm_after: f64,
    curve: Vec<(f64, f64)>,
}

#[derive(Clone, Copy, Debug)]
pub struct Figures {
    /// Transactions per second.
    pub throughput: f64,
    pub hit_ratio: f64,
    /// Milliseconds.
    pub p99: f64,
}

pub fn run(options: &Options, report: &mut Report) {
    let size = options.size;
    let buffers = size.buffers / 8;
    let mut primary = primary(size.dense_blocks, buffers);
    primary.stop(Shutdown::Fast);
    // It is killed again and again.
    primary.expect_crash();
    slow_down(&primary);
    for (name, case) in Case::ALL {
        if options.includes(name) {
            measure(name, case, &mut primary, options, report);
        }
    }
}

fn measure(name: &str, case: Case, primary: &mut Cluster, options: &Options, report: &mut Report) {
    let size = options.size;
    let mut results: Vec<(Way, Result)> = Vec::new();
    for run in 0..options.runs {
        let mut ways = case.ways().to_vec();
        ways.rotate_left(run % case.ways().len());
        for way in ways {
            let result = one_run(case, way, primary, size.dense_blocks, size.buffers / 8);
            eprintln!(
                "   {name}, run {}, {}: before {:.3?}, after {:.3?}, nine tenths after {:.2} s",
                run + 1,
                way.name(),
                result.before,
                result.after,
                result.warm_after
            );
            results.push((way, result));
        }
    }
    let of = |way: Way, pick: &dyn Fn(&Result) -> f64| {
        let results = results.iter().filter(|(of, _)| *of == way);
        median(&results.map(|(_, result)| pick(result)).collect::<Vec<_>>())
    };
    let mut curves: Vec<Curve> = Vec::new();
    for &way in case.ways() {
        let mut figure = |what: &str, unit: &str, pick: &dyn Fn(&Result) -> f64| {
            let what = format!("failover: {name}: {}: {what}", way.name());
            report.figure(&what, of(way, pick), unit);
        };
        figure("throughput of the old primary", "/s", &|result| {
            result.before.throughput
        });
        figure("nine tenths of that after", "s", &|result| {
            result.warm_after
        });
        figure(
            "hit ratio in the first 5 s, of the old one's",
            "",
            &|result| result.after.hit_ratio / result.before.hit_ratio,
        );
        figure("p99 latency in the first 5 s", "ms", &|result| {
            result.after.p99
        });
        figure("the same, of the old one's", "times", &|result| {
            result.after.p99 / result.before.p99
        });
        let steps = (AFTER.as_secs_f64() / STEP) as usize;
        let curve = (0..steps)
            .map(|step| {
                let rate = |result: &Result| result.curve.get(step).map_or(0.0, |at| at.1);
                ((step + 1) as f64 * STEP, of(way, &rate))
            })
            .collect();
        curves.push((way.name().to_owned(), curve));
    }
    report.plot(
        &format!("failover-{name}"),
        &format!("Throughput after a promotion: {name}"),
        "seconds",
        "transactions a second",
        &curves,
    );
}

/// A primary with a table whose rows clients read, and a small one whose rows they update.
pub fn primary(rows: u32, buffers: u32) -> Cluster {
    assert!(
        !machine::huge_pages(),
        "HUGE_PAGES=on: not with several servers"
    );
    let primary = side::cluster(
        buffers,
        &[
            "wal_level = replica",
            "max_wal_senders = 10",
            "max_connections = 100",
            "wal_keep_size = 8GB",
        ],
    );
    side::table(&primary, "postgres", "t", rows);
    primary.sql("CREATE INDEX ON t (id)");
    primary.sql("VACUUM ANALYZE t");
    primary.sql("CREATE EXTENSION pg_prewarm VERSION '1.2'");
    primary.sql(
        "CREATE TABLE written AS SELECT g AS id, 0 AS n FROM generate_series(1, 1000) g; \
         CREATE INDEX ON written (id)",
    );
    primary.sql(
        "CREATE ROLE app LOGIN; GRANT SELECT ON t TO app; GRANT SELECT, UPDATE ON written TO app; \
         CHECKPOINT",
    );
    primary
}

/// Makes reads as slow as `READ_DELAY` says. The first call precedes the start of the server.
pub fn slow_down(cluster: &Cluster) {
    let delay = std::env::var("READ_DELAY").unwrap_or_default();
    if !delay.is_empty() {
        cluster.slow_reads(delay.parse().expect("READ_DELAY is a number"));
    }
}

fn one_run(case: Case, way: Way, primary: &mut Cluster, rows: u32, buffers: u32) -> Result {
    primary.switch_to(way.side().installation());
    machine::touch_memory(2 * (buffers + buffers / 4));
    primary.start();
    let standby = primary.standby();
    if way.side() == Side::Ours {
        let follow = if way == Way::Following { "on" } else { "off" };
        standby.configure(&format!(
            "pg_prewarm.autoprewarm_follow = {follow}\n\
             pg_prewarm.autoprewarm_follow_interval = 5"
        ));
    }
    if case == Case::Half {
        standby.configure(&format!("shared_buffers = {}MB", buffers / 2));
    }
    slow_down(&standby);
    standby.start();

    let readers = (case == Case::Filled)
        .then(|| Clients::begin(&standby, CLIENTS / 2, "app", &[(&read(rows, 3), 1)], 3));
    if case == Case::Moved {
        let clients = begin_clients(primary, rows, 2, 2);
        std::thread::sleep(EARLIER);
        clients.end();
    }
    let clients = begin_clients(primary, rows, 1, 0);
    std::thread::sleep(BEFORE.saturating_sub(Duration::from_secs_f64(COUNTED_BEFORE)));
    let hits = Hits::of(primary);
    std::thread::sleep(Duration::from_secs_f64(COUNTED_BEFORE));
    let before_ratio = Hits::of(primary).ratio_since(&hits);
    let killed = now();
    signal(primary.postmaster(), libc::SIGKILL);
    let (transactions, _) = clients.end();
    let before = Figures::of(&transactions, killed - COUNTED_BEFORE, killed, before_ratio);
    if let Some(readers) = readers {
        readers.end();
    }

    // What is cached in memory of the system is lost where a machine fails, and other files
    // have taken its place on a standby that is up for long.
    machine::drop_caches();
    let mark = standby.log_end();
    let hits = Hits::of(&standby);
    // Drawn anew: others than those that the last list was made of.
    let clients = begin_clients(&standby, rows, 1, 1);
    standby.promote();
    let promoted = logged_time(
        &standby.log_since(mark),
        "database system is ready to accept connections",
    )
    .unwrap_or_else(now);
    let start = Instant::now();
    std::thread::sleep(Duration::from_secs_f64(COUNTED_AFTER));
    let after_ratio = Hits::of(&standby).ratio_since(&hits);
    std::thread::sleep(AFTER.saturating_sub(start.elapsed()));
    let (transactions, _) = clients.end();
    let after = Figures::of(
        &transactions,
        promoted,
        promoted + COUNTED_AFTER,
        after_ratio,
    );
    drop(standby);
    // Its processes notice that it is gone; the next start recovers.
    let pid_file = primary.data("postmaster.pid");
    wait_until("the end of the old primary", || {
        let _ = std::fs::remove_file(&pid_file);
        primary.try_start()
    });
    side::stop(primary);

    let curve = curve(&transactions, promoted, AFTER.as_secs_f64());
    let steps = (WARM_FOR / STEP) as usize;
    let is_warm = |steps: &[(f64, f64)]| {
        let sum: f64 = steps.iter().map(|step| step.1).sum();
        sum / steps.len() as f64 >= before.throughput * 0.9
    };
    let warm_after = curve
        .windows(steps)
        .find(|steps| is_warm(steps))
        .map_or(AFTER.as_secs_f64(), |steps| steps[0].0 - STEP);
    Result {
        before,
        after,
        warm_after,
        curve,
    }
}

/// One transaction in ten updates a row of the small table: what is updated, replay reads on
/// the standby as well. There, updates fail until it is promoted.
pub fn begin_clients(cluster: &Cluster, rows: u32, choice: u32, draw: usize) -> Clients {
    let update = "\\set id random(1, 1000)\nUPDATE written SET n = n + 1 WHERE id = :id;\n";
    Clients::begin(
        cluster,
        CLIENTS,
        "app",
        &[(&read(rows, choice), 9), (update, 1)],
        draw,
    )
}

/// A script that reads a row. Most of those that are wanted often fit into shared buffers;
/// which ones these are depends on the choice.
pub fn read(rows: u32, choice: u32) -> String {
    format!(
        "\\set id 1 + permute(random_zipfian(1, {rows}, 1.05) - 1, {rows}, {choice})\n\
         SELECT octet_length(filler) FROM t WHERE id = :id;\n"
    )
}

/// How often sessions found blocks in shared buffers, and read them. 15 counts what a load
/// reads as well.
pub struct Hits {
    hits: f64,
    reads: f64,
}

impl Hits {
    pub fn of(cluster: &Cluster) -> Self {
        let mut client = cluster.connect("postgres");
        let (hits, reads, of) = match cluster.major() {
            15 => ("blks_hit", "blks_read", "pg_stat_database"),
            _ => (
                "hits",
                "reads",
                "pg_stat_io WHERE backend_type = 'client backend'",
            ),
        };
        let mut sum = |column: &str| -> f64 {
            let sql = format!("SELECT sum({column})::float8 FROM {of}");
            value(&mut client, &sql)
        };
        Self {
            hits: sum(hits),
            reads: sum(reads),
        }
    }

    pub fn ratio_since(&self, before: &Self) -> f64 {
        let (hits, reads) = (self.hits - before.hits, self.reads - before.reads);
        hits / (hits + reads).max(1.0)
    }
}

impl Figures {
    /// Of the transactions that ended in that time.
    pub fn of(transactions: &[Transaction], from: f64, until: f64, hit_ratio: f64) -> Self {
        let counted = transactions
            .iter()
            .filter(|(end, _)| (from..until).contains(end));
        let mut latencies: Vec<f64> = counted.map(|(_, took)| took * 1000.0).collect();
        latencies.sort_by(f64::total_cmp);
        let at = (latencies.len().saturating_sub(1) as f64 * 0.99) as usize;
        Self {
            throughput: latencies.len() as f64 / (until - from),
            hit_ratio,
            p99: latencies.get(at).copied().unwrap_or(f64::NAN),
        }
    }
}
