//! The list that is missing: why there is nothing to load, and where the list will be.
//!
//! That is so at the first start. Later it is worth a look: somebody has removed the file,
//! or it is a symbolic link to something that is gone.

use std::io;

use pgrx::PgLogLevel;

use super::DUMP_FILE;
use crate::pg::process::error::log_message;
use crate::pg::process::report::{Message, SUCCESS};
use crate::pg::storage::file;

/// Why there is no list.
pub enum NoList {
    Missing,
    /// A symbolic link to this path, where nothing is.
    DanglingLink(String),
}

/// Why there is no list. `None` if there is one, be it one that cannot be read.
pub fn reason() -> Option<NoList> {
    match file::open(DUMP_FILE) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Some(file::link_target(DUMP_FILE).map_or(NoList::Missing, NoList::DanglingLink))
        }
        _ => None,
    }
}

/// Logs that there is nothing to load.
pub fn report(reason: &NoList) {
    let path = file::full_path(DUMP_FILE);
    let (primary, detail) = match reason {
        NoList::Missing => (
            format!("skipping prewarm because file \"{DUMP_FILE}\" does not exist"),
            format!("The next block dump writes file \"{path}\"."),
        ),
        NoList::DanglingLink(target) => (
            format!(
                "skipping prewarm because file \"{DUMP_FILE}\" is a symbolic link to a file that \
                 does not exist"
            ),
            format!(
                "The link leads to \"{target}\". The next block dump replaces it with file \
                 \"{path}\"."
            ),
        ),
    };
    log_message(
        PgLogLevel::LOG,
        Message::new(SUCCESS, &primary).detail(&detail),
    );
}
