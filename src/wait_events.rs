//! The wait events of this extension, as `pg_stat_activity` shows them.

use crate::pg::process::latch::WaitEvent;

/// The leader waits for the next dump, or for a request.
pub static LEADER_MAIN: WaitEvent = WaitEvent::new(c"AutoprewarmLeaderMain");

/// A new session waits for the first tier of the load.
pub static HOLD_CONNECTIONS: WaitEvent = WaitEvent::new(c"AutoprewarmHoldConnections");

/// The leader waits for its workers.
pub static LOAD: WaitEvent = WaitEvent::new(c"AutoprewarmLoad");

/// A worker waits for locked relations.
pub static LOCKED_RELATION: WaitEvent = WaitEvent::new(c"AutoprewarmLockedRelation");

/// A worker waits because of the rate limit.
pub static RATE_LIMIT: WaitEvent = WaitEvent::new(c"AutoprewarmRateLimit");

/// A caller waits for the start of a leader.
pub static LEADER_START: WaitEvent = WaitEvent::new(c"AutoprewarmLeaderStart");

/// A caller waits for the upstream's list to be fetched and loaded.
pub static FOLLOW: WaitEvent = WaitEvent::new(c"AutoprewarmFollow");

/// A caller waits for the start or the end of a load.
pub static LOAD_END: WaitEvent = WaitEvent::new(c"AutoprewarmLoadEnd");

/// A process of a call waits until all of them have released their locks.
pub static PAUSE: WaitEvent = WaitEvent::new(c"PrewarmPause");
