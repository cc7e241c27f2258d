//! The list of the upstream server on disk, in the standby's data directory. It is kept
//! apart from the standby's own list.

use std::fs;
use std::io::{self, Read, Write};

use crate::blocks::{UpstreamError, UpstreamList};
use crate::error::Error;
use crate::pg::process::check_for_interrupts;
use crate::pg::process::memory::fallible;
use crate::pg::storage::file;

/// The file, in the data directory.
pub const FILE: &str = "autoprewarm.upstream";
const FILE_BEING_WRITTEN: &str = "autoprewarm.upstream.tmp";

/// How much is read or written at once.
const PIECE: usize = 256 * 1024;

/// A list that was read, and its bytes.
pub struct Stored {
    pub bytes: Vec<u8>,
    pub list: UpstreamList,
}

/// Whether there is a list.
pub fn exists() -> bool {
    fs::symlink_metadata(FILE).is_ok()
}

/// Reads the list. `None` if there is none.
pub fn read() -> Result<Option<Stored>, Error> {
    let fail = |action| {
        move |source| Error::File {
            action,
            path: FILE,
            source,
        }
    };
    let (mut reader, size) = match file::open(FILE) {
        Ok(opened) => opened,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(fail("open")(error)),
    };
    let out_of_memory = || fail("read")(io::ErrorKind::OutOfMemory.into());
    let mut bytes: Vec<u8> = Vec::new();
    let mut read_until = |end: usize, bytes: &mut Vec<u8>| -> Result<(), Error> {
        let begin = bytes.len();
        fallible(|| bytes.try_reserve_exact(end - begin)).map_err(|_| out_of_memory())?;
        bytes.resize(end, 0);
        for piece in bytes[begin..].chunks_mut(PIECE) {
            check_for_interrupts();
            reader.read_exact(piece).map_err(fail("read"))?;
        }
        Ok(())
    };
    let size = usize::try_from(size).map_err(|_| out_of_memory())?;
    // No memory is taken for more than the header says, whatever the file's size is.
    read_until(size.min(PIECE), &mut bytes)?;
    match UpstreamList::announced(&bytes).map_err(damaged)? {
        Some(list) if list.length == size as u64 => read_until(size, &mut bytes)?,
        _ => return Err(damaged(UpstreamError::Incomplete)),
    }
    match fallible(|| UpstreamList::read(&bytes)) {
        Ok(list) => Ok(Some(Stored { bytes, list })),
        Err(UpstreamError::OutOfMemory(_)) => Err(out_of_memory()),
        Err(error) => Err(damaged(error)),
    }
}

fn damaged(error: UpstreamError) -> Error {
    Error::DamagedList {
        path: FILE,
        reason: error.to_string(),
    }
}

/// Replaces the list durably, if it is still wanted when it is written. If it is not wanted any
/// more after that, there is none. Raises an ERROR if the new file cannot be renamed.
pub fn write(bytes: &[u8], is_wanted: impl Fn() -> bool) -> Result<(), Error> {
    let fail = |action| {
        move |source| {
            // What is there of it is of no use. If it could not be created, it cannot be
            // removed either.
            let _ = fs::remove_file(FILE_BEING_WRITTEN);
            Error::File {
                action,
                path: FILE_BEING_WRITTEN,
                source,
            }
        }
    };
    let mut file = file::create(FILE_BEING_WRITTEN).map_err(fail("open"))?;
    for piece in bytes.chunks(PIECE) {
        file.write_all(piece).map_err(fail("write to"))?;
    }
    file::close(file).map_err(fail("close"))?;
    if is_wanted() {
        file::rename_durably(FILE_BEING_WRITTEN, FILE);
        // Meanwhile the leader may have removed the last one, after a promotion.
        if !is_wanted() {
            file::remove_durably(FILE);
        }
    } else {
        let _ = fs::remove_file(FILE_BEING_WRITTEN);
    }
    Ok(())
}

/// Removes the list, and one that was not completed. A directory of that name is left to those
/// who have made it. Raises an ERROR if the list cannot be removed.
pub fn remove() {
    if fs::symlink_metadata(FILE).is_ok_and(|metadata| metadata.is_dir()) {
        return;
    }
    // Most likely there is none.
    let _ = fs::remove_file(FILE_BEING_WRITTEN);
    file::remove_durably(FILE);
}
