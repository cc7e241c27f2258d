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
//! | cursors, counters, `full` | any worker |
//!
//! When a worker has died, its slot still tells the chunk it was at, and how many
//! blocks of it were done: the leader gives the rest to another worker, once.

use std::ops::Range;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize};

use crate::blocks::plan::DatabasePlan;
use crate::blocks::{Oid, SkipCounts, SkipReason};
use crate::pg::shmem::Shared;

/// The most workers of a load.
pub const MAX_WORKERS: usize = 64;

/// For how many buffers memory is provided in one go.
pub const BUFFERS_AT_ONCE: usize = 128;

/// No chunk's index.
const NO_CHUNK: u32 = u32::MAX;

pub struct Load {
    /// The chunks of shared catalogs, which every worker can load.
    shared: Cursor,
    pub workers: [Slot; MAX_WORKERS],
    /// There is no free buffer left, so that the load ends.
    full: AtomicBool,
    /// Buffers before this one have their memory, or a worker is about to see
    /// to that.
    provided: AtomicUsize,
    loaded: AtomicU64,
    cached: AtomicU64,
    skipped: [AtomicU64; SkipReason::ALL.len()],
}

// SAFETY: atomics only, each valid whatever its bits are but for the flag, into
// which only bools are stored.
unsafe impl Shared for Load {
    const INITIAL: Self = Self {
        shared: Cursor::INITIAL,
        workers: [const { Slot::new() }; MAX_WORKERS],
        full: AtomicBool::new(false),
        provided: AtomicUsize::new(0),
        loaded: AtomicU64::new(0),
        cached: AtomicU64::new(0),
        skipped: [const { AtomicU64::new(0) }; SkipReason::ALL.len()],
    };
}

/// The chunks of one database: which is to be claimed next, and where they end.
pub struct Cursor {
    next: AtomicU32,
    end: AtomicU32,
}

// SAFETY: atomics only, each valid whatever its bits are.
unsafe impl Shared for Cursor {
    const INITIAL: Self = Self {
        next: AtomicU32::new(0),
        end: AtomicU32::new(0),
    };
}

impl Cursor {
    fn set(&self, database: &DatabasePlan) {
        self.next.store(database.chunks.start, SeqCst);
        self.end.store(database.chunks.end, SeqCst);
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

/// Blocks dealt with, by outcome.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub loaded: u64,
    /// Blocks that were in shared buffers already.
    pub cached: u64,
    pub skipped: SkipCounts,
}

impl Load {
    /// Puts down which chunks there are. A plan's shared catalogs are not among
    /// the databases that have a cursor of their own.
    pub fn set_work(
        &self,
        shared: Option<&DatabasePlan>,
        cursors: &[Cursor],
        databases: &[DatabasePlan],
    ) {
        if let Some(shared) = shared {
            self.shared.set(shared);
        }
        for (cursor, database) in cursors.iter().zip(databases) {
            cursor.set(database);
        }
    }

    /// The next chunk for the worker of that slot; nothing when there is none
    /// for its database, or the load ends.
    pub fn next_claim(&self, slot: &Slot, cursors: &[Cursor]) -> Option<Claim> {
        if self.is_full() {
            return None;
        }
        let claim = slot.claim().or_else(|| {
            let cursor = &cursors[slot.cursor.load(SeqCst) as usize];
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

    /// Ends the load for want of free buffers.
    pub fn set_full(&self) {
        self.full.store(true, SeqCst);
    }

    pub fn is_full(&self) -> bool {
        self.full.load(SeqCst)
    }

    /// The buffers whose memory is to be provided next, for a worker that uses
    /// this one; nothing while there are enough. Buffers are used in order, more
    /// or less, by all workers together, and no two workers see to the same ones:
    /// they would only wait for each other.
    pub fn next_to_provide(&self, buffer: usize) -> Option<Range<usize>> {
        const AHEAD: usize = 2 * BUFFERS_AT_ONCE;
        let next = |provided: usize| {
            let start = provided.max(buffer);
            (start < buffer + AHEAD).then_some(start + BUFFERS_AT_ONCE)
        };
        // Most calls end here.
        next(self.provided.load(Relaxed))?;
        let before = self.provided.fetch_update(Relaxed, Relaxed, next).ok()?;
        let start = before.max(buffer);
        Some(start..start + BUFFERS_AT_ONCE)
    }

    pub fn count(&self, loaded: u64, cached: u64) {
        self.loaded.fetch_add(loaded, Relaxed);
        self.cached.fetch_add(cached, Relaxed);
    }

    pub fn skip(&self, reason: SkipReason, blocks: usize) {
        self.skipped[reason as usize].fetch_add(blocks as u64, Relaxed);
    }

    /// What all workers have done so far.
    pub fn counts(&self) -> Counts {
        let mut skipped = SkipCounts::default();
        for reason in SkipReason::ALL {
            skipped.count(reason, self.skipped[reason as usize].load(Relaxed));
        }
        Counts {
            loaded: self.loaded.load(Relaxed),
            cached: self.cached.load(Relaxed),
            skipped,
        }
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
