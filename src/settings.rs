//! The settings, as `postgresql.conf` names them.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use pgrx::guc::{GucContext, GucFlags, GucRegistry, GucSetting};

use crate::pg::process;

static AUTOPREWARM: GucSetting<bool> = GucSetting::<bool>::new(true);
static AUTOPREWARM_WORKERS: GucSetting<i32> = GucSetting::<i32>::new(2);
static AUTOPREWARM_MAX_RATE: GucSetting<i32> = GucSetting::<i32>::new(0);
static AUTOPREWARM_INTERVAL: GucSetting<i32> = GucSetting::<i32>::new(300);

/// `shared_preload_libraries` names the library: known to every process, since
/// the postmaster has loaded it.
static PRELOADED: AtomicBool = AtomicBool::new(false);

/// Defines the settings. One that is fixed when the server starts can be defined
/// while it starts only, so `pg_prewarm.autoprewarm` exists when preloaded.
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

/// `pg_prewarm.autoprewarm`: whether there is to be a leader.
pub fn autoprewarm() -> bool {
    AUTOPREWARM.get()
}

/// Whether the server itself starts a leader. What `pg_upgrade` caches is not
/// worth a list, nor does it want others in its databases.
pub fn leader_starts_with_server() -> bool {
    PRELOADED.load(Relaxed) && autoprewarm() && !process::is_upgrading()
}

/// `pg_prewarm.autoprewarm_workers`: the most workers of a load at once.
pub fn autoprewarm_workers() -> usize {
    usize::try_from(AUTOPREWARM_WORKERS.get()).unwrap_or(1)
}

/// `pg_prewarm.autoprewarm_max_rate`: kB that may be loaded in a second; 0 where
/// there is no limit.
pub fn autoprewarm_max_rate() -> u32 {
    u32::try_from(AUTOPREWARM_MAX_RATE.get()).unwrap_or(0)
}

/// `pg_prewarm.autoprewarm_interval`: how long the leader waits between two
/// dumps; nothing where it dumps at shutdown only.
pub fn autoprewarm_interval() -> Option<Duration> {
    match u64::try_from(AUTOPREWARM_INTERVAL.get()) {
        Ok(0) | Err(_) => None,
        Ok(seconds) => Some(Duration::from_secs(seconds)),
    }
}
