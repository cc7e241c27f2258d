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

use rustc_hash::FxHashSet;

use super::Mode;
use super::gate::Gate;
use super::read::{Change, Count, End, Part, Reader, Work, contains};
use crate::blocks::{BlockNumber, Fork};
use crate::pg::activity::{Kind, Progress, ShownProgress};
use crate::pg::buffer::{self, Pinned, Place};
use crate::pg::parallel::{self, Portable};
use crate::pg::process::now;
use crate::turn::{Memory, Pace, Provided};

/// What the library's entry point for parallel workers is called.
pub const WORKER_ENTRY: &CStr = c"pg_prewarm_parallel_main";

pub struct Header {
    pub mode: Mode,
    /// How many processes may share the work.
    pub processes: u32,
    /// Blocks that are done, by all of them.
    pub done: AtomicU64,
    /// Why nothing more is to be done, if so: a [`Full`], or 0.
    full: AtomicU32,
    gate: Gate,
    provided: Provided,
}

// SAFETY: atomics, and what is not changed any more.
unsafe impl Portable for Header {}

impl Header {
    pub fn new(mode: Mode, processes: u32, done: u64) -> Self {
        Self {
            mode,
            processes,
            done: AtomicU64::new(done),
            full: AtomicU32::new(0),
            gate: Gate::new(),
            provided: Provided::new(),
        }
    }

    /// Nothing more is to be done.
    pub fn set_full(&self, full: Full) {
        self.full.store(full as u32, SeqCst);
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
    /// A [`Change`], counted from 1; 0 for none.
    change: AtomicU32,
}

// SAFETY: atomics, and what is not changed any more.
unsafe impl Portable for Target {}

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
            change: AtomicU32::new(0),
        }
    }

    /// Leaves out what is more than so many blocks, beside those done already.
    /// Returns how many may be done after it.
    pub fn cut(&mut self, most: u64, except: &[AtomicU32]) -> u64 {
        let is_done = |block: &BlockNumber| contains(except, *block);
        let wanted = u64::from(self.end) - except.len() as u64;
        if wanted <= most {
            return most - wanted;
        }
        // The block after the last one that may be done.
        self.end = match usize::try_from(most)
            .ok()
            .and_then(|most| most.checked_sub(1))
        {
            None => 0,
            Some(last) => (0..self.end)
                .filter(|block| !is_done(block))
                .nth(last)
                .map_or(0, |block| block + 1),
        };
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
        self.began.load(SeqCst) != 0
    }

    fn count(&self, count: Count) {
        self.done.fetch_add(count.blocks, SeqCst);
        self.cached.fetch_add(count.cached, SeqCst);
        self.ended.fetch_max(now(), SeqCst);
    }

    /// Microseconds from the beginning of the work on it to its end.
    pub fn elapsed(&self) -> i64 {
        (self.ended.load(SeqCst) - self.began.load(SeqCst)).max(0)
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

/// The buffers that a call has brought something into. The first time that a block
/// is read into one of these, something of the call's has been evicted: then there
/// are no others any more.
pub struct Filled<'a> {
    shared: &'a [AtomicU32],
    local: RefCell<FxHashSet<i32>>,
    /// How many buffers are free, at most; [`usize::MAX`] before it was counted.
    free: Cell<usize>,
}

impl<'a> Filled<'a> {
    /// How many words it takes.
    pub fn words() -> usize {
        buffer::count().div_ceil(32)
    }

    pub fn new(words: &'a [AtomicU32]) -> Self {
        Self {
            shared: words,
            local: RefCell::default(),
            free: Cell::new(usize::MAX),
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
            false => free + buffer::count_evictable_before(most - free, is_filled),
        }
    }

    /// How many buffers are free. All are counted only where it may matter.
    fn count_free(&self, most: usize) -> usize {
        if !buffer::have_free_buffer() {
            return 0;
        }
        let mut free = self.free.get();
        if free == usize::MAX || free < 4 * most {
            free = buffer::count_free();
        }
        // As if this turn, and one of each other process, took them all.
        self.free.set(free.saturating_sub(2 * most));
        free
    }

    fn mark(&self, buffer: &Pinned) -> ControlFlow<Full> {
        match buffer.place() {
            Place::Shared(index) => {
                let bit = 1 << (index % 32);
                let before = self.shared[index / 32].fetch_or(bit, Relaxed);
                // What was in it may also have been dropped.
                if before & bit != 0 && !buffer::have_free_buffer() {
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
    pub fn of_caller(
        header: &'a Header,
        filled: &'a Filled<'a>,
        kind: Kind,
        total: u64,
        start: i64,
    ) -> Self {
        Self::new(header, filled, kind, total, start, true)
    }

    fn new(
        header: &'a Header,
        filled: &'a Filled<'a>,
        kind: Kind,
        total: u64,
        start: i64,
        is_caller: bool,
    ) -> Self {
        Self {
            header,
            filled,
            reader: Reader {
                mode: header.mode,
                gate: (header.processes > 1).then_some(&header.gate),
                memory: Memory::new(&header.provided),
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
            is_caller,
        }
    }

    /// Why nothing more is to be done, if so.
    pub fn full(&self) -> Option<Full> {
        full(self.header)
    }

    fn is_to_stop(&self, target: &Target) -> bool {
        match self.full() {
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
                && let Some(blocks) = target.claim(self.header.processes)
            {
                let (start, count) = (target.except.0 as usize, target.except.1 as usize);
                if !self.is_caller {
                    self.progress
                        .change(|progress| progress.total += blocks.len() as u64);
                }
                let work = Work::Range {
                    blocks,
                    except: &words[start..start + count],
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
            &|most| match self.filled.room(target.is_temporary, most) {
                0 => 0,
                room => (room / self.header.processes as usize).max(1),
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

/// Why nothing more was to be done, if so.
pub fn full(header: &Header) -> Option<Full> {
    match header.full.load(SeqCst) {
        0 => None,
        1 => Some(Full::Shared),
        _ => Some(Full::Local),
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
    let filled = Filled::new(&job.words[..Filled::words()]);
    let share = Share::new(job.header, &filled, Kind::PrewarmWorker, 0, now(), false);
    share.work(job.cells, job.words);
    Progress::end();
}
