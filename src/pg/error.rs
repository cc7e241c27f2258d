//! Errors that PostgreSQL raised, caught.

use std::ffi::{CStr, CString, c_void};
use std::panic::{AssertUnwindSafe, Location};

use pgrx::pg_sys::panic::{CaughtError, ErrorReport};
use pgrx::{PgLogLevel, PgSqlErrorCode, PgTryBuilder, pg_guard, pg_sys};

use super::{ffi, memory};

/// An ERROR that was raised and caught.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Caught {
    pub sqlstate: PgSqlErrorCode,
    pub message: String,
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
            hint: report.hint().map(str::to_owned),
        }
    }
}

/// Runs `body`; an ERROR in it becomes an `Err`, but what it held is not let go:
/// that is for [`super::transaction::run`], or for callers that hold nothing.
pub fn catch<T>(body: impl FnOnce() -> T) -> Result<T, Caught> {
    if !memory::keep_reserve() {
        return Err(Caught {
            sqlstate: PgSqlErrorCode::ERRCODE_OUT_OF_MEMORY,
            message: "out of memory".to_owned(),
            hint: None,
        });
    }
    PgTryBuilder::new(AssertUnwindSafe(|| Ok(body())))
        .catch_others(|caught| Err(caught.into()))
        .catch_rust_panic(|caught| Err(caught.into()))
        .execute()
}

/// Raises an ERROR, which unwinds to whoever catches it.
#[track_caller]
pub fn raise(sqlstate: PgSqlErrorCode, message: String, hint: Option<String>) -> ! {
    let report = ErrorReport::new(sqlstate, message, "pg_prewarm");
    let report = match hint {
        Some(hint) => report.set_hint(hint),
        None => report,
    };
    report.report(PgLogLevel::ERROR);
    unreachable!("an ERROR does not return");
}

/// Reports what ends nothing: a WARNING, or what is less.
#[track_caller]
pub fn tell(level: PgLogLevel, sqlstate: PgSqlErrorCode, message: &str, hint: Option<&str>) {
    let c_string = |text: &str| CString::new(text).expect("a message has no NUL");
    let (message, hint) = (c_string(message), hint.map(c_string));
    let hint = hint.as_deref().map_or(std::ptr::null(), CStr::as_ptr);
    let message = message.as_ptr();
    // SAFETY: C strings that outlive the call, as the format wants them.
    unsafe {
        ereport(level, sqlstate, || {
            ffi::errmsg_internal(c"%s".as_ptr(), message);
            if !hint.is_null() {
                ffi::errhint(c"%s".as_ptr(), hint);
            }
        });
    }
}

/// Tells the client something.
#[track_caller]
pub fn notice(message: &str) {
    tell(PgLogLevel::NOTICE, SUCCESS, message, None);
}

/// Has a background process report something, and go on even if that fails: for want
/// of memory, or for a conflict with recovery, which a standby before 17 may raise
/// after the transaction that it was meant for.
pub fn log_with_hint(
    level: PgLogLevel,
    sqlstate: PgSqlErrorCode,
    message: &str,
    hint: Option<&str>,
) {
    let _ = catch(|| tell(level, sqlstate, message, hint));
}

/// A line of a background process in the server's log.
pub fn log(message: &str) {
    log_with_hint(PgLogLevel::LOG, SUCCESS, message, None);
}

/// What a message has that is no error.
pub const SUCCESS: PgSqlErrorCode = PgSqlErrorCode::ERRCODE_SUCCESSFUL_COMPLETION;

/// What the server's `ereport` expands to, with what `say` says.
///
/// The server serves interrupts at its end, so that a cancel can come of any message,
/// however harmless. It has to unwind, as every ERROR that passes through Rust: pgrx's
/// own macros for messages let it jump.
///
/// # Safety
/// `say` calls `errmsg` and the like with arguments that fit their formats, and
/// nothing in it needs dropping.
#[track_caller]
pub unsafe fn ereport(level: PgLogLevel, sqlstate: PgSqlErrorCode, say: impl FnOnce()) {
    let location = Location::caller();
    // SAFETY: the caller's promise.
    unsafe {
        pg_sys::ffi::pg_guard_ffi_boundary(|| {
            ereport_unguarded(level, sqlstate, location, say);
        });
    }
}

/// The same where an ERROR may jump, or nothing comes back.
///
/// # Safety
/// As of [`ereport`], and no frame of Rust's that needs dropping is jumped over.
pub unsafe fn ereport_unguarded(
    level: PgLogLevel,
    sqlstate: PgSqlErrorCode,
    location: &Location,
    say: impl FnOnce(),
) {
    // SAFETY: the caller's promise; the file's name is as old as the program.
    unsafe {
        if ffi::errstart(level as i32, std::ptr::null()) {
            ffi::errcode(sqlstate as i32);
            say();
            ffi::errfinish(
                location.file_as_c_str().as_ptr(),
                location.line() as i32,
                c"pg_prewarm".as_ptr(),
            );
        }
    }
}

/// Raises an ERROR, by a jump, unless there is memory for those to come.
///
/// # Safety
/// Nothing that needs dropping stands between the server's call of this library and
/// this.
unsafe fn require_reserve() {
    if !memory::keep_reserve() {
        // SAFETY: the caller's promise; a text without arguments.
        unsafe {
            ereport_unguarded(
                PgLogLevel::ERROR,
                PgSqlErrorCode::ERRCODE_OUT_OF_MEMORY,
                Location::caller(),
                || {
                    ffi::errmsg(c"out of memory".as_ptr());
                },
            );
        }
    }
}

/// A message of this server's that is shown as data. It is UTF-8 here; in a
/// database of another encoding only its ASCII characters are sure to be right.
pub fn in_server_encoding(message: &str) -> String {
    // SAFETY: a number that is set when the process connects.
    if unsafe { pg_sys::GetDatabaseEncoding() } == pg_sys::pg_enc::PG_UTF8 as i32 {
        return message.to_owned();
    }
    let ascii = |c: char| if c.is_ascii() { c } else { '?' };
    message.chars().map(ascii).collect()
}

impl Caught {
    /// Whether it was raised because the transaction stood in the way of replay,
    /// on a standby.
    pub fn is_conflict_with_recovery(&self) -> bool {
        self.sqlstate == PgSqlErrorCode::ERRCODE_T_R_SERIALIZATION_FAILURE
    }

    /// Whether something was short that may be there in a moment: memory, room in
    /// the lock table, open files.
    pub fn is_shortage(&self) -> bool {
        matches!(
            self.sqlstate,
            PgSqlErrorCode::ERRCODE_OUT_OF_MEMORY | PgSqlErrorCode::ERRCODE_INSUFFICIENT_RESOURCES
        )
    }

    /// Logs the error and goes on.
    pub fn warn(self) {
        let hint = self.hint.as_deref();
        log_with_hint(PgLogLevel::WARNING, self.sqlstate, &self.message, hint);
    }
}

/// Runs what the server calls, an SQL function's body or the whole of a background process,
/// with a reserve of memory for an ERROR that there is none.
///
/// # Safety
/// Nothing that needs dropping may stand between the server's call of this library and
/// this: an ERROR leaves Rust within `body`, and jumps over it.
pub unsafe fn with_reserve<T>(body: impl FnOnce() -> T) -> T {
    #[pg_guard]
    unsafe extern "C-unwind" fn help(_argument: *mut c_void) {
        // SAFETY: called while an error is being reported.
        if unsafe { is_out_of_memory() } {
            memory::give_up_reserve();
        }
    }

    // SAFETY: the caller's promise. The callback is taken off the stack before it goes
    // out of scope; after an ERROR by the server, before anything else is run here.
    unsafe {
        require_reserve();
        let mut callback = pg_sys::ErrorContextCallback {
            previous: pg_sys::error_context_stack,
            callback: Some(help),
            arg: std::ptr::null_mut(),
        };
        pg_sys::error_context_stack = &mut callback;
        let result = body();
        pg_sys::error_context_stack = callback.previous;
        result
    }
}

/// Whether the error that is being reported is that there is no memory.
///
/// # Safety
/// An error is being reported.
unsafe fn is_out_of_memory() -> bool {
    // SAFETY: the caller's promise.
    let sqlstate = unsafe { pg_sys::geterrcode() };
    sqlstate == PgSqlErrorCode::ERRCODE_OUT_OF_MEMORY as i32
}
