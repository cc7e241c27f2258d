//! What differs between the major versions, and nothing else.

pub mod buffer_state;

use std::ffi::CStr;
use std::ffi::c_int;
use std::ops::ControlFlow;

use pgrx::pg_sys;

use super::buffer::{self, Pinned, ReadEnd};
use super::process::check_for_interrupts;
use super::transaction::release_catalog_snapshot;
use crate::blocks::{BlockNumber, Fork, Oid, Record};

/// Settings that are for sessions of users, and what a worker has instead.
pub const SESSION_SETTINGS: &[(&CStr, &CStr)] = &[
    (c"statement_timeout", c"0"),
    (c"lock_timeout", c"0"),
    (c"idle_in_transaction_session_timeout", c"0"),
    #[cfg(not(any(feature = "pg15", feature = "pg16")))]
    (c"transaction_timeout", c"0"),
    (c"zero_damaged_pages", c"false"),
    (c"exit_on_error", c"false"),
];

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

/// The path of the first file of a fork, in the data folder.
///
/// # Safety
/// `relation` is an open relation.
unsafe fn path(relation: pg_sys::Relation, fork: Fork) -> String {
    // SAFETY: the caller's promise; the path is copied.
    unsafe {
        let (database, tablespace, filenumber) = locator(relation);
        let [database, tablespace, filenumber] =
            [database, tablespace, filenumber].map(pg_sys::Oid::from);
        let backend = (*relation).rd_backend;
        let path = pg_sys::GetRelationPath(database, tablespace, filenumber, backend, fork as i32);
        #[cfg(not(any(feature = "pg18", feature = "pg19")))]
        {
            let copy = CStr::from_ptr(path).to_string_lossy().into_owned();
            pg_sys::pfree(path.cast());
            copy
        }
        #[cfg(any(feature = "pg18", feature = "pg19"))]
        CStr::from_ptr(path.str_.as_ptr())
            .to_string_lossy()
            .into_owned()
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

/// Defines what signal handlers look like, with the arguments that the server gives them.
macro_rules! define_signal_handlers {
    ($($argument:ty),+) => {
        pub type SignalHandler = unsafe extern "C-unwind" fn($($argument),+);

        // PostgreSQL's own, to be given to `pqsignal` as they are: pgrx binds them
        // behind a guard, which a signal handler cannot have.
        unsafe extern "C-unwind" {
            pub fn SignalHandlerForShutdownRequest($(_: $argument),+);
            pub fn SignalHandlerForConfigReload($(_: $argument),+);
            pub fn die($(_: $argument),+);
        }

        /// Does nothing.
        pub unsafe extern "C-unwind" fn ignore_signal($(_: $argument),+) {}
    };
}

#[cfg(not(feature = "pg19"))]
define_signal_handlers!(c_int);
#[cfg(feature = "pg19")]
define_signal_handlers!(c_int, *const pg_sys::pg_signal_info);

/// Sets a signal's handler.
///
/// # Safety
/// `handler` does only what a signal handler may.
pub unsafe fn signal(number: c_int, handler: SignalHandler) {
    // SAFETY: the caller's promise.
    unsafe {
        #[cfg(not(any(feature = "pg18", feature = "pg19")))]
        pg_sys::pqsignal(number, Some(handler));
        #[cfg(any(feature = "pg18", feature = "pg19"))]
        pg_sys::pqsignal_be(number, Some(handler));
    }
}

/// Has `CREATE`, `ALTER` and `DROP DATABASE` end a background worker that is connected to the
/// database, where the server's version can do that.
pub const BGWORKER_INTERRUPTIBLE: u32 = {
    #[cfg(not(feature = "pg19"))]
    {
        0
    }
    #[cfg(feature = "pg19")]
    {
        pg_sys::BGWORKER_INTERRUPTIBLE
    }
};

/// Whether the list of free buffers is empty, looked at without a lock. 19 has no
/// such list: there, free buffers are found by looking for them.
pub fn free_list_is_empty() -> Option<bool> {
    #[cfg(not(feature = "pg19"))]
    {
        unsafe extern "C-unwind" {
            fn have_free_buffer() -> bool;
        }
        // SAFETY: it only looks, and raises no ERROR.
        Some(unsafe { !have_free_buffer() })
    }
    #[cfg(feature = "pg19")]
    None
}

/// Takes the share lock on the content of a pinned buffer, or gives it back.
///
/// # Safety
/// The buffer is pinned by this process, which has not locked it yet; or has, if it is
/// to be given back.
pub unsafe fn share_lock_buffer(buffer: pg_sys::Buffer, lock: bool) {
    // SAFETY: the caller's promise.
    unsafe {
        #[cfg(not(feature = "pg19"))]
        match lock {
            true => pg_sys::LockBuffer(buffer, pg_sys::BUFFER_LOCK_SHARE as i32),
            false => pg_sys::LockBuffer(buffer, pg_sys::BUFFER_LOCK_UNLOCK as i32),
        }
        // `LockBuffer` is an inline function of these two.
        #[cfg(feature = "pg19")]
        match lock {
            true => {
                pg_sys::LockBufferInternal(buffer, pg_sys::BufferLockMode::BUFFER_LOCK_SHARE);
            }
            false => pg_sys::UnlockBuffer(buffer),
        }
    }
}

/// The number of a wait event of that name; that of all extensions' where the server
/// has no names for them, or has given all of them away.
pub fn wait_event(name: &CStr) -> u32 {
    #[cfg(any(feature = "pg15", feature = "pg16"))]
    {
        let _ = name;
        pg_sys::PG_WAIT_EXTENSION
    }
    #[cfg(not(any(feature = "pg15", feature = "pg16")))]
    {
        // The server has 128, and raises an ERROR for one more; some may be asked
        // for at this moment.
        const ENOUGH: usize = 120;
        let mut count = 0;
        // SAFETY: C strings: the server copies the one, and gives copies of the others.
        unsafe {
            let names = pg_sys::GetWaitEventCustomNames(pg_sys::PG_WAIT_EXTENSION, &mut count);
            let taken = std::slice::from_raw_parts(names, count as usize);
            let is_taken = taken.iter().any(|&taken| CStr::from_ptr(taken) == name);
            for &taken in taken {
                pg_sys::pfree(taken.cast());
            }
            pg_sys::pfree(names.cast());
            match is_taken || taken.len() < ENOUGH {
                true => pg_sys::WaitEventExtensionNew(name.as_ptr()),
                false => pg_sys::PG_WAIT_EXTENSION,
            }
        }
    }
}

/// What a server process shows of itself, counted from 1.
///
/// # Safety
/// There are that many.
pub unsafe fn backend_entry(index: c_int) -> *mut pg_sys::LocalPgBackendStatus {
    // SAFETY: the caller's promise.
    unsafe {
        #[cfg(feature = "pg15")]
        return pg_sys::pgstat_fetch_stat_local_beentry(index);
        #[cfg(not(feature = "pg15"))]
        pg_sys::pgstat_get_local_beentry_by_index(index)
    }
}

/// Whether the server reads relations past the operating system's cache.
pub fn reads_directly() -> bool {
    #[cfg(feature = "pg15")]
    return false;
    #[cfg(not(feature = "pg15"))]
    {
        // `IO_DIRECT_DATA`.
        const DATA: i32 = 1;
        // SAFETY: set when the server started.
        let flags = unsafe { (&raw const pg_sys::io_direct_flags).read() };
        flags & DATA != 0
    }
}

/// The most blocks that [`Blocks::read`] reads at once: every version's limit
/// for one vectored read is at least that.
pub const READ_BLOCKS_MAX: u32 = 32;

/// The most blocks of one request to the operating system: Linux cuts a larger one
/// to the device's read-ahead size, of which this is the usual one.
pub const REQUEST_BLOCKS: u32 = 16;

/// The blocks of a fork, many at a time, without shared buffers.
///
/// Their segment files are opened beside the server: on all versions to ask what the
/// system has cached; and on 15 and 16, which read one block at a time, to read.
/// Whatever goes wrong there is left to the server to try, block by block, and to
/// raise its own ERROR about.
pub struct Blocks {
    relation: pg_sys::Relation,
    fork: Fork,
    segments: Segments,
}

impl Blocks {
    /// # Safety
    /// `relation` stays open for as long as this is used, and has that fork.
    pub unsafe fn new(relation: pg_sys::Relation, fork: Fork) -> Self {
        Self {
            relation,
            fork,
            // SAFETY: the caller's promise.
            segments: unsafe { Segments::new(relation, fork) },
        }
    }

    /// Whether the operating system has `count` blocks from `first` on cached, all
    /// in one segment file; false where it does not tell (Linux before 6.5).
    pub fn are_cached(&mut self, first: BlockNumber, count: u32) -> bool {
        self.segments.are_cached(first, count)
    }

    /// The fork's storage, which is asked for each time: an interrupt may have
    /// closed it.
    fn storage(&self) -> pg_sys::SMgrRelation {
        // SAFETY: the relation is open.
        unsafe { pg_sys::RelationGetSmgr(self.relation) }
    }

    /// Reads `count` blocks from `first` on, all in one segment file, into
    /// `into`, one after another.
    ///
    /// # Safety
    /// `into` is aligned for I/O and has room for `count` blocks, at most
    /// [`READ_BLOCKS_MAX`].
    pub unsafe fn read(&mut self, first: BlockNumber, count: u32, into: *mut u8) {
        let block = |index: u32| into.wrapping_add(index as usize * pg_sys::BLCKSZ as usize);
        let fork = self.fork as i32;
        // SAFETY: the caller's promise.
        unsafe {
            #[cfg(any(feature = "pg15", feature = "pg16"))]
            {
                let size = count as usize * pg_sys::BLCKSZ as usize;
                let into = std::slice::from_raw_parts_mut(into, size);
                if !reads_directly() && self.segments.read(first, into) {
                    return;
                }
                for index in 0..count {
                    pg_sys::smgrread(self.storage(), fork, first + index, block(index).cast());
                }
            }
            #[cfg(not(any(feature = "pg15", feature = "pg16")))]
            {
                let mut buffers = [std::ptr::null_mut(); READ_BLOCKS_MAX as usize];
                for index in 0..count {
                    buffers[index as usize] = block(index).cast();
                }
                pg_sys::smgrreadv(self.storage(), fork, first, buffers.as_mut_ptr(), count);
            }
        }
    }

    /// Asks the operating system to read `count` blocks from `first` on, all in
    /// one segment file.
    pub fn prefetch(&mut self, first: BlockNumber, count: u32) {
        let fork = self.fork as i32;
        #[cfg(any(feature = "pg15", feature = "pg16"))]
        if !self.segments.advise(first, count) {
            for block in first..first + count {
                // SAFETY: the relation is open.
                unsafe { pg_sys::smgrprefetch(self.storage(), fork, block) };
            }
        }
        #[cfg(not(any(feature = "pg15", feature = "pg16")))]
        // SAFETY: the relation is open.
        unsafe {
            pg_sys::smgrprefetch(self.storage(), fork, first, count as i32);
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
    #[cfg(any(feature = "pg17", feature = "pg18"))]
    {
        // SAFETY: the caller's promise.
        unsafe { pg_sys::GetNamedDSMSegment(name.as_ptr(), size, Some(init), &mut found) }
    }
    #[cfg(feature = "pg19")]
    {
        type Init = unsafe extern "C-unwind" fn(*mut std::ffi::c_void);

        unsafe extern "C-unwind" fn call(
            address: *mut std::ffi::c_void,
            init: *mut std::ffi::c_void,
        ) {
            // SAFETY: `init` is the function pointer given below, and the caller's promise
            // holds for it.
            unsafe { std::mem::transmute::<*mut std::ffi::c_void, Init>(init)(address) };
        }

        let argument = init as *mut std::ffi::c_void;
        // SAFETY: the caller's promise.
        unsafe { pg_sys::GetNamedDSMSegment(name.as_ptr(), size, Some(call), &mut found, argument) }
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

/// Reads blocks, in ascending order, into free buffers, of which each is handed to
/// `each` with its place among the blocks. Reads ahead by asking the operating
/// system, and reads in this process: where the server has I/O workers, they would
/// only compete with several processes that load at once.
///
/// Holds no snapshot of catalogs meanwhile, not even that of looking up how far
/// to read ahead in the tablespace.
///
/// # Safety
/// `relation` is open and permanent, and the blocks are there.
pub unsafe fn read_into_free_buffers(
    relation: pg_sys::Relation,
    fork: Fork,
    blocks: &[BlockNumber],
    each: &mut dyn FnMut(usize, &Pinned) -> ControlFlow<()>,
) -> ReadEnd {
    // SAFETY: the caller's promise.
    unsafe { read_in_runs(relation, fork, blocks, true, each) }
}

/// Whether memory is to be provided before a call's reads fill it. 17 and later read
/// many blocks at once, and so have it provided for all of these by the system; on 18
/// even by I/O workers, on several processors at the same time.
pub const READS_WANT_MEMORY: bool = cfg!(any(feature = "pg15", feature = "pg16"));

/// Reads blocks, in ascending order, into buffers, of which each is handed to
/// `each` with its place among the blocks, until that breaks off. Reads ahead as
/// the server's own commands do, through a read stream on 17 and later; or in this
/// process, if others read beside it, with which I/O workers would only compete.
///
/// # Safety
/// `relation` is open, and the blocks are there.
pub unsafe fn read_into_buffers(
    relation: pg_sys::Relation,
    fork: Fork,
    blocks: &[BlockNumber],
    is_alone: bool,
    each: &mut dyn FnMut(usize, &Pinned) -> ControlFlow<()>,
) {
    // SAFETY: the caller's promise.
    unsafe {
        #[cfg(not(any(feature = "pg15", feature = "pg16")))]
        if is_alone {
            return read_through_stream(relation, fork, blocks, each);
        }
        #[cfg(any(feature = "pg15", feature = "pg16"))]
        let _ = is_alone;
        read_in_runs(relation, fork, blocks, false, each);
    }
}

/// # Safety
/// As of the functions above.
unsafe fn read_in_runs(
    relation: pg_sys::Relation,
    fork: Fork,
    blocks: &[BlockNumber],
    only_free: bool,
    each: &mut dyn FnMut(usize, &Pinned) -> ControlFlow<()>,
) -> ReadEnd {
    // SAFETY: the caller's promise.
    let mut ahead = unsafe { ReadAhead::new(relation, fork) };
    // Blocks that are read into free buffers only are in none, as far as is known.
    // Others may all be, and nobody is to read those ahead from a disk: where the
    // last was in a buffer, the next is thought to be.
    // SAFETY: as above.
    let mut is_cached =
        !only_free && ahead.most_requests > 0 && unsafe { is_in_buffer(relation, fork, blocks[0]) };
    release_catalog_snapshot();
    let most = most_in_run();
    let mut index = 0;
    while index < blocks.len() {
        check_for_interrupts();
        let mut run = run_length(&blocks[index..], most);
        if only_free {
            run = buffer::count_free_ahead(run);
        }
        if run == 0 {
            return ReadEnd::Full;
        }
        if !is_cached {
            ahead.advance(blocks, index);
        }
        let hits = buffer::hits();
        let mut end = ControlFlow::Continue(());
        // SAFETY: the caller's promise.
        unsafe {
            read_run(relation, fork, blocks[index], run, &mut |buffer| {
                // What is read is taken, whatever was said of the block before.
                if each(index, buffer).is_break() {
                    end = ControlFlow::Break(());
                }
                index += 1;
            });
        }
        is_cached = !only_free && buffer::hits() - hits >= run as u64;
        if end.is_break() {
            break;
        }
    }
    ReadEnd::Over
}

/// Whether a block is in a buffer. One that is not may be asked for ahead.
///
/// # Safety
/// `relation` is open.
pub unsafe fn is_in_buffer(relation: pg_sys::Relation, fork: Fork, block: BlockNumber) -> bool {
    // SAFETY: the caller's promise.
    let found = unsafe { pg_sys::PrefetchBuffer(relation, fork as i32, block) };
    found.recent_buffer != pg_sys::InvalidBuffer as pg_sys::Buffer
}

/// How many blocks follow one another at the beginning, up to `most`, all in one
/// segment file.
fn run_length(blocks: &[BlockNumber], most: usize) -> usize {
    let first = blocks[0];
    let left_in_segment = pg_sys::RELSEG_SIZE - first % pg_sys::RELSEG_SIZE;
    blocks
        .iter()
        .zip(first..)
        .take(most.min(left_in_segment as usize))
        .take_while(|&(&block, expected)| block == expected)
        .count()
}

/// How many blocks the server reads at once.
#[cfg(any(feature = "pg15", feature = "pg16"))]
fn most_in_run() -> usize {
    1
}

#[cfg(any(feature = "pg15", feature = "pg16"))]
unsafe fn read_run(
    relation: pg_sys::Relation,
    fork: Fork,
    first: BlockNumber,
    count: usize,
    each: &mut dyn FnMut(&Pinned),
) {
    debug_assert_eq!(count, 1);
    // SAFETY: the caller's promise; the pin that reading takes is handed over.
    let buffer = unsafe {
        Pinned::new(pg_sys::ReadBufferExtended(
            relation,
            fork as i32,
            first,
            pg_sys::ReadBufferMode::RBM_NORMAL,
            std::ptr::null_mut(),
        ))
    };
    each(&buffer);
}

#[cfg(not(any(feature = "pg15", feature = "pg16")))]
const RUN: usize = READ_BLOCKS_MAX as usize;

/// How many blocks the server reads at once, and this process may pin at once.
#[cfg(not(any(feature = "pg15", feature = "pg16")))]
fn most_in_run() -> usize {
    // SAFETY: a setting, and this process's own count of pins.
    unsafe {
        let mut pins = RUN.min(pg_sys::io_combine_limit as usize) as u32;
        pg_sys::LimitAdditionalPins(&mut pins);
        pins as usize
    }
}

#[cfg(not(any(feature = "pg15", feature = "pg16")))]
unsafe fn read_run(
    relation: pg_sys::Relation,
    fork: Fork,
    first: BlockNumber,
    count: usize,
    each: &mut dyn FnMut(&Pinned),
) {
    #[cfg(feature = "pg17")]
    const FLAGS: u32 = 0;
    #[cfg(not(feature = "pg17"))]
    const FLAGS: u32 = pg_sys::READ_BUFFERS_SYNCHRONOUSLY;

    let mut buffers = [pg_sys::InvalidBuffer as pg_sys::Buffer; RUN];
    let mut done = 0;
    while done < count {
        let rest = &mut buffers[done..count];
        let mut started = rest.len() as c_int;
        // SAFETY: the caller's promise. The server may start fewer reads than it
        // is asked for, and from 18 on have pinned more: what it left in `buffers` is
        // given to it again. Pins of what was read are handed over.
        unsafe {
            let mut operation = pg_sys::ReadBuffersOperation {
                rel: relation,
                smgr: pg_sys::RelationGetSmgr(relation),
                forknum: fork as i32,
                ..Default::default()
            };
            let persistence = (*(*relation).rd_rel).relpersistence;
            #[cfg(feature = "pg17")]
            {
                operation.smgr_persistence = persistence;
            }
            #[cfg(not(feature = "pg17"))]
            {
                operation.persistence = persistence;
            }
            if pg_sys::StartReadBuffers(
                &mut operation,
                rest.as_mut_ptr(),
                first + done as u32,
                &mut started,
                FLAGS as c_int,
            ) {
                pg_sys::WaitReadBuffers(&mut operation);
            }
            for &buffer in &rest[..started as usize] {
                each(&Pinned::new(buffer));
            }
        }
        done += started as usize;
    }
}

/// # Safety
/// As of [`read_into_buffers`].
#[cfg(not(any(feature = "pg15", feature = "pg16")))]
unsafe fn read_through_stream(
    relation: pg_sys::Relation,
    fork: Fork,
    blocks: &[BlockNumber],
    each: &mut dyn FnMut(usize, &Pinned) -> ControlFlow<()>,
) {
    /// What the stream asks its callback for. It lies on the stack below the
    /// stream's calls, and holds nothing that unwinding would have to drop.
    struct Source {
        blocks: *const BlockNumber,
        left: usize,
    }

    unsafe extern "C-unwind" fn next(
        _stream: *mut pg_sys::ReadStream,
        source: *mut std::ffi::c_void,
        _per_buffer: *mut std::ffi::c_void,
    ) -> BlockNumber {
        // SAFETY: the source given to the stream below, which outlives it.
        unsafe {
            let source = &mut *source.cast::<Source>();
            if source.left == 0 {
                return pg_sys::InvalidBlockNumber;
            }
            let block = *source.blocks;
            source.blocks = source.blocks.add(1);
            source.left -= 1;
            block
        }
    }

    #[cfg(feature = "pg17")]
    const BATCHING: u32 = 0;
    // The callback takes no locks and waits for nothing.
    #[cfg(not(feature = "pg17"))]
    const BATCHING: u32 = pg_sys::READ_STREAM_USE_BATCHING;

    let mut source = Source {
        blocks: blocks.as_ptr(),
        left: blocks.len(),
    };
    let source = &raw mut source;
    // SAFETY: the caller's promise; blocks and source outlive the stream, which
    // the end of the transaction frees where an ERROR is raised.
    unsafe {
        let stream = pg_sys::read_stream_begin_relation(
            (pg_sys::READ_STREAM_MAINTENANCE | pg_sys::READ_STREAM_FULL | BATCHING) as i32,
            std::ptr::null_mut(),
            relation,
            fork as i32,
            Some(next),
            source.cast(),
            0,
        );
        release_catalog_snapshot();
        for index in 0.. {
            check_for_interrupts();
            let buffer = pg_sys::read_stream_next_buffer(stream, std::ptr::null_mut());
            if buffer == pg_sys::InvalidBuffer as pg_sys::Buffer {
                break;
            }
            if each(index, &Pinned::new(buffer)).is_break() {
                // What is being read already is taken as well.
                (*source).left = 0;
            }
        }
        pg_sys::read_stream_end(stream);
    }
}

/// The segment files of a fork, opened beside the server.
struct Segments {
    /// The path of the first.
    path: String,
    /// The one that is open, and its number.
    open: Option<(u32, std::io::Result<std::fs::File>)>,
}

impl Segments {
    /// # Safety
    /// `relation` is open.
    unsafe fn new(relation: pg_sys::Relation, fork: Fork) -> Self {
        Self {
            // SAFETY: the caller's promise.
            path: unsafe { path(relation, fork) },
            open: None,
        }
    }

    /// The file that has this block, if it can be opened, and where the block is
    /// in it.
    fn file(&mut self, block: BlockNumber) -> Option<(&std::fs::File, u64)> {
        let segment = block / pg_sys::RELSEG_SIZE;
        if self.open.as_ref().is_none_or(|(open, _)| *open != segment) {
            let path = match segment {
                0 => self.path.clone(),
                _ => format!("{}.{segment}", self.path),
            };
            self.open = Some((segment, std::fs::File::open(path)));
        }
        let offset = u64::from(block % pg_sys::RELSEG_SIZE) * u64::from(pg_sys::BLCKSZ);
        match &self.open {
            Some((_, Ok(file))) => Some((file, offset)),
            _ => None,
        }
    }

    /// Whether the operating system has these blocks cached. It counts its pages,
    /// which may be large, where a request to read looks at each 4 kB.
    fn are_cached(&mut self, first: BlockNumber, count: u32) -> bool {
        use std::os::fd::AsRawFd;
        // The same on all architectures that PostgreSQL is commonly run on.
        const CACHESTAT: libc::c_long = 451;
        let Some((file, offset)) = self.file(first) else {
            return false;
        };
        let range = [offset, u64::from(count) * u64::from(pg_sys::BLCKSZ)];
        // Pages that are cached, dirty, being written, evicted, evicted recently.
        let mut pages = [0u64; 5];
        // SAFETY: an open file, and room for what the call reads and fills.
        let result = unsafe {
            libc::syscall(
                CACHESTAT,
                file.as_raw_fd(),
                range.as_ptr(),
                pages.as_mut_ptr(),
                0,
            )
        };
        // SAFETY: a constant of the system.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as u64;
        let [offset, size] = range;
        result == 0 && pages[0] > (offset + size - 1) / page - offset / page
    }

    /// Reads blocks from `first` on, all in one file; false where not all of
    /// them could be read.
    #[cfg(any(feature = "pg15", feature = "pg16"))]
    fn read(&mut self, first: BlockNumber, into: &mut [u8]) -> bool {
        use std::os::unix::fs::FileExt;
        let Some((file, offset)) = self.file(first) else {
            return false;
        };
        const WAITS: u32 = pg_sys::WaitEventIO::WAIT_EVENT_DATA_FILE_READ;
        // SAFETY: what this process shows of itself, which only it writes.
        let show = |event| unsafe { pg_sys::my_wait_event_info.write_volatile(event) };
        show(WAITS);
        let result = file.read_exact_at(into, offset);
        show(0);
        result.is_ok()
    }

    /// Has the operating system read blocks from `first` on, all in one file, by
    /// requests that it does not cut short; false where that cannot be asked for.
    #[cfg(any(feature = "pg15", feature = "pg16"))]
    fn advise(&mut self, first: BlockNumber, count: u32) -> bool {
        use std::os::fd::AsRawFd;
        let Some((file, offset)) = self.file(first) else {
            return false;
        };
        let size = i64::from(count) * i64::from(pg_sys::BLCKSZ);
        // SAFETY: an open file.
        let result = unsafe {
            libc::posix_fadvise(
                file.as_raw_fd(),
                offset as i64,
                size,
                libc::POSIX_FADV_WILLNEED,
            )
        };
        result == 0
    }
}

/// Tells the operating system which blocks will be read next, for a process that
/// waits for what it reads.
///
/// Blocks that follow one another are asked for together, as far as one request
/// reaches.
struct ReadAhead {
    blocks: Blocks,
    /// Where, among the blocks, the requests end that have been made and whose
    /// blocks have not been read.
    requests: std::collections::VecDeque<usize>,
    /// The first block that has not been asked for.
    next: usize,
    most_requests: usize,
}

impl ReadAhead {
    /// # Safety
    /// `relation` stays open for as long as this is used, and has that fork.
    unsafe fn new(relation: pg_sys::Relation, fork: Fork) -> Self {
        // SAFETY: the caller's promise.
        unsafe {
            let (_, tablespace, _) = locator(relation);
            let concurrency = pg_sys::get_tablespace_maintenance_io_concurrency(tablespace.into());
            Self {
                blocks: Blocks::new(relation, fork),
                requests: std::collections::VecDeque::new(),
                next: 0,
                most_requests: match reads_directly() {
                    true => 0,
                    false => usize::try_from(concurrency).unwrap_or(0),
                },
            }
        }
    }

    /// Makes as many requests ahead of `blocks[index]`, which is about to be
    /// read, as are allowed.
    fn advance(&mut self, blocks: &[BlockNumber], index: usize) {
        while self.requests.front().is_some_and(|&end| end <= index) {
            self.requests.pop_front();
        }
        while self.requests.len() < self.most_requests && self.next < blocks.len() {
            let start = self.next.max(index);
            let run = run_length(&blocks[start..], REQUEST_BLOCKS as usize);
            self.blocks.prefetch(blocks[start], run as u32);
            self.next = start + run;
            self.requests.push_back(self.next);
        }
    }
}
