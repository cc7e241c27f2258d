//! Memory of which there may be too little.
//!
//! Where the system refuses memory, a palloc raises an ERROR, but Rust aborts the
//! process, and with it the whole server. So whatever is large is asked for in
//! ways that can fail: [`room_for`], or `try_reserve`.

use pgrx::{PgLogLevel, PgSqlErrorCode};

use super::error::new_report;

/// A vector with room for so many. Raises an ERROR where there is no memory.
pub fn room_for<T>(count: usize) -> Vec<T> {
    let mut vec = Vec::new();
    if vec.try_reserve_exact(count).is_err() {
        new_report(
            PgSqlErrorCode::ERRCODE_OUT_OF_MEMORY,
            "out of memory".to_owned(),
            None,
        )
        .report(PgLogLevel::ERROR);
    }
    vec
}
