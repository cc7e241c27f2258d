//! Reading blocks, as each major version can: one by one on 15 and 16, many at once
//! and through read streams from 17 on.
//!
//! Reading a block that does not exist, or of a fork that does not, raises an ERROR.

use std::ops::ControlFlow;

use pgrx::pg_sys;

use crate::blocks::{BlockNumber, Fork};

/// Whether the server reads several blocks at once.
pub const READS_MANY_AT_ONCE: bool = cfg!(not(any(feature = "pg15", feature = "pg16")));

/// Whether other processes can read for this one, such as I/O workers.
pub const CAN_HAND_OVER: bool = cfg!(not(any(
    feature = "pg15",
    feature = "pg16",
    feature = "pg17"
)));

/// The maximum number of blocks read at once. No version's limit for one vectored read is
/// below that.
pub const READ_BLOCKS_MAX: usize = 32;

/// Reads `count` blocks of one segment file from `first` on into `into`, not through
/// shared buffers.
///
/// # Safety
/// `relation` is open. `into` has room for `count` blocks, at most [`READ_BLOCKS_MAX`], and
/// is aligned for direct I/O.
#[expect(
    clippy::cast_possible_truncation,
    reason = "there are at most READ_BLOCKS_MAX blocks"
)]
pub unsafe fn smgr_read(
    relation: pg_sys::Relation,
    fork: Fork,
    first: BlockNumber,
    count: usize,
    into: *mut u8,
) {
    let block = |index: usize| into.wrapping_add(index * pg_sys::BLCKSZ as usize);
    // The storage is asked for each time, since an interrupt may have closed it.
    // SAFETY: the relation is open, and each block has its place in `into`.
    unsafe {
        #[cfg(any(feature = "pg15", feature = "pg16"))]
        for index in 0..count {
            let storage = pg_sys::RelationGetSmgr(relation);
            let number = first + index as BlockNumber;
            pg_sys::smgrread(storage, fork as i32, number, block(index).cast());
        }
        #[cfg(not(any(feature = "pg15", feature = "pg16")))]
        {
            let storage = pg_sys::RelationGetSmgr(relation);
            let mut places = [std::ptr::null_mut(); READ_BLOCKS_MAX];
            for (index, place) in places[..count].iter_mut().enumerate() {
                *place = block(index).cast();
            }
            let count = count as BlockNumber;
            pg_sys::smgrreadv(storage, fork as i32, first, places.as_mut_ptr(), count);
        }
    }
}

/// Asks the operating system to read `count` blocks of one segment file from `first`
/// on.
///
/// # Safety
/// `relation` is open.
#[expect(
    clippy::cast_possible_truncation,
    reason = "a segment file has fewer than 2^31 blocks"
)]
pub unsafe fn smgr_prefetch(
    relation: pg_sys::Relation,
    fork: Fork,
    first: BlockNumber,
    count: usize,
) {
    // SAFETY: the relation is open.
    unsafe {
        #[cfg(any(feature = "pg15", feature = "pg16"))]
        for index in 0..count {
            let storage = pg_sys::RelationGetSmgr(relation);
            pg_sys::smgrprefetch(storage, fork as i32, first + index as BlockNumber);
        }
        #[cfg(not(any(feature = "pg15", feature = "pg16")))]
        {
            let storage = pg_sys::RelationGetSmgr(relation);
            pg_sys::smgrprefetch(storage, fork as i32, first, count as i32);
        }
    }
}

/// How many blocks [`read_buffers`] may read at once now. `hands_over` is as for that.
pub fn max_buffers_at_once(hands_over: bool) -> usize {
    let _ = hands_over;
    #[cfg(any(feature = "pg15", feature = "pg16"))]
    {
        1
    }
    #[cfg(not(any(feature = "pg15", feature = "pg16")))]
    // SAFETY: a setting, and this process's own count of pins.
    unsafe {
        let max = READ_BLOCKS_MAX.min(pg_sys::io_combine_limit as usize);
        #[cfg(not(feature = "pg17"))]
        let max = handed_over(hands_over).map_or(max, |half| 2 * half);
        #[expect(
            clippy::cast_possible_truncation,
            reason = "it is at most READ_BLOCKS_MAX"
        )]
        let mut pins = max as u32;
        pg_sys::LimitAdditionalPins(&mut pins);
        pins as usize
    }
}

/// How many blocks [`read_buffers`] hands over if it reads more than that: at most half of what
/// it reads at once. `None` if it is not to hand over any, or nobody else would read them.
#[cfg(not(any(feature = "pg15", feature = "pg16", feature = "pg17")))]
fn handed_over(hands_over: bool) -> Option<usize> {
    // SAFETY: two settings.
    let (method, limit) = unsafe {
        (
            (&raw const pg_sys::io_method).read(),
            (&raw const pg_sys::io_combine_limit).read(),
        )
    };
    let is_asynchronous = method != pg_sys::IoMethod::IOMETHOD_SYNC as i32;
    (hands_over && is_asynchronous).then(|| (READ_BLOCKS_MAX / 2).min(limit as usize))
}

/// Reads blocks of one segment file from `first` on into buffers: as many as the server
/// reads at once, and at most one for each place in `buffers`. Returns how many. The caller
/// has a pin on each.
///
/// This process reads them. From 18 on, with `hands_over`, if they are too many for one read, it
/// reads the second part, while the first is read as `io_method` says: by an I/O worker, for
/// example.
///
/// The server may have pinned more than it has read. Those stay in `buffers`, and must
/// be passed again with the next call.
///
/// # Safety
/// `relation` is open. `buffers` has at least one place and at most
/// [`max_buffers_at_once`], each invalid or left there by the call before.
pub unsafe fn read_buffers(
    relation: pg_sys::Relation,
    fork: Fork,
    first: BlockNumber,
    buffers: &mut [pg_sys::Buffer],
    hands_over: bool,
) -> usize {
    let _ = hands_over;
    #[cfg(any(feature = "pg15", feature = "pg16"))]
    {
        // SAFETY: the relation is open.
        buffers[0] = unsafe {
            pg_sys::ReadBufferExtended(
                relation,
                fork as i32,
                first,
                pg_sys::ReadBufferMode::RBM_NORMAL,
                std::ptr::null_mut(),
            )
        };
        1
    }
    #[cfg(not(any(feature = "pg15", feature = "pg16")))]
    {
        // SAFETY: the relation is open. The operations stay where they are until they are over.
        // After an ERROR, the end of the (sub)transaction has the server forget them; until then
        // this process reads nothing else.
        unsafe {
            #[cfg(not(feature = "pg17"))]
            if let Some(half) = handed_over(hands_over)
                && buffers.len() > half
            {
                let (handed_over, own) = buffers.split_at_mut(half);
                let mut other = new_operation(relation, fork);
                let other = &raw mut other;
                let (mut read, other_is_to_wait) = start(other, first, handed_over, 0);
                // Otherwise a block among them is cached, or is being read already.
                if read == half {
                    #[expect(
                        clippy::cast_possible_truncation,
                        reason = "it is less than READ_BLOCKS_MAX"
                    )]
                    let next = first + half as BlockNumber;
                    read += read_here(relation, fork, next, own);
                }
                if other_is_to_wait {
                    pg_sys::WaitReadBuffers(other);
                }
                return read;
            }
            read_here(relation, fork, first, buffers)
        }
    }
}

/// Reads blocks in this process. See [`read_buffers`].
///
/// # Safety
/// As for [`read_buffers`].
#[cfg(not(any(feature = "pg15", feature = "pg16")))]
unsafe fn read_here(
    relation: pg_sys::Relation,
    fork: Fork,
    first: BlockNumber,
    buffers: &mut [pg_sys::Buffer],
) -> usize {
    #[cfg(feature = "pg17")]
    const FLAGS: u32 = 0;
    #[cfg(not(feature = "pg17"))]
    const FLAGS: u32 = pg_sys::READ_BUFFERS_SYNCHRONOUSLY;
    // SAFETY: the relation is open. The operation stays where it is until it is over.
    unsafe {
        let mut operation = new_operation(relation, fork);
        let operation = &raw mut operation;
        let (read, is_to_wait) = start(operation, first, buffers, FLAGS);
        if is_to_wait {
            pg_sys::WaitReadBuffers(operation);
        }
        read
    }
}

/// A read of consecutive blocks, which has not begun.
///
/// # Safety
/// `relation` is open.
#[cfg(not(any(feature = "pg15", feature = "pg16")))]
unsafe fn new_operation(relation: pg_sys::Relation, fork: Fork) -> pg_sys::ReadBuffersOperation {
    // SAFETY: the relation is open.
    unsafe {
        let persistence = (*(*relation).rd_rel).relpersistence;
        pg_sys::ReadBuffersOperation {
            rel: relation,
            smgr: pg_sys::RelationGetSmgr(relation),
            forknum: fork as i32,
            #[cfg(feature = "pg17")]
            smgr_persistence: persistence,
            #[cfg(not(feature = "pg17"))]
            persistence,
            ..Default::default()
        }
    }
}

/// Begins to read from `first` on. Returns how many blocks are read, or cached, and whether
/// to wait for that.
///
/// # Safety
/// `operation` is new, and stays where it is until it is over; so do `buffers`, for which see
/// [`read_buffers`].
#[cfg(not(any(feature = "pg15", feature = "pg16")))]
unsafe fn start(
    operation: *mut pg_sys::ReadBuffersOperation,
    first: BlockNumber,
    buffers: &mut [pg_sys::Buffer],
    flags: u32,
) -> (usize, bool) {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "there are at most READ_BLOCKS_MAX buffers"
    )]
    let mut started = buffers.len() as i32;
    // SAFETY: `started` is the length of `buffers`; for the rest, see the contract.
    let is_to_wait = unsafe {
        pg_sys::StartReadBuffers(
            operation,
            buffers.as_mut_ptr(),
            first,
            &mut started,
            flags as i32,
        )
    };
    (started as usize, is_to_wait)
}

/// Reads blocks, in ascending order, through a read stream: with I/O workers or
/// io_uring, if `io_method` says so. Hands each buffer, pinned, to `each` with the
/// block's place among `blocks`, and begins no further read after a break.
///
/// `begun` is called once the stream is set up, which looks up catalogs. Returns false,
/// and reads nothing, on 15 and 16, which have no read streams.
///
/// # Safety
/// `relation` is open.
#[cfg(not(any(feature = "pg15", feature = "pg16")))]
pub unsafe fn read_stream(
    relation: pg_sys::Relation,
    fork: Fork,
    blocks: &[BlockNumber],
    begun: impl FnOnce(),
    each: &mut dyn FnMut(usize, pg_sys::Buffer) -> ControlFlow<()>,
) -> bool {
    /// What the stream's callback returns one after another. Nothing in it needs
    /// dropping when an ERROR unwinds.
    struct Source {
        blocks: *const BlockNumber,
        left: usize,
    }

    unsafe extern "C-unwind" fn next(
        _stream: *mut pg_sys::ReadStream,
        source: *mut std::ffi::c_void,
        _per_buffer: *mut std::ffi::c_void,
    ) -> BlockNumber {
        // SAFETY: the stream was begun with a `Source`, which outlives it and is not
        // borrowed while the stream runs.
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

    let mut source = Source {
        blocks: blocks.as_ptr(),
        left: blocks.len(),
    };
    let source = &raw mut source;
    #[cfg(feature = "pg17")]
    const BATCHING: u32 = 0;
    // Allowed, since the callback takes no locks and waits for nothing.
    #[cfg(not(feature = "pg17"))]
    const BATCHING: u32 = pg_sys::READ_STREAM_USE_BATCHING;
    const FLAGS: u32 = pg_sys::READ_STREAM_MAINTENANCE | pg_sys::READ_STREAM_FULL | BATCHING;

    // SAFETY: the relation is open. `blocks` and `source` outlive the stream; after an
    // ERROR the end of the transaction frees it, and it does not call back any more.
    unsafe {
        let stream = pg_sys::read_stream_begin_relation(
            FLAGS as i32,
            std::ptr::null_mut(),
            relation,
            fork as i32,
            Some(next),
            source.cast(),
            0,
        );
        begun();
        for index in 0.. {
            let buffer = pg_sys::read_stream_next_buffer(stream, std::ptr::null_mut());
            if buffer == pg_sys::InvalidBuffer as pg_sys::Buffer {
                break;
            }
            if each(index, buffer).is_break() {
                // Reads that have begun already are still handed out.
                (*source).left = 0;
            }
        }
        pg_sys::read_stream_end(stream);
    }
    true
}

/// # Safety
/// As for the other versions: `_relation` is open.
#[cfg(any(feature = "pg15", feature = "pg16"))]
pub unsafe fn read_stream(
    _relation: pg_sys::Relation,
    _fork: Fork,
    _blocks: &[BlockNumber],
    _begun: impl FnOnce(),
    _each: &mut dyn FnMut(usize, pg_sys::Buffer) -> ControlFlow<()>,
) -> bool {
    false
}
