//! The hook that the server calls when it has authenticated a client, what it passes, and
//! what a function in it has to know. pgrx binds little of that.

#![expect(
    ffi_unwind_calls,
    reason = "an ERROR of the function called here jumps to its guard"
)]

use std::ffi::{CStr, c_char, c_int};

use pgrx::pg_sys;
use pgrx::pg_sys::ffi::pg_guard_ffi_boundary;

/// A client's connection: the beginning of the server's `Port`, up to what is used here.
#[repr(C)]
pub struct Port {
    socket: c_int,
    is_nonblocking: bool,
    protocol: u32,
    local_address: SocketAddress,
    remote_address: SocketAddress,
    remote_host: *mut c_char,
    remote_hostname: *mut c_char,
    remote_hostname_resolution: c_int,
    remote_hostname_error: c_int,
    remote_port: *mut c_char,
    #[cfg(any(feature = "pg15", feature = "pg16"))]
    can_accept_connections: c_int,
    #[cfg(not(any(feature = "pg15", feature = "pg16", feature = "pg17")))]
    local_host: [c_char; 64],
    database_name: *mut c_char,
    user_name: *mut c_char,
}

#[repr(C)]
struct SocketAddress {
    address: libc::sockaddr_storage,
    length: libc::socklen_t,
}

impl Port {
    /// The name of the role that the client wants to be.
    ///
    /// # Safety
    /// The server has passed this to the hook, which has not returned.
    pub unsafe fn user_name(&self) -> &CStr {
        // SAFETY: the server sets it to a C string before it authenticates the client.
        unsafe { CStr::from_ptr(self.user_name) }
    }
}

/// A function for the hook. The status is `STATUS_OK` if the client is who it says.
pub type Hook = unsafe extern "C-unwind" fn(port: *mut Port, status: c_int);

unsafe extern "C" {
    /// What the server calls after a client was authenticated or rejected, and before it
    /// tells the client. Libraries that set it call the function that was there before.
    pub static mut ClientAuthentication_hook: Option<Hook>;
}

/// The status of a client that was authenticated.
pub const STATUS_OK: c_int = pg_sys::STATUS_OK as c_int;

/// The server's timestamp of the moment when it ends this process unless the client's
/// session has begun, for `authentication_timeout`. `None` if nothing limits it.
pub fn authentication_deadline() -> Option<pg_sys::TimestampTz> {
    // The timeout of statements serves for this one before a session has begun.
    const STATEMENT_TIMEOUT: c_int = 3;
    // SAFETY: the number is that of `STATEMENT_TIMEOUT` in timeout.h of all versions.
    unsafe { finish_of_timeout(STATEMENT_TIMEOUT) }
}

/// The server's timestamp of the moment when it ends this process unless its transaction has
/// ended, for `transaction_timeout`. `None` if nothing limits it, as before 17.
pub fn transaction_deadline() -> Option<pg_sys::TimestampTz> {
    #[cfg(any(feature = "pg15", feature = "pg16"))]
    {
        None
    }
    #[cfg(not(any(feature = "pg15", feature = "pg16")))]
    {
        const TRANSACTION_TIMEOUT: c_int = 8;
        // SAFETY: the number is that of `TRANSACTION_TIMEOUT` in timeout.h since 17.
        unsafe { finish_of_timeout(TRANSACTION_TIMEOUT) }
    }
}

/// When a timeout ends, if it is active.
///
/// # Safety
/// `id` is the number of a timeout in this version's `TimeoutId`.
unsafe fn finish_of_timeout(id: c_int) -> Option<pg_sys::TimestampTz> {
    // These raise no ERROR.
    unsafe extern "C" {
        fn get_timeout_active(id: c_int) -> bool;
        fn get_timeout_finish_time(id: c_int) -> pg_sys::TimestampTz;
    }
    // SAFETY: the server has that timeout.
    unsafe { get_timeout_active(id).then(|| get_timeout_finish_time(id)) }
}

/// Whether the client is still connected. Resets this process's latch. May raise an ERROR.
pub fn client_is_connected() -> bool {
    unsafe extern "C-unwind" {
        fn pq_check_connection() -> bool;
    }
    // SAFETY: a client has connected to this process.
    unsafe { pg_guard_ffi_boundary(|| pq_check_connection()) }
}

/// Whether as many connections are free as are reserved for superusers and the like.
pub fn leaves_reserved_connections() -> bool {
    // SAFETY: the numbers are set when the server starts, and do not change.
    #[cfg(feature = "pg15")]
    let reserved = unsafe { pg_sys::ReservedBackends };
    // SAFETY: the numbers are set when the server starts, and do not change.
    #[cfg(not(feature = "pg15"))]
    let reserved = unsafe { pg_sys::SuperuserReservedConnections + pg_sys::ReservedConnections };
    if reserved == 0 {
        return true;
    }
    // SAFETY: it counts, and asserts that the number is not 0.
    unsafe {
        #[cfg(feature = "pg15")]
        return pg_sys::HaveNFreeProcs(reserved);
        #[cfg(not(feature = "pg15"))]
        pg_sys::HaveNFreeProcs(reserved, &mut 0)
    }
}
