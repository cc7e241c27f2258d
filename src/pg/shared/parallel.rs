//! Work that a session shares with PostgreSQL's own parallel workers.
//!
//! The server takes care of what would be hard to do for workers of our own: they run
//! as the session's user, in its transaction and with its settings; they end when it is
//! cancelled; their errors and notices reach its client; and `max_parallel_workers` and
//! `max_worker_processes` limit their number, possibly to zero.

use std::ffi::CStr;
use std::sync::atomic::AtomicU32;

use pgrx::pg_sys;

use super::contents::{Contents, Lengths, Shared};

/// What the processes share. The words change.
pub type Job<'a, H, C> = Contents<'a, H, C, AtomicU32>;

/// The key under which a parallel worker finds the job. The server's own keys are large
/// numbers.
const JOB_KEY: u64 = 1;

/// Where parallel workers find the library.
const LIBRARY: &CStr = c"$libdir/pg_prewarm";

fn is_parallel_worker() -> bool {
    // SAFETY: the word is set when the process starts, and does not change.
    unsafe { pg_sys::ParallelWorkerNumber >= 0 }
}

/// Starts up to `workers` parallel workers, which call the library's function `entry`,
/// and does `work` in this process as well; it is passed how many were started. Waits
/// for the workers, and returns what `finish` makes of the job.
///
/// A process that is a parallel worker itself starts none: the server does not check
/// that.
pub fn run<H: Shared, C: Shared, R>(
    entry: &CStr,
    workers: u16,
    header: H,
    cells: &[C],
    words: &[AtomicU32],
    work: impl FnOnce(&Job<H, C>, u32),
    finish: impl FnOnce(&Job<H, C>) -> R,
) -> R {
    if workers == 0 || is_parallel_worker() {
        let job = Job {
            header: &header,
            cells,
            counters: &[],
            words,
        };
        work(&job, 0);
        return finish(&job);
    }
    let lengths = Lengths {
        cells: cells.len(),
        counters: 0,
        words: words.len(),
    };
    let size = Job::<H, C>::size(lengths);
    // SAFETY: the calls of PostgreSQL's own parallel commands, in their order. After an
    // ERROR the end of the (sub)transaction ends the workers, the context and parallel
    // mode. The memory has the size asked for, is aligned by the table of contents, and
    // is not known to any other process before the workers are launched.
    unsafe {
        pg_sys::EnterParallelMode();
        let context =
            pg_sys::CreateParallelContext(LIBRARY.as_ptr(), entry.as_ptr(), workers.into());
        const TOC_ALIGNMENT: usize = 128;
        (*context).estimator.space_for_chunks += size.next_multiple_of(TOC_ALIGNMENT);
        (*context).estimator.number_of_keys += 1;
        pg_sys::InitializeParallelDSM(context);

        let base: *mut u8 = pg_sys::shm_toc_allocate((*context).toc, size).cast();
        let job = Job::write(base, lengths, header, cells, |to| {
            for (to, from) in to.iter_mut().zip(words) {
                *to.get_mut() = from.load(std::sync::atomic::Ordering::Relaxed);
            }
        });
        pg_sys::shm_toc_insert((*context).toc, JOB_KEY, base.cast());

        pg_sys::LaunchParallelWorkers(context);
        work(&job, (*context).nworkers_launched as u32);
        pg_sys::WaitForParallelWorkersToFinish(context);
        let result = finish(&job);
        pg_sys::DestroyParallelContext(context);
        pg_sys::ExitParallelMode();
        result
    }
}

/// Where a parallel worker finds the job that it was started for: what the server passes
/// to its entry point.
pub struct TableOfContents(pub *mut pg_sys::shm_toc);

impl TableOfContents {
    /// The job.
    ///
    /// # Safety
    /// The server has passed this table to an entry point that [`run`] is called with for
    /// jobs of these types only.
    pub unsafe fn job<H: Shared, C: Shared>(&self) -> Job<'_, H, C> {
        // SAFETY: `run` has written such a job and inserted it under this key; the segment
        // is mapped until the worker ends.
        unsafe { Job::at(pg_sys::shm_toc_lookup(self.0, JOB_KEY, false).cast()) }
    }
}
