//! Small differences between major versions: names, constants, and functions that
//! have changed their arguments.

use std::ffi::{CStr, c_int};

use pgrx::pg_sys;

use crate::blocks::{Fork, Oid, Record};

/// Settings that are meant for sessions, and the values that background workers of
/// ours have instead.
pub const SESSION_SETTINGS: &[(&CStr, &CStr)] = &[
    (c"statement_timeout", c"0"),
    (c"lock_timeout", c"0"),
    (c"log_lock_waits", c"off"),
    (c"idle_in_transaction_session_timeout", c"0"),
    #[cfg(not(any(feature = "pg15", feature = "pg16")))]
    (c"transaction_timeout", c"0"),
    (c"zero_damaged_pages", c"false"),
    (c"exit_on_error", c"false"),
];

/// The flag of a background worker that `CREATE`, `ALTER` and `DROP DATABASE` may
/// terminate. 0 before 19, which have no such workers.
pub const BGWORKER_INTERRUPTIBLE: u32 = {
    #[cfg(any(feature = "pg15", feature = "pg16", feature = "pg17", feature = "pg18"))]
    {
        0
    }
    #[cfg(not(any(feature = "pg15", feature = "pg16", feature = "pg17", feature = "pg18")))]
    {
        pg_sys::BGWORKER_INTERRUPTIBLE
    }
};

/// The backend of relations that are not temporary: `InvalidBackendId`, from 17 on
/// `INVALID_PROC_NUMBER`. Another number is that of the session that has a temporary one.
pub const NO_BACKEND: i32 = -1;

/// The physical identity of a relation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Locator {
    pub database: Oid,
    pub tablespace: Oid,
    pub filenumber: Oid,
}

/// The file that a relation has now.
///
/// # Safety
/// `relation` is open.
pub unsafe fn locator(relation: pg_sys::Relation) -> Locator {
    // SAFETY: the entry of an open relation is there, with its locator.
    #[cfg(feature = "pg15")]
    let (database, tablespace, filenumber) = unsafe {
        let node = (*relation).rd_node;
        (node.dbNode, node.spcNode, node.relNode)
    };
    // SAFETY: the entry of an open relation is there, with its locator.
    #[cfg(not(feature = "pg15"))]
    let (database, tablespace, filenumber) = unsafe {
        let locator = (*relation).rd_locator;
        (locator.dbOid, locator.spcOid, locator.relNumber)
    };
    Locator {
        database: database.to_u32(),
        tablespace: tablespace.to_u32(),
        filenumber: filenumber.to_u32(),
    }
}

/// The path of a fork's first segment file, relative to the data directory.
///
/// # Safety
/// `relation` is open.
pub unsafe fn path(relation: pg_sys::Relation, fork: Fork) -> String {
    // SAFETY: the relation is open.
    let (locator, backend) = unsafe { (locator(relation), (*relation).rd_backend) };
    path_of(locator, backend, fork)
}

/// The path of the first segment file of a fork of a relation that is not temporary.
pub fn permanent_path(locator: Locator, fork: Fork) -> String {
    path_of(locator, NO_BACKEND, fork)
}

fn path_of(locator: Locator, backend: i32, fork: Fork) -> String {
    // SAFETY: it takes any numbers. The path is copied before the server's is freed.
    unsafe {
        let path = pg_sys::GetRelationPath(
            locator.database.into(),
            locator.tablespace.into(),
            locator.filenumber.into(),
            backend,
            fork as i32,
        );
        #[cfg(any(feature = "pg15", feature = "pg16", feature = "pg17"))]
        {
            let copy = CStr::from_ptr(path).to_string_lossy().into_owned();
            pg_sys::pfree(path.cast());
            copy
        }
        #[cfg(not(any(feature = "pg15", feature = "pg16", feature = "pg17")))]
        CStr::from_ptr(path.str_.as_ptr())
            .to_string_lossy()
            .into_owned()
    }
}

/// The block that a buffer's tag names.
pub fn record(tag: &pg_sys::BufferTag) -> Record {
    #[cfg(feature = "pg15")]
    let (database, tablespace, filenumber) =
        (tag.rnode.dbNode, tag.rnode.spcNode, tag.rnode.relNode);
    #[cfg(not(feature = "pg15"))]
    let (database, tablespace, filenumber) = (tag.dbOid, tag.spcOid, tag.relNumber);
    Record {
        database: database.to_u32(),
        tablespace: tablespace.to_u32(),
        filenumber: filenumber.to_u32(),
        fork: tag.forkNum as u32,
        block: tag.blockNum,
    }
}

/// Whether the list of free buffers is empty, read without a lock. `None` on 19, which
/// has no such list.
pub fn free_list_is_empty() -> Option<bool> {
    #[cfg(any(feature = "pg15", feature = "pg16", feature = "pg17", feature = "pg18"))]
    {
        unsafe extern "C" {
            fn have_free_buffer() -> bool;
        }
        // SAFETY: it reads one word of shared memory, and raises no ERROR.
        Some(unsafe { !have_free_buffer() })
    }
    #[cfg(not(any(feature = "pg15", feature = "pg16", feature = "pg17", feature = "pg18")))]
    None
}

/// Takes the share lock on the content of a buffer.
///
/// # Safety
/// This process has pinned the buffer, and has not locked it.
pub unsafe fn share_lock_buffer(buffer: pg_sys::Buffer) {
    // SAFETY: the buffer is pinned and not locked.
    unsafe {
        #[cfg(any(feature = "pg15", feature = "pg16", feature = "pg17", feature = "pg18"))]
        pg_sys::LockBuffer(buffer, pg_sys::BUFFER_LOCK_SHARE as i32);
        #[cfg(not(any(feature = "pg15", feature = "pg16", feature = "pg17", feature = "pg18")))]
        pg_sys::LockBufferInternal(buffer, pg_sys::BufferLockMode::BUFFER_LOCK_SHARE);
    }
}

/// Releases the lock on the content of a buffer.
///
/// # Safety
/// This process has pinned and locked the buffer.
pub unsafe fn unlock_buffer(buffer: pg_sys::Buffer) {
    // SAFETY: the buffer is pinned and locked.
    unsafe {
        #[cfg(any(feature = "pg15", feature = "pg16", feature = "pg17", feature = "pg18"))]
        pg_sys::LockBuffer(buffer, pg_sys::BUFFER_LOCK_UNLOCK as i32);
        #[cfg(not(any(feature = "pg15", feature = "pg16", feature = "pg17", feature = "pg18")))]
        pg_sys::UnlockBuffer(buffer);
    }
}

/// The number of the wait event of that name. The number that all extensions have in
/// common on 15 and 16, and if the server has no more numbers to give.
pub fn wait_event(name: &CStr) -> u32 {
    #[cfg(any(feature = "pg15", feature = "pg16"))]
    {
        let _ = name;
        pg_sys::PG_WAIT_EXTENSION
    }
    #[cfg(not(any(feature = "pg15", feature = "pg16")))]
    {
        // The server has 128 numbers, and raises an ERROR if asked for one more. Some
        // are left for processes that ask at the same time.
        const MOST: usize = 120;
        let mut count = 0;
        // SAFETY: the array has `count` C strings, which are this process's to free;
        // the server copies the name.
        unsafe {
            let names = pg_sys::GetWaitEventCustomNames(pg_sys::PG_WAIT_EXTENSION, &mut count);
            let taken = std::slice::from_raw_parts(names, count as usize);
            let is_taken = taken.iter().any(|&taken| CStr::from_ptr(taken) == name);
            for &taken in taken {
                pg_sys::pfree(taken.cast());
            }
            pg_sys::pfree(names.cast());
            match is_taken || taken.len() < MOST {
                true => pg_sys::WaitEventExtensionNew(name.as_ptr()),
                false => pg_sys::PG_WAIT_EXTENSION,
            }
        }
    }
}

/// What the server process of that number shows of itself. Numbers begin with 1.
///
/// # Safety
/// `index` is not larger than `pgstat_fetch_stat_numbackends()`.
pub unsafe fn backend_entry(index: c_int) -> *mut pg_sys::LocalPgBackendStatus {
    // SAFETY: there is an entry of that number.
    unsafe {
        #[cfg(feature = "pg15")]
        return pg_sys::pgstat_fetch_stat_local_beentry(index);
        #[cfg(not(feature = "pg15"))]
        pg_sys::pgstat_get_local_beentry_by_index(index)
    }
}

/// Whether the server reads relations with direct I/O (`debug_io_direct = data`).
pub fn reads_directly() -> bool {
    #[cfg(feature = "pg15")]
    return false;
    #[cfg(not(feature = "pg15"))]
    {
        // `IO_DIRECT_DATA` of fd.h, which pgrx does not bind.
        const DATA: i32 = 1;
        // SAFETY: the word is set when the server starts, and does not change.
        let flags = unsafe { (&raw const pg_sys::io_direct_flags).read() };
        flags & DATA != 0
    }
}
