//! The time and memory that long lists take, from the file to the plan.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::time::Instant;

use pg_prewarm_blocks::{BlockList, ListWriter, Plan, Record, UsageCount};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::common::{LIST, give_to_server};
use crate::report::{Report, Samples};
use crate::side::{self, Side, SystemCache};
use crate::{Options, machine};

pub fn run(options: &Options, report: &mut Report) {
    for records in [options.size.long_list, options.size.longer_list] {
        in_this_process(records, report, options);
    }
    in_a_server(options, report);
}

/// Writes a list of that many records, of 200 relations that do not exist.
fn write(path: &Path, records: u64, database: u32) {
    let mut random = StdRng::seed_from_u64(7);
    let mut writer = ListWriter::begin(File::create(path).unwrap(), records as usize).unwrap();
    for _ in 0..records {
        let record = Record {
            database,
            tablespace: 1663,
            filenumber: 4_000_000_000 + random.random_range(0..200),
            fork: 0,
            block: random.random_range(0..1_000_000),
        };
        let usage_count = UsageCount::new(random.random_range(0..6));
        writer.push(&record, usage_count).unwrap();
    }
    writer.finish().unwrap();
}

fn in_this_process(records: u64, report: &mut Report, options: &Options) {
    let path = options.out.join("long.list");
    write(&path, records, 5);
    let start = Instant::now();
    let file = File::open(&path).unwrap();
    let size = file.metadata().unwrap().len();
    let list = BlockList::read(file, size).unwrap();
    let read = start.elapsed();
    let plan = Plan::new(list, std::iter::empty(), u64::MAX).unwrap();
    let planned = start.elapsed();
    let peak = machine::status_kb(std::process::id() as i32, "VmRSS").unwrap();
    let words = plan.words();
    let what = |of: &str| format!("list of {records} records: {of}");
    report.figure(&what("read"), read.as_secs_f64(), "s");
    report.figure(&what("read and planned"), planned.as_secs_f64(), "s");
    report.figure(&what("memory of the process"), peak as f64 / 1024.0, "MB");
    report.figure(
        &what("shared memory a block"),
        words as f64 * 4.0 / records as f64,
        "B",
    );
    drop(plan);
    std::fs::remove_file(path).unwrap();
}

/// The time from the start of the server to the end of a load that finds no block.
fn in_a_server(options: &Options, report: &mut Report) {
    let mut cluster = side::cluster(options.size.buffers, &[]);
    let database = cluster.value("SELECT oid FROM pg_database WHERE datname = 'postgres'");
    cluster.stop(crate::common::Shutdown::Fast);
    let source = options.out.join("server.list");
    write(&source, options.size.long_list, database);
    let mut samples = Samples::default();
    for _ in 0..options.runs.min(3) {
        for side in Side::BOTH {
            side::prepare(&mut cluster, side, None, SystemCache::Warm, 0);
            let list = cluster.data(LIST);
            let mut copy = BufWriter::new(File::create(&list).unwrap());
            std::io::copy(&mut File::open(&source).unwrap(), &mut copy).unwrap();
            copy.flush().unwrap();
            give_to_server(&list);
            let took = side::start_and_wait(&cluster);
            side::stop(&cluster);
            samples.add(side, took.as_secs_f64());
        }
    }
    std::fs::remove_file(source).unwrap();
    let what = format!(
        "list of {} records of missing relations, in a server",
        options.size.long_list
    );
    report.compare(&what, "s", &samples);
}
