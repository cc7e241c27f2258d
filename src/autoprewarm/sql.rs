//! Autoprewarm's SQL functions.
//!
//! They work in a server that did not preload the library as well. Both act on
//! the whole server, so that only superusers may call them until granted.

use pgrx::prelude::*;

use super::state::State;
use super::{LEADER, dump};
use crate::error::Error;
use crate::settings;

/// Starts the leader, where none runs. It lasts until the server stops; where
/// the library was not preloaded, nobody starts it again then.
#[pg_extern(sql = r#"
CREATE FUNCTION autoprewarm_start_worker()
RETURNS void STRICT
AS 'MODULE_PATHNAME', 'autoprewarm_start_worker'
LANGUAGE C;
REVOKE ALL ON FUNCTION autoprewarm_start_worker() FROM PUBLIC;
"#)]
fn autoprewarm_start_worker() {
    start_leader().unwrap_or_else(|error| error.raise());
}

fn start_leader() -> Result<(), Error> {
    if !settings::autoprewarm() {
        return Err(Error::Disabled);
    }
    if let Some(pid) = State::attach().leader() {
        return Err(Error::AlreadyRunning(pid));
    }
    let leader = LEADER.start(0).ok_or(Error::NoWorkerSlot)?;
    if leader.wait_until_started() {
        Ok(())
    } else {
        Err(Error::WorkerNotStarted)
    }
}

/// Writes the list of cached blocks now, those of unlogged relations included,
/// and returns how many records it has.
#[pg_extern(sql = r#"
CREATE FUNCTION autoprewarm_dump_now()
RETURNS pg_catalog.int8 STRICT
AS 'MODULE_PATHNAME', 'autoprewarm_dump_now'
LANGUAGE C;
REVOKE ALL ON FUNCTION autoprewarm_dump_now() FROM PUBLIC;
"#)]
fn autoprewarm_dump_now() -> i64 {
    dump_now().unwrap_or_else(|error| error.raise())
}

fn dump_now() -> Result<i64, Error> {
    let _in_use = State::attach()
        .use_dump_file()
        .map_err(Error::DumpFileInUse)?;
    // Buffers are counted in 31 bits.
    dump::write(dump::Unlogged::Included).map(|records| records as i64)
}
