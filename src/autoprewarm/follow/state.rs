//! What following has in shared memory: what the leader, the worker that fetches, the
//! walsenders that serve lists, and SQL callers tell each other.
//!
//! | word | written by |
//! | --- | --- |
//! | the state, the number of the fetch, the counts of the list, the rate | the leader |
//! | how far a fetch is, its result and SQLSTATE, the upstream server, bytes received | the worker that fetches |
//! | how many lists were served | walsenders |
//! | the last error | the leader and the worker that fetches |
//! | the request | SQL callers; the leader says how far it is |
//!
//! By the rule in `crate::pg::shared`, all words are `SeqCst`.

use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicI64, AtomicU32, AtomicU64};

use pgrx::PgSqlErrorCode;

use super::stored;
use crate::autoprewarm::role::{NO_PID, acquire, holder, release};
use crate::autoprewarm::stats::{LoadStats, SharedText};
use crate::pg::process::{self, recovery};
use crate::settings;

#[repr(C)]
pub struct FollowState {
    /// A [`Stage`].
    stage: AtomicU32,
    /// The process that fetches.
    fetcher: AtomicI32,
    /// The number of the fetch that is under way, or was the last.
    fetch: AtomicU32,
    /// The number of the last fetch that has connected, and above it how many chunks it has
    /// received.
    fetch_progress: AtomicU64,
    /// The number of a fetch, and above it a [`FetchResult`].
    fetch_result: AtomicU64,
    /// The SQLSTATE of the last fetch that has failed.
    fetch_sqlstate: AtomicI32,
    /// Whether a worker has logged an error since this server follows.
    has_warned: AtomicBool,
    /// How often a session has asked for a list at once, and up to which of these requests
    /// the leader is done.
    requested: AtomicU32,
    fulfilled: AtomicU32,
    /// How many sessions wait for one.
    waiting: AtomicU32,
    /// Whether the list of a former upstream server is to be loaded, on a server that is not a
    /// standby.
    list_waits: AtomicBool,
    /// Whether the last list was fetched and its blocks loaded.
    has_succeeded: AtomicBool,
    /// How many kB workers may load per second; 0 means no limit.
    rate: AtomicU32,
    /// How far top-ups have raised usage counts, see
    /// [`raised_until`](crate::pg::storage::room::LoadRoom::raised_until).
    raised_until: AtomicU64,
    list_time: AtomicI64,
    list_blocks: AtomicU64,
    hot_blocks: AtomicU64,
    hot_cached: AtomicU64,
    blocks_loaded: AtomicU64,
    blocks_replaced: AtomicU64,
    bytes_received: AtomicU64,
    lists_served: AtomicU64,
    last_served_time: AtomicI64,
    upstream_port: AtomicI32,
    upstream_host: SharedText<256>,
    pub error: SharedText<1024>,
    /// The blocks that are being loaded for a list.
    pub top_up: LoadStats,
}

/// How far the leader has come with following.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// `pg_prewarm.autoprewarm_follow` is off, or there is no leader.
    Off,
    NotAStandby,
    /// The last list was fetched, and what it lacks is loaded; or none was fetched yet.
    Following,
    /// Blocks of the list are being loaded.
    ToppingUp,
    /// The upstream server has no list.
    NoList,
    /// The list is not one for this server.
    Refused,
    /// The list could not be fetched.
    Failed,
}

impl Stage {
    const ALL: [Self; 7] = [
        Self::Off,
        Self::NotAStandby,
        Self::Following,
        Self::ToppingUp,
        Self::NoList,
        Self::Refused,
        Self::Failed,
    ];

    /// Whether the leader follows, so that it will load the rest at a promotion.
    pub fn follows(self) -> bool {
        !matches!(self, Self::Off | Self::NotAStandby)
    }

    /// Its name in `pg_stat_autoprewarm_follow`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::NotAStandby => "not a standby",
            Self::Following => "following",
            Self::ToppingUp => "topping up",
            Self::NoList => "upstream has no list",
            Self::Refused => "refused",
            Self::Failed => "failed",
        }
    }
}

/// What has come of a fetch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FetchResult {
    Fetched = 1,
    NoList = 2,
    Refused = 3,
    Failed = 4,
}

/// How far a fetch has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FetchProgress {
    /// It has not connected.
    None,
    Connected,
    /// It has received so many chunks.
    Received(u32),
}

/// What is known of the list that is followed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ListCounts {
    /// When the upstream server has looked at its buffers; 0 if there is no list.
    pub time: i64,
    pub blocks: u64,
    /// How many of these are hot, and how many of those were cached here at the last look.
    pub hot: u64,
    pub hot_cached: u64,
}

/// Numbers since the server started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    pub blocks_loaded: u64,
    pub blocks_replaced: u64,
    pub bytes_received: u64,
    pub lists_served: u64,
    /// 0 if none was served.
    pub last_served_time: i64,
}

impl FollowState {
    pub const fn new() -> Self {
        Self {
            stage: AtomicU32::new(Stage::Off as u32),
            fetcher: AtomicI32::new(NO_PID),
            fetch: AtomicU32::new(0),
            fetch_progress: AtomicU64::new(0),
            fetch_result: AtomicU64::new(0),
            fetch_sqlstate: AtomicI32::new(0),
            has_warned: AtomicBool::new(false),
            requested: AtomicU32::new(0),
            fulfilled: AtomicU32::new(0),
            waiting: AtomicU32::new(0),
            list_waits: AtomicBool::new(false),
            has_succeeded: AtomicBool::new(false),
            rate: AtomicU32::new(0),
            raised_until: AtomicU64::new(0),
            list_time: AtomicI64::new(0),
            list_blocks: AtomicU64::new(0),
            hot_blocks: AtomicU64::new(0),
            hot_cached: AtomicU64::new(0),
            blocks_loaded: AtomicU64::new(0),
            blocks_replaced: AtomicU64::new(0),
            bytes_received: AtomicU64::new(0),
            lists_served: AtomicU64::new(0),
            last_served_time: AtomicI64::new(0),
            upstream_port: AtomicI32::new(0),
            upstream_host: SharedText::new(),
            error: SharedText::new(),
            top_up: LoadStats::new(),
        }
    }

    pub fn stage(&self) -> Stage {
        let stage = self.stage.load(SeqCst) as usize;
        Stage::ALL.get(stage).copied().unwrap_or(Stage::Off)
    }

    pub fn set_stage(&self, stage: Stage) {
        self.stage.store(stage as u32, SeqCst);
    }

    /// Whether this server follows, and is promoted, and the leader has not noticed yet.
    pub fn promotion_is_due(&self) -> bool {
        self.stage().follows() && recovery::has_ended_or_will()
    }

    /// Whether this server is promoted, and the list of its upstream server is to be loaded
    /// before anything else.
    pub fn list_comes_first(&self) -> bool {
        self.promotion_is_due() && settings::autoprewarm_follow() && stored::exists()
    }

    /// Records that a fetch begins, and returns its number.
    pub fn begin_fetch(&self) -> u32 {
        self.fetch.fetch_add(1, SeqCst).wrapping_add(1)
    }

    /// Makes this process the one that fetches, until it exits. Returns false if there is
    /// another one.
    pub fn become_fetcher(&self) -> bool {
        acquire(&self.fetcher).is_ok()
    }

    /// The process that fetches, if one does.
    pub fn fetcher(&self) -> Option<i32> {
        holder(&self.fetcher)
    }

    /// Fetches no more, if this process does.
    pub fn release_fetch(&self) {
        release(&self.fetcher);
    }

    /// Whether that is the number of the last fetch, so that its list is still wanted.
    pub fn is_wanted(&self, fetch: u32) -> bool {
        self.fetch.load(SeqCst) == fetch
    }

    /// Records that a fetch has received so many chunks: none when it has connected.
    pub fn report_progress(&self, fetch: u32, chunks: u32) {
        let progress = u64::from(chunks) << 32 | u64::from(fetch);
        self.fetch_progress.store(progress, SeqCst);
    }

    /// How far that fetch has come.
    pub fn progress_of_fetch(&self, fetch: u32) -> FetchProgress {
        let progress = self.fetch_progress.load(SeqCst);
        match progress >> 32 {
            _ if progress & u64::from(u32::MAX) != u64::from(fetch) => FetchProgress::None,
            0 => FetchProgress::Connected,
            #[expect(clippy::cast_possible_truncation, reason = "32 bits are left")]
            chunks => FetchProgress::Received(chunks as u32),
        }
    }

    /// The code of the error of the last fetch that has failed.
    pub fn sqlstate(&self) -> PgSqlErrorCode {
        PgSqlErrorCode::from(self.fetch_sqlstate.load(SeqCst))
    }

    pub fn record_sqlstate(&self, sqlstate: PgSqlErrorCode) {
        self.fetch_sqlstate.store(sqlstate as i32, SeqCst);
    }

    pub fn report_fetch(&self, fetch: u32, result: FetchResult) {
        let result = (result as u64) << 32 | u64::from(fetch);
        self.fetch_result.store(result, SeqCst);
    }

    /// What has come of that fetch. `None` if it has not ended, or its worker has died.
    pub fn fetch_result(&self, fetch: u32) -> Option<FetchResult> {
        let result = self.fetch_result.load(SeqCst);
        match result >> 32 {
            _ if result & u64::from(u32::MAX) != u64::from(fetch) => None,
            1 => Some(FetchResult::Fetched),
            2 => Some(FetchResult::NoList),
            3 => Some(FetchResult::Refused),
            4 => Some(FetchResult::Failed),
            _ => None,
        }
    }

    /// Whether a worker is to log its error: the first one does, since the others are likely to
    /// be the same, again and again.
    pub fn may_warn(&self) -> bool {
        !self.has_warned.swap(true, SeqCst)
    }

    /// Has the next error be logged.
    pub fn forget_warning(&self) {
        self.has_warned.store(false, SeqCst);
    }

    /// Whether the list of a former upstream server is to be loaded, on a server that is not a
    /// standby.
    pub fn list_waits(&self) -> bool {
        self.list_waits.load(SeqCst)
    }

    pub fn set_list_waits(&self, waits: bool) {
        self.list_waits.store(waits, SeqCst);
    }

    /// Counts this session as one that waits for a list, until the guard is dropped or the
    /// session ends.
    pub fn wait(&self) -> Waiting<'_> {
        WAITS.store(true, Relaxed);
        self.waiting.fetch_add(1, SeqCst);
        Waiting(self)
    }

    /// Whether a session waits for a list.
    pub fn is_waited_for(&self) -> bool {
        self.waiting.load(SeqCst) > 0
    }

    /// Stops counting this session, if it is counted.
    pub fn end_wait(&self) {
        if WAITS.swap(false, Relaxed) {
            self.waiting.fetch_sub(1, SeqCst);
        }
    }

    /// Asks for a list to be fetched and loaded at once. Returns the request's number.
    pub fn request(&self) -> u32 {
        self.requested.fetch_add(1, SeqCst).wrapping_add(1)
    }

    /// The number of the last request.
    pub fn last_request(&self) -> u32 {
        self.requested.load(SeqCst)
    }

    /// Whether there are requests that were not fulfilled.
    pub fn is_requested(&self) -> bool {
        !self.is_fulfilled(self.last_request())
    }

    /// Whether that request was fulfilled.
    pub fn is_fulfilled(&self, request: u32) -> bool {
        request
            .wrapping_sub(self.fulfilled.load(SeqCst))
            .cast_signed()
            <= 0
    }

    /// Records that the requests up to that one are fulfilled, and whether it was possible.
    pub fn fulfil(&self, request: u32, has_succeeded: bool) {
        self.has_succeeded.store(has_succeeded, SeqCst);
        self.fulfilled.store(request, SeqCst);
    }

    pub fn has_succeeded(&self) -> bool {
        self.has_succeeded.load(SeqCst)
    }

    /// How many kB workers may load per second for the list; 0 means no limit.
    pub fn rate(&self) -> u32 {
        self.rate.load(SeqCst)
    }

    pub fn set_rate(&self, rate: u32) {
        self.rate.store(rate, SeqCst);
    }

    pub fn raised_until(&self) -> u64 {
        self.raised_until.load(SeqCst)
    }

    pub fn set_raised_until(&self, position: u64) {
        self.raised_until.store(position, SeqCst);
    }

    pub fn list(&self) -> ListCounts {
        // Before how many there are: see `set_list`.
        let hot_cached = self.hot_cached.load(SeqCst);
        ListCounts {
            time: self.list_time.load(SeqCst),
            blocks: self.list_blocks.load(SeqCst),
            hot: self.hot_blocks.load(SeqCst),
            hot_cached,
        }
    }

    pub fn set_list(&self, list: ListCounts) {
        self.list_blocks.store(list.blocks, SeqCst);
        // Never as many as are hot before they are.
        self.hot_cached.store(0, SeqCst);
        self.hot_blocks.store(list.hot, SeqCst);
        self.hot_cached.store(list.hot_cached, SeqCst);
        self.list_time.store(list.time, SeqCst);
    }

    pub fn totals(&self) -> Totals {
        Totals {
            blocks_loaded: self.blocks_loaded.load(SeqCst),
            blocks_replaced: self.blocks_replaced.load(SeqCst),
            bytes_received: self.bytes_received.load(SeqCst),
            lists_served: self.lists_served.load(SeqCst),
            last_served_time: self.last_served_time.load(SeqCst),
        }
    }

    /// Counts blocks that were loaded for a list, and how many others they have replaced.
    pub fn count_loaded(&self, loaded: u64, replaced: u64) {
        self.blocks_loaded.fetch_add(loaded, SeqCst);
        self.blocks_replaced.fetch_add(replaced, SeqCst);
    }

    pub fn count_received(&self, bytes: usize) {
        self.bytes_received.fetch_add(bytes as u64, SeqCst);
    }

    /// Counts a list that was served to its end.
    pub fn count_served(&self) {
        self.lists_served.fetch_add(1, SeqCst);
        self.last_served_time.store(process::now(), SeqCst);
    }

    /// Records which server lists come from.
    pub fn set_upstream(&self, host: &str, port: i32) {
        self.upstream_host.record(host);
        self.upstream_port.store(port, SeqCst);
    }

    /// Which server lists come from: host and port. `None` if there was no connection.
    pub fn upstream(&self) -> Option<(String, i32)> {
        let (host, _) = self.upstream_host.last()?;
        Some((host, self.upstream_port.load(SeqCst)))
    }
}

/// Whether this process is one that is counted in [`FollowState::waiting`].
static WAITS: AtomicBool = AtomicBool::new(false);

/// A session that waits for a list.
pub struct Waiting<'a>(&'a FollowState);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.end_wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_stage_and_result_is_read_back_as_itself() {
        let state = FollowState::new();
        for stage in Stage::ALL {
            state.set_stage(stage);
            assert_eq!(state.stage(), stage);
        }
        let fetch = state.begin_fetch();
        assert!(state.is_wanted(fetch));
        assert_eq!(state.fetch_result(fetch), None);
        for result in [
            FetchResult::Fetched,
            FetchResult::NoList,
            FetchResult::Refused,
            FetchResult::Failed,
        ] {
            state.report_fetch(fetch, result);
            assert_eq!(state.fetch_result(fetch), Some(result));
        }
        // What another fetch reports is not taken for the result of this one.
        assert_eq!(state.progress_of_fetch(fetch), FetchProgress::None);
        state.report_progress(fetch, 0);
        assert_eq!(state.progress_of_fetch(fetch), FetchProgress::Connected);
        state.report_progress(fetch, 7);
        assert_eq!(state.progress_of_fetch(fetch), FetchProgress::Received(7));
        let next = state.begin_fetch();
        assert_eq!(state.progress_of_fetch(next), FetchProgress::None);
        assert!(!state.is_wanted(fetch));
        assert_eq!(state.fetch_result(next), None);
    }

    #[test]
    fn a_request_is_fulfilled_by_a_round_that_began_after_it() {
        let state = FollowState::new();
        assert!(!state.is_requested());
        let first = state.request();
        assert!(state.is_requested());
        let second = state.request();
        state.fulfil(first, true);
        assert!(state.is_fulfilled(first) && !state.is_fulfilled(second));
        state.fulfil(second, false);
        assert!(state.is_fulfilled(second) && !state.is_requested());
    }
}
