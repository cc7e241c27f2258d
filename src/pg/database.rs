//! What `pg_database` says of a database.

use pgrx::pg_sys;

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
    /// The database of that OID; nothing where it was dropped. In a transaction.
    pub fn look_up(oid: Oid) -> Option<Self> {
        // SAFETY: pg_database is a shared catalog, whose cache works without a
        // database; the tuple is copied from before it is let go.
        unsafe {
            let tuple = pg_sys::SearchSysCache1(
                pg_sys::SysCacheIdentifier::DATABASEOID as i32,
                pg_sys::Datum::from(pg_sys::Oid::from(oid)),
            );
            if tuple.is_null() {
                return None;
            }
            let form: pg_sys::Form_pg_database = pg_sys::GETSTRUCT(tuple).cast();
            let database = Self {
                is_template: (*form).datistemplate,
                accepts_connections: (*form).datallowconn
                    && (*form).datconnlimit != CONNECTION_LIMIT_OF_INVALID,
            };
            pg_sys::ReleaseSysCache(tuple);
            Some(database)
        }
    }
}
