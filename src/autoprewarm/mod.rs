//! Autoprewarm: keeps a list of the cached blocks on disk, and loads them again
//! when the server starts.
//!
//! One background worker, the [`leader`], runs as long as the server. It [`load`]s the
//! list by [`worker`]s that it [`supervise`]s, each connected to one database, since a
//! process can read relations of one database only. After that it [`dump`]s the list at
//! intervals, and once more at shutdown. What the load has [`left`] stays in the list
//! ([`carry`]), and what it has left locked is tried [`later`].
//!
//! - [`create_segment`] puts the plan of a load into shared memory, and [`load_segment`] is
//!   what lies there during the load.
//! - [`follow`] keeps a standby's shared buffers close to those of its upstream server.
//! - [`rate`] limits how much a load reads per second.
//! - [`hold`] has new sessions wait for the first tier of the server's first load, and of
//!   that after a promotion.
//! - [`mark`] notices loads during which the server crashes.
//! - [`no_list`] reports that there is nothing to load.
//! - [`role`] has roles that only one process may have at a time.
//! - [`state`] lies in shared memory all the time, and [`stats`] are its statistics.
//! - [`sql`] has the control functions, [`list`] the function that returns the list as
//!   rows, and [`views`] those behind the statistics views.

mod carry;
mod create_segment;
mod dump;
pub mod follow;
mod hold;
mod later;
pub mod leader;
mod left;
pub mod list;
mod load;
mod load_segment;
mod mark;
mod no_list;
mod rate;
mod role;
pub mod sql;
mod state;
mod stats;
mod supervise;
pub mod views;
pub mod worker;

use crate::blocks::DUMP_FILE;
use crate::pg::process::authentication;
use crate::pg::shared::worker::Kind;
use crate::settings;

/// The name of the block dump file while it is written.
const DUMP_FILE_BEING_WRITTEN: &str = "autoprewarm.blocks.tmp";

const LEADER: Kind = Kind {
    name: c"autoprewarm leader",
    function: c"autoprewarm_main",
    // A leader that fails at its start would otherwise be started again thousands
    // of times.
    restart: Some(1),
    interruptible: false,
};

const WORKER: Kind = Kind {
    name: c"autoprewarm worker",
    function: c"autoprewarm_database_main",
    restart: None,
    interruptible: true,
};

/// The message for a list with a line that is not a record.
fn corrupted_at(line: u64) -> String {
    format!("autoprewarm block dump file is corrupted at line {line}")
}

/// Reserves shared memory, registers the leader, and has new sessions held, while the
/// server starts with the library preloaded.
pub fn prepare_with_server() {
    state::reserve();
    authentication::call_for_each_session(hold::is_possible, hold::hold);
    if settings::leader_starts_with_server() {
        LEADER.start_with_server();
    }
}
