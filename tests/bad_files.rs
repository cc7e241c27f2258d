//! Damaged lists, and obstacles to a dump. In each case the server goes on, valid
//! records are loaded, the fault is logged once, and the list is not lost.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, PermissionsExt, symlink};
use std::path::Path;
use std::time::Instant;

use postgres::Client;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

use crate::common::{
    Block, Cluster, Fault, LIST, LoadStats, Paused, Shutdown, error, give_to_server,
    limit_file_size, list_of, signal, value, wait_until,
};

/// The number of blocks of the table that the lists name.
const BLOCKS: u32 = 20;

/// A server that loads one list after another without being restarted: killing a client
/// backend makes it reinitialize, which takes some hundredths of a second.
struct Loader {
    cluster: Cluster,
    client: Client,
    table: Block,
}

/// The outcome of a load.
#[derive(Debug)]
struct Load {
    leader: i32,
    loaded: u64,
    total: u64,
    bad_line: Option<u64>,
    /// The blocks of the table that are cached after the load.
    cached: BTreeSet<u32>,
}

impl Loader {
    fn new() -> Self {
        let mut cluster = Cluster::build()
            .setting("shared_buffers = 4MB")
            .setting("pg_prewarm.autoprewarm_interval = 0")
            .start();
        cluster.expect_crash();
        let table = cluster.table_of_blocks("postgres", "t", BLOCKS);
        cluster.sql("VACUUM t");
        cluster.sql("CREATE EXTENSION pg_buffercache");
        cluster.sql("CHECKPOINT");
        Self {
            client: cluster.connect("postgres"),
            table,
            cluster,
        }
    }

    /// Replaces each `T` by the table's first fields.
    fn fill_in(&self, text: &str) -> String {
        let Block {
            database,
            tablespace,
            filenumber,
            ..
        } = self.table;
        text.replace('T', &format!("{database},{tablespace},{filenumber}"))
    }

    /// Loads a list, and checks what must be true for every list.
    fn load(&mut self, list: impl AsRef<[u8]>) -> Load {
        let list = list.as_ref();
        let shown = shorten(list);
        let postmaster = self.cluster.postmaster();
        let mark = self.cluster.log_end();
        self.cluster.write_list(list);
        signal(
            value(&mut self.client, "SELECT pg_backend_pid()"),
            libc::SIGKILL,
        );

        let (loaded, total) = self.cluster.wait_for_load(mark);
        if loaded < total {
            let line = self.cluster.wait_for_log(mark, "autoprewarm skipped ");
            let skipped = number_after(&line, "autoprewarm skipped ");
            assert_eq!(loaded + skipped, total, "{line}\n{shown}");
        }
        self.client = self.cluster.connect("postgres");
        let log = self.cluster.log_since(mark);
        assert_eq!(log.matches("terminated by signal").count(), 1, "{log}");
        for sign in ["PANIC:", "TRAP:", "FATAL:", "exited with exit code 1"] {
            assert!(!log.contains(sign), "{sign} after\n{shown}\n{log}");
        }
        let started = "starting background worker process \"autoprewarm leader\"";
        assert_eq!(log.matches(started).count(), 1, "{shown}\n{log}");
        assert_eq!(self.cluster.postmaster(), postmaster);
        let now = fs::read(self.cluster.data(LIST)).unwrap();
        assert!(now == list, "{shown}\nbecame\n{}", shorten(&now));

        let bad_lines: Vec<_> = log
            .lines()
            .filter(|line| line.contains("autoprewarm block dump file is corrupted"))
            .map(|line| number_after(line, "corrupted at line "))
            .collect();
        assert!(bad_lines.len() <= 1, "{bad_lines:?} in\n{shown}");
        let leader = value(
            &mut self.client,
            "SELECT pid FROM pg_stat_activity WHERE backend_type = 'autoprewarm leader'",
        );
        let cached = self
            .client
            .query(
                "SELECT relblocknumber FROM pg_buffercache \
                 WHERE relfilenode = $1 AND relforknumber = 0",
                &[&self.table.filenumber],
            )
            .unwrap();
        Load {
            leader,
            loaded,
            total,
            bad_line: bad_lines.first().copied(),
            cached: cached
                .iter()
                .map(|row| row.get::<_, i64>(0) as u32)
                .collect(),
        }
    }

    /// Loads a list, and checks which blocks of the table are loaded, the number of
    /// records and the first bad line.
    fn check(
        &mut self,
        list: impl AsRef<[u8]>,
        blocks: &[u32],
        total: u64,
        bad_line: Option<u64>,
    ) -> Load {
        let list = list.as_ref();
        let load = self.load(list);
        assert_eq!(
            (load.loaded, load.total, load.bad_line),
            (blocks.len() as u64, total, bad_line),
            "{}",
            shorten(list)
        );
        assert_eq!(
            load.cached,
            blocks.iter().copied().collect(),
            "{}",
            shorten(list)
        );
        load
    }

    /// Checks that the next dump replaces the last list.
    fn finish(self) {
        self.cluster.stop(Shutdown::Fast);
        assert!(!self.cluster.listed().is_empty());
    }
}

fn number_after(line: &str, text: &str) -> u64 {
    let rest = line.split_once(text).unwrap().1;
    let digits = rest.split(|c: char| !c.is_ascii_digit()).next().unwrap();
    digits.parse().unwrap()
}

fn shorten(text: &[u8]) -> String {
    const MOST: usize = 4096;
    let shown = text[..text.len().min(MOST)].escape_ascii();
    if text.len() > MOST {
        format!("{shown}... ({} bytes)", text.len())
    } else {
        shown.to_string()
    }
}

#[test]
fn the_records_are_loaded_whatever_the_header_says() {
    let mut loader = Loader::new();
    for (text, blocks, bad_line) in [
        // Unusual but valid headers.
        ("<<0>>\n", &[][..], None),
        ("<<0>>", &[], None),
        ("<<00>>\n", &[], None),
        ("<<-0>>\nT,0,1\n", &[], None),
        ("<<0>>\nT,0,1\n", &[], None),
        ("<<0>>garbage", &[], None),
        ("<<1>>\nT,0,1\nT,0,2\n", &[1], None),
        ("<<1>>\nT,0,1", &[1], None),
        ("<<1>>T,0,1\n", &[1], None),
        ("<<1>> T,0,1\n", &[1], None),
        ("<<1>>\t\n\nT,0,1\n", &[1], None),
        ("<<   1>>\nT,0,1\n", &[1], None),
        ("<<\t1>>\nT,0,1\n", &[1], None),
        ("<<\n1>>\nT,0,1\n", &[1], None),
        ("<<+1>>\nT,0,1\n", &[1], None),
        ("<<000000000000000000000000000001>>\nT,0,1\n", &[1], None),
        ("<<2>>\r\nT,0,1\r\nT,0,2\r\n", &[1, 2], None),
        ("<<2>>\rT,0,1\rT,0,2\r", &[1, 2], None),
        // Numbers larger than that of the records.
        ("<<5>>\nT,0,1\nT,0,2\n", &[1, 2], Some(4)),
        ("<<5>>\nT,0,1\nT,0,2", &[1, 2], Some(3)),
        ("<<5>>\nT,0,1\nT,0,2\n\n\n", &[1, 2], Some(6)),
        ("<<1>>\n", &[], Some(2)),
        ("<<1>>", &[], Some(1)),
        ("<<1>>\n\n\n", &[], Some(4)),
        ("<<2147483647>>\nT,0,1\n", &[1], Some(3)),
        ("<<2147483648>>\nT,0,1\n", &[1], Some(3)),
        ("<<4294967297>>\nT,0,1\n", &[1], Some(3)),
        ("<<99999999999>>\nT,0,1\n", &[1], Some(3)),
        ("<<18446744073709551615>>\nT,0,1\n", &[1], Some(3)),
        ("<<18446744073709551617>>\nT,0,1\n", &[1], Some(3)),
        ("<<99999999999999999999999999>>\nT,0,1\n", &[1], Some(3)),
        // Invalid numbers.
        ("<<-5>>\nT,0,1\nT,0,2\n", &[1, 2], Some(1)),
        ("<<-1>>\n", &[], Some(1)),
        ("<<-2147483648>>\nT,0,1\n", &[1], Some(1)),
        ("<<-99999999999999999999999999>>\nT,0,1\n", &[1], Some(1)),
        // No header.
        ("", &[], Some(1)),
        ("\n", &[], Some(1)),
        ("#\n", &[], Some(1)),
        ("T,0,1\nT,0,2\n", &[1, 2], Some(1)),
        ("<<>>\nT,0,1\n", &[1], Some(1)),
        ("<<x>>\nT,0,1\n", &[1], Some(1)),
        ("<< >>\nT,0,1\n", &[1], Some(1)),
        ("<<1 >>\nT,0,1\n", &[1], Some(1)),
        ("<<1\nT,0,1\n", &[1], Some(1)),
        ("<<1>\nT,0,1\n", &[1], Some(1)),
        ("<1>>\nT,0,1\n", &[1], Some(1)),
        ("1\nT,0,1\n", &[1], Some(1)),
        ("<<", &[], Some(1)),
        ("<<\n", &[], Some(1)),
        ("<\nT,0,1\n", &[1], Some(1)),
        ("<<1.0>>\nT,0,1\n", &[1], Some(1)),
        ("<<1e0>>\nT,0,1\n", &[1], Some(1)),
        ("<<0x1>>\nT,0,1\n", &[1], Some(1)),
        ("<<--1>>\nT,0,1\n", &[1], Some(1)),
        ("<<+-1>>\nT,0,1\n", &[1], Some(1)),
        ("<<1,2>>\nT,0,1\n", &[1], Some(1)),
        (" <<1>>\nT,0,1\n", &[1], Some(1)),
        ("\n<<1>>\nT,0,1\n", &[1], Some(1)),
        ("\u{feff}<<1>>\nT,0,1\n", &[1], Some(1)),
        ("\0<<1>>\nT,0,1\n", &[1], Some(1)),
        ("# pg_prewarm\n<<1>>\nT,0,1\n", &[], Some(1)),
        // Other text in the line of the header counts as a record.
        ("<<2>>>\nT,0,1\nT,0,2\n", &[1], Some(1)),
        ("<<2>>\0\nT,0,1\nT,0,2\n", &[1], Some(1)),
    ] {
        loader.check(loader.fill_in(text), blocks, blocks.len() as u64, bad_line);
    }
    loader.finish();
}

#[test]
fn a_bad_line_costs_only_that_line() {
    let mut loader = Loader::new();
    let lines = "bad|T|T,|T,0|T,0,|T,,2|,T,0|T,0,2,|T,0,2,9|T,0,2x|xT,0,2|T,0,-2|T,-0,2|-T,0,2\
        |T,0,+2|+T,0,2|T,0x0,2|T,0,0x2|T;0;2|T 0 2|T ,0,2|T,0 ,2|T,0,4294967296|T,4294967296,2\
        |4294967296,T,0|99999999999999999999999999999999,1,1,0,2|T.0,0,2|T,0,2.0|T,0,2e0|'T,0,2'\
        |\"T,0,2\"|(T,0,2)|T,0,\u{662}|T\u{ff0c}0,2|\u{a0}T,0,2|\\N|NULL|T,0,2;|T,0,2#|T,#,2|<<3>>\
        |<<T,0,2>>|\0|T,0,2\0|T,\x000,2|\u{1b}[31mT,0,2|-- T,0,2|\u{7f}|%s%n%1000000000d";
    for line in lines.split('|') {
        let text = format!("<<3>>\nT,0,1\n{line}\nT,0,3\n");
        loader.check(loader.fill_in(&text), &[1, 3], 2, Some(3));
    }
    for (text, blocks, bad_line) in [
        ("<<3>>\nbad\nT,0,2\nT,0,3\n", &[2, 3][..], 2),
        ("<<3>>\nT,0,1\nT,0,2\nbad\n", &[1, 2], 4),
        ("<<3>>\nT,0,1\nT,0,2\nbad", &[1, 2], 4),
        ("<<3>>\nbad\nworse\nworst\n", &[], 2),
        (
            "<<5>>\n\nT,0,1\n\nbad\nworse\n\nT,0,4\nT,0,5\n",
            &[1, 4, 5],
            5,
        ),
        ("<<3>>\r\nT,0,1\r\nbad\r\nT,0,3\r\n", &[1, 3], 3),
        ("<<\n3>>\nT,0,1\nbad\nT,0,3\n", &[1, 3], 4),
        // However many records a line has, it is one bad line.
        ("<<3>>\nT,0,1\nbad T,0,2 T,0,4\nT,0,3\n", &[1, 3], 3),
        ("<<4>>\nT,0,1\nT,0,2 bad\nT,0,3\n", &[1, 2, 3], 3),
        // A record cannot continue on the next line.
        ("<<3>>\nT,0,1\nT,\n0,2\n", &[1], 3),
        ("<<3>>\nT,0,1\nT,0\n,2\n", &[1], 3),
        // A truncated file.
        ("<<3>>\nT,0,1\nT,0,2\nT,0,", &[1, 2], 4),
        ("<<3>>\nT,0,1\nT,0,2\nT", &[1, 2], 4),
        ("<<3>>\nT,0,1\nT,0,2\n# pg_prewarm 2.0\n", &[1, 2], 4),
        ("<<3>>\nT,0,1\n#T,0,2\nT,0,3\n", &[1], 3),
    ] {
        loader.check(
            loader.fill_in(text),
            blocks,
            blocks.len() as u64,
            Some(bad_line),
        );
    }
    loader.finish();
}

#[test]
fn unusual_but_valid_records_are_loaded() {
    let mut loader = Loader::new();
    let lines = "T,0,2|T,0,2 |  T,0,2|\tT,0,2\t|\r\n\r\nT,0,2\r|\x0bT,0,2\x0c|T,0,0002|000T,0000,2\
        |T, 0,\t2|T,0,2\n\n\n\n|\n \t \r\n T,0,2";
    for line in lines.split('|') {
        let text = format!("<<3>>\nT,0,1\n{line}\nT,0,3\n");
        loader.check(loader.fill_in(&text), &[1, 2, 3], 3, None);
    }
    for text in [
        "<<3>> T,0,1 T,0,2 T,0,3",
        "<<3>>\nT,0,3\nT,0,2\nT,0,1\n",
        // What follows the last record is ignored.
        "<<3>>\nT,0,1\nT,0,2\nT,0,3\nT,0,4\n",
        "<<3>>\nT,0,1\nT,0,2\nT,0,3\ngarbage\n",
        "<<3>>\nT,0,1\nT,0,2\nT,0,3\n\0\0\0\0",
        "<<3>>\nT,0,1\nT,0,2\nT,0,3\n<<3>>\nT,0,5\n",
        "<<3>>\nT,0,1\nT,0,2\nT,0,3\n# pg_prewarm 2.0\n# usage counts\n512\n# crc32c 0x00000000\n",
        "<<3>>\nT,0,1\nT,0,2\nT,0,3\n# pg_prewarm 9.9\n# something new\n-\n",
    ] {
        loader.check(loader.fill_in(text), &[1, 2, 3], 3, None);
    }
    // The same block several times.
    loader.check(
        loader.fill_in("<<4>>\nT,0,1\nT,0,1\nT,0,2\nT,0,1\n"),
        &[1, 1, 1, 2],
        4,
        None,
    );
    loader.finish();
}

#[test]
fn records_of_what_does_not_exist_are_skipped() {
    let mut loader = Loader::new();
    // Invalid forks and blocks, and some that do not exist.
    let illegal = "T,4,2|T,99,2|T,2147483648,2|T,4294967295,2|T,3,0|T,1,4294967294|T,2,5000|T,0,20\
        |T,0,131072|T,0,2147483647|T,0,2147483648|T,0,4294967294|T,0,4294967295\
        |T,4294967295,4294967295|4294967295,4294967295,4294967295,4294967295,4294967295";
    // Databases, tablespaces and relations that do not exist.
    let missing = "999999,1663,1259,0,0|4294967295,1663,1259,0,0|5,0,1259,0,0|5,99999,1259,0,0\
        |5,4294967295,1259,0,0|5,1663,0,0,0|5,1663,4294967295,0,0|5,1663,999999,0,0\
        |5,1664,1259,0,0|0,1663,1259,0,0|0,0,0,0,0|0,1664,0,0,0|0,1664,999999,0,0";
    let lines: Vec<_> = illegal.split('|').chain(missing.split('|')).collect();
    for line in &lines {
        let text = format!("<<3>>\nT,0,1\n{line}\nT,0,3\n");
        loader.check(loader.fill_in(&text), &[1, 3], 3, None);
    }
    let all = format!("<<{}>>\n{}\nT,0,3\n", lines.len() + 1, lines.join("\n"));
    loader.check(loader.fill_in(&all), &[3], lines.len() as u64 + 1, None);
    // Many relations and databases.
    let many: String = (0..2000)
        .map(|number| format!("{},1663,{},0,0\n", 100_000 + number % 20, 100_000 + number))
        .chain((0..2000).map(|number| format!("5,1663,{},0,0\n", 100_000 + number)))
        .collect();
    let all = format!("<<4001>>\n{many}T,0,3\n");
    loader.check(loader.fill_in(&all), &[3], 4001, None);
    loader.finish();
}

#[test]
fn reading_huge_files_and_files_of_another_kind_takes_little_memory() {
    let mut loader = Loader::new();
    let usual = peak_memory(loader.load("<<0>>\n").leader);
    let megabytes = |byte: u8, count: usize| vec![byte; count << 20];
    let mut check = |before: &str, middle: &[u8], after: &str, blocks: &[u32], bad_line| {
        let [before, after] = [before, after].map(|text| loader.fill_in(text).into_bytes());
        let list = [&before, middle, &after].concat();
        let load = loader.check(&list, blocks, blocks.len() as u64, bad_line);
        let peak = peak_memory(load.leader);
        let shown = shorten(&list);
        assert!(
            peak < usual + 64 * 1024,
            "{peak} kB, not {usual} kB: {shown}"
        );
    };
    for (before, byte, count, after, blocks, bad_line) in [
        ("<<2147483647>>\nT,0,1\n", 0, 0, "", &[1][..], Some(3)),
        ("<<99999999999>>\nT,0,1\n", 0, 0, "", &[1], Some(3)),
        ("<<-5>>\nT,0,1\n", 0, 0, "", &[1], Some(1)),
        ("", 0, 20, "", &[], Some(1)),
        ("<<9>>\nT,0,1\n", 0, 20, "", &[1], Some(3)),
        ("<<1>>\nT,0,1\n", 0, 20, "", &[1], None),
        ("<<2>>\n", 0, 1, "\nT,0,1\n", &[1], Some(2)),
        ("<<2>>\n", b'x', 1, "\nT,0,1\n", &[1], Some(2)),
        ("<<2>>\n", b'1', 1, "\nT,0,1\n", &[1], Some(2)),
        ("<<2>>\n", b',', 1, "\nT,0,1\n", &[1], Some(2)),
        ("<<1>>\n", b'0', 1, "T,0,1\n", &[1], None),
        ("<<1>>\n", b' ', 1, "T,0,1\n", &[1], None),
        ("<<1>>\n", b'\n', 1, "T,0,1\n", &[1], None),
        (
            "<<2>>\n",
            b'\n',
            1,
            "bad\nT,0,1\n",
            &[1],
            Some((1 << 20) + 2),
        ),
        ("<<", b'9', 1, ">>\nT,0,1\n", &[1], Some(1)),
        ("<<", b' ', 1, "\nT,0,1\n", &[1], Some(1)),
    ] {
        check(before, &megabytes(byte, count), after, blocks, bad_line);
    }
    for (file, blocks) in [
        (b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".as_slice(), &[1]),
        (b"\x1f\x8b\x08\0\0\0\0\0\0\x03\x03\0", &[1]),
        (b"PGDMP\x01\x0e\0", &[1]),
    ] {
        check("", file, "\nT,0,1\n", blocks, Some(1));
    }
    for bytes_of in [u16::to_le_bytes, u16::to_be_bytes] {
        let text = "\u{feff}<<1>>\n5,1663,1259,0,0\n";
        let file: Vec<u8> = text.encode_utf16().flat_map(bytes_of).collect();
        check("", &file, "", &[], Some(1));
    }
    loader.finish();
}

/// The most memory that a process has requested so far, used or not, in kilobytes.
fn peak_memory(pid: i32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmPeak:"));
    number_after(&line.unwrap().replace(' ', ""), "VmPeak:\t")
}

#[test]
fn random_bytes_do_no_harm() {
    load_random_files(100, |random, _| {
        let length = random.random_range(0..3000);
        let letters = *[
            b"<>0123456789,,,,#\n\r\t -+".as_slice(),
            b"",
            b"05,\n",
            b"<<1>>\n",
        ]
        .choose(random)
        .unwrap();
        (0..length)
            .map(|_| {
                letters
                    .choose(random)
                    .copied()
                    .unwrap_or_else(|| random.random())
            })
            .collect()
    });
}

#[test]
fn the_valid_records_of_randomly_damaged_lists_are_loaded() {
    load_random_files(100, |random, good| {
        let mut text = good.to_vec();
        for _ in 0..random.random_range(1..6) {
            damage(&mut text, random);
        }
        text
    });
}

/// Makes a random change.
fn damage(text: &mut Vec<u8>, random: &mut StdRng) {
    let at = random.random_range(0..=text.len());
    let end = text.len().min(at + random.random_range(1..40));
    let letter = *b"<>0123456789,#\n\r -".choose(random).unwrap();
    match random.random_range(0..8) {
        0 => text.truncate(at),
        1 => drop(text.drain(at..end)),
        2 => {
            let copy = text[at..end].to_vec();
            let to = random.random_range(0..=text.len());
            text.splice(to..to, copy);
        }
        3 => text[at..end].fill(0),
        4 => text[at..end].reverse(),
        5 => text.insert(at, random.random()),
        6 => text.insert(at, letter),
        _ => {
            if let Some(byte) = text.get_mut(at) {
                *byte = letter;
            }
        }
    }
}

/// Loads `count` files that `make` generates from a random number generator and a good
/// list, and checks that exactly the valid records of each are loaded.
fn load_random_files(count: u32, make: impl Fn(&mut StdRng, &[u8]) -> Vec<u8>) {
    let seed: u64 = match std::env::var("PG_PREWARM_TEST_SEED") {
        Ok(seed) => seed.parse().expect("PG_PREWARM_TEST_SEED is a number"),
        Err(_) => rand::random(),
    };
    println!("PG_PREWARM_TEST_SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let mut loader = Loader::new();
    let ends = fork_ends(&mut loader.client);
    let mut good = list_of((0..BLOCKS).map(|block| loader.table.at(block)));
    good.push_str("# pg_prewarm 2.0\n# usage counts\n51021021021021021021\n# crc32c 0x12345678\n");
    for _ in 0..count {
        let text = make(&mut random, good.as_bytes());
        let expected = Reading::of(&text);
        let shown = shorten(&text);
        let load = loader.load(&text);
        assert_eq!(
            (load.total, load.bad_line),
            (expected.records.len() as u64, expected.bad_line),
            "{shown}"
        );
        let loadable = expected.loadable(loader.table.database, &ends);
        assert_eq!(load.loaded, loadable.len() as u64, "{shown}");
        let blocks = loadable
            .iter()
            .filter(|block| block.same_relation(&loader.table) && block.fork == 0)
            .map(|block| block.block);
        assert_eq!(load.cached, blocks.collect(), "{shown}");
    }
    loader.finish();
}

/// The number of blocks of each fork of each relation that can be read from the
/// client's database. The block of the key is 0.
fn fork_ends(client: &mut Client) -> BTreeMap<Block, u32> {
    client
        .query(
            "SELECT CASE WHEN c.relisshared THEN 0 ELSE d.oid END, \
                    COALESCE(NULLIF(c.reltablespace, 0), d.dattablespace), \
                    pg_relation_filenode(c.oid), f.number, \
                    pg_relation_size(c.oid, f.name) / current_setting('block_size')::int \
             FROM pg_class c, pg_database d, \
                  (VALUES (0, 'main'), (1, 'fsm'), (2, 'vm'), (3, 'init')) f (number, name) \
             WHERE d.datname = current_database() AND pg_relation_filenode(c.oid) IS NOT NULL",
            &[],
        )
        .unwrap()
        .iter()
        .map(|row| {
            let fork = Block {
                database: row.get(0),
                tablespace: row.get(1),
                filenumber: row.get(2),
                fork: row.get::<_, i32>(3) as u32,
                block: 0,
            };
            (fork, row.get::<_, i64>(4) as u32)
        })
        .collect()
}

/// The content of a file, parsed in another way than by the extension: record by record
/// instead of byte by byte.
#[derive(Default)]
struct Reading {
    records: Vec<Block>,
    bad_line: Option<u64>,
}

impl Reading {
    fn of(text: &[u8]) -> Self {
        let mut reading = Self::default();
        let (claim, mut at) = match header(text) {
            Some((claim, end)) => (claim, end),
            None => (None, 0),
        };
        if claim.is_none() {
            reading.bad_line = Some(1);
        }
        let mut seen = 0;
        while claim.is_none_or(|claim| seen < claim) {
            at += text[at..]
                .iter()
                .take_while(|&&byte| is_space(byte))
                .count();
            let rest = &text[at..];
            if rest.first().is_none_or(|&byte| byte == b'#') {
                if claim.is_some() {
                    reading.bad_line_at(text, at);
                }
                break;
            }
            seen += 1;
            if let Some((record, length)) = record(rest) {
                reading.records.push(record);
                at += length;
            } else {
                reading.bad_line_at(text, at);
                let line_break = rest.iter().position(|&byte| byte == b'\n');
                at += line_break.unwrap_or(rest.len());
            }
        }
        reading
    }

    fn bad_line_at(&mut self, text: &[u8], at: usize) {
        let breaks = text[..at].iter().filter(|&&byte| byte == b'\n').count();
        self.bad_line.get_or_insert(breaks as u64 + 1);
    }

    /// The records that a server can load if `database` is its only database besides
    /// the templates and its forks have those numbers of blocks.
    fn loadable(&self, database: u32, ends: &BTreeMap<Block, u32>) -> Vec<Block> {
        let legal = |record: &&Block| record.fork <= 3 && record.block != u32::MAX;
        // Shared catalogs are loaded by workers of another database, so the list must
        // name one.
        let mut of_database = self.records.iter().filter(legal);
        let connects = of_database.any(|record| record.database == database);
        self.records
            .iter()
            .filter(|record| connects && [0, database].contains(&record.database))
            .filter(|record| {
                ends.get(&record.at(0))
                    .is_some_and(|&end| record.block < end)
            })
            .copied()
            .collect()
    }
}

/// The number of records in a header, if it is valid, and the length of the header.
/// `None` if the text does not begin with a header.
fn header(text: &[u8]) -> Option<(Option<u64>, usize)> {
    let end = text.windows(2).position(|pair| pair == b">>")?;
    let number = text.get(2..end).filter(|_| text.starts_with(b"<<"))?;
    let blanks = number.iter().take_while(|&&byte| is_space(byte)).count();
    let signed = std::str::from_utf8(&number[blanks..]).ok()?;
    let digits = signed.strip_prefix(['+', '-']).unwrap_or(signed);
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let claim: u64 = digits.parse().unwrap_or(u64::MAX);
    let believed = claim == 0 || !signed.starts_with('-');
    Some((believed.then_some(claim), end + 2))
}

/// The record at the beginning of the text, and its length.
fn record(text: &[u8]) -> Option<(Block, usize)> {
    let mut fields = [0; 5];
    let mut at = 0;
    for (index, field) in fields.iter_mut().enumerate() {
        if index > 0 {
            at += text[at..].starts_with(b",").then_some(1)?;
            at += text[at..]
                .iter()
                .take_while(|&&byte| byte == b' ' || byte == b'\t')
                .count();
        }
        let digits = text[at..].iter().take_while(|byte| byte.is_ascii_digit());
        let end = at + digits.count();
        *field = std::str::from_utf8(&text[at..end]).unwrap().parse().ok()?;
        at = end;
    }
    let [database, tablespace, filenumber, fork, block] = fields;
    let record = Block {
        database,
        tablespace,
        filenumber,
        fork,
        block,
    };
    text.get(at)
        .is_none_or(|&byte| is_space(byte))
        .then_some((record, at))
}

fn is_space(byte: u8) -> bool {
    b" \t\n\x0b\x0c\r".contains(&byte)
}

/// What can be in place of the list that cannot be read.
#[derive(Clone, Copy, Debug)]
pub enum Unreadable {
    NoPermission,
    Directory,
    Pipe,
    LinkToItself,
}

impl Unreadable {
    pub fn put(self, cluster: &Cluster, path: &Path) {
        let _ = fs::remove_file(path);
        match self {
            Self::NoPermission => {
                cluster.write_list("<<0>>\n");
                fs::set_permissions(path, fs::Permissions::from_mode(0o000)).unwrap();
            }
            Self::Directory => {
                fs::create_dir(path).unwrap();
                give_to_server(path);
            }
            Self::Pipe => {
                let name = CString::new(path.as_os_str().as_bytes()).unwrap();
                // SAFETY: it is a C string that outlives the call.
                assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
                give_to_server(path);
            }
            Self::LinkToItself => symlink(LIST, path).unwrap(),
        }
    }

    fn is_there(self, path: &Path) -> bool {
        let metadata = fs::symlink_metadata(path).unwrap();
        match self {
            Self::NoPermission => metadata.permissions().mode() & 0o777 == 0 && metadata.len() == 6,
            Self::Directory => metadata.is_dir(),
            Self::Pipe => metadata.file_type().is_fifo(),
            Self::LinkToItself => metadata.is_symlink(),
        }
    }

    pub fn remove(self, path: &Path) {
        match self {
            Self::Directory => fs::remove_dir(path).unwrap(),
            _ => fs::remove_file(path).unwrap(),
        }
    }

    pub fn reason(self) -> &'static str {
        match self {
            Self::NoPermission => "Permission denied",
            Self::Directory => "Is a directory",
            Self::Pipe => "Invalid argument",
            Self::LinkToItself => "Too many levels of symbolic links",
        }
    }
}

#[test]
fn a_list_that_cannot_be_read_is_kept_and_loaded_once_it_can_be() {
    let cluster = Cluster::build()
        .setting("pg_prewarm.autoprewarm_interval = 0")
        .start();
    let table = cluster.table_of_blocks("postgres", "t", BLOCKS);
    cluster.stop(Shutdown::Fast);
    let path = cluster.data(LIST);
    for unreadable in [
        Unreadable::NoPermission,
        Unreadable::Directory,
        Unreadable::Pipe,
        Unreadable::LinkToItself,
    ] {
        unreadable.put(&cluster, &path);
        let mut mark = 0;
        for start in 0..2 {
            mark = cluster.log_end();
            cluster.start();
            let line = cluster.wait_for_log(mark, "could not read file");
            let warning = format!(
                "WARNING:  could not read file \"{LIST}\": {}",
                unreadable.reason()
            );
            assert!(line.ends_with(&warning), "{line}");
            cluster.wait_for_log(mark, "DETAIL:  The load is retried after");
            if start == 0 {
                cluster.stop(Shutdown::Fast);
                assert!(unreadable.is_there(&path), "{unreadable:?}");
            }
        }

        let leader = cluster.leader();
        assert!(leader.is_some(), "{unreadable:?}");
        let warnings = cluster.log_since(mark).matches("WARNING:").count();
        assert_eq!(warnings, 1, "{unreadable:?}");
        unreadable.remove(&path);
        cluster.write_list(list_of([table.at(3), table.at(7)]));
        cluster.reload();
        assert_eq!(cluster.wait_for_load(mark), (2, 2), "{unreadable:?}");
        assert_eq!(cluster.leader(), leader, "{unreadable:?}");
        assert!(
            cluster
                .cached()
                .is_superset(&[table.at(3), table.at(7)].into())
        );
        cluster.stop(Shutdown::Fast);
        assert!(cluster.listed().len() > 2, "{unreadable:?}");
        fs::remove_file(&path).unwrap();
    }
}

#[test]
fn a_list_that_cannot_be_read_is_not_replaced_at_any_interval() {
    let cluster = Cluster::build()
        .setting("pg_prewarm.autoprewarm_interval = 1")
        .create();
    let list = list_of([Block {
        database: 5,
        tablespace: 1663,
        filenumber: 1259,
        fork: 0,
        block: 0,
    }]);
    cluster.write_list(&list);
    let path = cluster.data(LIST);
    let set_mode = |mode| fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    set_mode(0o000);
    let start = Instant::now();
    cluster.start();
    let warnings = || cluster.log().matches("could not read file").count() as u64;
    wait_until("the first try", || warnings() >= 1);
    let leader = cluster.leader();
    wait_until("the third try", || warnings() >= 3);
    let tries = warnings();
    assert!(tries <= start.elapsed().as_secs() + 1, "{tries}");
    assert_eq!(fs::read_to_string(&path).unwrap(), list);
    // No dump was tried.
    for line in cluster
        .log()
        .lines()
        .filter(|line| line.contains("WARNING:"))
    {
        assert!(line.contains("could not read file"), "{line}");
    }

    set_mode(0o600);
    assert_eq!(cluster.wait_for_load(0), (1, 1));
    wait_until("the next dump", || cluster.list() != list);
    assert_eq!(cluster.leader(), leader);
}

#[test]
fn a_list_that_cannot_be_read_is_tried_again_if_the_interval_is_0() {
    let cluster = Cluster::build()
        .setting("pg_prewarm.autoprewarm_interval = 0")
        .create();
    cluster.write_list("<<0>>\n");
    let set_mode = |mode| {
        let permissions = fs::Permissions::from_mode(mode);
        fs::set_permissions(cluster.data(LIST), permissions).unwrap();
    };
    set_mode(0o000);
    cluster.set_fault(Fault::Uptime, 0);
    cluster.start();
    let warnings = || cluster.log().matches("could not read file").count();
    wait_until("the first try", || warnings() == 1);
    let mut uptime = 0;
    let mut pass_time = || {
        uptime += 400;
        cluster.set_fault(Fault::Uptime, uptime);
        // The leader sleeps for the time that it has computed, unless its latch is set.
        signal(cluster.leader().unwrap(), libc::SIGUSR1);
    };
    wait_until("the third try", || {
        pass_time();
        warnings() >= 3
    });
    set_mode(0o600);
    wait_until("a try that succeeds", || {
        pass_time();
        cluster.log().contains("prewarmed 0 of 0 previously-loaded")
    });
}

#[test]
fn a_symbolic_link_to_a_list_is_followed_and_a_dangling_one_is_no_list() {
    let cluster = Cluster::build()
        .setting("pg_prewarm.autoprewarm_interval = 0")
        .start();
    let table = cluster.table_of_blocks("postgres", "t", BLOCKS);
    let blocks = [table.at(2), table.at(5)];
    cluster.stop(Shutdown::Fast);

    cluster.write_list(list_of(blocks));
    let elsewhere = cluster.path("elsewhere");
    fs::rename(cluster.data(LIST), &elsewhere).unwrap();
    symlink(&elsewhere, cluster.data(LIST)).unwrap();
    let mark = cluster.log_end();
    cluster.start();
    assert_eq!(cluster.wait_for_load(mark), (2, 2));
    assert!(cluster.cached().is_superset(&blocks.into()));
    cluster.stop(Shutdown::Fast);
    // The dump replaces the link, not its target.
    assert!(
        !fs::symlink_metadata(cluster.data(LIST))
            .unwrap()
            .is_symlink()
    );
    assert!(cluster.listed().len() > 2);
    assert_eq!(fs::read_to_string(&elsewhere).unwrap(), list_of(blocks));

    let nowhere = cluster.path("nowhere");
    fs::remove_file(cluster.data(LIST)).unwrap();
    symlink(&nowhere, cluster.data(LIST)).unwrap();
    let mark = cluster.log_end();
    cluster.start();
    cluster.stop(Shutdown::Fast);
    assert!(fs::symlink_metadata(cluster.data(LIST)).unwrap().is_file());
    assert!(!nowhere.exists());
    let log = cluster.log_since(mark);
    assert!(!log.contains("WARNING:"));
    assert_eq!(
        log.matches("is a symbolic link to a file that does not exist")
            .count(),
        1
    );
}

/// What can prevent a dump.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Obstacle {
    DirectoryInPlaceOfNewList,
    DirectoryInPlaceOfList,
    NoWritePermission,
    NoRoom,
}

/// The limit of a file's size in place of a full disk: more than the size of the log,
/// and less than that of the list.
const ROOM: u64 = 32 << 10;

impl Obstacle {
    /// Creates the obstacle for a process that dumps.
    fn put(self, cluster: &Cluster, pid: i32) {
        match self {
            Self::DirectoryInPlaceOfNewList => make_directory(&cluster.data(NEW_LIST)),
            Self::DirectoryInPlaceOfList => {
                fs::rename(cluster.data(LIST), cluster.path("aside")).unwrap();
                make_directory(&cluster.data(LIST));
            }
            Self::NoWritePermission => {
                fs::set_permissions(cluster.data(""), fs::Permissions::from_mode(0o500)).unwrap();
            }
            Self::NoRoom => {
                let list = fs::metadata(cluster.data(LIST)).unwrap().len();
                let log = cluster.log_end() as u64;
                assert!(log * 2 < ROOM && ROOM < list, "{log}, {list}");
                limit_file_size(pid, Some(ROOM));
            }
        }
    }

    fn remove(self, cluster: &Cluster, pid: i32) {
        match self {
            Self::DirectoryInPlaceOfNewList => fs::remove_dir(cluster.data(NEW_LIST)).unwrap(),
            Self::DirectoryInPlaceOfList => {
                fs::remove_dir(cluster.data(LIST)).unwrap();
                fs::rename(cluster.path("aside"), cluster.data(LIST)).unwrap();
            }
            Self::NoWritePermission => {
                fs::set_permissions(cluster.data(""), fs::Permissions::from_mode(0o700)).unwrap();
            }
            Self::NoRoom => limit_file_size(pid, None),
        }
    }

    /// The list, which may have been moved.
    fn list(self, cluster: &Cluster) -> Vec<u8> {
        fs::read(match self {
            Self::DirectoryInPlaceOfList => cluster.path("aside"),
            _ => cluster.data(LIST),
        })
        .unwrap()
    }

    /// The SQLSTATE and the message of the dump's error.
    fn error(self) -> (&'static str, String) {
        let (sqlstate, action, name, reason) = match self {
            Self::DirectoryInPlaceOfNewList => ("42809", "open", NEW_LIST, "Is a directory"),
            Self::DirectoryInPlaceOfList => ("42809", "open", LIST, "Is a directory"),
            Self::NoWritePermission => ("42501", "open", NEW_LIST, "Permission denied"),
            Self::NoRoom => ("XX000", "write to", NEW_LIST, "File too large"),
        };
        (
            sqlstate,
            format!("could not {action} file \"{name}\": {reason}"),
        )
    }

    fn leaves_new_list(self) -> bool {
        self == Self::DirectoryInPlaceOfNewList
    }
}

/// The name of the list while it is written.
const NEW_LIST: &str = "autoprewarm.blocks.tmp";

fn make_directory(path: &Path) {
    fs::create_dir(path).unwrap();
    give_to_server(path);
}

/// A server with a list that is longer than [`ROOM`].
fn cluster_with_long_list(interval: &str) -> Cluster {
    let cluster = Cluster::build()
        .setting(&format!("pg_prewarm.autoprewarm_interval = {interval}"))
        .start();
    cluster.table_of_blocks("postgres", "t", 2500);
    cluster.sql("CREATE EXTENSION pg_prewarm");
    LoadStats::wait_for_end(&mut cluster.connect("postgres"));
    assert!(cluster.dump() > 2500);
    cluster
}

/// Checks that a leader that cannot dump logs that once for each try, and goes on.
fn leader_cannot_dump(obstacle: Obstacle) {
    let cluster = cluster_with_long_list("1");
    let leader = cluster.leader().unwrap();
    // Not during a dump.
    cluster.wait_for_log(cluster.log_end(), "wrote block details for");
    let mark = cluster.log_end();
    let start = Instant::now();
    {
        let _paused = Paused::new(leader);
        obstacle.put(&cluster, leader);
    }
    let warning = format!("WARNING:  {}", obstacle.error().1);
    let warnings = || cluster.log_since(mark).matches(&warning).count() as u64;
    wait_until("the first try", || warnings() >= 1);
    let list = obstacle.list(&cluster);
    wait_until("the second try", || warnings() >= 2);

    let tries = warnings();
    assert!(tries <= start.elapsed().as_secs() + 1, "{tries}");
    assert!(obstacle.list(&cluster) == list, "the list changed");
    // Unless it is at the next.
    wait_until("the rest of a try", || {
        cluster.data(NEW_LIST).exists() == obstacle.leaves_new_list()
    });
    assert_eq!(cluster.leader(), Some(leader));
    for line in cluster.log_since(mark).lines() {
        assert!(
            line.ends_with(&warning) || !line.contains("WARNING:"),
            "{line}"
        );
    }

    obstacle.remove(&cluster, leader);
    let mark = cluster.log_end();
    cluster.wait_for_log(mark, "wrote block details for");
    assert!(cluster.listed().len() > 2500);
    assert_eq!(cluster.leader(), Some(leader));
}

#[test]
fn a_directory_in_place_of_the_new_list_prevents_dumps_and_nothing_else() {
    leader_cannot_dump(Obstacle::DirectoryInPlaceOfNewList);
}

#[test]
fn a_directory_in_place_of_the_list_prevents_dumps_and_nothing_else() {
    leader_cannot_dump(Obstacle::DirectoryInPlaceOfList);
}

#[test]
fn a_data_directory_without_write_permission_prevents_dumps_and_nothing_else() {
    leader_cannot_dump(Obstacle::NoWritePermission);
}

#[test]
fn a_full_disk_prevents_dumps_and_nothing_else() {
    leader_cannot_dump(Obstacle::NoRoom);
}

#[test]
fn a_dump_on_demand_that_fails_is_an_error_and_keeps_the_list() {
    let cluster = cluster_with_long_list("0");
    let mut client = cluster.connect("postgres");
    let pid = value(&mut client, "SELECT pg_backend_pid()");
    let mut dump = || error(&mut client, "SELECT autoprewarm_dump_now()");
    let list = fs::read(cluster.data(LIST)).unwrap();
    for obstacle in [
        Obstacle::DirectoryInPlaceOfNewList,
        Obstacle::DirectoryInPlaceOfList,
        Obstacle::NoWritePermission,
        Obstacle::NoRoom,
    ] {
        obstacle.put(&cluster, pid);
        // The second try finds what the first has left.
        for _ in 0..2 {
            let error = dump();
            assert_eq!(
                (error.sqlstate.as_str(), error.message),
                obstacle.error(),
                "{obstacle:?}"
            );
            assert_eq!(cluster.data(NEW_LIST).exists(), obstacle.leaves_new_list());
            assert!(obstacle.list(&cluster) == list, "{obstacle:?}");
        }
        obstacle.remove(&cluster, pid);
    }
    assert!(value::<i64>(&mut client, "SELECT autoprewarm_dump_now()") > 2500);
    assert!(cluster.listed().len() > 2500);
    assert!(!cluster.data(NEW_LIST).exists());
}

#[test]
fn a_disk_error_at_any_step_of_a_dump_keeps_the_old_list() {
    let cluster = Cluster::build()
        .setting("fsync = on")
        .setting("pg_prewarm.autoprewarm_interval = 0")
        .create();
    cluster.set_fault(Fault::ListWrite, 0);
    cluster.start();
    cluster.sql("CREATE EXTENSION pg_prewarm");
    LoadStats::wait_for_end(&mut cluster.connect("postgres"));
    cluster.dump();
    let list = cluster.list();
    let table = cluster.table("t", 10);
    let mut client = cluster.connect("postgres");
    let dump = "SELECT autoprewarm_dump_now()";
    for (fault, action) in [
        (Fault::ListWrite, "write to"),
        (Fault::ListClose, "close"),
        (Fault::ListFlush, "fsync"),
        (Fault::ListRename, "rename"),
    ] {
        cluster.set_fault(fault, libc::EIO.into());
        let error = error(&mut client, dump);
        cluster.set_fault(fault, 0);
        assert_eq!(error.sqlstate, "58030", "{error:?}");
        let begins = format!("could not {action} file \"{NEW_LIST}\"");
        assert!(error.message.starts_with(&begins), "{error:?}");
        assert!(cluster.list() == list, "{fault:?}");
        assert!(!cluster.data(NEW_LIST).exists(), "{fault:?}");
    }
    client.batch_execute(dump).unwrap();
    assert!(cluster.lists(table));
}

#[test]
fn the_rest_of_an_earlier_dump_is_replaced_and_a_symbolic_link_is_not_followed() {
    let cluster = Cluster::build()
        .setting("pg_prewarm.autoprewarm_interval = 0")
        .start();
    cluster.sql("CREATE EXTENSION pg_prewarm");
    let dump = || {
        let records: i64 = cluster.dump();
        assert_eq!(cluster.listed().len() as i64, records);
        assert!(fs::symlink_metadata(cluster.data(LIST)).unwrap().is_file());
        assert!(fs::symlink_metadata(cluster.data(NEW_LIST)).is_err());
    };

    // It is longer than the list will be, and not writable.
    fs::write(cluster.data(NEW_LIST), "left behind\n".repeat(100_000)).unwrap();
    give_to_server(&cluster.data(NEW_LIST));
    fs::set_permissions(cluster.data(NEW_LIST), fs::Permissions::from_mode(0o400)).unwrap();
    dump();

    let other = cluster.path("other");
    fs::write(&other, "precious\n").unwrap();
    give_to_server(&other);
    symlink(&other, cluster.data(NEW_LIST)).unwrap();
    dump();
    assert_eq!(fs::read_to_string(&other).unwrap(), "precious\n");

    let nowhere = cluster.path("nowhere");
    symlink(&nowhere, cluster.data(NEW_LIST)).unwrap();
    dump();
    assert!(!nowhere.exists());
}

#[test]
fn the_list_has_the_permissions_that_follow_from_those_of_the_data_directory() {
    let cluster = Cluster::build()
        .setting("pg_prewarm.autoprewarm_interval = 0")
        .create();
    for (directory, list) in [(0o700, 0o600), (0o750, 0o640)] {
        fs::set_permissions(cluster.data(""), fs::Permissions::from_mode(directory)).unwrap();
        let mode = || {
            fs::metadata(cluster.data(LIST))
                .unwrap()
                .permissions()
                .mode()
                & 0o7777
        };
        cluster.start();
        cluster.sql("CREATE EXTENSION IF NOT EXISTS pg_prewarm");
        LoadStats::wait_for_end(&mut cluster.connect("postgres"));
        cluster.dump();
        assert_eq!(mode(), list);
        fs::remove_file(cluster.data(LIST)).unwrap();
        cluster.stop(Shutdown::Fast);
        assert_eq!(mode(), list);
    }
}
