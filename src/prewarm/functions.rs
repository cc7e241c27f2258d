//! `pg_prewarm_relation()`, `pg_prewarm_schema()` and `pg_prewarm_database()`.
//!
//! Each collects what it is about, orders it, reads the upper levels of indexes,
//! and then shares the rest with its parallel workers. Whoever may call
//! `pg_prewarm()` may call these: rights are those to the relations.

use std::ffi::CString;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::SeqCst;

use pgrx::prelude::*;

use super::Mode;
use super::collect::{Collection, Wanted};
use super::job::{Filled, Full, Header, Share, Target, WORKER_ENTRY, full};
use super::upper;
use crate::blocks::Fork;
use crate::error::Error;
use crate::pg::activity::{Kind, Progress};
use crate::pg::error::notice;
use crate::pg::process::now;
use crate::pg::{memory, parallel, relation};

/// One fork of a relation that was done: the relation, the fork, its blocks, those
/// that were in shared buffers already, and how long it took.
type Row = (pg_sys::Oid, &'static str, i64, i64, Interval);

#[pg_extern(sql = false)]
#[allow(clippy::too_many_arguments, clippy::type_complexity)]
fn pg_prewarm_relation(
    relation: Option<pg_sys::Oid>,
    mode: Option<&[u8]>,
    indexes: Option<bool>,
    toast: Option<bool>,
    partitions: Option<bool>,
    forks: Option<Array<&[u8]>>,
    max_blocks: Option<i64>,
    workers: Option<i32>,
) -> TableIterator<
    'static,
    (
        name!(relation, pg_sys::Oid),
        name!(fork, &'static str),
        name!(blocks, i64),
        name!(already_cached, i64),
        name!(elapsed, Interval),
    ),
> {
    let prewarm = || {
        let oid = relation.ok_or(Error::NullRelation)?;
        let mode = Mode::from_argument(mode)?;
        let mut wanted = wanted(indexes, toast, forks)?;
        wanted.partitions = partitions.ok_or(Error::NullArgument("partitions"))?;
        let limits = Limits::of(max_blocks, workers)?;
        mode.check_supported()?;
        let collection = Collection::of_relation(oid, &wanted);
        Ok(run(Kind::PrewarmRelation, mode, collection, limits))
    };
    TableIterator::new(prewarm().unwrap_or_else(|error: Error| error.raise()))
}

#[pg_extern(sql = false)]
#[allow(clippy::type_complexity)]
fn pg_prewarm_schema(
    schema: Option<pg_sys::Oid>,
    mode: Option<&[u8]>,
    indexes: Option<bool>,
    toast: Option<bool>,
    forks: Option<Array<&[u8]>>,
    max_blocks: Option<i64>,
    workers: Option<i32>,
) -> TableIterator<
    'static,
    (
        name!(relation, pg_sys::Oid),
        name!(fork, &'static str),
        name!(blocks, i64),
        name!(already_cached, i64),
        name!(elapsed, Interval),
    ),
> {
    let prewarm = || {
        let schema = schema.ok_or(Error::NullArgument("schema"))?;
        let mode = Mode::from_argument(mode)?;
        let wanted = wanted(indexes, toast, forks)?;
        let limits = Limits::of(max_blocks, workers)?;
        mode.check_supported()?;
        if !relation::schema_exists(schema) {
            return Err(Error::MissingSchema(schema.to_u32()));
        }
        let collection = Collection::of_schema(Some(schema), true, &wanted);
        Ok(run(Kind::PrewarmSchema, mode, collection, limits))
    };
    TableIterator::new(prewarm().unwrap_or_else(|error: Error| error.raise()))
}

#[pg_extern(sql = false)]
#[allow(clippy::type_complexity)]
fn pg_prewarm_database(
    mode: Option<&[u8]>,
    indexes: Option<bool>,
    toast: Option<bool>,
    forks: Option<Array<&[u8]>>,
    max_blocks: Option<i64>,
    workers: Option<i32>,
    catalogs: Option<bool>,
) -> TableIterator<
    'static,
    (
        name!(relation, pg_sys::Oid),
        name!(fork, &'static str),
        name!(blocks, i64),
        name!(already_cached, i64),
        name!(elapsed, Interval),
    ),
> {
    let prewarm = || {
        let mode = Mode::from_argument(mode)?;
        let wanted = wanted(indexes, toast, forks)?;
        let limits = Limits::of(max_blocks, workers)?;
        let catalogs = catalogs.ok_or(Error::NullArgument("catalogs"))?;
        mode.check_supported()?;
        let collection = Collection::of_schema(None, catalogs, &wanted);
        Ok(run(Kind::PrewarmDatabase, mode, collection, limits))
    };
    TableIterator::new(prewarm().unwrap_or_else(|error: Error| error.raise()))
}

/// What these arguments ask for, without partitions: in a schema or a database these
/// are found by themselves.
fn wanted(
    indexes: Option<bool>,
    toast: Option<bool>,
    forks: Option<Array<&[u8]>>,
) -> Result<Wanted, Error> {
    Ok(Wanted {
        forks: forks_of(forks)?,
        indexes: indexes.ok_or(Error::NullArgument("indexes"))?,
        toast: toast.ok_or(Error::NullArgument("toast"))?,
        partitions: false,
    })
}

/// The forks of these names, each once.
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

/// How much is to be done, and by how many.
struct Limits {
    max_blocks: Option<u64>,
    workers: u16,
}

impl Limits {
    /// As many as the server's own settings for parallel workers allow.
    const MOST_WORKERS: i32 = 1024;

    fn of(max_blocks: Option<i64>, workers: Option<i32>) -> Result<Self, Error> {
        let max_blocks = max_blocks
            .map(|blocks| u64::try_from(blocks).map_err(|_| Error::NegativeMaxBlocks))
            .transpose()?;
        let workers = workers.ok_or(Error::NullArgument("workers"))?;
        if !(0..=Self::MOST_WORKERS).contains(&workers) {
            return Err(Error::WorkersOutOfRange(Self::MOST_WORKERS));
        }
        Ok(Self {
            max_blocks,
            workers: workers as u16,
        })
    }
}

/// Does all of it, and returns a row for each part that was done.
fn run(kind: Kind, mode: Mode, mut collection: Collection, limits: Limits) -> Vec<Row> {
    collection.sort();
    tell_what_is_left_out(&collection);
    let start = now();
    let parts = &collection.parts;
    let all: u64 = parts.iter().map(|part| u64::from(part.blocks)).sum();
    let total = limits.max_blocks.unwrap_or(u64::MAX).min(all);
    let mut targets: Vec<Target> = parts
        .iter()
        .map(|part| Target::new(part.part, part.is_temporary, part.blocks))
        .collect();
    let mut words: Vec<AtomicU32> = memory::room_for(Filled::words());
    words.resize_with(Filled::words(), || AtomicU32::new(0));

    // First the upper levels of indexes, alone.
    let mut left = total;
    let mut full_before = None;
    if let Mode::Buffer = mode {
        let header = Header::new(mode, 1, 0);
        let filled = Filled::new(&words);
        let share = Share::of_caller(&header, &filled, kind, total, start);
        let mut done = Vec::new();
        for (part, target) in parts.iter().zip(&mut targets) {
            if share.full().is_some() {
                break;
            }
            let blocks = upper::read(&share, part, target, left);
            left -= (blocks.len() as u64).min(left);
            target.except = ((words.len() + done.len()) as u32, blocks.len() as u32);
            done.extend(blocks);
        }
        full_before = share.full();
        words.extend(done.into_iter().map(AtomicU32::new));
    }
    // Then the rest, as far as the limit goes.
    for target in &mut targets {
        let (start, count) = (target.except.0 as usize, target.except.1 as usize);
        left = target.cut(left, &words[start..start + count]);
    }

    let workers = match left_to_do(&targets) {
        0 => 0,
        blocks => limits.workers.min(blocks.div_ceil(512).min(1024) as u16),
    };
    let done_before = targets.iter().map(|target| target.done.load(SeqCst)).sum();
    let header = Header::new(mode, u32::from(workers) + 1, done_before);
    if let Some(full) = full_before {
        header.set_full(full);
    }
    let rows = parallel::run(
        WORKER_ENTRY,
        workers,
        header,
        &targets,
        &words,
        |job| {
            let filled = Filled::new(&job.words[..Filled::words()]);
            let share = Share::of_caller(job.header, &filled, kind, total, start);
            share.work(job.cells, job.words);
        },
        |job| {
            tell_how_it_ended(&collection, job.header, job.cells, total);
            job.cells.iter().filter_map(row).collect()
        },
    );
    Progress::end();
    rows
}

fn left_to_do(targets: &[Target]) -> u64 {
    targets
        .iter()
        .filter(|target| !target.is_temporary)
        .map(|target| u64::from(target.end))
        .sum()
}

/// The row of a part that was begun, or that is empty.
fn row(target: &Target) -> Option<Row> {
    (target.has_begun() || target.is_empty).then(|| {
        (
            target.part.relation.into(),
            target.part.fork.name(),
            target.done.load(SeqCst) as i64,
            target.cached.load(SeqCst) as i64,
            Interval::from_micros(target.elapsed()),
        )
    })
}

fn tell_what_is_left_out(collection: &Collection) {
    if collection.denied > 0 {
        notice(format!(
            "skipped {} for which the SELECT privilege is missing",
            relations(collection.denied)
        ));
    }
    if collection.foreign > 0 {
        notice(format!(
            "skipped {} that are foreign tables",
            relations(collection.foreign)
        ));
    }
}

fn relations(count: usize) -> String {
    match count {
        1 => "1 relation".to_owned(),
        count => format!("{count} relations"),
    }
}

fn tell_how_it_ended(collection: &Collection, header: &Header, targets: &[Target], total: u64) {
    let mut told = None;
    for (part, target) in collection.parts.iter().zip(targets) {
        let what = target.change().map(|change| (change, target.part.relation));
        if let Some((change, _)) = what
            && what != told
        {
            change.notice(&part.name);
        }
        told = what.or(told);
    }
    let done = header.done.load(SeqCst);
    match full(header) {
        None => {}
        Some(Full::Shared) => notice(format!(
            "shared buffers are full: {done} of {total} blocks were prewarmed"
        )),
        Some(Full::Local) => notice(format!(
            "temporary buffers are full: {done} of {total} blocks were prewarmed"
        )),
    }
}
