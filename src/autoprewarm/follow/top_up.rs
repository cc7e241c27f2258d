//! The plan of a top-up: which blocks of the upstream's list are loaded, and what they may
//! replace.
//!
//! The hottest blocks come first, into empty buffers. If there are not enough of these, hot
//! blocks also replace clean blocks with usage count 0, which the server would evict next.
//! There are few of those where nothing needs buffers. So the leader remembers what it has
//! found in each buffer after the last top-up ([`Memory`]): a block that had usage count 1
//! then and still has it was not used since, unless the clock hand has passed it meanwhile,
//! which lowers what a use has raised. It is given usage count 0 if its buffer is needed,
//! unless it is hot upstream.
//!
//! What this server's own sessions and replay use stays: its usage count is higher, and the
//! clock hand does not lower it in the end (see [`crate::pg::storage::room`]). A dirty
//! block is never replaced.

use std::hash::{BuildHasher, BuildHasherDefault};
use std::time::Duration;

use rustc_hash::FxHasher;

use super::state::ListCounts;
use crate::autoprewarm::create_segment::create_segment;
use crate::autoprewarm::load::{Prepared, plan_list};
use crate::autoprewarm::load_segment::Purpose;
use crate::autoprewarm::state::State;
use crate::autoprewarm::supervise::Supervisor;
use crate::blocks::{Budget, UpstreamList, UsageCount};
use crate::error::Error;
use crate::pg::process::error::Caught;
use crate::pg::process::transaction::{self, Transaction};
use crate::pg::process::{self, memory};
use crate::pg::storage::buffer::{self, CachedBlock};
use crate::pg::storage::room::{self, Passed};
use crate::settings;

/// How long the end of a top-up waits for its worker, which may be reading.
const FINISH_TIMEOUT: Duration = Duration::from_secs(1);

/// A top-up that is under way.
pub struct TopUp {
    pub supervisor: Supervisor,
    /// How many blocks it can load without replacing any.
    empty: u64,
}

/// What was in a buffer after the last top-up. A block is told from others by a hash: in one
/// of 256 cases another block is taken for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Seen {
    hash: u8,
    /// Whether the buffer had a block at all.
    is_any: bool,
    /// Whether its usage count was 1 or less.
    is_unused: bool,
    is_hot: bool,
}

impl Seen {
    fn of(block: &CachedBlock, is_hot: bool) -> Self {
        Self {
            hash: hash_of(block),
            is_any: true,
            is_unused: block.usage_count <= UsageCount::ONCE,
            is_hot,
        }
    }

    fn is_same(self, block: &CachedBlock) -> bool {
        self.is_any && self.hash == hash_of(block)
    }
}

fn hash_of(block: &CachedBlock) -> u8 {
    let hash = BuildHasherDefault::<FxHasher>::default().hash_one(block.record);
    hash.to_be_bytes()[0]
}

/// What the leader remembers from one top-up to the next: four bytes for each buffer, and
/// how much is to be replaced.
#[derive(Debug, Default)]
pub struct Memory {
    /// Of each buffer; none before the first top-up has ended.
    seen: Vec<Seen>,
    /// Where the clock hand was then, or up to where usage counts were raised for its passes.
    hand: u64,
    /// How many of these were hot, and how many blocks that top-up has replaced.
    hot: u64,
    replaced: u64,
    /// How often the share that is replaced is halved.
    halvings: u32,
}

impl Memory {
    const MOST_HALVINGS: u32 = 6;

    /// Replaces half as much if more than half of what was replaced is lost again: others
    /// need these buffers. Otherwise twice as much, up to all.
    fn adapt(&mut self, lost: u64) {
        self.halvings = match self.replaced > 0 && lost > self.replaced / 2 {
            true => (self.halvings + 1).min(Self::MOST_HALVINGS),
            false => self.halvings.saturating_sub(1),
        };
    }

    fn seen(&self, block: &CachedBlock) -> Seen {
        self.seen.get(block.index).copied().unwrap_or_default()
    }

    /// Whether a block was not used since the last top-up, by all that is known.
    fn is_unused(&self, block: &CachedBlock, passed: &Passed) -> bool {
        let seen = self.seen(block);
        let is_now = block.usage_count == UsageCount::ONCE && !block.dirty;
        is_now && seen.is_unused && seen.is_same(block) && !passed.has(block.index)
    }
}

/// What is in shared buffers before a top-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Look {
    /// Hot blocks of the list.
    hot_cached: u64,
    /// Blocks that were hot after the last top-up and are still cached.
    still_cached: u64,
    /// Blocks that nothing has used since, and that are not hot upstream.
    unused: u64,
}

/// Begins to load what is missing of a list.
pub fn begin(
    list: UpstreamList,
    memory: &mut Memory,
    state: &'static State,
) -> Result<TopUp, TopUpError> {
    state.follow.top_up.begin();
    let prepared = transaction::run(|transaction| prepare(transaction, list, memory, state))??;
    let (prepared, empty) = prepared;
    let (supervisor, _) = create_segment(prepared, state)?;
    Ok(TopUp { supervisor, empty })
}

/// Why a top-up could not begin.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub enum TopUpError {
    Caught(#[from] Caught),
    Error(#[from] Error),
}

fn prepare(
    transaction: &Transaction,
    mut list: UpstreamList,
    memory: &mut Memory,
    state: &State,
) -> Result<(Prepared, u64), Error> {
    let passed = Passed::since(memory.hand);
    let look = look(&mut list, memory, &passed);
    memory.adapt(memory.hot.saturating_sub(look.still_cached));
    // A block that moves to another buffer meanwhile is seen twice.
    let hot_cached = look.hot_cached.min(list.hot_blocks());
    let hot_missing = list.hot_blocks() - hot_cached;
    let mut buffers = room::survey(1);
    let replaceable = match settings::autoprewarm_follow_replace() {
        true => (buffers.clean[0] + look.unused) >> memory.halvings,
        false => 0,
    };
    let lacking = hot_missing.saturating_sub(buffers.empty).min(replaceable);
    if lacking > buffers.clean[0] {
        expose(lacking - buffers.clean[0], &mut list, memory, &passed);
        buffers = room::survey(1);
    }
    let lacking = lacking.min(buffers.clean[0]);
    // Blocks that are not hot fill empty buffers only.
    let budget = Budget {
        blocks: buffers.empty + lacking,
        replaced_below: usize::from(lacking > 0),
    };
    state.follow.set_list(ListCounts {
        // The upstream server's clock may be ahead.
        time: list.origin.time.min(process::now()),
        blocks: list.blocks(),
        hot: list.hot_blocks(),
        hot_cached,
    });
    let planned = plan_list(transaction, list.into(), Purpose::TopUp, state, |_| budget)?;
    Ok((planned, buffers.empty))
}

/// Counts what is cached. Hot blocks that the clock hand would take next get usage count 1.
/// Serves interrupts.
fn look(list: &mut UpstreamList, memory: &Memory, passed: &Passed) -> Look {
    let mut look = Look::default();
    for block in buffer::cached_blocks() {
        let is_hot = list.is_hot(&block.record);
        if is_hot {
            look.hot_cached += 1;
            buffer::raise_usage_count(block.index, UsageCount::ONCE);
        } else if memory.is_unused(&block, passed) {
            look.unused += 1;
        }
        let seen = memory.seen(&block);
        look.still_cached += u64::from(seen.is_hot && seen.is_same(&block));
    }
    look
}

/// Has up to `most` unused blocks be replaced next. Serves interrupts.
fn expose(most: u64, list: &mut UpstreamList, memory: &Memory, passed: &Passed) {
    let mut exposed = 0;
    for block in buffer::cached_blocks() {
        if exposed == most {
            break;
        }
        let is_unused = memory.is_unused(&block, passed) && !list.is_hot(&block.record);
        exposed += u64::from(is_unused && buffer::expose(block.index));
    }
}

impl TopUp {
    /// Ends it: records what was loaded.
    pub fn end(self, memory: &mut Memory, state: &State) {
        self.supervisor.interrupt();
        // What they still read is then cached for whoever looks next.
        self.supervisor.finish_workers(FINISH_TIMEOUT);
        let raised_until = self.supervisor.room().raised_until();
        state.follow.set_raised_until(raised_until);
        let loaded = state.follow.top_up.counts().loaded;
        memory.replaced = loaded.saturating_sub(self.empty);
        state.follow.count_loaded(loaded, memory.replaced);
    }
}

/// Remembers what is in shared buffers after a top-up for that list. Raises an ERROR if there
/// is no memory for that.
pub fn remember(mut list: UpstreamList, memory: &mut Memory, state: &State) {
    let buffers = buffer::count();
    let mut seen = std::mem::take(&mut memory.seen);
    seen.clear();
    memory::reserve(&mut seen, buffers);
    seen.resize(buffers, Seen::default());
    memory.hot = 0;
    // Passes before that were made up for.
    memory.hand = room::clock_hand_position().max(state.follow.raised_until());
    for block in buffer::cached_blocks() {
        let is_hot = list.is_hot(&block.record);
        memory.hot += u64::from(is_hot);
        seen[block.index] = Seen::of(&block, is_hot);
    }
    memory.seen = seen;
    state.follow.set_list(ListCounts {
        hot_cached: memory.hot.min(list.hot_blocks()),
        ..state.follow.list()
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blocks::Record;

    #[test]
    fn less_is_replaced_while_it_is_lost_again() {
        let mut memory = Memory {
            replaced: 50,
            ..Memory::default()
        };
        memory.adapt(25);
        assert_eq!(memory.halvings, 0);
        for halvings in [1, 2, 3, 4, 5, 6, 6] {
            memory.adapt(26);
            assert_eq!(memory.halvings, halvings);
        }
        memory.adapt(0);
        assert_eq!(memory.halvings, 5);
        // What is lost without having replaced anything is the server's own choice.
        memory.replaced = 0;
        memory.adapt(1000);
        assert_eq!(memory.halvings, 4);
    }

    #[test]
    fn a_block_is_unused_if_it_is_where_it_was_and_has_usage_count_1_again() {
        let block = |block, usage_count| CachedBlock {
            index: 1,
            record: Record {
                database: 5,
                tablespace: 1663,
                filenumber: 1,
                fork: 0,
                block,
            },
            permanent: true,
            dirty: false,
            usage_count: UsageCount::new(usage_count),
        };
        let after = |seen: CachedBlock| Memory {
            seen: vec![Seen::default(), Seen::of(&seen, false)],
            ..Memory::default()
        };
        let none = Passed::none();
        assert!(!Memory::default().is_unused(&block(7, 1), &none));
        assert!(after(block(7, 1)).is_unused(&block(7, 1), &none));
        assert!(!after(block(7, 1)).is_unused(&block(7, 2), &none));
        assert!(!after(block(7, 2)).is_unused(&block(7, 1), &none));
        assert!(!after(block(7, 1)).is_unused(&block(8, 1), &none));
        let dirty = CachedBlock {
            dirty: true,
            ..block(7, 1)
        };
        assert!(!after(block(7, 1)).is_unused(&dirty, &none));
    }
}
