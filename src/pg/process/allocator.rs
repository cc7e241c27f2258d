//! The library's allocator.
//!
//! If the system refuses memory, Rust aborts the process, and PostgreSQL restarts all
//! others. This allocator ends the process with a FATAL error instead, which costs one
//! session or background worker. Within [`super::memory::fallible`] it returns null.

use std::alloc::{GlobalAlloc, Layout, System};
use std::panic::Location;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use pgrx::{PgLogLevel, PgSqlErrorCode, pg_sys};

use super::report::ereport_unguarded;
use super::{memory, reserve};
use crate::pg::sys::ffi;

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

struct Allocator;

impl Allocator {
    fn checked(memory: *mut u8, size: usize) -> *mut u8 {
        if memory.is_null() && !memory::may_be_refused() {
            end_process(size);
        }
        memory
    }
}

/// Ends the process. Returns only if called again meanwhile: that also needs memory.
#[cold]
#[expect(ffi_unwind_calls, reason = "a FATAL error ends the process")]
fn end_process(size: usize) {
    static IS_ENDING: AtomicBool = AtomicBool::new(false);
    if IS_ENDING.swap(true, Relaxed) {
        return;
    }
    reserve::give_up();
    // Error context callbacks may need memory, so there are none.
    // SAFETY: the formats fit their arguments. A FATAL error neither returns nor jumps: it
    // runs the server's exit callbacks and ends the process.
    unsafe {
        pg_sys::error_context_stack = std::ptr::null_mut();
        ereport_unguarded(
            PgLogLevel::FATAL,
            PgSqlErrorCode::ERRCODE_OUT_OF_MEMORY,
            Location::caller(),
            || {
                ffi::errmsg(c"out of memory".as_ptr());
                ffi::errdetail_internal(c"Failed on request of size %zu.".as_ptr(), size);
            },
        );
    }
}

// SAFETY: memory comes from the system's allocator, and nothing unwinds.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller keeps the contract of `GlobalAlloc`, which is the system's.
        Self::checked(unsafe { System.alloc(layout) }, layout.size())
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller keeps the contract of `GlobalAlloc`, which is the system's.
        Self::checked(unsafe { System.alloc_zeroed(layout) }, layout.size())
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller keeps the contract of `GlobalAlloc`, which is the system's.
        Self::checked(unsafe { System.realloc(memory, layout, size) }, size)
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract of `GlobalAlloc`, which is the system's.
        unsafe { System.dealloc(memory, layout) }
    }
}
