//! The segment files of a fork, opened beside the server, for what it cannot do: ask what
//! the operating system has cached; and on 15 and 16, read or ask for many blocks at
//! once. If anything fails here, the server tries again and raises its own ERROR.

use std::fs::{self, File};
use std::io;

use pgrx::pg_sys;

use super::relation::Locator;
use crate::blocks::{BlockNumber, Fork};
use crate::pg::sys::read::{READS_MANY_AT_ONCE, smgr_prefetch, smgr_read};
use crate::pg::sys::version::{self, reads_directly};

/// How many blocks one segment file has.
pub const SEGMENT_BLOCKS: BlockNumber = pg_sys::RELSEG_SIZE;

/// The maximum number of blocks of one request to the operating system. Linux cuts a larger one to
/// the read-ahead size of the device, which is 128 kB on most.
pub const REQUEST_BLOCKS: usize = (128 << 10) / pg_sys::BLCKSZ as usize;

/// Whether a fork has a file with any blocks in it. The first file of a relation that was
/// dropped stays for a while, but it is empty. True if the system does not tell.
pub fn has_blocks(locator: Locator, fork: Fork) -> bool {
    match fs::metadata(version::permanent_path(locator, fork)) {
        Ok(file) => file.len() > 0,
        Err(error) => error.kind() != io::ErrorKind::NotFound,
    }
}

/// The segment files of a fork.
pub struct Segments {
    relation: pg_sys::Relation,
    fork: Fork,
    /// The path of the first.
    path: String,
    /// The file that is open, or why it is not, and its number.
    open: Option<(u32, io::Result<File>)>,
}

impl Segments {
    /// # Safety
    /// `relation` stays open for as long as this is used.
    pub unsafe fn new(relation: pg_sys::Relation, fork: Fork) -> Self {
        Self {
            relation,
            fork,
            // SAFETY: the relation is open.
            path: unsafe { version::path(relation, fork) },
            open: None,
        }
    }

    /// Reads `count` blocks from `first` on, all in one file, into `into`. Raises the
    /// server's ERROR if they cannot be read.
    ///
    /// # Safety
    /// `into` has room for `count` blocks, at most as many as the server reads at once,
    /// and is aligned for direct I/O.
    pub unsafe fn read(&mut self, first: BlockNumber, count: usize, into: *mut u8) {
        if !READS_MANY_AT_ONCE && !reads_directly() {
            let size = count * pg_sys::BLCKSZ as usize;
            // SAFETY: there is room for that many bytes.
            let into = unsafe { std::slice::from_raw_parts_mut(into, size) };
            if self.try_read(first, into) {
                return;
            }
        }
        // SAFETY: the relation is open, and there is room for the blocks.
        unsafe { smgr_read(self.relation, self.fork, first, count, into) };
    }

    /// Asks the operating system to read `count` blocks from `first` on, all in one file.
    pub fn prefetch(&mut self, first: BlockNumber, count: usize) {
        if READS_MANY_AT_ONCE || !self.try_prefetch(first, count) {
            // SAFETY: the relation is open.
            unsafe { smgr_prefetch(self.relation, self.fork, first, count) };
        }
    }

    /// Whether the operating system has cached `count` blocks from `first` on, all in one
    /// file. False if it does not tell; Linux does from 6.5 on. It counts its pages, some
    /// of which may be large, while a request to read would look at each 4 kB.
    pub fn are_cached(&mut self, first: BlockNumber, count: usize) -> bool {
        let Some((file, offset)) = self.file(first) else {
            return false;
        };
        let size = bytes(count);
        let page = rustix::param::page_size() as u64;
        let pages = (offset + size - 1) / page - offset / page + 1;
        cached_pages(file, offset, size).is_some_and(|cached| cached >= pages)
    }

    /// The file with this block, if it can be opened, and the block's offset in it.
    fn file(&mut self, block: BlockNumber) -> Option<(&File, u64)> {
        let segment = block / SEGMENT_BLOCKS;
        if self.open.as_ref().is_none_or(|(open, _)| *open != segment) {
            let path = match segment {
                0 => self.path.clone(),
                _ => format!("{}.{segment}", self.path),
            };
            self.open = Some((segment, File::open(path)));
        }
        match &self.open {
            Some((_, Ok(file))) => Some((file, bytes((block % SEGMENT_BLOCKS) as usize))),
            _ => None,
        }
    }

    /// Reads blocks from `first` on. Returns false if not all could be read.
    fn try_read(&mut self, first: BlockNumber, into: &mut [u8]) -> bool {
        use std::os::unix::fs::FileExt;
        let Some((file, offset)) = self.file(first) else {
            return false;
        };
        const READ: u32 = pg_sys::WaitEventIO::WAIT_EVENT_DATA_FILE_READ;
        // SAFETY: the word is in this process's entry, which only it writes.
        let show = |event| unsafe { pg_sys::my_wait_event_info.write_volatile(event) };
        show(READ);
        let result = file.read_exact_at(into, offset);
        show(0);
        result.is_ok()
    }

    /// Has the operating system read blocks, by requests that it does not cut short.
    /// Returns false if it cannot be asked.
    fn try_prefetch(&mut self, first: BlockNumber, count: usize) -> bool {
        let Some((file, offset)) = self.file(first) else {
            return false;
        };
        request(file, offset, bytes(count))
    }
}

/// The size of so many blocks in bytes.
fn bytes(blocks: usize) -> u64 {
    blocks as u64 * u64::from(pg_sys::BLCKSZ)
}

/// Has the system read a range of a file. Returns false if it cannot be asked.
#[cfg(target_os = "linux")]
fn request(file: &File, offset: u64, size: u64) -> bool {
    use rustix::fs::{Advice, fadvise};
    fadvise(file, offset, std::num::NonZero::new(size), Advice::WillNeed).is_ok()
}

#[cfg(not(target_os = "linux"))]
fn request(_file: &File, _offset: u64, _size: u64) -> bool {
    false
}

/// How many pages of a range of a file the system has cached. `None` if it does not tell.
#[cfg(target_os = "linux")]
fn cached_pages(file: &File, offset: u64, size: u64) -> Option<u64> {
    use std::os::fd::AsRawFd;
    /// The number of the system call on all architectures but Alpha.
    const CACHESTAT: libc::c_long = 451;
    let range = [offset, size];
    // Pages that are cached, dirty, being written, evicted, and recently evicted.
    let mut counts = [0u64; 5];
    // SAFETY: `struct cachestat_range` has two and `struct cachestat` five numbers of 64
    // bits; the call reads the one and fills the other.
    let result = unsafe {
        libc::syscall(
            CACHESTAT,
            file.as_raw_fd(),
            range.as_ptr(),
            counts.as_mut_ptr(),
            0,
        )
    };
    (result == 0).then_some(counts[0])
}

#[cfg(not(target_os = "linux"))]
fn cached_pages(_file: &File, _offset: u64, _size: u64) -> Option<u64> {
    None
}
