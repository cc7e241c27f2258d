//! A per-database worker: reads the blocks of one database into shared buffers.

use std::cell::Cell;
use std::ops::Range;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicU32, AtomicU64};

use crate::blocks::plan::{PlanView, Segment};
use crate::blocks::{BlockNumber, Oid, SkipCounts, SkipReason};
use crate::pg::relation::Relation;
use crate::pg::shmem::Shared;
use crate::pg::{buffer, dsm, process, transaction};

/// How many blocks are read before the relation's lock is given back and taken
/// again, so that whoever waits for it has a turn.
const BLOCKS_PER_LOCK: usize = 1024;

/// What stands before the plan in the shared segment: what the leader wants of
/// the worker, and how far the worker is. There is one worker at a time, and the
/// leader writes only while there is none.
pub struct Assignment {
    database: AtomicU32,
    /// The plan's segments to load: those of shared catalogs, where this worker
    /// is to load them too, and those of the database.
    shared: [AtomicU32; 2],
    own: [AtomicU32; 2],
    /// A [`Stage`].
    stage: AtomicU32,
    loaded: AtomicU64,
    skipped: [AtomicU64; SkipReason::ALL.len()],
}

// SAFETY: atomics only, each valid whatever its bits are.
unsafe impl Shared for Assignment {
    const INITIAL: Self = Self {
        database: AtomicU32::new(0),
        shared: [const { AtomicU32::new(0) }; 2],
        own: [const { AtomicU32::new(0) }; 2],
        stage: AtomicU32::new(Stage::NotStarted as u32),
        loaded: AtomicU64::new(0),
        skipped: [const { AtomicU64::new(0) }; SkipReason::ALL.len()],
    };
}

/// How far a worker came.
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

impl Assignment {
    /// Asks for the blocks of `own`, and of `shared` before.
    pub fn assign(&self, database: Oid, shared: Range<usize>, own: Range<usize>) {
        self.database.store(database, SeqCst);
        for (to, from) in [(&self.shared, shared), (&self.own, own)] {
            to[0].store(from.start as u32, SeqCst);
            to[1].store(from.end as u32, SeqCst);
        }
        self.stage.store(Stage::NotStarted as u32, SeqCst);
    }

    pub fn stage(&self) -> Stage {
        match self.stage.load(SeqCst) {
            0 => Stage::NotStarted,
            1 => Stage::Attached,
            2 => Stage::Connected,
            _ => Stage::Finished,
        }
    }

    fn reach(&self, stage: Stage) {
        self.stage.store(stage as u32, SeqCst);
    }

    /// Blocks that all workers of this load have loaded so far.
    pub fn loaded(&self) -> u64 {
        self.loaded.load(Relaxed)
    }

    /// Blocks that they have skipped so far.
    pub fn skipped(&self) -> SkipCounts {
        let mut counts = SkipCounts::default();
        for reason in SkipReason::ALL {
            counts.count(reason, self.skipped[reason as usize].load(Relaxed));
        }
        counts
    }

    /// Blocks that they have dealt with so far, one way or the other.
    pub fn done(&self) -> u64 {
        self.loaded() + self.skipped().total()
    }

    fn skip(&self, reason: SkipReason, blocks: usize) {
        self.skipped[reason as usize].fetch_add(blocks as u64, Relaxed);
    }
}

/// A worker's life. `segment` is the handle of the shared segment.
pub fn main(segment: u32) {
    process::handle_signals_as_worker();
    let Some(shared) = dsm::Segment::<Assignment>::attach(segment) else {
        // The leader has let go of it: there is nothing to do any more.
        return;
    };
    let assignment = shared.header();
    assignment.reach(Stage::Attached);
    process::connect_to_database(assignment.database.load(SeqCst));
    assignment.reach(Stage::Connected);

    let plan = PlanView::new(shared.words());
    for range in [&assignment.shared, &assignment.own] {
        let [start, end] = range.each_ref().map(|word| word.load(SeqCst) as usize);
        for (segment, blocks) in plan.segments(start..end) {
            load_segment(assignment, &segment, blocks);
        }
    }
    assignment.reach(Stage::Finished);
}

/// Loads what can be loaded of a segment, and counts the rest as skipped.
fn load_segment(assignment: &Assignment, segment: &Segment, mut blocks: &[BlockNumber]) {
    let mut first_error = true;
    while !blocks.is_empty() {
        let turn = &blocks[..blocks.len().min(BLOCKS_PER_LOCK)];
        let at = Cell::new(None);
        match transaction::run(|| load_turn(assignment, segment, turn, &at)) {
            Ok(Turn::Done) => blocks = &blocks[turn.len()..],
            Ok(Turn::SkipRest(reason, done)) => {
                assignment.skip(reason, blocks.len() - done);
                return;
            }
            Err(caught) => {
                // One line for a relation is enough: the counts tell the rest.
                if first_error {
                    caught.warn();
                    first_error = false;
                }
                match at.get() {
                    Some(index) => {
                        assignment.skip(SkipReason::Unreadable, 1);
                        blocks = &blocks[index + 1..];
                    }
                    None => {
                        assignment.skip(SkipReason::Unreadable, blocks.len());
                        return;
                    }
                }
            }
        }
    }
}

/// How a turn ended, short of an error.
enum Turn {
    Done,
    /// Neither the rest of this turn nor the blocks after it can be loaded;
    /// so many of this turn were.
    SkipRest(SkipReason, usize),
}

/// Loads blocks under one lock on their relation. `at` is the block being read.
fn load_turn(
    assignment: &Assignment,
    segment: &Segment,
    blocks: &[BlockNumber],
    at: &Cell<Option<usize>>,
) -> Turn {
    if !buffer::have_free_buffer() {
        return Turn::SkipRest(SkipReason::NoFreeBuffer, 0);
    }
    let Some(relation) =
        Relation::open_by_file(segment.database, segment.tablespace, segment.filenumber)
    else {
        return Turn::SkipRest(SkipReason::NoRelation, 0);
    };
    transaction::release_catalog_snapshot();
    if !relation.has_fork(segment.fork) {
        return Turn::SkipRest(SkipReason::NoBlock, 0);
    }
    let end = relation.blocks(segment.fork);
    for (index, &block) in blocks.iter().enumerate() {
        at.set(Some(index));
        process::check_for_interrupts();
        if block >= end {
            // Blocks are in ascending order.
            return Turn::SkipRest(SkipReason::NoBlock, index);
        }
        if !buffer::have_free_buffer() {
            return Turn::SkipRest(SkipReason::NoFreeBuffer, index);
        }
        relation.read_into_buffer(segment.fork, block);
        assignment.loaded.fetch_add(1, Relaxed);
    }
    Turn::Done
}
