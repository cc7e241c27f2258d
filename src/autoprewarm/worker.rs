//! A per-database worker: reads blocks of one database into shared buffers.
//!
//! Workers are not told what to load: each claims one chunk after another from the
//! [`Load`] that the leader has put into shared memory, until none is left for its
//! database. So several workers can share a large database, and a worker that dies
//! leaves undone only its current chunk, and those that it had set aside because
//! their relations were locked.
//!
//! A worker does not disturb other sessions: it never waits for a relation's lock,
//! releases its own every few milliseconds, holds no snapshot while it reads, and
//! reads only into free buffers.

use std::cell::Cell;
use std::ops::ControlFlow::{Break, Continue};
use std::time::{Duration, Instant};

use super::left::Settled;
use super::shared::{Claim, Cursor, Load, Slot, Stage, WorkerArgument};
use super::state::State;
use crate::blocks::{Fork, PlanView, SkipReason};
use crate::pace::{Pace, TURN};
use crate::pg::process::activity::{self, Kind, Progress, ShownProgress};
use crate::pg::process::latch::{WaitEvent, sleep_as_worker};
use crate::pg::process::transaction::{self, Transaction};
use crate::pg::process::{self, background};
use crate::pg::shared::segment::Segment;
use crate::pg::storage::prefault::Prefaulter;
use crate::pg::storage::relation::{Locator, Opened, Relation};
use crate::pg::storage::{ReadEnd, buffer, database};

/// When all other chunks are done, those that were set aside (usually because their
/// relations were locked) are retried. They are skipped after this time without
/// progress.
const LOCKED_TIMEOUT: Duration = Duration::from_secs(3);

/// How long to wait between two retries of chunks that were set aside.
const LOCKED_RETRY: Duration = Duration::from_millis(50);

/// How long to wait after a chunk was set aside before the next one is claimed. Most
/// locks are held only briefly, but long enough for a worker to set aside all chunks
/// of a large relation.
const LOCKED_PAUSE: Duration = Duration::from_millis(10);

/// How many such pauses a worker makes in all.
const LOCKED_PAUSES: usize = 50;

/// The longest sleep for the rate limit. The limit may change and the load may be
/// cancelled meanwhile.
const RATE_SLEEP: Duration = Duration::from_millis(50);

/// How often a worker updates its activity text.
const REPORT_INTERVAL: Duration = Duration::from_millis(250);

/// How many blocks are read one by one after a read has failed. The server combines
/// reads, and reports one unreadable block for all blocks of such a read. No version
/// combines more blocks than this.
const ONE_BY_ONE: usize = 32;

/// Runs a worker until no chunk is left for it.
pub fn main(argument: WorkerArgument) {
    background::handle_signals_as_worker();
    let Some(segment) = Segment::<Load, Cursor>::attach(argument.segment) else {
        // The leader has released the segment, so the load has ended.
        return;
    };
    let load = segment.header();
    let slot = &load.workers[argument.slot];
    slot.reach(Stage::Attached);
    background::connect_to_database(slot.database());
    slot.reach(Stage::Connected);

    let worker = Worker {
        state: State::attach(),
        load,
        slot,
        cursor: load.cursor(slot, segment.cells()),
        plan: PlanView::new(segment.words()),
        settled: Settled::of(&segment),
        prefaulter: Prefaulter::new(&load.prefaulted),
        pace: Pace::new(),
        database: database::name(slot.database()),
        reported: Cell::new(None),
        shortage_was_logged: Cell::new(false),
        progress: ShownProgress::new(Progress {
            kind: Kind::LoadWorker,
            relation: 0,
            fork: Fork::Main,
            total: 0,
            done: 0,
            skipped: 0,
            start: process::now(),
        }),
    };
    let mut set_aside = Vec::new();
    let mut pauses = 0..LOCKED_PAUSES;
    while let Some(claim) = load.next_claim(slot, segment.cells()) {
        worker.count_claim(claim);
        if let ChunkEnd::SetAside(rest) = worker.load_chunk(claim) {
            set_aside.push(rest);
            if pauses.next().is_some() {
                sleep_as_worker(Some(LOCKED_PAUSE), WaitEvent::LockedRelation);
            }
        }
        slot.give_up_claim();
    }
    worker.retry(set_aside);
    Progress::end();
    activity::report_idle();
    slot.reach(Stage::Finished);
    worker.state.wake_leader();
}

struct Worker<'a> {
    state: &'static State,
    load: &'a Load,
    slot: &'a Slot,
    /// The cursor of the worker's database.
    cursor: &'a Cursor,
    plan: PlanView<'a>,
    settled: Settled<'a>,
    prefaulter: Prefaulter<'a>,
    pace: Pace,
    /// The database's name, in the server's encoding.
    database: Vec<u8>,
    /// When the activity text was last updated.
    reported: Cell<Option<Instant>>,
    /// Whether a shortage of memory, locks or files was logged: one line is enough.
    shortage_was_logged: Cell<bool>,
    /// The worker's row in `pg_stat_progress_prewarm`.
    progress: ShownProgress,
}

/// How the work on a chunk ended.
enum ChunkEnd {
    Done,
    /// The rest is to be retried.
    SetAside(Rest),
}

/// The rest of a chunk that cannot be loaded now, and why it is skipped if that does not
/// change.
struct Rest {
    claim: Claim,
    reason: SkipReason,
}

/// How a turn ended if it raised no error.
enum TurnEnd {
    /// All blocks were read, or the time was up.
    Over,
    /// The relation is locked.
    Locked,
    /// There is no free buffer.
    Full,
    /// None of the remaining blocks can be loaded.
    Skip(SkipReason),
}

impl Worker<'_> {
    /// Adds a claimed chunk to the total in the progress view.
    fn count_claim(&self, claim: Claim) {
        let left = claim.blocks_left(self.plan) as u64;
        self.progress.change(|progress| progress.total += left);
    }

    /// Retries the chunks that were set aside, until there has been no progress for
    /// [`LOCKED_TIMEOUT`].
    fn retry(&self, mut set_aside: Vec<Rest>) {
        let mut last_progress = Instant::now();
        while !set_aside.is_empty() && !self.load.has_ended() {
            let last_try = last_progress.elapsed() >= LOCKED_TIMEOUT;
            let mut still = Vec::new();
            for rest in &set_aside {
                if let ChunkEnd::SetAside(rest) = self.load_chunk(rest.claim) {
                    still.push(rest);
                }
            }
            let claims = |rests: &[Rest]| rests.iter().map(|rest| rest.claim).collect::<Vec<_>>();
            if claims(&still) != claims(&set_aside) {
                last_progress = Instant::now();
            } else if last_try {
                for rest in &still {
                    self.skip(rest.reason, rest.claim.blocks_left(self.plan));
                }
                return;
            }
            set_aside = still;
            if !set_aside.is_empty() {
                sleep_as_worker(Some(LOCKED_RETRY), WaitEvent::LockedRelation);
            }
        }
    }

    /// Loads a chunk in turns, skipping blocks that cannot be loaded.
    fn load_chunk(&self, claim: Claim) -> ChunkEnd {
        let (_, blocks) = self.plan.chunk(claim.chunk);
        let total = blocks.numbers().len();
        let done = Cell::new(claim.done as usize);
        // Blocks before this one are read one by one.
        let mut one_by_one = 0;
        let mut warned = false;
        let set_aside = |reason| {
            let done = done.get() as u32;
            let claim = Claim { done, ..claim };
            ChunkEnd::SetAside(Rest { claim, reason })
        };
        while done.get() < total && !self.load.has_ended() {
            let wanted = total - done.get();
            let allowed = match self.load.rate_limit.take(wanted, process::monotonic_micros) {
                Ok(allowed) => allowed,
                Err(wait) => {
                    sleep_as_worker(Some(wait.min(RATE_SLEEP)), WaitEvent::RateLimit);
                    continue;
                }
            };
            self.report_now_and_then();
            let once_more = done.get() < one_by_one;
            let turn = Turn {
                chunk: claim.chunk,
                done: &done,
                most: if once_more { 1 } else { allowed },
                once_more,
                opened: Cell::new(false),
                read: Cell::new(0),
            };
            let end = match transaction::run(|transaction| self.load_turn(transaction, &turn)) {
                // Replay on a standby needed the relation. The blocks can be read later.
                Err(caught) if caught.is_conflict_with_recovery() => Ok(TurnEnd::Locked),
                end => end,
            };
            self.load.rate_limit.give_back(allowed - turn.read.get());
            match end {
                Ok(TurnEnd::Over) => {}
                Ok(TurnEnd::Locked) => return set_aside(SkipReason::Locked),
                Ok(TurnEnd::Full) => {
                    self.load.end_for(SkipReason::NoFreeBuffer);
                    return ChunkEnd::Done;
                }
                Ok(TurnEnd::Skip(reason)) => {
                    self.skip(reason, total - done.get());
                    self.set_done(claim.chunk, total);
                    return ChunkEnd::Done;
                }
                // Memory, locks or files are short, perhaps only for a moment.
                Err(caught) if caught.is_shortage() => {
                    if !self.shortage_was_logged.replace(true) {
                        self.state.last_error.record(&caught.message);
                        caught.warn();
                    }
                    return set_aside(SkipReason::Unreadable);
                }
                Err(caught) => {
                    // One line per chunk is enough: the counts tell how many blocks failed.
                    if !std::mem::replace(&mut warned, true) {
                        self.state.last_error.record(&caught.message);
                        caught.warn();
                    }
                    if !turn.opened.get() {
                        self.skip(SkipReason::Unreadable, total - done.get());
                        self.set_done(claim.chunk, total);
                        return ChunkEnd::Done;
                    } else if turn.once_more {
                        self.skip(SkipReason::Unreadable, 1);
                        done.set(done.get() + 1);
                    } else {
                        one_by_one = done.get() + ONE_BY_ONE;
                    }
                }
            }
            self.set_done(claim.chunk, done.get());
        }
        ChunkEnd::Done
    }

    /// Runs one turn: opens and locks the chunk's relation, and loads blocks until the
    /// time is up.
    fn load_turn(&self, transaction: &Transaction, turn: &Turn) -> TurnEnd {
        let start = Instant::now();
        let (chunk, blocks) = self.plan.chunk(turn.chunk);
        let locator = Locator {
            database: chunk.database,
            tablespace: chunk.tablespace,
            filenumber: chunk.filenumber,
        };
        let relation = match Relation::open_by_file_if_free(transaction, locator) {
            Opened::Open(relation) => relation,
            Opened::Locked => return TurnEnd::Locked,
            Opened::Gone => return TurnEnd::Skip(SkipReason::NoRelation),
        };
        if !relation.has_fork(chunk.fork) {
            return TurnEnd::Skip(SkipReason::NoBlock);
        }
        let relation_end = relation.blocks(chunk.fork);
        turn.opened.set(true);
        self.progress.change(|progress| {
            progress.relation = relation.oid();
            progress.fork = chunk.fork;
        });

        let first = turn.done.get();
        let numbers = &blocks.numbers()[first..];
        // The block numbers are in ascending order.
        let existing = numbers.partition_point(|&block| block < relation_end);
        if existing == 0 {
            return TurnEnd::Skip(SkipReason::NoBlock);
        }
        let wanted = existing.min(turn.most).min(self.pace.most_blocks());
        relation.look_up_tablespace();
        let tally = Tally::begin(self, turn);
        let end =
            relation.read_into_free_buffers(chunk.fork, &numbers[..wanted], |index, buffer| {
                buffer.restore_usage_count(blocks.usage_count(first + index));
                self.prefaulter.prefault_after(buffer.index());
                turn.done.set(turn.done.get() + 1);
                if start.elapsed() < TURN && !self.load.has_ended() {
                    Continue(())
                } else {
                    Break(())
                }
            });
        drop(tally);
        self.pace.adapt(start.elapsed(), turn.done.get() - first);
        match end {
            ReadEnd::Over => TurnEnd::Over,
            ReadEnd::Full => TurnEnd::Full,
        }
    }

    /// Records how many blocks of a chunk are done, be they loaded or skipped for good.
    fn set_done(&self, chunk: u32, done: usize) {
        self.slot.set_done(done);
        self.settled.settle(chunk, done);
    }

    /// Counts blocks as skipped.
    fn skip(&self, reason: SkipReason, blocks: usize) {
        self.state
            .load
            .skip(self.load.number(), reason, blocks as u64);
        self.progress
            .change(|progress| progress.skipped += blocks as u64);
    }

    /// Updates the activity text, if that is due.
    fn report_now_and_then(&self) {
        let reported = self.reported.get();
        if reported.is_none_or(|reported| reported.elapsed() >= REPORT_INTERVAL) {
            self.reported.set(Some(Instant::now()));
            let percent = format!(", {} %", self.cursor.percent_claimed());
            activity::report([b"loading ", &*self.database, percent.as_bytes()].concat());
        }
    }
}

/// What a turn is to do, and what it has done.
struct Turn<'a> {
    /// The index of the chunk.
    chunk: u32,
    /// How many of the chunk's blocks are done.
    done: &'a Cell<usize>,
    /// The maximum number of blocks to read.
    most: usize,
    /// Whether the blocks were tried before, in one read with an unreadable block.
    once_more: bool,
    /// Whether the relation was opened, so that an error concerns a block.
    opened: Cell<bool>,
    /// How many blocks were read that were not in shared buffers already.
    read: Cell<usize>,
}

/// Counts the blocks of a turn when it is dropped, thus after an error as well. The
/// counters that all workers share are updated once a turn, not once a block.
struct Tally<'a> {
    worker: &'a Worker<'a>,
    turn: &'a Turn<'a>,
    first: usize,
    hits: u64,
}

impl<'a> Tally<'a> {
    fn begin(worker: &'a Worker, turn: &'a Turn) -> Self {
        Self {
            worker,
            turn,
            first: turn.done.get(),
            hits: buffer::hits(),
        }
    }
}

impl Drop for Tally<'_> {
    fn drop(&mut self) {
        let blocks = (self.turn.done.get() - self.first) as u64;
        let cached = match self.turn.once_more {
            // These blocks are hits now only because the read that failed had put them
            // into shared buffers.
            true => 0,
            false => (buffer::hits() - self.hits).min(blocks),
        };
        let loaded = blocks - cached;
        self.turn.read.set(loaded as usize);
        let worker = self.worker;
        worker
            .state
            .load
            .count(worker.load.number(), loaded, cached);
        // If this worker is terminated before the next turn, the worker that gets the
        // rest of the chunk must not count these blocks again.
        worker.set_done(self.turn.chunk, self.turn.done.get());
        worker.progress.change(|progress| progress.done += blocks);
    }
}
