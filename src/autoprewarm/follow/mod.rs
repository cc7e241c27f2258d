//! Following: a standby keeps its shared buffers close to those of its upstream server, so
//! that it is warm when it is promoted.
//!
//! ```text
//! upstream server                          standby
//! shared buffers ─ serve ─> walsender ════> fetch ─> autoprewarm.upstream
//!                                                        │
//!                                          top_up <──────┘ (each interval, gently)
//!                                          promote <─────┘ (once, at full rate)
//! ```
//!
//! The list travels as the value of a setting over the replication protocol: see [`serve`].
//! So it needs no table, no database, no privilege besides that of replication, and no WAL.
//!
//! - The **leader** has a [`Follower`](follower::Follower), which decides when the next list
//!   is fetched, and notices the promotion.
//! - A short-lived **background worker** ([`fetch`]) connects to the upstream server, checks
//!   the list and keeps it in a file ([`stored`]). It is a process of its own since it may
//!   hang, and since the server's client needs a connection to a database.
//! - [`top_up`] plans which blocks of the list are loaded, by the same workers as any load.
//! - [`promote`] loads the rest when the standby is promoted, and restores usage counts.
//! - [`state`] is what the processes share, and [`sql`] has the functions and the view.

mod fetch;
pub mod follower;
mod promote;
mod serve;
pub mod sql;
pub mod state;
mod stored;
mod top_up;

use crate::pg::process::shown;
use crate::pg::shared::worker::Kind;

pub use fetch::main as fetch_main;

const FETCHER: Kind = Kind {
    name: c"autoprewarm follower",
    function: c"autoprewarm_fetch_main",
    restart: None,
    interruptible: true,
};

/// The setting whose value is the list.
const LIST_SETTING: &std::ffi::CStr = c"pg_prewarm.autoprewarm_list";

/// Defines the setting that serves the list.
pub fn define_list_setting() {
    shown::define(
        LIST_SETTING,
        c"Shows the list of cached blocks to standbys.",
        c"The value is empty for all but replication connections.",
        serve::next_chunk,
    );
}
