//! The state that the leader, its workers and SQL callers share: roles, the phase of
//! the load, requests, and statistics.
//!
//! The state lies in the server's shared memory from its first use until the server
//! stops or restarts after a crash; then it is initialized again. Its fields are atomic,
//! except for the condition variable in [`HoldState`]. Some of them, and [`DumpFileUser`],
//! hold the process ID of the process with a role that only one may have. A process
//! acquires a role by changing the word from [`NO_PID`] to its own process ID, and
//! releases it by changing it back. At exit it releases all its roles.

use std::ffi::CStr;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicI64, AtomicU32};
use std::time::Duration;

use super::carry::CarryState;
use super::follow::state::{FollowState, Stage};
use super::hold::HoldState;
use super::role::{NO_PID, acquire, holder, release};
use super::stats::{DumpStats, LastError, LoadResult, LoadStats};
use crate::pg::process::error::Caught;
use crate::pg::process::{self, latch};
use crate::pg::shared::contents::Shared;
use crate::pg::shared::named::NamedStruct;

#[repr(C)]
pub struct State {
    leader: AtomicI32,
    /// The session that requests a load.
    load_requester: AtomicI32,
    /// Whether there has been a leader since the state was initialized.
    had_leader: AtomicBool,
    /// When a session began to wait for the first leader; 0 if none has.
    awaited_since: AtomicI64,
    /// A [`Phase`].
    phase: AtomicU32,
    /// The number of the load that a session requests; 0 means no request. The next
    /// load to begin gets this number, which fulfils the request.
    load_requested: AtomicU32,
    /// The number of the load that is to be cancelled; 0 means none.
    load_to_cancel: AtomicU32,
    pub carry: CarryState,
    pub hold: HoldState,
    pub load: LoadStats,
    pub dump: DumpStats,
    pub last_error: LastError,
    pub follow: FollowState,
}

// SAFETY: it consists of atomics and a condition variable, which may be shared. Every bit
// pattern is valid for the integers, and the flags are only ever written as bools.
unsafe impl Shared for State {}

impl Default for State {
    fn default() -> Self {
        Self {
            leader: AtomicI32::new(NO_PID),
            load_requester: AtomicI32::new(NO_PID),
            had_leader: AtomicBool::new(false),
            awaited_since: AtomicI64::new(0),
            phase: AtomicU32::new(Phase::Due as u32),
            load_requested: AtomicU32::new(0),
            load_to_cancel: AtomicU32::new(0),
            carry: CarryState::new(),
            hold: HoldState::new(),
            load: LoadStats::new(),
            dump: DumpStats::new(),
            last_error: LastError::new(),
            follow: FollowState::new(),
        }
    }
}

/// How far the load of the list has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The next leader loads the list when it starts.
    Due,
    Loading,
    /// The list could not be loaded, or the leader died during the load. The load is
    /// retried at intervals, and the list is not replaced before.
    Failed,
    /// The load had no background worker slot, and is retried when one is free. Dumps
    /// carry what is not loaded yet.
    NoSlot,
    /// The load was cancelled. The list may be wanted later, so it is not replaced
    /// at shutdown, but only by a dump at an interval or on request.
    Cancelled,
    /// The load was not begun, since the server has crashed during the last ones. The
    /// list is replaced only by a dump on request, and loaded on request.
    Suspended,
    /// The list has been loaded and may be replaced.
    Ended,
}

/// What the state is called in shared memory. The name has the library's version: if a
/// server uses two versions at the same time, neither reads the other's state.
const NAME: &CStr = match CStr::from_bytes_with_nul(
    concat!("pg_prewarm ", env!("CARGO_PKG_VERSION"), "\0").as_bytes(),
) {
    Ok(name) => name,
    Err(_) => unreachable!(),
};

static STATE: NamedStruct<State> = NamedStruct::new(NAME);

/// The process that uses the dump file. Unlike the state, it has the same name and layout
/// in all versions of the library, so that two of them never write the file at once.
#[repr(C)]
struct DumpFileUser(AtomicI32);

// SAFETY: it is an atomic integer, for which every bit pattern is valid.
unsafe impl Shared for DumpFileUser {}

impl Default for DumpFileUser {
    fn default() -> Self {
        Self(AtomicI32::new(NO_PID))
    }
}

static DUMP_FILE_USER: NamedStruct<DumpFileUser> = NamedStruct::new(c"pg_prewarm dump file");

/// Whether this process releases at its exit what it has acquired.
static IS_RELEASED_AT_EXIT: AtomicBool = AtomicBool::new(false);

/// Reserves shared memory for the state while the server starts.
pub fn reserve() {
    STATE.reserve();
    DUMP_FILE_USER.reserve();
}

impl State {
    /// The state. This process may acquire roles from now on: they are released at
    /// its exit.
    pub fn attach() -> &'static Self {
        // In an earlier call, an ERROR may have come before the handler was registered.
        if let (Some(state), true) = (STATE.get_if_mapped(), IS_RELEASED_AT_EXIT.load(SeqCst)) {
            return state;
        }
        let state = STATE.get();
        DUMP_FILE_USER.get();
        process::at_exit(|| {
            if let Some(user) = DUMP_FILE_USER.get_if_mapped() {
                release(&user.0);
            }
            if let Some(state) = STATE.get_if_mapped() {
                let me = Some(process::my_pid());
                if [&state.leader, &state.load_requester]
                    .map(holder)
                    .contains(&me)
                {
                    // Otherwise a load would seem to be pending as soon as the
                    // next leader starts.
                    state.load_requested.store(0, SeqCst);
                }
                if state.leader() == me {
                    state.hold.end();
                    state.follow.set_stage(Stage::Off);
                }
                state.hold.leave();
                release(&state.leader);
                release(&state.load_requester);
                state.follow.release_fetch();
                state.follow.end_wait();
            }
        });
        IS_RELEASED_AT_EXIT.store(true, SeqCst);
        state
    }

    /// The leader's process ID. `None` if no leader is running.
    pub fn leader(&self) -> Option<i32> {
        holder(&self.leader)
    }

    /// Whether the first leader may still start: there has been none, and less than
    /// `patience` has passed since the first session began to wait for it.
    pub fn first_leader_may_start(&self, patience: Duration) -> bool {
        let now = process::monotonic_micros();
        let since = self
            .awaited_since
            .compare_exchange(0, now, SeqCst, SeqCst)
            .map_or_else(|since| since, |_| now);
        !self.had_leader.load(SeqCst) && i128::from(now - since) < patience.as_micros() as i128
    }

    /// Whether the load that the server begins with may be running, or about to begin:
    /// there is a leader, or it may still start.
    pub fn first_load_may_run(&self, patience: Duration) -> bool {
        // In this order: it may start in between.
        self.first_leader_may_start(patience) || self.leader().is_some()
    }

    /// Sets the leader's latch, if a leader is running.
    pub fn wake_leader(&self) {
        if let Some(pid) = self.leader() {
            latch::wake(pid);
        }
    }

    /// Makes this process the leader until it exits. `Err` is the process ID of the
    /// leader that is already running.
    pub fn become_leader(&self) -> Result<(), i32> {
        acquire(&self.leader)?;
        self.had_leader.store(true, SeqCst);
        // A load that a former leader had begun has ended with that leader.
        if self.phase() == Phase::Loading {
            self.end_load(Phase::Failed, LoadResult::Failed);
        }
        Ok(())
    }

    /// Reserves the dump file for this process. `Err` is the process ID of the process
    /// that uses it.
    pub fn use_dump_file(&self) -> Result<DumpFileInUse, i32> {
        let user = &DUMP_FILE_USER.get().0;
        acquire(user).map(|()| DumpFileInUse(user))
    }

    /// The process ID of the process that uses the dump file. `None` if none does.
    pub fn dump_file_user(&self) -> Option<i32> {
        holder(&DUMP_FILE_USER.get().0)
    }

    pub fn phase(&self) -> Phase {
        match self.phase.load(SeqCst) {
            0 => Phase::Due,
            1 => Phase::Loading,
            2 => Phase::Failed,
            3 => Phase::NoSlot,
            4 => Phase::Cancelled,
            5 => Phase::Suspended,
            _ => Phase::Ended,
        }
    }

    /// Records that a load begins. [`Self::load_is_pending`] stays true in between, since
    /// it also looks at the number that is changed first.
    pub fn begin_load(&self) {
        self.load.begin();
        self.hold.load_begins();
        self.phase.store(Phase::Loading as u32, SeqCst);
    }

    /// Records that the load has ended with `result`. `phase` decides whether the list
    /// is kept.
    pub fn end_load(&self, phase: Phase, result: LoadResult) {
        self.load.end(result);
        self.phase.store(phase as u32, SeqCst);
        self.hold.end();
    }

    /// Records that a new list was written, so that the dump at shutdown may replace it.
    pub fn list_was_replaced(&self) {
        for former in [Phase::Cancelled, Phase::Suspended] {
            let _ = self
                .phase
                .compare_exchange(former as u32, Phase::Ended as u32, SeqCst, SeqCst);
        }
    }

    /// Logs an ERROR that a worker or the leader has survived as a WARNING, and keeps it as
    /// the last error.
    pub fn warn(&self, caught: Caught) {
        self.last_error.record(&caught.message);
        caught.warn();
    }

    /// Records that the leader exits before the load has completed: the next leader
    /// starts the load again.
    pub fn postpone_load(&self) {
        self.phase.store(Phase::Due as u32, SeqCst);
    }

    /// Whether the running leader is loading, or is about to.
    pub fn load_is_pending(&self) -> bool {
        self.leader().is_some()
            && (self.load_is_requested()
                || self.follow.promotion_is_due()
                || self.follow.list_waits()
                || self.load.has_begun()
                || matches!(self.phase(), Phase::Due | Phase::Loading))
    }

    pub fn load_is_requested(&self) -> bool {
        self.load_requested.load(SeqCst) == self.load.number() + 1
    }

    /// Requests a load. `None` if one is running or has been requested.
    pub fn request_load(&self) -> Option<LoadRequest<'_>> {
        acquire(&self.load_requester).ok()?;
        if self.load_is_pending() {
            release(&self.load_requester);
            return None;
        }
        // A running load has an odd number. If its leader died, that is still the
        // number; the next leader ends that load before it begins this one.
        let number = self.load.number();
        let request = LoadRequest(self, number + 1 + number % 2);
        request.repeat();
        Some(request)
    }

    /// Requests that the running load, and no later one, be cancelled, and returns its
    /// number. `None` if no load is running.
    pub fn request_cancel(&self) -> Option<u32> {
        if self.leader().is_none() || self.phase() != Phase::Loading {
            return None;
        }
        // The number changes before the phase does. Since the phase was read first,
        // this is not the number of an earlier load.
        let number = self.load.number();
        self.load_to_cancel.store(number, SeqCst);
        self.wake_leader();
        Some(number)
    }

    pub fn cancel_is_requested(&self) -> bool {
        self.load_to_cancel.load(SeqCst) == self.load.number()
    }
}

/// Reserves the dump file for this process, until it is dropped.
pub struct DumpFileInUse(&'static AtomicI32);

impl Drop for DumpFileInUse {
    fn drop(&mut self) {
        release(self.0);
    }
}

/// The request for the load of the given number. Dropping it withdraws the request,
/// unless the load has begun.
pub struct LoadRequest<'a>(&'a State, u32);

impl LoadRequest<'_> {
    /// Requests the load again, since a leader that exits clears the request.
    pub fn repeat(&self) {
        self.0.load_requested.store(self.1, SeqCst);
    }

    /// Whether the load has begun.
    pub fn is_granted(&self) -> bool {
        self.0.load.number() >= self.1
    }
}

impl Drop for LoadRequest<'_> {
    fn drop(&mut self) {
        self.0.load_requested.store(0, SeqCst);
        release(&self.0.load_requester);
    }
}
