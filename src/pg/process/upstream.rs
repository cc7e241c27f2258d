//! A connection to the upstream server, as physical replication makes one.

use std::ffi::{CStr, CString};

use pgrx::{PgSqlErrorCode, pg_sys};

use super::transaction::Transaction;
use crate::pg::sys::walreceiver::{self, Executed};

/// The name that the connection has on the upstream server, in `pg_stat_replication` and
/// elsewhere.
const NAME: &CStr = c"pg_prewarm";

/// A connection to the upstream server.
pub struct Upstream<'t> {
    connection: *mut pg_sys::WalReceiverConn,
    transaction: &'t Transaction,
}

/// Why a setting was not shown.
pub struct Refusal {
    /// 0 if the connection was lost.
    sqlstate: i32,
    pub message: String,
}

/// Whether an ERROR is that libpq cannot parse a connection string.
pub fn is_syntax_error(sqlstate: PgSqlErrorCode) -> bool {
    sqlstate == PgSqlErrorCode::ERRCODE_SYNTAX_ERROR
}

impl Refusal {
    /// The error's code; that of a failed connection if it was lost.
    pub fn sqlstate(&self) -> PgSqlErrorCode {
        match self.sqlstate {
            0 => PgSqlErrorCode::ERRCODE_CONNECTION_FAILURE,
            sqlstate => PgSqlErrorCode::from(sqlstate),
        }
    }

    /// Whether the upstream server does not know the setting.
    pub fn is_unknown_setting(&self) -> bool {
        self.sqlstate == PgSqlErrorCode::ERRCODE_UNDEFINED_OBJECT as i32
    }
}

impl<'t> Upstream<'t> {
    /// Connects as `conninfo` says, but by a name of its own: otherwise the upstream server
    /// would seem to have this standby twice. `Err` is why that failed. This process is
    /// connected to a database.
    ///
    /// May raise an ERROR. Of one of a syntax error ([`is_syntax_error`]) the message quotes
    /// from `conninfo`, perhaps from a password.
    pub fn connect(transaction: &'t Transaction, conninfo: &str) -> Result<Self, String> {
        let conninfo = CString::new(with_name(conninfo)).map_err(|error| error.to_string())?;
        walreceiver::check(&conninfo);
        Ok(Self {
            connection: walreceiver::connect(&conninfo, NAME)?,
            transaction,
        })
    }

    /// The upstream server's host, or the directory of its socket, and its port.
    pub fn host_and_port(&self) -> (String, i32) {
        // SAFETY: the connection is open while `self` lives.
        unsafe { walreceiver::sender(self.connection) }
    }

    /// The value of a setting on the upstream server. May raise an ERROR.
    pub fn show(&self, setting: &CStr) -> Result<Vec<u8>, Refusal> {
        let command = [b"SHOW ", setting.to_bytes()].concat();
        let command = CString::new(command).expect("a name has no NUL");
        // SAFETY: the connection is open while `self` lives, and the transaction outlives it.
        let executed = unsafe { walreceiver::execute(self.connection, &command) };
        // The type of the column was looked up in a catalog.
        self.transaction.release_catalog_snapshot();
        match executed {
            Executed::Text(text) => Ok(text.unwrap_or_default()),
            Executed::Failed(sqlstate, message) => Err(Refusal { sqlstate, message }),
        }
    }
}

impl Drop for Upstream<'_> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            // SAFETY: the connection is open, and nothing uses it any more.
            unsafe { walreceiver::disconnect(self.connection) };
        }
    }
}

/// The connection string with [`NAME`] as `application_name`, whatever it has itself: the
/// last one counts.
fn with_name(conninfo: &str) -> String {
    let name = NAME.to_string_lossy();
    let uri = ["postgresql://", "postgres://"]
        .iter()
        .find_map(|scheme| conninfo.strip_prefix(scheme));
    let Some(uri) = uri else {
        // A backslash at the end escapes nothing, and would escape the space.
        let backslashes = conninfo.len() - conninfo.trim_end_matches('\\').len();
        let conninfo = &conninfo[..conninfo.len() - backslashes % 2];
        // An empty value at the end would be the name.
        let last = conninfo.split_whitespace().next_back().unwrap_or_default();
        let value = match last.find('=') {
            Some(at) if at + 1 == last.len() => "''",
            _ => "",
        };
        return format!("{conninfo}{value} application_name={name}");
    };
    // A password may have a question mark.
    let after_user = match uri.find(['@', '/']) {
        Some(at) if uri[at..].starts_with('@') => &uri[at..],
        _ => uri,
    };
    let separator = match after_user.find('?') {
        None => "?",
        Some(at) if at + 1 == after_user.len() || after_user.ends_with('&') => "",
        Some(_) => "&",
    };
    format!("{conninfo}{separator}application_name={name}")
}

/// `primary_conninfo`: how this standby connects to its upstream server. Empty if it does
/// not.
pub fn primary_conninfo() -> String {
    // SAFETY: a setting that is null or a C string, and changes only while this process
    // serves a reload.
    unsafe {
        let conninfo = (&raw const pg_sys::PrimaryConnInfo).read();
        match conninfo.is_null() {
            true => String::new(),
            false => CStr::from_ptr(conninfo).to_string_lossy().into_owned(),
        }
    }
}

/// `wal_receiver_timeout` in milliseconds; 0 means none.
pub fn wal_receiver_timeout() -> u64 {
    // SAFETY: a setting, which changes only while this process serves a reload.
    let timeout = unsafe { (&raw const pg_sys::wal_receiver_timeout).read() };
    u64::try_from(timeout).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_a_connection_string_is_overridden() {
        for (conninfo, expected) in [
            ("", " application_name=pg_prewarm"),
            (
                "host=a application_name=b",
                "host=a application_name=b application_name=pg_prewarm",
            ),
            (
                "postgresql://r@a:1/",
                "postgresql://r@a:1/?application_name=pg_prewarm",
            ),
            (
                "postgres://a?application_name=b",
                "postgres://a?application_name=b&application_name=pg_prewarm",
            ),
            (
                "postgresql://r:what?@a/",
                "postgresql://r:what?@a/?application_name=pg_prewarm",
            ),
            (
                "postgresql:///?host=/tmp&",
                "postgresql:///?host=/tmp&application_name=pg_prewarm",
            ),
            (
                "postgresql://a/?password=b?",
                "postgresql://a/?password=b?&application_name=pg_prewarm",
            ),
            (
                "host=a sslcert=",
                "host=a sslcert='' application_name=pg_prewarm",
            ),
            (
                "host=a sslcert= ",
                "host=a sslcert= '' application_name=pg_prewarm",
            ),
            ("password=a=", "password=a= application_name=pg_prewarm"),
            (
                "postgresql:///?",
                "postgresql:///?application_name=pg_prewarm",
            ),
            (
                r"password=a\\ host=b\",
                r"password=a\\ host=b application_name=pg_prewarm",
            ),
            (r"password=a\\", r"password=a\\ application_name=pg_prewarm"),
        ] {
            assert_eq!(with_name(conninfo), expected);
        }
    }
}
