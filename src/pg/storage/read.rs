//! Reading the blocks of a relation.
//!
//! There are four ways:
//!
//! 1. **Through a read stream**: a process that reads into shared buffers alone, from 17
//!    on. The server decides how far to read ahead. With the default `io_method` of 18
//!    and later, its I/O workers read.
//! 2. **In runs, into shared buffers**: one of several processes of a call, and any call
//!    on 15 and 16. The process reads runs of consecutive blocks itself, as many at once
//!    as the server can, and makes requests to the operating system ahead of them
//!    ([`ReadAhead`]). From 18 on, it hands half of a long run to I/O workers, or what
//!    `io_method` says. Several processes that used read streams would hand all of them over,
//!    and compete.
//! 3. **In runs, as long as there is room**: a load. As 2., but before each run it looks
//!    for buffers that it may fill, and ends if there are none ([`LoadRoom`]); and it hands
//!    nothing over while its workers are at least as many as the processors, and nobody
//!    else fills buffers.
//! 4. **Not into shared buffers**: the modes `read` and `prefetch`, for the operating
//!    system's cache.
//!
//! No way reads over the end of a segment file at once. All serve interrupts, and raise
//! the server's ERROR if a block cannot be read. The first three hold no snapshot of
//! catalogs while they read.

use std::ops::ControlFlow::{self, Break, Continue};

use pgrx::pg_sys;

use super::buffer::{self, Pinned};
use super::read_ahead::{ReadAhead, run_length};
use super::relation::Relation;
use super::room::LoadRoom;
use super::segments::{REQUEST_BLOCKS, SEGMENT_BLOCKS, Segments};
use crate::blocks::{BlockNumber, Fork};
use crate::pg::process::{self, check_for_interrupts, memory};
use crate::pg::sys::read::{
    CAN_HAND_OVER, READ_BLOCKS_MAX, max_buffers_at_once, read_buffers, read_stream,
};

/// How the reading of a load ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadEnd {
    /// All blocks are read, or as many as were wanted.
    Over,
    /// There is no buffer that may be filled.
    Full,
}

impl Relation<'_> {
    /// Reads blocks, which are in ascending order, into shared buffers (of a temporary
    /// relation: into local ones), and hands each to `each` with its place among `blocks`.
    /// After a break, only what is being read already is still handed over. `is_alone`
    /// says that no other process reads for the same call.
    pub fn read_into_buffers(
        &self,
        fork: Fork,
        blocks: &[BlockNumber],
        is_alone: bool,
        mut each: impl FnMut(usize, &Pinned) -> ControlFlow<()>,
    ) {
        if !is_alone || !self.read_through_stream(fork, blocks, &mut each) {
            self.read_in_runs(fork, blocks, None, &mut each);
        }
    }

    /// Reads blocks of a permanent relation, which are in ascending order, into shared
    /// buffers that a load may fill, and hands each to `each` with its place among `blocks`. After a
    /// break, only what is being read already is still handed over. `readers` is how many
    /// workers read for the load.
    pub fn read_as_load(
        &self,
        fork: Fork,
        blocks: &[BlockNumber],
        room: &LoadRoom,
        readers: usize,
        mut each: impl FnMut(usize, &Pinned) -> ControlFlow<()>,
    ) -> ReadEnd {
        self.read_in_runs(fork, blocks, Some((room, readers)), &mut each)
    }

    /// Returns false, and reads nothing, if the server has no read streams.
    fn read_through_stream(
        &self,
        fork: Fork,
        blocks: &[BlockNumber],
        each: &mut dyn FnMut(usize, &Pinned) -> ControlFlow<()>,
    ) -> bool {
        // SAFETY: the relation is open while `self` lives. For a block beyond its end the
        // server raises an ERROR.
        unsafe {
            read_stream(
                self.relation,
                fork,
                blocks,
                || self.transaction.release_catalog_snapshot(),
                &mut |index, buffer| {
                    let flow = each(index, &Pinned::new(buffer));
                    // After the pin was released: replay may be waiting for it.
                    check_for_interrupts();
                    flow
                },
            )
        }
    }

    fn read_in_runs(
        &self,
        fork: Fork,
        blocks: &[BlockNumber],
        load: Option<(&LoadRoom, usize)>,
        each: &mut dyn FnMut(usize, &Pinned) -> ControlFlow<()>,
    ) -> ReadEnd {
        // SAFETY: the relation is open while `self` lives.
        let mut ahead = unsafe { ReadAhead::new(self.relation, fork) };
        if let Some((_, readers)) = load {
            ahead.share(readers);
        }
        // A load's blocks are in no buffer, as far as the leader knows. Those of a call
        // may all be in buffers, and then need no requests: a block is expected to be
        // there if the one before was.
        let mut is_cached = load.is_none() && ahead.is_enabled() && self.is_cached(fork, blocks[0]);
        // Requests need the tablespace's setting, which was read from a catalog.
        self.transaction.release_catalog_snapshot();
        // If its own processes keep the processors busy and nobody else wants them, more
        // processes make a load slower.
        let hands_over = CAN_HAND_OVER
            && load.is_none_or(|(room, readers)| {
                room.fills.are_shared(readers) || readers < process::processors()
            });
        let max = max_buffers_at_once(hands_over);
        let mut index = 0;
        while index < blocks.len() {
            check_for_interrupts();
            let mut run = run_length(&blocks[index..], max);
            if let Some((room, readers)) = load {
                run = room.ahead(run, readers);
            }
            if run == 0 {
                return ReadEnd::Full;
            }
            if !is_cached {
                ahead.advance(blocks, index, run);
            }
            let hits = buffer::hits();
            let mut flow = Continue(());
            let mut last = 0;
            self.read_run(fork, blocks[index], run, hands_over, |buffer| {
                last = buffer.index();
                if each(index, buffer).is_break() {
                    flow = Break(());
                }
                index += 1;
            });
            if CAN_HAND_OVER && let Some((room, _)) = load {
                room.fills.add(last, run);
            }
            is_cached = load.is_none() && buffer::hits() - hits >= run as u64;
            if flow.is_break() {
                break;
            }
        }
        ReadEnd::Over
    }

    /// Reads `count` consecutive blocks of one segment file into buffers, at most
    /// [`max_buffers_at_once`].
    fn read_run(
        &self,
        fork: Fork,
        first: BlockNumber,
        count: usize,
        hands_over: bool,
        mut each: impl FnMut(&Pinned),
    ) {
        let mut buffers = [pg_sys::InvalidBuffer as pg_sys::Buffer; READ_BLOCKS_MAX];
        let mut done = 0;
        while done < count {
            #[expect(
                clippy::cast_possible_truncation,
                reason = "it is less than READ_BLOCKS_MAX"
            )]
            let next = first + done as BlockNumber;
            // SAFETY: the relation is open while `self` lives. For a block beyond its end
            // the server raises an ERROR. Buffers that were pinned but not read are passed
            // again, and each pin is taken over once.
            unsafe {
                let buffers = &mut buffers[done..count];
                let read = read_buffers(self.relation, fork, next, buffers, hands_over);
                for &buffer in &buffers[..read] {
                    each(&Pinned::new(buffer));
                }
                done += read;
            }
        }
    }

    /// Whether a block is in a buffer. If not, the operating system may be asked to read
    /// it.
    pub fn is_cached(&self, fork: Fork, block: BlockNumber) -> bool {
        // SAFETY: the relation is open while `self` lives.
        let found = unsafe { pg_sys::PrefetchBuffer(self.relation, fork as i32, block) };
        found.recent_buffer != pg_sys::InvalidBuffer as pg_sys::Buffer
    }

    /// Asks the operating system to read the blocks from `first` to before `end`, unless
    /// it has cached them, and does not wait. Tells `done` how many at a time, until that
    /// breaks.
    pub fn prefetch(
        &self,
        fork: Fork,
        first: BlockNumber,
        end: BlockNumber,
        done: impl FnMut(usize) -> ControlFlow<()>,
    ) {
        // A megabyte: enough to make the look worth its system call.
        const CACHESTAT_BLOCKS: usize = 8 * REQUEST_BLOCKS;
        // SAFETY: the relation is open while `self` lives.
        let mut segments = unsafe { Segments::new(self.relation, fork) };
        in_runs(first, end, CACHESTAT_BLOCKS, done, |first, count| {
            if segments.are_cached(first, count) {
                return;
            }
            for offset in (0..count).step_by(REQUEST_BLOCKS) {
                let request = REQUEST_BLOCKS.min(count - offset);
                #[expect(
                    clippy::cast_possible_truncation,
                    reason = "it is less than CACHESTAT_BLOCKS"
                )]
                let first = first + offset as BlockNumber;
                segments.prefetch(first, request);
            }
        });
    }

    /// Reads the blocks from `first` to before `end` into the operating system's cache.
    /// Tells `done` how many at a time, until that breaks.
    pub fn read(
        &self,
        fork: Fork,
        first: BlockNumber,
        end: BlockNumber,
        done: impl FnMut(usize) -> ControlFlow<()>,
    ) {
        const PIECES: usize = READ_BLOCKS_MAX * pg_sys::BLCKSZ as usize / IO_ALIGNMENT;
        let mut into = memory::room_for(PIECES);
        into.resize(PIECES, IoAligned([0; IO_ALIGNMENT]));
        // SAFETY: the relation is open while `self` lives.
        let mut segments = unsafe { Segments::new(self.relation, fork) };
        in_runs(first, end, READ_BLOCKS_MAX, done, |first, count| {
            // SAFETY: the memory is aligned, and has room for that many blocks.
            unsafe { segments.read(first, count, into.as_mut_ptr().cast()) }
        });
    }
}

/// A piece of memory that the server may read into with direct I/O.
#[repr(C, align(4096))]
#[derive(Clone)]
struct IoAligned([u8; IO_ALIGNMENT]);

/// `PG_IO_ALIGN_SIZE` of 16 and later.
const IO_ALIGNMENT: usize = 4096;

/// Does `act` for runs of at most `max` blocks, none of which crosses the end of a
/// segment file, and tells `done` the length of each, until that breaks.
fn in_runs(
    first: BlockNumber,
    end: BlockNumber,
    max: usize,
    mut done: impl FnMut(usize) -> ControlFlow<()>,
    mut act: impl FnMut(BlockNumber, usize),
) {
    let mut block = first;
    while block < end {
        check_for_interrupts();
        let segment_end = (block / SEGMENT_BLOCKS + 1).saturating_mul(SEGMENT_BLOCKS);
        let count = (end.min(segment_end) - block)
            .min(BlockNumber::try_from(max).unwrap_or(BlockNumber::MAX));
        act(block, count as usize);
        block += count;
        if done(count as usize).is_break() {
            return;
        }
    }
}
