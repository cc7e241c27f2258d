//! Busy clients: a restart with a cold cache, while clients connect, read and reconnect from
//! the first moment.
//!
//! Each case says how many clients there are, which rows they want, whether they also
//! update, and whether shared buffers hold the list. What counts as warm is measured for
//! each case with all of the table prewarmed. Latencies include the time to connect, and so
//! the time that a session is held.

use std::collections::HashMap;
use std::fs;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant, SystemTime};

use postgres::{Client, Config, NoTls};
use rand::distr::Distribution;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rand_distr::Zipf;

use crate::Options;
use crate::common::{Cluster, Shutdown, value};
use crate::report::{Curve, Report, Samples, median};
use crate::side::{self, Side, SystemCache};

/// The steps of the curve.
const STEP: Duration = Duration::from_millis(250);

/// How long the throughput has to stay warm.
const WARM_FOR: Duration = Duration::from_secs(2);

/// How long transactions are counted.
const COUNTED: Duration = Duration::from_secs(10);

/// After so many transactions a client connects again.
const TRANSACTIONS_OF_A_SESSION: usize = 2000;

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

/// A transaction: when it ended, and how long it took.
type Transaction = (Instant, Duration);

pub fn run(options: &Options, report: &mut Report) {
    let size = options.size;
    let chosen = std::env::var("CASES").unwrap_or_default();
    let chosen: Vec<&str> = chosen.split(',').filter(|name| !name.is_empty()).collect();
    let cases = || {
        let is_chosen = |case: &&Case| chosen.is_empty() || chosen.contains(&case.name);
        CASES.iter().filter(is_chosen)
    };
    let blocks = size.dense_blocks;
    let mut cluster = side::cluster(size.buffers, &["max_connections = 100"]);
    side::table(&cluster, "postgres", "t", blocks);
    cluster.sql("CREATE INDEX ON t (id)");
    cluster.sql("VACUUM ANALYZE t");
    cluster.sql("CREATE EXTENSION pg_prewarm VERSION '1.2'");
    cluster.sql("CREATE EXTENSION pg_buffercache");
    cluster.sql("CREATE ROLE app LOGIN; GRANT SELECT, UPDATE ON t TO app; CHECKPOINT");

    for case in cases() {
        measure(case, &mut cluster, options, report);
    }
}

fn measure(case: &Case, cluster: &mut Cluster, options: &Options, report: &mut Report) {
    let size = options.size;
    let seconds = Duration::from_secs(size.busy_seconds);
    eprintln!("   {}: warming", case.name);
    cluster.stop(Shutdown::Fast);
    cluster.switch_to(Side::Ours.installation());
    cluster.configure("pg_prewarm.autoprewarm_hold_connections = 0");
    let all = size.buffers;
    cluster.configure(&format!("shared_buffers = {all}MB"));
    cluster.start();
    cluster.sql("SELECT pg_prewarm('t'), pg_prewarm('t_id_idx')");
    let clients = Clients::begin(case, cluster, size.dense_blocks);
    std::thread::sleep(seconds / 2);
    let (transactions, _) = clients.end();
    let mut warm = throughput(&transactions);
    // Both sides get the same list, of the same length; contrib's reads its own part.
    let _: i64 = value(
        &mut cluster.connect("postgres"),
        "SELECT autoprewarm_dump_now()",
    );
    let list = cluster.list();
    cluster.stop(Shutdown::Fast);
    let buffers = if case.is_larger { all * 3 / 8 } else { all };
    if case.is_larger {
        cluster.configure(&format!("shared_buffers = {buffers}MB"));
        cluster.start();
        cluster.sql("SELECT pg_prewarm('t'), pg_prewarm('t_id_idx')");
        let clients = Clients::begin(case, cluster, size.dense_blocks);
        std::thread::sleep(seconds);
        let (transactions, _) = clients.end();
        let half = transactions.len() / 2;
        warm = throughput(&transactions[half..]);
        cluster.stop(Shutdown::Fast);
    }
    report.figure(
        &format!("busy: {}: throughput when warm", case.name),
        warm,
        "/s",
    );

    let ways: &[Way] = match case.is_held {
        true => &[Way::Contrib, Way::Ours, Way::Held],
        false => &[Way::Contrib, Way::Ours],
    };
    let mut results: HashMap<Way, Vec<Result>> = HashMap::new();
    for run in 0..options.runs {
        for &way in ways {
            let limit = if way == Way::Held { HOLD } else { "0" };
            side::prepare(cluster, way.side(), Some(&list), SystemCache::Cold, buffers);
            if way != Way::Contrib {
                cluster.configure(&format!(
                    "pg_prewarm.autoprewarm_hold_connections = {limit}"
                ));
            }
            let result = one_run(case, cluster, size.dense_blocks, warm, seconds);
            eprintln!(
                "   {}, run {}, {}: {result}",
                case.name,
                run + 1,
                way.name()
            );
            results.entry(way).or_default().push(result);
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

const FIGURES: [(&str, &str, Better, Pick); 8] = [
    (
        "transactions in the first 10 s",
        "",
        Better::Higher,
        |result| result.transactions,
    ),
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
    /// When the throughput was nine tenths of the warm one, and stayed so.
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
            "{} transactions, warm after {:.2} s, p99 {:.2} ms, load {:.2} s, \
             processor time {:.1} and {:.1} s",
            self.transactions,
            self.warm_after,
            self.latencies[1],
            self.load_end,
            self.load_time,
            self.client_time
        )
    }
}

fn one_run(case: &Case, cluster: &Cluster, blocks: u32, warm: f64, seconds: Duration) -> Result {
    let mark = cluster.log_end();
    let clients = Clients::begin(case, cluster, blocks);
    cluster.start();
    let clocks = (Instant::now(), SystemTime::now());
    let ready = logged_time(&cluster.log_since(mark), "ready to accept connections")
        .expect("the server has said so");
    // The same moment by the clock that the transactions are measured with.
    let age = clocks.1.duration_since(SystemTime::UNIX_EPOCH).unwrap() - ready;
    let start = clocks.0 - age;
    std::thread::sleep(seconds.saturating_sub(age));
    let (transactions, times) = clients.end();
    let load_end = logged_time(&cluster.log_since(mark), "successfully prewarmed");
    side::stop(cluster);

    let curve = curve(&transactions, start, seconds);
    let steps = (WARM_FOR.as_secs_f64() / STEP.as_secs_f64()) as usize;
    let is_warm = |steps: &[(f64, f64)]| steps.iter().all(|step| step.1 >= warm * 0.9);
    let warm_after = curve
        .windows(steps)
        .find(|steps| is_warm(steps))
        .map_or(seconds.as_secs_f64(), |steps| {
            steps[0].0 - STEP.as_secs_f64()
        });
    let until = |time: Duration| {
        let end = start + time;
        let before = transactions.iter().filter(move |(at, _)| *at <= end);
        before.map(|(_, took)| took.as_secs_f64() * 1000.0)
    };
    let mut latencies: Vec<f64> = until(Duration::from_secs_f64(warm_after.max(1.0))).collect();
    latencies.sort_by(f64::total_cmp);
    let percentile = |part: f64| {
        let last = latencies.len().saturating_sub(1);
        let at = (last as f64 * part) as usize;
        latencies.get(at).copied().unwrap_or(f64::NAN)
    };
    let after_ready =
        |time: Option<Duration>| time.map_or(f64::NAN, |time| (time - ready).as_secs_f64());
    Result {
        transactions: until(COUNTED).count() as f64,
        warm_after,
        latencies: [0.5, 0.99, 1.0].map(percentile),
        load_end: after_ready(load_end),
        load_time: times.load,
        client_time: times.clients,
        curve,
    }
}

/// The time of a line of the log, since 1970.
fn logged_time(log: &str, text: &str) -> Option<Duration> {
    let line = log.lines().find(|line| line.contains(text))?;
    let seconds = line.split_whitespace().next()?.parse().ok()?;
    Some(Duration::from_secs_f64(seconds))
}

/// Clients at work, each in a thread, and the processor time of the server's processes.
struct Clients {
    stop: std::sync::Arc<AtomicBool>,
    threads: Vec<std::thread::JoinHandle<Vec<Transaction>>>,
    sampler: std::thread::JoinHandle<ProcessorTimes>,
}

impl Clients {
    /// They connect as soon as the server lets them.
    fn begin(case: &Case, cluster: &Cluster, blocks: u32) -> Self {
        let stop = std::sync::Arc::new(AtomicBool::new(false));
        let mut config = cluster.config();
        config.user("app");
        let threads = (0..case.clients)
            .map(|number| {
                let (stop, config) = (stop.clone(), config.clone());
                let random = StdRng::seed_from_u64(number as u64 + 1);
                let (rows, updates) = (case.rows, case.updates);
                std::thread::spawn(move || {
                    client(&config, random, &Wanted::new(rows, blocks), updates, &stop)
                })
            })
            .collect();
        let data = cluster.data("");
        let sampled = stop.clone();
        let sampler = std::thread::spawn(move || ProcessorTimes::sample(&data, &sampled));
        Self {
            stop,
            threads,
            sampler,
        }
    }

    /// Stops them. Their transactions are in the order in which they ended.
    fn end(self) -> (Vec<Transaction>, ProcessorTimes) {
        self.stop.store(true, Relaxed);
        let mut all: Vec<Transaction> = self
            .threads
            .into_iter()
            .flat_map(|thread| thread.join().unwrap())
            .collect();
        all.sort_by_key(|(end, _)| *end);
        (all, self.sampler.join().unwrap())
    }
}

fn client(
    config: &Config,
    mut random: StdRng,
    wanted: &Wanted,
    updates: bool,
    stop: &AtomicBool,
) -> Vec<Transaction> {
    let mut done = Vec::new();
    while !stop.load(Relaxed) {
        let mut begin = Instant::now();
        let Ok(mut client) = config.connect(NoTls) else {
            // The server does not accept connections yet.
            std::thread::sleep(Duration::from_millis(5));
            continue;
        };
        let Ok([read, update]) = prepare(&mut client) else {
            continue;
        };
        for _ in 0..TRANSACTIONS_OF_A_SESSION {
            let id = wanted.sample(&mut random);
            let result = match updates && random.random_bool(0.1) {
                true => client.execute(&update, &[&id]).map(drop),
                false => client.query_one(&read, &[&id]).map(drop),
            };
            if result.is_err() || stop.load(Relaxed) {
                break;
            }
            let end = Instant::now();
            done.push((end, end - begin));
            begin = end;
        }
    }
    done
}

fn prepare(client: &mut Client) -> std::result::Result<[postgres::Statement; 2], postgres::Error> {
    Ok([
        client.prepare("SELECT length(filler) FROM t WHERE id = $1")?,
        client.prepare("UPDATE t SET filler = filler WHERE id = $1")?,
    ])
}

/// The rows that clients want, scattered over the table.
enum Wanted {
    Uniform(u32),
    Skewed(u32, Zipf<f64>),
}

impl Wanted {
    fn new(rows: Rows, blocks: u32) -> Self {
        match rows {
            Rows::Uniform => Self::Uniform(blocks),
            Rows::Skewed => {
                let zipf = Zipf::new(f64::from(blocks), 1.0).expect("there are rows");
                Self::Skewed(blocks, zipf)
            }
        }
    }

    fn sample(&self, random: &mut StdRng) -> i32 {
        let (rows, rank) = match self {
            Self::Uniform(rows) => (*rows, random.random_range(0..*rows)),
            Self::Skewed(rows, zipf) => (*rows, zipf.sample(random) as u32 - 1),
        };
        // A step that has no common factor with the number of rows visits each row once.
        (u64::from(rank) * 2_147_483_647 % u64::from(rows)) as i32 + 1
    }
}

/// Seconds of processor time that processes of the server have used.
#[derive(Clone, Copy, Debug, Default)]
struct ProcessorTimes {
    /// Autoprewarm's processes, and the server's I/O workers.
    load: f64,
    /// The clients' sessions.
    clients: f64,
}

impl ProcessorTimes {
    /// Looks at the processes of a cluster until it is told to stop. What a process uses
    /// between the last look and its end is missed.
    fn sample(data: &std::path::Path, stop: &AtomicBool) -> Self {
        let mut seen: HashMap<i32, (bool, f64)> = HashMap::new();
        while !stop.load(Relaxed) {
            for (pid, title, time) in processes(data) {
                let is_load = ["autoprewarm", "io worker"]
                    .iter()
                    .any(|text| title.contains(text));
                if is_load || title.contains(" app ") {
                    seen.insert(pid, (is_load, time));
                }
            }
            std::thread::sleep(Duration::from_millis(200));
        }
        let mut times = Self::default();
        for (is_load, time) in seen.into_values() {
            *(if is_load {
                &mut times.load
            } else {
                &mut times.clients
            }) += time;
        }
        times
    }
}

/// The processes of a cluster: process ID, title, and seconds of processor time.
fn processes(data: &std::path::Path) -> Vec<(i32, String, f64)> {
    let Some(postmaster) = fs::read_to_string(data.join("postmaster.pid"))
        .ok()
        .and_then(|text| text.lines().next()?.parse::<i32>().ok())
    else {
        return Vec::new();
    };
    let children = format!("/proc/{postmaster}/task/{postmaster}/children");
    let children = fs::read_to_string(children).unwrap_or_default();
    let ticks = rustix::param::clock_ticks_per_second() as f64;
    children
        .split_whitespace()
        .filter_map(|pid| {
            let title = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            let mut fields = stat.rsplit_once(") ")?.1.split(' ');
            let user: f64 = fields.nth(11)?.parse().ok()?;
            let system: f64 = fields.next()?.parse().ok()?;
            Some((
                pid.parse().ok()?,
                String::from_utf8_lossy(&title).into_owned(),
                (user + system) / ticks,
            ))
        })
        .collect()
}

fn throughput(transactions: &[Transaction]) -> f64 {
    match transactions {
        [first, .., last] => transactions.len() as f64 / (last.0 - first.0).as_secs_f64(),
        _ => 0.0,
    }
}

/// Transactions per second in each step, at the end of the step.
fn curve(transactions: &[Transaction], start: Instant, time: Duration) -> Vec<(f64, f64)> {
    let width = STEP.as_secs_f64();
    let mut counts = vec![0u32; (time.as_secs_f64() / width) as usize];
    for (end, _) in transactions {
        let step = (end.saturating_duration_since(start).as_secs_f64() / width) as usize;
        if let Some(count) = counts.get_mut(step) {
            *count += 1;
        }
    }
    (1..)
        .zip(counts)
        .map(|(step, count)| (f64::from(step) * width, f64::from(count) / width))
        .collect()
}

/// The median of each step.
fn median_curve(results: &[Result]) -> Vec<(f64, f64)> {
    (0..results[0].curve.len())
        .map(|step| {
            let rates: Vec<f64> = results.iter().map(|result| result.curve[step].1).collect();
            (results[0].curve[step].0, median(&rates))
        })
        .collect()
}
