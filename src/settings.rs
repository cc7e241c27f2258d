//! The configuration parameters `pg_prewarm.*`: their definitions, and functions that
//! return their values.

use std::ffi::CString;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use pgrx::guc::{GucContext, GucFlags, GucRegistry, GucSetting};

use crate::pg::process;

static AUTOPREWARM: GucSetting<bool> = GucSetting::<bool>::new(true);
static AUTOPREWARM_WORKERS: GucSetting<i32> = GucSetting::<i32>::new(8);
static AUTOPREWARM_MAX_RATE: GucSetting<i32> = GucSetting::<i32>::new(0);
static AUTOPREWARM_HOLD_CONNECTIONS: GucSetting<i32> = GucSetting::<i32>::new(0);
static AUTOPREWARM_INTERVAL: GucSetting<i32> = GucSetting::<i32>::new(300);

static AUTOPREWARM_FOLLOW: GucSetting<bool> = GucSetting::<bool>::new(false);
static AUTOPREWARM_FOLLOW_INTERVAL: GucSetting<i32> = GucSetting::<i32>::new(60);
static AUTOPREWARM_FOLLOW_MAX_RATE: GucSetting<i32> = GucSetting::<i32>::new(32 * 1024);
static AUTOPREWARM_FOLLOW_REPLACE: GucSetting<bool> = GucSetting::<bool>::new(true);
static AUTOPREWARM_FOLLOW_CONNINFO: GucSetting<Option<CString>> =
    GucSetting::<Option<CString>>::new(Some(c""));

/// Whether the library is in `shared_preload_libraries`. The postmaster sets it, and all
/// other processes inherit it.
static PRELOADED: AtomicBool = AtomicBool::new(false);

/// Defines the parameters. One that can be set at server start only has to be defined
/// then, so `pg_prewarm.autoprewarm` exists only if the library is preloaded.
pub fn define() {
    GucRegistry::define_int_guc(
        c"pg_prewarm.autoprewarm_interval",
        c"Sets the interval between dumps of shared buffers",
        c"If set to zero, time-based dumping is disabled.",
        &AUTOPREWARM_INTERVAL,
        0,
        i32::MAX / 1000,
        GucContext::Sighup,
        GucFlags::UNIT_S,
    );
    GucRegistry::define_int_guc(
        c"pg_prewarm.autoprewarm_workers",
        c"Sets the maximum number of simultaneously running autoprewarm worker processes.",
        c"These processes are taken from the pool established by \"max_worker_processes\".",
        &AUTOPREWARM_WORKERS,
        1,
        64,
        GucContext::Sighup,
        GucFlags::default(),
    );
    GucRegistry::define_int_guc(
        c"pg_prewarm.autoprewarm_max_rate",
        c"Sets the maximum amount of data that all autoprewarm workers together load per second.",
        c"If set to zero, the rate is not limited.",
        &AUTOPREWARM_MAX_RATE,
        0,
        i32::MAX,
        GucContext::Sighup,
        GucFlags::UNIT_KB,
    );
    GucRegistry::define_int_guc(
        c"pg_prewarm.autoprewarm_hold_connections",
        c"Sets the maximum time that new sessions wait for the most used blocks to be loaded.",
        c"Superusers, members of \"pg_monitor\" and walsenders never wait. If set to zero, no session waits.",
        &AUTOPREWARM_HOLD_CONNECTIONS,
        0,
        60_000,
        GucContext::Sighup,
        GucFlags::UNIT_MS,
    );
    define_follow();
    if !process::is_preloading() {
        return;
    }
    PRELOADED.store(true, Relaxed);
    GucRegistry::define_bool_guc(
        c"pg_prewarm.autoprewarm",
        c"Starts the autoprewarm worker.",
        c"",
        &AUTOPREWARM,
        GucContext::Postmaster,
        GucFlags::default(),
    );
    process::reserve_settings(c"pg_prewarm");
}

/// Defines those about following an upstream server.
fn define_follow() {
    GucRegistry::define_bool_guc(
        c"pg_prewarm.autoprewarm_follow",
        c"Keeps a standby's shared buffers close to those of its upstream server.",
        c"",
        &AUTOPREWARM_FOLLOW,
        GucContext::Sighup,
        GucFlags::default(),
    );
    GucRegistry::define_int_guc(
        c"pg_prewarm.autoprewarm_follow_interval",
        c"Sets the interval between fetches of the upstream server's block list.",
        c"",
        &AUTOPREWARM_FOLLOW_INTERVAL,
        1,
        i32::MAX / 1000,
        GucContext::Sighup,
        GucFlags::UNIT_S,
    );
    GucRegistry::define_int_guc(
        c"pg_prewarm.autoprewarm_follow_max_rate",
        c"Sets the maximum amount of data that a standby loads per second to follow its upstream server.",
        c"If set to zero, the rate is not limited.",
        &AUTOPREWARM_FOLLOW_MAX_RATE,
        0,
        i32::MAX,
        GucContext::Sighup,
        GucFlags::UNIT_KB,
    );
    GucRegistry::define_bool_guc(
        c"pg_prewarm.autoprewarm_follow_replace",
        c"Lets the upstream server's hot blocks replace clean blocks that a standby does not use.",
        c"",
        &AUTOPREWARM_FOLLOW_REPLACE,
        GucContext::Sighup,
        GucFlags::default(),
    );
    GucRegistry::define_string_guc(
        c"pg_prewarm.autoprewarm_follow_conninfo",
        c"Sets the connection string to fetch the upstream server's block list with.",
        c"If empty, \"primary_conninfo\" is used.",
        &AUTOPREWARM_FOLLOW_CONNINFO,
        GucContext::Sighup,
        GucFlags::SUPERUSER_ONLY,
    );
}

/// `pg_prewarm.autoprewarm`: whether a leader may run.
pub fn autoprewarm() -> bool {
    AUTOPREWARM.get()
}

/// Whether the server starts a leader by itself. During `pg_upgrade` it does not: the
/// blocks cached then are not worth keeping, and `pg_upgrade` needs databases without
/// other connections.
pub fn leader_starts_with_server() -> bool {
    PRELOADED.load(Relaxed) && autoprewarm() && !process::is_upgrading()
}

/// `pg_prewarm.autoprewarm_workers`: the maximum number of workers at once.
pub fn autoprewarm_workers() -> usize {
    usize::try_from(AUTOPREWARM_WORKERS.get()).unwrap_or(1)
}

/// `pg_prewarm.autoprewarm_max_rate`: how many kB may be loaded per second; 0 means no
/// limit.
pub fn autoprewarm_max_rate() -> u32 {
    u32::try_from(AUTOPREWARM_MAX_RATE.get()).unwrap_or(0)
}

/// `pg_prewarm.autoprewarm_interval`: how long the leader waits between two dumps. `None`
/// if it dumps at shutdown only.
pub fn autoprewarm_interval() -> Option<Duration> {
    match u64::try_from(AUTOPREWARM_INTERVAL.get()) {
        Ok(0) | Err(_) => None,
        Ok(seconds) => Some(Duration::from_secs(seconds)),
    }
}

/// `pg_prewarm.autoprewarm_hold_connections`: how long a new session waits for the first
/// tier of the server's first load, or of that after a promotion, at most. Zero if none
/// waits.
pub fn autoprewarm_hold_connections() -> Duration {
    let milliseconds = AUTOPREWARM_HOLD_CONNECTIONS.get();
    Duration::from_millis(u64::try_from(milliseconds).unwrap_or(0))
}

/// `pg_prewarm.autoprewarm_follow`: whether a standby follows its upstream server.
pub fn autoprewarm_follow() -> bool {
    AUTOPREWARM_FOLLOW.get()
}

/// `pg_prewarm.autoprewarm_follow_interval`: how long it is from one fetch to the next.
pub fn autoprewarm_follow_interval() -> Duration {
    let seconds = AUTOPREWARM_FOLLOW_INTERVAL.get();
    Duration::from_secs(u64::try_from(seconds).unwrap_or(1))
}

/// `pg_prewarm.autoprewarm_follow_max_rate`: how many kB a standby may load per second to
/// follow; 0 means no limit.
pub fn autoprewarm_follow_max_rate() -> u32 {
    u32::try_from(AUTOPREWARM_FOLLOW_MAX_RATE.get()).unwrap_or(0)
}

/// `pg_prewarm.autoprewarm_follow_replace`: whether hot blocks of the upstream server may
/// replace blocks that the standby does not use.
pub fn autoprewarm_follow_replace() -> bool {
    AUTOPREWARM_FOLLOW_REPLACE.get()
}

/// `pg_prewarm.autoprewarm_follow_conninfo`. `None` if it is empty.
pub fn autoprewarm_follow_conninfo() -> Option<String> {
    let conninfo = AUTOPREWARM_FOLLOW_CONNINFO.get()?;
    let conninfo = conninfo.to_string_lossy().into_owned();
    (!conninfo.is_empty()).then_some(conninfo)
}
