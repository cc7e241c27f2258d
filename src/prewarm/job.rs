//! The job of a call that prewarms many relations, in memory that the caller shares
//! with its parallel workers.
//!
//! The job consists of a header, an array of targets in the order of prewarming, and
//! words: first the marks of the shared buffers that the call has read blocks into (see
//! `marks`); then the numbers of the index blocks that the caller has read
//! beforehand. All processes go through the targets and claim runs of blocks until none
//! are left.

use std::ffi::CStr;
use std::ops::ControlFlow::{Break, Continue};
use std::ops::Range;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicI64, AtomicU32, AtomicU64};

use super::Mode;
use super::filled::{Filled, FilledLocal, Free, Full};
use super::gate::Gate;
use super::read::{Change, Count, End, Part, Reader, Work};
use crate::blocks::{BlockNumber, Fork};
use crate::pace::Pace;
use crate::pg::process::now;
use crate::pg::process::transaction::Transaction;
use crate::pg::shared::contents::Shared;
use crate::pg::shared::parallel::TableOfContents;
use crate::pg::storage::buffer::Pinned;
use crate::pg::storage::prefault::{Prefaulted, Prefaulter};
use crate::progress::{Kind, Progress, ShownProgress};

/// The name of the library's entry point for parallel workers.
pub const WORKER_ENTRY: &CStr = c"pg_prewarm_parallel_main";

pub struct Header {
    pub mode: Mode,
    /// How many blocks the call reads into shared buffers at most.
    to_buffers: u64,
    /// How many processes share the work: the number requested, until it is known how
    /// many have started.
    processes: AtomicU32,
    /// How many blocks all processes have done.
    pub done: AtomicU64,
    /// Which buffers are full, so that no more blocks are to be read into them: each
    /// [`Full`] is a bit.
    full: AtomicU32,
    free: Free,
    gate: Gate,
    prefaulted: Prefaulted,
}

// SAFETY: it holds no pointers and nothing to drop, and once it is shared, only its
// atomics change.
unsafe impl Shared for Header {}

impl Header {
    pub fn new(mode: Mode, to_buffers: u64, processes: u32, done: u64) -> Self {
        Self {
            mode,
            to_buffers,
            processes: AtomicU32::new(processes),
            done: AtomicU64::new(done),
            full: AtomicU32::new(0),
            free: Free::new(),
            gate: Gate::new(),
            prefaulted: Prefaulted::new(),
        }
    }

    /// Sets how many workers share the work with the caller.
    pub fn set_workers(&self, workers: u32) {
        self.processes.store(workers + 1, SeqCst);
    }

    fn processes(&self) -> u32 {
        self.processes.load(SeqCst)
    }

    /// The buffers that the call has filled, as the words say.
    pub fn filled<'a>(&'a self, words: &'a [AtomicU32], local: &'a FilledLocal) -> Filled<'a> {
        Filled::new(self.to_buffers, &self.free, words, local)
    }

    /// Records that no more blocks are to be read into the given buffers.
    pub fn set_full(&self, full: Full) {
        self.full.fetch_or(full as u32, SeqCst);
    }

    /// Which buffers are full. `None` if none are.
    pub fn full(&self) -> Option<Full> {
        let bits = self.full.load(SeqCst);
        [Full::Shared, Full::Local]
            .into_iter()
            .find(|&full| bits & full as u32 != 0)
    }
}

/// One fork of a relation, and how far it has been prewarmed.
pub struct Target {
    pub part: Part,
    /// Whether the relation is temporary, so that only the caller can read it.
    pub is_temporary: bool,
    /// The end of the blocks to be read.
    pub end: BlockNumber,
    pub is_empty: bool,
    /// The position of the blocks done beforehand in the words, and their number.
    pub except: (u32, u32),
    /// The first block that no process has claimed.
    next: AtomicU32,
    pub done: AtomicU64,
    pub cached: AtomicU64,
    /// When the first block was begun and the last was done; 0 means not yet.
    began: AtomicI64,
    ended: AtomicI64,
    /// Microseconds spent before the last [`Self::pause`].
    took: AtomicI64,
    /// A [`Change`] plus one; 0 means none.
    change: AtomicU32,
}

// SAFETY: it holds no pointers and nothing to drop, and once it is shared, only its
// atomics change.
unsafe impl Shared for Target {}

impl Target {
    pub fn new(part: Part, is_temporary: bool, end: BlockNumber) -> Self {
        Self {
            part,
            is_temporary,
            end,
            is_empty: end == 0,
            except: (0, 0),
            next: AtomicU32::new(0),
            done: AtomicU64::new(0),
            cached: AtomicU64::new(0),
            began: AtomicI64::new(0),
            ended: AtomicI64::new(0),
            took: AtomicI64::new(0),
            change: AtomicU32::new(0),
        }
    }

    /// The blocks of the target that were done beforehand, sorted. They no longer change,
    /// so they may be read with any memory ordering.
    pub fn done_before<'w>(&self, words: &'w [AtomicU32]) -> &'w [AtomicU32] {
        let (start, count) = (self.except.0 as usize, self.except.1 as usize);
        &words[start..start + count]
    }

    /// How many blocks are still to be done.
    pub fn left(&self) -> u64 {
        u64::from(self.end).saturating_sub(u64::from(self.except.1))
    }

    /// Limits the target to `max` blocks, in addition to those done already. Returns how
    /// many blocks are left for the targets after it.
    pub fn cut(&mut self, max: u64, words: &[AtomicU32]) -> u64 {
        let wanted = self.left();
        if wanted <= max {
            return max - wanted;
        }
        // Each block before the end that is done already moves the end by one.
        #[expect(
            clippy::cast_possible_truncation,
            reason = "it is less than `wanted`, which has 32 bits"
        )]
        let mut end = max as BlockNumber;
        for block in self.done_before(words) {
            if end == 0 || block.load(Relaxed) >= end {
                break;
            }
            end += 1;
        }
        self.end = end;
        0
    }

    /// Claims a run of blocks, whose length depends on how many processes share them.
    fn claim(&self, processes: u32) -> Option<Range<BlockNumber>> {
        const LEAST: u32 = 512;
        const MOST: u32 = 16384;
        let end_from = |next: u32| {
            let left = self.end.saturating_sub(next);
            let share = match processes {
                1 => left,
                _ => left / (processes * 4),
            };
            (left > 0).then(|| next + share.clamp(LEAST, MOST).min(left))
        };
        let start = self.next.fetch_update(SeqCst, SeqCst, end_from).ok()?;
        Some(start..end_from(start)?)
    }

    fn begin(&self) {
        let _ = self.began.compare_exchange(0, now(), Relaxed, Relaxed);
    }

    pub fn has_begun(&self) -> bool {
        self.began.load(Relaxed) != 0 || self.done.load(Relaxed) > 0
    }

    /// Stops the clock until the target is begun again.
    pub fn pause(&self) {
        self.took.store(self.elapsed(), Relaxed);
        self.began.store(0, Relaxed);
        self.ended.store(0, Relaxed);
    }

    fn count(&self, count: Count) {
        self.done.fetch_add(count.blocks, Relaxed);
        self.cached.fetch_add(count.cached, Relaxed);
        self.ended.fetch_max(now(), Relaxed);
    }

    /// Microseconds from the first block to the last, without the pause.
    pub fn elapsed(&self) -> i64 {
        let last = self.ended.load(Relaxed) - self.began.load(Relaxed);
        self.took.load(Relaxed) + last.max(0)
    }

    /// Records that the relation has changed, so that no more of it can be read.
    fn give_up(&self, change: Change) {
        self.change.store(change as u32 + 1, SeqCst);
        self.next.store(self.end, SeqCst);
    }

    pub fn change(&self) -> Option<Change> {
        let number = self.change.load(SeqCst).checked_sub(1)?;
        Change::ALL.get(number as usize).copied()
    }
}

/// One process's part in the job.
pub struct Share<'a> {
    pub header: &'a Header,
    pub filled: &'a Filled<'a>,
    pub reader: Reader<'a>,
    /// The process's row in the progress view. The caller's row counts the blocks of all
    /// processes, a worker's row its own.
    progress: ShownProgress,
    is_caller: bool,
}

impl<'a> Share<'a> {
    pub fn new(
        transaction: &'a Transaction,
        header: &'a Header,
        filled: &'a Filled<'a>,
        kind: Kind,
        total: u64,
        start: i64,
    ) -> Self {
        Self {
            header,
            filled,
            reader: Reader {
                transaction,
                mode: header.mode,
                gate: (header.processes() > 1).then_some(&header.gate),
                prefaulter: Prefaulter::new(&header.prefaulted),
                pace: Pace::new(),
            },
            progress: ShownProgress::new(Progress {
                kind,
                relation: 0,
                fork: Fork::Main,
                total,
                done: 0,
                skipped: 0,
                start,
            }),
            is_caller: kind != Kind::PrewarmWorker,
        }
    }

    /// Whether no more blocks of the target are to be read, for lack of buffers.
    fn should_stop(&self, target: &Target) -> bool {
        match self.header.full() {
            None => false,
            Some(Full::Shared) => true,
            Some(Full::Local) => target.is_temporary,
        }
    }

    /// Claims and reads blocks of the targets until none are left.
    pub fn work(&self, targets: &[Target], words: &[AtomicU32]) {
        for target in targets {
            if target.is_temporary && !self.is_caller {
                continue;
            }
            while !self.should_stop(target)
                && let Some(blocks) = target.claim(self.header.processes())
            {
                if !self.is_caller {
                    self.progress
                        .change(|progress| progress.total += blocks.len() as u64);
                }
                let work = Work::Range {
                    blocks,
                    except: target.done_before(words),
                };
                self.read(target, work, &mut |_, _| ());
            }
        }
    }

    /// Reads blocks of a target, and hands them to `each`.
    pub fn read(&self, target: &Target, work: Work, each: &mut dyn FnMut(BlockNumber, &Pinned)) {
        target.begin();
        self.progress.change(|progress| {
            progress.relation = target.part.relation;
            progress.fork = target.part.fork;
        });
        let end = self.reader.read(
            &target.part,
            None,
            work,
            &|max| {
                // The room is divided among the processes, but only the caller reads
                // temporary relations.
                let processes = match target.is_temporary {
                    true => 1,
                    false => self.header.processes() as usize,
                };
                self.filled
                    .room(target.is_temporary, max.saturating_mul(processes))
                    .div_ceil(processes)
            },
            &mut |block, buffer| {
                if let Break(full) = self.filled.mark(buffer) {
                    self.header.set_full(full);
                }
                each(block, buffer);
                match self.should_stop(target) {
                    true => Break(()),
                    false => Continue(()),
                }
            },
            &mut |count| {
                target.count(count);
                if !target.is_temporary {
                    self.header.free.take(count.blocks - count.cached);
                }
                let all = self.header.done.fetch_add(count.blocks, Relaxed) + count.blocks;
                self.progress.change(|progress| match self.is_caller {
                    true => progress.done = all,
                    false => progress.done += count.blocks,
                });
            },
        );
        match end {
            End::Over | End::Stopped => {}
            End::Full => self.header.set_full(match target.is_temporary {
                true => Full::Local,
                false => Full::Shared,
            }),
            End::Changed(change) => target.give_up(change),
        }
    }
}

/// Runs a parallel worker.
///
/// # Safety
/// The server has passed this table of contents to [`WORKER_ENTRY`].
pub unsafe fn worker_main(contents: &TableOfContents) {
    // SAFETY: the server passes the table of contents of the process that launched this
    // worker. Only `functions::run` launches workers with this entry point, and it
    // shares a job of these types.
    let job = unsafe { contents.job::<Header, Target>() };
    // SAFETY: the server calls the entry point of a parallel worker in a transaction.
    let transaction = unsafe { Transaction::current() };
    let local = FilledLocal::default();
    let filled = job.header.filled(job.words, &local);
    let share = Share::new(
        transaction,
        job.header,
        &filled,
        Kind::PrewarmWorker,
        0,
        now(),
    );
    share.work(job.cells, job.words);
    Progress::end();
}
