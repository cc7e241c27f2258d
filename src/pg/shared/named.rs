//! Structures that every server process finds by their name, preloaded or not.

use std::ffi::{CStr, c_void};
use std::sync::atomic::{AtomicPtr, Ordering::Relaxed};

use super::contents::Shared;
use crate::pg::sys::shmem;

/// A structure of that name in the server's shared memory, mapped on first use.
///
/// It lives as long as the server; a restart after a crash makes a new one. On 15 and
/// 16 it lies in the main segment, in which a preloaded library reserves memory and any
/// other takes what is left; from 17 on in a dynamic segment of its own. The name must
/// change with the structure: a server can have several versions of a library in use.
///
/// `T::default()` must raise no ERROR: it runs while a lightweight lock is held.
pub struct NamedStruct<T: Shared + Default> {
    name: &'static CStr,
    address: AtomicPtr<T>,
}

impl<T: Shared + Default> NamedStruct<T> {
    pub const fn new(name: &'static CStr) -> Self {
        Self {
            name,
            address: AtomicPtr::new(std::ptr::null_mut()),
        }
    }

    /// Reserves the memory. For `_PG_init` of a preloaded library.
    pub fn reserve(&self) {
        // SAFETY: `_PG_init` calls this, once, while libraries are preloaded.
        unsafe { shmem::reserve(size_of::<T>()) };
    }

    /// The structure. Raises an ERROR if there is no memory left for it.
    pub fn get(&self) -> &'static T {
        unsafe extern "C-unwind" fn init<T: Default>(address: *mut c_void) {
            // SAFETY: the memory has T's size, is aligned for any type, and is not used
            // yet.
            unsafe { address.cast::<T>().write(T::default()) };
        }
        if self.address.load(Relaxed).is_null() {
            // SAFETY: the name stands for this structure alone, and `init` writes a T;
            // `T::default()` raises no ERROR, as [`NamedStruct`] requires.
            let address = unsafe { shmem::named_struct(self.name, size_of::<T>(), init::<T>) };
            self.address.store(address.cast(), Relaxed);
        }
        // SAFETY: it was made by `init`, and is mapped until this process ends.
        unsafe { &*self.address.load(Relaxed) }
    }

    /// The structure, if this process has mapped it.
    pub fn get_if_mapped(&self) -> Option<&'static T> {
        // SAFETY: if not null, `get` has stored it: it is mapped until this process ends.
        unsafe { self.address.load(Relaxed).as_ref() }
    }
}
