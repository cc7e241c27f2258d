//! Memory of which there may be too little.
//!
//! Where the system refuses memory, Rust aborts the process, and with it the whole
//! server. So whatever is large is asked for in ways that can fail, [`room_for`] or
//! `try_reserve`, and what is small comes from [`Allocator`], which ends the process
//! as the server ends one.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use pgrx::{PgLogLevel, PgSqlErrorCode, pg_sys};

use super::error::new_report;
use super::ffi;

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

/// The system's memory. Where it refuses a small piece of it, this process ends with
/// a FATAL error, after giving back what it had of the server's: a session or a
/// background worker, and nothing else.
pub struct Allocator;

impl Allocator {
    /// Whoever asks for more than that is told where there is none.
    const SMALL: usize = 64 * 1024;

    fn checked(memory: *mut u8, size: usize) -> *mut u8 {
        if memory.is_null() && size <= Self::SMALL {
            Self::end_process(size);
        }
        memory
    }

    /// Does not return, but for a second time: to end the process needs memory, too.
    #[cold]
    fn end_process(size: usize) {
        static IS_ENDING: AtomicBool = AtomicBool::new(false);
        if IS_ENDING.swap(true, Relaxed) {
            return;
        }
        // SAFETY: what `ereport` expands to, with arguments that fit the formats. It
        // does not come back, neither by returning nor by a jump, so that no frame of
        // Rust's is skipped that anybody would go on in. Callbacks that tell where
        // the error is raised may need memory, so they are left out.
        unsafe {
            pg_sys::error_context_stack = std::ptr::null_mut();
            if ffi::errstart(PgLogLevel::FATAL as i32, std::ptr::null()) {
                ffi::errcode(PgSqlErrorCode::ERRCODE_OUT_OF_MEMORY as i32);
                ffi::errmsg(c"out of memory".as_ptr());
                ffi::errdetail_internal(c"Failed on request of size %zu.".as_ptr(), size);
                ffi::errfinish(
                    c"memory.rs".as_ptr(),
                    line!() as i32,
                    c"pg_prewarm".as_ptr(),
                );
            }
        }
    }
}

// SAFETY: the system's allocator in all; nothing unwinds.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise.
        Self::checked(unsafe { System.alloc(layout) }, layout.size())
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise.
        Self::checked(unsafe { System.alloc_zeroed(layout) }, layout.size())
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller's promise.
        Self::checked(unsafe { System.realloc(memory, layout, size) }, size)
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(memory, layout) }
    }
}
