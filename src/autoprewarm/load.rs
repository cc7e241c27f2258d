//! Loading the list: the leader's side.
//!
//! The leader reads the list, makes the plan and puts it into shared memory. It has the
//! plan's chunks loaded by workers, which it [supervises](super::supervise), and logs the
//! result.

use std::collections::HashMap;
use std::io;

use pgrx::{PgLogLevel, PgSqlErrorCode};

use super::create_segment::create_segment;
use super::later::Later;
use super::load_segment::Purpose;
use super::mark;
use super::state::State;
use super::supervise::{Halt, Supervisor, reason_to_skip};
use super::{DUMP_FILE, carry, dump, no_list};
use crate::blocks::{
    BlockList, Budget, ByUsageCount, Carried, Oid, OverBudget, Plan, Room, SkipReason, UsageCounts,
};
use crate::error::Error;
use crate::pg::process::error::{log, log_message};
use crate::pg::process::memory::{Infallible, fallible, infallible};
use crate::pg::process::report::Message;
use crate::pg::process::transaction::{self, Transaction};
use crate::pg::process::{background, check_for_interrupts};
use crate::pg::shared::slots;
use crate::pg::storage::database::Database;
use crate::pg::storage::file::{self, OpenFile};
use crate::pg::storage::{buffer, room};
use crate::settings;

/// The DETAIL that tells when a failed load is retried.
const RETRIED: &str = "The load is retried after \"pg_prewarm.autoprewarm_interval\" (five \
                       minutes if that is zero) and when the configuration is reloaded. The block \
                       dump file is kept until then.";

/// The DETAIL that tells when a load is retried that had no background worker slot.
const RETRIED_WITH_SLOT: &str = "The load is retried when a slot is free. Until then, block dumps \
                                 keep the blocks that are not loaded yet.";

/// Why the list is loaded, which decides what may be replaced in shared buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The server has started. Only what it would evict next is replaced.
    Start,
    /// `autoprewarm_load_now()` was called. Blocks with a lower usage count are
    /// replaced as well.
    OnDemand,
}

/// How a load ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// There is no list, or it cannot be found.
    NoList,
    /// The load was not begun, since the server has crashed during the last ones.
    Suspended,
    /// All blocks of the list were loaded or skipped.
    Completed,
    /// The load was cancelled.
    Cancelled,
    /// The list is in use: a new one is being written.
    InUse,
    /// The list is still to be loaded: the server is shutting down, or the load has
    /// failed, which has been logged.
    StillDue,
    /// The same: there was no background worker slot.
    NoSlot,
}

/// Loads the list. The caller has recorded in the state that a load has begun. Also returns
/// what was locked, to be tried later.
pub fn run(state: &'static State, reason: Reason) -> (Outcome, Option<Later>) {
    let _in_use = match state.use_dump_file() {
        Ok(in_use) => in_use,
        Err(pid) => {
            let message =
                format!("skipping prewarm because block dump file is being written by PID {pid}");
            state.last_error.record(&message);
            log(&message);
            return (Outcome::InUse, None);
        }
    };
    let list = file::open(DUMP_FILE);
    if no_list::is_missing(&list) {
        no_list::report();
        mark::remove(&mark::LOADS, state);
        state.carry.settle(0);
        return (Outcome::NoList, None);
    }
    state.carry.begin_load();
    match mark::begin(&mark::LOADS, state, reason == Reason::OnDemand) {
        Ok(mark) => {
            let result = read_and_load(state, reason, list);
            mark.end();
            result
        }
        Err(crashes) => {
            mark::report(state, &crashes);
            (Outcome::Suspended, None)
        }
    }
}

fn read_and_load(
    state: &'static State,
    reason: Reason,
    list: io::Result<(OpenFile, u64)>,
) -> (Outcome, Option<Later>) {
    let prepared = transaction::run(|transaction| prepare(transaction, state, reason, list));
    let created = match prepared {
        Ok(Ok(prepared)) => create_segment(prepared, state).map(Ok),
        Ok(Err(error)) => Ok(Err(error)),
        Err(caught) => Err(caught),
    };
    let outcome = match created {
        Ok(Ok((supervisor, over_budget))) => return load(supervisor, over_budget, state),
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
            state.warn(caught);
            Outcome::StillDue
        }
    };
    (outcome, None)
}

/// What a load is made of.
pub struct Prepared {
    pub plan: Plan,
    /// What it may replace in shared buffers.
    pub budget: Budget,
    pub purpose: Purpose,
    /// Which databases exist, if the plan is not empty.
    pub existing: HashMap<Oid, Database>,
}

/// What a load with as many workers as can run may replace now. Serves interrupts.
pub fn survey() -> Room {
    room::survey(slots::count_free().min(settings::autoprewarm_workers()))
}

/// Reads the list and makes its plan.
fn prepare(
    transaction: &Transaction,
    state: &State,
    reason: Reason,
    list: io::Result<(OpenFile, u64)>,
) -> Result<Prepared, Error> {
    let should_stop = || background::shutdown_requested() || state.cancel_is_requested();
    let list = read_list(list, should_stop)?;
    report_defects(&list, state);
    let buffers = survey();
    plan_list(
        transaction,
        list,
        Purpose::List,
        state,
        |listed| match reason {
            Reason::Start => buffers.at_start(),
            Reason::OnDemand => buffers.on_demand(listed),
        },
    )
}

/// Makes the plan of a list. `choose` gets how many blocks are not cached, by usage count,
/// and chooses how many are loaded. Counts what is left out.
pub fn plan_list(
    transaction: &Transaction,
    list: BlockList,
    purpose: Purpose,
    state: &State,
    choose: impl FnOnce(&ByUsageCount) -> Budget,
) -> Result<Prepared, Error> {
    let stats = purpose.stats(state);
    stats.set_total(list.entries.len() as u64);
    let mut budget = Budget::default();
    let cached = Infallible(buffer::cached_blocks().map(|block| block.record));
    let mut tick = || infallible(check_for_interrupts);
    let plan = fallible(|| {
        let choose = |listed: &_| {
            budget = choose(listed);
            budget.blocks
        };
        Plan::new_with_ticks(list, cached, choose, &mut tick)
    })
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
    Ok(Prepared {
        plan,
        budget,
        purpose,
        existing,
    })
}

/// Has workers load the plan, and logs the result.
fn load(
    mut supervisor: Supervisor,
    over_budget: OverBudget,
    state: &State,
) -> (Outcome, Option<Later>) {
    let end = supervisor.keep_workers_running();
    // What follows may take a while.
    state.hold.end();
    if let Err(halt) = end {
        supervisor.terminate_workers();
        let outcome = match halt {
            Halt::ShuttingDown => Outcome::StillDue,
            Halt::NoProgress => {
                let message = "could not load blocks: autoprewarm workers keep exiting before \
                               loading any block";
                let hint = "More details may be available in the server log.";
                report_failure(message, RETRIED, hint, state);
                Outcome::StillDue
            }
            Halt::NoSlot => {
                let message = "could not load blocks: no background worker slot is free";
                let hint = "You may need to increase \"max_worker_processes\".";
                report_failure(message, RETRIED_WITH_SLOT, hint, state);
                Outcome::NoSlot
            }
        };
        return (outcome, None);
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
    let ended_for = supervisor.ended_for();
    if ended_for == Some(SkipReason::Interrupted) {
        // The server was promoted, and another list comes first. This one stays as it is, and
        // is carried as a whole.
        return (Outcome::Completed, None);
    }
    let was_cancelled = ended_for == Some(SkipReason::Cancelled);
    match left(&supervisor, over_budget, state) {
        // The list stays as it is, and is carried as a whole.
        Some(carried) if was_cancelled => state.carry.cancel_load(carried.left()),
        Some(carried) if carried.left() == 0 => state.carry.settle(0),
        Some(carried) => keep(carried, state),
        None => {}
    }
    match ended_for {
        Some(SkipReason::Cancelled) => (Outcome::Cancelled, None),
        Some(_) => (Outcome::Completed, None),
        None => (Outcome::Completed, Later::of(supervisor)),
    }
}

/// The records that the load has left for a temporary reason. `None` if they could not
/// be gathered, which is logged; the whole list counts as left then.
fn left(supervisor: &Supervisor, over_budget: OverBudget, state: &State) -> Option<Carried> {
    let mut left = supervisor.left().chain(over_budget.records()).peekable();
    // Without need, pg_database is not read: that would put its blocks into shared
    // buffers.
    let existing = left
        .peek()
        .and_then(|_| match transaction::run(Database::all) {
            Ok(existing) => Some(existing),
            Err(caught) => {
                state.warn(caught);
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
    let gathered = transaction::run(|_| {
        let mut carried = carry::after_load(state, left)?;
        carry::forget_dropped(&mut carried);
        Ok::<_, Error>(carried)
    });
    match gathered {
        Ok(Ok(carried)) => return Some(carried),
        Ok(Err(error)) => {
            state.last_error.record(&error.to_string());
            error.warn("The block dump file is kept as it is.", None);
        }
        Err(caught) => {
            state.warn(caught);
        }
    }
    None
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

fn report_failure(message: &str, detail: &str, hint: &str, state: &State) {
    state.last_error.record(message);
    log_message(
        PgLogLevel::WARNING,
        Message::new(PgSqlErrorCode::ERRCODE_INSUFFICIENT_RESOURCES, message)
            .detail(detail)
            .hint(hint),
    );
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

/// Reads the list. An error if `should_stop` becomes true.
fn read_list(
    list: io::Result<(OpenFile, u64)>,
    should_stop: impl Fn() -> bool,
) -> Result<BlockList, Error> {
    let (reader, size) = list.map_err(|source| Error::File {
        action: "read",
        path: DUMP_FILE,
        source,
    })?;
    let reader = Infallible(file::Interruptible {
        reader,
        should_stop,
    });
    Ok(fallible(|| BlockList::read(reader, size))?)
}
