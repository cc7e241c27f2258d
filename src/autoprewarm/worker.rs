//! A per-database worker: reads blocks of one database into shared buffers.
//!
//! Workers are not told what to load: each claims one chunk after another from the
//! [`Load`] that the leader has put into shared memory, until none is left for its
//! database. So several workers can share a large database, and a worker that dies
//! leaves undone only its current chunk.
//!
//! A worker does not disturb other sessions: it releases its lock on a relation every
//! few milliseconds, holds no snapshot while it reads, and evicts no block that must stay
//! (see [`crate::pg::storage::room`]). It sets aside what is locked, and tries it again at
//! its end: first it waits for no lock, as most are held only briefly; then in the ordinary
//! queue, since with a session that reads the table and another that waits to change it,
//! the lock is never free for one that does not queue. It holds no other lock meanwhile, so
//! there is no deadlock.

use std::cell::Cell;
use std::ops::ControlFlow::{Break, Continue};
use std::time::{Duration, Instant};

use super::left::Settled;
use super::load_segment::{Claim, Cursor, Load, Purpose, Slot, Stage, WorkerArgument};
use super::state::State;
use super::stats::LoadStats;
use crate::blocks::{Fork, Oid, PlanView, SkipReason, UsageCount};
use crate::pace::{Pace, TURN};
use crate::pg::process::activity;
use crate::pg::process::error::is_shortage;
use crate::pg::process::latch::sleep_as_worker;
use crate::pg::process::transaction::{self, Transaction};
use crate::pg::process::{self, background, lock_timeout};
use crate::pg::shared::segment::Segment;
use crate::pg::storage::prefault::Prefaulter;
use crate::pg::storage::relation::{Locator, Opened, Relation};
use crate::pg::storage::{READ_BLOCKS_MAX, ReadEnd, buffer, database};
use crate::progress::{Kind, Progress, ShownProgress};
use crate::wait_events;

/// When all other chunks are done, those that were set aside (usually because their
/// relations were locked) are retried. They are left after this time without progress,
/// and if it was for a lock, tried again later.
const LOCKED_TIMEOUT: Duration = Duration::from_secs(10);

/// How often they are retried before the worker waits for the lock.
const TRIES_WITHOUT_WAITING: u32 = 4;

/// The shortest wait for a relation's lock, if many relations are locked.
const SHORTEST_LOCK_WAIT: Duration = Duration::from_millis(100);

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

/// How many blocks are read one by one after a read has failed: as many as a load reads at
/// once, since the error is reported for all of them.
const ONE_BY_ONE: usize = READ_BLOCKS_MAX;

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
        cursors: segment.cells(),
        plan: PlanView::new(segment.words()),
        settled: Settled::of(&segment),
        prefaulter: Prefaulter::new(&load.prefaulted),
        pace: Pace::new(),
        database: name_of(slot.database()),
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
    let mut is_first_tier = true;
    while let Some(claim) = load.next_claim(slot, segment.cells(), worker.plan) {
        worker.count_claim(claim);
        let was_first_tier = is_first_tier;
        is_first_tier = worker.plan.is_first_tier(claim.chunk);
        if was_first_tier && !is_first_tier {
            worker.state.wake_leader();
        }
        let end = worker.load_chunk(claim, None);
        if let ChunkEnd::SetAside(rest) = end {
            load.set_aside(segment.cells(), rest.claim);
            set_aside.push(rest);
            slot.release_claim();
            if pauses.next().is_some() {
                sleep_as_worker(Some(LOCKED_PAUSE), &wait_events::LOCKED_RELATION);
            }
        } else if !slot.is_asked_to_leave() {
            slot.release_claim();
        }
    }
    slot.reach(Stage::Retrying);
    if is_first_tier {
        worker.state.wake_leader();
    }
    worker.retry(set_aside);
    Progress::end();
    activity::report_idle();
    slot.reach(match slot.is_asked_to_leave() {
        true => Stage::Left,
        false => Stage::Finished,
    });
    worker.state.wake_leader();
}

/// A database's name, in the server's encoding; its OID if the name cannot be read.
fn name_of(database: Oid) -> Vec<u8> {
    transaction::run(|transaction| database::name(transaction, database))
        .ok()
        .flatten()
        .unwrap_or_else(|| database.to_string().into_bytes())
}

struct Worker<'a> {
    state: &'static State,
    load: &'a Load,
    slot: &'a Slot,
    cursors: &'a [Cursor],
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
#[derive(Clone, Copy)]
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
    /// There is no buffer that may be filled.
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
    /// [`LOCKED_TIMEOUT`]; only a few times if another database's first tier waits and has no
    /// worker. What is locked then stays set aside.
    fn retry(&self, mut set_aside: Vec<Rest>) {
        let mut tries = 0;
        let mut last_progress = Instant::now();
        while !set_aside.is_empty() && !self.is_to_end() {
            if tries >= TRIES_WITHOUT_WAITING && self.load.first_tier_has_no_worker() {
                return;
            }
            let is_last = last_progress.elapsed() >= LOCKED_TIMEOUT;
            let mut still = Vec::new();
            // Chunks of the same relation follow one another.
            let mut locked = None;
            for (index, rest) in set_aside.iter().enumerate() {
                let file = self.file_of(rest.claim.chunk);
                if locked == Some(file) {
                    still.push(*rest);
                    continue;
                }
                let left = LOCKED_TIMEOUT.saturating_sub(last_progress.elapsed());
                let wait = (tries >= TRIES_WITHOUT_WAITING && !left.is_zero()).then(|| {
                    let others = self.count_relations(&set_aside[index..]);
                    (left / others).max(SHORTEST_LOCK_WAIT)
                });
                let chunk = rest.claim.chunk;
                let Some(claim) = self.load.claim_set_aside(self.slot, self.cursors, chunk) else {
                    continue;
                };
                match self.load_chunk(claim, wait) {
                    ChunkEnd::SetAside(rest) => {
                        self.load.set_aside(self.cursors, rest.claim);
                        self.slot.release_claim();
                        still.push(rest);
                        if rest.claim == claim {
                            locked = Some(file);
                        } else {
                            last_progress = Instant::now();
                        }
                    }
                    // The leader finds the claim in the slot.
                    ChunkEnd::Done if self.slot.is_asked_to_leave() => return,
                    ChunkEnd::Done => {
                        self.slot.release_claim();
                        last_progress = Instant::now();
                    }
                }
            }
            if is_last && last_progress.elapsed() >= LOCKED_TIMEOUT {
                self.skip_unless_locked(&still);
                return;
            }
            set_aside = still;
            tries += 1;
            if !set_aside.is_empty() {
                sleep_as_worker(Some(LOCKED_RETRY), &wait_events::LOCKED_RELATION);
            }
        }
    }

    /// Skips what was set aside for another reason than a lock.
    fn skip_unless_locked(&self, rests: &[Rest]) {
        for rest in rests {
            if rest.reason != SkipReason::Locked {
                let claim = self.load.take_set_aside(self.cursors, rest.claim.chunk);
                self.skip(
                    rest.reason,
                    claim.map_or(0, |claim| claim.blocks_left(self.plan)),
                );
            }
        }
    }

    /// The relation's file that a chunk is of.
    fn file_of(&self, chunk: u32) -> Locator {
        let (chunk, _) = self.plan.chunk(chunk);
        Locator {
            database: chunk.database,
            tablespace: chunk.tablespace,
            filenumber: chunk.filenumber,
        }
    }

    /// How many relations these chunks are of: at least one.
    fn count_relations(&self, rests: &[Rest]) -> u32 {
        let mut relations = 1;
        for pair in rests.windows(2) {
            let differ = self.file_of(pair[0].claim.chunk) != self.file_of(pair[1].claim.chunk);
            relations += u32::from(differ);
        }
        relations
    }

    /// Whether the load has ended, or the worker is to leave.
    fn is_to_end(&self) -> bool {
        self.load.has_ended() || self.slot.is_asked_to_leave()
    }

    /// Loads a chunk in turns, skipping blocks that cannot be loaded. Before the first
    /// turn, the relation's lock is waited for no longer than `wait`, if at all.
    fn load_chunk(&self, claim: Claim, mut wait: Option<Duration>) -> ChunkEnd {
        let (_, blocks) = self.plan.chunk(claim.chunk);
        let total = blocks.numbers().len();
        let done = Cell::new(claim.done as usize);
        // Blocks before this one are read one by one.
        let mut one_by_one = 0;
        let mut warned = false;
        let set_aside = |reason| {
            #[expect(
                clippy::cast_possible_truncation,
                reason = "a chunk has at most CHUNK_BLOCKS blocks"
            )]
            let done = done.get() as u32;
            let claim = Claim { done, ..claim };
            ChunkEnd::SetAside(Rest { claim, reason })
        };
        while done.get() < total && !self.is_to_end() {
            let wanted = total - done.get();
            let allowed = match self.load.rate_limit.take(wanted, process::monotonic_micros) {
                Ok(allowed) => allowed,
                Err(wait) => {
                    sleep_as_worker(Some(wait.min(RATE_SLEEP)), &wait_events::RATE_LIMIT);
                    continue;
                }
            };
            self.report_if_due();
            let once_more = done.get() < one_by_one;
            let turn = Turn {
                chunk: claim.chunk,
                done: &done,
                max: if once_more { 1 } else { allowed },
                once_more,
                opened: Cell::new(false),
                read: Cell::new(0),
            };
            let run =
                |waits| transaction::run(|transaction| self.load_turn(transaction, &turn, waits));
            let end = match wait.take() {
                Some(wait) => lock_timeout::limit(wait, || run(true)),
                None => run(false),
            };
            let end = match end {
                // Replay on a standby needed the relation. The blocks can be read later.
                Err(caught) if caught.is_conflict_with_recovery() => Ok(TurnEnd::Locked),
                Err(caught) if caught.is_lock_timeout() => Ok(TurnEnd::Locked),
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
                Err(caught) if is_shortage(caught.sqlstate) => {
                    if !self.shortage_was_logged.replace(true) {
                        self.load.purpose().warn(self.state, caught);
                    }
                    return set_aside(SkipReason::Unreadable);
                }
                Err(caught) => {
                    // One line per chunk is enough: the counts tell how many blocks failed.
                    if !std::mem::replace(&mut warned, true) {
                        self.load.purpose().warn(self.state, caught);
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
    fn load_turn(&self, transaction: &Transaction, turn: &Turn, waits: bool) -> TurnEnd {
        let locator = self.file_of(turn.chunk);
        let (chunk, blocks) = self.plan.chunk(turn.chunk);
        let opened = Relation::open_by_file(transaction, locator, waits);
        let start = Instant::now();
        let relation = match opened {
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
        let wanted = existing.min(turn.max).min(self.pace.max_blocks());
        relation.look_up_tablespace();
        let is_top_up = self.load.purpose() == Purpose::TopUp;
        let tally = Tally::begin(self, turn);
        let end = relation.read_as_load(
            chunk.fork,
            &numbers[..wanted],
            &self.load.room,
            self.load.readers(),
            |index, buffer| {
                buffer.restore_usage_count(match is_top_up {
                    // What is used here is worth more, until this server is promoted.
                    true => UsageCount::ONCE,
                    false => blocks.usage_count(first + index),
                });
                self.prefaulter.prefault_after(buffer.index());
                turn.done.set(turn.done.get() + 1);
                if start.elapsed() < TURN && !self.is_to_end() {
                    Continue(())
                } else {
                    Break(())
                }
            },
        );
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

    fn stats(&self) -> &LoadStats {
        self.load.purpose().stats(self.state)
    }

    /// Counts blocks as loaded, or cached already.
    fn count(&self, loaded: u64, cached: u64) {
        let (stats, number) = (self.stats(), self.load.number());
        stats.count(number, loaded, cached);
        if self.load.is_later_try() {
            stats.take_back(number, SkipReason::Locked, loaded + cached);
        }
    }

    /// Counts blocks as skipped.
    fn skip(&self, reason: SkipReason, blocks: usize) {
        let (stats, number) = (self.stats(), self.load.number());
        stats.skip(number, reason, blocks as u64);
        if self.load.is_later_try() {
            stats.take_back(number, SkipReason::Locked, blocks as u64);
        }
        self.progress
            .change(|progress| progress.skipped += blocks as u64);
    }

    /// Updates the activity text, if that is due.
    fn report_if_due(&self) {
        let reported = self.reported.get();
        if reported.is_none_or(|reported| reported.elapsed() >= REPORT_INTERVAL) {
            self.reported.set(Some(Instant::now()));
            let cursor = self.load.cursor(self.slot, self.cursors);
            let percent = format!(", {} %", cursor.percent_claimed());
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
    max: usize,
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
        #[expect(
            clippy::cast_possible_truncation,
            reason = "a chunk has at most CHUNK_BLOCKS blocks"
        )]
        let read = loaded as usize;
        self.turn.read.set(read);
        let worker = self.worker;
        worker.count(loaded, cached);
        // If this worker is terminated before the next turn, the worker that gets the
        // rest of the chunk must not count these blocks again.
        worker.set_done(self.turn.chunk, self.turn.done.get());
        worker.progress.change(|progress| progress.done += blocks);
    }
}
