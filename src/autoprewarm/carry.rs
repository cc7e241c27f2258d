//! What the next list carries: records of blocks that a load has left for a temporary
//! reason.
//!
//! When a load has ended, the leader writes a list at once if blocks were left: of what is
//! cached now, and of these. The dumps that follow read them from the list that is there,
//! and write them again unless their blocks are cached meanwhile. Between two dumps no
//! process holds them in memory.
//!
//! Until a load has ended and its list is written, the whole list on disk is what was
//! left: the load may be interrupted or cancelled, or that list may not be written. A dump
//! then carries all of it that is not cached.
//!
//! A record gets older once at each start of the server, by the first list that is written;
//! not if that is written because there is no background worker slot for the load.

use std::io;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicI64};

use super::list;
use super::state::{Phase, State};
use crate::blocks::{Age, Carried, CarriedBuilder, Fork, ReadError, Record, UsageCount};
use crate::error::Error;
use crate::pg::process::check_for_interrupts;
use crate::pg::process::error::is_shortage;
use crate::pg::process::memory::{fallible, infallible};
use crate::pg::storage::relation::Locator;
use crate::pg::storage::{buffer, file, segments};

/// How many records are carried for each shared buffer at most.
const CARRIED_PER_BUFFER: u64 = 4;

/// After how many records interrupts are served.
const INTERRUPT_INTERVAL: usize = 1 << 16;

/// In place of a number of records.
const UNKNOWN: i64 = -1;

/// What is known of the list on disk. Only the process that has reserved the dump file
/// changes it.
#[repr(C)]
pub struct CarryState {
    /// Whether the blocks of the whole list were left, not only those that it carries.
    whole: AtomicBool,
    /// Whether the records have got older since the server started.
    start_was_counted: AtomicBool,
    /// How many records the next dump carries, or [`UNKNOWN`].
    records: AtomicI64,
}

impl CarryState {
    pub const fn new() -> Self {
        Self {
            whole: AtomicBool::new(false),
            start_was_counted: AtomicBool::new(false),
            records: AtomicI64::new(UNKNOWN),
        }
    }

    /// Records that a load of the list begins.
    pub fn begin_load(&self) {
        self.records.store(UNKNOWN, SeqCst);
        self.whole.store(true, SeqCst);
    }

    /// Records that a load was cancelled and has left so many blocks. The list stays as
    /// it is.
    pub fn cancel_load(&self, records: u64) {
        self.records.store(records as i64, SeqCst);
    }

    /// Records that what is to be carried is in the list, and how many records that is:
    /// the list was written, or a load of it has left none.
    pub fn settle(&self, records: u64) {
        self.records.store(records as i64, SeqCst);
        self.start_was_counted.store(true, SeqCst);
        self.whole.store(false, SeqCst);
    }

    /// How many records the next dump carries, unless their blocks are cached by then.
    /// `None` if that is not known.
    pub fn records(&self) -> Option<u64> {
        u64::try_from(self.records.load(SeqCst)).ok()
    }

    fn builder(&self, phase: Phase) -> CarriedBuilder {
        let is_start = phase != Phase::NoSlot && !self.start_was_counted.load(SeqCst);
        CarriedBuilder::new(is_start)
    }
}

/// The records that a load has left, but for those that are not carried any longer. The
/// caller has reserved the dump file.
pub fn after_load(
    state: &State,
    left: impl Iterator<Item = (Record, UsageCount, Age)>,
) -> Result<Carried, Error> {
    let mut builder = state.carry.builder(state.phase());
    fallible(|| {
        for (index, (record, usage_count, age)) in left.enumerate() {
            if index % INTERRUPT_INTERVAL == 0 {
                tick();
            }
            builder.add(record, usage_count, age)?;
        }
        Ok(builder.finish_with_ticks(max_records(), &mut tick))
    })
    .map_err(|error: ReadError| error.into())
}

/// The records that the list on disk passes on to the next. The caller has reserved the
/// dump file.
pub fn from_list(state: &State) -> Result<Carried, Error> {
    let whole = state.carry.whole.load(SeqCst);
    let records = state.carry.records();
    if !whole && records == Some(0) {
        return Ok(Carried::none());
    }
    let mut builder = state.carry.builder(state.phase());
    let read = list::open().and_then(|list| Ok(fallible(|| builder.add_list(list, !whole))?));
    match read {
        Ok(()) => Ok(fallible(|| {
            builder.finish_with_ticks(max_records(), &mut tick)
        })),
        // A dump on request may replace a list that could not be loaded.
        Err(Error::File { source, .. })
            if source.kind() == io::ErrorKind::NotFound
                || (matches!(state.phase(), Phase::Failed | Phase::Suspended)
                    || !whole && records.is_none())
                    && !is_shortage(file::sqlstate(&source)) =>
        {
            Ok(Carried::none())
        }
        Err(error) => Err(error),
    }
}

/// Removes records of relations that are gone, by their files: relations of other
/// databases cannot be looked up.
pub fn forget_dropped(carried: &mut Carried) {
    carried.retain_files(|file| {
        check_for_interrupts();
        let locator = Locator {
            database: file.database,
            tablespace: file.tablespace,
            filenumber: file.filenumber,
        };
        Fork::from_number(file.fork).is_some_and(|fork| segments::has_blocks(locator, fork))
    });
}

/// Serves interrupts, in the midst of a fallible call.
fn tick() {
    infallible(check_for_interrupts);
}

fn max_records() -> u64 {
    CARRIED_PER_BUFFER * buffer::count() as u64
}
