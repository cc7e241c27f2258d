//! Errors that PostgreSQL raised, caught.

use std::panic::AssertUnwindSafe;

use pgrx::pg_sys::panic::{CaughtError, ErrorReport};
use pgrx::{PgLogLevel, PgSqlErrorCode, PgTryBuilder};

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
    PgTryBuilder::new(AssertUnwindSafe(|| Ok(body())))
        .catch_others(|caught| Err(caught.into()))
        .catch_rust_panic(|caught| Err(caught.into()))
        .execute()
}

/// A message with its SQLSTATE and hint, to be reported at some level, or
/// returned as an error to the caller of an SQL function.
pub fn new_report(sqlstate: PgSqlErrorCode, message: String, hint: Option<String>) -> ErrorReport {
    let report = ErrorReport::new(sqlstate, message, "pg_prewarm");
    match hint {
        Some(hint) => report.set_hint(hint),
        None => report,
    }
}

impl Caught {
    /// Logs the error and goes on.
    pub fn warn(self) {
        new_report(self.sqlstate, self.message, self.hint).report(PgLogLevel::WARNING);
    }
}
