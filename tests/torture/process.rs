//! The processes of a cluster in the system, identified by their working directory, so
//! that no process of another server is signalled.

use std::fs;
use std::path::Path;

use crate::common::wait_until;

#[derive(Clone, Debug)]
pub struct Process {
    pub pid: i32,
    pub title: String,
}

/// All processes whose working directory is that data directory.
pub fn all(data: &Path) -> Vec<Process> {
    let data = fs::canonicalize(data).unwrap();
    fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            let pid = path.file_name()?.to_str()?.parse().ok()?;
            let directory = fs::read_link(path.join("cwd")).ok()?;
            let title = fs::read(path.join("cmdline")).ok()?;
            (directory == data).then(|| Process {
                pid,
                title: String::from_utf8_lossy(&title).into_owned(),
            })
        })
        .collect()
}

/// Those with that text in their title.
pub fn named(data: &Path, title: &str) -> Vec<i32> {
    all(data)
        .into_iter()
        .filter(|process| process.title.contains(title))
        .map(|process| process.pid)
        .collect()
}

/// Sends a signal, unless the process has exited.
pub fn signal(pid: i32, signal: i32) {
    // SAFETY: it is a process of the suite's own cluster.
    unsafe { libc::kill(pid, signal) };
}

pub fn wait_for_none(data: &Path) {
    wait_until("the end of all server processes", || all(data).is_empty());
}

pub fn wait_for_end(pid: i32) {
    let path = format!("/proc/{pid}");
    wait_until("the end of a process", || !Path::new(&path).exists());
}

/// A number in `/proc/PID/status`, in kB. `None` if the process has exited.
pub fn status(pid: i32, name: &str) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = text.lines().find(|line| line.starts_with(name))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// How many files a process has open.
pub fn open_files(pid: i32) -> Option<u64> {
    Some(fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count() as u64)
}
