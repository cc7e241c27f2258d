//! The machine that is measured on: its caches, and what is known of it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The disk's read-ahead that most servers have. Some virtual disks come with
/// far more, which helps whoever reads block by block.
const READ_AHEAD_KB: &str = "128";

/// Puts the disks' read-ahead to what most servers have, where that is allowed.
/// Returns what it is.
pub fn set_read_ahead() -> String {
    let mut found = Vec::new();
    for device in fs::read_dir("/sys/block").into_iter().flatten().flatten() {
        let path = device.path().join("queue/read_ahead_kb");
        let _ = fs::write(&path, READ_AHEAD_KB);
        // Not those that are no disks.
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

/// Drops the operating system's cache; false where that is not allowed.
pub fn drop_caches() -> bool {
    // SAFETY: flushes what is not written yet.
    unsafe { libc::sync() };
    fs::write("/proc/sys/vm/drop_caches", "3").is_ok()
}

/// Reads every file below a folder, so that the operating system has them cached.
pub fn cache_files(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            cache_files(&path);
        } else if let Ok(mut file) = fs::File::open(&path) {
            let _ = std::io::copy(&mut file, &mut std::io::sink());
        }
    }
}

/// Touches and gives back as much memory as the server is going to use. A virtual
/// machine may have returned it to its host, and getting it back costs more than
/// all that is to be measured; whichever side came first would pay.
pub fn touch_memory(megabytes: u32) {
    let mut memory = vec![0u8; megabytes as usize * 1024 * 1024];
    for page in memory.iter_mut().step_by(4096) {
        *page = 1;
    }
    std::hint::black_box(&memory);
}

/// Whether servers are to have their shared memory in huge pages, as large ones
/// should: `HUGE_PAGES=on` says so.
pub fn huge_pages() -> bool {
    match std::env::var("HUGE_PAGES").as_deref() {
        Ok("on") => true,
        Err(_) | Ok("" | "off") => false,
        Ok(other) => panic!("HUGE_PAGES={other}: on or off"),
    }
}

/// Has the system keep that much memory in huge pages of 2 MB.
pub fn keep_huge_pages(megabytes: u32) {
    let pages = megabytes.div_ceil(2).to_string();
    let path = "/proc/sys/vm/nr_hugepages";
    fs::write(path, &pages).expect("huge pages are for root to keep");
    let kept = fs::read_to_string(path).unwrap();
    assert_eq!(kept.trim(), pages, "there is no memory for huge pages");
}

/// How many random blocks of these files the disk can read in a second, by fio
/// with 32 requests at a time from each of two processes, past the operating
/// system's cache; nothing where there is no fio.
pub fn random_reads_per_second(files: &[PathBuf]) -> Option<f64> {
    let names: Vec<_> = files
        .iter()
        .map(|file| file.display().to_string())
        .collect();
    let output = Command::new("fio")
        .arg("--name=random")
        .arg(format!("--filename={}", names.join(":")))
        .args(["--rw=randread", "--bs=8k", "--iodepth=32", "--numjobs=2"])
        .args(["--direct=1", "--ioengine=libaio", "--readonly"])
        .args(["--time_based", "--runtime=4", "--group_reporting"])
        .arg("--output-format=json")
        .output()
        .ok()?;
    let result: serde_json::Value = serde_json::from_slice(&output.stdout).ok()?;
    result["jobs"][0]["read"]["iops"].as_f64()
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
