//! `make bench`: contrib's module and ours, side by side.
//!
//! In each scenario both load the same list into the same cluster, alternately (A B A B
//! …), on the same machine in the same run; what matters is the ratio of the medians.
//! The arguments name the scenarios to run; without any, all are run. The environment
//! variables are `SIZE` (`smoke` or `full`), `RUNS` (how many times), `HUGE_PAGES` (`on` or
//! `off`), `CASES` (names of cases, with commas, in the scenarios that have such),
//! `READ_DELAY` (milliseconds, in `failover`), `SETTINGS` (lines for `postgresql.conf`, with
//! semicolons), and `OUT`, the directory for the results as JSON and SVG. They are also
//! printed as tables.

#![allow(clippy::cast_possible_truncation)]

#[allow(dead_code)]
#[path = "../tests/common/mod.rs"]
mod common;

mod busy;
mod clients;
mod counters;
mod dump;
mod failover;
mod following;
mod lists;
mod load;
mod machine;
mod modes;
mod report;
mod shrunk;
mod side;

use std::path::PathBuf;

use report::Report;

/// The size of everything.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// `shared_buffers`, in MB.
    buffers: u32,
    dense_blocks: u32,
    /// The blocks of the table, and how many of them are listed.
    sparse_blocks: (u32, u32),
    small_tables: u32,
    /// The blocks of each of the eight databases.
    database_blocks: u32,
    /// The records of the generated lists.
    long_list: u64,
    longer_list: u64,
    /// Seconds of each run with busy clients, at most.
    busy_seconds: u64,
}

const FULL: Size = Size {
    buffers: 4096,
    dense_blocks: 393_216,
    sparse_blocks: (1_048_576, 200_000),
    small_tables: 4000,
    database_blocks: 20_000,
    long_list: 16_000_000,
    longer_list: 134_000_000,
    busy_seconds: 25,
};

const SMOKE: Size = Size {
    buffers: 256,
    dense_blocks: 20_000,
    sparse_blocks: (30_000, 5_000),
    small_tables: 100,
    database_blocks: 1_000,
    long_list: 1_000_000,
    longer_list: 4_000_000,
    busy_seconds: 4,
};

/// The options of a run.
pub struct Options {
    size: Size,
    runs: usize,
    out: PathBuf,
    /// The names of the cases to be measured, in the scenarios that have such; all, if there
    /// are none.
    cases: Vec<String>,
}

impl Options {
    fn includes(&self, case: &str) -> bool {
        self.cases.is_empty() || self.cases.iter().any(|chosen| chosen == case)
    }
}

type Scenario = fn(&Options, &mut Report);

fn main() {
    let chosen: Vec<String> = std::env::args()
        .skip(1)
        .filter(|arg| !arg.starts_with('-'))
        .collect();
    let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let size = match variable("SIZE").as_deref() {
        None | Some("full") => FULL,
        Some("smoke") => SMOKE,
        Some(other) => panic!("SIZE={other}: full or smoke"),
    };
    let options = Options {
        size,
        runs: variable("RUNS").map_or(5, |runs| runs.parse().expect("RUNS is a number")),
        out: variable("OUT").map_or("target/bench".into(), PathBuf::from),
        cases: variable("CASES")
            .map(|cases| cases.split(',').map(str::to_owned).collect())
            .unwrap_or_default(),
    };
    let mut report = Report::new(&options);
    let scenarios: [(&str, Scenario); 9] = [
        // First, since it measures the memory of this process.
        ("lists", lists::run),
        ("load", load::run),
        ("busy", busy::run),
        ("dump", dump::run),
        ("shrunk", shrunk::run),
        ("counters", counters::run),
        ("modes", modes::run),
        ("failover", failover::run),
        ("following", following::run),
    ];
    for (name, run) in scenarios {
        if chosen.is_empty() || chosen.iter().any(|chosen| chosen == name) {
            eprintln!("== {name}");
            run(&options, &mut report);
        }
    }
    report.finish();
}
