//! Signal handlers, as each major version calls them.

use std::ffi::c_int;

use pgrx::pg_sys;

/// Defines the type of signal handlers by the arguments that the server gives them.
macro_rules! define_signal_handlers {
    ($($argument:ty),+) => {
        pub type SignalHandler = unsafe extern "C-unwind" fn($($argument),+);

        // PostgreSQL's own handlers. pgrx binds them behind a guard, so that they
        // could not be given to `pqsignal`.
        unsafe extern "C-unwind" {
            pub fn SignalHandlerForShutdownRequest($(_: $argument),+);
            pub fn SignalHandlerForConfigReload($(_: $argument),+);
            pub fn die($(_: $argument),+);
            pub fn StatementCancelHandler($(_: $argument),+);
        }

        /// Does nothing.
        pub unsafe extern "C-unwind" fn ignore_signal($(_: $argument),+) {}
    };
}

#[cfg(any(feature = "pg15", feature = "pg16", feature = "pg17", feature = "pg18"))]
define_signal_handlers!(c_int);
#[cfg(not(any(feature = "pg15", feature = "pg16", feature = "pg17", feature = "pg18")))]
define_signal_handlers!(c_int, *const pg_sys::pg_signal_info);

/// Sets the handler of a signal.
///
/// # Safety
/// `handler` does only what is allowed in a signal handler.
pub unsafe fn set_handler(signal: c_int, handler: SignalHandler) {
    // SAFETY: `handler` is safe in a signal handler (contract of this function), and has the
    // arguments that this version passes.
    unsafe {
        #[cfg(any(feature = "pg15", feature = "pg16", feature = "pg17"))]
        pg_sys::pqsignal(signal, Some(handler));
        #[cfg(not(any(feature = "pg15", feature = "pg16", feature = "pg17")))]
        pg_sys::pqsignal_be(signal, Some(handler));
    }
}
