//! What catalogs say: which relations there are, and who may read them.

use pgrx::pg_sys;

use crate::blocks::Oid;
use crate::pg::process::transaction::Transaction;
use crate::pg::sys::ffi;

const LOCK: pg_sys::LOCKMODE = pg_sys::AccessShareLock as pg_sys::LOCKMODE;

/// Calls `each` for every row of a catalog, in physical order.
///
/// # Safety
/// `T` is the C structure of the catalog's rows. A transaction is open.
pub(super) unsafe fn scan<T>(catalog: pg_sys::Oid, mut each: impl FnMut(&T)) {
    // SAFETY: a scan from its beginning to its end, in a transaction, which also ends it
    // after an ERROR. Each row is valid until the next is fetched.
    unsafe {
        let catalog = pg_sys::table_open(catalog, LOCK);
        let scan = pg_sys::table_beginscan_catalog(catalog, 0, std::ptr::null_mut());
        loop {
            let tuple = pg_sys::heap_getnext(scan, pg_sys::ScanDirection::ForwardScanDirection);
            if tuple.is_null() {
                break;
            }
            each(&*pg_sys::GETSTRUCT(tuple).cast::<T>());
        }
        pg_sys::table_endscan(scan);
        pg_sys::table_close(catalog, LOCK);
    }
}

/// The tables, materialized views and sequences of a schema, and the TOAST tables of
/// `pg_toast`; or those of the whole database without TOAST tables, and without those of
/// the system unless `system` is true.
pub fn all_with_storage(
    _transaction: &Transaction,
    schema: Option<pg_sys::Oid>,
    system: bool,
) -> Vec<Oid> {
    let mut kinds = vec![
        pg_sys::RELKIND_RELATION,
        pg_sys::RELKIND_MATVIEW,
        pg_sys::RELKIND_SEQUENCE,
    ];
    if schema.is_some() {
        kinds.push(pg_sys::RELKIND_TOASTVALUE);
    }
    let mut oids = Vec::new();
    // SAFETY: rows of pg_class, in a transaction.
    unsafe {
        scan(
            pg_sys::RelationRelationId,
            |row: &pg_sys::FormData_pg_class| {
                let oid = row.oid.to_u32();
                let is_wanted = match schema {
                    Some(schema) => row.relnamespace == schema,
                    None => system || oid >= pg_sys::FirstNormalObjectId,
                };
                if is_wanted && kinds.contains(&(row.relkind as u8)) {
                    oids.push(oid);
                }
            },
        );
    }
    oids
}

/// A relation and all its partitions and inheritance children, at any depth; each once,
/// though it may have several parents.
pub fn inheritance_tree(_transaction: &Transaction, root: Oid) -> Vec<Oid> {
    // SAFETY: a transaction is open, and the list is a copy for the caller.
    unsafe { take_oids(ffi::relation_and_inheritors(root.into())) }
}

/// Whether there is a schema of that OID.
pub fn schema_exists(_transaction: &Transaction, schema: pg_sys::Oid) -> bool {
    // SAFETY: a transaction is open; the name is a copy, which is freed once.
    unsafe {
        let name = pg_sys::get_namespace_name(schema);
        if !name.is_null() {
            pg_sys::pfree(name.cast());
        }
        !name.is_null()
    }
}

/// Whether the current user has the SELECT privilege on a relation, or on a partitioned
/// table above it. `None` if there is no such relation.
pub fn may_be_selected_from(_transaction: &Transaction, relation: Oid) -> Option<bool> {
    // SAFETY: a transaction is open, and the list is a copy for the caller.
    unsafe {
        let may = |oid: Oid| Some(select_privilege(oid.into())? == pg_sys::AclResult::ACLCHECK_OK);
        let ancestors = || match pg_sys::get_rel_relispartition(relation.into()) {
            true => take_oids(ffi::partition_ancestors(relation.into())),
            false => Vec::new(),
        };
        Some(may(relation)? || ancestors().into_iter().any(|oid| may(oid) == Some(true)))
    }
}

/// Whether the current user has the SELECT privilege on a relation. `None` if there is no
/// such relation.
///
/// # Safety
/// A transaction is open.
pub(super) unsafe fn select_privilege(relation: pg_sys::Oid) -> Option<pg_sys::AclResult::Type> {
    let mut is_missing = false;
    // SAFETY: a transaction is open.
    let result = unsafe {
        pg_sys::pg_class_aclcheck_ext(
            relation,
            pg_sys::GetUserId(),
            pg_sys::ACL_SELECT as pg_sys::AclMode,
            &mut is_missing,
        )
    };
    (!is_missing).then_some(result)
}

/// The OIDs of a list, which is freed.
///
/// # Safety
/// The list is null or has OIDs, and nothing else uses it.
pub(super) unsafe fn take_oids(list: *mut pg_sys::List) -> Vec<Oid> {
    if list.is_null() {
        return Vec::new();
    }
    // SAFETY: a list that is not null has as many cells as its length says.
    unsafe {
        let cells = std::slice::from_raw_parts((*list).elements, (*list).length as usize);
        let oids = cells.iter().map(|cell| cell.oid_value.to_u32()).collect();
        pg_sys::list_free(list);
        oids
    }
}
