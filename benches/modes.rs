//! The time of `pg_prewarm()` for a table in each of its modes, and of
//! `pg_prewarm_relation()` with parallel workers.

use std::time::Instant;

use crate::common::{Cluster, Shutdown};
use crate::report::{Report, Samples};
use crate::side::{self, Side, SystemCache};
use crate::{Options, machine};

const ALONE: &str = "SELECT pg_prewarm('t', $mode)";
const ALL_ALONE: &str = "SELECT sum(blocks)::int8 FROM pg_prewarm_relation('t', $mode)";
const WITH_WORKERS: &str =
    "SELECT sum(blocks)::int8 FROM pg_prewarm_relation('t', $mode, workers => 2)";

/// The calls of both sides, contrib's first, and for which caches.
struct Case {
    name: &'static str,
    mode: &'static str,
    caches: &'static [SystemCache],
    calls: [(Side, &'static str); 2],
}

const BOTH: &[SystemCache] = &[SystemCache::Cold, SystemCache::Warm];
const WARM: &[SystemCache] = &[SystemCache::Warm];
const BOTH_ALONE: [(Side, &str); 2] = [(Side::Contrib, ALONE), (Side::Ours, ALONE)];

const CASES: [Case; 5] = [
    Case {
        name: "buffer",
        mode: "buffer",
        caches: BOTH,
        calls: BOTH_ALONE,
    },
    Case {
        name: "buffer, ours with 2 workers",
        mode: "buffer",
        caches: BOTH,
        calls: [(Side::Contrib, ALONE), (Side::Ours, WITH_WORKERS)],
    },
    Case {
        name: "read",
        mode: "read",
        caches: BOTH,
        calls: BOTH_ALONE,
    },
    Case {
        name: "prefetch",
        mode: "prefetch",
        caches: WARM,
        calls: BOTH_ALONE,
    },
    Case {
        name: "buffer, ours without and with 2 workers",
        mode: "buffer",
        caches: WARM,
        calls: [(Side::Ours, ALL_ALONE), (Side::Ours, WITH_WORKERS)],
    },
];

pub fn run(options: &Options, report: &mut Report) {
    let size = options.size;
    let mut cluster = side::cluster(size.buffers, &["pg_prewarm.autoprewarm = off"]);
    cluster.sql("CREATE EXTENSION pg_prewarm");
    side::table(&cluster, "postgres", "t", size.dense_blocks);
    cluster.sql("VACUUM t");
    cluster.sql("CHECKPOINT");
    cluster.stop(Shutdown::Fast);
    let can_drop = machine::drop_caches();
    for case in CASES {
        for &cache in case.caches {
            if cache == SystemCache::Cold && !can_drop {
                continue;
            }
            let mut samples = Samples::default();
            for _ in 0..options.runs {
                // The sides in the report are contrib's module and ours.
                for ((side, call), column) in case.calls.into_iter().zip(Side::BOTH) {
                    let call = call.replace("$mode", &format!("'{}'", case.mode));
                    side::prepare(&mut cluster, side, None, cache, size.buffers);
                    cluster.start();
                    let took = time(&cluster, &call, size.dense_blocks);
                    side::stop(&cluster);
                    eprintln!("   {}, {}, {call}: {took:.3} s", case.name, cache.name());
                    samples.add(column, took);
                }
            }
            let what = format!("modes: {}, {}", case.name, cache.name());
            report.compare(&what, "s", &samples);
        }
    }
}

/// The time of a call in a session that has loaded the library.
fn time(cluster: &Cluster, call: &str, blocks: u32) -> f64 {
    let mut client = cluster.connect("postgres");
    client
        .execute("SELECT pg_prewarm('t', 'read', 'main', 0, 0)", &[])
        .unwrap();
    let start = Instant::now();
    let done: i64 = client.query_one(call, &[]).unwrap().get(0);
    let took = start.elapsed().as_secs_f64();
    assert!(done >= i64::from(blocks), "{done}");
    took
}
