//! What `make torture` and `make restarts` run: a real server, and everything that
//! can be done to it, round after round.
//!
//! A round changes the workload (three databases, one of them in a tablespace of
//! its own; tables and indexes that come, grow, shrink and go; unlogged tables),
//! then does one kind of fault, most of them in mid-load, in mid-dump or in
//! mid-call at a moment that chance decides, in half of the rounds while other
//! sessions work beside it. What is done to the server is in one file a family:
//! `crash`, `signals`, `list_faults`, `pages`, `scarcity`, `rivals`, `standbys`.
//!
//! After each round, `check` sees that
//! - the server answers, there is one leader, and the load has ended;
//! - no process died of a signal that the round had not sent, nothing panicked, no
//!   assertion failed, and autoprewarm's processes complained of nothing else than
//!   what was done to them (the server's log tells);
//! - `pg_stat_autoprewarm` tells the truth: the leader's process ID, a load whose
//!   blocks add up and are what the log says, skipped blocks only for the reasons
//!   that there were, the last error if there had to be one and none otherwise,
//!   the number of records of the last dump;
//! - what the list named is cached, and no process at rest has a buffer pinned, a
//!   lock, or a row in `pg_stat_progress_prewarm`;
//! - the list on disk is complete to its checksum, is the one that was logged last,
//!   and still names every block of tables that nobody has changed;
//! - every row of every table is there and right, and amcheck finds nothing wrong
//!   (`pg_amcheck` and `pg_checksums` over everything at the end);
//! - nothing has leaked: open files and private memory of the leader and the
//!   postmaster (from /proc), dynamic shared memory (files of the cluster).
//!
//! Everything that is left to chance follows from the seed and the round's number,
//! but for the system's own timing; every kind of fault comes up once before any
//! comes up again. The environment says: `ROUNDS`, or `DURATION` in seconds;
//! `SEED`; `ONLY`, a part of the kinds' names; `ROUND`, to do one round alone. A
//! round that finds something is printed with the server's log, and the next one
//! has a new cluster. The exit status tells whether there was any.

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

use rand::Rng;
use rand::seq::SliceRandom;

use arena::{Arena, Round};
use churn::Churn;

/// A kind of fault: its name, and what it does.
type Kind = (&'static str, fn(&mut Arena));

/// A number of the environment's.
fn number(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok().filter(|value| !value.is_empty())?;
    Some(
        value
            .parse()
            .unwrap_or_else(|_| panic!("{name}={value}: not a number")),
    )
}

/// Which rounds there are to be.
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

    /// The rounds, until their time is over.
    pub fn rounds(&self) -> impl Iterator<Item = u64> {
        let is_over = || self.end.is_some_and(|end| Instant::now() >= end);
        self.rounds.clone().take_while(move |_| !is_over())
    }
}

/// Findings after which it makes no sense to go on.
const ENOUGH: usize = 10;

fn main() -> ExitCode {
    // Cargo has options of its own for tests.
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

/// The kind of a round: all come up once before any comes up again.
fn kind_of(kinds: &[Kind], seed: u64, round: u64) -> Kind {
    let count = kinds.len() as u64;
    let mut order = kinds.to_vec();
    order.shuffle(&mut arena::rng(!seed, round / count));
    order[(round % count) as usize]
}

/// The rounds of one kind, and how often autoprewarm's processes have complained of
/// what was done: that shows whether it has hurt.
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
    arena.work();
    let churn = arena.round.rng.random_bool(0.5);
    let churn = churn.then(|| Churn::begin(arena, churn::ordinary, 1));
    fault(arena);
    if let Some(churn) = churn {
        churn.end();
    }
    arena.settle();
    arena.clear_up();
    arena.check();
}
