//! Transactions of background workers.

use pgrx::pg_sys;

use super::error::{Caught, catch};

/// Runs `body` in a transaction of its own. An ERROR in it aborts the
/// transaction, which lets go of every lock, pin, snapshot and file that it
/// held, and becomes an `Err`.
///
/// For background workers only, which have no transaction of a client's open.
pub fn run<T>(body: impl FnOnce() -> T) -> Result<T, Caught> {
    let result = catch(|| {
        // SAFETY: background workers come here with no transaction open.
        unsafe {
            pg_sys::SetCurrentStatementStartTimestamp();
            pg_sys::StartTransactionCommand();
        }
        let value = body();
        // SAFETY: the transaction started above is open.
        unsafe { pg_sys::CommitTransactionCommand() };
        value
    });
    if result.is_err() {
        // SAFETY: whatever state the ERROR left the transaction in, aborting it
        // is what PostgreSQL's own error handlers do next.
        unsafe { pg_sys::AbortCurrentTransaction() };
    }
    result
}

/// Lets go of the snapshot that looking at catalogs has left behind, which
/// would hold back `xmin` for as long as the transaction goes on.
pub fn release_catalog_snapshot() {
    // SAFETY: it drops a cached snapshot, where there is one, and nothing else.
    unsafe { pg_sys::InvalidateCatalogSnapshot() };
}
