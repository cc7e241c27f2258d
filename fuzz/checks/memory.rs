//! How much memory a call asks for at most at a time.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// The system's allocator, which keeps count for each thread.
struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

thread_local! {
    static NOW: Cell<isize> = const { Cell::new(0) };
    static MOST: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: isize) {
    let now = NOW.get() + bytes;
    NOW.set(now);
    MOST.set(MOST.get().max(now));
}

// SAFETY: the system's allocator does all of it. A memory block that is made
// larger is taken as copied, which is the worst that may happen.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(memory, layout) }
    }
}

/// Does that, and fails where it asks for more than that many bytes.
pub fn within<T>(limit: usize, action: impl FnOnce() -> T) -> T {
    let before = NOW.get();
    MOST.set(before);
    let result = action();
    let most = MOST.get() - before;
    assert!(
        most <= limit as isize,
        "asks for {most} bytes, and {limit} must do"
    );
    result
}
