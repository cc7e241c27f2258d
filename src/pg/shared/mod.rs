//! What processes share: memory, and other processes that use it.
//!
//! Everything in shared memory consists of atomics, or does not change once other
//! processes know of it. The exception are condition variables, whose spinlock only the
//! server's functions take. So no process that dies holds a lock of ours.
//!
//! Memory orderings, in all of the library: `SeqCst` for every word of ours by which
//! processes agree on something (roles, phases, claims, the gate); `Relaxed` for counters
//! and hints, from which nothing else is concluded, and for words of this process alone.
//! The state words of the server's buffer headers have the server's own orderings:
//! `Relaxed` to look, `Release` to unlock, `AcqRel` to change.

pub mod condition_variable;
pub mod contents;
pub mod named;
pub mod parallel;
pub mod segment;
pub mod slots;
pub mod worker;
