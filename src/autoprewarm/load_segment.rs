//! A load in shared memory: what its workers have to do, and how far they are.
//!
//! The leader creates one dynamic segment for each load. It consists of a [`Load`],
//! the cursors, one for each database of the plan and one for each chunk, and the plan
//! itself, which does not change. A worker claims the next chunk by moving its database's
//! cursor. That, and all counting, is done with atomics, so a worker that dies holds no
//! lock.
//!
//! A chunk's own cursor says which of its blocks are set aside because their relation is
//! locked: usually none. So what is set aside outlives the worker, and can be tried again
//! after the load has ended: see [`super::later`].
//!
//! | word | written by |
//! | --- | --- |
//! | a slot's database, cursor and first chunk | the leader, before it starts the worker |
//! | a slot's request to leave | the leader |
//! | a slot's stage and current chunk | the worker that has the slot |
//! | the rate limit's rate, whether the load is a later try, which first tier waits | the leader |
//! | everything else | the leader and all workers |
//!
//! After a worker has died, its slot still holds the chunk that it was loading, and
//! how many blocks of it were done. The leader gives the rest to another worker,
//! once.

use std::ops::Range;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicU32};

use super::rate::RateLimit;
use super::state::State;
use super::stats::LoadStats;
use crate::blocks::{Oid, PlanView, SkipReason};
use crate::pg::process::error::Caught;
use crate::pg::shared::contents::Shared;
use crate::pg::storage::prefault::Prefaulted;
use crate::pg::storage::room::LoadRoom;

/// The maximum number of workers of a load.
pub const MAX_WORKERS: usize = 64;

/// A slot's chunk if it has none.
const NO_CHUNK: u32 = u32::MAX;

/// What a load is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// To load a list as fast as the settings allow.
    List = 0,
    /// To load what a standby lacks of its upstream's list, without disturbing it.
    TopUp = 1,
}

impl Purpose {
    /// Where such a load is counted.
    pub fn stats(self, state: &State) -> &LoadStats {
        match self {
            Self::List => &state.load,
            Self::TopUp => &state.follow.top_up,
        }
    }

    /// Logs an ERROR that the load has survived as a WARNING, and keeps it as the last error.
    /// Top-ups come again and again, so only the first of their errors is logged.
    pub fn warn(self, state: &State, caught: Caught) {
        match self {
            Self::List => state.warn(caught),
            Self::TopUp => {
                state.follow.error.record(&caught.message);
                if state.follow.may_warn() {
                    caught.warn();
                }
            }
        }
    }
}

pub struct Load {
    /// The load's number in its [`LoadStats`].
    number: AtomicU32,
    /// A [`Purpose`].
    purpose: AtomicU32,
    /// The chunks of shared catalogs, which workers in any database can load.
    shared: Cursor,
    /// How many databases the plan has.
    databases: AtomicU32,
    /// Whether only the blocks that were set aside are to be loaded.
    is_later_try: AtomicBool,
    /// The database whose first tier waits for another worker, as the index of its cursor, or
    /// [`NO_DATABASE`]: a worker in another one is to finish when that one's is claimed.
    first_tier_waits: AtomicU32,
    /// Whether some database's first tier waits and has no worker at all.
    first_tier_has_no_worker: AtomicBool,
    /// How many workers there are.
    readers: AtomicU32,
    pub workers: [Slot; MAX_WORKERS],
    /// The [`SkipReason`] for all blocks that are left, or [`NO_REASON`] while the
    /// load goes on.
    ended_for: AtomicU32,
    pub rate_limit: RateLimit,
    pub prefaulted: Prefaulted,
    /// Which buffers may be filled.
    pub room: LoadRoom,
}

/// The load has not been ended.
const NO_REASON: u32 = u32::MAX;

/// No database's first tier waits.
const NO_DATABASE: u32 = u32::MAX;

// SAFETY: it consists of atomics, and of numbers that do not change. Every bit pattern is
// valid for the integers, and the flags are only ever written as bools.
unsafe impl Shared for Load {}

/// The chunks of one database: the first, the next to be claimed, and the end. Or the
/// blocks of one chunk that are set aside, those from the next on.
pub struct Cursor {
    start: AtomicU32,
    next: AtomicU32,
    end: AtomicU32,
}

// SAFETY: it consists of atomic integers, for which every bit pattern is valid.
unsafe impl Shared for Cursor {}

impl Cursor {
    pub fn new(chunks: Range<u32>) -> Self {
        Self {
            start: AtomicU32::new(chunks.start),
            next: AtomicU32::new(chunks.start),
            end: AtomicU32::new(chunks.end),
        }
    }

    /// The blocks of a chunk, none of which is set aside.
    pub fn new_of_chunk(blocks: u32) -> Self {
        let cursor = Self::new(0..blocks);
        cursor.close();
        cursor
    }

    /// Begins with the first chunk again.
    fn restart(&self) {
        self.next.store(self.start.load(SeqCst), SeqCst);
    }

    fn claim(&self) -> Option<u32> {
        let end = self.end.load(SeqCst);
        self.next
            .fetch_update(SeqCst, SeqCst, |next| (next < end).then_some(next + 1))
            .ok()
    }

    /// The chunks that no worker has claimed.
    pub fn unclaimed(&self) -> Range<u32> {
        let end = self.end.load(SeqCst);
        self.next.load(SeqCst).min(end)..end
    }

    /// The percentage of chunks that have been claimed.
    #[expect(
        clippy::cast_possible_truncation,
        reason = "a percentage is at most 100"
    )]
    pub fn percent_claimed(&self) -> u32 {
        let start = self.start.load(SeqCst);
        let all = u64::from(self.end.load(SeqCst).saturating_sub(start));
        let claimed = u64::from(self.unclaimed().start.saturating_sub(start));
        (claimed * 100).checked_div(all).unwrap_or(100) as u32
    }

    /// Claims all remaining chunks, so that no worker loads them.
    pub fn close(&self) -> Range<u32> {
        let end = self.end.load(SeqCst);
        self.next.swap(end, SeqCst).min(end)..end
    }
}

/// A claimed chunk, of which the first `done` blocks are done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    pub chunk: u32,
    pub done: u32,
}

impl Claim {
    /// How many of its blocks are still to be done.
    pub fn blocks_left(self, plan: PlanView) -> usize {
        plan.chunk(self.chunk).1.numbers().len() - self.done as usize
    }
}

/// How far a worker has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// The worker has not attached to the segment.
    NotStarted,
    /// The worker is not yet connected to its database.
    Attached,
    /// The worker is loading blocks.
    Connected,
    /// The worker retries what it has set aside.
    Retrying,
    /// The worker has left because it was asked to, perhaps with a claim left.
    Left,
    /// The worker has done all that it could.
    Finished,
}

/// The part of the segment that belongs to one worker.
pub struct Slot {
    database: AtomicU32,
    /// The index of the database's cursor.
    cursor: AtomicU32,
    /// A [`Stage`].
    stage: AtomicU32,
    /// The chunk that the worker is loading or is to begin with, and how many blocks
    /// of it are done.
    chunk: AtomicU32,
    done: AtomicU32,
    /// Whether the worker is to leave its database.
    is_to_leave: AtomicBool,
}

impl Slot {
    const fn new() -> Self {
        Self {
            database: AtomicU32::new(0),
            cursor: AtomicU32::new(0),
            stage: AtomicU32::new(Stage::NotStarted as u32),
            chunk: AtomicU32::new(NO_CHUNK),
            done: AtomicU32::new(0),
            is_to_leave: AtomicBool::new(false),
        }
    }

    /// Prepares the slot for a worker in `database`, which begins with the chunk
    /// `first`, if any.
    #[expect(
        clippy::cast_possible_truncation,
        reason = "each database, which has an OID of 32 bits, has one cursor"
    )]
    pub fn assign(&self, database: Oid, cursor: usize, first: Option<Claim>) {
        self.database.store(database, SeqCst);
        self.cursor.store(cursor as u32, SeqCst);
        self.set_claim(first);
        self.is_to_leave.store(false, SeqCst);
        self.reach(Stage::NotStarted);
    }

    /// Asks the worker to leave its database.
    pub fn ask_to_leave(&self) {
        self.is_to_leave.store(true, SeqCst);
    }

    /// Whether the worker is to leave its database, with its claim left in the slot.
    pub fn is_asked_to_leave(&self) -> bool {
        self.is_to_leave.load(SeqCst)
    }

    pub fn database(&self) -> Oid {
        self.database.load(SeqCst)
    }

    pub fn stage(&self) -> Stage {
        match self.stage.load(SeqCst) {
            0 => Stage::NotStarted,
            1 => Stage::Attached,
            2 => Stage::Connected,
            3 => Stage::Retrying,
            4 => Stage::Left,
            _ => Stage::Finished,
        }
    }

    pub fn reach(&self, stage: Stage) {
        self.stage.store(stage as u32, SeqCst);
    }

    /// The chunk that the worker is loading, or was loading when it died.
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

    /// Records how many blocks of the chunk are done.
    #[expect(
        clippy::cast_possible_truncation,
        reason = "a chunk has at most CHUNK_BLOCKS blocks"
    )]
    pub fn set_done(&self, done: usize) {
        self.done.store(done as u32, SeqCst);
    }

    /// Records that the worker is done with its chunk.
    pub fn release_claim(&self) {
        self.set_claim(None);
    }
}

impl Load {
    /// The load of that number, with the chunks of shared catalogs, of a plan with so many
    /// databases besides.
    #[expect(
        clippy::cast_possible_truncation,
        reason = "databases are counted in 32 bits"
    )]
    pub fn new(
        number: u32,
        purpose: Purpose,
        shared: Range<u32>,
        databases: usize,
        room: LoadRoom,
    ) -> Self {
        Self {
            number: AtomicU32::new(number),
            purpose: AtomicU32::new(purpose as u32),
            shared: Cursor::new(shared),
            databases: AtomicU32::new(databases as u32),
            is_later_try: AtomicBool::new(false),
            first_tier_waits: AtomicU32::new(NO_DATABASE),
            first_tier_has_no_worker: AtomicBool::new(false),
            readers: AtomicU32::new(0),
            workers: [const { Slot::new() }; MAX_WORKERS],
            ended_for: AtomicU32::new(NO_REASON),
            rate_limit: RateLimit::new(),
            prefaulted: Prefaulted::new(),
            room,
        }
    }

    pub fn number(&self) -> u32 {
        self.number.load(SeqCst)
    }

    pub fn purpose(&self) -> Purpose {
        match self.purpose.load(SeqCst) {
            0 => Purpose::List,
            _ => Purpose::TopUp,
        }
    }

    /// The cursor of the slot's database.
    pub fn cursor<'a>(&self, slot: &Slot, cursors: &'a [Cursor]) -> &'a Cursor {
        &cursors[slot.cursor.load(SeqCst) as usize]
    }

    /// Tells the workers how many of them there are.
    #[expect(clippy::cast_possible_truncation, reason = "it is at most MAX_WORKERS")]
    pub fn set_readers(&self, readers: usize) {
        self.readers.store(readers as u32, SeqCst);
    }

    /// How many workers there are.
    pub fn readers(&self) -> usize {
        self.readers.load(SeqCst) as usize
    }

    /// Has workers of other databases finish when the first tier of theirs is claimed, since that
    /// of this one (the index of its cursor) waits for another worker. `None`: none waits.
    #[expect(
        clippy::cast_possible_truncation,
        reason = "each database, which has an OID of 32 bits, has one cursor"
    )]
    pub fn set_first_tier_waits(&self, cursor: Option<usize>) {
        let cursor = cursor.map_or(NO_DATABASE, |cursor| cursor as u32);
        self.first_tier_waits.store(cursor, SeqCst);
    }

    /// Records whether some database's first tier waits and has no worker.
    pub fn set_first_tier_has_no_worker(&self, has_none: bool) {
        self.first_tier_has_no_worker.store(has_none, SeqCst);
    }

    /// Whether another database's first tier waits and has no worker.
    pub fn first_tier_has_no_worker(&self) -> bool {
        self.first_tier_has_no_worker.load(SeqCst)
    }

    /// Whether the first tier of another database than that of the slot's worker waits for
    /// another worker.
    pub fn first_tier_waits_elsewhere(&self, slot: &Slot) -> bool {
        let waits = self.first_tier_waits.load(SeqCst);
        waits != NO_DATABASE && waits != slot.cursor.load(SeqCst)
    }

    /// The next chunk for the slot's worker. `None` if no chunk of its database is
    /// left, if the load has ended, if the worker is to leave, or if it would be one of the
    /// second tier while another database's first tier waits for another worker.
    pub fn next_claim(&self, slot: &Slot, cursors: &[Cursor], plan: PlanView) -> Option<Claim> {
        if self.has_ended() || slot.is_asked_to_leave() {
            return None;
        }
        let claim = slot.claim().or_else(|| self.claim_for(slot, cursors, plan));
        slot.set_claim(claim);
        claim
    }

    fn claim_for(&self, slot: &Slot, cursors: &[Cursor], plan: PlanView) -> Option<Claim> {
        let cursor = self.cursor(slot, cursors);
        loop {
            let chunk = self.claim_chunk(slot, cursor, plan)?;
            if !self.is_later_try() {
                return Some(Claim { chunk, done: 0 });
            }
            if let Some(claim) = self.take_set_aside(cursors, chunk) {
                return Some(claim);
            }
        }
    }

    /// Claims a chunk of shared catalogs or of a worker's database: of the first tier, if
    /// there is one. Shared catalogs come first in each tier.
    fn claim_chunk(&self, slot: &Slot, of_database: &Cursor, plan: PlanView) -> Option<u32> {
        let both = [&self.shared, of_database];
        let is_first_tier = |cursor: &Cursor| {
            let next = cursor.unclaimed().next();
            next.is_some_and(|chunk| plan.is_first_tier(chunk))
        };
        both.into_iter()
            .filter(|cursor| is_first_tier(cursor))
            .find_map(Cursor::claim)
            .or_else(|| match self.first_tier_waits_elsewhere(slot) {
                true => None,
                false => both.into_iter().find_map(Cursor::claim),
            })
    }

    /// Takes a chunk's blocks that were set aside for the slot's worker. `None` if there
    /// are none.
    pub fn claim_set_aside(&self, slot: &Slot, cursors: &[Cursor], chunk: u32) -> Option<Claim> {
        let claim = self.take_set_aside(cursors, chunk);
        slot.set_claim(claim);
        claim
    }

    /// Takes a chunk's blocks that were set aside. `None` if there are none.
    pub fn take_set_aside(&self, cursors: &[Cursor], chunk: u32) -> Option<Claim> {
        let blocks = self.of_chunk(cursors, chunk).close();
        (!blocks.is_empty()).then_some(Claim {
            chunk,
            done: blocks.start,
        })
    }

    /// Sets the rest of a chunk aside.
    pub fn set_aside(&self, cursors: &[Cursor], claim: Claim) {
        self.of_chunk(cursors, claim.chunk)
            .next
            .store(claim.done, SeqCst);
    }

    fn of_chunk<'a>(&self, cursors: &'a [Cursor], chunk: u32) -> &'a Cursor {
        &cursors[self.databases.load(SeqCst) as usize + chunk as usize]
    }

    /// How many blocks of all chunks are set aside.
    pub fn count_set_aside(&self, cursors: &[Cursor]) -> u64 {
        cursors[self.databases.load(SeqCst) as usize..]
            .iter()
            .map(|chunk| chunk.unclaimed().len() as u64)
            .sum()
    }

    /// Whether only the blocks that were set aside are to be loaded.
    pub fn is_later_try(&self) -> bool {
        self.is_later_try.load(SeqCst)
    }

    /// Has workers claim what was set aside, and only that, from now on. `databases` says
    /// of each cursor's database whether it may be loaded. What they do counts for load
    /// `number`. No worker may be running.
    pub fn begin_later_try(
        &self,
        number: u32,
        cursors: &[Cursor],
        databases: impl Iterator<Item = bool>,
    ) {
        self.number.store(number, SeqCst);
        self.is_later_try.store(true, SeqCst);
        self.room.begin_again();
        let has_any = |cursor: &Cursor| {
            let chunks = cursor.start.load(SeqCst)..cursor.end.load(SeqCst);
            let mut chunks = chunks.map(|chunk| self.of_chunk(cursors, chunk));
            chunks.any(|chunk| !chunk.unclaimed().is_empty())
        };
        // Shared catalogs need a worker in one database, whatever that has.
        let mut needs_any = has_any(&self.shared);
        self.shared.restart();
        for (cursor, may_be_loaded) in cursors.iter().zip(databases) {
            if may_be_loaded && (needs_any || has_any(cursor)) {
                cursor.restart();
                needs_any = false;
            } else {
                cursor.close();
            }
        }
    }

    /// The chunks of shared catalogs that no worker has claimed.
    pub fn shared_unclaimed(&self) -> Range<u32> {
        self.shared.unclaimed()
    }

    /// Ends the load: the remaining blocks are skipped for `reason`, unless the load
    /// was ended for another reason before.
    pub fn end_for(&self, reason: SkipReason) {
        let _ = self
            .ended_for
            .compare_exchange(NO_REASON, reason as u32, SeqCst, SeqCst);
    }

    /// Whether the load was ended, so that no more blocks are to be loaded.
    pub fn has_ended(&self) -> bool {
        self.ended_for.load(SeqCst) != NO_REASON
    }

    /// Why the load was ended before all blocks were done. `None` if it was not.
    pub fn ended_for(&self) -> Option<SkipReason> {
        let reason = self.ended_for.load(SeqCst) as usize;
        SkipReason::ALL.get(reason).copied()
    }
}

/// A worker's argument, which has to fit into the one number that a background
/// worker can be given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkerArgument {
    /// The load's segment.
    pub segment: u32,
    /// The index of the worker's slot.
    pub slot: usize,
}

impl From<WorkerArgument> for u64 {
    fn from(argument: WorkerArgument) -> Self {
        (argument.slot as u64) << 32 | u64::from(argument.segment)
    }
}

impl From<u64> for WorkerArgument {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the lower 32 bits are the segment, the upper ones the slot"
    )]
    fn from(number: u64) -> Self {
        Self {
            segment: number as u32,
            slot: (number >> 32) as usize,
        }
    }
}
