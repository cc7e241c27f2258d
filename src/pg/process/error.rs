//! Catching ERRORs of PostgreSQL, and the log messages of background workers, which go on
//! if logging raises one.

use std::panic::AssertUnwindSafe;

use pgrx::pg_sys::panic::CaughtError;
use pgrx::{PgLogLevel, PgSqlErrorCode, PgTryBuilder};

use super::report::{Message, SUCCESS, report};
use super::reserve;

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

/// Whether an error is that memory, room in the lock table or open files were short. A
/// retry may succeed.
pub fn is_shortage(sqlstate: PgSqlErrorCode) -> bool {
    matches!(
        sqlstate,
        PgSqlErrorCode::ERRCODE_OUT_OF_MEMORY | PgSqlErrorCode::ERRCODE_INSUFFICIENT_RESOURCES
    )
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
