//! Loading the list: the leader's side.
//!
//! The leader reads the list, makes the plan and [shares](super::share) it. It has the
//! plan's chunks loaded by workers, which it [supervises](super::supervise), and logs the
//! result.

use std::collections::HashMap;

use pgrx::{PgLogLevel, PgSqlErrorCode};

use super::mark::{self, Mark};
use super::share::share;
use super::state::State;
use super::supervise::{Halt, Supervisor};
use super::{DUMP_FILE, no_list};
use crate::blocks::{BlockList, Oid, Plan, SkipReason, UsageCounts};
use crate::error::Error;
use crate::pg::process::background;
use crate::pg::process::error::{log, log_message};
use crate::pg::process::memory::{Infallible, fallible};
use crate::pg::process::report::Message;
use crate::pg::process::transaction::{self, Transaction};
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
    /// There is no list.
    NoList,
    /// The load was cancelled.
    Cancelled,
    /// The load was not begun, since the server has crashed during the last ones.
    Suspended,
    /// The list is in use: a new one is being written.
    InUse,
    /// The list is still to be loaded: the server is shutting down, or the load has
    /// failed, which has been logged.
    StillDue,
}

/// Loads the list. The caller has recorded in the state that a load has begun, and says
/// whether a session has requested it.
pub fn run(state: &'static State, was_requested: bool) -> Outcome {
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
    if let Some(reason) = no_list::reason() {
        no_list::report(&reason);
        mark::remove(state);
        return Outcome::NoList;
    }
    match mark::begin(state, was_requested) {
        Ok(mark) => run_marked(state, mark),
        Err(crashes) => {
            mark::report(state, &crashes);
            Outcome::Suspended
        }
    }
}

fn run_marked(state: &'static State, mark: Mark) -> Outcome {
    let outcome = read_and_load(state);
    mark.end();
    outcome
}

fn read_and_load(state: &'static State) -> Outcome {
    let prepared = transaction::run(|transaction| prepare(transaction, state));
    let shared = match prepared {
        Ok(Ok((plan, existing))) => share(plan, &existing, state).map(Ok),
        Ok(Err(error)) => Ok(Err(error)),
        Err(caught) => Err(caught),
    };
    match shared {
        Ok(Ok(supervisor)) => load(supervisor, state),
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

/// Reads the list and makes its plan. Returns which databases exist as well, if the plan
/// is not empty.
fn prepare(
    transaction: &Transaction,
    state: &State,
) -> Result<(Plan, HashMap<Oid, Database>), Error> {
    let is_to_stop = || background::shutdown_requested() || state.cancel_is_requested();
    let list = read_list(is_to_stop)?;
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
    Ok((plan, existing))
}

/// Has workers load the plan, and logs the result.
fn load(mut supervisor: Supervisor, state: &State) -> Outcome {
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
    match supervisor.ended_for() {
        Some(SkipReason::Cancelled) => Outcome::Cancelled,
        _ => Outcome::Completed,
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

/// Reads the list. An error if `is_to_stop` becomes true.
fn read_list(is_to_stop: impl Fn() -> bool) -> Result<BlockList, Error> {
    let (reader, size) = file::open(DUMP_FILE).map_err(|source| Error::File {
        action: "read",
        path: DUMP_FILE,
        source,
    })?;
    let reader = Infallible(file::Interruptible { reader, is_to_stop });
    Ok(fallible(|| BlockList::read(reader, size))?)
}
