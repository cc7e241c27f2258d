//! Memory in reserve, for an ERROR that says that there is none.
//!
//! Such an ERROR needs memory itself: on its way through Rust it is copied into two
//! memory contexts. If that failed, so would the ERROR about it, and so on, until the
//! server gives up and restarts all its processes.
//!
//! Background processes of ours keep it for their lives. A session has it during a call of
//! ours: it is given up when the call returns, or at the end of the transaction if the call
//! raised an ERROR, or its rows were not fetched to the end.

use std::ffi::c_void;
use std::panic::Location;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering::Relaxed};

use pgrx::{PgLogLevel, PgSqlErrorCode, pg_guard, pg_sys};

use super::report::ereport_unguarded;
use crate::pg::sys::ffi;

static RESERVE: AtomicPtr<c_void> = AtomicPtr::new(ptr::null_mut());

/// A memory context that has grown asks for a megabyte or more. What is not touched
/// takes addresses only.
const SIZE: usize = (2 << 20) + (256 << 10);

/// Makes the reserve, if there is none. Returns false if there is no memory for it:
/// nothing must be started then that could raise an ERROR.
#[must_use]
pub(super) fn keep() -> bool {
    if RESERVE.load(Relaxed).is_null() {
        // Not by `malloc`: after the first `free` it would take this from its heap, and
        // keep it there.
        // SAFETY: a new mapping, which no memory in use is in the way of.
        let memory = unsafe {
            libc::mmap(
                ptr::null_mut(),
                SIZE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if memory == libc::MAP_FAILED {
            return false;
        }
        RESERVE.store(memory, Relaxed);
    }
    true
}

/// Frees the reserve, so that others can allocate it.
pub(super) fn give_up() {
    let memory = RESERVE.swap(ptr::null_mut(), Relaxed);
    if !memory.is_null() {
        // SAFETY: the swap makes this the only owner of what was mapped, and nothing
        // points into it.
        unsafe { libc::munmap(memory, SIZE) };
    }
}

/// Runs the whole of a background process with memory in reserve for an ERROR. Without
/// it, raises an ERROR at once.
///
/// # Safety
/// PostgreSQL has called this library, and nothing between that call and this one needs
/// dropping: an ERROR has left Rust within `body` already, and jumps.
#[expect(
    ffi_unwind_calls,
    reason = "an ERROR jumps to PostgreSQL, as it does after this"
)]
pub unsafe fn with_reserve<T>(body: impl FnOnce() -> T) -> T {
    #[pg_guard]
    unsafe extern "C-unwind" fn give_up_if_needed(_argument: *mut c_void) {
        // SAFETY: the server calls error context callbacks while it reports an error.
        let sqlstate = unsafe { pg_sys::geterrcode() };
        if sqlstate == PgSqlErrorCode::ERRCODE_OUT_OF_MEMORY as i32 {
            give_up();
        }
    }

    // SAFETY: an ERROR jumps to PostgreSQL over frames that need no dropping. The
    // callback is taken off the stack before it goes out of scope; after an ERROR the
    // server does so before anything else runs here.
    unsafe {
        if !keep() {
            ereport_unguarded(
                PgLogLevel::ERROR,
                PgSqlErrorCode::ERRCODE_OUT_OF_MEMORY,
                Location::caller(),
                || {
                    ffi::errmsg(c"out of memory".as_ptr());
                },
            );
        }
        let mut callback = pg_sys::ErrorContextCallback {
            previous: pg_sys::error_context_stack,
            callback: Some(give_up_if_needed),
            arg: ptr::null_mut(),
        };
        pg_sys::error_context_stack = &mut callback;
        let result = body();
        pg_sys::error_context_stack = callback.previous;
        result
    }
}

/// Runs a call of an SQL function with memory in reserve for an ERROR, as
/// [`with_reserve`] does, and gives the reserve up afterwards. A function that returns
/// rows keeps it until it has returned the last one, or until the transaction ends.
///
/// # Safety
/// PostgreSQL has called this library, and nothing between that call and this one needs
/// dropping. `fcinfo` is the server's for this call.
pub unsafe fn with_reserve_for_call(
    fcinfo: pg_sys::FunctionCallInfo,
    body: impl FnOnce() -> pg_sys::Datum,
) -> pg_sys::Datum {
    // SAFETY: nothing between PostgreSQL's call and this one needs dropping (contract of
    // this function). `fcinfo` is valid while the server's call lasts.
    unsafe {
        let result = with_reserve(|| {
            give_up_at_transaction_end();
            body()
        });
        if !has_more_rows(fcinfo) {
            give_up();
        }
        result
    }
}

/// Whether the call has returned a row of several, after which the server calls again.
///
/// # Safety
/// `fcinfo` is that of a call that has returned.
unsafe fn has_more_rows(fcinfo: pg_sys::FunctionCallInfo) -> bool {
    // SAFETY: the result information is null or a node that outlives the call, and a node
    // of that type is that structure.
    unsafe {
        let info = (*fcinfo).resultinfo;
        !info.is_null()
            && (*info).type_ == pg_sys::NodeTag::T_ReturnSetInfo
            && (*info.cast::<pg_sys::ReturnSetInfo>()).isDone
                == pg_sys::ExprDoneCond::ExprMultipleResult
    }
}

/// Has each transaction of this process end with giving up the reserve.
///
/// # Safety
/// PostgreSQL has called this library, and nothing between that call and this one needs
/// dropping: an ERROR jumps.
#[expect(ffi_unwind_calls, reason = "an ERROR jumps to PostgreSQL")]
unsafe fn give_up_at_transaction_end() {
    static IS_REGISTERED: AtomicBool = AtomicBool::new(false);

    /// The server calls it at each step of a transaction's end.
    unsafe extern "C-unwind" fn at_end(_event: pg_sys::XactEvent::Type, _argument: *mut c_void) {
        give_up();
    }

    if !IS_REGISTERED.load(Relaxed) {
        // SAFETY: the callback fits, and this library is never unloaded. An ERROR for lack
        // of memory jumps to PostgreSQL, and the next call tries again.
        unsafe { ffi::RegisterXactCallback(Some(at_end), ptr::null_mut()) };
        IS_REGISTERED.store(true, Relaxed);
    }
}
