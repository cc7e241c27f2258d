//! Messages to the client and to the server's log: what `ereport` does in C.
//!
//! The server serves interrupts at the end of each message, so that even a NOTICE can
//! raise an ERROR. It has to unwind through Rust like any other; pgrx's own macros for
//! messages would let it jump.

#![expect(
    ffi_unwind_calls,
    reason = "an ERROR jumps to the guard around a message"
)]

use std::ffi::{CStr, CString, c_char};
use std::panic::Location;

use pgrx::{PgLogLevel, PgSqlErrorCode, pg_sys};

use crate::pg::sys::ffi;

/// The SQLSTATE of messages that are no errors.
pub const SUCCESS: PgSqlErrorCode = PgSqlErrorCode::ERRCODE_SUCCESSFUL_COMPLETION;

/// A message, by PostgreSQL's error message style guide.
#[derive(Clone, Copy, Debug)]
pub struct Message<'a> {
    pub sqlstate: PgSqlErrorCode,
    /// What happened, as a phrase.
    pub primary: &'a str,
    /// Facts, as sentences.
    pub detail: Option<&'a str>,
    /// What can be done about it, as sentences.
    pub hint: Option<&'a str>,
}

impl<'a> Message<'a> {
    pub fn new(sqlstate: PgSqlErrorCode, primary: &'a str) -> Self {
        Self {
            sqlstate,
            primary,
            detail: None,
            hint: None,
        }
    }

    pub fn detail(self, detail: &'a str) -> Self {
        let detail = Some(detail);
        Self { detail, ..self }
    }

    pub fn hint(self, hint: &'a str) -> Self {
        let hint = Some(hint);
        Self { hint, ..self }
    }
}

/// Reports a message. Returns if the level is below ERROR.
#[track_caller]
pub fn report(level: PgLogLevel, message: Message) {
    let c_string = |text: &str| CString::new(text).expect("a message has no NUL");
    let primary = c_string(message.primary);
    let [detail, hint] = [message.detail, message.hint].map(|text| text.map(c_string));
    let pointer = |text: &Option<CString>| text.as_deref().map_or(std::ptr::null(), CStr::as_ptr);
    let (primary, detail, hint) = (primary.as_ptr(), pointer(&detail), pointer(&hint));
    // SAFETY: the formats have one string each, and all strings outlive the call.
    unsafe {
        ereport(level, message.sqlstate, || {
            ffi::errmsg_internal(c"%s".as_ptr(), primary);
            if !detail.is_null() {
                ffi::errdetail_internal(c"%s".as_ptr(), detail);
            }
            if !hint.is_null() {
                ffi::errhint(c"%s".as_ptr(), hint);
            }
        });
    }
}

/// Reports a message about a relation: `format` has one `%s`, for its name, which is in
/// the server's encoding. With a kind of relation, a DETAIL says that such relations are
/// not supported.
#[track_caller]
pub fn report_relation(
    level: PgLogLevel,
    sqlstate: PgSqlErrorCode,
    format: &CStr,
    name: &CStr,
    unsupported_kind: Option<u8>,
) {
    let (format, name) = (format.as_ptr(), name.as_ptr());
    // SAFETY: the format has one string, which outlives the call.
    unsafe {
        ereport(level, sqlstate, || {
            ffi::errmsg(format, name);
            if let Some(kind) = unsupported_kind {
                ffi::errdetail_relkind_not_supported(kind as c_char);
            }
        });
    }
}

/// Raises an ERROR, which unwinds to [`super::error::catch`] or to the entry point.
#[track_caller]
pub fn raise(message: Message) -> ! {
    report(PgLogLevel::ERROR, message);
    unreachable!("an ERROR does not return");
}

/// Sends a NOTICE to the client.
#[track_caller]
pub fn notice(message: &str) {
    report(PgLogLevel::NOTICE, Message::new(SUCCESS, message));
}

/// Sends a NOTICE about a relation to the client, like [`report_relation`].
#[track_caller]
pub fn notice_relation(format: &CStr, name: &CStr) {
    report_relation(PgLogLevel::NOTICE, SUCCESS, format, name, None);
}

/// Reports a message that `say` composes. An ERROR unwinds.
///
/// # Safety
/// `say` calls `errmsg` and the like, with arguments that fit their formats. It holds
/// nothing that needs dropping.
#[track_caller]
unsafe fn ereport(level: PgLogLevel, sqlstate: PgSqlErrorCode, say: impl FnOnce()) {
    let location = Location::caller();
    // SAFETY: an ERROR jumps to this guard, over `say` alone.
    unsafe {
        pg_sys::ffi::pg_guard_ffi_boundary(|| {
            ereport_unguarded(level, sqlstate, location, say);
        });
    }
}

/// Reports a message that `say` composes. An ERROR jumps.
///
/// # Safety
/// `say` calls `errmsg` and the like, with arguments that fit their formats. Between
/// PostgreSQL's nearest `sigsetjmp` and this, no frame of Rust's needs dropping, unless
/// the process ends.
pub unsafe fn ereport_unguarded(
    level: PgLogLevel,
    sqlstate: PgSqlErrorCode,
    location: &Location,
    say: impl FnOnce(),
) {
    // SAFETY: the calls that `ereport` expands to, in its order; the file's name is
    // static.
    unsafe {
        if ffi::errstart(level as i32, std::ptr::null()) {
            ffi::errcode(sqlstate as i32);
            say();
            ffi::errfinish(
                location.file_as_c_str().as_ptr(),
                location.line() as i32,
                c"pg_prewarm".as_ptr(),
            );
        }
    }
}

/// A message of this server's, to be returned as data. Messages are in UTF-8 here; in a
/// database of another encoding, all but ASCII characters become question marks.
pub fn in_server_encoding(message: &str) -> String {
    // SAFETY: it reads a word that is set when the process connects.
    if unsafe { pg_sys::GetDatabaseEncoding() } == pg_sys::pg_enc::PG_UTF8 as i32 {
        return message.to_owned();
    }
    let ascii = |c: char| if c.is_ascii() { c } else { '?' };
    message.chars().map(ascii).collect()
}
