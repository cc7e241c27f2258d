//! The leader: loads the list when it starts and on request, and dumps it at
//! intervals and at shutdown.
//!
//! A file that cannot be read or written is a warning and is tried again later; it
//! never ends the process. The leader does not dump before the load has ended,
//! since that would replace a good list with one of the few blocks cached so far.

use std::time::{Duration, Instant};

use super::dump::{self, Unlogged};
use super::load::{self, Outcome};
use super::state::{Phase, State};
use super::stats::LoadResult;
use crate::pg::process::error::log;
use crate::pg::process::latch::{self, WaitEvent};
use crate::pg::process::{activity, background};
use crate::settings;

/// When a load that failed is tried again if there are no dumps at intervals.
const RETRY_WITHOUT_INTERVAL: Duration = Duration::from_secs(300);

/// How long the leader waits at shutdown for a session that is dumping.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(5);

/// Runs the leader until the server shuts down or terminates it.
pub fn main() {
    background::handle_signals_as_leader();
    background::connect_to_no_database();
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
    // A dump right after the load would be pointless, so the interval begins here.
    // If a former leader has just ended, its last list may be better than what is
    // cached now.
    let mut last = Instant::now();
    while !background::shutdown_requested() {
        let reloaded = background::reload_configuration_if_due();
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
            try_dump(state, Unlogged::LeftOut);
        } else {
            latch::sleep_as_worker(wait, WaitEvent::Leader);
        }
    }
    // Most likely this is a clean shutdown, which unlogged relations survive. After
    // an incomplete load, a dump would drop the blocks not loaded yet from the list.
    match state.phase() {
        Phase::Ended => {
            wait_for_other_dumps(state);
            try_dump(state, Unlogged::Included);
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
        // Unless the list was loaded before, the load is retried: the dump in progress
        // may fail, and then the old list is still to be loaded.
        Outcome::InUse if before == Phase::Ended => (Phase::Ended, LoadResult::Failed),
        Outcome::InUse | Outcome::StillDue => (Phase::Failed, LoadResult::Failed),
    };
    activity::report_idle();
    state.end_load(phase, result);
}

/// Waits until no session dumps. At shutdown, such a session is most likely being
/// terminated as well, so that its list will not be completed.
fn wait_for_other_dumps(state: &State) {
    let since = Instant::now();
    while state.dump_file_user().is_some() && since.elapsed() < SHUTDOWN_TIMEOUT {
        latch::sleep_as_worker(Some(Duration::from_millis(10)), WaitEvent::Leader);
    }
}

/// Dumps, unless another process is doing so.
fn try_dump(state: &State, unlogged: Unlogged) {
    let _in_use = match state.use_dump_file() {
        Ok(in_use) => in_use,
        Err(pid) => {
            log(&format!(
                "skipping block dump because it is already being performed by PID {pid}"
            ));
            return;
        }
    };
    dump::write_as_leader(None, unlogged, state);
}
