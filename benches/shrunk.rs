//! A list of four times the size of shared buffers: the hit ratio of a skewed workload
//! right after the load, compared with the best choice of blocks.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::Options;
use crate::common::{Shutdown, value};
use crate::report::Report;
use crate::side::{self, Side, SystemCache};

/// How many reads of the workload are counted.
const READS: usize = 20_000;

pub fn run(options: &Options, report: &mut Report) {
    let size = options.size;
    let small = size.buffers / 4;
    // As many blocks as the larger shared buffers have, except those that the server
    // needs.
    let blocks = size.buffers * 128 - 2000;
    let mut cluster = side::cluster(size.buffers, &[]);
    side::table(&cluster, "postgres", "t", blocks);
    cluster.sql("CREATE EXTENSION pg_prewarm VERSION '1.2'");

    for side in Side::BOTH {
        cluster.stop(Shutdown::Fast);
        cluster.switch_to(side.installation());
        cluster.write_list("<<0>>\n");
        cluster.start();
        let mut client = cluster.connect("postgres");
        client.execute("SELECT pg_prewarm('t')", &[]).unwrap();
        let mut random = StdRng::seed_from_u64(3);
        let query = client
            .prepare("SELECT length(filler) FROM t WHERE ctid = $1::text::tid")
            .unwrap();
        for _ in 0..blocks {
            let place = format!("({},1)", block(&mut random, blocks));
            client.query(&query, &[&place]).unwrap();
        }
        drop(client);
        cluster.stop(Shutdown::Fast);

        cluster.configure(&format!("shared_buffers = {small}MB"));
        let list = cluster.list();
        side::start_and_load(&mut cluster, side, &list, SystemCache::Warm, small);
        let mut client = cluster.connect("postgres");
        client.execute("SELECT pg_stat_reset()", &[]).unwrap();
        let hits = "SELECT heap_blks_hit FROM pg_statio_user_tables WHERE relname = 't'";
        let reads = "SELECT heap_blks_read FROM pg_statio_user_tables WHERE relname = 't'";
        let query = client
            .prepare("SELECT length(filler) FROM t WHERE ctid = $1::text::tid")
            .unwrap();
        for _ in 0..READS {
            let place = format!("({},1)", block(&mut random, blocks));
            client.query(&query, &[&place]).unwrap();
        }
        client
            .execute("SELECT pg_stat_force_next_flush()", &[])
            .unwrap();
        let hits: i64 = value(&mut client, hits);
        let reads: i64 = value(&mut client, reads);
        let ratio = hits as f64 / (hits + reads) as f64;
        let best = best_ratio(blocks, small * 128);
        let what = format!("list of 4 times shared_buffers, {}: hit ratio", side.name());
        report.figure(&what, ratio, "");
        report.figure(&format!("{what} / best possible"), ratio / best, "");
        drop(client);
        cluster.stop(Shutdown::Fast);
        cluster.configure(&format!("shared_buffers = {}MB", size.buffers));
        cluster.start();
    }
}

/// The workload: a fifth of the blocks gets nine tenths of the reads.
fn block(random: &mut StdRng, blocks: u32) -> u32 {
    let hot = blocks / 5;
    let rank = if random.random_bool(0.9) {
        random.random_range(0..hot)
    } else {
        random.random_range(0..blocks)
    };
    (u64::from(rank) * 2_147_483_647 % u64::from(blocks)) as u32
}

/// The hit ratio of the best choice of so many blocks.
fn best_ratio(blocks: u32, buffers: u32) -> f64 {
    let hot = f64::from(blocks / 5);
    let [blocks, buffers] = [blocks, buffers].map(f64::from);
    let hot_share = 0.9 + 0.1 * hot / blocks;
    if buffers <= hot {
        hot_share * buffers / hot
    } else {
        hot_share + 0.1 * (buffers - hot) / blocks
    }
}
