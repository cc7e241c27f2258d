//! Waiting for locks in a background worker, for a limited time.

use std::time::Duration;

use pgrx::pg_sys;

use super::error::Caught;
use crate::pg::sys::signal::{self, set_handler};

/// Runs `body`, in which no lock is waited for longer than `timeout`: after that, the
/// server raises an ERROR, of which [`Caught::is_lock_timeout`] is true. So it does if
/// the wait is interrupted by [`crate::pg::shared::worker::Handle::interrupt`].
///
/// For workers only, which ignore SIGINT otherwise.
pub fn limit<T>(timeout: Duration, body: impl FnOnce() -> Result<T, Caught>) -> Result<T, Caught> {
    let milliseconds = i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX);
    // SAFETY: PostgreSQL's own handler, which only sets flags and the latch. The timeout
    // is a word of this process, which the server reads when it begins to wait.
    unsafe {
        // The server's timer sends SIGINT to this process.
        set_handler(libc::SIGINT, signal::StatementCancelHandler);
        (&raw mut pg_sys::LockTimeout).write(milliseconds.max(1));
    }
    let result = body();
    // SAFETY: a handler that does nothing, and words of this process.
    unsafe {
        (&raw mut pg_sys::LockTimeout).write(0);
        set_handler(libc::SIGINT, signal::ignore_signal);
        // The signal may have come when the wait was over. Nothing else is to be
        // cancelled by it.
        (&raw mut pg_sys::QueryCancelPending).write_volatile(0);
    }
    result
}
