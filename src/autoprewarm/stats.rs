//! Statistics of loads and dumps, and the last error, in shared memory. Times are the
//! server's timestamps; 0 means none.
//!
//! By the rule in `crate::pg::shared`, all words here are `SeqCst`: the counts of a load
//! decide whether its workers make progress and what was skipped, and the order of the
//! times and results tells a reader whether the rest is complete.

use std::ops::Range;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicI64, AtomicU8, AtomicU32, AtomicU64};
use std::time::Duration;

use crate::blocks::{SkipCounts, SkipReason};
use crate::pg::process;

/// Statistics of the running load, or of the last one.
#[repr(C)]
pub struct LoadStats {
    /// Incremented when a load begins and when it ends. A worker may still be running
    /// after its load has ended, or after the next one has begun; by this number, what
    /// it does then is not counted.
    number: AtomicU32,
    start: AtomicI64,
    end: AtomicI64,
    /// A [`LoadResult`] plus one; 0 during a load, or if there has been none.
    result: AtomicU32,
    total: AtomicU64,
    loaded: AtomicU64,
    cached: AtomicU64,
    skipped: [AtomicU64; SkipReason::ALL.len()],
}

/// How a load ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoadResult {
    /// All blocks of the list were loaded or skipped.
    Completed,
    /// `autoprewarm_cancel()` was called.
    Cancelled,
    /// The list could not be read, the leader exited during the load, or workers
    /// kept exiting.
    Failed,
    /// There is no list.
    NoList,
    /// The load was not begun, since the server has crashed during the last ones.
    Suspended,
}

impl LoadResult {
    pub fn name(self) -> &'static str {
        match self {
            Self::Completed => "completed",
            Self::Cancelled => "cancelled",
            Self::Failed => "failed",
            Self::NoList => "no list",
            Self::Suspended => "suspended",
        }
    }
}

/// The blocks of a load, by outcome.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub total: u64,
    pub loaded: u64,
    /// Blocks that were in shared buffers already.
    pub cached: u64,
    pub skipped: SkipCounts,
}

impl Counts {
    /// Blocks that are neither loaded, cached nor skipped so far.
    pub fn rest(&self) -> u64 {
        let done = self.loaded + self.cached + self.skipped.total();
        self.total.saturating_sub(done)
    }
}

impl LoadStats {
    pub const fn new() -> Self {
        Self {
            number: AtomicU32::new(0),
            start: AtomicI64::new(0),
            end: AtomicI64::new(0),
            result: AtomicU32::new(0),
            total: AtomicU64::new(0),
            loaded: AtomicU64::new(0),
            cached: AtomicU64::new(0),
            skipped: [const { AtomicU64::new(0) }; SkipReason::ALL.len()],
        }
    }

    /// Records that a load begins.
    pub(super) fn begin(&self) {
        self.number.fetch_add(1, SeqCst);
        self.result.store(0, SeqCst);
        self.end.store(0, SeqCst);
        for counter in [&self.total, &self.loaded, &self.cached] {
            counter.store(0, SeqCst);
        }
        for counter in &self.skipped {
            counter.store(0, SeqCst);
        }
        self.start.store(process::now(), SeqCst);
    }

    /// Records that the load has ended. The blocks that are left are counted as skipped.
    pub(super) fn end(&self, result: LoadResult) {
        let number = self.number.fetch_add(1, SeqCst) + 1;
        self.skip(number, SkipReason::Interrupted, self.counts().rest());
        self.end.store(process::now(), SeqCst);
        self.result.store(result as u32 + 1, SeqCst);
    }

    pub fn number(&self) -> u32 {
        self.number.load(SeqCst)
    }

    /// Whether a load has begun and not ended. Both increment the number, so it is odd
    /// then.
    pub fn has_begun(&self) -> bool {
        self.number() % 2 == 1
    }

    pub fn set_total(&self, records: u64) {
        self.total.store(records, SeqCst);
    }

    /// Counts blocks of load `number`, unless that load has ended.
    pub fn count(&self, number: u32, loaded: u64, cached: u64) {
        if self.number.load(SeqCst) == number {
            self.loaded.fetch_add(loaded, SeqCst);
            self.cached.fetch_add(cached, SeqCst);
        }
    }

    /// Counts skipped blocks of load `number`, unless that load has ended.
    pub fn skip(&self, number: u32, reason: SkipReason, blocks: u64) {
        if self.number.load(SeqCst) == number {
            self.skipped[reason as usize].fetch_add(blocks, SeqCst);
        }
    }

    /// Takes back that blocks of load `number` were counted as skipped: they are counted
    /// otherwise now.
    pub fn take_back(&self, number: u32, reason: SkipReason, blocks: u64) {
        if self.number.load(SeqCst) == number {
            let skipped = &self.skipped[reason as usize];
            let _ = skipped.fetch_update(SeqCst, SeqCst, |skipped| {
                Some(skipped.saturating_sub(blocks))
            });
        }
    }

    pub fn counts(&self) -> Counts {
        let mut skipped = SkipCounts::default();
        for reason in SkipReason::ALL {
            skipped.count(reason, self.skipped[reason as usize].load(SeqCst));
        }
        Counts {
            total: self.total.load(SeqCst),
            loaded: self.loaded.load(SeqCst),
            cached: self.cached.load(SeqCst),
            skipped,
        }
    }

    pub fn start_time(&self) -> i64 {
        self.start.load(SeqCst)
    }

    pub fn end_time(&self) -> i64 {
        self.end.load(SeqCst)
    }

    pub fn result(&self) -> Option<LoadResult> {
        match self.result.load(SeqCst) {
            1 => Some(LoadResult::Completed),
            2 => Some(LoadResult::Cancelled),
            3 => Some(LoadResult::Failed),
            4 => Some(LoadResult::NoList),
            5 => Some(LoadResult::Suspended),
            _ => None,
        }
    }
}

/// Statistics of the last dump that was completed.
#[repr(C)]
pub struct DumpStats {
    time: AtomicI64,
    blocks: AtomicU64,
    microseconds: AtomicU64,
}

impl DumpStats {
    pub const fn new() -> Self {
        Self {
            time: AtomicI64::new(0),
            blocks: AtomicU64::new(0),
            microseconds: AtomicU64::new(0),
        }
    }

    /// Records a dump of `blocks` blocks. Only the process that has reserved the dump
    /// file calls this.
    pub fn record(&self, blocks: u64, took: Duration) {
        self.blocks.store(blocks, SeqCst);
        let microseconds = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.microseconds.store(microseconds, SeqCst);
        self.time.store(process::now(), SeqCst);
    }

    /// When the dump ended, how many blocks it listed, and how long it took.
    pub fn last(&self) -> (i64, u64, Duration) {
        (
            self.time.load(SeqCst),
            self.blocks.load(SeqCst),
            Duration::from_micros(self.microseconds.load(SeqCst)),
        )
    }
}

/// A text that processes share, such as the last error that the leader or a worker has
/// logged, and when it was stored.
///
/// The text is more than one word, so it has a version, which is odd while the text
/// is being written. A reader that finds it odd or changed reads again, for a tenth of a
/// second at most. A writer takes a second at most as well, since it does nothing else
/// meanwhile: after that it is taken for dead, and the next one takes its place.
#[repr(C)]
pub struct SharedText<const ROOM: usize> {
    version: AtomicU32,
    /// When a process began to write a text.
    began: AtomicI64,
    time: AtomicI64,
    length: AtomicU32,
    /// The first bytes of the text, as many as are kept.
    bytes: [AtomicU8; ROOM],
}

/// An error's message.
pub type LastError = SharedText<256>;

impl<const ROOM: usize> SharedText<ROOM> {
    pub const fn new() -> Self {
        Self {
            version: AtomicU32::new(0),
            began: AtomicI64::new(0),
            time: AtomicI64::new(0),
            length: AtomicU32::new(0),
            bytes: [const { AtomicU8::new(0) }; ROOM],
        }
    }

    /// How often a reader reads again, and how long it waits before that.
    const TRIES: usize = 100;
    const WAIT: Duration = Duration::from_millis(1);

    /// How long a writer may take, in microseconds.
    const WRITING: Range<i64> = 0..1_000_000;

    /// Stores a text, truncated if it is too long. If another process is storing one at this
    /// moment, that one is kept instead.
    pub fn record(&self, text: &str) {
        self.store(text, process::now());
    }

    fn store(&self, message: &str, now: i64) {
        let version = self.version.load(SeqCst);
        let since = now.wrapping_sub(self.began.load(SeqCst));
        if !version.is_multiple_of(2) && Self::WRITING.contains(&since) {
            return;
        }
        // Before the version changes: who finds it odd has to find the time as well.
        self.began.store(now, SeqCst);
        let mine = version.wrapping_add(1) | 1;
        let replace = |from, to| self.version.compare_exchange(from, to, SeqCst, SeqCst);
        if replace(version, mine).is_err() {
            return;
        }
        let length = message.floor_char_boundary(ROOM);
        for (to, from) in self.bytes.iter().zip(&message.as_bytes()[..length]) {
            to.store(*from, SeqCst);
        }
        #[expect(clippy::cast_possible_truncation, reason = "it is at most ROOM")]
        let length = length as u32;
        self.length.store(length, SeqCst);
        self.time.store(now, SeqCst);
        // Fails if another writer has taken this one for dead: then that one's text
        // counts.
        let _ = replace(mine, mine.wrapping_add(1));
    }

    /// The text, and when it was stored. `None` if there has been none, or if it cannot be
    /// read since its writer did not complete it.
    pub fn last(&self) -> Option<(String, i64)> {
        let mut text = self.read();
        for _ in 0..Self::TRIES {
            if text.is_some() {
                break;
            }
            std::thread::sleep(Self::WAIT);
            text = self.read();
        }
        text.filter(|&(_, time)| time != 0)
    }

    /// The text and its time. `None` if they are being written.
    fn read(&self) -> Option<(String, i64)> {
        let version = self.version.load(SeqCst);
        if !version.is_multiple_of(2) {
            return None;
        }
        let length = self.length.load(SeqCst) as usize;
        let bytes: Vec<u8> = self.bytes[..length.min(ROOM)]
            .iter()
            .map(|byte| byte.load(SeqCst))
            .collect();
        let time = self.time.load(SeqCst);
        let message = String::from_utf8_lossy(&bytes).into_owned();
        (self.version.load(SeqCst) == version).then_some((message, time))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_result_is_read_back_as_itself() {
        let stats = LoadStats::new();
        assert_eq!(stats.result(), None);
        for result in [
            LoadResult::Completed,
            LoadResult::Cancelled,
            LoadResult::Failed,
            LoadResult::NoList,
            LoadResult::Suspended,
        ] {
            stats.result.store(result as u32 + 1, SeqCst);
            assert_eq!(stats.result(), Some(result));
        }
    }

    #[test]
    fn the_last_error_is_read_back_and_truncated() {
        let error = LastError::new();
        assert_eq!(error.last(), None);
        error.store("one", 1);
        assert_eq!(error.last(), Some(("one".to_owned(), 1)));
        let long = "\u{fc}".repeat(200);
        error.store(&long, 2);
        assert_eq!(error.last(), Some(("\u{fc}".repeat(128), 2)));
    }

    #[test]
    fn a_writer_that_died_keeps_no_reader_waiting_and_is_replaced_by_the_next() {
        // What it left at any moment, also where the version begins anew.
        for version in [1, 77, u32::MAX] {
            let error = LastError::new();
            error.version.store(version, SeqCst);
            error.began.store(5, SeqCst);
            error.length.store(u32::MAX, SeqCst);
            assert_eq!(error.last(), None);
            error.store("too early", 6);
            assert_eq!(error.last(), None);
            error.store("after", 2_000_000);
            assert_eq!(error.last(), Some(("after".to_owned(), 2_000_000)));
            assert!(error.version.load(SeqCst).is_multiple_of(2));
        }
    }

    #[test]
    fn a_reader_gets_no_mixture_of_two_messages() {
        let error = LastError::new();
        let texts = ["a".repeat(200), "b".repeat(250)];
        std::thread::scope(|scope| {
            for text in &texts {
                let error = &error;
                scope.spawn(move || (1..2000).for_each(|time| error.store(text, time)));
            }
            for _ in 0..2000 {
                if let Some((text, _)) = error.last() {
                    assert!(texts.contains(&text), "{text}");
                }
            }
        });
    }

    #[test]
    fn workers_of_a_former_load_count_no_more() {
        let stats = LoadStats::new();
        stats.count(0, 2, 1);
        stats.number.store(1, SeqCst);
        stats.count(0, 100, 100);
        stats.skip(0, SkipReason::Locked, 100);
        stats.count(1, 3, 0);
        let counts = stats.counts();
        assert_eq!((counts.loaded, counts.cached), (5, 1));
        assert_eq!(counts.skipped.total(), 0);
    }
}
