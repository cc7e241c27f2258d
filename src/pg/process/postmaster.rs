//! What the postmaster tells of itself.

use std::fs;

/// The line of `postmaster.pid` with the postmaster's status, counted from 0
/// (`LOCK_FILE_LINE_PM_STATUS`), and the status of one that shuts down.
const STATUS_LINE: usize = 7;
const STOPPING: &str = "stopping";

/// Whether a shutdown has been requested. A smart shutdown sends no signal to background
/// workers before the last session has ended; but the postmaster writes its status, for
/// `pg_ctl` to read, to the file at once.
pub fn is_stopping() -> bool {
    // Not for long open, so it need not be counted as a file of an extension.
    fs::read_to_string("postmaster.pid").is_ok_and(|text| says_stopping(&text))
}

fn says_stopping(text: &str) -> bool {
    let status = text.lines().nth(STATUS_LINE);
    status.is_some_and(|status| status.trim_end() == STOPPING)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_status_of_a_server_that_shuts_down_says_so() {
        let file = |status| format!("123\n/data\n1764400000\n5432\n/tmp\n\n 1234 5\n{status}\n");
        assert!(says_stopping(&file("stopping")));
        for status in ["ready   ", "standby ", "starting", ""] {
            assert!(!says_stopping(&file(status)), "{status}");
        }
        assert!(!says_stopping(""));
        assert!(!says_stopping("stopping\n"));
    }
}
