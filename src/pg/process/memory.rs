//! Memory of which there may be too little.

use pgrx::PgSqlErrorCode;

use super::report::raise;
use crate::blocks::room;

/// A vector with room for so many. Raises an ERROR where there is no memory.
pub fn room_for<T>(count: usize) -> Vec<T> {
    let mut vec = Vec::new();
    reserve(&mut vec, count);
    vec
}

/// Makes room for so many more. Raises an ERROR where there is no memory.
pub fn reserve<T>(vec: &mut Vec<T>, count: usize) {
    if room::ask(|| vec.try_reserve_exact(count)).is_err() {
        raise(PgSqlErrorCode::ERRCODE_OUT_OF_MEMORY, "out of memory", None);
    }
}
