//! Waiting for locks in a background worker, for a limited time.

use std::time::Duration;

use pgrx::pg_sys;

use super::background;
use super::error::Caught;

/// Runs `body`, in which no lock is waited for longer than `timeout`: after that, the
/// server raises an ERROR, of which [`Caught::is_lock_timeout`] is true. So it does if
/// the wait is interrupted by [`crate::pg::shared::worker::Handle::interrupt`].
///
/// For workers only, which ignore SIGINT otherwise.
pub fn limit<T>(timeout: Duration, body: impl FnOnce() -> Result<T, Caught>) -> Result<T, Caught> {
    let milliseconds = i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX);
    let set = |milliseconds: i32| {
        // SAFETY: a word of this process, which the server reads when it begins to wait.
        unsafe { (&raw mut pg_sys::LockTimeout).write(milliseconds) };
    };
    // The server's timer sends SIGINT to this process.
    background::run_cancellable(|| {
        set(milliseconds.max(1));
        let result = body();
        set(0);
        result
    })
}
