//! Reading ahead by requests to the operating system, for a process that reads blocks
//! itself and waits for each read.

use std::collections::VecDeque;

use pgrx::pg_sys;

use super::segments::{REQUEST_BLOCKS, SEGMENT_BLOCKS, Segments};
use crate::blocks::{BlockNumber, Fork};
use crate::pg::sys::version::{locator, reads_directly};

/// Requests for blocks that will be read next. Consecutive blocks share a request.
pub struct ReadAhead {
    segments: Segments,
    /// For each request whose blocks have not been read: where, among the blocks, it
    /// ends.
    requests: VecDeque<usize>,
    /// The first block that was not requested.
    next: usize,
    max_requests: usize,
    /// How many blocks may be requested that have not been read.
    max_blocks: usize,
}

impl ReadAhead {
    /// As many requests as `maintenance_io_concurrency` of the tablespace says; none with
    /// direct I/O.
    ///
    /// # Safety
    /// `relation` stays open for as long as this is used.
    pub unsafe fn new(relation: pg_sys::Relation, fork: Fork) -> Self {
        // SAFETY: the relation is open, in a transaction, so catalogs can be read.
        unsafe {
            let tablespace = locator(relation).tablespace;
            let concurrency = pg_sys::get_tablespace_maintenance_io_concurrency(tablespace.into());
            Self {
                segments: Segments::new(relation, fork),
                requests: VecDeque::new(),
                next: 0,
                max_requests: match reads_directly() {
                    true => 0,
                    false => usize::try_from(concurrency).unwrap_or(0),
                },
                max_blocks: usize::MAX,
            }
        }
    }

    /// Makes only one reader's share of the requests that two would make, and all together
    /// for about 1.5 MB: the reads of sessions wait behind those that the disk has been given
    /// already.
    pub fn share(&mut self, readers: usize) {
        const REQUESTERS: usize = 2;
        const BLOCKS: usize = 12 * REQUEST_BLOCKS;
        let readers = readers.max(REQUESTERS);
        self.max_requests = (self.max_requests * REQUESTERS).div_ceil(readers);
        self.max_blocks = BLOCKS.div_ceil(readers);
    }

    pub fn is_enabled(&self) -> bool {
        self.max_requests > 0
    }

    /// Makes as many requests as are allowed, before `blocks[index]` is read.
    pub fn advance(&mut self, blocks: &[BlockNumber], index: usize) {
        while self.requests.front().is_some_and(|&end| end <= index) {
            self.requests.pop_front();
        }
        let end = blocks.len().min(index.saturating_add(self.max_blocks));
        while self.requests.len() < self.max_requests && self.next < end {
            let start = self.next.max(index);
            let run = run_length(&blocks[start..end], REQUEST_BLOCKS);
            self.segments.prefetch(blocks[start], run);
            self.next = start + run;
            self.requests.push_back(self.next);
        }
    }
}

/// How many blocks at the beginning are consecutive and in one segment file, at most
/// `max`.
pub fn run_length(blocks: &[BlockNumber], max: usize) -> usize {
    let first = blocks[0];
    let left_in_segment = SEGMENT_BLOCKS - first % SEGMENT_BLOCKS;
    blocks
        .iter()
        .zip(first..)
        .take(max.min(left_in_segment as usize))
        .take_while(|&(&block, expected)| block == expected)
        .count()
}
