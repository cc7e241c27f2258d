//! Functions of the server that pgrx does not bind, and some that it binds only behind its
//! guard, which turns an ERROR into a panic. These raise no ERROR, or their callers have a
//! guard of their own, or none is wanted.

#![expect(
    ffi_unwind_calls,
    reason = "an ERROR of the functions called here jumps to their guard"
)]

use std::ffi::{c_char, c_int};

use pgrx::pg_sys;
use pgrx::pg_sys::ffi::pg_guard_ffi_boundary;

use super::buffer_state::Word;

// These raise no ERROR.
unsafe extern "C" {
    /// Takes the spinlock of a buffer's header and returns its state.
    pub fn LockBufHdr(header: *mut pg_sys::BufferDesc) -> Word;

    /// Counts one file of this process as closed.
    pub fn ReleaseExternalFD();
}

unsafe extern "C-unwind" {
    // What the macro `ereport` expands to. pgrx's own version lets an ERROR that is
    // raised at its end, by an interrupt, jump over Rust's frames.
    pub fn errstart(level: c_int, domain: *const c_char) -> bool;
    pub fn errcode(sqlstate: c_int) -> c_int;
    pub fn errmsg(format: *const c_char, ...) -> c_int;
    pub fn errmsg_internal(format: *const c_char, ...) -> c_int;
    pub fn errdetail_internal(format: *const c_char, ...) -> c_int;
    pub fn errhint(format: *const c_char, ...) -> c_int;
    pub fn errdetail_relkind_not_supported(relkind: c_char) -> c_int;
    pub fn errfinish(file: *const c_char, line: c_int, function: *const c_char);

    /// Allocates memory, so that it may raise an ERROR.
    pub fn RegisterXactCallback(callback: pg_sys::XactCallback, argument: *mut std::ffi::c_void);

    #[cfg(feature = "pg15")]
    #[link_name = "RelidByRelfilenode"]
    fn RelidByRelfilenumber(tablespace: pg_sys::Oid, filenumber: pg_sys::Oid) -> pg_sys::Oid;
    #[cfg(not(feature = "pg15"))]
    fn RelidByRelfilenumber(tablespace: pg_sys::Oid, filenumber: pg_sys::Oid) -> pg_sys::Oid;

    fn find_all_inheritors(
        relation: pg_sys::Oid,
        lock: pg_sys::LOCKMODE,
        parents: *mut *mut pg_sys::List,
    ) -> *mut pg_sys::List;

    fn get_partition_ancestors(partition: pg_sys::Oid) -> *mut pg_sys::List;
}

/// The OID of the relation that has this file; invalid if there is none. May raise an
/// ERROR.
///
/// # Safety
/// A transaction is open.
pub unsafe fn relid_by_relfilenumber(
    tablespace: pg_sys::Oid,
    filenumber: pg_sys::Oid,
) -> pg_sys::Oid {
    // SAFETY: it reads catalogs, for which a transaction is open.
    unsafe { pg_guard_ffi_boundary(|| RelidByRelfilenumber(tablespace, filenumber)) }
}

/// The OIDs of a relation and of all that inherit from it, none of them locked. May
/// raise an ERROR.
///
/// # Safety
/// A transaction is open.
pub unsafe fn relation_and_inheritors(relation: pg_sys::Oid) -> *mut pg_sys::List {
    const NO_LOCK: pg_sys::LOCKMODE = pg_sys::NoLock as pg_sys::LOCKMODE;
    // SAFETY: it reads catalogs, for which a transaction is open; a null asks for no
    // counts of parents.
    unsafe {
        pg_guard_ffi_boundary(|| find_all_inheritors(relation, NO_LOCK, std::ptr::null_mut()))
    }
}

/// The OIDs of all partitioned tables above a partition. May raise an ERROR.
///
/// # Safety
/// A transaction is open, and `partition` is a partition.
pub unsafe fn partition_ancestors(partition: pg_sys::Oid) -> *mut pg_sys::List {
    // SAFETY: it reads catalogs, for which a transaction is open.
    unsafe { pg_guard_ffi_boundary(|| get_partition_ancestors(partition)) }
}
