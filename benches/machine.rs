//! The machine that is measured: its caches, and its description.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The read-ahead that most servers' disks have. Some virtual disks have far more by
/// default, which helps a module that reads one block at a time.
const READ_AHEAD_KB: &str = "128";

/// Where the system is told how many huge pages of 2 MB to reserve.
const HUGE_PAGES: &str = "/proc/sys/vm/nr_hugepages";

/// Sets the disks' read-ahead to that of most servers, if permitted, and returns its
/// value.
pub fn set_read_ahead() -> String {
    let mut found = Vec::new();
    for device in fs::read_dir("/sys/block").into_iter().flatten().flatten() {
        let path = device.path().join("queue/read_ahead_kb");
        let _ = fs::write(&path, READ_AHEAD_KB);
        // Devices that are not disks are skipped.
        let name = device.file_name();
        if ["loop", "ram", "zram"]
            .iter()
            .any(|kind| name.to_string_lossy().starts_with(kind))
        {
            continue;
        }
        if let Ok(value) = fs::read_to_string(&path) {
            found.push(format!("{} {} kB", name.display(), value.trim()));
        }
    }
    found.join(", ")
}

/// Drops the operating system's cache. Returns false if that is not permitted.
pub fn drop_caches() -> bool {
    // SAFETY: `sync` has no preconditions.
    unsafe { libc::sync() };
    fs::write("/proc/sys/vm/drop_caches", "3").is_ok()
}

/// Reads all files in a directory, so that they are in the operating system's cache.
pub fn cache_files(directory: &Path) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            cache_files(&path);
        } else if let Ok(mut file) = fs::File::open(&path) {
            let _ = std::io::copy(&mut file, &mut std::io::sink());
        }
    }
}

/// The size of a large page, in bytes.
const HUGE_PAGE: usize = 2 << 20;

/// Touches and frees as much memory as the server will use. A virtual machine may have
/// returned it to its host, and getting it back can take longer than what is measured,
/// at the expense of the side that is measured first.
pub fn touch_memory(megabytes: u32) {
    let mut memory = vec![0u8; megabytes as usize * 1024 * 1024];
    // In large pages, if the system has them, which takes a fraction of the time.
    let (start, length) = (memory.as_mut_ptr(), memory.len());
    let start = start.wrapping_add(start.align_offset(HUGE_PAGE));
    // SAFETY: the range is in the allocation, and nothing but the size of its pages changes.
    unsafe {
        libc::madvise(
            start.cast(),
            length.saturating_sub(HUGE_PAGE),
            libc::MADV_HUGEPAGE,
        )
    };
    for page in memory.iter_mut().step_by(4096) {
        *page = 1;
    }
    std::hint::black_box(&memory);
}

/// Whether servers use huge pages for shared memory, as large ones should:
/// `HUGE_PAGES=on`.
pub fn huge_pages() -> bool {
    match std::env::var("HUGE_PAGES").as_deref() {
        Ok("on") => true,
        Err(_) | Ok("" | "off") => false,
        Ok(other) => panic!("HUGE_PAGES={other}: on or off"),
    }
}

/// Makes the system reserve that much memory as huge pages of 2 MB. `scripts/bench` gives it
/// back.
pub fn keep_huge_pages(megabytes: u32) {
    let pages = megabytes.div_ceil(2).to_string();
    fs::write(HUGE_PAGES, &pages).expect("only root can reserve huge pages");
    let kept = fs::read_to_string(HUGE_PAGES).expect("the file can be read");
    assert_eq!(kept.trim(), pages, "not enough memory for huge pages");
}

/// What fio reads, as it names it.
#[derive(Clone, Copy, Debug)]
pub struct Reads {
    pub order: &'static str,
    /// The size of each read.
    pub blocks: u32,
    /// How far from each other the jobs begin.
    pub between_jobs: &'static str,
}

/// How many blocks of these files the disk can read per second, measured by fio with 32
/// requests at a time from each of two processes, without the operating system's cache.
/// `None` if fio is not installed.
pub fn blocks_per_second(files: &[PathBuf], reads: Reads) -> Option<f64> {
    let names: Vec<_> = files
        .iter()
        .map(|file| file.display().to_string())
        .collect();
    let output = Command::new("fio")
        .arg("--name=reads")
        .arg(format!("--filename={}", names.join(":")))
        .arg(format!("--rw={}", reads.order))
        .arg(format!("--bs={}k", reads.blocks * 8))
        .args(["--iodepth=32", "--numjobs=2"])
        .arg(format!("--offset_increment={}", reads.between_jobs))
        .args(["--direct=1", "--ioengine=libaio", "--readonly"])
        .args(["--time_based", "--runtime=4", "--group_reporting"])
        .arg("--output-format=json")
        .output()
        .ok()?;
    let result: serde_json::Value = serde_json::from_slice(&output.stdout).ok()?;
    let per_second = result["jobs"][0]["read"]["iops"].as_f64()?;
    Some(per_second * f64::from(reads.blocks))
}

/// A field of a process's status, in kB.
pub fn status_kb(pid: i32, field: &str) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find(|line| line.starts_with(field))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

pub fn describe() -> String {
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu
        .lines()
        .find_map(|line| line.strip_prefix("model name"))
        .map_or("unknown", |line| line.trim_start_matches([' ', '\t', ':']));
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let pages = if huge_pages() { ", huge pages" } else { "" };
    format!("{cores} cores, {model}{pages}")
}
