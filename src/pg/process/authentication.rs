//! New sessions: a function that the server calls for each client that it has
//! authenticated, before the client can do anything.
//!
//! The server has begun a transaction by then, in which shared catalogs can be read, but it
//! is not connected to a database yet. Up to 17 it has taken a snapshot.

use std::ffi::c_int;
use std::sync::OnceLock;
use std::time::Duration;

use pgrx::{pg_guard, pg_sys};

use super::error::Caught;
use super::reserve::{self, with_reserve};
use super::transaction::Transaction;
use super::{is_walsender, now};
use crate::pg::sys::authentication::{
    ClientAuthentication_hook, Hook, Port, STATUS_OK, authentication_deadline, client_is_connected,
    leaves_reserved_connections, transaction_deadline,
};

/// A session whose client was authenticated.
pub struct NewSession<'a> {
    port: &'a Port,
    transaction: &'a Transaction,
}

struct Installed {
    /// Whether the callback may be needed. Raises no ERROR.
    is_needed: fn() -> bool,
    callback: fn(&NewSession),
    /// The function that was in the hook before.
    previous: Option<Hook>,
}

static INSTALLED: OnceLock<Installed> = OnceLock::new();

/// Has `callback` called for each new session of the server for which `is_needed`, which
/// raises no ERROR. For `_PG_init` of a preloaded library. The callback may wait, and an
/// ERROR of it refuses the session. It is not called if there is no memory for reporting an
/// ERROR.
pub fn call_for_each_session(is_needed: fn() -> bool, callback: fn(&NewSession)) {
    #[expect(
        ffi_unwind_calls,
        reason = "an ERROR jumps over this frame to PostgreSQL, and nothing in it needs dropping"
    )]
    unsafe extern "C-unwind" fn call(port: *mut Port, status: c_int) {
        let Some(installed) = INSTALLED.get() else {
            return;
        };
        if let Some(previous) = installed.previous {
            // SAFETY: another library has put it into the hook, for what the server passes.
            unsafe { previous(port, status) };
        }
        if status == STATUS_OK && (installed.is_needed)() && reserve::keep() {
            // SAFETY: the server calls this function directly, and nothing in its frame needs
            // dropping.
            unsafe { with_reserve(|| call_guarded(port)) };
            reserve::give_up();
        }
    }

    #[pg_guard]
    unsafe extern "C-unwind" fn call_guarded(port: *mut Port) {
        let Some(installed) = INSTALLED.get() else {
            return;
        };
        // SAFETY: the server calls the hook in a transaction, and does not change the port
        // meanwhile.
        unsafe {
            (installed.callback)(&NewSession {
                port: &*port,
                transaction: Transaction::current(),
            });
        }
    }

    // SAFETY: the postmaster has one thread, and calls the hook only later, in its children.
    let previous = unsafe { ClientAuthentication_hook };
    let installed = Installed {
        is_needed,
        callback,
        previous,
    };
    if INSTALLED.set(installed).is_ok() {
        // SAFETY: the postmaster has one thread, and calls the hook only later, in its
        // children.
        unsafe { ClientAuthentication_hook = Some(call) };
    }
}

fn time_left(deadline: Option<pg_sys::TimestampTz>) -> Duration {
    deadline.map_or(Duration::MAX, |deadline| {
        Duration::from_micros(u64::try_from(deadline - now()).unwrap_or(0))
    })
}

impl NewSession<'_> {
    /// Whether it is a replication connection.
    pub fn is_walsender(&self) -> bool {
        is_walsender()
    }

    /// Whether its role is a superuser, or a member of `pg_monitor`, or does not exist, so that
    /// the session is about to fail. May raise an ERROR.
    pub fn may_monitor(&self) -> bool {
        // SAFETY: `self` has an open transaction, and the name is a C string.
        unsafe {
            let role = pg_sys::get_role_oid(self.port.user_name().as_ptr(), true);
            let monitor = pg_sys::ROLE_PG_MONITOR.into();
            let may_monitor = role == pg_sys::InvalidOid
                || pg_sys::superuser_arg(role)
                || pg_sys::is_member_of_role(role, monitor);
            // The server keeps the roles that it has found. They are not those of a database,
            // and it does not hear of changes yet: so it has to look again later.
            pg_sys::is_member_of_role(pg_sys::InvalidOid, monitor);
            may_monitor
        }
    }

    /// Runs `body`, and undoes what it did if it raises an ERROR, which is returned.
    pub fn attempt<T>(&self, body: impl FnOnce() -> T) -> Result<T, Caught> {
        self.transaction.attempt(body)
    }

    /// Whether it has a connection that is not reserved for superusers: as many as those are
    /// free besides.
    pub fn has_unreserved_connection(&self) -> bool {
        leaves_reserved_connections()
    }

    /// Whether its client is still there. Resets this process's latch.
    pub fn is_connected(&self) -> bool {
        client_is_connected()
    }

    /// How long it may still take before `authentication_timeout` ends it.
    pub fn authentication_time_left(&self) -> Duration {
        time_left(authentication_deadline())
    }

    /// How long it may still take before `transaction_timeout` ends it.
    pub fn transaction_time_left(&self) -> Duration {
        time_left(transaction_deadline())
    }

    /// Runs `wait` without the snapshot that the server has taken, if it has: it would hold
    /// back `xmin`. It is taken again after that.
    pub fn without_snapshot(&self, wait: impl FnOnce()) {
        // SAFETY: `self` has an open transaction, and the entry is this process's own. No
        // snapshot is active or registered, so the server forgets `xmin` with the last one
        // that is popped.
        let had_snapshot = unsafe {
            let had_snapshot = (*pg_sys::MyProc).xmin != pg_sys::InvalidTransactionId;
            if had_snapshot {
                pg_sys::PushActiveSnapshot(pg_sys::GetTransactionSnapshot());
                pg_sys::PopActiveSnapshot();
            }
            pg_sys::InvalidateCatalogSnapshot();
            had_snapshot
        };
        wait();
        if had_snapshot {
            // SAFETY: `self` has an open transaction.
            unsafe { pg_sys::GetTransactionSnapshot() };
        }
    }
}
