//! The leader's part in following: when the next list is fetched, how fast its blocks are
//! loaded, and when the standby is promoted.
//!
//! A round fetches a list and then loads what is missing of it. The next one begins an
//! interval later, even if blocks of the last list are still missing: the next list knows
//! better which. If a fetch fails, the pause grows, and a reload of the configuration ends
//! it.

use std::time::{Duration, Instant};

use pgrx::{PgLogLevel, PgSqlErrorCode};

use super::state::{FetchResult, Stage};
use super::top_up::{self, Memory, TopUp};
use super::{FETCHER, promote, stored};
use crate::autoprewarm::state::State;
use crate::autoprewarm::stats::LoadResult;
use crate::autoprewarm::supervise::Halt;
use crate::blocks::{Oid, UpstreamList};
use crate::pg::process::error::{log, log_message};
use crate::pg::process::report::Message;
use crate::pg::process::upstream::wal_receiver_timeout;
use crate::pg::process::{recovery, transaction};
use crate::pg::shared::worker::{Handle, Status};
use crate::pg::storage::database::Database;
use crate::settings;

/// How often the leader looks whether the standby is promoted.
const PROMOTION_POLL: Duration = Duration::from_millis(250);

/// How often the leader looks whether the worker that fetches has ended. Its latch is set
/// then, too.
const FETCH_POLL: Duration = Duration::from_millis(100);

/// How long a fetch may make no progress if `wal_receiver_timeout` does not say it.
const FETCH_TIMEOUT: Duration = Duration::from_secs(60);

/// How often the pause after a failure is doubled at most, and how long it is at most,
/// unless the interval is longer.
const MOST_DOUBLINGS: u32 = 6;
const LONGEST_PAUSE: Duration = Duration::from_secs(15 * 60);

/// Loading slows down while so many bytes of WAL have been received and not replayed.
const MOST_REPLAY_LAG: u64 = 64 << 20;

/// How often the leader looks at that.
const LAG_POLL: Duration = Duration::from_secs(1);

/// How often the rate is halved for it at most.
const MOST_RATE_HALVINGS: u32 = 6;

/// What is halved if the rate is not limited: kB per second.
const RATE_IF_UNLIMITED: u32 = 1 << 20;

pub struct Follower {
    state: &'static State,
    /// Whether this server is a standby, as far as was noticed.
    is_standby: bool,
    round: Round,
    memory: Memory,
    lag: Lag,
    /// How many fetches in a row have failed, and the error that was logged last.
    failures: u32,
    logged: Option<String>,
    upstream: Option<(String, i32)>,
}

/// How far the current round is.
enum Round {
    /// This server does not follow.
    None,
    /// The next round begins at this time.
    Waiting(Instant),
    Fetching(Fetch),
    ToppingUp {
        top_up: TopUp,
        /// When the next round begins.
        next: Instant,
        /// The last request that this round fulfils.
        request: u32,
    },
}

struct Fetch {
    worker: Handle,
    request: u32,
    began: Instant,
    /// How much had been received, and since when it has not been more.
    received: u64,
    last_progress: Instant,
    is_terminated: bool,
}

/// The pace of a top-up by how far replay is behind.
struct Lag {
    halvings: u32,
    next_look: Instant,
}

impl Lag {
    /// The rate, in kB per second.
    fn rate(&mut self) -> u32 {
        if Instant::now() >= self.next_look {
            self.next_look = Instant::now() + LAG_POLL;
            self.halvings = match recovery::replay_lag() >= MOST_REPLAY_LAG {
                true => (self.halvings + 1).min(MOST_RATE_HALVINGS),
                false => self.halvings.saturating_sub(1),
            };
        }
        match (settings::autoprewarm_follow_max_rate(), self.halvings) {
            (0, 0) => 0,
            (0, halvings) => RATE_IF_UNLIMITED >> halvings,
            (rate, halvings) => (rate >> halvings).max(1),
        }
    }
}

impl Follower {
    /// The leader's, which has just started.
    pub fn new(state: &'static State) -> Self {
        Self {
            state,
            is_standby: recovery::is_in_progress(),
            round: Round::None,
            memory: Memory::default(),
            lag: Lag {
                halvings: 0,
                next_look: Instant::now(),
            },
            failures: 0,
            logged: None,
            upstream: None,
        }
    }

    /// Goes on after a reload of the configuration.
    pub fn reload(&mut self) {
        if let Round::Waiting(next) = &mut self.round
            && self.failures > 0
        {
            *next = Instant::now();
        }
    }

    /// Whether this standby was promoted since the last call. It does not follow any more
    /// then.
    pub fn was_promoted(&mut self) -> bool {
        if !self.is_standby || !recovery::has_ended_or_will() {
            return false;
        }
        self.is_standby = false;
        let followed = settings::autoprewarm_follow();
        self.stop();
        followed
    }

    /// Loads the rest of the last list after the promotion.
    pub fn load_after_promotion(&mut self) {
        self.memory = Memory::default();
        promote::run(self.state);
    }

    /// Ends what is under way, since the leader is about to do something else. The next
    /// round begins anew.
    pub fn interrupt(&mut self) {
        if !matches!(self.round, Round::None) {
            self.end_round(false, "another load has begun");
            self.round = Round::Waiting(Instant::now());
        }
    }

    /// Does not follow any more, until [`Self::advance`] begins again.
    pub fn stop(&mut self) {
        let (stage, why) = match self.is_standby {
            true => (Stage::Off, "it was switched off"),
            false => (Stage::NotAStandby, "this server is not a standby"),
        };
        self.end_round(false, why);
        self.round = Round::None;
        self.state.follow.set_stage(stage);
    }

    /// Begins a round if one is due, and continues the one that is under way. Returns how
    /// long to wait before the next call, or until the latch is set. `None` if this server
    /// does not follow.
    pub fn advance(&mut self) -> Option<Duration> {
        if !self.is_standby || !settings::autoprewarm_follow() {
            self.stop();
            return None;
        }
        let wait = match std::mem::replace(&mut self.round, Round::None) {
            Round::None => {
                self.begin();
                Duration::ZERO
            }
            Round::Waiting(next) if Instant::now() < next && !self.state.follow.is_requested() => {
                self.round = Round::Waiting(next);
                next - Instant::now()
            }
            Round::Waiting(_) => {
                self.begin_fetch();
                FETCH_POLL
            }
            Round::Fetching(fetch) => {
                self.continue_fetch(fetch);
                FETCH_POLL
            }
            Round::ToppingUp {
                top_up,
                next,
                request,
            } => self.continue_top_up(top_up, next, request),
        };
        Some(wait.min(PROMOTION_POLL))
    }

    /// Begins to follow.
    fn begin(&mut self) {
        self.failures = 0;
        self.logged = None;
        self.state.follow.set_stage(Stage::Following);
        self.round = Round::Waiting(Instant::now());
    }

    fn begin_fetch(&mut self) {
        let request = self.state.follow.last_request();
        self.state.follow.begin_fetch();
        let Some(database) = self.database() else {
            return self.fail(request, Stage::Failed, "no database accepts connections");
        };
        let Some(worker) = FETCHER.start(database.into()) else {
            return self.fail(request, Stage::Failed, "no background worker slot is free");
        };
        self.round = Round::Fetching(Fetch {
            worker,
            request,
            began: Instant::now(),
            received: self.state.follow.totals().bytes_received,
            last_progress: Instant::now(),
            is_terminated: false,
        });
    }

    /// The database to which the worker that fetches is connected: `template1`, since
    /// nobody drops that.
    fn database(&self) -> Option<Oid> {
        const TEMPLATE1: Oid = 1;
        match transaction::run(Database::all) {
            Ok(databases) => {
                let accept = databases
                    .into_iter()
                    .filter(|(_, database)| database.accepts_connections);
                accept
                    .map(|(oid, _)| oid)
                    .min_by_key(|&oid| (oid != TEMPLATE1, oid))
            }
            Err(caught) => {
                self.state.warn(caught);
                None
            }
        }
    }

    fn continue_fetch(&mut self, mut fetch: Fetch) {
        // The status is read before the result, which comes first.
        let has_stopped = fetch.worker.status() == Status::Stopped;
        let result = self.state.follow.fetch_result();
        let (stage, message) = match result {
            Some(FetchResult::Fetched) => return self.begin_top_up(&fetch),
            Some(FetchResult::NoList) => (Stage::NoList, None),
            Some(FetchResult::Refused) => (Stage::Refused, None),
            Some(FetchResult::Failed) => (Stage::Failed, None),
            None if has_stopped && fetch.is_terminated => (
                Stage::Failed,
                Some("the upstream server has not answered in time"),
            ),
            None if has_stopped => (
                Stage::Failed,
                Some("the autoprewarm follower has exited unexpectedly"),
            ),
            None => {
                self.limit(&mut fetch);
                self.round = Round::Fetching(fetch);
                return;
            }
        };
        let message = message.map(str::to_owned).or_else(|| {
            let (message, _) = self.state.follow.error.last()?;
            Some(message)
        });
        self.fail(fetch.request, stage, &message.unwrap_or_default());
    }

    /// Ends a fetch that makes no progress.
    fn limit(&self, fetch: &mut Fetch) {
        let received = self.state.follow.totals().bytes_received;
        if received != fetch.received {
            fetch.received = received;
            fetch.last_progress = Instant::now();
        }
        let timeout = match wal_receiver_timeout() {
            0 => FETCH_TIMEOUT,
            milliseconds => Duration::from_millis(milliseconds),
        };
        if fetch.last_progress.elapsed() >= timeout {
            fetch.worker.terminate();
            fetch.is_terminated = true;
        }
    }

    fn begin_top_up(&mut self, fetch: &Fetch) {
        let list = match read_list() {
            Ok(list) => list,
            Err(message) => return self.fail(fetch.request, Stage::Failed, &message),
        };
        match top_up::begin(list, &mut self.memory, self.state) {
            Ok(top_up) => {
                self.report_success();
                self.state.follow.set_stage(Stage::ToppingUp);
                self.round = Round::ToppingUp {
                    top_up,
                    next: fetch.began + settings::autoprewarm_follow_interval(),
                    request: fetch.request,
                };
            }
            Err(error) => {
                self.state.follow.top_up.end(LoadResult::Failed);
                self.fail(fetch.request, Stage::Failed, &error.to_string());
            }
        }
    }

    fn continue_top_up(&mut self, mut top_up: TopUp, next: Instant, request: u32) -> Duration {
        self.state.follow.set_rate(self.lag.rate());
        let advanced = top_up.supervisor.advance();
        let failure = match advanced {
            Ok(Some(timeout)) if Instant::now() < next => {
                self.round = Round::ToppingUp {
                    top_up,
                    next,
                    request,
                };
                return timeout.min(next - Instant::now());
            }
            Ok(_) | Err(Halt::ShuttingDown) => None,
            Err(Halt::NoSlot) => Some("no background worker slot is free"),
            Err(Halt::NoProgress) => Some("autoprewarm workers keep exiting"),
        };
        self.end_top_up(top_up, LoadResult::Completed);
        let remembered = read_list().and_then(|list| {
            transaction::run(|_| top_up::remember(list, &mut self.memory, self.state))
                .map_err(|caught| caught.message)
        });
        let failure = failure.map(str::to_owned).or(remembered.err());
        match failure {
            Some(message) => self.fail(request, Stage::Failed, &message),
            None => {
                self.state.follow.set_stage(Stage::Following);
                self.state.follow.fulfil(request, true);
                self.round = Round::Waiting(next);
            }
        }
        Duration::ZERO
    }

    fn end_top_up(&mut self, top_up: TopUp, result: LoadResult) {
        top_up.end(&mut self.memory, self.state);
        self.state.follow.top_up.end(result);
    }

    /// Ends the round that is under way.
    fn end_round(&mut self, has_succeeded: bool, why: &str) {
        match std::mem::replace(&mut self.round, Round::None) {
            Round::None | Round::Waiting(_) => {}
            Round::Fetching(fetch) => fetch.worker.terminate(),
            Round::ToppingUp { top_up, .. } => self.end_top_up(top_up, LoadResult::Failed),
        }
        let follow = &self.state.follow;
        if follow.is_requested() {
            follow.error.record(why);
            follow.fulfil(follow.last_request(), has_succeeded);
        }
    }

    /// Logs a failure, unless it is the same as the last one, and waits for longer than
    /// after that.
    fn fail(&mut self, request: u32, stage: Stage, message: &str) {
        let follow = &self.state.follow;
        follow.error.record(message);
        follow.set_stage(stage);
        follow.fulfil(request, false);
        let interval = settings::autoprewarm_follow_interval();
        let pause = interval * (1 << self.failures.min(MOST_DOUBLINGS));
        let pause = pause.min(LONGEST_PAUSE.max(interval));
        self.failures += 1;
        self.round = Round::Waiting(Instant::now() + pause);
        if self.logged.as_deref() == Some(message) {
            return;
        }
        let sqlstate = match stage {
            Stage::Failed => PgSqlErrorCode::ERRCODE_CONNECTION_FAILURE,
            _ => PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
        };
        let primary = format!("autoprewarm could not follow the upstream server: {message}");
        let mut report = Message::new(sqlstate, &primary).detail(
            "It is tried again, after longer and longer pauses, and when the configuration is \
             reloaded.",
        );
        if stage == Stage::NoList {
            report = report.hint(
                "The upstream server needs pg_prewarm 2.0 in \"shared_preload_libraries\". To \
                 follow none, set \"pg_prewarm.autoprewarm_follow\" to off.",
            );
        }
        log_message(PgLogLevel::WARNING, report);
        self.logged = Some(message.to_owned());
    }

    /// Logs which server is followed if that has changed.
    fn report_success(&mut self) {
        let upstream = self.state.follow.upstream();
        if self.logged.take().is_some() || self.failures > 0 || upstream != self.upstream {
            let (host, port) = upstream.clone().unwrap_or_default();
            log(&format!(
                "autoprewarm follows the upstream server at host \"{host}\", port {port}"
            ));
        }
        self.failures = 0;
        self.upstream = upstream;
    }
}

/// The list that was fetched last. `Err` is why it cannot be read.
fn read_list() -> Result<UpstreamList, String> {
    match transaction::run(|_| stored::read()) {
        Ok(Ok(Some(stored))) => Ok(stored.list),
        Ok(Ok(None)) => Err(format!("file \"{}\" is missing", stored::FILE)),
        Ok(Err(error)) => Err(error.to_string()),
        Err(caught) => Err(caught.message),
    }
}
