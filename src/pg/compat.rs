//! What differs between the major versions, and nothing else.

use std::ffi::CStr;
use std::ffi::c_int;

use pgrx::pg_sys;

use crate::blocks::{Oid, Record};

/// The physical identity of a relation: database, tablespace, file number.
pub type Locator = (Oid, Oid, Oid);

/// The file that the relation has now.
///
/// # Safety
/// `relation` is an open relation.
pub unsafe fn locator(relation: pg_sys::Relation) -> Locator {
    // SAFETY: the caller's promise.
    unsafe {
        #[cfg(feature = "pg15")]
        {
            let node = (*relation).rd_node;
            (
                node.dbNode.to_u32(),
                node.spcNode.to_u32(),
                node.relNode.to_u32(),
            )
        }
        #[cfg(not(feature = "pg15"))]
        {
            let locator = (*relation).rd_locator;
            (
                locator.dbOid.to_u32(),
                locator.spcOid.to_u32(),
                locator.relNumber.to_u32(),
            )
        }
    }
}

/// The block that a buffer's tag names.
pub fn record(tag: &pg_sys::BufferTag) -> Record {
    #[cfg(feature = "pg15")]
    let (database, tablespace, filenumber) =
        (tag.rnode.dbNode, tag.rnode.spcNode, tag.rnode.relNode);
    #[cfg(not(feature = "pg15"))]
    let (database, tablespace, filenumber) = (tag.dbOid, tag.spcOid, tag.relNumber);
    Record {
        database: database.to_u32(),
        tablespace: tablespace.to_u32(),
        filenumber: filenumber.to_u32(),
        fork: tag.forkNum as u32,
        block: tag.blockNum,
    }
}

/// Sets a signal's handler.
///
/// # Safety
/// `handler` does only what a signal handler may.
pub unsafe fn signal(number: c_int, handler: unsafe extern "C-unwind" fn(c_int)) {
    // SAFETY: the caller's promise.
    unsafe {
        #[cfg(not(feature = "pg18"))]
        pg_sys::pqsignal(number, Some(handler));
        #[cfg(feature = "pg18")]
        pg_sys::pqsignal_be(number, Some(handler));
    }
}

/// The most blocks that [`read_blocks`] reads at once: every version's limit
/// for one vectored read is at least that.
pub const READ_BLOCKS_MAX: u32 = 32;

/// Reads `count` blocks from `first` on, all in one segment file, into `into`,
/// one after another.
///
/// # Safety
/// `smgr` is the open storage of a relation, and `into` is aligned for I/O and
/// has room for `count` blocks, at most [`READ_BLOCKS_MAX`].
pub unsafe fn read_blocks(
    smgr: pg_sys::SMgrRelation,
    fork: pg_sys::ForkNumber::Type,
    first: u32,
    count: u32,
    into: *mut u8,
) {
    let block = |index: u32| into.wrapping_add(index as usize * pg_sys::BLCKSZ as usize);
    // SAFETY: the caller's promise.
    unsafe {
        #[cfg(any(feature = "pg15", feature = "pg16"))]
        for index in 0..count {
            pg_sys::smgrread(smgr, fork, first + index, block(index).cast());
        }
        #[cfg(not(any(feature = "pg15", feature = "pg16")))]
        {
            let mut buffers = [std::ptr::null_mut(); READ_BLOCKS_MAX as usize];
            for index in 0..count {
                buffers[index as usize] = block(index).cast();
            }
            pg_sys::smgrreadv(smgr, fork, first, buffers.as_mut_ptr(), count);
        }
    }
}

/// A shared structure of `size` bytes with that name, made by `init` where it
/// is not there yet, and mapped until this process ends.
///
/// # Safety
/// Whoever asks for that name means the same structure, and `init` makes it in
/// place, without calling PostgreSQL.
pub unsafe fn shared_struct(
    name: &'static CStr,
    size: usize,
    init: unsafe extern "C-unwind" fn(*mut std::ffi::c_void),
) -> *mut std::ffi::c_void {
    let mut found = false;
    #[cfg(any(feature = "pg15", feature = "pg16"))]
    {
        // SAFETY: AddinShmemInitLock, by its number in lwlocknames.txt, is the
        // lock that ShmemInitStruct asks for; it lets only one process make the
        // structure. An ERROR in between releases it with the transaction, or
        // with the process.
        unsafe {
            const ADDIN_SHMEM_INIT_LOCK: usize = 21;
            let lock = &raw mut (*pg_sys::MainLWLockArray.add(ADDIN_SHMEM_INIT_LOCK)).lock;
            pg_sys::LWLockAcquire(lock, pg_sys::LWLockMode::LW_EXCLUSIVE);
            let address = pg_sys::ShmemInitStruct(name.as_ptr(), size, &mut found);
            if !found {
                init(address);
            }
            pg_sys::LWLockRelease(lock);
            address
        }
    }
    #[cfg(not(any(feature = "pg15", feature = "pg16")))]
    {
        // SAFETY: the caller's promise.
        unsafe { pg_sys::GetNamedDSMSegment(name.as_ptr(), size, Some(init), &mut found) }
    }
}

/// Reserves memory for a shared structure while the server starts, where its
/// version wants that: 17 and later find it when it is first asked for.
///
/// # Safety
/// Runs in `_PG_init` of a preloaded library.
pub unsafe fn reserve_shared_memory(size: usize) {
    #[cfg(any(feature = "pg15", feature = "pg16"))]
    {
        use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
        static RESERVED: AtomicUsize = AtomicUsize::new(0);
        static mut PREVIOUS: pg_sys::shmem_request_hook_type = None;

        #[pgrx::pg_guard]
        unsafe extern "C-unwind" fn request() {
            // SAFETY: the postmaster calls the hook, once and alone.
            unsafe {
                if let Some(previous) = PREVIOUS {
                    previous();
                }
                pg_sys::RequestAddinShmemSpace(RESERVED.load(Relaxed));
            }
        }

        RESERVED.store(size, Relaxed);
        // SAFETY: the postmaster has one thread, and the hook is not yet in use.
        unsafe {
            PREVIOUS = pg_sys::shmem_request_hook;
            pg_sys::shmem_request_hook = Some(request);
        }
    }
    #[cfg(not(any(feature = "pg15", feature = "pg16")))]
    let _ = size;
}
