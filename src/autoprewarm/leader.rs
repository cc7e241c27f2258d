//! The leader: loads the list when it starts, and when it is asked to, and dumps it
//! again and again.
//!
//! It outlives whatever goes wrong with either: a file that cannot be read or
//! written is a warning and a later try, never the end of the process. And it
//! does not dump before the load has ended, since that would replace a good list
//! by one of what happens to be cached so far.

use std::time::{Duration, Instant};

use pgrx::PgLogLevel;

use super::dump::{self, Unlogged};
use super::load::{self, Outcome};
use super::state::{Phase, State};
use super::stats::LoadResult;
use crate::pg::activity::{self, WaitEvent};
use crate::pg::error::{SUCCESS, log, log_with_hint};
use crate::pg::{process, transaction};
use crate::settings;

/// When a load that failed is tried again where there is no interval between dumps.
const RETRY_WITHOUT_INTERVAL: Duration = Duration::from_secs(300);

/// How long a session that dumps has to finish, or to be ended, at shutdown.
const SHUTDOWN_PATIENCE: Duration = Duration::from_secs(5);

/// The leader's life, from its start by the server to the server's shutdown.
pub fn main() {
    process::handle_signals_as_leader();
    process::connect_to_no_database();
    let state = State::attach();
    if let Err(pid) = state.become_leader() {
        log(&format!(
            "autoprewarm worker is already running under PID {pid}"
        ));
        return;
    }

    if state.phase() == Phase::Due {
        load(state);
    }
    // There is no point in a dump right after the load, so the interval begins
    // here. Nor is there after the end of a former leader: its last list may be
    // better than what is cached.
    let mut last = Instant::now();
    while !process::shutdown_requested() {
        let reloaded = process::reload_configuration_if_due();
        let has_failed = state.phase() == Phase::Failed;
        let interval =
            settings::autoprewarm_interval().or(has_failed.then_some(RETRY_WITHOUT_INTERVAL));
        let wait = interval.map(|interval| interval.saturating_sub(last.elapsed()));
        let interval_is_over = wait == Some(Duration::ZERO);
        let retry = has_failed && (reloaded || interval_is_over);
        if retry || state.load_is_requested() {
            load(state);
            last = Instant::now();
        } else if interval_is_over {
            last = Instant::now();
            dump_and_survive(state, Unlogged::LeftOut);
        } else {
            process::sleep_as_worker(wait, WaitEvent::Leader);
        }
    }
    // Most likely the server shuts down, which unlogged relations survive. A
    // load that was cut short must not cut the list short.
    match state.phase() {
        Phase::Ended => {
            wait_for_other_dumps(state);
            dump_and_survive(state, Unlogged::Included);
        }
        Phase::Cancelled => {}
        Phase::Due | Phase::Loading | Phase::Failed => state.postpone_load(),
    }
}

fn load(state: &'static State) {
    let before = state.phase();
    state.begin_load();
    activity::report(b"loading".to_vec());
    let (phase, result) = match load::run(state) {
        Outcome::Completed => (Phase::Ended, LoadResult::Completed),
        Outcome::Cancelled => (Phase::Cancelled, LoadResult::Cancelled),
        // The new list may not come to be, and then the old one is to be had.
        Outcome::InUse if before == Phase::Ended => (Phase::Ended, LoadResult::Failed),
        Outcome::InUse | Outcome::StillDue => (Phase::Failed, LoadResult::Failed),
    };
    activity::report_idle();
    state.end_load(phase, result);
}

/// At shutdown, a session that dumps is most likely being ended as well, and its list
/// with it.
fn wait_for_other_dumps(state: &State) {
    let since = Instant::now();
    while state.dump_file_user().is_some() && since.elapsed() < SHUTDOWN_PATIENCE {
        process::sleep_as_worker(Some(Duration::from_millis(10)), WaitEvent::Leader);
    }
}

/// Dumps, and goes on whatever happens: the list on disk stays until a new one
/// is complete.
fn dump_and_survive(state: &State, unlogged: Unlogged) {
    let _in_use = match state.use_dump_file() {
        Ok(in_use) => in_use,
        Err(pid) => {
            log(&format!(
                "skipping block dump because it is already being performed by PID {pid}"
            ));
            return;
        }
    };
    activity::report(b"dumping".to_vec());
    match transaction::run(|| dump::write(unlogged, state)) {
        Ok(Ok(written)) => {
            let message = dump::describe(written);
            log_with_hint(PgLogLevel::DEBUG1, SUCCESS, &message, None);
        }
        Ok(Err(error)) => {
            state.last_error.record(&error.to_string());
            error.warn(
                "The previous block dump file is kept. The next dump is attempted after \
                 \"pg_prewarm.autoprewarm_interval\".",
            );
        }
        Err(caught) => {
            state.last_error.record(&caught.message);
            caught.warn();
        }
    }
    activity::report_idle();
}
