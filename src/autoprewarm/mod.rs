//! Autoprewarm: keeps a list of the cached blocks on disk, and loads them again
//! when the server starts.
//!
//! One background worker, the [`leader`], lives as long as the server. It
//! [`load`]s the list with the help of [`worker`]s, each in one database, since a
//! process can read relations of one database only; after that it [`dump`]s the
//! list from time to time, and once more at shutdown. SQL callers can look at the
//! [`list`], and act on the rest through [`sql`]. What several processes must
//! agree on is their shared [`state`], and during a load, what is [`shared`].

mod dump;
pub mod leader;
pub mod list;
mod load;
mod rate;
mod shared;
pub mod sql;
mod state;
mod stats;
pub mod views;
pub mod worker;

use crate::pg::shared::worker::Kind;
use crate::settings;

/// The list, in the data folder; and what it is called while it is written.
pub const DUMP_FILE: &str = "autoprewarm.blocks";
const DUMP_FILE_BEING_WRITTEN: &str = "autoprewarm.blocks.tmp";

const LEADER: Kind = Kind {
    name: c"autoprewarm leader",
    function: c"autoprewarm_main",
    // At once, one that cannot come up would be started thousands of times.
    restart: Some(1),
    interruptible: false,
};

const WORKER: Kind = Kind {
    name: c"autoprewarm worker",
    function: c"autoprewarm_database_main",
    restart: None,
    interruptible: true,
};

/// What is said of a list that has a line which is no record.
fn corrupted_at(line: u64) -> String {
    format!("autoprewarm block dump file is corrupted at line {line}")
}

/// What is to be done while the server starts, when the library is preloaded.
pub fn prepare_with_server() {
    state::reserve();
    if settings::leader_starts_with_server() {
        LEADER.start_with_server();
    }
}
