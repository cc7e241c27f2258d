//! The functions with which the server connects to its upstream server for replication.
//! Its library `libpqwalreceiver` has them, and pgrx binds their types.

#![expect(
    ffi_unwind_calls,
    reason = "an ERROR of the functions called here jumps to their guard"
)]

use std::ffi::{CStr, c_char, c_int};
use std::ptr;

use pgrx::pg_sys;
use pgrx::pg_sys::ffi::pg_guard_ffi_boundary;

/// The functions. Loads the library if needed, and may raise an ERROR.
fn functions() -> &'static pg_sys::WalReceiverFunctionsType {
    // SAFETY: a C string. The library sets the pointer to a structure of its own when it is
    // loaded, and is never unloaded.
    unsafe {
        if pg_sys::WalReceiverFunctions.is_null() {
            pg_sys::load_file(c"libpqwalreceiver".as_ptr(), false);
        }
        &*pg_sys::WalReceiverFunctions
    }
}

/// Raises an ERROR if libpq cannot parse a connection string: a syntax error, whose message
/// quotes from it.
pub fn check(conninfo: &CStr) {
    let check = functions()
        .walrcv_check_conninfo
        .expect("the library has it");
    // SAFETY: a C string; the arguments are those of this version.
    unsafe {
        pg_guard_ffi_boundary(|| {
            #[cfg(feature = "pg15")]
            check(conninfo.as_ptr());
            #[cfg(not(feature = "pg15"))]
            check(conninfo.as_ptr(), false);
        });
    }
}

/// Connects for physical replication. `Err` is why that failed, as libpq says it. May raise
/// an ERROR.
pub fn connect(conninfo: &CStr, name: &CStr) -> Result<*mut pg_sys::WalReceiverConn, String> {
    let connect = functions().walrcv_connect.expect("the library has it");
    let mut error: *mut c_char = ptr::null_mut();
    // SAFETY: two C strings and a place for a third; the arguments are those of this version.
    unsafe {
        let connection = pg_guard_ffi_boundary(|| {
            #[cfg(feature = "pg15")]
            return connect(conninfo.as_ptr(), false, name.as_ptr(), &mut error);
            #[cfg(feature = "pg16")]
            return connect(conninfo.as_ptr(), false, false, name.as_ptr(), &mut error);
            #[cfg(not(any(feature = "pg15", feature = "pg16")))]
            connect(
                conninfo.as_ptr(),
                true,
                false,
                false,
                name.as_ptr(),
                &mut error,
            )
        });
        match connection.is_null() {
            false => Ok(connection),
            true if error.is_null() => Err("out of memory".to_owned()),
            true => Err(CStr::from_ptr(error).to_string_lossy().into_owned()),
        }
    }
}

/// The upstream server's host and port, as libpq knows them. May raise an ERROR.
///
/// # Safety
/// `connection` is open.
pub unsafe fn sender(connection: *mut pg_sys::WalReceiverConn) -> (String, i32) {
    let senderinfo = functions()
        .walrcv_get_senderinfo
        .expect("the library has it");
    let mut host: *mut c_char = ptr::null_mut();
    let mut port: c_int = 0;
    // SAFETY: the connection is open; the host is null or a C string.
    unsafe {
        pg_guard_ffi_boundary(|| senderinfo(connection, &mut host, &mut port));
        let host = match host.is_null() {
            true => String::new(),
            false => CStr::from_ptr(host).to_string_lossy().into_owned(),
        };
        (host, port)
    }
}

/// What a command has returned.
pub enum Executed {
    /// The value of one column of one row. `None` if there is no row, or it is NULL.
    Text(Option<Vec<u8>>),
    /// An error: its SQLSTATE, 0 if the connection was lost, and its message.
    Failed(c_int, String),
}

/// Runs a command that returns one column of type text. Needs a connection to a database,
/// and may raise an ERROR.
///
/// # Safety
/// `connection` is open, and so is a transaction.
pub unsafe fn execute(connection: *mut pg_sys::WalReceiverConn, command: &CStr) -> Executed {
    let execute = functions().walrcv_exec.expect("the library has it");
    let types = [pg_sys::TEXTOID];
    // SAFETY: the connection is open, and the types are one. What the server returns is
    // allocated in the transaction's memory, and is there until its end.
    unsafe {
        let result =
            pg_guard_ffi_boundary(|| execute(connection, command.as_ptr(), 1, types.as_ptr()));
        if (*result).status != pg_sys::WalRcvExecStatus::WALRCV_OK_TUPLES {
            let message = match (*result).err.is_null() {
                true => String::new(),
                false => CStr::from_ptr((*result).err).to_string_lossy().into_owned(),
            };
            return Executed::Failed((*result).sqlstate, message);
        }
        let text = first_text(result);
        pg_sys::tuplestore_end((*result).tuplestore);
        pg_sys::FreeTupleDesc((*result).tupledesc);
        pg_sys::pfree(result.cast());
        Executed::Text(text)
    }
}

/// The first column of the first row.
///
/// # Safety
/// `result` has rows of one column of type text.
unsafe fn first_text(result: *mut pg_sys::WalRcvExecResult) -> Option<Vec<u8>> {
    // SAFETY: the slot has the description of the rows. A value that is not NULL is a text,
    // and is copied before the slot is dropped.
    unsafe {
        let slot =
            pg_sys::MakeSingleTupleTableSlot((*result).tupledesc, &pg_sys::TTSOpsMinimalTuple);
        let mut text = None;
        if pg_sys::tuplestore_gettupleslot((*result).tuplestore, true, false, slot) {
            pg_sys::slot_getsomeattrs_int(slot, 1);
            if !*(*slot).tts_isnull {
                let value = pg_sys::text_to_cstring((*(*slot).tts_values).cast_mut_ptr());
                text = Some(CStr::from_ptr(value).to_bytes().to_vec());
                pg_sys::pfree(value.cast());
            }
        }
        pg_sys::ExecDropSingleTupleTableSlot(slot);
        text
    }
}

/// Closes a connection. May raise an ERROR.
///
/// # Safety
/// `connection` is open, and not used any more.
pub unsafe fn disconnect(connection: *mut pg_sys::WalReceiverConn) {
    let disconnect = functions().walrcv_disconnect.expect("the library has it");
    // SAFETY: the connection is open.
    unsafe { pg_guard_ffi_boundary(|| disconnect(connection)) };
}
