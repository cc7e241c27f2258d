//! Work that a session shares with PostgreSQL's own parallel workers.
//!
//! They come with all that is hard to do for workers of one's own: they act as the
//! session's user, in its transaction and with its settings; they end when it is
//! cancelled; their errors and notices reach its client; and the server's limits
//! (`max_parallel_workers`, `max_worker_processes`) decide how many there are,
//! which may be none.

use std::ffi::CStr;
use std::sync::atomic::AtomicU32;

use pgrx::pg_sys;

/// What may be moved into memory that other processes use.
///
/// # Safety
/// There are no pointers in it, nothing to drop, and what changes once it is
/// shared is atomic.
pub unsafe trait Portable: Sync + 'static {}

/// What the processes share: a header, cells and words.
pub struct Job<'a, H, C> {
    pub header: &'a H,
    pub cells: &'a [C],
    pub words: &'a [AtomicU32],
}

/// How many cells and words there are.
#[derive(Clone, Copy)]
#[repr(C)]
struct Lengths {
    cells: usize,
    words: usize,
}

/// What the shared memory begins with.
#[repr(C)]
struct Prefix<H> {
    lengths: Lengths,
    header: H,
}

/// Under which the job is found among the things that a parallel worker is given;
/// the server's own have large numbers.
const JOB_KEY: u64 = 1;

impl<'a, H: Portable, C: Portable> Job<'a, H, C> {
    const CELLS_AT: usize = size_of::<Prefix<H>>().next_multiple_of(align_of::<C>());
    const _ALIGNED: () = assert!(align_of::<C>() >= align_of::<u32>());

    fn words_at(lengths: Lengths) -> usize {
        let () = Self::_ALIGNED;
        Self::CELLS_AT + lengths.cells * size_of::<C>()
    }

    fn size(lengths: Lengths) -> usize {
        Self::words_at(lengths) + lengths.words * size_of::<u32>()
    }

    /// # Safety
    /// A job was laid out there, and stays for as long as this is used.
    unsafe fn at(base: *const u8) -> Self {
        // SAFETY: the caller's promise.
        unsafe {
            let prefix = &*base.cast::<Prefix<H>>();
            let lengths = prefix.lengths;
            let cells = base.add(Self::CELLS_AT).cast();
            let words = base.add(Self::words_at(lengths)).cast();
            Self {
                header: &prefix.header,
                cells: std::slice::from_raw_parts(cells, lengths.cells),
                words: std::slice::from_raw_parts(words, lengths.words),
            }
        }
    }
}

/// Where workers find the library: where the server's functions of it do.
const LIBRARY: &CStr = c"$libdir/pg_prewarm";

fn is_parallel_worker() -> bool {
    // SAFETY: set when the process began.
    unsafe { pg_sys::ParallelWorkerNumber >= 0 }
}

/// Lays a job out in shared memory, starts up to so many workers, which call the
/// library's function of that name, does `work`, which is told how many were
/// started, in this process as well, waits for the workers, and returns what
/// `finish` makes of it all. In a process that is a parallel worker itself, none are
/// started: the server does not check that they never are.
pub fn run<H: Portable, C: Portable, R>(
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
            words,
        };
        work(&job, 0);
        return finish(&job);
    }
    let lengths = Lengths {
        cells: cells.len(),
        words: words.len(),
    };
    let size = Job::<H, C>::size(lengths);
    // SAFETY: the order that PostgreSQL's own parallel commands have. An ERROR on
    // the way leaves the workers, the memory and the mode to the end of the
    // (sub)transaction. What is copied is portable, into memory of its size that
    // nobody else knows of yet; the toc aligns it for any type.
    unsafe {
        pg_sys::EnterParallelMode();
        let context =
            pg_sys::CreateParallelContext(LIBRARY.as_ptr(), entry.as_ptr(), workers.into());
        const TOC_ALIGNMENT: usize = 128;
        (*context).estimator.space_for_chunks += size.next_multiple_of(TOC_ALIGNMENT);
        (*context).estimator.number_of_keys += 1;
        pg_sys::InitializeParallelDSM(context);

        let base: *mut u8 = pg_sys::shm_toc_allocate((*context).toc, size).cast();
        base.cast::<Prefix<H>>().write(Prefix { lengths, header });
        let to: *mut C = base.add(Job::<H, C>::CELLS_AT).cast();
        to.copy_from_nonoverlapping(cells.as_ptr(), cells.len());
        let to: *mut AtomicU32 = base.add(Job::<H, C>::words_at(lengths)).cast();
        to.copy_from_nonoverlapping(words.as_ptr(), words.len());
        pg_sys::shm_toc_insert((*context).toc, JOB_KEY, base.cast());

        pg_sys::LaunchParallelWorkers(context);
        let job = Job::at(base);
        work(&job, (*context).nworkers_launched as u32);
        pg_sys::WaitForParallelWorkersToFinish(context);
        let result = finish(&job);
        pg_sys::DestroyParallelContext(context);
        pg_sys::ExitParallelMode();
        result
    }
}

/// The job that a parallel worker was started for.
///
/// # Safety
/// `toc` is what the worker's entry point was given, and the job was begun by
/// [`run`] with the same types.
pub unsafe fn attach<'a, H: Portable, C: Portable>(toc: *mut pg_sys::shm_toc) -> Job<'a, H, C> {
    // SAFETY: the caller's promise; the memory stays until the worker ends.
    unsafe { Job::at(pg_sys::shm_toc_lookup(toc, JOB_KEY, false).cast()) }
}
