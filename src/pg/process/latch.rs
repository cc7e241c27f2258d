//! Waiting: this process's latch, those of others, and what `pg_stat_activity` shows
//! meanwhile.

use std::ffi::CStr;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::Duration;

use pgrx::pg_sys;

use super::check_for_interrupts;
use super::error::catch;
use crate::pg::sys::version;

/// A wait event of this extension. On 15 and 16, `pg_stat_activity` shows `Extension` for
/// all of them.
#[derive(Debug)]
pub struct WaitEvent {
    name: &'static CStr,
    /// Its number in this server, which is looked up once; 0 before that.
    number: AtomicU32,
}

impl WaitEvent {
    pub const fn new(name: &'static CStr) -> Self {
        Self {
            name,
            number: AtomicU32::new(0),
        }
    }

    /// Looks up its number, so that this need not be done while the process waits. May raise
    /// an ERROR.
    pub fn look_up(&self) {
        self.number();
    }

    pub(in crate::pg) fn number(&self) -> u32 {
        if self.number.load(Relaxed) == 0 {
            self.number.store(version::wait_event(self.name), Relaxed);
        }
        self.number.load(Relaxed)
    }
}

/// Sleeps until this process's latch is set or the timeout is over, then serves
/// interrupts. Ends this process if the postmaster has died.
pub fn sleep(timeout: Option<Duration>, event: &WaitEvent) {
    let (timeout_flag, milliseconds) = match timeout {
        Some(timeout) => (
            pg_sys::WL_TIMEOUT,
            i32::try_from(timeout.as_micros().div_ceil(1000))
                .unwrap_or(i32::MAX)
                .into(),
        ),
        None => (0, -1),
    };
    // SAFETY: the latch is this process's own.
    unsafe {
        pg_sys::WaitLatch(
            pg_sys::MyLatch,
            (pg_sys::WL_LATCH_SET | pg_sys::WL_EXIT_ON_PM_DEATH | timeout_flag) as i32,
            milliseconds,
            event.number(),
        );
        pg_sys::ResetLatch(pg_sys::MyLatch);
    }
    check_for_interrupts();
}

/// The same for background workers outside of transactions, which survive an ERROR. On a
/// standby before 17, a conflict with recovery may be raised after the transaction that
/// it was meant for. Whatever the ERROR is, the next sleep may raise it again (there may
/// be no memory), so this sleeps in any case: each time in a row for twice as long, up to
/// a second, or until a signal arrives.
pub fn sleep_as_worker(timeout: Option<Duration>, event: &WaitEvent) {
    const LONGEST: Duration = Duration::from_secs(1);
    static AFTER_ERROR: AtomicU32 = AtomicU32::new(0);
    if catch(|| sleep(timeout, event)).is_ok() {
        AFTER_ERROR.store(0, Relaxed);
        return;
    }
    // SAFETY: a worker holds no lightweight lock outside of transactions, except
    // one that the server took to look up the name of a wait event.
    unsafe { pg_sys::LWLockReleaseAll() };
    let doublings = AFTER_ERROR.fetch_add(1, Relaxed).min(7);
    let longest = timeout.map_or(LONGEST, |timeout| timeout.min(LONGEST));
    nap(Duration::from_millis(10 << doublings).min(longest));
}

/// Sleeps until the time is up or a signal arrives.
fn nap(time: Duration) {
    let time = libc::timespec {
        tv_sec: time.as_secs() as libc::time_t,
        tv_nsec: time.subsec_nanos().into(),
    };
    // SAFETY: a valid time, and no place for what is left of it.
    unsafe { libc::nanosleep(&time, std::ptr::null_mut()) };
}

/// Sets the latch of the server process with that ID, if there is one.
pub fn wake(pid: i32) {
    // SAFETY: an entry of a server process is there for as long as the server is. If the
    // process has ended since, its successor in that entry is woken once too often.
    unsafe {
        let process = pg_sys::BackendPidGetProc(pid);
        if !process.is_null() {
            pg_sys::SetLatch(&raw mut (*process).procLatch);
        }
    }
}
