//! What the leader, its workers and SQL callers share, and how they agree.
//!
//! The state lies in the server's shared memory from the first use until the
//! server stops or restarts after a crash, and begins anew then. It needs no
//! lock: each field is an atomic word of its own. Two of them hold the process ID
//! of whoever has a role that only one process may have; a process takes a role by
//! changing the word from nobody to itself, gives it back likewise, and gives back
//! all it has when it ends, so that no role outlives its holder.

use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicI32};

use crate::pg::process;
use crate::pg::shmem::{Shared, SharedStruct};

/// Nobody's process ID.
const NOBODY: i32 = -1;

pub struct State {
    leader: AtomicI32,
    dump_file_user: AtomicI32,
    /// A leader has set about loading the list since this state was made; and
    /// the load has come to its end, so that the list may be replaced.
    load_begun: AtomicBool,
    load_ended: AtomicBool,
}

// SAFETY: atomics only, each valid whatever its bits are but for the flags, into
// which only bools are stored.
unsafe impl Shared for State {
    const INITIAL: Self = Self {
        leader: AtomicI32::new(NOBODY),
        dump_file_user: AtomicI32::new(NOBODY),
        load_begun: AtomicBool::new(false),
        load_ended: AtomicBool::new(false),
    };
}

static STATE: SharedStruct<State> = SharedStruct::new(c"pg_prewarm");

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
                release(&state.leader);
                release(&state.dump_file_user);
            }
        });
        state
    }

    /// The leader's process ID, where there is one.
    pub fn leader(&self) -> Option<i32> {
        Some(self.leader.load(SeqCst)).filter(|&pid| pid != NOBODY)
    }

    /// Sets the leader's latch, where there is one.
    pub fn wake_leader(&self) {
        if let Some(pid) = self.leader() {
            process::wake(pid);
        }
    }

    /// Makes this process the leader, until it ends. `Err` has the process ID of
    /// the leader that there is.
    pub fn become_leader(&self) -> Result<(), i32> {
        take(&self.leader)
    }

    /// Reserves the dump file for this process. `Err` has the process ID of who
    /// uses it.
    pub fn use_dump_file(&self) -> Result<DumpFileInUse<'_>, i32> {
        take(&self.dump_file_user).map(|()| DumpFileInUse(self))
    }

    /// Whether the list is still to be loaded. The load ends once in the life of
    /// this state: after that, a load would only bring back what was dumped.
    pub fn load_is_due(&self) -> bool {
        !self.load_ended.load(SeqCst)
    }

    /// True for the first leader that asks. It is to load at once; one that comes
    /// after a leader that died in mid-load is not, lest it should die likewise
    /// and be started again and again.
    pub fn begin_load(&self) -> bool {
        !self.load_begun.swap(true, SeqCst)
    }

    /// The load has come to its end.
    pub fn end_load(&self) {
        self.load_ended.store(true, SeqCst);
    }

    /// The load was cut short in good order: the next leader may begin anew.
    pub fn postpone_load(&self) {
        self.load_begun.store(false, SeqCst);
    }
}

/// The right to read or write the dump file; dropping it gives it back.
pub struct DumpFileInUse<'a>(&'a State);

impl Drop for DumpFileInUse<'_> {
    fn drop(&mut self) {
        release(&self.0.dump_file_user);
    }
}

fn take(role: &AtomicI32) -> Result<(), i32> {
    role.compare_exchange(NOBODY, process::my_pid(), SeqCst, SeqCst)
        .map(|_| ())
}

/// Gives a role back, if this process has it.
fn release(role: &AtomicI32) {
    let _ = role.compare_exchange(process::my_pid(), NOBODY, SeqCst, SeqCst);
}
