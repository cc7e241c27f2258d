//! The two sides of a comparison, and how to start a server with one of them.

use std::time::{Duration, Instant};

use crate::common::{Cluster, Installation, LIST, Shutdown};
use crate::machine;

/// Which module is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Contrib,
    Ours,
}

impl Side {
    pub const BOTH: [Self; 2] = [Self::Contrib, Self::Ours];

    pub fn name(self) -> &'static str {
        match self {
            Self::Contrib => "contrib",
            Self::Ours => "ours",
        }
    }

    pub fn installation(self) -> Installation {
        match self {
            Self::Contrib => {
                Installation::contrib().expect("no contrib module of this version is installed")
            }
            Self::Ours => Installation::ours(),
        }
    }
}

/// Whether the operating system has the files cached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SystemCache {
    Cold,
    Warm,
}

impl SystemCache {
    pub fn name(self) -> &'static str {
        match self {
            Self::Cold => "cold",
            Self::Warm => "warm",
        }
    }
}

/// Starts the stopped cluster with that side's module and that list. Returns the time
/// from "ready to accept connections" to the end of the load, by the timestamps in the
/// log. The cluster keeps running.
pub fn start_and_load(
    cluster: &mut Cluster,
    side: Side,
    list: &str,
    cache: SystemCache,
    buffers: u32,
) -> Duration {
    prepare(cluster, side, Some(list), cache, buffers);
    start_and_wait(cluster)
}

/// The same for a cluster that has been prepared.
pub fn start_and_wait(cluster: &Cluster) -> Duration {
    let mark = cluster.log_end();
    cluster.start();
    let (loaded, total) = cluster.wait_for_load(mark);
    assert!(loaded <= total);
    let log = cluster.log_since(mark);
    let second = |text: &str| -> f64 {
        let line = log.lines().find(|line| line.contains(text)).expect(text);
        line.split_whitespace().next().unwrap().parse().unwrap()
    };
    let took = second("autoprewarm successfully prewarmed") - second("ready to accept connections");
    Duration::from_secs_f64(took.max(0.0))
}

/// Prepares the stopped cluster and the machine for a start with that side's module and
/// that list.
pub fn prepare(
    cluster: &mut Cluster,
    side: Side,
    list: Option<&str>,
    cache: SystemCache,
    buffers: u32,
) {
    cluster.switch_to(side.installation());
    match list {
        Some(list) => cluster.write_list(list),
        None => {
            let _ = std::fs::remove_file(cluster.data(LIST));
        }
    }
    match cache {
        SystemCache::Cold => {
            machine::drop_caches();
        }
        SystemCache::Warm => machine::cache_files(&cluster.data("base")),
    }
    machine::touch_memory(buffers + buffers / 4);
}

/// A cluster for benchmarks, started.
pub fn cluster(buffers: u32, settings: &[&str]) -> Cluster {
    let mut builder = Cluster::build()
        .setting(&format!("shared_buffers = {buffers}MB"))
        // Seconds since 1970, with milliseconds, at the start of each line.
        .setting("log_line_prefix = '%n %b '")
        .setting("log_min_messages = log")
        .setting("wal_level = minimal")
        .setting("max_wal_senders = 0")
        .setting("max_wal_size = 10GB")
        .setting("checkpoint_timeout = 1h")
        .setting("max_locks_per_transaction = 5000")
        .setting("pg_prewarm.autoprewarm_interval = 0");
    if machine::huge_pages() {
        // Locks and buffer headers need memory besides the buffers.
        machine::keep_huge_pages(buffers + buffers / 8 + 256);
        builder = builder.setting("huge_pages = on");
    } else {
        builder = builder.setting("huge_pages = off");
    }
    for setting in settings {
        builder = builder.setting(setting);
    }
    let more = std::env::var("SETTINGS").unwrap_or_default();
    for setting in more.split(';').filter(|setting| !setting.is_empty()) {
        builder = builder.setting(setting);
    }
    builder.start()
}

/// Creates a table of that many full blocks with one row each, quickly.
pub fn table(cluster: &Cluster, database: &str, name: &str, blocks: u32) -> crate::common::Block {
    let start = Instant::now();
    cluster.sql_in(
        database,
        &format!(
            "BEGIN; CREATE TABLE {name} (id int, filler text); \
             ALTER TABLE {name} ALTER filler SET STORAGE PLAIN; \
             INSERT INTO {name} SELECT g, repeat('x', 7000) FROM generate_series(1, {blocks}) g; \
             COMMIT"
        ),
    );
    eprintln!(
        "   {name}: {blocks} blocks in {:.1} s",
        start.elapsed().as_secs_f64()
    );
    cluster.file_of(database, name)
}

pub fn stop(cluster: &Cluster) {
    cluster.stop(Shutdown::Immediate);
}
