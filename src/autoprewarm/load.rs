//! Loading the list: the leader's side.
//!
//! The leader reads the list, makes the plan and puts it into shared memory. It has the
//! plan's chunks loaded by workers, which it [supervises](super::supervise), and logs the
//! result.

use std::collections::HashMap;
use std::io;

use pgrx::{PgLogLevel, PgSqlErrorCode};

use super::DUMP_FILE;
use super::shared::{Cursor, Load};
use super::state::State;
use super::supervise::{Halt, Supervisor, reason_to_skip};
use super::{carry, dump};
use crate::blocks::{BlockList, Carried, OverBudget, Plan, SkipReason, UsageCounts};
use crate::error::Error;
use crate::pg::process::background;
use crate::pg::process::error::{log, log_message};
use crate::pg::process::memory::{Infallible, fallible};
use crate::pg::process::report::Message;
use crate::pg::process::transaction::{self, Transaction};
use crate::pg::shared::segment::Segment;
use crate::pg::storage::database::Database;
use crate::pg::storage::{buffer, file, room};

/// Free buffers that are not used. Several blocks are read at once, after the check for
/// free buffers; without a reserve, the last reads of a load could evict other blocks.
const RESERVE: usize = 64;

/// The DETAIL that tells when a failed load is retried.
const RETRIED: &str = "The load is retried after \"pg_prewarm.autoprewarm_interval\" (five \
                       minutes if that is zero) and when the configuration is reloaded. The block \
                       dump file is kept until then.";

/// How a load ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All blocks of the list were loaded or skipped.
    Completed,
    /// The load was cancelled.
    Cancelled,
    /// The list is in use: a new one is being written.
    InUse,
    /// The list is still to be loaded: the server is shutting down, or the load has
    /// failed, which has been logged.
    StillDue,
}

/// Loads the list. The caller has recorded in the state that a load has begun.
pub fn run(state: &'static State) -> Outcome {
    let _in_use = match state.use_dump_file() {
        Ok(in_use) => in_use,
        Err(pid) => {
            let message =
                format!("skipping prewarm because block dump file is being written by PID {pid}");
            state.last_error.record(&message);
            log(&message);
            return Outcome::InUse;
        }
    };
    state.carry.begin_load();
    match transaction::run(|transaction| prepare(transaction, state)) {
        Ok(Ok(Some((supervisor, over_budget)))) => load(supervisor, over_budget, state),
        Ok(Ok(None)) => {
            state.carry.settle(0);
            Outcome::Completed
        }
        // A request to stop was noticed while the list was being read.
        Ok(Err(_)) if background::shutdown_requested() => Outcome::StillDue,
        Ok(Err(_)) if state.cancel_is_requested() => {
            log("autoprewarm load was cancelled");
            Outcome::Cancelled
        }
        Ok(Err(error)) => {
            state.last_error.record(&error.to_string());
            error.warn(RETRIED, Some("To continue without the file, remove it."));
            Outcome::StillDue
        }
        Err(caught) => {
            state.last_error.record(&caught.message);
            caught.warn();
            Outcome::StillDue
        }
    }
}

/// Reads the list and puts its plan into shared memory. `None` if there is no list.
fn prepare(
    transaction: &Transaction,
    state: &'static State,
) -> Result<Option<(Supervisor, OverBudget)>, Error> {
    let is_to_stop = || background::shutdown_requested() || state.cancel_is_requested();
    let Some(list) = read_list(is_to_stop)? else {
        return Ok(None);
    };
    report_defects(&list, state);
    let stats = &state.load;
    stats.set_total(list.entries.len() as u64);
    let budget = room::count_free().saturating_sub(RESERVE);
    let cached = Infallible(buffer::cached_blocks().map(|block| block.record));
    let plan = fallible(|| Plan::new(list, cached, budget as u64))
        .map_err(|error| Error::ListTooLarge(error.to_string()))?;
    let number = stats.number();
    let skip = |reason, blocks| stats.skip(number, reason, blocks);
    stats.count(number, 0, plan.cached());
    skip(SkipReason::Illegal, plan.illegal());
    skip(SkipReason::NoFreeBuffer, plan.over_budget());

    // For an empty list, pg_database is not read: that would put its blocks into
    // shared buffers.
    let any = plan.databases().next();
    let existing = any.map_or_else(HashMap::new, |_| Database::all(transaction));
    let mut shared = 0..0;
    let mut databases = Vec::new();
    for database in plan.databases() {
        if database.database == 0 {
            // Shared catalogs can be read from any database, so they need no worker of
            // their own.
            shared = database.chunks;
        } else if let Some(reason) = reason_to_skip(existing.get(&database.database)) {
            skip(reason, database.blocks);
        } else {
            databases.push(database);
        }
    }
    let cursors: Vec<_> = databases
        .iter()
        .map(|database| Cursor::new(database.chunks.clone()))
        .collect();
    let load = Load::new(number, shared);
    let segment = Segment::create(load, &cursors, plan.chunks(), plan.words(), |words| {
        plan.encode(words)
    });
    let databases = databases.iter().map(|database| database.database);
    let supervisor = Supervisor::new(state, segment, databases);
    Ok(Some((supervisor, plan.into_over_budget())))
}

/// Has workers load the plan, and logs the result.
fn load(mut supervisor: Supervisor, over_budget: OverBudget, state: &State) -> Outcome {
    if let Err(halt) = supervisor.keep_workers_running() {
        supervisor.terminate_workers();
        if halt == Halt::NoProgress {
            let message =
                "could not load blocks: autoprewarm workers keep exiting before loading any block";
            state.last_error.record(message);
            log_message(
                PgLogLevel::WARNING,
                Message::new(PgSqlErrorCode::ERRCODE_INSUFFICIENT_RESOURCES, message)
                    .detail(RETRIED)
                    .hint("More details may be available in the server log."),
            );
        }
        return Outcome::StillDue;
    }
    supervisor.skip_rest();
    let counts = state.load.counts();
    log(&format!(
        "autoprewarm successfully prewarmed {} of {} previously-loaded blocks",
        counts.loaded + counts.cached,
        counts.total
    ));
    if counts.skipped.total() > 0 {
        log(&format!("autoprewarm skipped {}", counts.skipped));
    }
    let was_cancelled = supervisor.ended_for() == Some(SkipReason::Cancelled);
    match left(&supervisor, &over_budget, state) {
        // The list stays as it is, and is carried as a whole.
        Ok(carried) if was_cancelled => state.carry.cancel_load(carried.left()),
        Ok(carried) if carried.left() == 0 => state.carry.settle(0),
        Ok(carried) => keep(carried, state),
        Err(error) => {
            state.last_error.record(&error.to_string());
            error.warn("The block dump file is kept as it is.", None);
        }
    }
    match was_cancelled {
        true => Outcome::Cancelled,
        false => Outcome::Completed,
    }
}

/// The records that the load has left for a reason that passes.
fn left(
    supervisor: &Supervisor,
    over_budget: &OverBudget,
    state: &State,
) -> Result<Carried, Error> {
    let mut left = supervisor.left().chain(over_budget.records()).peekable();
    // Without need, pg_database is not read: that would put its blocks into shared
    // buffers.
    let existing = left
        .peek()
        .and_then(|_| match transaction::run(Database::all) {
            Ok(existing) => Some(existing),
            Err(caught) => {
                state.last_error.record(&caught.message);
                caught.warn();
                None
            }
        });
    // Blocks of databases that are not loaded are not carried either.
    let left = left.filter(|(record, ..)| {
        record.database == 0
            || existing
                .as_ref()
                .is_none_or(|existing| reason_to_skip(existing.get(&record.database)).is_none())
    });
    carry::after_load(state, left)
}

/// Writes the list of what is cached and what the load has left.
fn keep(carried: Carried, state: &State) {
    dump::write_as_leader(Some(carried), dump::Unlogged::LeftOut, state);
    match state.carry.records() {
        Some(records) if records > 0 => log(&format!(
            "autoprewarm keeps {records} of the skipped blocks in \"{DUMP_FILE}\""
        )),
        _ => {}
    }
}

/// Logs what is invalid or missing in a list that is loaded nevertheless.
fn report_defects(list: &BlockList, state: &State) {
    if let Some(line) = list.first_bad_line {
        let message = super::corrupted_at(line);
        state.last_error.record(&message);
        let detail = format!(
            "All valid lines of \"{DUMP_FILE}\" are loaded, and the next block dump replaces the \
             file."
        );
        log_message(
            PgLogLevel::WARNING,
            Message::new(PgSqlErrorCode::ERRCODE_DATA_CORRUPTED, &message).detail(&detail),
        );
    }
    match list.usage_counts {
        UsageCounts::Ignored(reason) => {
            log(&format!(
                "ignoring usage counts in \"{DUMP_FILE}\": {reason}"
            ));
        }
        UsageCounts::Missing if !list.entries.is_empty() => {
            log(&format!(
                "file \"{DUMP_FILE}\" contains no usage counts, using 1 for all blocks"
            ));
        }
        UsageCounts::Missing | UsageCounts::Saved => {}
    }
}

/// Reads the list. `None` if there is no file; an error if `is_to_stop` becomes true.
fn read_list(is_to_stop: impl Fn() -> bool) -> Result<Option<BlockList>, Error> {
    match file::open(DUMP_FILE) {
        Ok((reader, size)) => {
            let reader = Infallible(file::Interruptible { reader, is_to_stop });
            Ok(Some(fallible(|| BlockList::read(reader, size))?))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Error::File {
            action: "read",
            path: DUMP_FILE,
            source,
        }),
    }
}
