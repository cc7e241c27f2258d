//! Databases, as `pg_database` has them.

use std::collections::HashMap;
use std::ffi::CStr;

use pgrx::pg_sys;

use super::catalog::scan;
use crate::blocks::Oid;
use crate::pg::process::transaction::Transaction;

/// What decides whether a worker is started in a database.
#[derive(Clone, Copy, Debug)]
pub struct Database {
    pub is_template: bool,
    pub accepts_connections: bool,
}

/// `DATCONNLIMIT_INVALID_DB`: `DROP DATABASE` was interrupted.
const CONNECTION_LIMIT_OF_INVALID: i32 = -2;

impl Database {
    /// All databases, by OID. Can be read from any database or none.
    pub fn all(transaction: &Transaction) -> HashMap<Oid, Self> {
        let mut databases = HashMap::new();
        // SAFETY: rows of pg_database, in a transaction.
        unsafe {
            scan(
                pg_sys::DatabaseRelationId,
                |row: &pg_sys::FormData_pg_database| {
                    let database = Self {
                        is_template: row.datistemplate,
                        accepts_connections: row.datallowconn
                            && row.datconnlimit != CONNECTION_LIMIT_OF_INVALID,
                    };
                    databases.insert(row.oid.to_u32(), database);
                },
            );
        }
        transaction.release_catalog_snapshot();
        databases
    }
}

/// Whether a command holds or waits for a lock on the database that keeps new connections
/// out. Such a command needs the database without connections: `DROP DATABASE`, `ALTER
/// DATABASE … RENAME` and `… SET TABLESPACE` lock it exclusively, and `CREATE DATABASE`
/// locks its template in share mode.
#[expect(clippy::cast_possible_truncation, reason = "constants that fit")]
pub fn is_wanted_alone(_transaction: &Transaction, database: Oid) -> bool {
    const NO_WAIT: bool = true;
    // What a new connection locks the database with.
    let mode = pg_sys::RowExclusiveLock as pg_sys::LOCKMODE;
    let tag = pg_sys::LOCKTAG {
        locktag_field1: pg_sys::InvalidOid.to_u32(),
        locktag_field2: pg_sys::DatabaseRelationId.to_u32(),
        locktag_field3: database,
        locktag_field4: 0,
        locktag_type: pg_sys::LockTagType::LOCKTAG_OBJECT as u8,
        locktag_lockmethodid: pg_sys::DEFAULT_LOCKMETHOD as u8,
    };
    // SAFETY: a transaction is open. The tag is made as `SET_LOCKTAG_OBJECT` does, and the
    // lock is released in the mode in which it was taken.
    unsafe {
        let result = pg_sys::LockAcquire(&tag, mode, false, NO_WAIT);
        if result == pg_sys::LockAcquireResult::LOCKACQUIRE_NOT_AVAIL {
            return true;
        }
        pg_sys::LockRelease(&tag, mode, false);
    }
    false
}

/// The name of a database, in the server's encoding. `None` if there is no such database.
pub fn name(_transaction: &Transaction, database: Oid) -> Option<Vec<u8>> {
    // SAFETY: a transaction is open; the name is copied before that ends.
    unsafe {
        let name = pg_sys::get_database_name(database.into());
        (!name.is_null()).then(|| CStr::from_ptr(name).to_bytes().to_vec())
    }
}
