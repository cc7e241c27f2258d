//! The leader's part in following: when the next list is fetched, how fast its blocks are
//! loaded, and when the standby is promoted.
//!
//! A round fetches a list and then loads what is missing of it. The next one begins an
//! interval later, even if blocks of the last list are still missing: the next list knows
//! better which. Only a round that a session waits for is not cut short. If a fetch fails,
//! the pause grows, and a reload of the configuration ends it.
//!
//! The list stays on disk until its blocks are loaded after a promotion. So if that load is
//! interrupted, by a shutdown or a crash, the next leader of a server that is not a standby
//! finds the list, and loads it after the server's own.

use std::time::{Duration, Instant};

use pgrx::{PgLogLevel, PgSqlErrorCode};

use super::fetch::FetchArgument;
use super::state::{FetchProgress, FetchResult, Stage};
use super::top_up::{self, Memory, TopUp};
use super::{FETCHER, promote, stored};
use crate::autoprewarm::mark::{self, Mark};
use crate::autoprewarm::state::State;
use crate::autoprewarm::stats::LoadResult;
use crate::autoprewarm::supervise::Halt;
use crate::blocks::{Oid, UpstreamList};
use crate::error::Error;
use crate::pg::process::error::{Caught, log, log_message};
use crate::pg::process::report::Message;
use crate::pg::process::upstream::wal_receiver_timeout;
use crate::pg::process::{background, latch, recovery, transaction};
use crate::pg::shared::worker::{Handle, Status};
use crate::pg::storage::database::Database;
use crate::{settings, wait_events};

/// How often the leader looks whether the standby is promoted.
const PROMOTION_POLL: Duration = Duration::from_millis(250);

/// How often the leader looks whether the worker that fetches has ended. Its latch is set
/// then, too.
const FETCH_POLL: Duration = Duration::from_millis(100);

/// How long a fetch may make no progress if `wal_receiver_timeout` does not say it; and how
/// long the upstream server has to look through its buffers, whatever that says.
const FETCH_TIMEOUT: Duration = Duration::from_secs(60);

/// After this time a fetch that was cancelled is terminated.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(5);

/// How long the leader waits for the end of a fetch at a promotion. It may be storing its list.
const STORE_TIMEOUT: Duration = Duration::from_secs(1);

/// How often the pause after a failed fetch is doubled at most, and how long it is at most,
/// unless the interval is longer.
const MOST_DOUBLINGS: u32 = 6;
const LONGEST_PAUSE: Duration = Duration::from_secs(15 * 60);

/// When a load after a promotion is tried again if there are no dumps at intervals.
const RETRY_WITHOUT_INTERVAL: Duration = Duration::from_secs(300);

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
    role: Role,
    round: Round,
    memory: Memory,
    lag: Lag,
    /// The worker of a fetch that was cancelled, and when.
    cancelled: Option<(Handle, Instant)>,
    /// How many fetches in a row have failed, and the failure that was logged last.
    failures: u32,
    logged: Option<String>,
    upstream: Option<(String, i32)>,
}

/// What this server is, as far as was noticed.
enum Role {
    Standby,
    /// It is not a standby, and the list of its former upstream server is to be loaded at
    /// this time, if there is one.
    Promoted {
        when: Instant,
        is_retry: bool,
    },
    Primary,
}

/// How far the current round is.
enum Round {
    /// This server does not follow.
    None,
    /// The next round begins at this time.
    Waiting(Instant),
    Fetching(Fetch),
    ToppingUp(Box<Running>),
}

struct Fetch {
    worker: Handle,
    number: u32,
    /// The last request that this round fulfils.
    request: u32,
    began: Instant,
    /// How far it had come, and when that was first seen.
    progress: FetchProgress,
    last_progress: Instant,
}

struct Running {
    top_up: TopUp,
    /// That it is under way, on disk; `None` if it has nothing to load.
    mark: Option<Mark>,
    /// When the next round begins.
    next: Instant,
    request: u32,
}

/// Why a round has ended without success.
enum Failure {
    /// No list was fetched, or it cannot be used.
    Fetch(Stage, Reason),
    /// Its blocks could not be loaded.
    TopUp(String),
}

/// A reason: the code of the error, and its message.
struct Reason {
    sqlstate: PgSqlErrorCode,
    message: String,
}

impl Reason {
    fn new(sqlstate: PgSqlErrorCode, message: &str) -> Self {
        Self {
            sqlstate,
            message: message.to_owned(),
        }
    }
}

impl From<Caught> for Reason {
    fn from(caught: Caught) -> Self {
        Self {
            sqlstate: caught.sqlstate,
            message: caught.message,
        }
    }
}

impl From<Error> for Reason {
    fn from(error: Error) -> Self {
        Self {
            sqlstate: error.sqlstate(),
            message: error.to_string(),
        }
    }
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
        let role = match recovery::is_in_progress() {
            true => Role::Standby,
            false => Role::Promoted {
                when: Instant::now(),
                is_retry: true,
            },
        };
        // From now on a promotion counts as a pending load.
        if matches!(role, Role::Standby) && settings::autoprewarm_follow() {
            state.follow.set_stage(Stage::Following);
        }
        let list_waits = matches!(role, Role::Promoted { .. })
            && settings::autoprewarm_follow()
            && stored::exists();
        state.follow.set_list_waits(list_waits);
        // What a former leader has left, which nobody else would end.
        if state.follow.top_up.has_begun() {
            state.follow.top_up.end(LoadResult::Failed);
            mark::remove(&mark::TOP_UPS, state);
        }
        if let Some(pid) = state.follow.fetcher() {
            background::terminate(pid);
        }
        Self {
            state,
            role,
            round: Round::None,
            memory: Memory::default(),
            lag: Lag {
                halvings: 0,
                next_look: Instant::now(),
            },
            cancelled: None,
            failures: 0,
            logged: None,
            upstream: None,
        }
    }

    /// Goes on after a reload of the configuration.
    pub fn reload(&mut self) {
        if let Round::Waiting(next) = &mut self.round {
            *next = match self.failures {
                0 => (*next).min(Instant::now() + settings::autoprewarm_follow_interval()),
                _ => Instant::now(),
            };
        }
    }

    /// Whether the rest of the last list is to be loaded now, since this standby was promoted.
    pub fn was_promoted(&mut self) -> bool {
        if matches!(self.role, Role::Standby) && recovery::has_ended_or_will() {
            self.end_fetch();
            self.end_round("this server was promoted");
            self.round = Round::None;
            self.role = Role::Promoted {
                when: Instant::now(),
                is_retry: false,
            };
        }
        match self.role {
            Role::Promoted { when, .. } if Instant::now() >= when => {
                let has_list = stored::exists();
                let loads = has_list && settings::autoprewarm_follow();
                if !loads {
                    self.role = Role::Primary;
                    self.state.follow.set_stage(Stage::NotAStandby);
                    self.state.follow.set_list_waits(false);
                }
                if has_list && !loads {
                    self.remove_list();
                }
                loads
            }
            _ => false,
        }
    }

    /// Loads the rest of the last list.
    pub fn load_after_promotion(&mut self) {
        self.memory = Memory::default();
        let is_retry = !matches!(
            self.role,
            Role::Promoted {
                is_retry: false,
                ..
            }
        );
        self.role = match promote::run(self.state, is_retry) {
            true => Role::Primary,
            false => Role::Promoted {
                when: Instant::now()
                    + settings::autoprewarm_interval().unwrap_or(RETRY_WITHOUT_INTERVAL),
                is_retry: true,
            },
        };
    }

    fn remove_list(&self) {
        if let Err(caught) = transaction::run(|_| stored::remove()) {
            self.state.warn(caught);
        }
    }

    /// Ends what is under way, since the leader is about to do something else. The next
    /// round begins anew.
    pub fn interrupt(&mut self) {
        if !matches!(self.round, Round::None) {
            self.end_round("another load has begun");
            self.state.follow.set_stage(Stage::Following);
            self.round = Round::Waiting(Instant::now());
        }
    }

    /// Does not follow any more, until [`Self::advance`] begins again.
    pub fn stop(&mut self) {
        self.end_round(match self.role {
            Role::Standby => "it was switched off",
            Role::Promoted { .. } | Role::Primary => "this server was promoted",
        });
        self.round = Round::None;
        self.state.follow.set_stage(match self.role {
            Role::Standby => Stage::Off,
            Role::Promoted { .. } | Role::Primary => Stage::NotAStandby,
        });
    }

    /// Begins a round if one is due, and continues the one that is under way. Returns how
    /// long to wait before the next call, or until the latch is set. `None` if nothing is to
    /// be done.
    pub fn advance(&mut self) -> Option<Duration> {
        let poll = self.cancelled_fetch_runs().then_some(FETCH_POLL);
        match self.role {
            Role::Standby if settings::autoprewarm_follow() => {}
            Role::Promoted { when, .. } => {
                let wait = when.saturating_duration_since(Instant::now());
                return Some(poll.map_or(wait, |poll| wait.min(poll)));
            }
            Role::Standby | Role::Primary => {
                self.stop();
                return poll;
            }
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
            // Or that of a former leader.
            Round::Waiting(next) if poll.is_some() || self.state.follow.fetcher().is_some() => {
                self.round = Round::Waiting(next);
                FETCH_POLL
            }
            Round::Waiting(_) => {
                self.begin_fetch();
                FETCH_POLL
            }
            Round::Fetching(fetch) => {
                self.continue_fetch(fetch);
                FETCH_POLL
            }
            Round::ToppingUp(running) => self.continue_top_up(running),
        };
        Some(wait.min(PROMOTION_POLL))
    }

    /// Whether a fetch that was cancelled has not ended yet.
    fn cancelled_fetch_runs(&mut self) -> bool {
        if let Some((worker, since)) = &self.cancelled {
            if worker.status() == Status::Stopped {
                self.cancelled = None;
            } else if since.elapsed() >= CANCEL_TIMEOUT {
                worker.terminate();
            }
        }
        self.cancelled.is_some()
    }

    /// Begins to follow.
    fn begin(&mut self) {
        self.failures = 0;
        self.logged = None;
        self.state.follow.forget_warning();
        self.state.follow.set_stage(Stage::Following);
        self.round = Round::Waiting(Instant::now());
    }

    fn begin_fetch(&mut self) {
        let request = self.state.follow.last_request();
        let number = self.state.follow.begin_fetch();
        let failed = |reason| Failure::Fetch(Stage::Failed, reason);
        let database = match transaction::run(Database::all) {
            Ok(databases) => database_of(databases.into_iter()),
            Err(caught) => return self.fail(request, failed(caught.into())),
        };
        let Some(database) = database else {
            let reason = Reason::new(
                PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
                "no database accepts connections",
            );
            return self.fail(request, failed(reason));
        };
        let argument = FetchArgument {
            fetch: number,
            database,
        };
        let Some(worker) = FETCHER.start(argument.into()) else {
            let reason = Reason::new(
                PgSqlErrorCode::ERRCODE_INSUFFICIENT_RESOURCES,
                "no background worker slot is free",
            );
            return self.fail(request, failed(reason));
        };
        self.round = Round::Fetching(Fetch {
            worker,
            number,
            request,
            began: Instant::now(),
            progress: FetchProgress::None,
            last_progress: Instant::now(),
        });
    }

    fn continue_fetch(&mut self, mut fetch: Fetch) {
        // The status is read before the result, which comes first.
        let has_stopped = fetch.worker.status() == Status::Stopped;
        let reason = || {
            let error = self.state.follow.error.last();
            Reason {
                sqlstate: self.state.follow.sqlstate(),
                message: error.map_or_else(String::new, |(message, _)| message),
            }
        };
        let failed = |message| {
            let reason = Reason::new(PgSqlErrorCode::ERRCODE_CONNECTION_FAILURE, message);
            (Stage::Failed, reason)
        };
        let request = fetch.request;
        let (stage, reason) = match self.state.follow.fetch_result(fetch.number) {
            Some(FetchResult::Fetched) => return self.begin_top_up(&fetch),
            Some(FetchResult::NoList) => (Stage::NoList, reason()),
            Some(FetchResult::Refused) => (Stage::Refused, reason()),
            Some(FetchResult::Failed) => (Stage::Failed, reason()),
            None if has_stopped => failed("the autoprewarm follower has exited unexpectedly"),
            None if self.hangs(&mut fetch) => {
                self.cancel_fetch(fetch);
                failed("the upstream server has not answered in time")
            }
            None => {
                self.round = Round::Fetching(fetch);
                return;
            }
        };
        self.fail(request, Failure::Fetch(stage, reason));
    }

    /// Whether a fetch makes no progress.
    fn hangs(&self, fetch: &mut Fetch) -> bool {
        let progress = self.state.follow.progress_of_fetch(fetch.number);
        if progress != fetch.progress {
            fetch.progress = progress;
            fetch.last_progress = Instant::now();
        }
        let timeout = match wal_receiver_timeout() {
            0 => FETCH_TIMEOUT,
            milliseconds => Duration::from_millis(milliseconds),
        };
        let timeout = match progress {
            FetchProgress::Connected => timeout.max(FETCH_TIMEOUT),
            FetchProgress::None | FetchProgress::Received(_) => timeout,
        };
        fetch.last_progress.elapsed() >= timeout
    }

    /// Cancels a fetch, whose list is not wanted any more.
    fn cancel_fetch(&mut self, fetch: Fetch) {
        self.state.follow.begin_fetch();
        cancel(&fetch.worker);
        self.cancelled = Some((fetch.worker, Instant::now()));
    }

    /// Cancels a fetch, if one is under way, but lets it store a list that it has received.
    fn end_fetch(&mut self) {
        if let Round::Fetching(fetch) = &self.round {
            cancel(&fetch.worker);
            let since = Instant::now();
            while fetch.worker.status() != Status::Stopped && since.elapsed() < STORE_TIMEOUT {
                latch::sleep_as_worker(Some(Duration::from_millis(10)), &wait_events::LEADER_MAIN);
            }
        }
    }

    fn begin_top_up(&mut self, fetch: &Fetch) {
        let list = match read_list() {
            Ok(list) => list,
            Err(reason) => {
                return self.fail(fetch.request, Failure::Fetch(Stage::Failed, reason));
            }
        };
        self.report_success();
        // A session that asks for it knows of the crashes.
        let was_requested = self.state.follow.is_waited_for();
        if !was_requested && let Err(crashes) = mark::check(&mark::TOP_UPS) {
            let why = crashes.describe(&mark::TOP_UPS);
            return self.fail(fetch.request, Failure::TopUp(why));
        }
        match top_up::begin(list, &mut self.memory, self.state) {
            Ok(top_up) => {
                let has_any = self.state.follow.top_up.counts().rest() > 0;
                let mark = has_any
                    .then(|| mark::begin(&mark::TOP_UPS, self.state, was_requested).ok())
                    .flatten();
                self.state.follow.set_stage(Stage::ToppingUp);
                self.round = Round::ToppingUp(Box::new(Running {
                    top_up,
                    mark,
                    next: fetch.began + settings::autoprewarm_follow_interval(),
                    request: fetch.request,
                }));
            }
            Err(error) => {
                self.state.follow.top_up.end(LoadResult::Failed);
                self.fail(fetch.request, Failure::TopUp(error.to_string()));
            }
        }
    }

    fn continue_top_up(&mut self, mut running: Box<Running>) -> Duration {
        self.state.follow.set_rate(self.lag.rate());
        let is_over = Instant::now() >= running.next;
        if is_over && !self.state.follow.is_waited_for() {
            running.top_up.supervisor.interrupt();
        }
        let failure = match running.top_up.supervisor.advance() {
            Ok(Some(timeout)) => {
                self.round = Round::ToppingUp(running);
                return timeout;
            }
            // The leader is about to end the round.
            Err(Halt::ShuttingDown) => {
                self.round = Round::ToppingUp(running);
                return Duration::ZERO;
            }
            Ok(None) => None,
            Err(Halt::NoSlot) => Some("no background worker slot is free".to_owned()),
            Err(Halt::NoProgress) => Some("autoprewarm workers keep exiting".to_owned()),
        };
        let (next, request) = (running.next, running.request);
        self.end_top_up(*running, LoadResult::Completed);
        match failure.or(self.remember().err()) {
            Some(message) => self.fail(request, Failure::TopUp(message)),
            None => {
                self.state.follow.set_stage(Stage::Following);
                self.state.follow.fulfil(request, true);
                self.logged = None;
                self.round = Round::Waiting(next);
            }
        }
        Duration::ZERO
    }

    /// Looks at what is cached of the last list. `Err` is why that is not possible.
    fn remember(&mut self) -> Result<(), String> {
        let list = read_list().map_err(|reason| reason.message)?;
        transaction::run(|_| top_up::remember(list, &mut self.memory, self.state))
            .map_err(|caught| caught.message)
    }

    fn end_top_up(&mut self, running: Running, result: LoadResult) {
        running.top_up.end(&mut self.memory, self.state);
        self.state.follow.top_up.end(result);
        if let Some(mark) = running.mark {
            mark.end();
        }
    }

    /// Ends the round that is under way, if there is one.
    fn end_round(&mut self, why: &str) {
        match std::mem::replace(&mut self.round, Round::None) {
            Round::None | Round::Waiting(_) => {}
            Round::Fetching(fetch) => self.cancel_fetch(fetch),
            Round::ToppingUp(running) => self.end_top_up(*running, LoadResult::Failed),
        }
        let follow = &self.state.follow;
        if follow.is_requested() {
            follow.error.record(why);
            follow.fulfil(follow.last_request(), false);
        }
    }

    /// Logs a failure, unless it is the same as the last one. The next round begins after an
    /// interval; after failed fetches in a row, after longer and longer ones.
    fn fail(&mut self, request: u32, failure: Failure) {
        let interval = settings::autoprewarm_follow_interval();
        let (stage, primary, message, sqlstate, pause) = match &failure {
            Failure::Fetch(stage, reason) => {
                let pause = interval * (1 << self.failures.min(MOST_DOUBLINGS));
                self.failures += 1;
                // What is cached of the old list may have changed meanwhile.
                let _ = self.remember();
                (
                    *stage,
                    "autoprewarm could not follow the upstream server",
                    &reason.message,
                    reason.sqlstate,
                    pause.min(LONGEST_PAUSE.max(interval)),
                )
            }
            Failure::TopUp(message) => (
                Stage::Failed,
                "autoprewarm could not load blocks of the upstream server's list",
                message,
                PgSqlErrorCode::ERRCODE_INSUFFICIENT_RESOURCES,
                interval,
            ),
        };
        let follow = &self.state.follow;
        follow.error.record(message);
        follow.set_stage(stage);
        follow.fulfil(request, false);
        self.round = Round::Waiting(Instant::now() + pause);
        if self.logged.as_ref() == Some(message) {
            return;
        }
        let primary = format!("{primary}: {message}");
        let mut report = Message::new(sqlstate, &primary);
        if let Failure::Fetch(..) = failure {
            report = report.detail(
                "The fetch is retried after increasing pauses, and when the configuration is \
                 reloaded.",
            );
        }
        if stage == Stage::NoList {
            report = report.hint(
                "If this does not change, check that the upstream server has pg_prewarm 2.0 in \
                 \"shared_preload_libraries\". To follow none, set \
                 \"pg_prewarm.autoprewarm_follow\" to off.",
            );
        }
        log_message(PgLogLevel::WARNING, report);
        self.logged = Some(message.to_owned());
    }

    /// Logs which server is followed if that has changed.
    fn report_success(&mut self) {
        let upstream = self.state.follow.upstream();
        if self.failures > 0 || upstream != self.upstream {
            let (host, port) = upstream.clone().unwrap_or_default();
            log(&format!(
                "autoprewarm follows the upstream server at host \"{host}\", port {port}"
            ));
            self.logged = None;
        }
        self.failures = 0;
        self.upstream = upstream;
    }
}

/// Cancels a fetch. One that has not begun is not started.
fn cancel(worker: &Handle) {
    match worker.status() {
        Status::NotYetStarted => worker.terminate(),
        Status::Started | Status::Stopped => worker.interrupt(),
    }
}

/// The database to which the worker that fetches is connected: `template1`, since nobody
/// drops that.
fn database_of(databases: impl Iterator<Item = (Oid, Database)>) -> Option<Oid> {
    const TEMPLATE1: Oid = 1;
    databases
        .filter(|(_, database)| database.accepts_connections)
        .map(|(oid, _)| oid)
        .min_by_key(|&oid| (oid != TEMPLATE1, oid))
}

/// The list that was fetched last. `Err` is why it cannot be read.
fn read_list() -> Result<UpstreamList, Reason> {
    match transaction::run(|_| stored::read())?? {
        Some(stored) => Ok(stored.list),
        None => Err(Reason::new(
            PgSqlErrorCode::ERRCODE_UNDEFINED_FILE,
            &format!("file \"{}\" is missing", stored::FILE),
        )),
    }
}
