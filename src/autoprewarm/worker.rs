//! A per-database worker: reads blocks of one database into shared buffers.
//!
//! Workers are not told what to load: each claims one chunk after another from
//! the [`Load`] that the leader has put into shared memory, until there is none
//! left for its database. So several of them share a large database, and one that
//! dies leaves no more undone than the chunk that it was at, and those that it had
//! set aside because their relations were locked.
//!
//! A worker is a good neighbour: it never waits for a lock, gives its own back
//! every few milliseconds, holds no snapshot while it reads, and reads only into
//! free buffers.

use std::cell::Cell;
use std::ops::ControlFlow::{Break, Continue};
use std::time::{Duration, Instant};

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

/// How long chunks that were set aside, of locked relations as a rule, are tried
/// again in vain, once all others are done, before they are skipped; and how long
/// to wait between two tries.
const LOCKED_PATIENCE: Duration = Duration::from_secs(3);
const LOCKED_RETRY: Duration = Duration::from_millis(50);

/// How long to wait before the next chunk is claimed after one whose relation was
/// locked, and how often in all. Most locks are held for a moment, in which one
/// worker would set aside the whole of a large relation.
const LOCKED_PAUSE: Duration = Duration::from_millis(10);
const LOCKED_PAUSES: usize = 50;

/// The longest sleep for the rate limit, after which it may be another, or the
/// load be cancelled.
const RATE_PATIENCE: Duration = Duration::from_millis(50);

/// How often a worker says anew how far it is, where that means to format a text.
const REPORT_INTERVAL: Duration = Duration::from_millis(250);

/// After a read has failed, so many blocks are read one by one: the server reads
/// several at once, and says of all of them that they could not be read. No
/// version combines more.
const ONE_BY_ONE: usize = 32;

/// A worker's life.
pub fn main(argument: WorkerArgument) {
    background::handle_signals_as_worker();
    let Some(segment) = Segment::<Load, Cursor>::attach(argument.segment) else {
        // The leader has let go of it: there is nothing to do any more.
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
    /// Its database's.
    cursor: &'a Cursor,
    plan: PlanView<'a>,
    prefaulter: Prefaulter<'a>,
    pace: Pace,
    /// The database's name, in the server's encoding.
    database: Vec<u8>,
    /// When it last said how far it is.
    reported: Cell<Option<Instant>>,
    /// Chunks are set aside again and again, and one line is enough.
    shortage_was_logged: Cell<bool>,
    /// What `pg_stat_progress_prewarm` shows of it.
    progress: ShownProgress,
}

/// How the work on a chunk ended.
enum ChunkEnd {
    Done,
    /// What is left is to be tried again.
    SetAside(Rest),
}

/// What is left of a chunk that cannot be loaded as things are, and why it is
/// skipped if they stay so.
struct Rest {
    claim: Claim,
    reason: SkipReason,
}

/// How a turn ended, short of an error.
enum TurnEnd {
    /// The blocks, or the time, are used up.
    Over,
    Locked,
    /// There is no free buffer.
    Full,
    /// Neither the next block nor those after it can be loaded.
    Skip(SkipReason),
}

impl Worker<'_> {
    fn count_claim(&self, claim: Claim) {
        let left = claim.blocks_left(self.plan) as u64;
        self.progress.change(|progress| progress.total += left);
    }

    /// Tries what was set aside again, until nothing has come of it for a while.
    fn retry(&self, mut set_aside: Vec<Rest>) {
        let mut last_progress = Instant::now();
        while !set_aside.is_empty() && !self.load.has_ended() {
            let last_try = last_progress.elapsed() >= LOCKED_PATIENCE;
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

    /// Loads what can be loaded of a chunk, turn by turn.
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
                    sleep_as_worker(Some(wait.min(RATE_PATIENCE)), WaitEvent::RateLimit);
                    continue;
                }
            };
            self.report_now_and_then();
            let once_more = done.get() < one_by_one;
            let turn = Turn {
                done: &done,
                most: if once_more { 1 } else { allowed },
                once_more,
                opened: Cell::new(false),
                read: Cell::new(0),
            };
            let end = match transaction::run(|transaction| {
                self.load_turn(transaction, claim.chunk, &turn)
            }) {
                // The blocks are as readable as before, once replay has had its turn.
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
                    return ChunkEnd::Done;
                }
                // Memory, locks or files: there may be enough in a moment.
                Err(caught) if caught.is_shortage() => {
                    if !self.shortage_was_logged.replace(true) {
                        self.state.last_error.record(&caught.message);
                        caught.warn();
                    }
                    return set_aside(SkipReason::Unreadable);
                }
                Err(caught) => {
                    // One line is enough: the counts tell the rest.
                    if !std::mem::replace(&mut warned, true) {
                        self.state.last_error.record(&caught.message);
                        caught.warn();
                    }
                    if !turn.opened.get() {
                        self.skip(SkipReason::Unreadable, total - done.get());
                        return ChunkEnd::Done;
                    } else if turn.once_more {
                        self.skip(SkipReason::Unreadable, 1);
                        done.set(done.get() + 1);
                    } else {
                        one_by_one = done.get() + ONE_BY_ONE;
                    }
                }
            }
            self.slot.set_done(done.get());
        }
        ChunkEnd::Done
    }

    /// Loads blocks of a chunk, under one lock on their relation, until the turn
    /// is over.
    fn load_turn(&self, transaction: &Transaction, chunk: u32, turn: &Turn) -> TurnEnd {
        let start = Instant::now();
        let (chunk, blocks) = self.plan.chunk(chunk);
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
        // Numbers are in ascending order.
        let existing = numbers.partition_point(|&block| block < relation_end);
        if existing == 0 {
            return TurnEnd::Skip(SkipReason::NoBlock);
        }
        let wanted = existing.min(turn.most).min(self.pace.most_blocks());
        relation.look_up_tablespace();
        let tally = Tally::begin(self, turn);
        let end =
            relation.read_into_free_buffers(chunk.fork, &numbers[..wanted], |index, buffer| {
                buffer.restore_heat(blocks.heat(first + index));
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

    fn skip(&self, reason: SkipReason, blocks: usize) {
        self.state
            .load
            .skip(self.load.number(), reason, blocks as u64);
        self.progress
            .change(|progress| progress.skipped += blocks as u64);
    }

    /// Says what this worker is doing and how far it is, if that is due.
    fn report_now_and_then(&self) {
        let reported = self.reported.get();
        if reported.is_none_or(|reported| reported.elapsed() >= REPORT_INTERVAL) {
            self.reported.set(Some(Instant::now()));
            let percent = format!(", {} %", self.cursor.percent_claimed());
            activity::report([b"loading ", &*self.database, percent.as_bytes()].concat());
        }
    }
}

/// One turn at a chunk.
struct Turn<'a> {
    /// How many of the chunk's blocks are done.
    done: &'a Cell<usize>,
    /// The most blocks that may be read.
    most: usize,
    /// Whether they have been tried before, together with one that is unreadable.
    once_more: bool,
    /// Whether it came to reading.
    opened: Cell<bool>,
    /// How many blocks have been read that were not in shared buffers already.
    read: Cell<usize>,
}

/// Counts the blocks of a turn when it ends, however it ends: so the counters that
/// all workers share are seldom touched.
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
            // What was read along with the unreadable one was not cached before.
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
        // Should this worker be ended before the chunk's next turn, the one that
        // takes over must not count them again.
        worker.slot.set_done(self.turn.done.get());
        worker.progress.change(|progress| progress.done += blocks);
    }
}
