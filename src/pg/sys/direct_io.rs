//! Direct I/O: reading relations past the operating system's cache.
//!
//! `io_direct_flags` of fd.h says whether the server opens the files of relations for it
//! (`debug_io_direct`). Each process has its own copy, so one can read directly while all
//! others go through the cache; Linux keeps the two coherent.

use pgrx::pg_sys;

use super::read::READS_MANY_AT_ONCE;

/// `IO_DIRECT_DATA` of fd.h, which pgrx does not bind.
#[cfg(not(feature = "pg15"))]
const DATA: i32 = 1;

/// Whether this process opens the files of relations for direct I/O.
pub fn reads_directly() -> bool {
    #[cfg(feature = "pg15")]
    return false;
    #[cfg(not(feature = "pg15"))]
    {
        // SAFETY: the word is this process's own.
        let flags = unsafe { (&raw const pg_sys::io_direct_flags).read() };
        flags & DATA != 0
    }
}

/// Whether direct I/O takes this server less time than reading through the system's cache:
/// it reads many blocks at once, and its buffers are in huge pages. With small ones, the
/// system would have to find each page of the buffers.
pub fn is_worthwhile() -> bool {
    #[cfg(any(feature = "pg15", feature = "pg16"))]
    let has_huge_pages = false;
    #[cfg(not(any(feature = "pg15", feature = "pg16")))]
    let has_huge_pages = {
        use pg_sys::HugePagesType::HUGE_PAGES_ON;
        // SAFETY: the word is set when the server starts, and does not change.
        let status = unsafe { (&raw const pg_sys::huge_pages_status).read() };
        u32::try_from(status) == Ok(HUGE_PAGES_ON)
    };
    READS_MANY_AT_ONCE && has_huge_pages && !reads_directly()
}

/// While it exists, this process reads the files of a relation directly.
pub struct DirectReads {
    relation: pg_sys::Relation,
}

impl DirectReads {
    /// # Safety
    /// `relation` stays open for as long as this exists, and can be read directly.
    pub unsafe fn begin(relation: pg_sys::Relation) -> Self {
        let reads = Self { relation };
        reads.switch(true);
        reads
    }

    /// Files that are open keep the way in which they were opened.
    fn switch(&self, directly: bool) {
        // SAFETY: the word is this process's own, and the relation is open.
        unsafe {
            #[cfg(not(feature = "pg15"))]
            {
                let flags = &raw mut pg_sys::io_direct_flags;
                *flags = if directly {
                    *flags | DATA
                } else {
                    *flags & !DATA
                };
            }
            #[cfg(feature = "pg15")]
            let _ = directly;
            pg_sys::smgrclose(pg_sys::RelationGetSmgr(self.relation));
        }
    }
}

impl Drop for DirectReads {
    fn drop(&mut self) {
        self.switch(false);
    }
}
