//! The functions behind the views `pg_stat_autoprewarm` and
//! `pg_stat_progress_prewarm`, whose columns docs/reference.md describes.

use pgrx::prelude::*;

use super::state::{Phase, State};
use super::stats::LoadResult;
use crate::blocks::SkipReason;
use crate::pg::process::report::in_server_encoding;
use crate::progress::Progress;

/// The one row of `pg_stat_autoprewarm`.
#[pg_extern(sql = false)]
#[allow(clippy::type_complexity)]
fn pg_stat_get_autoprewarm() -> TableIterator<
    'static,
    (
        name!(pid, Option<i32>),
        name!(state, &'static str),
        name!(load_start_time, Option<TimestampWithTimeZone>),
        name!(load_end_time, Option<TimestampWithTimeZone>),
        name!(load_result, Option<&'static str>),
        name!(blocks_total, i64),
        name!(blocks_loaded, i64),
        name!(blocks_cached, i64),
        name!(blocks_skipped, i64),
        name!(skipped_illegal, i64),
        name!(skipped_template_database, i64),
        name!(skipped_no_database, i64),
        name!(skipped_no_relation, i64),
        name!(skipped_no_block, i64),
        name!(skipped_unreadable, i64),
        name!(skipped_locked, i64),
        name!(skipped_no_free_buffer, i64),
        name!(skipped_no_shared_memory, i64),
        name!(skipped_interrupted, i64),
        name!(skipped_cancelled, i64),
        name!(blocks_carried, Option<i64>),
        name!(connections_held, i64),
        name!(last_dump_time, Option<TimestampWithTimeZone>),
        name!(last_dump_blocks, Option<i64>),
        name!(last_dump_duration, Option<Interval>),
        name!(last_error, Option<String>),
        name!(last_error_time, Option<TimestampWithTimeZone>),
    ),
> {
    let state = State::attach();
    // Read in the reverse of the order in which the leader writes at the end of a
    // load, so that an ended load is shown with its final counts, and a running one
    // without a result.
    let load = &state.load;
    let phase = state.phase();
    let name = state_name(state, phase);
    let (end, result) = match phase {
        Phase::Loading => (0, None),
        _ => (load.end_time(), load.result()),
    };
    let counts = load.counts();
    let skipped = |reason| counts.skipped.of(reason) as i64;
    let (dump_time, dump_blocks, dump_duration) = state.dump.last();
    let dump_time = time(dump_time);
    let was_dumped = dump_time.is_some();
    let error = state.last_error.last();
    TableIterator::once((
        state.leader(),
        name,
        time(load.start_time()),
        time(end),
        result.map(LoadResult::name),
        counts.total as i64,
        counts.loaded as i64,
        counts.cached as i64,
        counts.skipped.total() as i64,
        skipped(SkipReason::Illegal),
        skipped(SkipReason::TemplateDatabase),
        skipped(SkipReason::NoDatabase),
        skipped(SkipReason::NoRelation),
        skipped(SkipReason::NoBlock),
        skipped(SkipReason::Unreadable),
        skipped(SkipReason::Locked),
        skipped(SkipReason::NoFreeBuffer),
        skipped(SkipReason::NoSharedMemory),
        skipped(SkipReason::Interrupted),
        skipped(SkipReason::Cancelled),
        state.carry.records().map(|records| records as i64),
        state.hold.held().into(),
        dump_time,
        was_dumped.then_some(dump_blocks as i64),
        was_dumped.then(|| {
            Interval::from_micros(i64::try_from(dump_duration.as_micros()).unwrap_or(i64::MAX))
        }),
        error
            .as_ref()
            .map(|(message, _)| in_server_encoding(message)),
        error.and_then(|(_, when)| time(when)),
    ))
}

fn state_name(state: &State, phase: Phase) -> &'static str {
    let leads = state.leader().is_some();
    match phase {
        Phase::Loading if leads => "loading",
        _ if state.dump_file_user().is_some() => "dumping",
        _ if !leads => "not running",
        _ if state.load_is_pending() => "load pending",
        Phase::Failed | Phase::NoSlot => "load failed",
        Phase::Suspended => "load suspended",
        _ => "idle",
    }
}

/// The rows of `pg_stat_progress_prewarm`, without the databases' names, which the
/// view adds.
#[pg_extern(sql = false)]
#[allow(clippy::type_complexity)]
fn pg_stat_get_progress_prewarm() -> TableIterator<
    'static,
    (
        name!(pid, i32),
        name!(datid, pg_sys::Oid),
        name!(kind, &'static str),
        name!(relid, Option<pg_sys::Oid>),
        name!(fork, Option<&'static str>),
        name!(blocks_total, i64),
        name!(blocks_done, i64),
        name!(blocks_skipped, i64),
        name!(start_time, Option<TimestampWithTimeZone>),
    ),
> {
    TableIterator::new(Progress::all().map(|(pid, database, progress)| {
        let reads = progress.relation != 0;
        (
            pid,
            pg_sys::Oid::from(database),
            progress.kind.name(),
            reads.then_some(pg_sys::Oid::from(progress.relation)),
            reads.then_some(progress.fork.name()),
            progress.total as i64,
            progress.done as i64,
            progress.skipped as i64,
            time(progress.start),
        )
    }))
}

/// One of the server's timestamps. `None` if it is 0.
pub(super) fn time(timestamp: i64) -> Option<TimestampWithTimeZone> {
    Some(timestamp)
        .filter(|&timestamp| timestamp != 0)
        .and_then(|timestamp| timestamp.try_into().ok())
}
