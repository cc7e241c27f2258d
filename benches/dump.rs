//! The time and memory that writing the list of full shared buffers takes.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::common::value;
use crate::report::{Report, Samples};
use crate::side::{self, Side, SystemCache};
use crate::{Options, machine};

pub fn run(options: &Options, report: &mut Report) {
    let size = options.size;
    let mut cluster = side::cluster(size.buffers, &["pg_prewarm.autoprewarm = off"]);
    cluster.sql("CREATE EXTENSION pg_prewarm VERSION '1.2'");
    let blocks = size.buffers * 128;
    side::table(&cluster, "postgres", "t", blocks);
    cluster.stop(crate::common::Shutdown::Fast);

    let (mut times, mut memory) = (Samples::default(), Samples::default());
    for side in Side::BOTH {
        side::prepare(&mut cluster, side, None, SystemCache::Warm, size.buffers);
        cluster.start();
        let mut client = cluster.connect("postgres");
        client.execute("SELECT pg_prewarm('t')", &[]).unwrap();
        for _ in 0..options.runs.max(3) {
            let mut client = cluster.connect("postgres");
            let pid: i32 = value(&mut client, "SELECT pg_backend_pid()");
            // The first call loads the library.
            client
                .execute("SELECT pg_prewarm('t', 'buffer', 'main', 0, 0)", &[])
                .unwrap();
            let before = machine::status_kb(pid, "RssAnon").unwrap();
            let done = AtomicBool::new(false);
            let (took, most) = std::thread::scope(|scope| {
                let watcher = scope.spawn(|| {
                    let mut most = before;
                    while !done.load(Ordering::Relaxed) {
                        most = most.max(machine::status_kb(pid, "RssAnon").unwrap_or(0));
                        std::thread::sleep(Duration::from_millis(1));
                    }
                    most
                });
                let start = Instant::now();
                let records: i64 = value(&mut client, "SELECT autoprewarm_dump_now()");
                let took = start.elapsed();
                assert!(records > i64::from(blocks) * 9 / 10, "{records} records");
                done.store(true, Ordering::Relaxed);
                (took, watcher.join().unwrap())
            });
            times.add(side, took.as_secs_f64());
            memory.add(side, (most - before) as f64 * 1024.0 / f64::from(blocks));
        }
        side::stop(&cluster);
    }
    report.compare("dump: time", "s", &times);
    report.compare("dump: memory, bytes a buffer", "B", &memory);
}
