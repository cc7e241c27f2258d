//! Reads the list strictly: every line, the number of records and the checksum must be
//! right.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use crate::common::Block;

/// A complete list.
#[derive(Clone, PartialEq, Eq)]
pub struct List {
    pub bytes: Vec<u8>,
    pub blocks: BTreeSet<Block>,
}

impl List {
    pub fn read(path: &Path) -> Self {
        let bytes = fs::read(path).unwrap_or_else(|error| panic!("the list is gone: {error}"));
        let blocks = parse(&bytes)
            .unwrap_or_else(|wrong| panic!("the list on disk is not complete: {wrong}"));
        Self { bytes, blocks }
    }
}

fn parse(bytes: &[u8]) -> Result<BTreeSet<Block>, String> {
    let text = str::from_utf8(bytes).map_err(|error| error.to_string())?;
    let mut lines = text.lines();
    let header = lines.next().ok_or("it is empty")?;
    let count: usize = header
        .strip_prefix("<<")
        .and_then(|rest| rest.strip_suffix(">>"))
        .and_then(|number| number.trim_start().parse().ok())
        .ok_or(format!("its header is {header:?}"))?;
    let mut blocks = BTreeSet::new();
    for number in 0..count {
        let line = lines
            .next()
            .ok_or(format!("it ends after {number} of {count} records"))?;
        let fields: Vec<u32> = line
            .split(',')
            .map_while(|field| field.parse().ok())
            .collect();
        let &[database, tablespace, filenumber, fork, block] = &fields[..] else {
            return Err(format!("record {number} is {line:?}"));
        };
        let block = Block {
            database,
            tablespace,
            filenumber,
            fork,
            block,
        };
        if !blocks.insert(block) {
            return Err(format!("{line} is there twice"));
        }
    }
    if count == 0 {
        return match lines.next() {
            None => Ok(blocks),
            Some(line) => Err(format!("after no records there is {line:?}")),
        };
    }
    for expected in ["# pg_prewarm 2.0", "# usage counts"] {
        if lines.next() != Some(expected) {
            return Err(format!("the trailer has no line {expected:?}"));
        }
    }
    let mut usage_counts = 0;
    while usage_counts < count {
        let digits = lines.next().ok_or("the trailer is cut off")?;
        if !digits.bytes().all(|digit| (b'0'..=b'5').contains(&digit)) {
            return Err(format!("usage_count is {digits:?}"));
        }
        usage_counts += digits.len();
    }
    let mut last = lines.next().ok_or("there is no checksum")?;
    if let Some(carried) = last.strip_prefix("# carried ") {
        let numbers: Vec<usize> = carried.split(' ').map_while(|n| n.parse().ok()).collect();
        if numbers.len() != 2 || numbers[0] + numbers[1] > count {
            return Err(format!("it has the line {last:?}"));
        }
        last = lines.next().ok_or("there is no checksum")?;
    }
    let claimed = last
        .strip_prefix("# crc32c 0x")
        .and_then(|digits| u32::from_str_radix(digits, 16).ok())
        .ok_or(format!("the checksum is {last:?}"))?;
    let before = bytes.len() - last.len() - 1;
    let sum = crc32c::crc32c(&bytes[..before]);
    match lines.next() {
        Some(line) => Err(format!("after the checksum there is {line:?}")),
        None if usage_counts != count => Err(format!(
            "{usage_counts} digits of usage_count for {count} records"
        )),
        None if sum != claimed => Err(format!("the checksum is {claimed:08x}, not {sum:08x}")),
        None if !bytes.ends_with(b"\n") => Err("its last line does not end".to_owned()),
        None => Ok(blocks),
    }
}
