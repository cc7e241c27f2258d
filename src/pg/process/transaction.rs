//! Transactions, as values: what reads catalogs or locks relations must be given one.

use std::marker::PhantomData;

use pgrx::pg_sys;

use super::error::{Caught, catch};

/// An open transaction. What borrows it cannot outlive it.
pub struct Transaction(PhantomData<*const ()>);

impl Transaction {
    /// The transaction in which the server runs an SQL function, a parallel worker, or the
    /// hook for new sessions.
    ///
    /// # Safety
    /// The caller is one of these functions, or is called by one, and does not use this
    /// after it has returned.
    pub unsafe fn current<'a>() -> &'a Self {
        &Self(PhantomData)
    }

    /// Drops the snapshot that reading catalogs has left behind. It would hold back
    /// `xmin` for as long as the transaction is open.
    pub fn release_catalog_snapshot(&self) {
        // SAFETY: it drops a cached snapshot, if there is one, which nothing else uses.
        unsafe { pg_sys::InvalidateCatalogSnapshot() };
    }
}

impl Transaction {
    /// Runs `body` in a subtransaction. An ERROR rolls that back, and is returned.
    pub fn attempt<T>(&self, body: impl FnOnce() -> T) -> Result<T, Caught> {
        // SAFETY: a transaction is open. The calls are those of the server's own procedural
        // languages, which go on in the former memory context and resource owner.
        unsafe {
            let (context, owner) = (pg_sys::CurrentMemoryContext, pg_sys::CurrentResourceOwner);
            pg_sys::BeginInternalSubTransaction(std::ptr::null());
            let result = catch(body);
            match result {
                Ok(_) => pg_sys::ReleaseCurrentSubTransaction(),
                Err(_) => pg_sys::RollbackAndReleaseCurrentSubTransaction(),
            }
            pg_sys::MemoryContextSwitchTo(context);
            pg_sys::CurrentResourceOwner = owner;
            result
        }
    }
}

/// Runs `body` in a new transaction. An ERROR aborts the transaction, which releases
/// every lock, pin, snapshot and file that it held, and is returned.
///
/// For background workers only, which are in no transaction of a client.
pub fn run<T>(body: impl FnOnce(&Transaction) -> T) -> Result<T, Caught> {
    let result = catch(|| {
        // SAFETY: background workers call this with no transaction open.
        unsafe {
            pg_sys::SetCurrentStatementStartTimestamp();
            pg_sys::StartTransactionCommand();
        }
        let value = body(&Transaction(PhantomData));
        // SAFETY: the transaction that was started above is open.
        unsafe { pg_sys::CommitTransactionCommand() };
        value
    });
    if result.is_err() {
        // SAFETY: PostgreSQL's own main loops do this after an ERROR, whatever state it
        // has left the transaction in.
        unsafe { pg_sys::AbortCurrentTransaction() };
    }
    result
}
