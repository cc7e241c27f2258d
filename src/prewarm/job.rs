//! What a call that prewarms many relations has to do, as all its processes see it.
//!
//! The caller lays it out, alone; its parallel workers then share the work with
//! it. Targets stand in the order in which they are done; each process goes through
//! them, claiming runs of blocks until there is none left. A header, an array of
//! targets, and words: first a bit for each shared buffer, which says whether the
//! call has brought something there, then the blocks of indexes that were done
//! beforehand.

use std::cell::{Cell, RefCell};
use std::ffi::CStr;
use std::ops::ControlFlow::{self, Break, Continue};
use std::ops::Range;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicI64, AtomicU32, AtomicU64};
use std::time::Instant;

use rustc_hash::FxHashSet;

use super::Mode;
use super::gate::Gate;
use super::read::{Change, Count, End, Part, Reader, Work};
use crate::blocks::{BlockNumber, Fork};
use crate::pace::Pace;
use crate::pg::process::activity::{Kind, Progress, ShownProgress};
use crate::pg::process::now;
use crate::pg::process::transaction::Transaction;
use crate::pg::shared::contents::Shared;
use crate::pg::shared::parallel;
use crate::pg::storage::buffer::{self, Pinned, Place};
use crate::pg::storage::prefault::{Prefaulted, Prefaulter};
use crate::pg::storage::room;

/// What the library's entry point for parallel workers is called.
pub const WORKER_ENTRY: &CStr = c"pg_prewarm_parallel_main";

pub struct Header {
    pub mode: Mode,
    /// How many processes share the work: those that were asked for, until it is
    /// known how many came.
    processes: AtomicU32,
    /// Blocks that are done, by all of them.
    pub done: AtomicU64,
    /// Why nothing more is to be done, if so: each [`Full`] is a bit.
    full: AtomicU32,
    free: Free,
    gate: Gate,
    prefaulted: Prefaulted,
}

// SAFETY: atomics, and what is not changed any more.
unsafe impl Shared for Header {}

impl Header {
    pub fn new(mode: Mode, processes: u32, done: u64) -> Self {
        Self {
            mode,
            processes: AtomicU32::new(processes),
            done: AtomicU64::new(done),
            full: AtomicU32::new(0),
            free: Free(AtomicU64::new(u64::MAX)),
            gate: Gate::new(),
            prefaulted: Prefaulted::new(),
        }
    }

    /// So many workers share the work with the caller.
    pub fn set_workers(&self, workers: u32) {
        self.processes.store(workers + 1, SeqCst);
    }

    fn processes(&self) -> u32 {
        self.processes.load(SeqCst)
    }

    /// Nothing more is to be done.
    pub fn set_full(&self, full: Full) {
        self.full.fetch_or(full as u32, SeqCst);
    }

    /// Why nothing more is to be done, if so.
    pub fn full(&self) -> Option<Full> {
        let bits = self.full.load(SeqCst);
        [Full::Shared, Full::Local]
            .into_iter()
            .find(|&full| bits & full as u32 != 0)
    }
}

/// One fork of a relation.
pub struct Target {
    pub part: Part,
    /// Only the caller can read it.
    pub is_temporary: bool,
    /// The first block that is not to be done any more.
    pub end: BlockNumber,
    pub is_empty: bool,
    /// Where, among the words, its blocks begin that were done beforehand, and how
    /// many that are.
    pub except: (u32, u32),
    /// The first block that nobody has claimed.
    next: AtomicU32,
    pub done: AtomicU64,
    pub cached: AtomicU64,
    /// When work on it began and ended, by the server's clock; 0 for not yet.
    began: AtomicI64,
    ended: AtomicI64,
    /// Microseconds that work on it took beforehand.
    took: AtomicI64,
    /// A [`Change`], counted from 1; 0 for none.
    change: AtomicU32,
}

// SAFETY: atomics, and what is not changed any more.
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

    /// Its blocks that were done beforehand, sorted.
    pub fn done_before<'w>(&self, words: &'w [AtomicU32]) -> &'w [AtomicU32] {
        let (start, count) = (self.except.0 as usize, self.except.1 as usize);
        &words[start..start + count]
    }

    /// How many blocks are still to be done.
    pub fn left(&self) -> u64 {
        u64::from(self.end).saturating_sub(u64::from(self.except.1))
    }

    /// Leaves out what is more than so many blocks, beside those done already.
    /// Returns how many may be done after it.
    pub fn cut(&mut self, most: u64, words: &[AtomicU32]) -> u64 {
        let wanted = self.left();
        if wanted <= most {
            return most - wanted;
        }
        // The end moves on by one for each block before it that is done already.
        let mut end = most as BlockNumber;
        for block in self.done_before(words) {
            if end == 0 || block.load(Relaxed) >= end {
                break;
            }
            end += 1;
        }
        self.end = end;
        0
    }

    /// A run of blocks for one of so many processes.
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
        let _ = self.began.compare_exchange(0, now(), SeqCst, SeqCst);
    }

    pub fn has_begun(&self) -> bool {
        self.began.load(SeqCst) != 0 || self.done.load(SeqCst) > 0
    }

    /// What is done of it from here on is done later.
    pub fn pause(&self) {
        self.took.store(self.elapsed(), SeqCst);
        self.began.store(0, SeqCst);
        self.ended.store(0, SeqCst);
    }

    fn count(&self, count: Count) {
        self.done.fetch_add(count.blocks, SeqCst);
        self.cached.fetch_add(count.cached, SeqCst);
        self.ended.fetch_max(now(), SeqCst);
    }

    /// Microseconds from the beginning of the work on it to its end, without pauses.
    pub fn elapsed(&self) -> i64 {
        let last = self.ended.load(SeqCst) - self.began.load(SeqCst);
        self.took.load(SeqCst) + last.max(0)
    }

    /// Nothing more can be done of it.
    fn give_up(&self, change: Change) {
        self.change.store(change as u32 + 1, SeqCst);
        self.next.store(self.end, SeqCst);
    }

    pub fn change(&self) -> Option<Change> {
        let number = self.change.load(SeqCst).checked_sub(1)?;
        Change::ALL.get(number as usize).copied()
    }
}

/// Which buffers are full of what the call has read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Full {
    Shared = 1,
    /// Those of this session's temporary relations.
    Local = 2,
}

/// The local buffers that a call has brought something into.
pub type FilledLocal = RefCell<FxHashSet<i32>>;

/// How many buffers were free when all were last counted, less what the call has read
/// since; [`u64::MAX`] before that.
struct Free(AtomicU64);

impl Free {
    fn take(&self, blocks: u64) {
        let less = |free: u64| (free != u64::MAX).then(|| free.saturating_sub(blocks));
        let _ = self.0.fetch_update(Relaxed, Relaxed, less);
    }
}

/// The buffers that a call has brought something into. The first time that another
/// block is found in one of these, something of the call's has been evicted, by it
/// or by others: then there are no others any more.
pub struct Filled<'a> {
    shared: &'a [AtomicU32],
    local: &'a FilledLocal,
    free: &'a Free,
    /// When this process may count the free buffers again.
    next_count: Cell<Option<Instant>>,
}

impl<'a> Filled<'a> {
    /// How many words it takes.
    pub fn words() -> usize {
        buffer::count().div_ceil(32)
    }

    pub fn new(header: &'a Header, words: &'a [AtomicU32], local: &'a FilledLocal) -> Self {
        Self {
            shared: &words[..Self::words()],
            local,
            free: &header.free,
            next_count: Cell::new(None),
        }
    }

    /// How many blocks can be read, at most so many, before one of the call's would
    /// be evicted. It is a guess, since others use buffers as well.
    fn room(&self, is_temporary: bool, most: usize) -> usize {
        if is_temporary {
            let all = match buffer::count_local() {
                0 => most,
                all => all,
            };
            return all.saturating_sub(self.local.borrow().len()).min(most);
        }
        let is_filled =
            |index: usize| self.shared[index / 32].load(Relaxed) & (1 << (index % 32)) != 0;
        let free = self.count_free(most);
        match free >= most {
            true => most,
            false => free + room::count_evictable_before(most - free, is_filled),
        }
    }

    /// How many buffers are free, where these are taken before anything is evicted. All
    /// are counted only where it may matter, and for a tenth of the time at most.
    fn count_free(&self, most: usize) -> usize {
        if !room::free_list_has_any() {
            return 0;
        }
        let known = self.free.0.load(Relaxed);
        let start = Instant::now();
        let is_due = self.next_count.get().is_none_or(|next| start >= next);
        if known != u64::MAX && (known >= 2 * most as u64 || !is_due) {
            return known as usize;
        }
        let free = room::count_free();
        self.free.0.store(free as u64, Relaxed);
        self.next_count
            .set(Some(Instant::now() + 9 * start.elapsed()));
        free
    }

    fn mark(&self, buffer: &Pinned) -> ControlFlow<Full> {
        match buffer.place() {
            Place::Shared(index) => {
                let bit = 1 << (index % 32);
                let before = self.shared[index / 32].fetch_or(bit, Relaxed);
                // What was in it may also have been dropped, if free buffers come first
                // and there are some.
                if before & bit != 0 && !room::free_list_has_any() {
                    return Break(Full::Shared);
                }
            }
            Place::Local(number) => {
                if !self.local.borrow_mut().insert(number) {
                    return Break(Full::Local);
                }
            }
        }
        Continue(())
    }
}

/// One process at work.
pub struct Share<'a> {
    pub header: &'a Header,
    pub filled: &'a Filled<'a>,
    pub reader: Reader<'a>,
    /// The caller's row tells of all processes, a worker's of itself.
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

    fn is_to_stop(&self, target: &Target) -> bool {
        match self.header.full() {
            None => false,
            Some(Full::Shared) => true,
            Some(Full::Local) => target.is_temporary,
        }
    }

    /// Does what can be claimed of the targets.
    pub fn work(&self, targets: &[Target], words: &[AtomicU32]) {
        for target in targets {
            if target.is_temporary && !self.is_caller {
                continue;
            }
            while !self.is_to_stop(target)
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
            &|most| {
                // Each process leaves the others as much. Only the caller reads what
                // is temporary.
                let processes = match target.is_temporary {
                    true => 1,
                    false => self.header.processes() as usize,
                };
                self.filled
                    .room(target.is_temporary, most.saturating_mul(processes))
                    .div_ceil(processes)
            },
            &mut |block, buffer| {
                if let Break(full) = self.filled.mark(buffer) {
                    self.header.set_full(full);
                }
                each(block, buffer);
                match self.is_to_stop(target) {
                    true => Break(()),
                    false => Continue(()),
                }
            },
            &mut |count| {
                target.count(count);
                if !target.is_temporary {
                    self.filled.free.take(count.blocks - count.cached);
                }
                let all = self.header.done.fetch_add(count.blocks, SeqCst) + count.blocks;
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

/// A parallel worker's life.
///
/// # Safety
/// `toc` is what the entry point [`WORKER_ENTRY`] was given.
pub unsafe fn worker_main(toc: *mut pgrx::pg_sys::shm_toc) {
    // SAFETY: the caller's promise; whoever names that entry point shares such a
    // job.
    let job = unsafe { parallel::attach::<Header, Target>(toc) };
    // SAFETY: the server calls the entry point of a parallel worker in a transaction.
    let transaction = unsafe { Transaction::of_call() };
    let local = FilledLocal::default();
    let filled = Filled::new(job.header, job.words, &local);
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
