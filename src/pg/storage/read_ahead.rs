//! Reading ahead by requests to the operating system, for a process that reads blocks
//! itself and waits for each read.

use std::collections::VecDeque;
use std::ops::Range;

use pgrx::pg_sys;

use super::segments::{REQUEST_BLOCKS, SEGMENT_BLOCKS, Segments};
use crate::blocks::{BlockNumber, Fork};
use crate::pg::sys::version::{locator, reads_directly};

/// Requests for blocks that will be read next.
pub struct ReadAhead {
    segments: Segments,
    window: Window,
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
                window: Window::new(match reads_directly() {
                    true => 0,
                    false => usize::try_from(concurrency).unwrap_or(0),
                }),
            }
        }
    }

    /// Makes only one reader's share of the requests: the reads of sessions wait behind those
    /// that the disk has been given already.
    pub fn share(&mut self, readers: usize) {
        self.window.share(readers);
    }

    pub fn is_enabled(&self) -> bool {
        self.window.max_requests > 0
    }

    /// Makes as many requests as are allowed, before so many blocks from `blocks[index]` on are
    /// read.
    pub fn advance(&mut self, blocks: &[BlockNumber], index: usize, read: usize) {
        while let Some(request) = self.window.next(blocks, index, read) {
            self.segments.prefetch(blocks[request.start], request.len());
        }
    }
}

/// Which of the blocks are requested. Consecutive ones share a request.
struct Window {
    /// For each request whose blocks have not been read: where, among the blocks, it
    /// ends.
    requests: VecDeque<usize>,
    /// The first block that was not requested.
    next: usize,
    max_requests: usize,
    /// How many blocks may be requested beyond those that are read next.
    max_blocks: usize,
}

impl Window {
    fn new(max_requests: usize) -> Self {
        Self {
            requests: VecDeque::new(),
            next: 0,
            max_requests,
            max_blocks: usize::MAX,
        }
    }

    /// Makes one reader's share of the requests that two would make, and all together for
    /// a megabyte beyond what they read.
    fn share(&mut self, readers: usize) {
        const REQUESTERS: usize = 2;
        const BLOCKS: usize = 8 * REQUEST_BLOCKS;
        let readers = readers.max(REQUESTERS);
        self.max_requests = (self.max_requests * REQUESTERS).div_ceil(readers);
        self.max_blocks = BLOCKS / readers;
    }

    /// The blocks of the next request, if one is to be made before so many blocks from
    /// `blocks[index]` on are read.
    fn next(&mut self, blocks: &[BlockNumber], index: usize, read: usize) -> Option<Range<usize>> {
        while self.requests.front().is_some_and(|&end| end <= index) {
            self.requests.pop_front();
        }
        if self.requests.len() >= self.max_requests || self.next >= blocks.len() {
            return None;
        }
        let start = self.next.max(index);
        let end = start + run_length(&blocks[start..], REQUEST_BLOCKS);
        let limit = (index + read.max(REQUEST_BLOCKS)).saturating_add(self.max_blocks);
        if end > limit && start > index {
            return None;
        }
        self.next = end;
        self.requests.push_back(end);
        Some(start..end)
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

#[cfg(test)]
mod tests {
    use super::*;

    /// The requests that are made while all of the blocks are read, so many at a time: the
    /// number of requests, and the maximum number of blocks requested and not yet read.
    fn requests(window: &mut Window, blocks: &[BlockNumber], step: usize) -> (usize, usize) {
        let (mut count, mut ahead, mut end) = (0, 0, 0);
        for index in (0..blocks.len()).step_by(step) {
            while let Some(request) = window.next(blocks, index, step) {
                assert_eq!(request.start, end, "each block is requested once");
                end = request.end;
                count += 1;
            }
            assert!(end > index || window.max_requests == 0);
            ahead = ahead.max(end.saturating_sub(index));
        }
        (count, ahead)
    }

    #[test]
    fn readers_share_whole_requests_for_consecutive_blocks() {
        let dense: Vec<BlockNumber> = (0..512).collect();
        for step in [1, 16, 32] {
            for (readers, ahead) in [(1, 80), (2, 80), (4, 48), (8, 32)] {
                // What is read next is requested as well.
                let ahead = ahead + step.max(16) - 16;
                for concurrency in [10, 100] {
                    let mut window = Window::new(concurrency);
                    window.share(readers);
                    assert_eq!(
                        requests(&mut window, &dense, step),
                        (32, ahead),
                        "{readers}"
                    );
                }
            }
            assert_eq!(requests(&mut Window::new(10), &dense, step), (32, 160));
        }
    }

    #[test]
    fn readers_share_the_number_of_requests_for_scattered_blocks() {
        let scattered: Vec<BlockNumber> = (0..512).map(|block| block * 7).collect();
        for (readers, ahead) in [(1, 10), (2, 10), (4, 5), (8, 3), (64, 1)] {
            let mut window = Window::new(10);
            window.share(readers);
            assert_eq!(
                requests(&mut window, &scattered, 1),
                (512, ahead),
                "{readers}"
            );
        }
        assert_eq!(requests(&mut Window::new(0), &scattered, 1), (0, 0));
    }
}
