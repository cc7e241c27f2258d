//! After the promotion: the rest of the upstream's list is loaded at full rate, by all
//! workers, and the usage counts that it has are restored.
//!
//! It is a load like those of the server's own list: `autoprewarm_wait()` waits for it,
//! `autoprewarm_cancel()` cancels it, `pg_stat_autoprewarm` shows it, and new sessions are
//! held for its first tier if that is set up. Nobody else needs the blocks that the standby
//! had of its own more than clients of a primary need these, so blocks with a lower usage
//! count are replaced.

use pgrx::{PgLogLevel, PgSqlErrorCode};

use super::state::Stage;
use super::stored;
use crate::autoprewarm::create_segment::create_segment;
use crate::autoprewarm::load::{plan_list, survey};
use crate::autoprewarm::load_segment::Purpose;
use crate::autoprewarm::mark;
use crate::autoprewarm::state::State;
use crate::autoprewarm::stats::LoadResult;
use crate::autoprewarm::supervise::Halt;
use crate::blocks::{SkipReason, UpstreamList};
use crate::error::Error;
use crate::pg::process::error::{log, log_message};
use crate::pg::process::report::Message;
use crate::pg::process::{activity, transaction};
use crate::pg::storage::{buffer, file};
use crate::settings;

/// Loads the rest of the list, if there is one. The caller has noticed a promotion, which
/// counts as a pending load until this has begun one. Returns false if the list is to be
/// tried again. Otherwise it is of no use any more, and removed. A retry holds no session.
pub fn run(state: &'static State, is_retry: bool) -> bool {
    let phase = state.phase();
    state.begin_load();
    if !is_retry && !settings::autoprewarm_hold_connections().is_zero() {
        state.hold.begin();
    }
    state.follow.set_stage(Stage::NotAStandby);
    state.follow.set_list_waits(false);
    activity::report(b"loading".to_vec());
    let result = match mark::begin(&mark::PROMOTIONS, state, false) {
        Ok(mark) => {
            let result = read_and_load(state);
            mark.end();
            result
        }
        Err(crashes) => {
            let why = crashes.describe(&mark::PROMOTIONS);
            fail(&why, "The list is removed.", state);
            mark::remove(&mark::PROMOTIONS, state);
            LoadResult::Suspended
        }
    };
    activity::report_idle();
    let counts = state.load.counts();
    state.end_load(phase, result);
    if matches!(result, LoadResult::Completed | LoadResult::Cancelled) {
        log(&format!(
            "autoprewarm prewarmed {} of {} blocks after the promotion; {} were cached already",
            counts.loaded, counts.total, counts.cached
        ));
        if counts.skipped.total() > 0 {
            log(&format!("autoprewarm skipped {}", counts.skipped));
        }
    }
    let is_done = result != LoadResult::Failed;
    if is_done && let Err(caught) = transaction::run(|_| stored::remove()) {
        state.warn(caught);
    }
    // Those of the time as a standby do not count when it is one again.
    mark::remove(&mark::TOP_UPS, state);
    is_done
}

fn read_and_load(state: &'static State) -> LoadResult {
    match transaction::run(|_| stored::read()) {
        Ok(Ok(Some(stored))) => {
            log(
                "autoprewarm loads the block list of the former upstream server after the \
                 promotion",
            );
            load(stored.list, state)
        }
        Ok(Ok(None)) => LoadResult::NoList,
        Ok(Err(error)) => {
            // What is damaged, or no file, does not get better.
            let result = match error {
                Error::DamagedList { .. } => LoadResult::NoList,
                Error::File { ref source, .. } if file::is_no_file(source) => LoadResult::NoList,
                _ => LoadResult::Failed,
            };
            give_up(error, state);
            result
        }
        Err(caught) => {
            state.warn(caught);
            LoadResult::Failed
        }
    }
}

fn give_up(error: Error, state: &State) {
    state.last_error.record(&error.to_string());
    error.warn(
        "The blocks of the former upstream server are not loaded.",
        None,
    );
}

fn load(mut list: UpstreamList, state: &'static State) -> LoadResult {
    let planned = transaction::run(|transaction| {
        restore_usage_counts(&mut list);
        let buffers = survey();
        plan_list(transaction, list.into(), Purpose::List, state, |listed| {
            buffers.on_demand(listed)
        })
    });
    let created = match planned {
        Ok(Ok(prepared)) => create_segment(prepared, state),
        Ok(Err(error)) => {
            give_up(error, state);
            return LoadResult::Failed;
        }
        Err(caught) => Err(caught),
    };
    let mut supervisor = match created {
        Ok((supervisor, _)) => supervisor,
        Err(caught) => {
            state.warn(caught);
            return LoadResult::Failed;
        }
    };
    let end = supervisor.keep_workers_running();
    state.hold.end();
    let why = match end {
        Ok(()) => {
            supervisor.skip_rest();
            return match supervisor.ended_for() {
                Some(SkipReason::Cancelled) => LoadResult::Cancelled,
                _ => LoadResult::Completed,
            };
        }
        Err(Halt::ShuttingDown) => None,
        Err(Halt::NoSlot) => Some("no background worker slot is free"),
        Err(Halt::NoProgress) => Some("autoprewarm workers keep exiting before loading any block"),
    };
    supervisor.terminate_workers();
    if let Some(why) = why {
        let detail = "The load is retried after \"pg_prewarm.autoprewarm_interval\".";
        fail(why, detail, state);
    }
    LoadResult::Failed
}

fn fail(why: &str, detail: &str, state: &State) {
    let message = format!("could not load blocks after the promotion: {why}");
    state.last_error.record(&message);
    let sqlstate = PgSqlErrorCode::ERRCODE_INSUFFICIENT_RESOURCES;
    log_message(
        PgLogLevel::WARNING,
        Message::new(sqlstate, &message).detail(detail),
    );
}

/// Gives the blocks that are cached already the usage counts that they have in the list,
/// unless their own are higher. Serves interrupts.
fn restore_usage_counts(list: &mut UpstreamList) {
    for block in buffer::cached_blocks() {
        if let Some(usage_count) = list.usage_count(&block.record) {
            buffer::raise_usage_count(block.index, usage_count);
        }
    }
}
