//! The processes of a cluster, as the system knows them: by the folder that they
//! work in, so that none of another server is ever meant.

use std::fs;
use std::path::Path;

use crate::common::wait_until;

#[derive(Clone, Debug)]
pub struct Process {
    pub pid: i32,
    pub title: String,
}

/// All processes that work in that data folder.
pub fn all(data: &Path) -> Vec<Process> {
    let data = fs::canonicalize(data).unwrap();
    fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            let pid = path.file_name()?.to_str()?.parse().ok()?;
            let folder = fs::read_link(path.join("cwd")).ok()?;
            let title = fs::read(path.join("cmdline")).ok()?;
            (folder == data).then(|| Process {
                pid,
                title: String::from_utf8_lossy(&title).into_owned(),
            })
        })
        .collect()
}

/// Those whose title says so.
pub fn named(data: &Path, title: &str) -> Vec<i32> {
    all(data)
        .into_iter()
        .filter(|process| process.title.contains(title))
        .map(|process| process.pid)
        .collect()
}

/// Sends a signal, unless the process has ended.
pub fn signal(pid: i32, signal: i32) {
    // SAFETY: a process of the suite's own cluster.
    unsafe { libc::kill(pid, signal) };
}

pub fn wait_for_none(data: &Path) {
    wait_until("the end of all server processes", || all(data).is_empty());
}

pub fn wait_for_end(pid: i32) {
    let path = format!("/proc/{pid}");
    wait_until("the end of a process", || !Path::new(&path).exists());
}

/// A number of `/proc/PID/status`, in kB; nothing where the process is gone.
pub fn status(pid: i32, name: &str) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = text.lines().find(|line| line.starts_with(name))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// How many files a process has open.
pub fn open_files(pid: i32) -> Option<u64> {
    Some(fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count() as u64)
}
