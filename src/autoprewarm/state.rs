//! What the leader, its workers and SQL callers share, and how they agree.
//!
//! The state lies in the server's shared memory from the first use until the
//! server stops or restarts after a crash, and begins anew then. It needs no
//! lock: each field is an atomic word of its own. Three of them hold the process ID
//! of whoever has a role that only one process may have; a process takes a role by
//! changing the word from nobody to itself, gives it back likewise, and gives back
//! all it has when it ends, so that no role outlives its holder.

use std::ffi::CStr;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicI64, AtomicU32};
use std::time::Duration;

use super::stats::{DumpStats, LastError, LoadResult, LoadStats};
use crate::pg::process::{self, latch};
use crate::pg::shared::contents::Shared;
use crate::pg::shared::named::NamedStruct;

/// Nobody's process ID.
const NOBODY: i32 = -1;

#[repr(C)]
pub struct State {
    leader: AtomicI32,
    dump_file_user: AtomicI32,
    /// Who asks for a load.
    load_requester: AtomicI32,
    /// There has been a leader since this state was made.
    had_leader: AtomicBool,
    /// Since when somebody waits for the first leader; 0 for nobody.
    awaited_since: AtomicI64,
    /// A [`Phase`].
    phase: AtomicU32,
    /// Somebody wants the list to be loaded after the load of the number before this
    /// one; whatever number it is, no load is wanted once another has begun.
    load_requested: AtomicU32,
    /// The number of the load that somebody wants to end; 0 for none.
    load_to_cancel: AtomicU32,
    pub load: LoadStats,
    pub dump: DumpStats,
    pub last_error: LastError,
}

// SAFETY: atomics only, each valid whatever its bits are but for the flags, into
// which only bools are stored.
unsafe impl Shared for State {}

impl Default for State {
    fn default() -> Self {
        Self {
            leader: AtomicI32::new(NOBODY),
            dump_file_user: AtomicI32::new(NOBODY),
            load_requester: AtomicI32::new(NOBODY),
            had_leader: AtomicBool::new(false),
            awaited_since: AtomicI64::new(0),
            phase: AtomicU32::new(Phase::Due as u32),
            load_requested: AtomicU32::new(0),
            load_to_cancel: AtomicU32::new(0),
            load: LoadStats::new(),
            dump: DumpStats::new(),
            last_error: LastError::new(),
        }
    }
}

/// How far the load of the list is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The first leader that comes is to load it.
    Due,
    Loading,
    /// It could not be loaded as things are, or its leader died: it is tried
    /// again from time to time, and not replaced before.
    Failed,
    /// Somebody cancelled the load, who may want the list later: it stays until
    /// the next dump that is asked for, or that an interval brings.
    Cancelled,
    /// There is nothing more to be had from it, so that it may be replaced.
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

/// Reserves the state's memory while the server starts.
pub fn reserve() {
    STATE.reserve();
}

impl State {
    /// The state, from now on with this process as one that may hold roles.
    pub fn attach() -> &'static Self {
        if let Some(state) = STATE.get_if_mapped() {
            return state;
        }
        let state = STATE.get();
        process::at_exit(|| {
            if let Some(state) = STATE.get_if_mapped() {
                let me = Some(process::my_pid());
                if [&state.leader, &state.load_requester]
                    .map(holder)
                    .contains(&me)
                {
                    // Whoever comes next is not to be told that a load is coming.
                    state.load_requested.store(0, SeqCst);
                }
                release(&state.leader);
                release(&state.dump_file_user);
                release(&state.load_requester);
            }
        });
        state
    }

    /// The leader's process ID, where there is one.
    pub fn leader(&self) -> Option<i32> {
        holder(&self.leader)
    }

    /// Whether the first leader may still come: there has been none, and it has not
    /// been waited for any longer than that, by all who waited for it.
    pub fn leader_may_come(&self, patience: Duration) -> bool {
        let now = process::monotonic_micros();
        let since = self
            .awaited_since
            .compare_exchange(0, now, SeqCst, SeqCst)
            .map_or_else(|since| since, |_| now);
        !self.had_leader.load(SeqCst) && i128::from(now - since) < patience.as_micros() as i128
    }

    /// Sets the leader's latch, where there is one.
    pub fn wake_leader(&self) {
        if let Some(pid) = self.leader() {
            latch::wake(pid);
        }
    }

    /// Makes this process the leader, until it ends. `Err` has the process ID of
    /// the leader that there is.
    pub fn become_leader(&self) -> Result<(), i32> {
        take(&self.leader)?;
        self.had_leader.store(true, SeqCst);
        // What a former leader had begun has ended with it.
        if self.phase() == Phase::Loading {
            self.end_load(Phase::Failed, LoadResult::Failed);
        }
        Ok(())
    }

    /// Reserves the dump file for this process. `Err` has the process ID of who
    /// uses it.
    pub fn use_dump_file(&self) -> Result<DumpFileInUse<'_>, i32> {
        take(&self.dump_file_user).map(|()| DumpFileInUse(self))
    }

    /// The process ID of who uses the dump file.
    pub fn dump_file_user(&self) -> Option<i32> {
        holder(&self.dump_file_user)
    }

    pub fn phase(&self) -> Phase {
        match self.phase.load(SeqCst) {
            0 => Phase::Due,
            1 => Phase::Loading,
            2 => Phase::Failed,
            3 => Phase::Cancelled,
            _ => Phase::Ended,
        }
    }

    /// A load begins. At no moment in between does it look as if none were wanted.
    pub fn begin_load(&self) {
        self.load.begin();
        self.phase.store(Phase::Loading as u32, SeqCst);
    }

    /// The load has ended like that, and what becomes of the list is `phase`.
    pub fn end_load(&self, phase: Phase, result: LoadResult) {
        self.load.end(result);
        self.phase.store(phase as u32, SeqCst);
    }

    /// A new list was written.
    pub fn list_was_replaced(&self) {
        let _ = self.phase.compare_exchange(
            Phase::Cancelled as u32,
            Phase::Ended as u32,
            SeqCst,
            SeqCst,
        );
    }

    /// The load was cut short in good order: the next leader may begin anew.
    pub fn postpone_load(&self) {
        self.phase.store(Phase::Due as u32, SeqCst);
    }

    /// Whether a load runs, or is about to be begun by a leader that is there.
    pub fn load_is_pending(&self) -> bool {
        self.leader().is_some()
            && (self.load_is_requested()
                || self.load.has_begun()
                || matches!(self.phase(), Phase::Due | Phase::Loading))
    }

    pub fn load_is_requested(&self) -> bool {
        self.load_requested.load(SeqCst) == self.load.number() + 1
    }

    /// Asks for a load; nothing where one runs or somebody has asked for one.
    pub fn request_load(&self) -> Option<LoadRequest<'_>> {
        take(&self.load_requester).ok()?;
        if self.load_is_pending() {
            release(&self.load_requester);
            return None;
        }
        // Loads have odd numbers. A leader that died may have left the last one open.
        let number = self.load.number();
        let request = LoadRequest(self, number + 1 + number % 2);
        request.repeat();
        Some(request)
    }

    /// Asks for the end of the load that runs, and of no later one, and returns its
    /// number; nothing where none does.
    pub fn request_cancel(&self) -> Option<u32> {
        if self.leader().is_none() || self.phase() != Phase::Loading {
            return None;
        }
        // After the phase, which changes later: so it is not the former load's.
        let number = self.load.number();
        self.load_to_cancel.store(number, SeqCst);
        self.wake_leader();
        Some(number)
    }

    pub fn cancel_is_requested(&self) -> bool {
        self.load_to_cancel.load(SeqCst) == self.load.number()
    }
}

/// The right to read or write the dump file; dropping it gives it back.
pub struct DumpFileInUse<'a>(&'a State);

impl Drop for DumpFileInUse<'_> {
    fn drop(&mut self) {
        release(&self.0.dump_file_user);
    }
}

/// The load of that number, which was asked for; dropping it withdraws that, if it has
/// not begun.
pub struct LoadRequest<'a>(&'a State, u32);

impl LoadRequest<'_> {
    /// Asks once more: a leader that ends takes what it was asked for with it.
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

fn holder(role: &AtomicI32) -> Option<i32> {
    Some(role.load(SeqCst)).filter(|&pid| pid != NOBODY)
}

fn take(role: &AtomicI32) -> Result<(), i32> {
    role.compare_exchange(NOBODY, process::my_pid(), SeqCst, SeqCst)
        .map(|_| ())
}

/// Gives a role back, if this process has it.
fn release(role: &AtomicI32) {
    let _ = role.compare_exchange(process::my_pid(), NOBODY, SeqCst, SeqCst);
}
