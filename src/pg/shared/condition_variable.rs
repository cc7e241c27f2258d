//! The server's condition variables: processes sleep until another one broadcasts.

use std::cell::UnsafeCell;
use std::time::Duration;

use pgrx::pg_sys;

use super::contents::Shared;
use crate::pg::process::latch::WaitEvent;

/// A condition variable in shared memory.
#[repr(transparent)]
pub struct ConditionVariable(UnsafeCell<pg_sys::ConditionVariable>);

// SAFETY: all processes change it by the server's functions only, which take its spinlock.
unsafe impl Sync for ConditionVariable {}
// SAFETY: it has no pointers, but numbers of processes. Only the server's functions change
// it, under its spinlock.
unsafe impl Shared for ConditionVariable {}

impl ConditionVariable {
    pub fn new() -> Self {
        let mut variable = pg_sys::ConditionVariable::default();
        // SAFETY: it is this process's until it is shared. It holds no address of itself.
        unsafe { pg_sys::ConditionVariableInit(&mut variable) };
        Self(UnsafeCell::new(variable))
    }

    /// Sleeps until `timeout` returns `None`. It is called first, after each broadcast, and
    /// when the time is up that it has returned. Serves interrupts, and ends this process if
    /// the postmaster has died.
    pub fn wait(&self, event: &WaitEvent, mut timeout: impl FnMut() -> Option<Duration>) {
        // SAFETY: the variable was initialized. If an ERROR ends the sleep, the end of the
        // transaction or of the process cancels it.
        unsafe {
            pg_sys::ConditionVariablePrepareToSleep(self.0.get());
            while let Some(timeout) = timeout() {
                let timeout = i64::try_from(timeout.as_millis())
                    .unwrap_or(i64::MAX)
                    .max(1);
                pg_sys::ConditionVariableTimedSleep(self.0.get(), timeout, event.number());
            }
            pg_sys::ConditionVariableCancelSleep();
        }
    }

    /// Wakes all processes that sleep.
    pub fn broadcast(&self) {
        // SAFETY: the variable was initialized. It takes spinlocks, and sets latches.
        unsafe { pg_sys::ConditionVariableBroadcast(self.0.get()) };
    }
}
