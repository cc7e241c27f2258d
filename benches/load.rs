//! The time of a load: dense, sparse, of many relations, of many databases; with the
//! operating system's cache cold and warm.

use std::path::PathBuf;
use std::time::Duration;

use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;

use crate::common::{Block, Cluster, list_of};
use crate::report::{Report, Samples};
use crate::side::{self, Side, SystemCache};
use crate::{Options, machine};

pub fn run(options: &Options, report: &mut Report) {
    let size = options.size;
    let mut cluster = side::cluster(size.buffers, &[]);
    let mut random = StdRng::seed_from_u64(1);
    let shuffled = |mut blocks: Vec<Block>, random: &mut StdRng| {
        // The order of buffers, and so of the list, is not the order on disk.
        blocks.shuffle(random);
        list_of(blocks)
    };

    let dense = side::table(&cluster, "postgres", "dense", size.dense_blocks);
    let (of, count) = size.sparse_blocks;
    let sparse = side::table(&cluster, "postgres", "sparse", of);
    cluster.sql(&format!(
        "DO $$ BEGIN FOR i IN 1..{} LOOP EXECUTE format('CREATE TABLE small%s AS \
         SELECT g, repeat(''x'', 700) FROM generate_series(1, 30) g', i); END LOOP; END $$",
        size.small_tables
    ));
    let mut small = Vec::new();
    let mut client = cluster.connect("postgres");
    for row in client
        .query(
            "SELECT pg_relation_filenode(oid), (pg_relation_size(oid) / 8192)::int4 \
             FROM pg_class WHERE relname LIKE 'small%'",
            &[],
        )
        .unwrap()
    {
        let file = Block {
            filenumber: row.get(0),
            ..dense
        };
        small.extend(file.first(row.get::<_, i32>(1) as u32));
    }
    drop(client);
    let mut databases = Vec::new();
    for number in 1..=8 {
        let name = format!("db{number}");
        cluster.sql(&format!("CREATE DATABASE {name}"));
        let file = side::table(&cluster, &name, "t", size.database_blocks);
        databases.extend(file.first(size.database_blocks));
    }
    let mut picked: Vec<u32> = (0..of).collect();
    picked.shuffle(&mut random);
    picked.truncate(count as usize);
    let lists = [
        (
            "dense",
            shuffled(dense.first(size.dense_blocks).collect(), &mut random),
        ),
        (
            "sparse",
            list_of(picked.into_iter().map(|block| sparse.at(block))),
        ),
        ("many relations", shuffled(small, &mut random)),
        ("8 databases", shuffled(databases, &mut random)),
    ];
    cluster.sql("CHECKPOINT");
    cluster.stop(crate::common::Shutdown::Fast);

    let caches = if machine::drop_caches() {
        vec![SystemCache::Cold, SystemCache::Warm]
    } else {
        eprintln!("   the operating system's cache cannot be dropped here: warm only");
        vec![SystemCache::Warm]
    };
    for (name, list) in lists.iter().filter(|(name, _)| options.includes(name)) {
        for &cache in &caches {
            let mut samples = Samples::default();
            for run in 0..options.runs {
                for side in Side::BOTH {
                    let took: Duration =
                        side::start_and_load(&mut cluster, side, list, cache, size.buffers);
                    side::stop(&cluster);
                    eprintln!(
                        "   {name}, {}, run {}, {}: {:.3} s",
                        cache.name(),
                        run + 1,
                        side.name(),
                        took.as_secs_f64()
                    );
                    samples.add(side, took.as_secs_f64());
                }
            }
            report.compare(&format!("load: {name}, {}", cache.name()), "s", &samples);
            let per_second = |blocks: u32| f64::from(blocks) / samples.ours();
            match (*name, cache) {
                ("dense", SystemCache::Cold) => {
                    let ours = per_second(size.dense_blocks);
                    compare_with_disk(report, name, &files_of(&cluster, &dense), DENSE, ours);
                }
                ("sparse", SystemCache::Cold) => {
                    let ours = per_second(count);
                    compare_with_disk(report, name, &files_of(&cluster, &sparse), SPARSE, ours);
                }
                _ => {}
            }
        }
    }
}

/// Sequential reads, as they are wanted for a dense table.
const DENSE: machine::Reads = machine::Reads {
    order: "read",
    blocks: 16,
    between_jobs: "50%",
};

/// Random reads of single blocks.
const SPARSE: machine::Reads = machine::Reads {
    order: "randread",
    blocks: 1,
    between_jobs: "0",
};

/// The segment files of a table.
fn files_of(cluster: &Cluster, table: &Block) -> Vec<PathBuf> {
    let first = cluster.data(&format!("base/{}/{}", table.database, table.filenumber));
    let segments = (1..).map(|number| first.with_extension(number.to_string()));
    std::iter::once(first.clone())
        .chain(segments)
        .take_while(|file| file.exists())
        .collect()
}

/// Reports the blocks read per second relative to what the disk can do.
fn compare_with_disk(
    report: &mut Report,
    name: &str,
    files: &[PathBuf],
    reads: machine::Reads,
    ours: f64,
) {
    match machine::blocks_per_second(files, reads) {
        Some(disk) => {
            report.figure(&format!("load: {name}, cold: fio, blocks"), disk, "/s");
            let relative = ours / disk;
            report.figure(
                &format!("load: {name}, cold: ours, relative to fio"),
                relative,
                "",
            );
        }
        None => eprintln!("   no fio to compare with"),
    }
}
