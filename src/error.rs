//! The errors of SQL functions, and of the leader's reading and writing of the list:
//! message, SQLSTATE, detail and hint of each.

use std::io;

use pgrx::{PgLogLevel, PgSqlErrorCode};

use crate::blocks::{DUMP_FILE, ReadError};
use crate::pg::process::error::log_message;
use crate::pg::process::report::{Message, raise};
use crate::pg::storage::file;

/// An error, with what its message needs.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("relation cannot be null")]
    NullRelation,
    #[error("prewarm type cannot be null")]
    NullMode,
    #[error("invalid prewarm type")]
    InvalidMode,
    #[error("prewarm type \"prefetch\" is not supported with direct I/O")]
    PrefetchWithDirectIo,
    #[error("relation fork cannot be null")]
    NullFork,
    /// Holds the argument's name.
    #[error("{0} cannot be null")]
    NullArgument(&'static str),
    #[error("max_blocks must not be negative")]
    NegativeMaxBlocks,
    /// Holds the maximum.
    #[error("workers must be between 0 and {0}")]
    WorkersOutOfRange(i32),
    /// Holds the schema's OID.
    #[error("schema with OID {0} does not exist")]
    MissingSchema(u32),
    #[error("fork \"{0}\" does not exist for this relation")]
    MissingFork(String),
    /// Holds the number of the last block, -1 for an empty fork.
    #[error("starting block number must be between 0 and {0}")]
    FirstBlockOutOfRange(i64),
    #[error("ending block number must be between 0 and {0}")]
    LastBlockOutOfRange(i64),
    #[error("autoprewarm is disabled")]
    Disabled,
    /// Holds the leader's process ID.
    #[error("autoprewarm worker is already running under PID {0}")]
    AlreadyRunning(i32),
    #[error("could not register background process")]
    NoWorkerSlot,
    #[error("could not start background process")]
    WorkerNotStarted,
    /// Holds the process ID of the process that uses the file.
    #[error("could not perform block dump because dump file is being used by PID {0}")]
    DumpFileInUse(i32),
    #[error("autoprewarm load is already in progress")]
    LoadInProgress,
    /// Holds the process ID of the process that uses the file.
    #[error("could not load blocks because dump file is being used by PID {0}")]
    ListInUse(i32),
    /// Holds the argument's name.
    #[error("{0} must not be negative")]
    NegativeInterval(&'static str),
    #[error("coverage must be between 0 and 1")]
    CoverageOutOfRange,
    #[error("this server is not a standby")]
    NotAStandby,
    #[error("autoprewarm does not follow the upstream server")]
    NotFollowing,
    #[error("autoprewarm leader is not running")]
    NoLeader,
    /// Holds the reason.
    #[error("could not follow the upstream server: {0}")]
    CouldNotFollow(String),
    #[error("file \"{path}\" cannot be used: {reason}")]
    DamagedList { path: &'static str, reason: String },
    #[error("could not {action} file \"{path}\": {}", file::describe(source))]
    File {
        /// As in "could not write to".
        action: &'static str,
        path: &'static str,
        source: io::Error,
    },
    #[error("could not read file \"{DUMP_FILE}\": {0}")]
    ListTooLarge(String),
}

impl Error {
    /// Its code.
    pub fn sqlstate(&self) -> PgSqlErrorCode {
        use PgSqlErrorCode::*;
        match self {
            Self::NullRelation
            | Self::NullMode
            | Self::InvalidMode
            | Self::NullFork
            | Self::NullArgument(_)
            | Self::NegativeMaxBlocks
            | Self::WorkersOutOfRange(_)
            | Self::MissingFork(_)
            | Self::FirstBlockOutOfRange(_)
            | Self::LastBlockOutOfRange(_)
            | Self::NegativeInterval(_)
            | Self::CoverageOutOfRange => ERRCODE_INVALID_PARAMETER_VALUE,
            Self::MissingSchema(_) => ERRCODE_INVALID_SCHEMA_NAME,
            Self::PrefetchWithDirectIo => ERRCODE_FEATURE_NOT_SUPPORTED,
            Self::Disabled
            | Self::AlreadyRunning(_)
            | Self::NotAStandby
            | Self::NotFollowing
            | Self::NoLeader
            | Self::CouldNotFollow(_) => ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            Self::DamagedList { .. } => ERRCODE_DATA_CORRUPTED,
            Self::LoadInProgress | Self::ListInUse(_) => ERRCODE_OBJECT_IN_USE,
            Self::NoWorkerSlot | Self::WorkerNotStarted => ERRCODE_INSUFFICIENT_RESOURCES,
            // Contrib gives this error no code, so `ereport` uses this one.
            Self::DumpFileInUse(_) => ERRCODE_INTERNAL_ERROR,
            Self::File { source, .. } => file::sqlstate(source),
            Self::ListTooLarge(_) => ERRCODE_OUT_OF_MEMORY,
        }
    }

    fn detail(&self) -> Option<&'static str> {
        match self {
            Self::PrefetchWithDirectIo => {
                Some("With \"debug_io_direct\", the server bypasses the operating system's cache.")
            }
            _ => None,
        }
    }

    fn hint(&self) -> Option<&'static str> {
        match self {
            Self::InvalidMode => {
                Some("Valid prewarm types are \"prefetch\", \"read\", and \"buffer\".")
            }
            Self::Disabled => Some("Set \"pg_prewarm.autoprewarm\" to on, and restart the server."),
            Self::NotFollowing => {
                Some("Set \"pg_prewarm.autoprewarm_follow\" to on, and reload the configuration.")
            }
            Self::PrefetchWithDirectIo => Some("Use the prewarm type \"buffer\"."),
            Self::NoWorkerSlot => Some("You may need to increase \"max_worker_processes\"."),
            Self::LoadInProgress => Some(
                "Use autoprewarm_wait() to wait for the end of the load, or autoprewarm_cancel() \
                 to cancel it.",
            ),
            Self::WorkerNotStarted => Some("More details may be available in the server log."),
            Self::File { path, source, .. }
                if *path == DUMP_FILE && source.kind() == io::ErrorKind::NotFound =>
            {
                Some(
                    "Use autoprewarm_dump_now() to write the file. The autoprewarm leader also \
                     writes it, periodically and at shutdown.",
                )
            }
            _ => None,
        }
    }
}

/// Errors while the list is read.
impl From<ReadError> for Error {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Io(source) => Self::File {
                action: "read",
                path: DUMP_FILE,
                source,
            },
            ReadError::OutOfMemory(_) | ReadError::TooManyFiles => {
                Self::ListTooLarge(error.to_string())
            }
        }
    }
}

impl Error {
    /// Raises the error as PostgreSQL's ERROR, which unwinds to the entry point.
    pub fn raise(self) -> ! {
        let primary = self.to_string();
        raise(self.message(&primary));
    }

    /// Logs the error as a WARNING of a background worker, which continues: the DETAIL
    /// tells how.
    pub fn warn(self, detail: &str, hint: Option<&str>) {
        let primary = self.to_string();
        let message = self.message(&primary).detail(detail);
        let hint = hint.or(message.hint);
        log_message(PgLogLevel::WARNING, Message { hint, ..message });
    }

    fn message<'a>(&self, primary: &'a str) -> Message<'a> {
        Message {
            sqlstate: self.sqlstate(),
            primary,
            detail: self.detail(),
            hint: self.hint(),
        }
    }
}
