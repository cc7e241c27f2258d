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
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering::SeqCst};
use std::time::{Duration, SystemTime};

use postgres::config::Host;

use crate::Options;
use crate::common::{Cluster, Shutdown, value};
use crate::report::{Curve, Report, Samples, median};
use crate::side::{self, Side, SystemCache};

/// The steps of the curve, in seconds.
const STEP: f64 = 0.25;

/// How long the throughput has to stay warm, in seconds.
const WARM_FOR: f64 = 2.0;

/// How long transactions are counted, in seconds.
const COUNTED: f64 = 10.0;

/// How long the warm throughput is measured.
const WARM_MEASURED: Duration = Duration::from_secs(3);

/// After so many transactions a client connects again.
const TRANSACTIONS_OF_A_SESSION: usize = 10_000;

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

/// A transaction: when it ended, in seconds since 1970, and how long it took, in seconds.
type Transaction = (f64, f64);

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
    cluster.stop(Shutdown::Fast);

    for case in cases() {
        measure(case, &mut cluster, options, report);
    }
}

fn measure(case: &Case, cluster: &mut Cluster, options: &Options, report: &mut Report) {
    let size = options.size;
    let seconds = Duration::from_secs(size.busy_seconds);
    eprintln!("   {}: the list", case.name);
    cluster.switch_to(Side::Ours.installation());
    cluster.configure("pg_prewarm.autoprewarm_hold_connections = 0");
    let all = size.buffers;
    cluster.configure(&format!("shared_buffers = {all}MB"));
    cluster.start();
    cluster.sql(PREWARM);
    let clients = Clients::begin(case, cluster, size.dense_blocks);
    std::thread::sleep(seconds / 3);
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
    for run in 0..options.runs {
        for &way in ways {
            let limit = if way == Way::Held { HOLD } else { "0" };
            side::prepare(cluster, way.side(), Some(&list), SystemCache::Cold, buffers);
            if way != Way::Contrib {
                cluster.configure(&format!(
                    "pg_prewarm.autoprewarm_hold_connections = {limit}"
                ));
            }
            let result = one_run(case, cluster, size.dense_blocks, seconds);
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

fn one_run(case: &Case, cluster: &Cluster, blocks: u32, seconds: Duration) -> Result {
    let mark = cluster.log_end();
    let clients = Clients::begin(case, cluster, blocks);
    cluster.start();
    let start = logged_time(&cluster.log_since(mark), "ready to accept connections")
        .expect("the server has said so");
    std::thread::sleep(seconds.saturating_sub(Duration::from_secs_f64(now() - start)));
    let load_end = logged_time(&cluster.log_since(mark), "successfully prewarmed");
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
    side::stop(cluster);

    let warm = transactions
        .iter()
        .filter(|(end, _)| (warm_from..warm_until).contains(end))
        .count() as f64
        / (warm_until - warm_from);
    assert!(warm > 0.0, "the clients have done nothing");
    let curve = curve(&transactions, start, seconds);
    let steps = (WARM_FOR / STEP) as usize;
    let is_warm = |steps: &[(f64, f64)]| {
        let sum: f64 = steps.iter().map(|step| step.1).sum();
        sum / steps.len() as f64 >= warm * 0.9
    };
    let warm_after = curve
        .windows(steps)
        .find(|steps| is_warm(steps))
        .map_or(seconds.as_secs_f64(), |steps| steps[0].0 - STEP);
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
        transactions: until(COUNTED.min(seconds.as_secs_f64())).count() as f64,
        warm,
        warm_after,
        latencies: [0.5, 0.99, 1.0].map(percentile),
        load_end: load_end.map_or(f64::NAN, |end| end - start),
        load_time: times.load,
        client_time: times.clients,
        curve,
    }
}

/// Seconds since 1970.
fn now() -> f64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.expect("1970 is over").as_secs_f64()
}

/// The time of a line of the log, in seconds since 1970.
fn logged_time(log: &str, text: &str) -> Option<f64> {
    let line = log.lines().find(|line| line.contains(text))?;
    line.split_whitespace().next()?.parse().ok()
}

const PREWARM: &str = "SELECT pg_prewarm('t'), pg_prewarm('t_id_idx')";

/// Clients at work, each in a thread that runs one pgbench after another, and the processor
/// time of the server's processes.
struct Clients {
    stop: Arc<AtomicBool>,
    clients: Vec<Client>,
    sampled: Arc<AtomicBool>,
    sampler: std::thread::JoinHandle<ProcessorTimes>,
    /// Where the scripts and the logs of transactions are.
    directory: PathBuf,
}

struct Client {
    /// The pgbench that runs; 0 if none does.
    process: Arc<AtomicI32>,
    /// Returns when each pgbench was started, in seconds since 1970, by process ID.
    thread: std::thread::JoinHandle<HashMap<u32, f64>>,
}

impl Clients {
    /// They connect as soon as the server lets them.
    fn begin(case: &Case, cluster: &Cluster, blocks: u32) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        // In memory, if there is a file system for that: the disk is what is measured.
        let memory = Path::new("/dev/shm");
        let parent = match memory.is_dir() {
            true => memory.to_owned(),
            false => std::env::temp_dir(),
        };
        let directory = parent.join(format!("pg_prewarm-busy-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let row = match case.rows {
            Rows::Uniform => format!("random(1, {blocks})"),
            // The most wanted rows are the same for all, and scattered over the table.
            Rows::Skewed => {
                format!("1 + permute(random_zipfian(1, {blocks}, 1.001) - 1, {blocks}, 1)")
            }
        };
        let script = |name: &str, statement: &str| {
            let file = directory.join(name);
            fs::write(
                &file,
                format!("\\set id {row}\n{statement} WHERE id = :id;\n"),
            )
            .unwrap();
            file
        };
        let mut scripts = vec![(script("read", "SELECT octet_length(filler) FROM t"), 9)];
        if case.updates {
            scripts.push((script("update", "UPDATE t SET filler = filler"), 1));
        }
        let config = cluster.config();
        let [Host::Unix(socket)] = config.get_hosts() else {
            unreachable!("clusters listen on a socket only");
        };
        let pgbench = Side::Ours.installation().bin().join("pgbench");
        let clients = (0..case.clients)
            .map(|number| {
                let mut command = Command::new(&pgbench);
                command
                    .args(["--no-vacuum", "--protocol=prepared", "--log"])
                    .arg(format!("--transactions={TRANSACTIONS_OF_A_SESSION}"))
                    .arg(format!("--log-prefix={}", directory.join("log").display()))
                    .arg(format!("--host={}", socket.display()))
                    .args(["--username=app", "postgres"])
                    .stdout(Stdio::null())
                    .stderr(Stdio::null());
                for (script, weight) in &scripts {
                    command.arg(format!("--file={}@{weight}", script.display()));
                }
                let process = Arc::new(AtomicI32::new(0));
                let (stop, running) = (stop.clone(), process.clone());
                let thread = std::thread::spawn(move || client(number, command, &running, &stop));
                Client { process, thread }
            })
            .collect();
        let data = cluster.data("");
        let sampled = Arc::new(AtomicBool::new(false));
        let end = sampled.clone();
        let sampler = std::thread::spawn(move || ProcessorTimes::sample(&data, &end));
        Self {
            stop,
            clients,
            sampled,
            sampler,
            directory,
        }
    }

    /// Ends the measurement of processor time.
    fn end_sampling(&self) {
        self.sampled.store(true, SeqCst);
    }

    /// Stops them. Their transactions are in the order in which they ended.
    fn end(self) -> (Vec<Transaction>, ProcessorTimes) {
        self.end_sampling();
        self.stop.store(true, SeqCst);
        let mut begins = HashMap::new();
        for client in self.clients {
            let process = client.process.load(SeqCst);
            if process != 0 {
                // SAFETY: a signal to a child. It fails if that has just ended.
                unsafe { libc::kill(process, libc::SIGTERM) };
            }
            begins.extend(client.thread.join().unwrap());
        }
        let mut all = Vec::new();
        for (process, begin) in begins {
            // The log of a pgbench that could not connect does not exist.
            let log = self.directory.join(format!("log.{process}"));
            let log = fs::read_to_string(log).unwrap_or_default();
            // The last line may not have been written to its end.
            let mut transactions = log.lines().map_while(transaction);
            if let Some((end, _)) = transactions.next() {
                all.push((end, end - begin));
            }
            all.extend(transactions);
        }
        fs::remove_dir_all(&self.directory).expect("the clients' logs can be removed");
        all.sort_by(|one, other| one.0.total_cmp(&other.0));
        (all, self.sampler.join().unwrap())
    }
}

/// Runs one pgbench after another until it is told to stop. Each wants other rows, and the
/// same ones in each run.
fn client(
    number: usize,
    mut command: Command,
    running: &AtomicI32,
    stop: &AtomicBool,
) -> HashMap<u32, f64> {
    let mut begins = HashMap::new();
    let mut sessions = 0;
    while !stop.load(SeqCst) {
        command.env(
            "PGBENCH_RANDOM_SEED",
            (number * 1_000_000 + sessions).to_string(),
        );
        let begin = now();
        let mut pgbench = command.spawn().expect("pgbench cannot be started");
        running.store(pgbench.id().cast_signed(), SeqCst);
        if stop.load(SeqCst) {
            let _ = pgbench.kill();
        }
        begins.insert(pgbench.id(), begin);
        if pgbench.wait().unwrap().success() {
            sessions += 1;
        } else {
            // The server does not accept connections yet.
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    begins
}

/// A line of pgbench's log: client, transaction, microseconds, script, and when it ended, in
/// seconds and microseconds.
fn transaction(line: &str) -> Option<Transaction> {
    let fields: Vec<f64> = line
        .split(' ')
        .map_while(|field| field.parse().ok())
        .collect();
    let &[_, _, took, _, seconds, micros] = &fields[..] else {
        return None;
    };
    Some((seconds + micros / 1e6, took / 1e6))
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
        while !stop.load(SeqCst) {
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

/// Transactions per second in each step, at the end of the step.
fn curve(transactions: &[Transaction], start: f64, time: Duration) -> Vec<(f64, f64)> {
    let mut counts = vec![0u32; (time.as_secs_f64() / STEP) as usize];
    for (end, _) in transactions {
        if let Some(count) = counts.get_mut(((end - start).max(0.0) / STEP) as usize) {
            *count += 1;
        }
    }
    (1..)
        .zip(counts)
        .map(|(step, count)| (f64::from(step) * STEP, f64::from(count) / STEP))
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
