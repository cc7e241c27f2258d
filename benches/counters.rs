//! The cost of progress reporting for a load: with and without `track_activities` and
//! `update_process_title`, and with a rate limit that is never reached.

use crate::Options;
use crate::common::{Shutdown, list_of};
use crate::report::{Report, median};
use crate::side::{self, Side, SystemCache};

const REPORTED: &str = "track_activities = on\nupdate_process_title = on";
const NOT_REPORTED: &str = "track_activities = off\nupdate_process_title = off";
const UNLIMITED: &str = "pg_prewarm.autoprewarm_max_rate = 0";
const LIMITED: &str = "pg_prewarm.autoprewarm_max_rate = 1000GB";

pub fn run(options: &Options, report: &mut Report) {
    let size = options.size;
    let mut cluster = side::cluster(size.buffers, &[]);
    let table = side::table(&cluster, "postgres", "dense", size.dense_blocks);
    let list = list_of(table.first(size.dense_blocks));
    cluster.sql("CHECKPOINT");
    cluster.stop(Shutdown::Fast);

    let cases = [
        ("not reported", NOT_REPORTED, UNLIMITED),
        ("reported", REPORTED, UNLIMITED),
        (
            "reported, with a limit that is never reached",
            REPORTED,
            LIMITED,
        ),
    ];
    let mut times = vec![Vec::new(); cases.len()];
    for _ in 0..2 * options.runs {
        for ((name, shown, limit), times) in cases.iter().zip(&mut times) {
            cluster.configure(shown);
            cluster.configure(limit);
            let took = side::start_and_load(
                &mut cluster,
                Side::Ours,
                &list,
                SystemCache::Warm,
                size.buffers,
            );
            side::stop(&cluster);
            eprintln!("   {name}: {:.3} s", took.as_secs_f64());
            times.push(took.as_secs_f64());
        }
    }
    for ((name, ..), samples) in cases.iter().zip(&times) {
        let ratio = median(samples) / median(&times[0]);
        report.figure(&format!("counters: {name}"), median(samples), "s");
        report.figure(
            &format!("counters: {name}, relative to not reported"),
            ratio,
            "",
        );
    }
}
