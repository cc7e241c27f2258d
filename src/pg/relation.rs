//! Relations: opened, locked, read.

use std::ffi::{CStr, c_char};
use std::ops::ControlFlow;

use pgrx::{PgLogLevel, PgSqlErrorCode, pg_sys};

use super::buffer::{Pinned, ReadEnd};
use super::compat::{self, Blocks, READ_BLOCKS_MAX, REQUEST_BLOCKS};
use super::error::new_report;
use super::{ffi, process};
use crate::blocks::{BlockNumber, Fork, Oid};

const LOCK: pg_sys::LOCKMODE = pg_sys::AccessShareLock as pg_sys::LOCKMODE;

/// The backend of relations that are no session's own.
const NO_BACKEND: i32 = -1;

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
        // SAFETY: catalog look-ups and locks, in a transaction.
        unsafe {
            let kind = pg_sys::get_rel_relkind(oid) as u8;
            let is_index =
                kind == pg_sys::RELKIND_INDEX || kind == pg_sys::RELKIND_PARTITIONED_INDEX;
            let table = is_index.then(|| pg_sys::IndexGetRelation(oid, true));
            if let Some(table) = table
                && table != pg_sys::InvalidOid
            {
                pg_sys::LockRelationOid(table, LOCK);
            }
            let relation = Self {
                relation: pg_sys::relation_open(oid, LOCK),
                table,
            };
            // The OID may have become another index's before the locks were
            // held: only now the pair is certain.
            if let Some(table) = table
                && (table == pg_sys::InvalidOid || table != pg_sys::IndexGetRelation(oid, true))
            {
                relation.raise(
                    PgSqlErrorCode::ERRCODE_UNDEFINED_TABLE,
                    c"could not find parent table of index \"%s\"",
                    None,
                );
            }
            relation
        }
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

    #[cfg(any(test, feature = "pg_test"))]
    pub fn name(&self) -> String {
        // SAFETY: open, so that its pg_class row is there.
        unsafe {
            let name = &(*(*self.relation).rd_rel).relname;
            CStr::from_ptr(name.data.as_ptr())
                .to_string_lossy()
                .into_owned()
        }
    }

    /// Raises the server's ERROR unless the current user may SELECT from it, or
    /// from its table, where it is an index.
    pub fn check_select_right(&self) {
        // SAFETY: open; the name is the server's own, in its own encoding.
        unsafe {
            let oid = (*self.relation).rd_id;
            let result = pg_sys::pg_class_aclcheck(
                self.table.unwrap_or(oid),
                pg_sys::GetUserId(),
                pg_sys::ACL_SELECT as pg_sys::AclMode,
            );
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
        // SAFETY: open.
        let kind = unsafe { (*(*self.relation).rd_rel).relkind };
        let has_storage = [
            pg_sys::RELKIND_RELATION,
            pg_sys::RELKIND_INDEX,
            pg_sys::RELKIND_SEQUENCE,
            pg_sys::RELKIND_TOASTVALUE,
            pg_sys::RELKIND_MATVIEW,
        ]
        .contains(&(kind as u8));
        if has_storage {
            return;
        }
        self.raise(
            PgSqlErrorCode::ERRCODE_WRONG_OBJECT_TYPE,
            c"relation \"%s\" does not have storage",
            Some(kind),
        );
    }

    /// Raises the server's ERROR where it is another session's temporary relation.
    pub fn check_not_others(&self) {
        // SAFETY: open.
        let (backend, mine) = unsafe {
            let relation = &*self.relation;
            (relation.rd_backend, relation.rd_islocaltemp)
        };
        if backend != NO_BACKEND && !mine {
            new_report(
                PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED,
                "cannot access temporary tables of other sessions".to_owned(),
                None,
            )
            .report(PgLogLevel::ERROR);
        }
    }

    /// Raises an ERROR whose message has the relation's name in it, in the
    /// server's own encoding, and whose detail is that such relations are not
    /// supported, if a kind is given.
    fn raise(&self, sqlstate: PgSqlErrorCode, format: &CStr, kind: Option<c_char>) {
        let format = format.as_ptr();
        // SAFETY: what `ereport` expands to. Nothing in the closure is dropped,
        // and the message's argument is the server's own string.
        unsafe {
            let name = (*(*self.relation).rd_rel).relname.data.as_ptr();
            pg_sys::ffi::pg_guard_ffi_boundary(|| {
                if ffi::errstart(PgLogLevel::ERROR as i32, std::ptr::null()) {
                    ffi::errcode(sqlstate as i32);
                    ffi::errmsg(format, name);
                    if let Some(kind) = kind {
                        ffi::errdetail_relkind_not_supported(kind);
                    }
                    ffi::errfinish(
                        c"relation.rs".as_ptr(),
                        line!() as i32,
                        c"pg_prewarm".as_ptr(),
                    );
                }
            });
        }
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

    /// Reads the blocks from `first` to before `end` into shared buffers (a
    /// temporary relation's: into local ones), and tells `done` of each so many.
    /// Reads ahead, and serves interrupts. Raises the server's ERROR where a block
    /// cannot be read.
    pub fn read_into_buffers(
        &self,
        fork: Fork,
        first: BlockNumber,
        end: BlockNumber,
        mut done: impl FnMut(u32),
    ) {
        const AT_ONCE: u32 = 8192;
        let mut next = first;
        while next < end {
            let blocks: Vec<_> = (next..end).take(AT_ONCE as usize).collect();
            next += blocks.len() as u32;
            // SAFETY: open.
            unsafe {
                compat::read_into_buffers(self.relation, fork, &blocks, false, &mut |_, _| {
                    done(1);
                    ControlFlow::Continue(())
                });
            }
        }
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
        unsafe { compat::read_into_buffers(self.relation, fork, blocks, true, &mut each) }
    }

    /// Asks the operating system to read the blocks from `first` to before `end`,
    /// does not wait, and tells `done` of each so many. Serves interrupts.
    pub fn prefetch(
        &self,
        fork: Fork,
        first: BlockNumber,
        end: BlockNumber,
        done: impl FnMut(u32),
    ) {
        self.in_runs(first, end, REQUEST_BLOCKS, done, {
            // SAFETY: open, for as long as this is borrowed.
            let mut blocks = unsafe { Blocks::new(self.relation, fork) };
            move |first, count| blocks.prefetch(first, count)
        });
    }

    /// Reads the blocks from `first` to before `end`, not into shared buffers, and
    /// tells `done` of each so many. Serves interrupts.
    pub fn read(&self, fork: Fork, first: BlockNumber, end: BlockNumber, done: impl FnMut(u32)) {
        self.in_runs(first, end, READ_BLOCKS_MAX, done, {
            let mut memory = Box::new(IoAligned([0; READ_BYTES]));
            // SAFETY: as above.
            let mut blocks = unsafe { Blocks::new(self.relation, fork) };
            // SAFETY: the memory is aligned and large enough.
            move |first, count| unsafe { blocks.read(first, count, memory.0.as_mut_ptr()) }
        });
    }

    /// Does something for runs of blocks, of which none crosses the end of a
    /// segment file.
    fn in_runs(
        &self,
        first: BlockNumber,
        end: BlockNumber,
        most: u32,
        mut done: impl FnMut(u32),
        mut act: impl FnMut(BlockNumber, u32),
    ) {
        let mut block = first;
        while block < end {
            process::check_for_interrupts();
            let segment_end = (block / pg_sys::RELSEG_SIZE + 1).saturating_mul(pg_sys::RELSEG_SIZE);
            let count = (end.min(segment_end) - block).min(most);
            act(block, count);
            block += count;
            done(count);
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
            if let Some(table) = self.table {
                pg_sys::UnlockRelationOid(table, LOCK);
            }
        }
    }
}

const READ_BYTES: usize = READ_BLOCKS_MAX as usize * pg_sys::BLCKSZ as usize;

/// Memory that the server may read into with direct I/O.
#[repr(C, align(4096))]
struct IoAligned([u8; READ_BYTES]);

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
