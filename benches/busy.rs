//! Busy clients: a restart with a cold cache, while clients connect, read and reconnect from
//! the first moment.
//!
//! Each case says how many clients there are, which rows they want, whether they also
//! update, and whether shared buffers hold the list. Each client is a pgbench, and another
//! one after so many transactions. What counts as warm is measured at the end of each run,
//! with all of the table prewarmed (with a list larger than shared buffers: without that).
//! The latency of the first transaction of a session includes the time to connect, and so
//! the time that a session is held.

use std::collections::HashMap;
use std::time::Duration;

use crate::Options;
use crate::clients::{Clients, STEP, curve, logged_time, now};
use crate::common::{Cluster, Shutdown, value};
use crate::report::{Curve, Report, Samples, median};
use crate::side::{self, Side, SystemCache};

/// How long the throughput has to stay warm, in seconds.
const WARM_FOR: f64 = 2.0;

/// How long transactions are counted, in seconds.
const COUNTED: f64 = 10.0;

/// How long clients are watched after the end of the load, in seconds.
const WATCHED_AFTER_LOAD: f64 = 5.0;

/// How long the warm throughput is measured.
const WARM_MEASURED: Duration = Duration::from_secs(3);

/// How long sessions are held at most where they are.
const HOLD: &str = "5s";

/// Which rows the clients want.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rows {
    /// All alike.
    Uniform,
    /// By Zipf's law: the second half as often as the first, and so on.
    Skewed,
}

struct Case {
    name: &'static str,
    clients: usize,
    rows: Rows,
    /// Whether a tenth of the transactions are updates.
    updates: bool,
    /// Whether the list is larger than shared buffers.
    is_larger: bool,
    /// Whether holding sessions is measured as well.
    is_held: bool,
}

const CASES: [Case; 8] = [
    case("uniform 2", 2, Rows::Uniform),
    Case {
        is_held: true,
        ..case("uniform 8", 8, Rows::Uniform)
    },
    Case {
        is_held: true,
        ..case("uniform 32", 32, Rows::Uniform)
    },
    case("skewed 2", 2, Rows::Skewed),
    case("skewed 8", 8, Rows::Skewed),
    case("skewed 32", 32, Rows::Skewed),
    Case {
        updates: true,
        ..case("updates 8", 8, Rows::Uniform)
    },
    Case {
        is_larger: true,
        ..case("larger 8", 8, Rows::Skewed)
    },
];

const fn case(name: &'static str, clients: usize, rows: Rows) -> Case {
    Case {
        name,
        clients,
        rows,
        updates: false,
        is_larger: false,
        is_held: false,
    }
}

/// What is measured in turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Way {
    Contrib,
    Ours,
    Held,
}

impl Way {
    fn side(self) -> Side {
        match self {
            Self::Contrib => Side::Contrib,
            Self::Ours | Self::Held => Side::Ours,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Contrib => "contrib",
            Self::Ours => "ours",
            Self::Held => "ours, held",
        }
    }
}

pub fn run(options: &Options, report: &mut Report) {
    let size = options.size;
    let blocks = size.dense_blocks;
    let mut cluster = side::cluster(size.buffers, &["max_connections = 100"]);
    side::table(&cluster, "postgres", "t", blocks);
    cluster.sql("CREATE INDEX ON t (id)");
    cluster.sql("VACUUM ANALYZE t");
    cluster.sql("CREATE EXTENSION pg_prewarm VERSION '1.2'");
    cluster.sql("CREATE EXTENSION pg_buffercache");
    cluster.sql("CREATE ROLE app LOGIN; GRANT SELECT, UPDATE ON t TO app; CHECKPOINT");
    cluster.stop(Shutdown::Fast);

    for case in CASES.iter().filter(|case| options.includes(case.name)) {
        measure(case, &mut cluster, options, report);
    }
}

fn measure(case: &Case, cluster: &mut Cluster, options: &Options, report: &mut Report) {
    let size = options.size;
    let seconds = size.busy_seconds as f64;
    eprintln!("   {}: the list", case.name);
    cluster.switch_to(Side::Ours.installation());
    cluster.configure("pg_prewarm.autoprewarm_hold_connections = 0");
    let all = size.buffers;
    cluster.configure(&format!("shared_buffers = {all}MB"));
    cluster.start();
    cluster.sql(PREWARM);
    let clients = begin_clients(case, cluster, size.dense_blocks);
    std::thread::sleep(Duration::from_secs_f64(seconds / 5.0));
    clients.end();
    // Both sides get the same list, of the same length; contrib's reads its own part.
    let _: i64 = value(
        &mut cluster.connect("postgres"),
        "SELECT autoprewarm_dump_now()",
    );
    let list = cluster.list();
    cluster.stop(Shutdown::Fast);
    let buffers = if case.is_larger { all * 3 / 8 } else { all };
    cluster.configure(&format!("shared_buffers = {buffers}MB"));

    let ways: &[Way] = match case.is_held {
        true => &[Way::Contrib, Way::Ours, Way::Held],
        false => &[Way::Contrib, Way::Ours],
    };
    let mut results: HashMap<Way, Vec<Result>> = HashMap::new();
    // How long the same load takes without clients.
    let mut idle: Vec<f64> = Vec::new();
    for run in 0..options.runs {
        for &way in ways {
            let limit = if way == Way::Held { HOLD } else { "0" };
            side::prepare(cluster, way.side(), Some(&list), SystemCache::Cold, buffers);
            cluster.configure(&format!(
                "pg_prewarm.autoprewarm_hold_connections = {limit}"
            ));
            let result = one_run(case, cluster, size.dense_blocks, seconds);
            eprintln!(
                "   {}, run {}, {}: {result}",
                case.name,
                run + 1,
                way.name()
            );
            results.entry(way).or_default().push(result);
        }
        if case.is_held {
            let cold = SystemCache::Cold;
            let load = side::start_and_load(cluster, Side::Ours, &list, cold, buffers);
            side::stop(cluster);
            eprintln!("   {}, run {}, idle: {load:.2?}", case.name, run + 1);
            idle.push(load.as_secs_f64());
        }
    }
    for (what, unit, is_better, pick) in FIGURES {
        for &way in &ways[1..] {
            let mut samples = Samples::default();
            for result in &results[&Way::Contrib] {
                samples.add(Side::Contrib, pick(result));
            }
            for result in &results[&way] {
                samples.add(Side::Ours, pick(result));
            }
            let held = if way == Way::Held { ", held" } else { "" };
            let what = format!("busy: {}{held}: {what}", case.name);
            match is_better {
                Better::Lower => report.compare(&what, unit, &samples),
                Better::Higher => report.compare_rates(&what, unit, &samples),
            }
        }
    }
    if case.is_held {
        let times: Vec<f64> = results[&Way::Held].iter().map(|r| r.warm_after).collect();
        let name = case.name;
        report.figure(
            &format!("busy: {name}: load without clients"),
            median(&idle),
            "s",
        );
        let relative = median(&times) / median(&idle);
        let what = format!("busy: {name}, held: time to 90 % of warm, relative to that");
        report.figure(&what, relative, "");
    }
    let curves: Vec<Curve> = ways
        .iter()
        .map(|way| (way.name().to_owned(), median_curve(&results[way])))
        .collect();
    report.plot(
        &format!("busy-{}", case.name.replace(' ', "-")),
        &format!("Throughput after a restart: {}", case.name),
        "seconds",
        "transactions a second",
        &curves,
    );
}

enum Better {
    Lower,
    Higher,
}

type Pick = fn(&Result) -> f64;

const FIGURES: [(&str, &str, Better, Pick); 9] = [
    (
        "transactions in the first 10 s",
        "",
        Better::Higher,
        |result| result.transactions,
    ),
    ("throughput when warm", "/s", Better::Higher, |result| {
        result.warm
    }),
    ("time to 90 % of warm", "s", Better::Lower, |result| {
        result.warm_after
    }),
    ("p50 latency until then", "ms", Better::Lower, |result| {
        result.latencies[0]
    }),
    ("p99 latency until then", "ms", Better::Lower, |result| {
        result.latencies[1]
    }),
    ("worst latency until then", "ms", Better::Lower, |result| {
        result.latencies[2]
    }),
    ("end of the load", "s", Better::Lower, |result| {
        result.load_end
    }),
    ("processor time of the load", "s", Better::Lower, |result| {
        result.load_time
    }),
    (
        "processor time of the sessions",
        "s",
        Better::Lower,
        |result| result.client_time,
    ),
];

/// What one run has shown.
struct Result {
    /// In the first ten seconds.
    transactions: f64,
    /// The throughput at the end, with all of the table prewarmed.
    warm: f64,
    /// The beginning of the first two seconds in which the throughput was nine tenths of the
    /// warm one, on average.
    warm_after: f64,
    /// The 50th and 99th percentile and the worst until then, in milliseconds.
    latencies: [f64; 3],
    load_end: f64,
    load_time: f64,
    client_time: f64,
    curve: Vec<(f64, f64)>,
}

impl std::fmt::Display for Result {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} transactions, {:.0} per second when warm, after {:.2} s, p99 {:.2} ms, \
             load {:.2} s, processor time {:.1} and {:.1} s",
            self.transactions,
            self.warm,
            self.warm_after,
            self.latencies[1],
            self.load_end,
            self.load_time,
            self.client_time
        )
    }
}

/// Restarts the server, and watches the clients for at most so many seconds.
fn one_run(case: &Case, cluster: &Cluster, blocks: u32, most: f64) -> Result {
    let mark = cluster.log_end();
    let clients = begin_clients(case, cluster, blocks);
    cluster.start();
    let start = logged_time(&cluster.log_since(mark), "ready to accept connections")
        .expect("the server has said so");
    let counted = COUNTED.min(most);
    let (watched, load_end) = loop {
        let load_end = logged_time(&cluster.log_since(mark), "successfully prewarmed");
        let watched = now() - start;
        let is_over = load_end.is_some_and(|end| now() - end >= WATCHED_AFTER_LOAD);
        if watched >= most || (is_over && watched > counted + STEP) {
            break (watched, load_end);
        }
        std::thread::sleep(Duration::from_millis(100));
    };
    clients.end_sampling();
    if !case.is_larger {
        cluster.sql(PREWARM);
    }
    let warm_from = now();
    std::thread::sleep(WARM_MEASURED);
    let warm_until = now();
    // What a client that is stopped has not yet written to its log is none of these.
    std::thread::sleep(WARM_MEASURED / 3);
    let (transactions, times) = clients.end();
    if case.updates {
        // The next start is not to begin with recovery, which reads blocks, and the table is not
        // to grow.
        cluster.sql("VACUUM t");
        cluster.sql("CHECKPOINT");
    }
    side::stop(cluster);

    let warm = transactions
        .iter()
        .filter(|(end, _)| (warm_from..warm_until).contains(end))
        .count() as f64
        / (warm_until - warm_from);
    assert!(warm > 0.0, "the clients have done nothing");
    let curve = curve(&transactions, start, watched);
    let steps = (WARM_FOR / STEP) as usize;
    // In each of these seconds, since the curve rises.
    let is_warm = |steps: &[(f64, f64)]| {
        let mut seconds = steps.chunks((1.0 / STEP) as usize);
        seconds.all(|steps| {
            let sum: f64 = steps.iter().map(|step| step.1).sum();
            sum / steps.len() as f64 >= warm * 0.9
        })
    };
    let until_the_end = |what: &str| {
        eprintln!("   {what} after {watched:.0} s, which counts as its time");
        watched
    };
    let warm_after = curve
        .windows(steps)
        .find(|steps| is_warm(steps))
        .map_or_else(
            || until_the_end("the server is not warm"),
            |steps| steps[0].0 - STEP,
        );
    let until = |time: f64| {
        let before = transactions
            .iter()
            .filter(move |(end, _)| *end <= start + time);
        before.map(|(_, took)| took * 1000.0)
    };
    let mut latencies: Vec<f64> = until(warm_after + STEP).collect();
    latencies.sort_by(f64::total_cmp);
    let percentile = |part: f64| {
        let last = latencies.len().saturating_sub(1);
        let at = (last as f64 * part) as usize;
        latencies.get(at).copied().unwrap_or(f64::NAN)
    };
    Result {
        transactions: until(counted).count() as f64,
        warm,
        warm_after,
        latencies: [0.5, 0.99, 1.0].map(percentile),
        load_end: load_end.map_or_else(
            || until_the_end("the load has not ended"),
            |end| end - start,
        ),
        load_time: times.load,
        client_time: times.clients,
        curve,
    }
}

/// The clients of a case, which want the rows of a table with so many of them.
fn begin_clients(case: &Case, cluster: &Cluster, rows: u32) -> Clients {
    let row = match case.rows {
        Rows::Uniform => format!("random(1, {rows})"),
        // The most wanted rows are the same for all, and scattered over the table.
        Rows::Skewed => format!("1 + permute(random_zipfian(1, {rows}, 1.001) - 1, {rows}, 1)"),
    };
    let script = |statement: &str| format!("\\set id {row}\n{statement} WHERE id = :id;\n");
    let read = script("SELECT octet_length(filler) FROM t");
    let update = script("UPDATE t SET filler = filler");
    let scripts = [(&*read, 9), (&*update, 1)];
    let scripts = match case.updates {
        true => &scripts[..],
        false => &scripts[..1],
    };
    Clients::begin(cluster, case.clients, "app", scripts, 0)
}

const PREWARM: &str = "SELECT pg_prewarm('t'), pg_prewarm('t_id_idx')";

/// The median of each step that all have.
fn median_curve(results: &[Result]) -> Vec<(f64, f64)> {
    let steps = results.iter().map(|result| result.curve.len()).min();
    (0..steps.unwrap_or(0))
        .map(|step| {
            let rates: Vec<f64> = results.iter().map(|result| result.curve[step].1).collect();
            (results[0].curve[step].0, median(&rates))
        })
        .collect()
}
