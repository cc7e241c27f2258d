//! The rate limit of a load: a token bucket that all its workers share.
//!
//! Its state is a point in time: the one until which the blocks taken so far last
//! at the current rate. While it lies in the future, no worker gets more blocks.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicI64, AtomicU32};
use std::time::Duration;

/// How much unused time, in microseconds, can be used later.
const SAVED: i64 = 100_000;

/// For how much time, in microseconds, a worker gets blocks at once.
const GIVEN: i64 = 20_000;

const BLOCK_KB: i64 = pgrx::pg_sys::BLCKSZ as i64 / 1024;
const SECOND: i64 = 1_000_000;

/// The limit in shared memory. Times are microseconds of a clock that all processes
/// share. Both words only pace the workers, so they are `Relaxed`.
pub struct RateLimit {
    /// kB per second; 0 means no limit.
    rate: AtomicU32,
    paid_until: AtomicI64,
}

impl RateLimit {
    /// A limit that is switched off.
    pub const fn new() -> Self {
        Self {
            rate: AtomicU32::new(0),
            paid_until: AtomicI64::new(0),
        }
    }

    /// Sets the rate in kB per second, 0 for no limit. Blocks taken at the old rate
    /// are forgotten: otherwise, a low old rate would delay the first blocks at the
    /// new one.
    pub fn set(&self, rate: u32, now: i64) {
        if self.rate.swap(rate, Relaxed) != rate {
            self.paid_until.store(now, Relaxed);
        }
    }

    /// Takes up to `wanted` blocks, at least one. `Err` is how long to wait before
    /// any can be taken.
    pub fn take(&self, wanted: usize, now: impl FnOnce() -> i64) -> Result<usize, Duration> {
        let rate = i64::from(self.rate.load(Relaxed));
        if rate == 0 {
            return Ok(wanted);
        }
        let now = now();
        let at_once = (rate * GIVEN / (BLOCK_KB * SECOND)).max(1);
        let blocks = wanted
            .min(usize::try_from(at_once).unwrap_or(usize::MAX))
            .max(1);
        self.paid_until
            .fetch_update(Relaxed, Relaxed, |paid_until| {
                let from = paid_until.max(now - SAVED);
                (from <= now).then_some(from + time(blocks, rate))
            })
            .map(|_| blocks)
            .map_err(|paid_until| Duration::from_micros((paid_until - now).max(0) as u64))
    }

    /// Gives back blocks that were taken but not read.
    pub fn give_back(&self, blocks: usize) {
        let rate = i64::from(self.rate.load(Relaxed));
        if rate > 0 && blocks > 0 {
            self.paid_until.fetch_sub(time(blocks, rate), Relaxed);
        }
    }
}

/// For how many microseconds `blocks` last at `rate`.
fn time(blocks: usize, rate: i64) -> i64 {
    (blocks as i64).saturating_mul(BLOCK_KB * SECOND) / rate
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes blocks for `seconds`, waiting as told, and returns how many it got.
    fn take_for(limit: &RateLimit, from: i64, seconds: i64) -> usize {
        let (mut now, mut taken) = (from, 0);
        while now < from + seconds * SECOND {
            match limit.take(usize::MAX, || now) {
                Ok(blocks) => taken += blocks,
                Err(wait) => now += i64::try_from(wait.as_micros()).unwrap() + 1,
            }
        }
        taken
    }

    #[test]
    fn no_limit_gives_what_is_wanted_and_asks_for_no_time() {
        let limit = RateLimit::new();
        assert_eq!(limit.take(512, || unreachable!()), Ok(512));
    }

    #[test]
    fn a_limit_is_kept_within_a_tenth_at_any_rate() {
        for rate in [8, 100, 1000, 50_000, 2_000_000, i32::MAX as u32] {
            let limit = RateLimit::new();
            limit.set(rate, 0);
            let expected = 5 * i64::from(rate) / BLOCK_KB;
            let taken = take_for(&limit, 1, 5) as i64;
            let tolerance = (expected / 10).max(1);
            assert!(
                (expected - tolerance..=expected + tolerance).contains(&taken),
                "{rate} kB/s: {taken} blocks instead of {expected}"
            );
        }
    }

    #[test]
    fn unused_time_is_not_saved_up_for_long() {
        let limit = RateLimit::new();
        limit.set(8000, 0);
        assert!(take_for(&limit, 3600 * SECOND, 1) <= 1100 + 100);
    }

    #[test]
    fn a_new_rate_holds_at_once() {
        let limit = RateLimit::new();
        limit.set(1, 0);
        assert_eq!(limit.take(1, || 0), Ok(1));
        assert!(limit.take(1, || 0).is_err());
        limit.set(8000, 10);
        assert!(take_for(&limit, 11, 1) >= 900);
    }

    #[test]
    fn what_is_given_back_can_be_taken_again() {
        let limit = RateLimit::new();
        limit.set(8, 0);
        assert_eq!(limit.take(1, || 0), Ok(1));
        assert!(limit.take(1, || 1).is_err());
        limit.give_back(1);
        assert_eq!(limit.take(1, || 1), Ok(1));
    }
}
