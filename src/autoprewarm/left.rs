//! What a load has left: the blocks of its plan that were neither loaded nor skipped for
//! good.
//!
//! The blocks of a chunk are loaded in order. So one number for each chunk tells all: how
//! many of its blocks, from the first on, are settled. A block that was loaded is, and so
//! is one that no later load could load: its relation is gone, or it cannot be read. What
//! is not settled when the load ends was left for a temporary reason, whatever that is:
//! there was no free buffer, the relation was locked, the worker died, the load was
//! cancelled. What a [later](super::later) try loads, the next dump finds in shared
//! buffers. The numbers lie in the load's segment; the worker that has claimed a chunk
//! writes that chunk's.

use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::SeqCst;

use super::load_segment::{Cursor, Load};
use crate::blocks::{Age, PlanView, Record, UsageCount};
use crate::pg::shared::segment::Segment;

/// How many blocks of each chunk are settled.
#[derive(Clone, Copy)]
pub struct Settled<'a>(&'a [AtomicU32]);

impl<'a> Settled<'a> {
    pub fn of(segment: &'a Segment<Load, Cursor>) -> Self {
        Self(segment.counters())
    }

    /// Records that the first `blocks` blocks of a chunk are settled.
    #[expect(
        clippy::cast_possible_truncation,
        reason = "a chunk has at most CHUNK_BLOCKS blocks"
    )]
    pub fn settle(self, chunk: u32, blocks: usize) {
        self.0[chunk as usize].fetch_max(blocks as u32, SeqCst);
    }

    /// The records of a plan's blocks that are not settled.
    pub fn rest(
        self,
        plan: PlanView<'a>,
    ) -> impl Iterator<Item = (Record, UsageCount, Age)> + use<'a> {
        (0..).zip(self.0).flat_map(move |(chunk, settled)| {
            plan.records_from(chunk, settled.load(SeqCst) as usize)
        })
    }
}
