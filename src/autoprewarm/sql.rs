//! Autoprewarm's control functions in SQL: start the leader, dump, load, cancel, wait.
//!
//! They also work in a server that has not preloaded the library. They act on the
//! whole server, so they are superuser-only by default; members of `pg_monitor` may
//! call `autoprewarm_wait()`.

use std::time::{Duration, Instant};

use pgrx::prelude::*;

use super::state::{Phase, State};
use super::{LEADER, dump, mark};
use crate::error::Error;
use crate::pg::process::latch;
use crate::pg::process::report::{Message, SUCCESS, report};
use crate::pg::shared::worker::Status;
use crate::{settings, wait_events};

/// How often a waiting caller checks the state.
const POLL: Duration = Duration::from_millis(100);
const SHORT_POLL: Duration = Duration::from_millis(10);

/// How long to wait for the leader that the server starts. It starts about when the
/// first connections are accepted, unless there is no background worker slot for it.
const LEADER_TIMEOUT: Duration = Duration::from_secs(10);

/// Starts the leader, if none is running. It runs until the server stops. If the
/// library is not preloaded, the next start of the server does not start it.
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

/// Starts a leader, and returns when there is one, be it another. From then on, the
/// load that the leader begins with counts as pending.
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
        latch::sleep(Some(SHORT_POLL), &wait_events::LEADER_START);
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
    // Former crashes do not count against a new list.
    mark::forget(&mark::LOADS);
    let message = dump::describe(written);
    report(PgLogLevel::DEBUG1, Message::new(SUCCESS, &message));
    // The number of buffers fits into 31 bits.
    Ok(written as i64)
}

/// Has the leader load the list now, and starts a leader if none is running. Returns
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
            // A leader that another session has started will do as well.
            if state.leader().is_none() {
                started?;
            }
        }
        request.repeat();
        state.wake_leader();
        latch::sleep(Some(SHORT_POLL), &wait_events::LOAD_END);
    }
    Ok(())
}

/// Cancels the load that is pending or running, and returns true when it has ended;
/// false if there is none. Blocks loaded so far stay in shared buffers.
#[pg_extern(sql = false)]
fn autoprewarm_cancel() -> bool {
    let state = State::attach();
    while state.load_is_pending() && state.phase() != Phase::Loading {
        latch::sleep(Some(SHORT_POLL), &wait_events::LOAD_END);
    }
    let Some(number) = state.request_cancel() else {
        return false;
    };
    // A running load has an odd number, which changes at its end, and then the phase does.
    // The next load to begin has the next odd number.
    while state.load.number() <= number + number % 2
        && state.phase() == Phase::Loading
        && state.leader().is_some()
    {
        latch::sleep(Some(SHORT_POLL), &wait_events::LOAD_END);
    }
    true
}

/// Waits until no load is pending or running, and returns true; false when the
/// timeout expires. Without a timeout, it waits without limit.
///
/// It does not wait for a failed load to be retried.
#[pg_extern(sql = false)]
fn autoprewarm_wait(timeout: Option<Interval>) -> bool {
    wait(timeout).unwrap_or_else(|error| error.raise())
}

fn wait(timeout: Option<Interval>) -> Result<bool, Error> {
    let timeout = timeout
        .map(|timeout| duration(timeout, "timeout"))
        .transpose()?
        .flatten();
    let state = State::attach();
    let start = Instant::now();
    loop {
        if !leader_is_coming(state) && !state.load_is_pending() {
            return Ok(true);
        }
        let left = timeout.map_or(POLL, |timeout| timeout.saturating_sub(start.elapsed()));
        if left.is_zero() {
            return Ok(false);
        }
        latch::sleep(Some(left.min(POLL)), &wait_events::LOAD_END);
    }
}

/// Whether the leader that the server starts may still come: for ten seconds from when the
/// first session waits for it.
pub(super) fn leader_is_coming(state: &State) -> bool {
    settings::leader_starts_with_server() && state.first_leader_may_start(LEADER_TIMEOUT)
}

/// The length of the interval that the argument of that name has, with months of 30 days.
/// `None` if it is too long to be represented, which is as good as no limit.
pub(super) fn duration(interval: Interval, name: &'static str) -> Result<Option<Duration>, Error> {
    const DAY: i128 = 24 * 60 * 60 * 1_000_000;
    let days = i128::from(interval.months()) * 30 + i128::from(interval.days());
    let micros = days * DAY + i128::from(interval.micros());
    if micros < 0 {
        return Err(Error::NegativeInterval(name));
    }
    Ok(u64::try_from(micros).ok().map(Duration::from_micros))
}
