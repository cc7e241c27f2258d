//! A setting whose value is composed when it is shown.

use std::ffi::{CStr, CString, c_char};
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering::Relaxed};

use pgrx::guc::{GucContext, GucFlags, GucRegistry, GucSetting};
use pgrx::pg_guard;

use super::reserve::{self, with_reserve};

/// What composes the value. It may raise an ERROR.
type Compose = fn() -> CString;

static COMPOSE: OnceLock<Compose> = OnceLock::new();

/// The value that was shown last, which the server copies after the function that shows it
/// has returned.
static SHOWN: AtomicPtr<c_char> = AtomicPtr::new(ptr::null_mut());

/// Defines a setting that nobody can set, that neither `SHOW ALL` nor `pg_settings` has,
/// and whose value `compose` returns. There is one such setting.
pub fn define(
    name: &'static CStr,
    description: &'static CStr,
    details: &'static CStr,
    compose: Compose,
) {
    static VALUE: GucSetting<Option<CString>> = GucSetting::<Option<CString>>::new(Some(c""));

    unsafe extern "C-unwind" fn show() -> *const c_char {
        // SAFETY: the server calls this function directly, and nothing in its frame needs
        // dropping.
        let shown = unsafe { with_reserve(|| show_guarded()) };
        reserve::give_up();
        shown
    }

    #[pg_guard]
    unsafe extern "C-unwind" fn show_guarded() -> *const c_char {
        let value = COMPOSE
            .get()
            .map_or_else(CString::default, |compose| compose());
        let value = value.into_raw();
        let former = SHOWN.swap(value, Relaxed);
        if !former.is_null() {
            // SAFETY: it came from `into_raw`, and the swap makes this its only owner. The
            // server has copied it.
            drop(unsafe { CString::from_raw(former) });
        }
        value
    }

    if COMPOSE.set(compose).is_ok() {
        // SAFETY: the hook is guarded, and returns a C string.
        unsafe {
            GucRegistry::define_string_guc_with_hooks(
                name,
                description,
                details,
                &VALUE,
                GucContext::Internal,
                GucFlags::NO_SHOW_ALL | GucFlags::DISALLOW_IN_FILE,
                None,
                None,
                Some(show),
            );
        }
    }
}
