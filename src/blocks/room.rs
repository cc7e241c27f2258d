//! Asking for memory in a way that may be refused.

use std::collections::TryReserveError;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

static MAY_BE_REFUSED: AtomicBool = AtomicBool::new(false);

/// Does what asks for memory, and can do without: one of the `try_reserve` methods.
pub fn ask(reserve: impl FnOnce() -> Result<(), TryReserveError>) -> Result<(), TryReserveError> {
    MAY_BE_REFUSED.store(true, Relaxed);
    let result = reserve();
    MAY_BE_REFUSED.store(false, Relaxed);
    result
}

/// Whether memory is being asked for in that way. Where it is not, Rust aborts the
/// process for want of it; an allocator can do better, but has to know.
pub fn may_be_refused() -> bool {
    MAY_BE_REFUSED.load(Relaxed)
}
