//! What `pg_database` says of the databases.

use std::collections::HashMap;
use std::ffi::CStr;

use pgrx::pg_sys;

use super::transaction;
use crate::blocks::Oid;

/// A database, as a worker that may be started in it needs to know it.
#[derive(Clone, Copy, Debug)]
pub struct Database {
    pub is_template: bool,
    /// Whether it can be connected to.
    pub accepts_connections: bool,
}

/// `pg_database.datconnlimit` of a database whose dropping was interrupted.
const CONNECTION_LIMIT_OF_INVALID: i32 = -2;

impl Database {
    /// All databases, by OID. In a transaction, of any database or none.
    pub fn all() -> HashMap<Oid, Self> {
        const LOCK: pg_sys::LOCKMODE = pg_sys::AccessShareLock as pg_sys::LOCKMODE;
        let mut databases = HashMap::new();
        // SAFETY: a scan of a shared catalog, from its beginning to its end; each
        // row is copied from before the next is asked for. An ERROR on the way
        // leaves the scan to the end of the transaction.
        unsafe {
            let catalog = pg_sys::table_open(pg_sys::DatabaseRelationId, LOCK);
            let scan = pg_sys::table_beginscan_catalog(catalog, 0, std::ptr::null_mut());
            loop {
                let tuple = pg_sys::heap_getnext(scan, pg_sys::ScanDirection::ForwardScanDirection);
                if tuple.is_null() {
                    break;
                }
                let form: pg_sys::Form_pg_database = pg_sys::GETSTRUCT(tuple).cast();
                let database = Self {
                    is_template: (*form).datistemplate,
                    accepts_connections: (*form).datallowconn
                        && (*form).datconnlimit != CONNECTION_LIMIT_OF_INVALID,
                };
                databases.insert((*form).oid.to_u32(), database);
            }
            pg_sys::table_endscan(scan);
            pg_sys::table_close(catalog, LOCK);
        }
        transaction::release_catalog_snapshot();
        databases
    }
}

/// A database's name, in the server's encoding; its OID where it has none. In no
/// transaction.
pub fn name(database: Oid) -> Vec<u8> {
    let name = transaction::run(|| {
        // SAFETY: a catalog look-up, in a transaction; the name is copied.
        unsafe {
            let name = pg_sys::get_database_name(pg_sys::Oid::from(database));
            (!name.is_null()).then(|| CStr::from_ptr(name).to_bytes().to_vec())
        }
    });
    name.ok()
        .flatten()
        .unwrap_or_else(|| database.to_string().into_bytes())
}
