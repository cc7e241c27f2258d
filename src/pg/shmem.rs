//! Structures that every server process finds by their name.

use std::ffi::{CStr, c_void};
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicPtr, Ordering::Relaxed};

use super::compat;

/// A structure that several processes may use at once.
///
/// # Safety
/// It holds atomics only: no pointer (which would mean nothing to another
/// process, or something else), nothing to drop, and nothing that is not valid
/// whatever another process stored there.
pub unsafe trait Shared: Sync + 'static {
    /// What it starts as.
    const INITIAL: Self;
}

/// A structure of that name in the server's shared memory, mapped on first use.
///
/// It lives as long as the server: a restart after a crash makes a new one. On
/// PostgreSQL 15 and 16 it lies in the main segment, in which a preloaded
/// library reserves room and any other takes what is left; on 17 and later it is
/// a dynamic segment that the server finds by its name.
pub struct SharedStruct<T: Shared> {
    name: &'static CStr,
    address: AtomicPtr<T>,
    _type: PhantomData<T>,
}

impl<T: Shared> SharedStruct<T> {
    pub const fn new(name: &'static CStr) -> Self {
        Self {
            name,
            address: AtomicPtr::new(std::ptr::null_mut()),
            _type: PhantomData,
        }
    }

    /// Reserves the memory while the server starts. In `_PG_init`, when preloaded.
    pub fn reserve(&self) {
        // SAFETY: the caller's promise, which `is_preloading` tells.
        unsafe { compat::reserve_shared_memory(size_of::<T>()) };
    }

    /// The structure. Raises an ERROR where there is no memory left for it.
    pub fn get(&self) -> &'static T {
        unsafe extern "C-unwind" fn init<T: Shared>(address: *mut c_void) {
            // SAFETY: memory of T's size, aligned for any type, not yet used.
            unsafe {
                address
                    .cast::<MaybeUninit<T>>()
                    .write(MaybeUninit::new(T::INITIAL))
            };
        }
        if self.address.load(Relaxed).is_null() {
            // SAFETY: the name is ours, and `init` makes a T and calls nothing.
            let address = unsafe { compat::shared_struct(self.name, size_of::<T>(), init::<T>) };
            self.address.store(address.cast(), Relaxed);
        }
        // SAFETY: mapped until the process ends, made by `init`, and T is made
        // to be shared.
        unsafe { &*self.address.load(Relaxed) }
    }

    /// The structure, where this process has it mapped.
    pub fn get_if_mapped(&self) -> Option<&'static T> {
        // SAFETY: as above.
        unsafe { self.address.load(Relaxed).as_ref() }
    }
}
