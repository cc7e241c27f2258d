//! The leader: loads the list when it starts and on request, and dumps it at
//! intervals and at shutdown.
//!
//! A file that cannot be read or written is a warning and is tried again later; it
//! never ends the process. The leader does not dump before the load has ended,
//! since that would replace a good list with one of the few blocks cached so far.
//!
//! After a load, what was locked is tried [later](super::later). A load that had no
//! background worker slot is retried when one is free, and not before; meanwhile dumps
//! carry what is to be loaded.

use std::time::{Duration, Instant};

use super::dump::{self, Unlogged};
use super::follow::follower::Follower;
use super::later::Later;
use super::load::{self, Outcome, Reason};
use super::mark;
use super::state::{Phase, State};
use super::stats::LoadResult;
use crate::pg::process::error::log;
use crate::pg::process::latch;
use crate::pg::process::{self, activity, background, postmaster};
use crate::pg::shared::slots;
use crate::{settings, wait_events};

/// When a load that failed is tried again if there are no dumps at intervals.
const RETRY_WITHOUT_INTERVAL: Duration = Duration::from_secs(300);

/// How often the leader looks for a free background worker slot if a load had none.
const SLOT_POLL: Duration = Duration::from_secs(1);

/// How long the leader waits at shutdown for a session that is dumping.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(5);

/// How often the leader looks whether a smart shutdown was requested.
const SHUTDOWN_POLL: Duration = Duration::from_secs(1);

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

    let mut follower = Follower::new(state);
    let mut after = AfterLoad::default();
    match state.phase() {
        Phase::Due | Phase::NoSlot => after = load(state, after),
        // Its former leader has ended, and the server has not crashed.
        Phase::Failed => mark::remove(&mark::LOADS, state),
        _ => {}
    }
    // A dump right after the load would be pointless, so the interval begins here.
    // If a former leader has just ended, its last list may be better than what is
    // cached now.
    let mut last = Instant::now();
    let mut is_stopping = false;
    while !background::shutdown_requested() {
        let reloaded = process::reload_configuration_if_due();
        if reloaded {
            follower.reload();
        }
        if follower.was_promoted() {
            after.end();
            follower.load_after_promotion();
            last = Instant::now();
            if !background::shutdown_requested()
                && matches!(state.phase(), Phase::Ended | Phase::NoSlot)
            {
                try_dump(state, Unlogged::LeftOut);
            }
            continue;
        }
        // While sessions go on, the end of a smart shutdown may be far away, and the server
        // be killed before.
        if !is_stopping && postmaster::is_stopping() {
            is_stopping = true;
            if matches!(state.phase(), Phase::Ended | Phase::NoSlot) {
                last = Instant::now();
                try_dump(state, Unlogged::LeftOut);
                continue;
            }
        }
        let has_failed = matches!(state.phase(), Phase::Failed | Phase::NoSlot);
        let interval =
            settings::autoprewarm_interval().or(has_failed.then_some(RETRY_WITHOUT_INTERVAL));
        let wait = interval.map(|interval| interval.saturating_sub(last.elapsed()));
        let interval_is_over = wait == Some(Duration::ZERO);
        let retry = match state.phase() {
            Phase::Failed => reloaded || after.may_be_retried(interval_is_over),
            Phase::NoSlot => after.may_be_retried(interval_is_over),
            _ => false,
        };
        if retry || state.load_is_requested() {
            follower.interrupt();
            after = load(state, after);
            last = Instant::now();
        } else if interval_is_over {
            last = Instant::now();
            if may_dump(state) {
                try_dump(state, Unlogged::LeftOut);
            }
        } else {
            let shutdown_poll = (!is_stopping).then_some(SHUTDOWN_POLL);
            let wait = [
                wait,
                after.advance(state),
                follower.advance(),
                shutdown_poll,
            ];
            let wait = wait.into_iter().flatten().min();
            latch::sleep_as_worker(wait, &wait_events::LEADER_MAIN);
        }
    }
    follower.stop();
    // Most likely this is a clean shutdown, which unlogged relations survive. After
    // an incomplete load, the list is still the best one.
    if matches!(state.phase(), Phase::Ended | Phase::NoSlot) {
        wait_for_other_dumps(state);
        try_dump(state, Unlogged::Included);
    }
    match state.phase() {
        Phase::Ended | Phase::Cancelled | Phase::Suspended => {}
        Phase::Due | Phase::Loading | Phase::Failed | Phase::NoSlot => state.postpone_load(),
    }
}

/// What a load has left for later.
#[derive(Default)]
struct AfterLoad {
    /// What was locked.
    later: Option<Later>,
    /// If there was no background worker slot, how many were free by the count of
    /// processes: usually none.
    slots_then: Option<usize>,
}

impl AfterLoad {
    /// Whether a load that has failed may be retried now.
    fn may_be_retried(&self, interval_is_over: bool) -> bool {
        match self.slots_then {
            None => interval_is_over,
            Some(then) => {
                let now = slots::count_free();
                now > then || interval_is_over && now > 0
            }
        }
    }

    /// Ends what was left for later, since another load begins.
    fn end(&mut self) {
        if let Some(later) = self.later.take() {
            later.end();
        }
    }

    /// Continues what was left for later. Returns how long to wait before the next call.
    fn advance(&mut self, state: &State) -> Option<Duration> {
        if let Some(later) = &mut self.later {
            let wait = later.advance(state);
            if wait.is_none() {
                self.later = None;
            }
            return wait;
        }
        self.slots_then.map(|_| SLOT_POLL)
    }
}

/// Loads the list. `former` is what an earlier load has left.
fn load(state: &'static State, mut former: AfterLoad) -> AfterLoad {
    former.end();
    let before = state.phase();
    let reason = match state.load_is_requested() {
        true => Reason::OnDemand,
        false => Reason::Start,
    };
    state.begin_load();
    activity::report(b"loading".to_vec());
    let (outcome, later) = load::run(state, reason);
    let slots_then = (outcome == Outcome::NoSlot).then(slots::count_free);
    let (phase, result) = match outcome {
        Outcome::Completed => (Phase::Ended, LoadResult::Completed),
        Outcome::NoList => (Phase::Ended, LoadResult::NoList),
        Outcome::Suspended => (Phase::Suspended, LoadResult::Suspended),
        Outcome::Cancelled => (Phase::Cancelled, LoadResult::Cancelled),
        // Unless the list was loaded before, the load is retried: the dump in progress
        // may fail, and then the old list is still to be loaded.
        Outcome::InUse if before == Phase::Ended => (Phase::Ended, LoadResult::Failed),
        Outcome::NoSlot => (Phase::NoSlot, LoadResult::Failed),
        Outcome::InUse | Outcome::StillDue => (Phase::Failed, LoadResult::Failed),
    };
    activity::report_idle();
    state.end_load(phase, result);
    // It has waited for a slot for a whole interval, in which no list was written.
    if phase == Phase::NoSlot && may_dump(state) {
        try_dump(state, Unlogged::LeftOut);
    }
    AfterLoad { later, slots_then }
}

/// Whether a list is written at intervals.
fn may_dump(state: &State) -> bool {
    settings::autoprewarm_interval().is_some()
        && !matches!(state.phase(), Phase::Failed | Phase::Suspended)
}

/// Waits until no session dumps. At shutdown, such a session is most likely being
/// terminated as well, so that its list will not be completed.
fn wait_for_other_dumps(state: &State) {
    let since = Instant::now();
    while state.dump_file_user().is_some() && since.elapsed() < SHUTDOWN_TIMEOUT {
        latch::sleep_as_worker(Some(Duration::from_millis(10)), &wait_events::LEADER_MAIN);
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
