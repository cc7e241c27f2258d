//! The most memory that a call has allocated at a time.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// The system's allocator, which counts the bytes of each thread.
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

// SAFETY: all calls go to the system's allocator. The trait's own `realloc` allocates
// and copies, so it counts both the old and the new memory, which is the worst case.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller passes a layout of non-zero size.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: `alloc` got the memory from the system's allocator, with this layout.
        unsafe { System.dealloc(memory, layout) }
    }
}

/// Runs `action`, and panics if it allocates more than `limit` bytes at a time.
pub fn within<T>(limit: usize, action: impl FnOnce() -> T) -> T {
    let before = NOW.get();
    MOST.set(before);
    let result = action();
    let most = MOST.get() - before;
    assert!(
        most <= limit as isize,
        "{most} bytes were allocated, and the limit is {limit}"
    );
    result
}
