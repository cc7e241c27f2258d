//! Warm-up: the time until a restarted server has reached nine tenths of its warm
//! throughput in a skewed read-only workload, and the latency until then; without
//! prewarming, with contrib's module, and with ours.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use rand::distr::Distribution;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::Options;
use crate::common::{Cluster, LIST, Shutdown, value};
use crate::report::{Curve, Report, Samples, median};
use crate::side::{self, Side, SystemCache};

const CLIENTS: u64 = 4;

/// The steps of the curve.
const STEP: Duration = Duration::from_millis(500);

/// The end of each transaction after the start, and its latency.
type Transactions = Vec<(Duration, Duration)>;

pub fn run(options: &Options, report: &mut Report) {
    let size = options.size;
    let blocks = size.dense_blocks;
    let mut cluster = side::cluster(size.buffers, &[]);
    side::table(&cluster, "postgres", "t", blocks);
    cluster.sql("CREATE INDEX ON t (id)");
    cluster.sql("VACUUM ANALYZE t");
    cluster.sql("CREATE EXTENSION pg_prewarm VERSION '1.2'");

    eprintln!("   warming");
    let seconds = Duration::from_secs(size.warmup);
    work(&cluster, blocks, seconds);
    let warm = throughput(&work(&cluster, blocks, seconds / 2), seconds / 2);
    report.figure("warm-up: throughput when warm", warm, "/s");

    let mut curves = Vec::new();
    let mut lists = std::collections::HashMap::new();
    for side in Side::BOTH {
        cluster.stop(Shutdown::Fast);
        cluster.switch_to(side.installation());
        cluster.start();
        work(&cluster, blocks, seconds);
        let _: i64 = value(
            &mut cluster.connect("postgres"),
            "SELECT autoprewarm_dump_now()",
        );
        lists.insert(side.name(), cluster.list());
    }
    cluster.stop(Shutdown::Fast);

    let (mut times, mut waits) = (Samples::default(), Samples::default());
    for run in 0..options.runs {
        for side in [None, Some(Side::Contrib), Some(Side::Ours)] {
            let name = side.map_or("without", Side::name);
            let list = side.map(|side| lists[side.name()].as_str());
            side::prepare(
                &mut cluster,
                side.unwrap_or(Side::Ours),
                list,
                SystemCache::Cold,
                size.buffers,
            );
            assert_eq!(cluster.data(LIST).exists(), side.is_some());
            cluster.start();
            let transactions = work(&cluster, blocks, seconds);
            side::stop(&cluster);
            let curve = curve(&transactions, seconds);
            // A shared machine is faster at one time than at another, so each run
            // determines its own warm throughput, if it reaches one.
            let warm = if side.is_some() {
                plateau(&curve)
            } else {
                warm
            };
            let reached = curve
                .iter()
                .find(|(_, rate)| *rate >= warm * 0.9)
                .map_or(seconds.as_secs_f64(), |(end, _)| *end);
            let until: Vec<f64> = transactions
                .iter()
                .filter(|(end, _)| end.as_secs_f64() <= reached)
                .map(|(_, took)| took.as_secs_f64() * 1000.0)
                .collect();
            let p99 = percentile(until, 0.99);
            eprintln!("   run {}, {name}: {reached} s, p99 {p99:.2} ms", run + 1);
            if let Some(side) = side {
                times.add(side, reached);
                waits.add(side, p99);
            }
            if run == 0 {
                curves.push((name.to_owned(), curve));
            }
        }
    }
    report.compare("warm-up: time to 90 % of warm throughput", "s", &times);
    report.compare("warm-up: p99 latency until then", "ms", &waits);
    let curves: Vec<Curve> = curves;
    report.plot(
        "warmup",
        "Throughput after a restart",
        "seconds",
        "transactions a second",
        &curves,
    );
}

/// Runs the workload for that long.
fn work(cluster: &Cluster, blocks: u32, time: Duration) -> Transactions {
    let all = Mutex::new(Vec::new());
    let start = Instant::now();
    std::thread::scope(|scope| {
        for number in 0..CLIENTS {
            let all = &all;
            scope.spawn(move || {
                let mut client = cluster.connect("postgres");
                let query = client
                    .prepare("SELECT length(filler) FROM t WHERE id = $1")
                    .unwrap();
                let mut random = StdRng::seed_from_u64(number + start.elapsed().as_nanos() as u64);
                let skewed = Skewed::new(blocks);
                let mut mine = Vec::new();
                while start.elapsed() < time {
                    let id = skewed.sample(&mut random);
                    let before = Instant::now();
                    client.query_one(&query, &[&id]).unwrap();
                    mine.push((start.elapsed(), before.elapsed()));
                }
                all.lock().unwrap().extend(mine);
            });
        }
    });
    all.into_inner().unwrap()
}

/// Rows of which a tenth gets nine tenths of the reads. They are scattered over the
/// table.
struct Skewed {
    rows: u32,
}

impl Skewed {
    fn new(rows: u32) -> Self {
        Self { rows }
    }
}

impl Distribution<i32> for Skewed {
    fn sample<R: Rng + ?Sized>(&self, random: &mut R) -> i32 {
        let hot = self.rows / 10;
        let rank = if random.random_bool(0.9) {
            random.random_range(0..hot)
        } else {
            random.random_range(0..self.rows)
        };
        // A step that has no common factor with the number of rows visits each row
        // once.
        (u64::from(rank) * 2_147_483_647 % u64::from(self.rows)) as i32 + 1
    }
}

fn throughput(transactions: &Transactions, time: Duration) -> f64 {
    transactions.len() as f64 / time.as_secs_f64()
}

/// Transactions per second in each step, at the end of the step.
fn curve(transactions: &Transactions, time: Duration) -> Vec<(f64, f64)> {
    let steps = (time.as_secs_f64() / STEP.as_secs_f64()) as usize;
    let mut counts = vec![0u32; steps];
    for (end, _) in transactions {
        let step = (end.as_secs_f64() / STEP.as_secs_f64()) as usize;
        if let Some(count) = counts.get_mut(step) {
            *count += 1;
        }
    }
    let width = STEP.as_secs_f64();
    (1..)
        .zip(counts)
        .map(|(step, count)| (f64::from(step) * width, f64::from(count) / width))
        .collect()
}

/// The throughput of the last third of the curve.
fn plateau(curve: &[(f64, f64)]) -> f64 {
    let rates: Vec<f64> = curve.iter().map(|(_, rate)| *rate).collect();
    median(&rates[rates.len() * 2 / 3..])
}

fn percentile(mut values: Vec<f64>, part: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let last = values.len().saturating_sub(1);
    values
        .get((last as f64 * part) as usize)
        .copied()
        .unwrap_or(f64::NAN)
}
