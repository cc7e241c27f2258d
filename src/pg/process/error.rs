//! Catching ERRORs of PostgreSQL.

use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, Location};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use pgrx::pg_sys::panic::CaughtError;
use pgrx::{PgLogLevel, PgSqlErrorCode, PgTryBuilder, pg_guard, pg_sys};

use super::report::{Message, SUCCESS, ereport_unguarded, report};
use super::reserve;
use crate::pg::sys::ffi;

/// An ERROR that was caught.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Caught {
    pub sqlstate: PgSqlErrorCode,
    pub message: String,
    pub detail: Option<String>,
    pub hint: Option<String>,
}

impl From<CaughtError> for Caught {
    fn from(caught: CaughtError) -> Self {
        let (CaughtError::PostgresError(report)
        | CaughtError::ErrorReport(report)
        | CaughtError::RustPanic {
            ereport: report, ..
        }) = &caught;
        Self {
            sqlstate: report.sql_error_code(),
            message: report.message().to_owned(),
            detail: report.detail().map(str::to_owned),
            hint: report.hint().map(str::to_owned),
        }
    }
}

impl Caught {
    /// Whether replay on a standby needed what the transaction held.
    pub fn is_conflict_with_recovery(&self) -> bool {
        self.sqlstate == PgSqlErrorCode::ERRCODE_T_R_SERIALIZATION_FAILURE
    }

    /// Whether a lock was waited for too long, or the wait was interrupted.
    pub fn is_lock_timeout(&self) -> bool {
        matches!(
            self.sqlstate,
            PgSqlErrorCode::ERRCODE_LOCK_NOT_AVAILABLE | PgSqlErrorCode::ERRCODE_QUERY_CANCELED
        )
    }

    /// Whether memory, room in the lock table or open files were short. A retry may
    /// succeed.
    pub fn is_shortage(&self) -> bool {
        matches!(
            self.sqlstate,
            PgSqlErrorCode::ERRCODE_OUT_OF_MEMORY | PgSqlErrorCode::ERRCODE_INSUFFICIENT_RESOURCES
        )
    }

    /// Whether a smaller segment of dynamic shared memory may be possible: what this one
    /// was refused for is memory, room in a file system, or (an internal error to
    /// PostgreSQL) the system's limit for one segment.
    pub fn is_shortage_of_shared_memory(&self) -> bool {
        matches!(
            self.sqlstate,
            PgSqlErrorCode::ERRCODE_OUT_OF_MEMORY
                | PgSqlErrorCode::ERRCODE_DISK_FULL
                | PgSqlErrorCode::ERRCODE_INTERNAL_ERROR
        )
    }

    /// Logs the error as a WARNING.
    pub fn warn(self) {
        let message = Message {
            sqlstate: self.sqlstate,
            primary: &self.message,
            detail: self.detail.as_deref(),
            hint: self.hint.as_deref(),
        };
        log_message(PgLogLevel::WARNING, message);
    }
}

/// Runs `body`, and returns an ERROR that it raises. What `body` held is not released:
/// that is done by [`super::transaction::run`].
pub fn catch<T>(body: impl FnOnce() -> T) -> Result<T, Caught> {
    if !reserve::keep() {
        return Err(Caught {
            sqlstate: PgSqlErrorCode::ERRCODE_OUT_OF_MEMORY,
            message: "out of memory".to_owned(),
            detail: None,
            hint: None,
        });
    }
    PgTryBuilder::new(AssertUnwindSafe(|| Ok(body())))
        .catch_others(|caught| Err(caught.into()))
        .catch_rust_panic(|caught| Err(caught.into()))
        .execute()
}

/// Reports a message of a background worker, which goes on even if that fails: memory
/// may be short, or a standby before 17 may raise a conflict with recovery after the
/// transaction that it was meant for.
pub fn log_message(level: PgLogLevel, message: Message) {
    let _ = catch(|| report(level, message));
}

/// Writes a line to the server's log, like [`log_message`].
pub fn log(text: &str) {
    log_message(PgLogLevel::LOG, Message::new(SUCCESS, text));
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
            reserve::give_up();
        }
    }

    // SAFETY: an ERROR jumps to PostgreSQL over frames that need no dropping. The
    // callback is taken off the stack before it goes out of scope; after an ERROR the
    // server does so before anything else runs here.
    unsafe {
        if !reserve::keep() {
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
            arg: std::ptr::null_mut(),
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
/// As of [`with_reserve`]; `fcinfo` is the server's for this call.
pub unsafe fn with_reserve_for_call(
    fcinfo: pg_sys::FunctionCallInfo,
    body: impl FnOnce() -> pg_sys::Datum,
) -> pg_sys::Datum {
    // SAFETY: the caller's promise. The function's result information, where there is
    // any, outlives the call.
    unsafe {
        let result = with_reserve(|| {
            give_up_at_transaction_end();
            body()
        });
        if !has_more_rows(fcinfo) {
            reserve::give_up();
        }
        result
    }
}

/// Whether the call has returned a row of several, after which the server calls again.
///
/// # Safety
/// `fcinfo` is that of a call that has returned.
unsafe fn has_more_rows(fcinfo: pg_sys::FunctionCallInfo) -> bool {
    // SAFETY: what is of that node type is that structure.
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
/// As of [`with_reserve`].
#[expect(ffi_unwind_calls, reason = "an ERROR jumps to PostgreSQL")]
unsafe fn give_up_at_transaction_end() {
    static IS_REGISTERED: AtomicBool = AtomicBool::new(false);

    /// The server calls it at each step of a transaction's end.
    unsafe extern "C-unwind" fn at_end(_event: pg_sys::XactEvent::Type, _argument: *mut c_void) {
        reserve::give_up();
    }

    if !IS_REGISTERED.load(Relaxed) {
        // SAFETY: the callback fits, and this library is never unloaded. An ERROR for lack
        // of memory jumps to PostgreSQL, and the next call tries again.
        unsafe { ffi::RegisterXactCallback(Some(at_end), std::ptr::null_mut()) };
        IS_REGISTERED.store(true, Relaxed);
    }
}
