//! Resources that must not grow, counted in the system for each process that lives
//! through several rounds.

use std::collections::BTreeMap;
use std::fmt::{self, Display};
use std::fs;

use super::process;
use crate::common::Cluster;

/// The resources of the idle leader and postmaster, and the cluster's dynamic shared
/// memory.
#[derive(Clone, Copy, Debug)]
pub struct Count {
    pub leader: Holdings,
    pub postmaster: Holdings,
    /// Dynamic shared memory segments. They are files, since the suite's clusters have
    /// `dynamic_shared_memory_type = mmap`.
    pub segments: u64,
}

#[derive(Clone, Copy, Debug)]
pub struct Holdings {
    pid: i32,
    files: u64,
    /// Private memory, in kB.
    memory: u64,
}

/// How much more an idle process may have than when it was first counted. A server
/// process keeps files of relations open, and its caches grow.
const MORE_FILES: u64 = 16;
const MORE_MEMORY: u64 = 4096;

impl Holdings {
    fn of(pid: i32) -> Self {
        let gone = || panic!("process {pid} is gone");
        Self {
            pid,
            files: process::open_files(pid).unwrap_or_else(gone),
            memory: process::status(pid, "VmData").unwrap_or_else(gone),
        }
    }
}

impl Count {
    pub fn take(cluster: &Cluster, leader: i32) -> Self {
        Self {
            leader: Holdings::of(leader),
            postmaster: Holdings::of(cluster.postmaster()),
            segments: segments(cluster),
        }
    }
}

/// The number of the cluster's dynamic shared memory segments.
pub fn segments(cluster: &Cluster) -> u64 {
    fs::read_dir(cluster.data("pg_dynshmem")).unwrap().count() as u64
}

/// The first count of each process, and the highest.
#[derive(Default)]
pub struct Census {
    first: BTreeMap<i32, Holdings>,
    fewest_segments: Option<u64>,
    pub most: Most,
}

/// The highest count ever, and its growth.
#[derive(Clone, Copy, Debug, Default)]
pub struct Most {
    pub counts: u64,
    pub segments: u64,
    pub leader: Growth,
    pub postmaster: Growth,
}

#[derive(Clone, Copy, Debug, Default)]
pub struct Growth {
    files: u64,
    more_files: u64,
    memory: u64,
    more_memory: u64,
}

impl Census {
    /// Describes what exceeds the limits. `None` if nothing does.
    pub fn judge(&self, count: &Count, segments_may_be: u64) -> Option<String> {
        for (name, now) in [("leader", count.leader), ("postmaster", count.postmaster)] {
            let first = self.first.get(&now.pid).unwrap_or(&now);
            if now.files > first.files + MORE_FILES || now.memory > first.memory + MORE_MEMORY {
                return Some(format!("the {name} had {first:?}, and now {now:?}"));
            }
        }
        let fewest = self.fewest_segments.unwrap_or(count.segments);
        (count.segments > fewest + segments_may_be).then(|| {
            let now = count.segments;
            format!("there were {fewest} dynamic segments, and now {now}")
        })
    }

    pub fn note(&mut self, count: &Count) {
        let fewest = self.fewest_segments.get_or_insert(count.segments);
        *fewest = count.segments.min(*fewest);
        self.most.counts += 1;
        self.most.segments = self.most.segments.max(count.segments);
        for (now, most) in [
            (count.leader, &mut self.most.leader),
            (count.postmaster, &mut self.most.postmaster),
        ] {
            let first = *self.first.entry(now.pid).or_insert(now);
            most.files = most.files.max(now.files);
            most.memory = most.memory.max(now.memory);
            most.more_files = most.more_files.max(now.files.saturating_sub(first.files));
            let more = now.memory.saturating_sub(first.memory);
            most.more_memory = most.more_memory.max(more);
        }
    }
}

impl Display for Growth {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(
            f,
            "{} open files (at most {} more than at first), {} kB of memory (at most {} kB more)",
            self.files, self.more_files, self.memory, self.more_memory
        )
    }
}

impl Display for Most {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        writeln!(f, "counted at rest, {} times; the most:", self.counts)?;
        writeln!(f, "  dynamic shared memory: {} segments", self.segments)?;
        writeln!(f, "  leader: {}", self.leader)?;
        write!(f, "  postmaster: {}", self.postmaster)
    }
}
