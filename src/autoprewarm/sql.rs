//! Autoprewarm's SQL functions.
//!
//! They work in a server that did not preload the library as well. All act on the
//! whole server, so that only superusers may call them until granted; waiting is
//! for whoever monitors, too.

use std::time::{Duration, Instant};

use pgrx::prelude::*;

use super::state::{Phase, State};
use super::{LEADER, dump};
use crate::error::Error;
use crate::pg::process::latch::{self, WaitEvent};
use crate::pg::process::report::{SUCCESS, report};
use crate::pg::shared::worker::Status;
use crate::settings;

/// How often a caller looks whether what it waits for has come about.
const POLL: Duration = Duration::from_millis(100);
const SHORT_POLL: Duration = Duration::from_millis(10);

/// How long a leader that the server is to start is waited for. It comes within
/// moments of the first connection, unless there was no slot left for it.
const LEADER_PATIENCE: Duration = Duration::from_secs(10);

/// Starts the leader, where none runs. It lasts until the server stops; where
/// the library was not preloaded, nobody starts it again then.
#[pg_extern(sql = r#"
CREATE FUNCTION autoprewarm_start_worker()
RETURNS void STRICT
AS 'MODULE_PATHNAME', 'autoprewarm_start_worker'
LANGUAGE C;
"#)]
fn autoprewarm_start_worker() {
    let state = State::attach();
    let started = match state.leader() {
        Some(pid) if settings::autoprewarm() => Err(Error::AlreadyRunning(pid)),
        _ => start_leader(state),
    };
    started.unwrap_or_else(|error| error.raise());
}

/// Returns when there is a leader, this one or another: who asks next whether a load is
/// pending is to hear of the one that it begins with.
fn start_leader(state: &State) -> Result<(), Error> {
    if !settings::autoprewarm() {
        return Err(Error::Disabled);
    }
    let leader = LEADER.start(0).ok_or(Error::NoWorkerSlot)?;
    if !leader.wait_until_started() {
        return Err(Error::WorkerNotStarted);
    }
    while state.leader().is_none() {
        if leader.status() == Status::Stopped {
            return Err(Error::WorkerNotStarted);
        }
        latch::sleep(Some(SHORT_POLL), WaitEvent::LeaderStart);
    }
    Ok(())
}

/// Writes the list of cached blocks now, those of unlogged relations included,
/// and returns how many records it has.
#[pg_extern(sql = r#"
CREATE FUNCTION autoprewarm_dump_now()
RETURNS pg_catalog.int8 STRICT
AS 'MODULE_PATHNAME', 'autoprewarm_dump_now'
LANGUAGE C;
"#)]
fn autoprewarm_dump_now() -> i64 {
    dump_now().unwrap_or_else(|error| error.raise())
}

fn dump_now() -> Result<i64, Error> {
    let state = State::attach();
    let _in_use = state.use_dump_file().map_err(Error::DumpFileInUse)?;
    let written = dump::write(dump::Unlogged::Included, state)?;
    report(PgLogLevel::DEBUG1, SUCCESS, &dump::describe(written), None);
    // Buffers are counted in 31 bits.
    Ok(written as i64)
}

/// Has the leader load the list now; starts a leader where there is none. Returns
/// when the load has begun.
#[pg_extern(sql = false)]
fn autoprewarm_load_now() {
    load_now().unwrap_or_else(|error| error.raise());
}

fn load_now() -> Result<(), Error> {
    let state = State::attach();
    if state.load_is_pending() {
        return Err(Error::LoadInProgress);
    }
    if let Some(pid) = state.dump_file_user() {
        return Err(Error::ListInUse(pid));
    }
    let request = state.request_load().ok_or(Error::LoadInProgress)?;
    while !request.is_granted() {
        if state.leader().is_none() {
            let started = start_leader(state);
            // One that somebody else started will do as well.
            if state.leader().is_none() {
                started?;
            }
        }
        request.repeat();
        state.wake_leader();
        latch::sleep(Some(SHORT_POLL), WaitEvent::LoadEnd);
    }
    Ok(())
}

/// Ends the load that runs or is about to, and returns when it has ended; false
/// where there is none. What is loaded stays.
#[pg_extern(sql = false)]
fn autoprewarm_cancel() -> bool {
    let state = State::attach();
    while state.load_is_pending() && state.phase() != Phase::Loading {
        latch::sleep(Some(SHORT_POLL), WaitEvent::LoadEnd);
    }
    let Some(number) = state.request_cancel() else {
        return false;
    };
    while state.load.number() == number
        && state.phase() == Phase::Loading
        && state.leader().is_some()
    {
        latch::sleep(Some(SHORT_POLL), WaitEvent::LoadEnd);
    }
    true
}

/// Waits until no load runs or is about to, and returns true; false where that
/// takes longer than the timeout. Without one, it waits for as long as it takes.
///
/// A load that failed is not waited for, though it may be tried again later.
#[pg_extern(sql = false)]
fn autoprewarm_wait(timeout: Option<Interval>) -> bool {
    wait(timeout).unwrap_or_else(|error| error.raise())
}

fn wait(timeout: Option<Interval>) -> Result<bool, Error> {
    let timeout = timeout.map(duration).transpose()?.flatten();
    let state = State::attach();
    let start = Instant::now();
    loop {
        let leader_is_coming =
            settings::leader_starts_with_server() && state.leader_may_come(LEADER_PATIENCE);
        if !leader_is_coming && !state.load_is_pending() {
            return Ok(true);
        }
        let left = timeout.map_or(POLL, |timeout| timeout.saturating_sub(start.elapsed()));
        if left.is_zero() {
            return Ok(false);
        }
        latch::sleep(Some(left.min(POLL)), WaitEvent::LoadEnd);
    }
}

/// How long a timeout is, with months of 30 days; nothing where it is longer than
/// any server lives.
fn duration(timeout: Interval) -> Result<Option<Duration>, Error> {
    const DAY: i128 = 24 * 60 * 60 * 1_000_000;
    let days = i128::from(timeout.months()) * 30 + i128::from(timeout.days());
    let micros = days * DAY + i128::from(timeout.micros());
    if micros < 0 {
        return Err(Error::NegativeTimeout);
    }
    Ok(u64::try_from(micros).ok().map(Duration::from_micros))
}
