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
//!    ([`ReadAhead`]). Several processes that used read streams would compete for the
//!    same I/O workers.
//! 3. **In runs, as long as there is room**: a load. As 2., but before each run it looks
//!    for buffers that it may fill, and ends if there are none ([`LoadRoom`]). Long runs
//!    that the system has not cached are read with direct I/O, where that takes less time
//!    ([`LoadReads::directly`]), so they do not pass through the system's cache.
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
use super::segments::{Cached, REQUEST_BLOCKS, SEGMENT_BLOCKS, Segments};
use crate::blocks::{BlockNumber, Fork};
use crate::pg::process::{check_for_interrupts, memory};
use crate::pg::sys::direct_io::DirectReads;
use crate::pg::sys::read::{READ_BLOCKS_MAX, max_buffers_at_once, read_buffers, read_stream};

/// How the reading of a load ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadEnd {
    /// All blocks are read, or as many as were wanted.
    Over,
    /// There is no buffer that may be filled.
    Full,
}

/// A megabyte: enough to make the look for what the system has cached worth its system
/// call, and few reads from a disk.
const LONG_RUN: usize = 8 * REQUEST_BLOCKS;

/// How a load reads.
pub struct LoadReads<'a> {
    pub room: &'a LoadRoom,
    /// How many workers read at the same time.
    pub readers: usize,
    /// Whether long runs that the system has not cached are read with direct I/O.
    pub directly: bool,
}

/// Blocks that are read in the same way, up to one of them.
#[derive(Clone, Copy)]
struct Stretch {
    end: usize,
    directly: bool,
    /// Whether requests are made ahead of the reads.
    ahead: bool,
}

impl Stretch {
    /// The blocks from `index` on up to the next long run, or that run.
    fn next(segments: &mut Segments, blocks: &[BlockNumber], index: usize) -> Self {
        let mut end = index;
        while end < blocks.len() {
            let run = run_length(&blocks[end..], LONG_RUN);
            if run == LONG_RUN {
                break;
            }
            end += run;
        }
        if end > index {
            return Self::ahead(end);
        }
        let cached = segments.cached(blocks[index], LONG_RUN);
        Self {
            end: index + LONG_RUN,
            directly: cached == Some(Cached::Little),
            ahead: cached != Some(Cached::All),
        }
    }

    /// The blocks up to `end`, with requests ahead.
    fn ahead(end: usize) -> Self {
        Self {
            end,
            directly: false,
            ahead: true,
        }
    }
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
    /// break, only what is being read already is still handed over.
    pub fn read_as_load(
        &self,
        fork: Fork,
        blocks: &[BlockNumber],
        load: &LoadReads,
        mut each: impl FnMut(usize, &Pinned) -> ControlFlow<()>,
    ) -> ReadEnd {
        self.read_in_runs(fork, blocks, Some(load), &mut each)
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
        load: Option<&LoadReads>,
        each: &mut dyn FnMut(usize, &Pinned) -> ControlFlow<()>,
    ) -> ReadEnd {
        // SAFETY: the relation is open while `self` lives.
        let (mut ahead, mut segments) = unsafe {
            (
                ReadAhead::new(self.relation, fork),
                Segments::new(self.relation, fork),
            )
        };
        if let Some(load) = load {
            ahead.share(load.readers);
        }
        // A load's blocks are in no buffer, as far as the leader knows. Those of a call
        // may all be in buffers, and then need no requests: a block is expected to be
        // there if the one before was.
        let mut is_cached = load.is_none() && ahead.is_enabled() && self.is_cached(fork, blocks[0]);
        // Requests need the tablespace's setting, which was read from a catalog.
        self.transaction.release_catalog_snapshot();
        let may_read_directly =
            load.is_some_and(|load| load.directly) && segments.can_be_read_directly(blocks[0]);
        let mut stretch = Stretch::ahead(if may_read_directly { 0 } else { blocks.len() });
        let mut direct_reads = None;
        let max = max_buffers_at_once();
        let mut index = 0;
        while index < blocks.len() {
            check_for_interrupts();
            if index >= stretch.end {
                stretch = Stretch::next(&mut segments, blocks, index);
                if stretch.directly != direct_reads.is_some() {
                    // SAFETY: the relation is open while `self` lives, and can be read directly.
                    let begin = || unsafe { DirectReads::begin(self.relation) };
                    direct_reads = stretch.directly.then(begin);
                }
            }
            let mut run = run_length(&blocks[index..stretch.end], max);
            if let Some(load) = load {
                run = load.room.ahead(run);
            }
            if run == 0 {
                return ReadEnd::Full;
            }
            if stretch.ahead && !stretch.directly && !is_cached {
                ahead.advance(&blocks[..stretch.end], index);
            }
            let hits = buffer::hits();
            let mut flow = Continue(());
            self.read_run(fork, blocks[index], run, |buffer| {
                if each(index, buffer).is_break() {
                    flow = Break(());
                }
                index += 1;
            });
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
                let read = read_buffers(self.relation, fork, next, &mut buffers[done..count]);
                for &buffer in &buffers[done..done + read] {
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
        // SAFETY: the relation is open while `self` lives.
        let mut segments = unsafe { Segments::new(self.relation, fork) };
        in_runs(first, end, LONG_RUN, done, |first, count| {
            if segments.cached(first, count) == Some(Cached::All) {
                return;
            }
            for offset in (0..count).step_by(REQUEST_BLOCKS) {
                let request = REQUEST_BLOCKS.min(count - offset);
                #[expect(clippy::cast_possible_truncation, reason = "it is less than LONG_RUN")]
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
