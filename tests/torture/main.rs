//! `make torture` and `make restarts`: faults of all kinds in a real server, round
//! after round.
//!
//! A round changes the workload (three databases, one of them in a tablespace of its
//! own; tables and indexes that are created, grow, shrink and are dropped; unlogged
//! tables). Then it injects one kind of fault, mostly at a random time during a load, a
//! dump or a call. In half of the rounds other sessions are busy at the same time. Each
//! family of faults has a file: `crash`, `signals`, `list_faults`, `pages`, `scarcity`,
//! `rivals`, `standbys`.
//!
//! After each round, `check` verifies that
//! - the server answers, one leader is running, and the load has ended;
//! - no process was terminated by a signal that the round had not sent, nothing
//!   panicked, no assertion failed, and autoprewarm's processes logged errors only about
//!   what the round has done;
//! - `pg_stat_autoprewarm` is right: the leader's process ID, the counters of the load,
//!   which must add up and equal those in the log, the reasons for skipped blocks, the
//!   last error, and the number of records of the last dump;
//! - all listed blocks are cached, and no idle process has a buffer pin, a lock, or a row
//!   in `pg_stat_progress_prewarm`;
//! - the list is complete, its checksum is right, it is the last one that was logged, and
//!   it has every block of the tables that never change;
//! - every row of every table exists and is right, and amcheck finds nothing wrong
//!   (`pg_amcheck` and `pg_checksums` check everything at the end);
//! - nothing has leaked: open files and private memory of the leader and the postmaster
//!   (from /proc), and dynamic shared memory (files of the cluster).
//!
//! Except for the system's own timing, everything random follows from the seed and the
//! number of the round. Every kind of fault occurs once before any occurs again. The
//! environment variables are `ROUNDS`, or `DURATION` in seconds; `SEED`; `ONLY`, a part
//! of the names of kinds; `ROUND`, to run one round only. If a check fails, the round
//! is printed with the server's log, and the next round has a new cluster. The exit
//! status is 1 if any check has failed.

#![allow(clippy::cast_possible_truncation)]

#[allow(dead_code)]
#[path = "../common/mod.rs"]
mod common;

mod arena;
mod census;
mod check;
mod churn;
mod crash;
mod list;
mod list_faults;
mod pages;
mod process;
mod restarts;
mod rivals;
mod scarcity;
mod signals;
mod standbys;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime};

use rand::seq::SliceRandom;

use arena::{Arena, Round};
use churn::Churn;

/// A kind of fault: its name, and the function that injects it.
type Kind = (&'static str, fn(&mut Arena));

/// A number in an environment variable.
fn number(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok().filter(|value| !value.is_empty())?;
    Some(
        value
            .parse()
            .unwrap_or_else(|_| panic!("{name}={value}: not a number")),
    )
}

/// Which rounds are run.
pub struct Plan {
    seed: u64,
    rounds: std::ops::Range<u64>,
    end: Option<Instant>,
}

impl Plan {
    fn from_environment() -> Self {
        let now = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap();
        let seconds = number("DURATION");
        let rounds = match (number("ROUND"), number("ROUNDS")) {
            (Some(round), _) => round..round + 1,
            (None, Some(rounds)) => 0..rounds,
            (None, None) if seconds.is_some() => 0..u64::MAX,
            (None, None) => 0..100,
        };
        Self {
            seed: number("SEED").unwrap_or(now.as_secs() % 1_000_000),
            rounds,
            end: seconds.map(|seconds| Instant::now() + Duration::from_secs(seconds)),
        }
    }

    /// The rounds, until the time is over.
    pub fn rounds(&self) -> impl Iterator<Item = u64> {
        let is_over = || self.end.is_some_and(|end| Instant::now() >= end);
        self.rounds.clone().take_while(move |_| !is_over())
    }
}

/// After so many failed rounds, the run ends.
const ENOUGH: usize = 10;

fn main() -> ExitCode {
    // Cargo passes the options of its own test harness.
    let mode = std::env::args()
        .skip(1)
        .find(|argument| !argument.starts_with('-'));
    let plan = Plan::from_environment();
    println!("seed {}", plan.seed);
    let findings = match mode.as_deref() {
        Some("restarts") => restarts::run(&plan),
        _ => torture(&plan),
    };
    println!("{findings} findings (seed {})", plan.seed);
    ExitCode::from(u8::from(findings > 0))
}

fn kinds() -> Vec<Kind> {
    let only = std::env::var("ONLY").unwrap_or_default();
    let all = [
        crash::FAULTS,
        signals::FAULTS,
        list_faults::FAULTS,
        pages::FAULTS,
        scarcity::FAULTS,
        rivals::FAULTS,
        standbys::FAULTS,
    ];
    let kinds: Vec<Kind> = all
        .concat()
        .into_iter()
        .filter(|(name, _)| name.contains(&only))
        .collect();
    assert!(
        !kinds.is_empty(),
        "ONLY={only}: there is no such kind of fault"
    );
    kinds
}

/// The kind of a round: every kind occurs once before any occurs again.
fn kind_of(kinds: &[Kind], seed: u64, round: u64) -> Kind {
    let count = kinds.len() as u64;
    let mut order = kinds.to_vec();
    order.shuffle(&mut arena::rng(!seed, round / count));
    order[(round % count) as usize]
}

/// The rounds of a kind, and how many errors autoprewarm's processes have logged about
/// the faults, which shows whether these had an effect.
#[derive(Default)]
struct Sum {
    rounds: u32,
    time: Duration,
    complaints: usize,
}

fn torture(plan: &Plan) -> usize {
    let kinds = kinds();
    let mut arena = Arena::new();
    let mut findings = 0;
    let mut sums: BTreeMap<&str, Sum> = BTreeMap::new();
    for round in plan.rounds() {
        let kind = kind_of(&kinds, plan.seed, round);
        let start = Instant::now();
        let finding = catch_unwind(AssertUnwindSafe(|| {
            one_round(&mut arena, plan.seed, round, kind)
        }));
        let complaints = check::complaints(&arena.cluster.log_since(arena.round.mark));
        println!(
            "round {round}: {}, {:.1} s, {complaints} complaints",
            kind.0,
            start.elapsed().as_secs_f64()
        );
        let sum = sums.entry(kind.0).or_default();
        sum.rounds += 1;
        sum.time += start.elapsed();
        sum.complaints += complaints;
        if finding.is_err() {
            findings += 1;
            println!(
                "FINDING in round {round} ({}) of seed {}:",
                kind.0, plan.seed
            );
            println!("{}", arena.cluster.log_since(arena.round.mark));
            println!("{:?}", process::all(&arena.cluster.data("")));
            println!("that was round {round} ({}) of seed {}", kind.0, plan.seed);
            if findings >= ENOUGH {
                return findings;
            }
            let most = arena.census.most;
            arena = Arena::new();
            arena.census.most = most;
        }
    }
    for (name, sum) in &sums {
        println!(
            "{name}: {} rounds, {:.0} s, {} complaints",
            sum.rounds,
            sum.time.as_secs_f64(),
            sum.complaints
        );
    }
    println!("{}", arena.census.most);
    let thorough = catch_unwind(AssertUnwindSafe(|| arena.check_thoroughly()));
    findings + usize::from(thorough.is_err())
}

fn one_round(arena: &mut Arena, seed: u64, round: u64, (_, fault): Kind) {
    arena.round = Round::new(seed, round, arena.cluster.log_end());
    arena.round.allocated = arena.count_allocated();
    arena.work();
    arena.round.is_busy = arena.round.coin();
    let churn = arena
        .round
        .is_busy
        .then(|| Churn::begin(arena, churn::ordinary, 1));
    fault(arena);
    if let Some(churn) = churn {
        churn.end();
    }
    arena.settle();
    arena.clear_up();
    arena.check();
}
