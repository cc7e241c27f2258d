//! Symbols of the server that pgrx does not bind, or binds in a form that does
//! not fit: behind a guard that the loop over all buffers or a `Drop` cannot have.

use std::ffi::{c_char, c_int};

use pgrx::pg_sys;

use super::compat::buffer_state::Word;

unsafe extern "C-unwind" {
    /// Takes the spinlock of a buffer's header and returns its state. It raises
    /// no ERROR, so that it needs no guard.
    pub fn LockBufHdr(header: *mut pg_sys::BufferDesc) -> Word;

    /// Counts a file of this process's as closed. It raises no ERROR, so that it needs
    /// no guard, and may be called while one unwinds.
    pub fn ReleaseExternalFD();

    #[cfg(feature = "pg15")]
    #[link_name = "RelidByRelfilenode"]
    pub fn RelidByRelfilenumber(tablespace: pg_sys::Oid, filenumber: pg_sys::Oid) -> pg_sys::Oid;
    #[cfg(not(feature = "pg15"))]
    pub fn RelidByRelfilenumber(tablespace: pg_sys::Oid, filenumber: pg_sys::Oid) -> pg_sys::Oid;

    /// A relation and all that inherit from it, as a list of OIDs.
    pub fn find_all_inheritors(
        relation: pg_sys::Oid,
        lock: pg_sys::LOCKMODE,
        parents: *mut *mut pg_sys::List,
    ) -> *mut pg_sys::List;

    /// What a partition is a partition of, directly or not, as a list of OIDs.
    pub fn get_partition_ancestors(partition: pg_sys::Oid) -> *mut pg_sys::List;

    // What `ereport` is made of: pgrx's own lets what an interrupt raises at its end
    // jump over Rust's frames.
    pub fn errstart(level: c_int, domain: *const c_char) -> bool;
    pub fn errcode(sqlstate: c_int) -> c_int;
    pub fn errmsg(format: *const c_char, ...) -> c_int;
    pub fn errmsg_internal(format: *const c_char, ...) -> c_int;
    // As in the allocator, which a test's own program has none of.
    #[cfg(not(test))]
    pub fn errdetail_internal(format: *const c_char, ...) -> c_int;
    pub fn errhint(format: *const c_char, ...) -> c_int;
    pub fn errdetail_relkind_not_supported(relkind: c_char) -> c_int;
    pub fn errfinish(file: *const c_char, line: c_int, function: *const c_char);
}
