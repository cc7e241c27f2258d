//! Relations: opened and locked, and what is known of them while they are.

use std::ffi::{CStr, CString};

use pgrx::{PgLogLevel, PgSqlErrorCode, pg_sys};

use super::catalog::{self, take_oids};
use crate::blocks::{BlockNumber, Fork, Oid};
use crate::pg::process::report::{Message, raise, report_relation};
use crate::pg::process::transaction::Transaction;
pub use crate::pg::sys::version::Locator;
use crate::pg::sys::{ffi, version};

const LOCK: pg_sys::LOCKMODE = pg_sys::AccessShareLock as pg_sys::LOCKMODE;

/// What came of opening a relation by its file.
pub enum Opened<'t> {
    Open(Relation<'t>),
    /// It is locked in a conflicting mode, or a process waits for such a lock.
    Locked,
    /// No relation has that file.
    Gone,
}

/// An open relation with an AccessShareLock on it, and if it is an index, on its table as
/// well. Dropping it closes it and releases the locks.
pub struct Relation<'t> {
    pub(super) relation: pg_sys::Relation,
    /// The table of an index, which is locked.
    table: Option<pg_sys::Oid>,
    pub(super) transaction: &'t Transaction,
}

impl<'t> Relation<'t> {
    /// Opens the relation of that OID. The table of an index is locked first, as the
    /// server's own commands do. Raises an ERROR if there is no such relation, or if an
    /// index has no table.
    pub fn open_with_table(transaction: &'t Transaction, oid: pg_sys::Oid) -> Self {
        let table = lock_table_of(transaction, oid);
        let relation = Self {
            // SAFETY: a transaction is open.
            relation: unsafe { pg_sys::relation_open(oid, LOCK) },
            table,
            transaction,
        };
        if !relation.is_of_its_table() {
            relation.raise(
                PgSqlErrorCode::ERRCODE_UNDEFINED_TABLE,
                c"could not find parent table of index \"%s\"",
                None,
            );
        }
        relation
    }

    /// The same. `None` if there is no such relation.
    pub fn try_open_with_table(transaction: &'t Transaction, oid: Oid) -> Option<Self> {
        let oid = oid.into();
        let table = lock_table_of(transaction, oid);
        // SAFETY: a transaction is open, in which the table of an index was locked.
        unsafe {
            let relation = pg_sys::try_relation_open(oid, LOCK);
            if relation.is_null() {
                unlock_table(table);
                return None;
            }
            let relation = Self {
                relation,
                table,
                transaction,
            };
            Some(relation).filter(Self::is_of_its_table)
        }
    }

    /// Before both were locked, the index may have been dropped, and its OID given to an
    /// index of another table.
    fn is_of_its_table(&self) -> bool {
        self.table.is_none_or(|table| {
            // SAFETY: a transaction is open, and so is the relation.
            table != pg_sys::InvalidOid
                && table == unsafe { pg_sys::IndexGetRelation((*self.relation).rd_id, true) }
        })
    }

    /// Opens the permanent or unlogged relation that has this file now. Waits for its lock
    /// only if `wait` says so.
    pub fn open_by_file(transaction: &'t Transaction, locator: Locator, wait: bool) -> Opened<'t> {
        // SAFETY: a transaction is open.
        let relation = unsafe {
            let oid =
                ffi::relid_by_relfilenumber(locator.tablespace.into(), locator.filenumber.into());
            if oid == pg_sys::InvalidOid {
                return Opened::Gone;
            }
            if wait {
                // It would hold back `xmin` meanwhile.
                transaction.release_catalog_snapshot();
                pg_sys::LockRelationOid(oid, LOCK);
            } else if !pg_sys::ConditionalLockRelationOid(oid, LOCK) {
                return Opened::Locked;
            }
            let relation = pg_sys::try_relation_open(oid, pg_sys::NoLock as pg_sys::LOCKMODE);
            if relation.is_null() {
                pg_sys::UnlockRelationOid(oid, LOCK);
                return Opened::Gone;
            }
            relation
        };
        let relation = Self {
            relation,
            table: None,
            transaction,
        };
        // The OID was looked up before the relation was locked, and without the
        // database. A temporary relation may have the same numbers.
        if relation.locator() == locator && !relation.is_temporary() {
            Opened::Open(relation)
        } else {
            Opened::Gone
        }
    }

    /// Raises the server's ERROR unless the current user has the SELECT privilege on it,
    /// or if it is an index, on its table.
    pub fn check_select_privilege(&self) {
        // SAFETY: the relation is open, in a transaction, and its name stays in place.
        unsafe {
            let result = catalog::select_privilege(self.table.unwrap_or((*self.relation).rd_id))
                .unwrap_or(pg_sys::AclResult::ACLCHECK_NO_PRIV);
            if result != pg_sys::AclResult::ACLCHECK_OK {
                pg_sys::aclcheck_error(
                    result,
                    pg_sys::get_relkind_objtype(self.kind() as std::ffi::c_char),
                    (*(*self.relation).rd_rel).relname.data.as_ptr(),
                );
            }
        }
    }

    /// Raises an ERROR if relations of this kind have no files.
    pub fn check_storage(&self) {
        if !self.has_storage() {
            self.raise(
                PgSqlErrorCode::ERRCODE_WRONG_OBJECT_TYPE,
                c"relation \"%s\" does not have storage",
                Some(self.kind()),
            );
        }
    }

    /// Raises the server's ERROR if it is a temporary relation of another session.
    pub fn check_not_other_temp(&self) {
        if self.is_other_temp() {
            raise(Message::new(
                PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED,
                "cannot access temporary tables of other sessions",
            ));
        }
    }

    fn raise(&self, sqlstate: PgSqlErrorCode, format: &CStr, unsupported_kind: Option<u8>) {
        report_relation(
            PgLogLevel::ERROR,
            sqlstate,
            format,
            &self.name(),
            unsupported_kind,
        );
    }

    /// Whether relations of this kind have files.
    pub fn has_storage(&self) -> bool {
        [
            pg_sys::RELKIND_RELATION,
            pg_sys::RELKIND_INDEX,
            pg_sys::RELKIND_SEQUENCE,
            pg_sys::RELKIND_TOASTVALUE,
            pg_sys::RELKIND_MATVIEW,
        ]
        .contains(&self.kind())
    }

    /// Whether it is a partitioned table or a partitioned index.
    pub fn is_partitioned(&self) -> bool {
        [
            pg_sys::RELKIND_PARTITIONED_TABLE,
            pg_sys::RELKIND_PARTITIONED_INDEX,
        ]
        .contains(&self.kind())
    }

    pub fn is_foreign_table(&self) -> bool {
        self.kind() == pg_sys::RELKIND_FOREIGN_TABLE
    }

    pub fn is_index(&self) -> bool {
        self.kind() == pg_sys::RELKIND_INDEX
    }

    pub fn is_btree(&self) -> bool {
        // SAFETY: the relation is open.
        self.is_index() && unsafe { (*(*self.relation).rd_rel).relam } == pg_sys::BTREE_AM_OID
    }

    /// Whether it is a temporary relation, of this session or another.
    pub fn is_temporary(&self) -> bool {
        // SAFETY: the relation is open.
        unsafe { (*self.relation).rd_backend != version::NO_BACKEND }
    }

    pub fn is_other_temp(&self) -> bool {
        // SAFETY: the relation is open.
        self.is_temporary() && unsafe { !(*self.relation).rd_islocaltemp }
    }

    fn kind(&self) -> u8 {
        // SAFETY: the relation is open.
        unsafe { (*(*self.relation).rd_rel).relkind as u8 }
    }

    pub fn oid(&self) -> Oid {
        // SAFETY: the relation is open.
        unsafe { (*self.relation).rd_id }.to_u32()
    }

    /// Its name, in the server's encoding.
    pub fn name(&self) -> CString {
        // SAFETY: the relation is open, so its pg_class row is in memory.
        unsafe { CStr::from_ptr((*(*self.relation).rd_rel).relname.data.as_ptr()).to_owned() }
    }

    /// The file that it has now.
    pub fn locator(&self) -> Locator {
        // SAFETY: the relation is open.
        unsafe { version::locator(self.relation) }
    }

    /// Its TOAST table, if it has one.
    pub fn toast_table(&self) -> Option<Oid> {
        // SAFETY: the relation is open.
        let toast = unsafe { (*(*self.relation).rd_rel).reltoastrelid };
        (toast != pg_sys::InvalidOid).then(|| toast.to_u32())
    }

    /// Its indexes.
    pub fn indexes(&self) -> Vec<Oid> {
        let has_indexes = [
            pg_sys::RELKIND_RELATION,
            pg_sys::RELKIND_TOASTVALUE,
            pg_sys::RELKIND_MATVIEW,
        ];
        if !has_indexes.contains(&self.kind()) {
            return Vec::new();
        }
        // SAFETY: the relation is open, and the list is a copy for the caller.
        unsafe { take_oids(pg_sys::RelationGetIndexList(self.relation)) }
    }

    /// Whether a process may be waiting for a lock on it, or on its table, because of
    /// this process's own.
    pub fn may_be_waited_for(&self) -> bool {
        // SAFETY: the relation is open. The tag is made as `SetLocktagRelationOid` does.
        unsafe {
            let id = (*self.relation).rd_lockInfo.lockRelId;
            let relations = [Some(id.relId), self.table];
            relations.into_iter().flatten().any(|relation| {
                #[expect(
                    clippy::cast_possible_truncation,
                    reason = "the server stores both constants in 8 bits"
                )]
                let tag = pg_sys::LOCKTAG {
                    locktag_field1: id.dbId.to_u32(),
                    locktag_field2: relation.to_u32(),
                    locktag_field3: 0,
                    locktag_field4: 0,
                    locktag_type: pg_sys::LockTagType::LOCKTAG_RELATION as u8,
                    locktag_lockmethodid: pg_sys::DEFAULT_LOCKMETHOD as u8,
                };
                // It counts holders as well, but not those by the fast path, whose locks
                // are weak and keep no process waiting.
                pg_sys::LockWaiterCount(&tag) > 0
            })
        }
    }

    pub fn has_fork(&self, fork: Fork) -> bool {
        // SAFETY: the relation is open, and the server has forks of these numbers.
        unsafe { pg_sys::smgrexists(pg_sys::RelationGetSmgr(self.relation), fork as i32) }
    }

    /// How many blocks the fork has, which must exist.
    pub fn blocks(&self, fork: Fork) -> BlockNumber {
        // SAFETY: the relation is open.
        unsafe { pg_sys::RelationGetNumberOfBlocksInFork(self.relation, fork as i32) }
    }

    /// Has the server cache the settings of the relation's tablespace, so that reading its
    /// blocks reads no catalog besides.
    pub fn look_up_tablespace(&self) {
        // SAFETY: the relation is open, in a transaction.
        unsafe {
            let tablespace = (*(*self.relation).rd_rel).reltablespace;
            pg_sys::get_tablespace_maintenance_io_concurrency(tablespace);
        }
    }
}

impl Drop for Relation<'_> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            // SAFETY: it was opened and locked once, and so was its table.
            unsafe {
                pg_sys::relation_close(self.relation, LOCK);
                unlock_table(self.table);
            }
        }
    }
}

/// Locks the table of an index and returns it. `None` if the relation is no index, and an
/// invalid OID if it is one without a table.
fn lock_table_of(_transaction: &Transaction, oid: pg_sys::Oid) -> Option<pg_sys::Oid> {
    // SAFETY: a transaction is open.
    unsafe {
        let kind = pg_sys::get_rel_relkind(oid) as u8;
        if kind != pg_sys::RELKIND_INDEX && kind != pg_sys::RELKIND_PARTITIONED_INDEX {
            return None;
        }
        let table = pg_sys::IndexGetRelation(oid, true);
        if table != pg_sys::InvalidOid {
            pg_sys::LockRelationOid(table, LOCK);
        }
        Some(table)
    }
}

/// Releases the lock that [`lock_table_of`] has taken.
///
/// # Safety
/// `table` is what it returned, and this is called once for it.
unsafe fn unlock_table(table: Option<pg_sys::Oid>) {
    if let Some(table) = table.filter(|&table| table != pg_sys::InvalidOid) {
        // SAFETY: the table is locked in this mode.
        unsafe { pg_sys::UnlockRelationOid(table, LOCK) };
    }
}

/// The fork of that name. Raises the server's ERROR if there is none.
pub fn fork_by_name(name: &CStr) -> Fork {
    // SAFETY: a C string.
    let number = unsafe { pg_sys::forkname_to_number(name.as_ptr()) };
    Fork::from_number(number as u32).expect("the server has no other forks")
}
