//! Where the library's memory comes from.
//!
//! Where the system refuses memory, Rust aborts the process, and with it the whole
//! server. So what may be large is asked for in ways that can fail
//! ([`memory::fallible`]); for want of anything else the process ends as the server
//! ends one.

use std::alloc::{GlobalAlloc, Layout, System};
use std::panic::Location;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use pgrx::{PgLogLevel, PgSqlErrorCode, pg_sys};

use super::error::ereport_unguarded;
use super::{ffi, memory};

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

/// The system's memory. Where it refuses some that nobody can do without, this
/// process ends with a FATAL error, after giving back what it had of the server's: a
/// session or a background worker, and nothing else.
struct Allocator;

impl Allocator {
    fn checked(memory: *mut u8, size: usize) -> *mut u8 {
        if memory.is_null() && !memory::may_be_refused() {
            end_process(size);
        }
        memory
    }
}

/// Does not return, but for a second time: to end the process may need memory, too.
#[cold]
fn end_process(size: usize) {
    static IS_ENDING: AtomicBool = AtomicBool::new(false);
    if IS_ENDING.swap(true, Relaxed) {
        return;
    }
    memory::give_up_reserve();
    // SAFETY: the arguments fit the formats. It does not come back, neither by returning
    // nor by a jump, so that no frame of Rust's is skipped that anybody would go on in.
    // Callbacks that tell where the error is raised may need memory, so they are left
    // out.
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
