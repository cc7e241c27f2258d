//! Named structures in shared memory: on 15 and 16 in the main segment, from 17 on in
//! a dynamic segment that the server finds by its name.

#![cfg_attr(
    not(any(feature = "pg17", feature = "pg18")),
    expect(
        ffi_unwind_calls,
        reason = "`init` raises no ERROR, and one of another library's hook ends the postmaster"
    )
)]

use std::ffi::{CStr, c_void};

use pgrx::pg_sys;

/// Makes a new structure in place.
pub type Init = unsafe extern "C-unwind" fn(*mut c_void);

/// The structure of that name and size in bytes, mapped until this process ends. The
/// first process that asks for it has `init` make it.
///
/// # Safety
/// Every use of the name is for the same structure. `init` fills `size` bytes and raises
/// no ERROR.
pub unsafe fn named_struct(name: &'static CStr, size: usize, init: Init) -> *mut c_void {
    let mut found = false;
    #[cfg(any(feature = "pg15", feature = "pg16"))]
    {
        // SAFETY: `ShmemInitStruct` requires this lock, AddinShmemInitLock, which has
        // that number in lwlocknames.txt of both versions. It lets one process alone
        // make the structure. If an ERROR is raised meanwhile, the end of the
        // transaction or of the process releases it.
        unsafe {
            const ADDIN_SHMEM_INIT_LOCK: usize = 21;
            let lock = &raw mut (*pg_sys::MainLWLockArray.add(ADDIN_SHMEM_INIT_LOCK)).lock;
            pg_sys::LWLockAcquire(lock, pg_sys::LWLockMode::LW_EXCLUSIVE);
            let address = pg_sys::ShmemInitStruct(name.as_ptr(), size, &mut found);
            if !found {
                init(address);
            }
            pg_sys::LWLockRelease(lock);
            address
        }
    }
    #[cfg(any(feature = "pg17", feature = "pg18"))]
    {
        // SAFETY: the name is static, and `init` fills memory of that size.
        unsafe { pg_sys::GetNamedDSMSegment(name.as_ptr(), size, Some(init), &mut found) }
    }
    #[cfg(not(any(feature = "pg15", feature = "pg16", feature = "pg17", feature = "pg18")))]
    {
        unsafe extern "C-unwind" fn call(address: *mut c_void, init: *mut c_void) {
            // SAFETY: `init` is the function pointer that is passed below, and the
            // server calls this with memory of the size asked for.
            unsafe { std::mem::transmute::<*mut c_void, Init>(init)(address) };
        }

        let argument = init as *mut c_void;
        // SAFETY: the name is static, and `call` has `init` fill memory of that size.
        unsafe { pg_sys::GetNamedDSMSegment(name.as_ptr(), size, Some(call), &mut found, argument) }
    }
}

/// Reserves memory in the main segment for a named structure. From 17 on there is
/// nothing to reserve.
///
/// # Safety
/// Called by `_PG_init` of a preloaded library, once for each structure.
pub unsafe fn reserve(size: usize) {
    #[cfg(any(feature = "pg15", feature = "pg16"))]
    {
        use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
        static RESERVED: AtomicUsize = AtomicUsize::new(0);
        static mut PREVIOUS: pg_sys::shmem_request_hook_type = None;

        #[pgrx::pg_guard]
        unsafe extern "C-unwind" fn request() {
            // SAFETY: the postmaster, which has one thread, calls the hook once;
            // `PREVIOUS` is not written after that.
            unsafe {
                if let Some(previous) = PREVIOUS {
                    previous();
                }
                pg_sys::RequestAddinShmemSpace(RESERVED.load(Relaxed));
            }
        }

        if RESERVED.fetch_add(size, Relaxed) == 0 {
            // SAFETY: the postmaster has one thread, and calls the hook only after all
            // libraries are loaded.
            unsafe {
                PREVIOUS = pg_sys::shmem_request_hook;
                pg_sys::shmem_request_hook = Some(request);
            }
        }
    }
    #[cfg(not(any(feature = "pg15", feature = "pg16")))]
    let _ = size;
}
