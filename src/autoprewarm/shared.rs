//! A load in shared memory: what its workers have to do, and how far they are.
//!
//! The leader makes one dynamic segment for a load. It begins with a [`Load`];
//! then come the cursors, one for each database of the plan; then the plan itself,
//! which nobody changes. A worker takes the next chunk by moving a cursor; that,
//! and all counting, is done with atomics, so there is no lock to die with.
//!
//! | word | written by |
//! | --- | --- |
//! | a slot's database, cursor and first chunk | the leader, before it starts the worker |
//! | a slot's stage and current chunk | the worker that has it |
//! | the rate limit's rate | the leader |
//! | everything else | whoever comes to it |
//!
//! When a worker has died, its slot still tells the chunk it was at, and how many
//! blocks of it were done: the leader gives the rest to another worker, once.

use std::ops::Range;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};

use super::rate::RateLimit;
use crate::blocks::{Oid, PlanView, SkipReason};
use crate::pg::shared::contents::Shared;
use crate::pg::storage::prefault::Prefaulted;

/// The most workers of a load.
pub const MAX_WORKERS: usize = 64;

/// No chunk's index.
const NO_CHUNK: u32 = u32::MAX;

pub struct Load {
    /// Which load it is, by the numbers of [`super::stats::LoadStats`].
    number: AtomicU32,
    /// The chunks of shared catalogs, which every worker can load.
    shared: Cursor,
    pub workers: [Slot; MAX_WORKERS],
    /// The [`SkipReason`] of all that is left, once there is one.
    ended_for: AtomicU32,
    pub rate_limit: RateLimit,
    pub prefaulted: Prefaulted,
}

/// No [`SkipReason`].
const NO_REASON: u32 = u32::MAX;

// SAFETY: it has atomics only, each valid with any bits.
unsafe impl Shared for Load {}

/// The chunks of one database: where they begin, which is to be claimed next, and
/// where they end.
pub struct Cursor {
    start: AtomicU32,
    next: AtomicU32,
    end: AtomicU32,
}

// SAFETY: it has atomics only, each valid with any bits.
unsafe impl Shared for Cursor {}

impl Cursor {
    pub fn new(chunks: Range<u32>) -> Self {
        Self {
            start: AtomicU32::new(chunks.start),
            next: AtomicU32::new(chunks.start),
            end: AtomicU32::new(chunks.end),
        }
    }

    fn claim(&self) -> Option<u32> {
        let end = self.end.load(SeqCst);
        self.next
            .fetch_update(SeqCst, SeqCst, |next| (next < end).then_some(next + 1))
            .ok()
    }

    /// The chunks that nobody has claimed.
    pub fn unclaimed(&self) -> Range<u32> {
        let end = self.end.load(SeqCst);
        self.next.load(SeqCst).min(end)..end
    }

    /// How much of the database has been claimed, of 100.
    pub fn percent_claimed(&self) -> u32 {
        let start = self.start.load(SeqCst);
        let all = u64::from(self.end.load(SeqCst).saturating_sub(start));
        let claimed = u64::from(self.unclaimed().start.saturating_sub(start));
        (claimed * 100).checked_div(all).unwrap_or(100) as u32
    }

    /// Claims all that is left, which nobody will load.
    pub fn close(&self) -> Range<u32> {
        let end = self.end.load(SeqCst);
        self.next.swap(end, SeqCst).min(end)..end
    }
}

/// A chunk, of which so many blocks are done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    pub chunk: u32,
    pub done: u32,
}

impl Claim {
    /// How many blocks of it are to be done.
    pub fn blocks_left(self, plan: PlanView) -> usize {
        plan.chunk(self.chunk).1.numbers().len() - self.done as usize
    }
}

/// How far a worker is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// It never ran.
    NotStarted,
    /// It ran, but is not connected to its database.
    Attached,
    /// It is at work.
    Connected,
    /// It has done what could be done.
    Finished,
}

/// One worker's place.
pub struct Slot {
    database: AtomicU32,
    /// Which cursor is its database's.
    cursor: AtomicU32,
    /// A [`Stage`].
    stage: AtomicU32,
    /// The chunk it is at, or is to begin with; and how many blocks of it are done.
    chunk: AtomicU32,
    done: AtomicU32,
}

impl Slot {
    const fn new() -> Self {
        Self {
            database: AtomicU32::new(0),
            cursor: AtomicU32::new(0),
            stage: AtomicU32::new(Stage::NotStarted as u32),
            chunk: AtomicU32::new(NO_CHUNK),
            done: AtomicU32::new(0),
        }
    }

    /// Prepares the slot for a worker in that database, which is to begin with
    /// that chunk, if any.
    pub fn assign(&self, database: Oid, cursor: usize, first: Option<Claim>) {
        self.database.store(database, SeqCst);
        self.cursor.store(cursor as u32, SeqCst);
        self.set_claim(first);
        self.reach(Stage::NotStarted);
    }

    pub fn database(&self) -> Oid {
        self.database.load(SeqCst)
    }

    pub fn stage(&self) -> Stage {
        match self.stage.load(SeqCst) {
            0 => Stage::NotStarted,
            1 => Stage::Attached,
            2 => Stage::Connected,
            _ => Stage::Finished,
        }
    }

    pub fn reach(&self, stage: Stage) {
        self.stage.store(stage as u32, SeqCst);
    }

    /// The chunk that the worker is at, or was when it died.
    pub fn claim(&self) -> Option<Claim> {
        let chunk = self.chunk.load(SeqCst);
        (chunk != NO_CHUNK).then(|| Claim {
            chunk,
            done: self.done.load(SeqCst),
        })
    }

    fn set_claim(&self, claim: Option<Claim>) {
        self.done.store(claim.map_or(0, |claim| claim.done), SeqCst);
        self.chunk
            .store(claim.map_or(NO_CHUNK, |claim| claim.chunk), SeqCst);
    }

    /// So many blocks of the chunk are done.
    pub fn set_done(&self, done: usize) {
        self.done.store(done as u32, SeqCst);
    }

    /// The worker has done with its chunk.
    pub fn give_up_claim(&self) {
        self.set_claim(None);
    }
}

impl Load {
    /// The load of that number, with the chunks of shared catalogs.
    pub fn new(number: u32, shared: Range<u32>) -> Self {
        Self {
            number: AtomicU32::new(number),
            shared: Cursor::new(shared),
            workers: [const { Slot::new() }; MAX_WORKERS],
            ended_for: AtomicU32::new(NO_REASON),
            rate_limit: RateLimit::new(),
            prefaulted: Prefaulted::new(),
        }
    }

    pub fn number(&self) -> u32 {
        self.number.load(SeqCst)
    }

    /// The cursor of the database of that slot.
    pub fn cursor<'a>(&self, slot: &Slot, cursors: &'a [Cursor]) -> &'a Cursor {
        &cursors[slot.cursor.load(SeqCst) as usize]
    }

    /// The next chunk for the worker of that slot; nothing when there is none
    /// for its database, or the load ends.
    pub fn next_claim(&self, slot: &Slot, cursors: &[Cursor]) -> Option<Claim> {
        if self.has_ended() {
            return None;
        }
        let claim = slot.claim().or_else(|| {
            let cursor = self.cursor(slot, cursors);
            let chunk = self.shared.claim().or_else(|| cursor.claim())?;
            Some(Claim { chunk, done: 0 })
        });
        slot.set_claim(claim);
        claim
    }

    /// The chunks of shared catalogs that nobody has claimed.
    pub fn shared_unclaimed(&self) -> Range<u32> {
        self.shared.unclaimed()
    }

    /// Ends the load: what is left is skipped for that reason, unless there was
    /// another before.
    pub fn end_for(&self, reason: SkipReason) {
        let _ = self
            .ended_for
            .compare_exchange(NO_REASON, reason as u32, SeqCst, SeqCst);
    }

    /// Whether nothing more is to be loaded.
    pub fn has_ended(&self) -> bool {
        self.ended_for.load(Relaxed) != NO_REASON
    }

    /// Why the load was ended before all was done, if it was.
    pub fn ended_for(&self) -> Option<SkipReason> {
        let reason = self.ended_for.load(SeqCst) as usize;
        SkipReason::ALL.get(reason).copied()
    }
}

/// What a worker is started with, in the one number that a background worker
/// can be given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkerArgument {
    /// The load's segment.
    pub segment: u32,
    /// Which of the load's slots it has.
    pub slot: usize,
}

impl From<WorkerArgument> for u64 {
    fn from(argument: WorkerArgument) -> Self {
        (argument.slot as u64) << 32 | u64::from(argument.segment)
    }
}

impl From<u64> for WorkerArgument {
    fn from(number: u64) -> Self {
        Self {
            segment: number as u32,
            slot: (number >> 32) as usize,
        }
    }
}
