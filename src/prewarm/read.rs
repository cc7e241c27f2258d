//! Reading blocks of one fork in turns, in each of the three modes.
//!
//! The relation's lock is released after each turn and requested again through the
//! ordinary queue, so that sessions waiting for it get it first. Meanwhile the relation
//! may have been changed or dropped, so each turn checks that the relation still has the
//! same file. If a turn has no room to read blocks into shared buffers, blocks that are
//! there already can still be done; the call ends at the first that is not.

use std::ffi::CStr;
use std::ops::ControlFlow::{self, Break, Continue};
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::Instant;

use super::Mode;
use super::gate::Gate;
use crate::blocks::{BlockNumber, Fork, Oid};
use crate::pace::{Pace, TURN};
use crate::pg::process::check_for_interrupts;
use crate::pg::process::report::notice_relation;
use crate::pg::process::transaction::Transaction;
use crate::pg::storage::buffer::{self, Pinned, Place};
use crate::pg::storage::prefault::{Prefaulted, Prefaulter};
use crate::pg::storage::relation::{Locator, Relation};

/// One fork of a relation, and the file that the relation had when it was opened first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    pub relation: Oid,
    pub locator: Locator,
    pub fork: Fork,
}

impl Part {
    pub fn of(relation: &Relation, fork: Fork) -> Self {
        Self {
            relation: relation.oid(),
            locator: relation.locator(),
            fork,
        }
    }
}

/// The blocks of a fork that are still to be read, in ascending order.
pub enum Work<'a> {
    /// A range without the blocks in `except`, which are sorted and do not change.
    Range {
        blocks: Range<BlockNumber>,
        except: &'a [AtomicU32],
    },
    List(&'a [BlockNumber]),
}

impl Work<'_> {
    pub fn range(blocks: Range<BlockNumber>) -> Self {
        Self::Range {
            blocks,
            except: &[],
        }
    }

    fn is_over(&self) -> bool {
        match self {
            Self::Range { blocks, .. } => blocks.is_empty(),
            Self::List(blocks) => blocks.is_empty(),
        }
    }

    /// The next blocks, at most `max`, that lie before the end of the fork.
    fn next(&self, max: usize, fork_end: BlockNumber) -> Vec<BlockNumber> {
        match self {
            Self::Range { blocks, except } => (blocks.start..blocks.end.min(fork_end))
                .filter(|&block| !contains(except, block))
                .take(max)
                .collect(),
            Self::List(blocks) => blocks
                .iter()
                .copied()
                .take_while(|&block| block < fork_end)
                .take(max)
                .collect(),
        }
    }

    /// Removes the blocks before `next`, which are done.
    fn advance_to(&mut self, next: BlockNumber) {
        match self {
            Self::Range { blocks, .. } => blocks.start = next,
            Self::List(blocks) => *blocks = &blocks[blocks.partition_point(|&b| b < next)..],
        }
    }
}

fn contains(sorted: &[AtomicU32], block: BlockNumber) -> bool {
    sorted
        .binary_search_by_key(&block, |word| word.load(Relaxed))
        .is_ok()
}

/// How reading ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// All blocks were read.
    Over,
    /// There is no room for the next block in shared or local buffers.
    Full,
    /// The callback for buffers asked to stop.
    Stopped,
    /// The relation was changed by another session.
    Changed(Change),
}

/// How a relation was changed while it was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    Dropped,
    Rewritten,
    Truncated,
}

impl Change {
    pub const ALL: [Self; 3] = [Self::Dropped, Self::Rewritten, Self::Truncated];

    /// Sends the client a NOTICE.
    pub fn notice(self, name: &CStr) {
        let format = match self {
            Self::Dropped => c"relation \"%s\" was dropped while it was being prewarmed",
            Self::Rewritten => c"relation \"%s\" was rewritten while it was being prewarmed",
            Self::Truncated => c"relation \"%s\" was truncated while it was being prewarmed",
        };
        notice_relation(format, name);
    }
}

/// How many blocks a turn has read.
#[derive(Clone, Copy, Debug, Default)]
pub struct Count {
    pub blocks: u64,
    /// How many of these were in shared buffers already.
    pub cached: u64,
}

/// The settings and state of one process that reads.
pub struct Reader<'a> {
    pub transaction: &'a Transaction,
    pub mode: Mode,
    /// The gate of the processes that share the work. `None` if there is only one.
    pub gate: Option<&'a Gate>,
    pub prefaulter: Prefaulter<'a>,
    pub pace: Pace,
}

impl<'a> Reader<'a> {
    /// A reader that shares its work with no other process.
    pub fn alone(transaction: &'a Transaction, mode: Mode, prefaulted: &'a Prefaulted) -> Self {
        Self {
            transaction,
            mode,
            gate: None,
            prefaulter: Prefaulter::new(prefaulted),
            pace: Pace::new(),
        }
    }

    /// Reads blocks of a part of a relation, which may be open already. Raises the
    /// server's ERROR if a block cannot be read.
    ///
    /// In buffer mode, `room` is called before each turn: it returns how many blocks the
    /// turn may read, at most its argument. Each buffer is passed to `each`, which can
    /// stop the reading. `count` is called after each turn.
    pub fn read(
        &self,
        part: &Part,
        mut opened: Option<Relation<'a>>,
        mut work: Work,
        room: &dyn Fn(usize) -> usize,
        each: &mut dyn FnMut(BlockNumber, &Pinned) -> ControlFlow<()>,
        count: &mut dyn FnMut(Count),
    ) -> End {
        while !work.is_over() {
            let max = match self.mode {
                Mode::Buffer => room(self.max_blocks()),
                Mode::Read | Mode::Prefetch => self.max_blocks(),
            };
            let _inside = self.gate.map(Gate::pass);
            let relation = opened
                .take()
                .or_else(|| Relation::try_open_with_table(self.transaction, part.relation));
            let Some(relation) = relation else {
                return End::Changed(Change::Dropped);
            };
            if relation.locator() != part.locator || !relation.has_fork(part.fork) {
                return End::Changed(Change::Rewritten);
            }
            let fork_end = relation.blocks(part.fork);
            let mut blocks = work.next(max.max(1), fork_end);
            if max == 0 && !blocks.is_empty() {
                // Blocks that are in a buffer already need no room.
                blocks = work.next(self.max_blocks(), fork_end);
                let is_cached = |block: &&BlockNumber| relation.is_cached(part.fork, **block);
                blocks.truncate(blocks.iter().take_while(is_cached).count());
                if blocks.is_empty() {
                    return End::Full;
                }
            }
            if blocks.is_empty() {
                return match &work {
                    Work::Range { blocks, .. } if blocks.end <= fork_end => End::Over,
                    _ => End::Changed(Change::Truncated),
                };
            }
            let (done, flow) = self.turn(&relation, part.fork, &blocks, each, count);
            work.advance_to(blocks[done - 1] + 1);
            if flow.is_break() {
                return End::Stopped;
            }
            if let Some(gate) = self.gate
                && relation.may_be_waited_for()
            {
                gate.request_pause();
            }
            drop(relation);
            check_for_interrupts();
        }
        End::Over
    }

    fn max_blocks(&self) -> usize {
        const AT_ONCE: usize = 8192;
        self.pace.max_blocks().min(AT_ONCE)
    }

    /// Reads some of the blocks, at least one, until the turn's time is up. Returns how
    /// many it has read, and whether to continue.
    fn turn(
        &self,
        relation: &Relation,
        fork: Fork,
        blocks: &[BlockNumber],
        each: &mut dyn FnMut(BlockNumber, &Pinned) -> ControlFlow<()>,
        count: &mut dyn FnMut(Count),
    ) -> (usize, ControlFlow<()>) {
        if let Mode::Buffer = self.mode {
            // The first look-up of the tablespace reads a catalog, whose buffer hits would
            // be counted as the relation's.
            relation.look_up_tablespace();
        }
        let start = Instant::now();
        let hits = buffer::hits();
        let mut done = 0;
        let mut flow = Continue(());
        let go_on = |flow: ControlFlow<()>| match start.elapsed() >= TURN
            || self.gate.is_some_and(Gate::pause_requested)
        {
            true => Break(()),
            false => flow,
        };
        // In the modes without buffers, the blocks are always consecutive.
        let (first, end) = (blocks[0], blocks[blocks.len() - 1] + 1);
        let count_run = |blocks| {
            done += blocks;
            go_on(Continue(()))
        };
        match self.mode {
            Mode::Prefetch => relation.prefetch(fork, first, end, count_run),
            Mode::Read => relation.read(fork, first, end, count_run),
            Mode::Buffer => {
                // No other process can read a temporary relation.
                let is_alone = self.gate.is_none() || relation.is_temporary();
                relation.read_into_buffers(fork, blocks, is_alone, |index, buffer| {
                    if let Place::Shared(index) = buffer.place()
                        && buffer::hits() == hits
                    {
                        self.prefaulter.prefault_after(index);
                    }
                    if flow.is_continue() {
                        flow = each(blocks[index], buffer);
                    }
                    done += 1;
                    go_on(flow)
                });
            }
        }
        let blocks = done as u64;
        count(Count {
            blocks,
            cached: (buffer::hits() - hits).min(blocks),
        });
        self.pace.adapt(start.elapsed(), done);
        (done, flow)
    }
}
