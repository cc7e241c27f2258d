//! Writing the block dump file: the list of the blocks that are in shared buffers
//! now.

use std::fs;
use std::io;
use std::time::Instant;

use super::state::State;
use super::{DUMP_FILE, DUMP_FILE_BEING_WRITTEN};
use crate::blocks::{ListWriter, WriteError};
use crate::error::Error;
use crate::pg::process::memory::{Infallible, fallible};
use crate::pg::storage::buffer::{self, CachedBlock};
use crate::pg::storage::file;

/// Whether blocks of unlogged relations are listed. A crash empties these
/// relations, so only lists written at shutdown or on request include them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unlogged {
    Included,
    LeftOut,
}

/// Writes the list, and returns how many records it has. The former list is
/// replaced in one step, when the new one is complete and flushed. Serves interrupts:
/// while it goes through the buffers, and while it writes. The caller holds a [`super::state::DumpFileInUse`].
pub fn write(unlogged: Unlogged, state: &State) -> Result<u64, Error> {
    let start = Instant::now();
    let unfinished = RemoveOnDrop(DUMP_FILE_BEING_WRITTEN);
    let mut expected = buffer::count_cached(unlogged == Unlogged::LeftOut);
    let written = loop {
        match write_once(unlogged, expected)? {
            Some(written) => break written,
            // So many blocks have been cached since that their number has one more
            // digit.
            None => expected = buffer::count(),
        }
    };
    file::rename_durably(DUMP_FILE_BEING_WRITTEN, DUMP_FILE);
    std::mem::forget(unfinished);
    state.dump.record(written, start.elapsed());
    state.list_was_replaced();
    Ok(written)
}

/// The DEBUG1 message for a list of `written` records.
pub fn describe(written: u64) -> String {
    format!("wrote block details for {written} blocks")
}

/// Writes a list of about `expected` records. `None` if their actual number does not
/// fit into the header.
fn write_once(unlogged: Unlogged, expected: usize) -> Result<Option<u64>, Error> {
    let file = file::create(DUMP_FILE_BEING_WRITTEN).map_err(|error| failed("open", error))?;
    let result = fallible(|| {
        let mut writer = ListWriter::begin(Infallible(file), expected)?;
        for block in Infallible(blocks(unlogged)) {
            writer.push(&block.record, block.usage_count)?;
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

fn blocks(unlogged: Unlogged) -> impl Iterator<Item = CachedBlock> {
    buffer::cached_blocks().filter(move |block| block.permanent || unlogged == Unlogged::Included)
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
