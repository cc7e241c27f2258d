//! Relations: opened, locked, read.

use std::ffi::{CStr, CString, c_char};
use std::ops::ControlFlow;

use pgrx::{PgLogLevel, PgSqlErrorCode, pg_sys};

use super::buffer::{Pinned, ReadEnd};
pub use super::compat::Locator;
use super::compat::{self, Blocks, READ_BLOCKS_MAX, REQUEST_BLOCKS};
use super::error::{self, raise};
use super::{ffi, memory, process};
use crate::blocks::{BlockNumber, Fork, Oid};

const LOCK: pg_sys::LOCKMODE = pg_sys::AccessShareLock as pg_sys::LOCKMODE;

/// The backend of relations that are no session's own.
const NO_BACKEND: i32 = -1;

/// Locks the table of an index, and returns it; an invalid OID where it has none,
/// and nothing where it is no index.
fn lock_table_of(oid: pg_sys::Oid) -> Option<pg_sys::Oid> {
    // SAFETY: catalog look-ups and a lock, in a transaction.
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

/// What came of opening a relation without waiting.
pub enum Opened {
    Open(Relation),
    /// Somebody has it locked.
    Locked,
    /// No relation has that file.
    Gone,
}

/// An open relation, with an AccessShareLock on it; and on its table, where it
/// is an index. Dropping it closes it and gives the locks back.
pub struct Relation {
    relation: pg_sys::Relation,
    /// The index's table.
    table: Option<pg_sys::Oid>,
}

impl Relation {
    /// Opens the relation of that OID for a caller who wants to read it. Where
    /// it is an index, its table is locked first, as everybody does it. Raises
    /// the server's ERROR where there is no such relation, and one of ours where
    /// an index has no table (any more).
    pub fn open_with_table(oid: pg_sys::Oid) -> Self {
        let table = lock_table_of(oid);
        let relation = Self {
            // SAFETY: a catalog look-up and a lock, in a transaction.
            relation: unsafe { pg_sys::relation_open(oid, LOCK) },
            table,
        };
        if !relation.is_of_its_table() {
            relation.report(
                PgLogLevel::ERROR,
                PgSqlErrorCode::ERRCODE_UNDEFINED_TABLE,
                c"could not find parent table of index \"%s\"",
                None,
            );
        }
        relation
    }

    /// The same, but nothing where there is no such relation.
    pub fn try_open_with_table(oid: Oid) -> Option<Self> {
        let oid = oid.into();
        let table = lock_table_of(oid);
        // SAFETY: as above; the table's lock was taken just now.
        unsafe {
            let relation = pg_sys::try_relation_open(oid, LOCK);
            if relation.is_null() {
                if let Some(table) = table.filter(|&table| table != pg_sys::InvalidOid) {
                    pg_sys::UnlockRelationOid(table, LOCK);
                }
                return None;
            }
            Some(Self { relation, table }).filter(Self::is_of_its_table)
        }
    }

    /// The OID may have become another index's before the locks were held: only
    /// now the pair is certain.
    fn is_of_its_table(&self) -> bool {
        self.table.is_none_or(|table| {
            // SAFETY: a catalog look-up, in a transaction.
            table != pg_sys::InvalidOid
                && table == unsafe { pg_sys::IndexGetRelation((*self.relation).rd_id, true) }
        })
    }

    /// Opens the relation that has this file now, unless it would have to wait
    /// for somebody who has it locked.
    pub fn open_by_file_if_free(database: Oid, tablespace: Oid, filenumber: Oid) -> Opened {
        let tablespace_oid = pg_sys::Oid::from(tablespace);
        let filenumber_oid = pg_sys::Oid::from(filenumber);
        // SAFETY: a catalog look-up, in a transaction, behind the guard that
        // pgrx puts around what it binds itself.
        let relation = unsafe {
            let oid = pg_sys::ffi::pg_guard_ffi_boundary(|| {
                ffi::RelidByRelfilenumber(tablespace_oid, filenumber_oid)
            });
            if oid == pg_sys::InvalidOid {
                return Opened::Gone;
            }
            if !pg_sys::ConditionalLockRelationOid(oid, LOCK) {
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
        };
        // Which relation has the file was looked up without a lock, and a
        // shared catalog's file lies in no database.
        // Temporary relations live in their session's own buffers.
        // SAFETY: just opened.
        let (locator, temporary) = unsafe {
            (
                compat::locator(relation.relation),
                (*relation.relation).rd_backend != NO_BACKEND,
            )
        };
        if locator == (database, tablespace, filenumber) && !temporary {
            Opened::Open(relation)
        } else {
            Opened::Gone
        }
    }

    /// Raises the server's ERROR unless the current user may SELECT from it, or
    /// from its table, where it is an index.
    pub fn check_select_right(&self) {
        // SAFETY: open; the name is the server's own, in its own encoding.
        unsafe {
            let oid = (*self.relation).rd_id;
            let result = select_right(self.table.unwrap_or(oid))
                .unwrap_or(pg_sys::AclResult::ACLCHECK_NO_PRIV);
            if result != pg_sys::AclResult::ACLCHECK_OK {
                let kind = (*(*self.relation).rd_rel).relkind;
                pg_sys::aclcheck_error(
                    result,
                    pg_sys::get_relkind_objtype(kind),
                    (*(*self.relation).rd_rel).relname.data.as_ptr(),
                );
            }
        }
    }

    /// Raises an ERROR, with the server's own detail, where relations of this
    /// kind have no files.
    pub fn check_storage(&self) {
        if !self.has_storage() {
            self.report(
                PgLogLevel::ERROR,
                PgSqlErrorCode::ERRCODE_WRONG_OBJECT_TYPE,
                c"relation \"%s\" does not have storage",
                Some(self.kind() as c_char),
            );
        }
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

    fn kind(&self) -> u8 {
        // SAFETY: open.
        unsafe { (*(*self.relation).rd_rel).relkind as u8 }
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
        // SAFETY: open.
        self.is_index() && unsafe { (*(*self.relation).rd_rel).relam } == pg_sys::BTREE_AM_OID
    }

    /// Whether it is a temporary relation, of this session or another.
    pub fn is_temporary(&self) -> bool {
        // SAFETY: open.
        unsafe { (*self.relation).rd_backend != NO_BACKEND }
    }

    pub fn is_others_temporary(&self) -> bool {
        // SAFETY: open.
        self.is_temporary() && unsafe { !(*self.relation).rd_islocaltemp }
    }

    /// The file that it has now.
    pub fn locator(&self) -> Locator {
        // SAFETY: open.
        unsafe { compat::locator(self.relation) }
    }

    /// Its TOAST table, where it has one.
    pub fn toast_table(&self) -> Option<Oid> {
        // SAFETY: open.
        let toast = unsafe { (*(*self.relation).rd_rel).reltoastrelid };
        (toast != pg_sys::InvalidOid).then(|| toast.to_u32())
    }

    /// Its indexes, where it is of a kind that has some.
    pub fn indexes(&self) -> Vec<Oid> {
        let has_indexes = [
            pg_sys::RELKIND_RELATION,
            pg_sys::RELKIND_TOASTVALUE,
            pg_sys::RELKIND_MATVIEW,
        ];
        if !has_indexes.contains(&self.kind()) {
            return Vec::new();
        }
        // SAFETY: open; the list is a copy for the caller.
        unsafe { take_oids(pg_sys::RelationGetIndexList(self.relation)) }
    }

    /// Whether somebody wants a lock on it, or on its table, that this process's
    /// own may be in the way of. It may also say so when nobody does.
    pub fn may_be_waited_for(&self) -> bool {
        // SAFETY: open; the tag is made as the server makes it.
        unsafe {
            let id = (*self.relation).rd_lockInfo.lockRelId;
            let relations = [Some(id.relId), self.table];
            relations.into_iter().flatten().any(|relation| {
                let tag = pg_sys::LOCKTAG {
                    locktag_field1: id.dbId.to_u32(),
                    locktag_field2: relation.to_u32(),
                    locktag_field3: 0,
                    locktag_field4: 0,
                    locktag_type: pg_sys::LockTagType::LOCKTAG_RELATION as u8,
                    locktag_lockmethodid: pg_sys::DEFAULT_LOCKMETHOD as u8,
                };
                // Locks that are in nobody's way are not in the table of locks.
                pg_sys::LockWaiterCount(&tag) > 0
            })
        }
    }

    /// Raises the server's ERROR where it is another session's temporary relation.
    pub fn check_not_others(&self) {
        if self.is_others_temporary() {
            raise(
                PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED,
                "cannot access temporary tables of other sessions".to_owned(),
                None,
            );
        }
    }

    /// Reports, as an ERROR if the level is that, a message with the relation's
    /// name in it, whose detail is that such relations are not supported, if a
    /// kind is given.
    fn report(
        &self,
        level: PgLogLevel,
        sqlstate: PgSqlErrorCode,
        format: &CStr,
        kind: Option<c_char>,
    ) {
        // SAFETY: open, and its name stays where it is meanwhile.
        let name = unsafe { CStr::from_ptr((*(*self.relation).rd_rel).relname.data.as_ptr()) };
        report(level, sqlstate, format, name, kind);
    }

    /// Its name, in the server's encoding.
    pub fn name(&self) -> CString {
        // SAFETY: open, so that its pg_class row is there.
        unsafe { CStr::from_ptr((*(*self.relation).rd_rel).relname.data.as_ptr()).to_owned() }
    }

    pub fn oid(&self) -> Oid {
        // SAFETY: open.
        unsafe { (*self.relation).rd_id }.to_u32()
    }

    pub fn has_fork(&self, fork: Fork) -> bool {
        // SAFETY: open, and the fork's number is legal.
        unsafe { pg_sys::smgrexists(self.storage(), fork as i32) }
    }

    /// How many blocks the fork has, which must exist.
    pub fn blocks(&self, fork: Fork) -> BlockNumber {
        // SAFETY: as above.
        unsafe { pg_sys::RelationGetNumberOfBlocksInFork(self.relation, fork as i32) }
    }

    /// Reads blocks into shared buffers (a temporary relation's: into local ones),
    /// in ascending order, and hands each to `each` with its place among `blocks`,
    /// until that breaks off. Reads ahead, in a way that suits a process that reads
    /// alone, or one of several. Serves interrupts. Raises the server's ERROR where a
    /// block cannot be read.
    pub fn read_into_buffers(
        &self,
        fork: Fork,
        blocks: &[BlockNumber],
        is_alone: bool,
        mut each: impl FnMut(usize, &Pinned) -> ControlFlow<()>,
    ) {
        // SAFETY: open.
        unsafe { compat::read_into_buffers(self.relation, fork, blocks, is_alone, &mut each) };
    }

    /// Looks up how far to read ahead in the relation's tablespace, so that reading
    /// its blocks reads no catalog besides.
    pub fn look_up_tablespace(&self) {
        // SAFETY: open.
        unsafe {
            let tablespace = (*(*self.relation).rd_rel).reltablespace;
            pg_sys::get_tablespace_maintenance_io_concurrency(tablespace);
        }
    }

    /// Whether a block is in a buffer. One that is not may be asked for ahead.
    pub fn is_cached(&self, fork: Fork, block: BlockNumber) -> bool {
        // SAFETY: open.
        unsafe { compat::is_in_buffer(self.relation, fork, block) }
    }

    /// Reads blocks of a permanent relation into shared buffers, in ascending
    /// order, and hands each to `each` with its place among `blocks`, until that
    /// breaks off. Reads ahead, and never evicts a block that is in a buffer.
    /// Serves interrupts. Raises the server's ERROR where a block cannot be read.
    pub fn read_into_free_buffers(
        &self,
        fork: Fork,
        blocks: &[BlockNumber],
        mut each: impl FnMut(usize, &Pinned) -> ControlFlow<()>,
    ) -> ReadEnd {
        // SAFETY: open.
        unsafe { compat::read_into_free_buffers(self.relation, fork, blocks, &mut each) }
    }

    /// Asks the operating system to read the blocks from `first` to before `end`,
    /// unless it has them cached, does not wait, and tells `done` of each so many,
    /// until that breaks off. Serves interrupts.
    pub fn prefetch(
        &self,
        fork: Fork,
        first: BlockNumber,
        end: BlockNumber,
        done: impl FnMut(u32) -> ControlFlow<()>,
    ) {
        const LOOK_BLOCKS: u32 = 8 * REQUEST_BLOCKS;
        self.in_runs(first, end, LOOK_BLOCKS, done, {
            // SAFETY: open, for as long as this is borrowed.
            let mut blocks = unsafe { Blocks::new(self.relation, fork) };
            move |first, count| {
                if blocks.are_cached(first, count) {
                    return;
                }
                for offset in (0..count).step_by(REQUEST_BLOCKS as usize) {
                    blocks.prefetch(first + offset, REQUEST_BLOCKS.min(count - offset));
                }
            }
        });
    }

    /// Reads the blocks from `first` to before `end`, not into shared buffers, and
    /// tells `done` of each so many, until that breaks off. Serves interrupts.
    pub fn read(
        &self,
        fork: Fork,
        first: BlockNumber,
        end: BlockNumber,
        done: impl FnMut(u32) -> ControlFlow<()>,
    ) {
        self.in_runs(first, end, READ_BLOCKS_MAX, done, {
            let mut memory = memory::room_for(READ_BYTES / IO_ALIGNMENT);
            memory.resize(READ_BYTES / IO_ALIGNMENT, IoAligned([0; IO_ALIGNMENT]));
            // SAFETY: as above.
            let mut blocks = unsafe { Blocks::new(self.relation, fork) };
            // SAFETY: the memory is aligned and large enough.
            move |first, count| unsafe { blocks.read(first, count, memory.as_mut_ptr().cast()) }
        });
    }

    /// Does something for runs of blocks, of which none crosses the end of a
    /// segment file.
    fn in_runs(
        &self,
        first: BlockNumber,
        end: BlockNumber,
        most: u32,
        mut done: impl FnMut(u32) -> ControlFlow<()>,
        mut act: impl FnMut(BlockNumber, u32),
    ) {
        let mut block = first;
        while block < end {
            process::check_for_interrupts();
            let segment_end = (block / pg_sys::RELSEG_SIZE + 1).saturating_mul(pg_sys::RELSEG_SIZE);
            let count = (end.min(segment_end) - block).min(most);
            act(block, count);
            block += count;
            if done(count).is_break() {
                return;
            }
        }
    }

    fn storage(&self) -> pg_sys::SMgrRelation {
        // SAFETY: open.
        unsafe { pg_sys::RelationGetSmgr(self.relation) }
    }
}

impl Drop for Relation {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        // SAFETY: open and locked, each once.
        unsafe {
            pg_sys::relation_close(self.relation, LOCK);
            if let Some(table) = self.table
                && table != pg_sys::InvalidOid
            {
                pg_sys::UnlockRelationOid(table, LOCK);
            }
        }
    }
}

const READ_BYTES: usize = READ_BLOCKS_MAX as usize * pg_sys::BLCKSZ as usize;

/// A piece of memory that the server may read into with direct I/O.
#[repr(C, align(4096))]
#[derive(Clone)]
struct IoAligned([u8; IO_ALIGNMENT]);

const IO_ALIGNMENT: usize = 4096;

/// Whether the current user may SELECT from a relation; nothing where there is none.
fn select_right(relation: pg_sys::Oid) -> Option<pg_sys::AclResult::Type> {
    let mut is_missing = false;
    // SAFETY: catalog look-ups, in a transaction.
    let right = unsafe {
        pg_sys::pg_class_aclcheck_ext(
            relation,
            pg_sys::GetUserId(),
            pg_sys::ACL_SELECT as pg_sys::AclMode,
            &mut is_missing,
        )
    };
    (!is_missing).then_some(right)
}

/// Whether the current user may SELECT from a relation, or from a partitioned table
/// that it is a partition of; nothing where there is none.
pub fn may_be_selected_from(relation: Oid) -> Option<bool> {
    let may = |oid: Oid| Some(select_right(oid.into())? == pg_sys::AclResult::ACLCHECK_OK);
    // SAFETY: catalog look-ups, behind the guard that pgrx puts around what it
    // binds itself.
    let ancestors = || unsafe {
        match pg_sys::get_rel_relispartition(relation.into()) {
            true => take_oids(pg_sys::ffi::pg_guard_ffi_boundary(|| {
                ffi::get_partition_ancestors(relation.into())
            })),
            false => Vec::new(),
        }
    };
    Some(may(relation)? || ancestors().into_iter().any(|oid| may(oid) == Some(true)))
}

/// The OIDs of a list that nobody else has.
///
/// # Safety
/// It is a list of OIDs, or null.
unsafe fn take_oids(list: *mut pg_sys::List) -> Vec<Oid> {
    if list.is_null() {
        return Vec::new();
    }
    // SAFETY: the caller's promise: as many cells as its length says.
    unsafe {
        let cells = std::slice::from_raw_parts((*list).elements, (*list).length as usize);
        let oids = cells.iter().map(|cell| cell.oid_value.to_u32()).collect();
        pg_sys::list_free(list);
        oids
    }
}

/// A partitioned table, or index, and all partitions of it, however deep.
pub fn partition_tree(root: Oid) -> Vec<Oid> {
    const NO_LOCK: pg_sys::LOCKMODE = pg_sys::NoLock as pg_sys::LOCKMODE;
    // SAFETY: catalog look-ups, in a transaction, behind the guard that pgrx puts
    // around what it binds itself.
    unsafe {
        take_oids(pg_sys::ffi::pg_guard_ffi_boundary(|| {
            ffi::find_all_inheritors(root.into(), NO_LOCK, std::ptr::null_mut())
        }))
    }
}

/// The tables, materialised views and sequences of a schema (with `pg_toast`, the
/// TOAST tables), or of the whole database, then without the system's own unless
/// they are wanted.
pub fn all_with_storage(schema: Option<pg_sys::Oid>, system: bool) -> Vec<Oid> {
    let mut kinds = vec![
        pg_sys::RELKIND_RELATION,
        pg_sys::RELKIND_MATVIEW,
        pg_sys::RELKIND_SEQUENCE,
    ];
    if schema.is_some() {
        kinds.push(pg_sys::RELKIND_TOASTVALUE);
    }
    let mut oids = Vec::new();
    // SAFETY: a scan of a catalog, from its beginning to its end; each row is
    // looked at before the next is asked for. An ERROR on the way leaves the scan
    // to the end of the transaction.
    unsafe {
        let catalog = pg_sys::table_open(pg_sys::RelationRelationId, LOCK);
        let scan = pg_sys::table_beginscan_catalog(catalog, 0, std::ptr::null_mut());
        loop {
            let tuple = pg_sys::heap_getnext(scan, pg_sys::ScanDirection::ForwardScanDirection);
            if tuple.is_null() {
                break;
            }
            let form: pg_sys::Form_pg_class = pg_sys::GETSTRUCT(tuple).cast();
            let oid = (*form).oid.to_u32();
            let is_wanted = match schema {
                Some(schema) => (*form).relnamespace == schema,
                None => system || oid >= pg_sys::FirstNormalObjectId,
            };
            if is_wanted && kinds.contains(&((*form).relkind as u8)) {
                oids.push(oid);
            }
        }
        pg_sys::table_endscan(scan);
        pg_sys::table_close(catalog, LOCK);
    }
    oids
}

/// Whether there is a schema of that OID.
pub fn schema_exists(schema: pg_sys::Oid) -> bool {
    // SAFETY: a catalog look-up, in a transaction; the name is a copy.
    unsafe {
        let name = pg_sys::get_namespace_name(schema);
        if !name.is_null() {
            pg_sys::pfree(name.cast());
        }
        !name.is_null()
    }
}

/// Tells the client something of a relation whose name this is, or was.
pub fn notice(format: &CStr, name: &CStr) {
    report(PgLogLevel::NOTICE, error::SUCCESS, format, name, None);
}

/// Reports a message with a relation's name in it, in the server's own encoding,
/// and a detail that such relations are not supported, if a kind is given.
fn report(
    level: PgLogLevel,
    sqlstate: PgSqlErrorCode,
    format: &CStr,
    name: &CStr,
    kind: Option<c_char>,
) {
    let (format, name) = (format.as_ptr(), name.as_ptr());
    // SAFETY: the message's argument is a C string, as the format wants it.
    unsafe {
        error::ereport(level, sqlstate, || {
            ffi::errmsg(format, name);
            if let Some(kind) = kind {
                ffi::errdetail_relkind_not_supported(kind);
            }
        });
    }
}

/// Whether the server reads relations past the operating system's cache.
pub fn read_directly() -> bool {
    compat::reads_directly()
}

/// The fork of that name. Raises the server's ERROR for a name that no fork has.
pub fn fork_by_name(name: &CStr) -> Fork {
    // SAFETY: a C string.
    let number = unsafe { pg_sys::forkname_to_number(name.as_ptr()) };
    Fork::from_number(number as u32).expect("the server knows no other forks")
}
