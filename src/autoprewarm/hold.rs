//! Holding new sessions while the first tier of the server's first load runs, or that of the
//! load after a promotion, for no longer than `pg_prewarm.autoprewarm_hold_connections`.
//!
//! Clients that find nothing in shared buffers are slow, and make the load slow: both need
//! the same processors and disks. Together, clients that wait for the blocks used most and
//! a load without clients take less time.
//!
//! A session waits after its client was authenticated, in the server's hook for that. It
//! holds no snapshot and no lock, and leaves those connections free that are reserved for
//! superusers. It waits for a condition variable, which the leader broadcasts when the first
//! tier is loaded, when the load ends, and at its exit; and it looks at the clock itself, so
//! that it waits no longer than allowed, and not for a load that has run for as long, or has
//! been waited for, whatever the leader does.

use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32};
use std::time::{Duration, Instant};

use super::state::State;
use crate::pg::process::authentication::NewSession;
use crate::pg::process::{self, activity, postmaster};
use crate::pg::shared::condition_variable::ConditionVariable;
use crate::{settings, wait_events};

/// How long to wait for the first leader, which the server starts when it accepts
/// connections.
const LEADER_TIMEOUT: Duration = Duration::from_secs(2);

/// How often a session looks at the setting and the clock.
const POLL: Duration = Duration::from_millis(250);

/// How much of `authentication_timeout` is left to the rest of the authentication.
const RESERVE: Duration = Duration::from_millis(500);

#[repr(C)]
pub struct HoldState {
    /// Whether no session is held any more.
    is_over: AtomicBool,
    /// When the load began, or when the first session waited for that, as microseconds of the
    /// clock that all processes read alike; 0 if neither has happened.
    load_begun: AtomicI64,
    /// How many sessions are waiting.
    held: AtomicU32,
    changed: ConditionVariable,
}

/// Whether this process is one that is counted in [`HoldState::held`].
static IS_HELD: AtomicBool = AtomicBool::new(false);

impl HoldState {
    pub fn new() -> Self {
        Self {
            is_over: AtomicBool::new(false),
            load_begun: AtomicI64::new(0),
            held: AtomicU32::new(0),
            changed: ConditionVariable::new(),
        }
    }

    /// Holds new sessions again: another load has begun for which they are to wait.
    pub fn begin(&self) {
        self.is_over.store(false, SeqCst);
    }

    /// Records that a load begins. If sessions have waited for that for as long as they may,
    /// none waits for the load itself.
    pub fn load_begins(&self) {
        let limit = settings::autoprewarm_hold_connections();
        if !limit.is_zero() && self.load_time() >= limit {
            self.end();
        }
        self.load_begun.store(process::monotonic_micros(), SeqCst);
    }

    /// How long the load has run, or sessions have waited for it to begin.
    pub fn load_time(&self) -> Duration {
        match self.load_begun.load(SeqCst) {
            0 => Duration::ZERO,
            begun => {
                let micros = process::monotonic_micros() - begun;
                Duration::from_micros(u64::try_from(micros).unwrap_or(0))
            }
        }
    }

    /// Lets all sessions go on, and holds none from now on.
    pub fn end(&self) {
        if !self.is_over.swap(true, SeqCst) {
            self.changed.broadcast();
        }
    }

    /// Whether no session is held any more.
    pub fn is_over(&self) -> bool {
        self.is_over.load(SeqCst)
    }

    /// How many sessions are waiting.
    pub fn held(&self) -> u32 {
        self.held.load(SeqCst)
    }

    fn enter(&self) {
        IS_HELD.store(true, Relaxed);
        self.held.fetch_add(1, SeqCst);
        let now = process::monotonic_micros();
        // Only if it is 0.
        let _ = self.load_begun.compare_exchange(0, now, SeqCst, SeqCst);
    }

    /// Stops counting this process, if it is counted: after its wait, and at its exit.
    pub fn leave(&self) {
        if IS_HELD.swap(false, Relaxed) {
            self.held.fetch_sub(1, SeqCst);
        }
    }
}

/// Whether new sessions may have to wait. Raises no ERROR.
pub fn is_possible() -> bool {
    !settings::autoprewarm_hold_connections().is_zero() && settings::leader_starts_with_server()
}

/// How long a session may wait at most, so that no timeout of the server ends it.
fn longest_wait(session: &NewSession) -> Duration {
    // All of the session's start is in one transaction, and reads catalogs.
    let in_transaction = session.transaction_time_left() / 2;
    let for_client = session.authentication_time_left().saturating_sub(RESERVE);
    in_transaction.min(for_client)
}

/// Has a new session wait, if it should. An ERROR refuses the session: if its wait is
/// cancelled, or memory is short meanwhile.
pub fn hold(session: &NewSession) {
    if session.is_walsender() {
        return;
    }
    let state = session.attempt(|| {
        let state = State::attach();
        // Without an unreserved connection, the server refuses the session, or lets it in as
        // one that may use the reserved ones.
        let waits =
            !state.hold.is_over() && session.has_unreserved_connection() && !session.may_monitor();
        if waits {
            wait_events::HOLD_CONNECTIONS.look_up();
        }
        waits.then_some(state)
    });
    let state = match state {
        Ok(Some(state)) => state,
        Ok(None) => return,
        // No session is refused for that.
        Err(caught) => return caught.warn(),
    };
    let hold = &state.hold;
    let start = Instant::now();
    let longest = longest_wait(session);
    session.without_snapshot(|| {
        hold.enter();
        activity::report_title(c"waiting for autoprewarm");
        hold.changed.wait(&wait_events::HOLD_CONNECTIONS, || {
            // This resets the latch, so it comes before the looks at what may have set it.
            let is_wanted = session.is_connected();
            process::reload_configuration_if_due();
            let limit = settings::autoprewarm_hold_connections();
            let waited = start.elapsed();
            let left = limit
                .saturating_sub(waited.max(hold.load_time()))
                .min(longest.saturating_sub(waited));
            let goes_on = is_wanted
                && !hold.is_over()
                && state.first_load_may_run(LEADER_TIMEOUT)
                && !postmaster::is_stopping();
            (goes_on && !left.is_zero()).then(|| left.min(POLL))
        });
        hold.leave();
    });
}
