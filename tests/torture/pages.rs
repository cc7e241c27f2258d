//! Data files that are damaged while a load reads them, and repaired after it: corrupt
//! and torn pages, truncated and missing files, reads that fail. All other blocks are
//! loaded, and the unreadable ones are counted.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use rand::Rng;

use super::arena::Arena;
use crate::common::{Fault, Shutdown, give_to_server};

pub const FAULTS: &[super::Kind] = &[
    ("corrupt-pages", corrupt_pages),
    ("torn-pages", torn_pages),
    ("truncated-segment", truncated_segment),
    ("missing-segment", missing_segment),
    ("failing-reads", failing_reads),
];

const PAGE: usize = 8192;

/// An anchor's file, and how many blocks it has.
fn choose_file(arena: &mut Arena) -> (PathBuf, u64) {
    // Files of database two are in a tablespace, in a directory that the server names.
    let database = arena.round.choose(&["postgres", "one"]);
    let relation = arena.round.choose(&["anchor", "anchor_pkey"]);
    let row = arena
        .query(
            database,
            &format!(
                "SELECT pg_relation_filepath('{relation}'), pg_relation_size('{relation}') / 8192"
            ),
        )
        .remove(0);
    let path = arena.cluster.data(row.get::<_, &str>(0));
    (path, row.get::<_, i64>(1) as u64)
}

/// Loads the list while one of its files is damaged. Returns how many blocks
/// `pg_stat_autoprewarm` has counted as unreadable, and how many blocks of the file are
/// not cached.
fn load_broken(arena: &mut Arena, damage: impl FnOnce(&mut Arena, &PathBuf, u64)) -> (i64, i64) {
    arena.settle();
    // The list must name all blocks, and nothing may be written to the file during the
    // load.
    arena.run("postgres", "CHECKPOINT");
    let (path, blocks) = choose_file(arena);
    arena.cluster.stop(Shutdown::Fast);
    let whole = fs::read(&path).unwrap();
    damage(arena, &path, blocks);
    arena.round.may_skip = true;
    arena.round.allowed.extend([
        "page verification failed",
        "invalid page in block",
        // 18 uses this text for several pages that it reads at once.
        "invalid pages among blocks",
        "could not read block",
        "could not open file",
    ]);
    arena.cluster.start();
    if arena.round.coin() {
        // A load on demand is the same as one at the start.
        arena.slow_down();
        arena.crash();
        arena.back_to_normal();
    }
    arena.settle();
    let row = arena
        .query(
            "postgres",
            "SELECT skipped_unreadable, skipped_no_block, \
                    skipped_illegal + skipped_locked + skipped_no_free_buffer \
                    + skipped_interrupted + skipped_cancelled, load_result \
             FROM pg_stat_autoprewarm",
        )
        .remove(0);
    let (unreadable, gone): (i64, i64) = (row.get(0), row.get(1));
    assert_eq!(row.get::<_, i64>(2), 0, "blocks skipped for other reasons");
    assert_eq!(row.get::<_, &str>(3), "completed");
    let cached = arena.cluster.cached_without_extension();
    let missing = arena.anchors.iter().filter(|block| !cached.contains(block));
    let missing = missing.count() as i64;
    // Other relations may have been truncated since the dump.
    assert!(
        (unreadable..=unreadable + gone).contains(&missing),
        "{missing} blocks are not cached, {unreadable} unreadable, {gone} gone"
    );
    fs::write(&path, &whole).unwrap();
    give_to_server(&path);
    (unreadable, missing)
}

fn some_blocks(arena: &mut Arena, blocks: u64) -> BTreeSet<u64> {
    let count = arena.round.rng.random_range(1..=4);
    (0..count)
        .map(|_| arena.round.rng.random_range(0..blocks))
        .collect()
}

fn corrupt_pages(arena: &mut Arena) {
    let mut broken = 0;
    let counts = load_broken(arena, |arena, path, blocks| {
        let file = fs::OpenOptions::new()
            .write(true)
            .read(true)
            .open(path)
            .unwrap();
        for block in some_blocks(arena, blocks) {
            broken += 1;
            let at = block * PAGE as u64 + arena.round.rng.random_range(0..PAGE as u64);
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            byte[0] ^= arena.round.rng.random_range(1..=255);
            file.write_all_at(&byte, at).unwrap();
        }
    });
    assert_eq!(counts, (broken, broken), "unreadable blocks, missing ones");
}

/// A part of the page is that of another page.
fn torn_pages(arena: &mut Arena) {
    let mut broken = 0;
    let counts = load_broken(arena, |arena, path, blocks| {
        let file = fs::OpenOptions::new().write(true).open(path).unwrap();
        for block in some_blocks(arena, blocks) {
            broken += 1;
            let mut other = [0; PAGE / 2];
            arena.round.rng.fill(&mut other[..]);
            let half = arena.round.choose(&[0, PAGE / 2]) as u64;
            file.write_all_at(&other, block * PAGE as u64 + half)
                .unwrap();
        }
    });
    assert_eq!(counts, (broken, broken), "unreadable blocks, missing ones");
}

fn truncated_segment(arena: &mut Arena) {
    let mut gone = 0;
    let counts = load_broken(arena, |arena, path, blocks| {
        let length = arena.round.rng.random_range(0..blocks * PAGE as u64);
        gone = (blocks - length / PAGE as u64) as i64;
        let file = fs::OpenOptions::new().write(true).open(path).unwrap();
        file.set_len(length).unwrap();
    });
    assert_eq!(counts, (0, gone), "unreadable blocks, missing ones");
}

fn missing_segment(arena: &mut Arena) {
    let mut gone = 0;
    let (_, missing) = load_broken(arena, |_, path, blocks| {
        gone = blocks as i64;
        fs::remove_file(path).unwrap();
    });
    assert_eq!(missing, gone, "missing blocks");
}

/// Some reads fail, and the next may succeed.
fn failing_reads(arena: &mut Arena) {
    arena.settle();
    arena.round.may_skip = true;
    arena.round.allowed.push("could not read block");
    let often = arena.round.rng.random_range(2..40);
    // If the recovery cannot read a block, the server exits.
    if arena.round.coin() {
        arena.cluster.set_fault(Fault::ReadErrors, often);
        arena.restart(Shutdown::Fast);
    } else {
        arena.restart(Shutdown::Immediate);
        arena.cluster.set_fault(Fault::ReadErrors, often);
    }
    let database = arena.round.choose(&super::arena::DATABASES);
    let mode = arena.round.choose(&["buffer", "read", "prefetch"]);
    let sql = format!("SELECT pg_prewarm_database('{mode}', workers => 2)");
    let state = arena.call(database, &sql).wait();
    assert!(
        matches!(state.as_deref(), None | Some("58030")),
        "{state:?}"
    );
    arena.settle();
    arena.back_to_normal();
}
