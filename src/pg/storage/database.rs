//! Databases, as `pg_database` has them.

use std::collections::HashMap;
use std::ffi::CStr;

use pgrx::pg_sys;

use super::catalog::scan;
use crate::blocks::Oid;
use crate::pg::process::transaction::{self, Transaction};

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

/// The name of a database, in the server's encoding; its OID if it has none. Runs a
/// transaction.
pub fn name(database: Oid) -> Vec<u8> {
    let name = transaction::run(|_| {
        // SAFETY: a transaction is open; the name is copied before that ends.
        unsafe {
            let name = pg_sys::get_database_name(database.into());
            (!name.is_null()).then(|| CStr::from_ptr(name).to_bytes().to_vec())
        }
    });
    name.ok()
        .flatten()
        .unwrap_or_else(|| database.to_string().into_bytes())
}
