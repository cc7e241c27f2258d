//! The mark of a load on disk, by which loads that crash the server are noticed.
//!
//! A mark's file exists from the beginning of a load to its end, however it ends,
//! unless the server crashes. It holds the number of loads in a row that have begun and
//! not ended. So at the beginning of a load, that is how many crashes came before it; what
//! crashed the server cannot be told. After [`CRASHES`] of them the next load is not
//! begun: if it is the load that takes the server down (because of a memory limit, or of
//! huge pages that are missing), the server would crash for ever.
//!
//! The file says nothing that a load needs. One that cannot be read counts as none, and
//! one that cannot be written keeps no load from beginning.

use std::fs;
use std::io::{self, Read, Write};

use pgrx::{PgLogLevel, PgSqlErrorCode};

use super::state::State;
use crate::error::Error;
use crate::pg::process::error::log_message;
use crate::pg::process::report::{Message, SUCCESS};
use crate::pg::process::transaction;
use crate::pg::storage::file;

/// A mark's file, and the one in which it is written. They are in a directory that base
/// backups and `pg_rewind` leave out, and that the server does not empty: a standby that was
/// made during a load has not crashed.
pub struct Files {
    mark: &'static str,
    being_written: &'static str,
    /// What was marked.
    what: &'static str,
}

/// Of loads of the list.
pub static LOADS: Files = Files {
    mark: "pg_stat_tmp/autoprewarm.loading",
    being_written: "pg_stat_tmp/autoprewarm.loading.tmp",
    what: "loads",
};

/// Of top-ups of a standby. The server's first load, which comes before them, may end well
/// each time.
pub static TOP_UPS: Files = Files {
    mark: "pg_stat_tmp/autoprewarm.following",
    being_written: "pg_stat_tmp/autoprewarm.following.tmp",
    what: "loads for the upstream server's list",
};

/// After how many crashes in a row the next load is not begun. Two more loads are tried,
/// since the first crashes may have had another cause.
const CRASHES: u32 = 3;

/// Of loads after a promotion. They come after the server's first load, too.
pub static PROMOTIONS: Files = Files {
    mark: "pg_stat_tmp/autoprewarm.promoting",
    being_written: "pg_stat_tmp/autoprewarm.promoting.tmp",
    what: "loads after the promotion",
};

/// The mark of the load that has begun.
pub struct Mark {
    files: &'static Files,
    state: &'static State,
    is_written: bool,
}

/// The server has crashed during that many loads in a row.
pub struct Crashes(pub u32);

impl Crashes {
    /// Says so.
    pub fn describe(&self, files: &Files) -> String {
        format!(
            "the server crashed during the last {} {}",
            self.0, files.what
        )
    }
}

/// The crashes for which the next load must not begin, if there are so many.
pub fn check(files: &'static Files) -> Result<(), Crashes> {
    match read(files) {
        crashes @ CRASHES.. => Err(Crashes(crashes)),
        _ => Ok(()),
    }
}

/// Marks that a load begins. `Err` if it must not begin, because the server has crashed
/// during the last ones. A load that was requested begins all the same, and former crashes
/// are forgotten.
pub fn begin(
    files: &'static Files,
    state: &'static State,
    was_requested: bool,
) -> Result<Mark, Crashes> {
    let crashes = if was_requested { 0 } else { read(files) };
    if crashes >= CRASHES {
        return Err(Crashes(crashes));
    }
    Ok(Mark {
        files,
        state,
        is_written: write(files, state, crashes + 1),
    })
}

impl Mark {
    /// Records that the load has ended.
    pub fn end(self) {
        if self.is_written {
            remove(self.files, self.state);
        }
    }
}

/// Forgets crashes, as a background worker.
pub fn remove(files: &'static Files, state: &State) {
    if let Err(caught) = transaction::run(|_| forget(files)) {
        state.warn(caught);
    }
}

/// Forgets crashes. Raises an ERROR if the mark cannot be removed.
pub fn forget(files: &'static Files) {
    file::remove_durably(files.mark);
}

/// How many loads in a row have begun and not ended.
fn read(files: &'static Files) -> u32 {
    let read = || {
        let (mut file, _) = file::open(files.mark)?;
        // More than any number that a mark has.
        let mut bytes = [0; 16];
        let length = file.read(&mut bytes)?;
        let number = str::from_utf8(&bytes[..length]).ok();
        let number = number.and_then(|text| text.trim_end().parse().ok());
        number.ok_or_else(|| io::Error::other("invalid contents"))
    };
    match read() {
        Ok(number) => number,
        Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
        Err(error) => {
            let message = format!(
                "ignoring file \"{}\": {}",
                files.mark,
                file::describe(&error)
            );
            let detail = "Crashes of the server during former loads are not counted.";
            log_message(
                PgLogLevel::LOG,
                Message::new(SUCCESS, &message).detail(detail),
            );
            // `durable_rename` opens the old file first, and would fail.
            let _ = fs::remove_file(files.mark);
            0
        }
    }
}

/// Writes the mark durably. False if that failed, which is logged.
fn write(files: &'static Files, state: &State, loads: u32) -> bool {
    const UNCOUNTED: &str = "The load proceeds, but a crash of the server during it will not be \
                             counted.";
    let write = || -> Result<(), Error> {
        let fail = |action| {
            move |source| Error::File {
                action,
                path: files.being_written,
                source,
            }
        };
        let mut file = file::create(files.being_written).map_err(fail("open"))?;
        let text = format!("{loads}\n");
        file.write_all(text.as_bytes()).map_err(fail("write to"))?;
        file::close(file).map_err(fail("close"))?;
        file::rename_durably(files.being_written, files.mark);
        Ok(())
    };
    match transaction::run(|_| write()) {
        Ok(Ok(())) => return true,
        Ok(Err(error)) => {
            state.last_error.record(&error.to_string());
            error.warn(UNCOUNTED, None);
        }
        Err(caught) => {
            state.warn(caught);
        }
    }
    // Where it could not be created, there is nothing to remove.
    let _ = fs::remove_file(files.being_written);
    false
}

/// Says that a load is not begun, and how to go on.
pub fn report(state: &State, crashes: &Crashes) {
    let message = format!("skipping prewarm because {}", crashes.describe(&LOADS));
    state.last_error.record(&message);
    log_message(
        PgLogLevel::WARNING,
        Message::new(
            PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            &message,
        )
        .detail(
            "The block dump file is kept, and is replaced neither periodically nor at shutdown.",
        )
        .hint(
            "Use autoprewarm_load_now() to load the blocks, or autoprewarm_dump_now() to replace \
             the block dump file.",
        ),
    );
}
