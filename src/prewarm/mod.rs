//! Prewarming on demand: `pg_prewarm()`, which reads blocks of one relation, and the
//! [`functions`] for a table with all that belongs to it, a schema, or a database.
//!
//! [`collect`] finds the relations and [`upper`] reads the upper levels of indexes;
//! [`job`] shares the work with parallel workers, which [`gate`] has release locks
//! together. All blocks are read in turns by [`read`]. [`marks`] are the buffers that a
//! call has read blocks into, by which [`filled`] tells how many more it can read before it
//! would evict its own.

mod collect;
mod filled;
mod functions;
mod gate;
pub mod job;
mod marks;
mod read;
mod upper;

use std::ffi::CString;
use std::ops::ControlFlow::Continue;

pub use functions::{
    pg_prewarm_database_wrapper, pg_prewarm_relation_wrapper, pg_prewarm_schema_wrapper,
};
use pgrx::prelude::*;
use read::{End, Part, Reader, Work};

use crate::blocks::{BlockNumber, Fork};
use crate::error::Error;
use crate::pg::process::now;
use crate::pg::process::transaction::Transaction;
use crate::pg::storage::prefault::Prefaulted;
use crate::pg::storage::reads_directly;
use crate::pg::storage::relation::{self, Relation};
use crate::progress::{Kind, Progress, ShownProgress};

/// The type of prewarming, contrib's argument `mode`.
#[derive(Clone, Copy, Debug)]
pub enum Mode {
    /// Asks the operating system to read the blocks, and does not wait.
    Prefetch,
    /// Reads the blocks, which leaves them in the operating system's cache.
    Read,
    /// Reads the blocks into shared buffers.
    Buffer,
}

impl Mode {
    fn from_argument(name: Option<&[u8]>) -> Result<Self, Error> {
        Self::from_name(name.ok_or(Error::NullMode)?)
    }

    fn from_name(name: &[u8]) -> Result<Self, Error> {
        match name {
            b"prefetch" => Ok(Self::Prefetch),
            b"read" => Ok(Self::Read),
            b"buffer" => Ok(Self::Buffer),
            _ => Err(Error::InvalidMode),
        }
    }

    /// Rejects prefetch with direct I/O: the server then bypasses the operating
    /// system's cache.
    fn check_supported(self) -> Result<(), Error> {
        match self {
            Self::Prefetch if reads_directly() => Err(Error::PrefetchWithDirectIo),
            _ => Ok(()),
        }
    }
}

/// Prewarms the blocks `first_block` to `last_block` of one fork of a relation,
/// and returns how many that were. NULL means the first or last block of the fork.
///
/// It requires SELECT on the relation, or for an index, on its table. Text arguments
/// are bytes, since not every database's encoding is UTF-8.
#[pg_extern(sql = r#"
CREATE FUNCTION pg_prewarm(regclass,
                           mode text DEFAULT 'buffer',
                           fork text DEFAULT 'main',
                           first_block int8 DEFAULT NULL,
                           last_block int8 DEFAULT NULL)
RETURNS int8
AS 'MODULE_PATHNAME', 'pg_prewarm'
LANGUAGE C PARALLEL SAFE;
"#)]
fn pg_prewarm(
    relation: Option<pg_sys::Oid>,
    mode: Option<&[u8]>,
    fork: Option<&[u8]>,
    first_block: Option<i64>,
    last_block: Option<i64>,
) -> i64 {
    prewarm(relation, mode, fork, first_block, last_block).unwrap_or_else(|error| error.raise())
}

fn prewarm(
    relation: Option<pg_sys::Oid>,
    mode: Option<&[u8]>,
    fork: Option<&[u8]>,
    first_block: Option<i64>,
    last_block: Option<i64>,
) -> Result<i64, Error> {
    // SAFETY: the server calls SQL functions in a transaction.
    let transaction = unsafe { Transaction::current() };
    let oid = relation.ok_or(Error::NullRelation)?;
    let mode = Mode::from_argument(mode)?;
    let fork_name = CString::new(fork.ok_or(Error::NullFork)?).expect("text holds no NUL");
    let fork = relation::fork_by_name(&fork_name);

    let relation = Relation::open_with_table(transaction, oid);
    relation.check_select_privilege();
    relation.check_storage();
    if !relation.has_fork(fork) {
        let name = fork_name.to_string_lossy().into_owned();
        return Err(Error::MissingFork(name));
    }
    let blocks = i64::from(relation.blocks(fork));
    let first = within(first_block, 0, blocks, Error::FirstBlockOutOfRange)?;
    let last = within(last_block, blocks - 1, blocks, Error::LastBlockOutOfRange)?;
    mode.check_supported()?;
    if first > last {
        return Ok(0);
    }
    // Most releases of the server check this themselves when they read into buffers.
    if !matches!(mode, Mode::Read) {
        relation.check_not_other_temp();
    }

    #[expect(
        clippy::cast_possible_truncation,
        reason = "both are block numbers of the fork"
    )]
    let (first, end) = (first as BlockNumber, last as BlockNumber + 1);
    Ok(run(transaction, relation, mode, fork, first, end))
}

/// The caller's bound, which has to lie within the fork, or the default if it is NULL.
fn within(
    bound: Option<i64>,
    default: i64,
    blocks: i64,
    out_of_range: fn(i64) -> Error,
) -> Result<i64, Error> {
    match bound {
        None => Ok(default),
        Some(block) if (0..blocks).contains(&block) => Ok(block),
        Some(_) => Err(out_of_range(blocks - 1)),
    }
}

/// Prewarms the blocks from `first` to before `end`, and returns how many were done:
/// fewer if the relation changes meanwhile.
fn run<'t>(
    transaction: &'t Transaction,
    relation: Relation<'t>,
    mode: Mode,
    fork: Fork,
    first: BlockNumber,
    end: BlockNumber,
) -> i64 {
    let part = Part::of(&relation, fork);
    let name = relation.name();
    let progress = ShownProgress::new(Progress {
        kind: Kind::Prewarm,
        relation: part.relation,
        fork,
        total: u64::from(end - first),
        done: 0,
        skipped: 0,
        start: now(),
    });
    // Show the row before the first turn ends.
    progress.change(|_| ());
    let how = Reader::alone(transaction, mode, &Prefaulted::new()).read(
        &part,
        Some(relation),
        Work::range(first..end),
        &|max| max,
        &mut |_, _| Continue(()),
        &mut |count| progress.change(|progress| progress.done += count.blocks),
    );
    Progress::end();
    if let End::Changed(change) = how {
        change.notice(&name);
    }
    progress.get().done as i64
}
