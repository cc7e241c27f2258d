//! `pg_prewarm_relation()`, `pg_prewarm_schema()` and `pg_prewarm_database()`.
//!
//! Each collects its relations, sorts them, reads the upper levels of indexes, and
//! then shares the rest with its parallel workers. Every role may call them: the
//! privileges checked are those on the relations.

use std::ffi::CString;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::Relaxed;

use pgrx::prelude::*;
use rustc_hash::FxHashSet;

use super::Mode;
use super::collect::{Collection, Wanted};
use super::filled::{Filled, FilledLocal, Full};
use super::job::{Header, Share, Target, WORKER_ENTRY};
use super::upper;
use crate::blocks::Fork;
use crate::error::Error;
use crate::pg::process::report::notice;
use crate::pg::process::transaction::Transaction;
use crate::pg::process::{memory, now};
use crate::pg::shared::parallel;
use crate::pg::storage::{catalog, relation};
use crate::progress::{Kind, Progress};

/// A row of the result: the relation, the fork, how many blocks were prewarmed, how many
/// of these were in shared buffers already, and how long it took.
type Row = (pg_sys::Oid, &'static str, i64, i64, Interval);

// pgrx needs each function's row type spelled out.

#[pg_extern(sql = false)]
#[allow(clippy::too_many_arguments)]
fn pg_prewarm_relation(
    relation: Option<pg_sys::Oid>,
    mode: Option<&[u8]>,
    indexes: Option<bool>,
    toast: Option<bool>,
    partitions: Option<bool>,
    forks: Option<Array<&[u8]>>,
    max_blocks: Option<i64>,
    workers: Option<i32>,
) -> TableIterator<'static, (pg_sys::Oid, &'static str, i64, i64, Interval)> {
    rows(|transaction| {
        let oid = relation.ok_or(Error::NullRelation)?;
        let mut request = Request::of(mode, indexes, toast, forks, max_blocks, workers)?;
        request.wanted.partitions = partitions.ok_or(Error::NullArgument("partitions"))?;
        request.mode.check_supported()?;
        let collection = Collection::of_relation(transaction, oid, &request.wanted);
        Ok(run(transaction, Kind::PrewarmRelation, collection, request))
    })
}

#[pg_extern(sql = false)]
fn pg_prewarm_schema(
    schema: Option<pg_sys::Oid>,
    mode: Option<&[u8]>,
    indexes: Option<bool>,
    toast: Option<bool>,
    forks: Option<Array<&[u8]>>,
    max_blocks: Option<i64>,
    workers: Option<i32>,
) -> TableIterator<'static, (pg_sys::Oid, &'static str, i64, i64, Interval)> {
    rows(|transaction| {
        let schema = schema.ok_or(Error::NullArgument("schema"))?;
        let request = Request::of(mode, indexes, toast, forks, max_blocks, workers)?;
        request.mode.check_supported()?;
        if !catalog::schema_exists(transaction, schema) {
            return Err(Error::MissingSchema(schema.to_u32()));
        }
        let collection = Collection::of_schema(transaction, Some(schema), true, &request.wanted);
        Ok(run(transaction, Kind::PrewarmSchema, collection, request))
    })
}

#[pg_extern(sql = false)]
fn pg_prewarm_database(
    mode: Option<&[u8]>,
    indexes: Option<bool>,
    toast: Option<bool>,
    forks: Option<Array<&[u8]>>,
    max_blocks: Option<i64>,
    workers: Option<i32>,
    catalogs: Option<bool>,
) -> TableIterator<'static, (pg_sys::Oid, &'static str, i64, i64, Interval)> {
    rows(|transaction| {
        let request = Request::of(mode, indexes, toast, forks, max_blocks, workers)?;
        let catalogs = catalogs.ok_or(Error::NullArgument("catalogs"))?;
        request.mode.check_supported()?;
        let collection = Collection::of_schema(transaction, None, catalogs, &request.wanted);
        Ok(run(transaction, Kind::PrewarmDatabase, collection, request))
    })
}

fn rows(
    prewarm: impl FnOnce(&Transaction) -> Result<Vec<Row>, Error>,
) -> TableIterator<'static, Row> {
    // SAFETY: the server calls SQL functions in a transaction.
    let transaction = unsafe { Transaction::current() };
    TableIterator::new(prewarm(transaction).unwrap_or_else(|error| error.raise()))
}

/// The arguments that all three functions have.
struct Request {
    mode: Mode,
    wanted: Wanted,
    max_blocks: Option<u64>,
    workers: u16,
}

impl Request {
    /// The maximum of the server's own settings for parallel workers.
    const MOST_WORKERS: i32 = 1024;

    /// Checks the arguments. Partitions are left out: in a schema or a database, they
    /// are found like other tables.
    fn of(
        mode: Option<&[u8]>,
        indexes: Option<bool>,
        toast: Option<bool>,
        forks: Option<Array<&[u8]>>,
        max_blocks: Option<i64>,
        workers: Option<i32>,
    ) -> Result<Self, Error> {
        let mode = Mode::from_argument(mode)?;
        let wanted = Wanted {
            forks: forks_of(forks)?,
            indexes: indexes.ok_or(Error::NullArgument("indexes"))?,
            toast: toast.ok_or(Error::NullArgument("toast"))?,
            partitions: false,
        };
        let max_blocks = max_blocks
            .map(|blocks| u64::try_from(blocks).map_err(|_| Error::NegativeMaxBlocks))
            .transpose()?;
        let workers = workers.ok_or(Error::NullArgument("workers"))?;
        let workers = u16::try_from(workers)
            .ok()
            .filter(|&workers| i32::from(workers) <= Self::MOST_WORKERS)
            .ok_or(Error::WorkersOutOfRange(Self::MOST_WORKERS))?;
        Ok(Self {
            mode,
            wanted,
            max_blocks,
            workers,
        })
    }
}

/// The forks with these names, without duplicates.
fn forks_of(names: Option<Array<&[u8]>>) -> Result<Vec<Fork>, Error> {
    let mut forks = Vec::new();
    for name in names.ok_or(Error::NullFork)?.iter() {
        let name = CString::new(name.ok_or(Error::NullFork)?).expect("text holds no NUL");
        forks.push(relation::fork_by_name(&name));
    }
    forks.sort_unstable();
    forks.dedup();
    Ok(forks)
}

/// Prewarms the collection, and returns a row for each part that was begun.
fn run(
    transaction: &Transaction,
    kind: Kind,
    mut collection: Collection,
    request: Request,
) -> Vec<Row> {
    collection.sort();
    report_skipped(&collection);
    let start = now();
    let parts = &collection.parts;
    let all: u64 = parts.iter().map(|part| u64::from(part.blocks)).sum();
    let total = request.max_blocks.unwrap_or(u64::MAX).min(all);
    let mut targets: Vec<Target> = parts
        .iter()
        .map(|part| Target::new(part.part, part.is_temporary, part.blocks))
        .collect();
    let to_buffers = match request.mode {
        Mode::Buffer => total,
        Mode::Read | Mode::Prefetch => 0,
    };
    let marks = Filled::words(to_buffers);
    let mut words: Vec<AtomicU32> = memory::room_for(marks);
    words.resize_with(marks, || AtomicU32::new(0));
    let local = FilledLocal::default();

    // The caller alone reads the upper levels of indexes.
    let mut left = total;
    let mut full = None;
    if let Mode::Buffer = request.mode {
        let header = Header::new(request.mode, to_buffers, 1, 0);
        let filled = header.filled(&words, &local);
        let share = Share::new(transaction, &header, &filled, kind, total, start);
        let mut done = Vec::new();
        for (part, target) in parts.iter().zip(&mut targets) {
            if header.full().is_some() {
                break;
            }
            let blocks = upper::read(&share, part, target, left);
            target.pause();
            left -= (blocks.len() as u64).min(left);
            #[expect(
                clippy::cast_possible_truncation,
                reason = "a call stops when it has filled shared buffers, which have fewer than 2^31 blocks"
            )]
            let except = ((words.len() + done.len()) as u32, blocks.len() as u32);
            target.except = except;
            done.extend(blocks);
        }
        full = header.full();
        memory::reserve(&mut words, done.len());
        words.extend(done.into_iter().map(AtomicU32::new));
    }
    // max_blocks is divided among the targets now, so that the result does not depend
    // on which process is faster.
    for target in &mut targets {
        left = target.cut(left, &words);
    }

    const LEAST_FOR_A_WORKER: u64 = 512;
    #[expect(
        clippy::cast_possible_truncation,
        reason = "it is at most request.workers, which has 16 bits"
    )]
    let workers = match full {
        Some(Full::Shared) => 0,
        _ => for_others(&targets)
            .div_ceil(LEAST_FOR_A_WORKER)
            .min(request.workers.into()) as u16,
    };
    let done_before = targets.iter().map(|target| target.done.load(Relaxed)).sum();
    let header = Header::new(
        request.mode,
        to_buffers,
        u32::from(workers) + 1,
        done_before,
    );
    if let Some(full) = full {
        header.set_full(full);
    }
    let rows = parallel::run(
        WORKER_ENTRY,
        workers,
        header,
        &targets,
        &words,
        |job, workers| {
            job.header.set_workers(workers);
            let filled = job.header.filled(job.words, &local);
            let share = Share::new(transaction, job.header, &filled, kind, total, start);
            share.work(job.cells, job.words);
        },
        |job| {
            report_end(&collection, job.header, job.cells, total);
            job.cells.iter().filter_map(row).collect()
        },
    );
    Progress::end();
    rows
}

/// How many blocks are left for parallel workers, which cannot read temporary relations.
fn for_others(targets: &[Target]) -> u64 {
    let shared = targets.iter().filter(|target| !target.is_temporary);
    shared.map(Target::left).sum()
}

/// The row of a target. `None` if it was not begun, unless it is empty.
fn row(target: &Target) -> Option<Row> {
    (target.has_begun() || target.is_empty).then(|| {
        (
            target.part.relation.into(),
            target.part.fork.name(),
            target.done.load(Relaxed) as i64,
            target.cached.load(Relaxed) as i64,
            Interval::from_micros(target.elapsed()),
        )
    })
}

/// Notifies the client of relations that were skipped.
fn report_skipped(collection: &Collection) {
    if collection.denied > 0 {
        notice(&format!(
            "skipped {} for which the SELECT privilege is missing",
            relations(collection.denied)
        ));
    }
    match collection.foreign {
        0 => {}
        1 => notice("skipped 1 foreign table"),
        count => notice(&format!("skipped {count} foreign tables")),
    }
}

fn relations(count: usize) -> String {
    match count {
        1 => "1 relation".to_owned(),
        count => format!("{count} relations"),
    }
}

/// Notifies the client of relations that changed, and of a lack of buffers.
fn report_end(collection: &Collection, header: &Header, targets: &[Target], total: u64) {
    let mut reported = FxHashSet::default();
    for (part, target) in collection.parts.iter().zip(targets) {
        if let Some(change) = target.change()
            && reported.insert(target.part.relation)
        {
            change.notice(&part.name);
        }
    }
    let done = header.done.load(Relaxed);
    match header.full() {
        None => {}
        Some(Full::Shared) => notice(&format!(
            "shared buffers are full: {done} of {total} blocks were prewarmed"
        )),
        Some(Full::Local) => notice(&format!(
            "temporary buffers are full: {done} of {total} blocks were prewarmed"
        )),
    }
}
