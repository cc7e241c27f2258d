//! Reports that there is nothing to load: the file does not exist, as at the server's first
//! start, or is a symbolic link whose target does not exist.

use std::io;

use pgrx::PgLogLevel;

use super::DUMP_FILE;
use crate::pg::process::error::log_message;
use crate::pg::process::report::{Message, SUCCESS};
use crate::pg::storage::file;

/// Whether the list could not be opened because there is none.
pub fn is_missing<T>(opened: &io::Result<T>) -> bool {
    matches!(opened, Err(error) if error.kind() == io::ErrorKind::NotFound)
}

/// Logs that there is nothing to load.
pub fn report() {
    let path = file::full_path(DUMP_FILE);
    let (primary, detail) = match file::link_target(DUMP_FILE) {
        None => (
            format!("skipping prewarm because file \"{DUMP_FILE}\" does not exist"),
            format!("The next block dump writes file \"{path}\"."),
        ),
        Some(target) => (
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
