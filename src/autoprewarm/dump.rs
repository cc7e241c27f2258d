//! Writing the block dump file: the list of the blocks that are in shared buffers now,
//! and of those that it carries, since a load has left them.

use std::fs;
use std::io;
use std::time::Instant;

use pgrx::PgLogLevel;

use super::carry;
use super::state::State;
use super::{DUMP_FILE, DUMP_FILE_BEING_WRITTEN};
use crate::blocks::{Carried, ListWriter, WriteError};
use crate::error::Error;
use crate::pg::process::error::log_message;
use crate::pg::process::memory::{Infallible, fallible};
use crate::pg::process::report::{Message, SUCCESS};
use crate::pg::process::{activity, transaction};
use crate::pg::storage::{buffer, file};

/// Whether blocks of unlogged relations are listed. A crash empties these
/// relations, so only lists written at shutdown or on request include them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unlogged {
    Included,
    LeftOut,
}

/// Writes the list, with what the former one passes on, and returns how many records it
/// has. The former list is replaced in one step, when the new one is complete and
/// flushed. Serves interrupts: while it goes through the buffers, and while it reads and
/// writes. The caller holds a [`super::state::DumpFileInUse`].
pub fn write(unlogged: Unlogged, state: &State) -> Result<u64, Error> {
    let start = Instant::now();
    let mut carried = carry::from_list(state)?;
    carry::forget_dropped(&mut carried);
    write_carrying(carried, unlogged, state, start)
}

fn write_carrying(
    mut carried: Carried,
    unlogged: Unlogged,
    state: &State,
    start: Instant,
) -> Result<u64, Error> {
    let unfinished = RemoveOnDrop(DUMP_FILE_BEING_WRITTEN);
    #[expect(
        clippy::cast_possible_truncation,
        reason = "these records are in memory"
    )]
    let max_carried = carried.left() as usize;
    let mut expected = buffer::count_cached(unlogged == Unlogged::LeftOut) + max_carried;
    let written = loop {
        match write_once(unlogged, &mut carried, expected)? {
            Some(written) => break written,
            // So many blocks have been cached since that their number has one more
            // digit.
            None => expected = buffer::count() + max_carried,
        }
    };
    file::rename_durably(DUMP_FILE_BEING_WRITTEN, DUMP_FILE);
    std::mem::forget(unfinished);
    state.dump.record(written, start.elapsed());
    state.carry.settle(carried.left());
    state.list_was_replaced();
    Ok(written)
}

/// Writes the list as the leader, which only logs an error: the list on disk stays until
/// a new one is complete. `carried` is what the list carries; if `None`, what the former
/// list passes on. The caller holds a [`super::state::DumpFileInUse`].
pub fn write_as_leader(carried: Option<Carried>, unlogged: Unlogged, state: &State) {
    activity::report(b"dumping".to_vec());
    let start = Instant::now();
    match transaction::run(|_| match carried {
        Some(carried) => write_carrying(carried, unlogged, state, start),
        None => write(unlogged, state),
    }) {
        Ok(Ok(written)) => {
            let message = describe(written);
            log_message(PgLogLevel::DEBUG1, Message::new(SUCCESS, &message));
        }
        Ok(Err(error)) => {
            state.last_error.record(&error.to_string());
            error.warn(
                "The previous block dump file is kept. The next dump is attempted after \
                 \"pg_prewarm.autoprewarm_interval\".",
                None,
            );
        }
        Err(caught) => {
            state.warn(caught);
        }
    }
    activity::report_idle();
}

/// The DEBUG1 message for a list of `written` records.
pub fn describe(written: u64) -> String {
    format!("wrote block details for {written} blocks")
}

/// Writes a list of about `expected` records. `None` if their actual number does not
/// fit into the header. What is cached is removed from `carried`.
fn write_once(
    unlogged: Unlogged,
    carried: &mut Carried,
    expected: usize,
) -> Result<Option<u64>, Error> {
    let file = file::create(DUMP_FILE_BEING_WRITTEN).map_err(|error| failed("open", error))?;
    let result = fallible(|| {
        let mut writer = ListWriter::begin(Infallible(file), expected)?;
        for block in Infallible(buffer::cached_blocks()) {
            carried.found(&block.record);
            if block.permanent || unlogged == Unlogged::Included {
                writer.push(&block.record, block.usage_count)?;
            }
        }
        for (record, usage_count, age) in carried.records() {
            writer.push_carried(&record, usage_count, age)?;
        }
        writer.finish()
    });
    match result {
        Ok((written, Infallible(file))) => {
            file::close(file).map_err(|error| failed("close", error))?;
            Ok(Some(written))
        }
        Err(WriteError::TooMany) => Ok(None),
        Err(WriteError::Io(error)) => Err(failed("write to", error)),
        Err(WriteError::OutOfMemory(_)) => {
            Err(failed("write to", io::ErrorKind::OutOfMemory.into()))
        }
    }
}

fn failed(action: &'static str, source: io::Error) -> Error {
    Error::File {
        action,
        path: DUMP_FILE_BEING_WRITTEN,
        source,
    }
}

/// Removes the unfinished file if the dump ends with an error. (If the process
/// ends, the next dump replaces it.)
struct RemoveOnDrop(&'static str);

impl Drop for RemoveOnDrop {
    fn drop(&mut self) {
        // A file that could not be created cannot be removed either; the error that
        // ended the dump has told so.
        let _ = fs::remove_file(self.0);
    }
}
