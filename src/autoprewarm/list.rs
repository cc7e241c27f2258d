//! `autoprewarm_blocks()`, which returns the block dump file as rows.
//!
//! It reads the file chunk by chunk as rows are requested, so that memory does not
//! grow with the list. The file stays open meanwhile, so a dump that replaces it
//! does no harm.

use std::io::Read;
use std::iter;
use std::rc::Rc;

use pgrx::prelude::*;

use super::DUMP_FILE;
use crate::blocks::ListReader;
use crate::error::Error;
use crate::pg::process::memory::{Infallible, fallible};
use crate::pg::process::report::{Message, report};
use crate::pg::storage::file::{self, At, Interruptible};

/// An `oid` of a row. pgrx's own type turns 0, the database of shared catalogs, into
/// NULL; an integer with the same bits is stored in the same way.
type OidBits = i32;

/// The blocks in the list, in its order, as a load would see them: without invalid
/// lines, and with usage count 1 if the trailer does not match.
///
/// It is parallel restricted, so that only one process reads the file for a query:
/// a dump might replace it before another process opens it. Rows reveal no data, so
/// members of `pg_monitor` may call it.
#[pg_extern(sql = false)]
#[allow(clippy::type_complexity)]
fn autoprewarm_blocks() -> TableIterator<
    'static,
    (
        name!(database, OidBits),
        name!(tablespace, OidBits),
        name!(filenumber, OidBits),
        name!(fork, Option<i16>),
        name!(block, i64),
        name!(usagecount, i16),
    ),
> {
    let mut reader = open().unwrap_or_else(|error| error.raise());
    if let Some(line) = reader.first_bad_line() {
        let message = super::corrupted_at(line);
        let detail = format!(
            "All valid lines of \"{DUMP_FILE}\" are returned, and the next block dump replaces \
             the file."
        );
        report(
            PgLogLevel::WARNING,
            Message::new(PgSqlErrorCode::ERRCODE_DATA_CORRUPTED, &message).detail(&detail),
        );
    }
    let records = iter::from_fn(move || fallible(|| reader.next()));
    TableIterator::new(records.map(|record| match record {
        Ok((record, usage_count)) => {
            #[expect(clippy::cast_possible_truncation, reason = "it is at most 5")]
            let usage_count = usage_count.get() as i16;
            (
                record.database.cast_signed(),
                record.tablespace.cast_signed(),
                record.filenumber.cast_signed(),
                // NULL if the number does not fit into the column; it is not a fork then.
                record.fork.try_into().ok(),
                record.block.into(),
                usage_count,
            )
        }
        Err(error) => Error::from(error).raise(),
    }))
}

/// Opens the list to be read record by record.
pub(super) fn open() -> Result<ListReader<impl Read>, Error> {
    let (file, _) = file::open(DUMP_FILE).map_err(|source| Error::File {
        action: "open",
        path: DUMP_FILE,
        source,
    })?;
    let file = Rc::new(file);
    let from = |offset| {
        let file = Rc::clone(&file);
        Infallible(Interruptible {
            reader: At { file, offset },
            should_stop: || false,
        })
    };
    Ok(fallible(|| ListReader::new(from))?)
}
