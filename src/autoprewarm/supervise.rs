//! The leader's supervision of a load: which worker is started when and where, and what
//! becomes of the chunks of those that die.
//!
//! As many workers run at once as the settings and the free background worker slots
//! allow. Each is started in the database with the most chunks left for each worker. The
//! rest of a dead worker's chunk is handed out again, and its database is set aside for a
//! moment. If workers keep exiting before any block is done, the load fails, and so it
//! does if there is no slot for a worker for a whole interval.
//!
//! Two background worker slots are left to others, unless that leaves none to the load.
//! Workers leave a database that a command needs without connections, such as `ALTER
//! DATABASE … RENAME`, and return after it.

use std::ops::Range;
use std::time::{Duration, Instant};

use pgrx::{PgLogLevel, PgSqlErrorCode};

use super::WORKER;
use super::left::Settled;
use super::load_segment::{Claim, Cursor, Load, MAX_WORKERS, Purpose, Stage, WorkerArgument};
use super::state::State;
use super::stats::LoadStats;
use crate::blocks::{Age, Oid, PlanView, Record, SkipReason, UsageCount};
use crate::pg::process::error::{catch, log, log_message};
use crate::pg::process::latch;
use crate::pg::process::report::Message;
use crate::pg::process::{self, activity, background, transaction};
use crate::pg::shared::segment::Segment;
use crate::pg::shared::slots;
use crate::pg::shared::worker::{Handle, Status};
use crate::pg::storage::database::{self, Database};
use crate::pg::storage::room::LoadRoom;
use crate::{settings, wait_events};

/// How long to wait before another worker is started after one could not be started,
/// or exited without loading anything.
const RETRY: Duration = Duration::from_secs(1);

/// How often the leader looks whether workers are to leave a database: often enough for a
/// command that gives up after five seconds, and that looks itself ten times a second.
const LOOK: Duration = Duration::from_millis(150);

/// How long workers have to leave a database by themselves. One may be waiting for a slow
/// disk, or for the lock on a catalog.
const LEAVE_TIMEOUT: Duration = Duration::from_millis(500);

/// How many background worker slots are left free.
const FREE_SLOTS: usize = 2;

/// How long a load waits for a background worker slot if there are no dumps at intervals.
pub const SLOT_TIMEOUT_WITHOUT_INTERVAL: Duration = Duration::from_secs(300);

/// How often workers may fail to connect to a database before it is skipped.
const CONNECT_TRIES: u32 = 3;

/// How many workers may die in a row without any block done in between before the load
/// fails, in addition to the number of workers that may be terminated all at once.
const FUTILE_EXITS: usize = 10;

/// How long workers have to exit by themselves after a load was cancelled.
const CANCEL_TIMEOUT: Duration = Duration::from_millis(100);

/// The supervision of a load in progress.
pub struct Supervisor {
    state: &'static State,
    segment: Segment<Load, Cursor>,
    databases: Vec<LoadedDatabase>,
    /// Chunks that dead workers have not completed, with the index of their database.
    abandoned: Vec<(usize, Claim)>,
    /// Where workers have died. After a second one has died at the same block, the
    /// chunk is not handed out again.
    died_at: Vec<Claim>,
    workers: Vec<Worker>,
    /// How many workers have died in a row without any block done in between.
    futile_exits: usize,
    /// How many blocks were left when the last worker died, or when the load began.
    rest_at_last_exit: u64,
    /// No worker is started before this time.
    next_start: Instant,
    cancelled_since: Option<Instant>,
    /// Since when there has been no worker, and no background worker slot for one.
    no_slot_since: Option<Instant>,
    waiting_was_logged: bool,
    next_look: Instant,
    /// Whether the list has two tiers. Otherwise all of it counts as the first.
    has_first_tier: bool,
    /// Where the first tier of shared catalogs ends.
    shared_first_tier_end: u32,
}

/// A database of the plan.
struct LoadedDatabase {
    oid: Oid,
    failed_connects: u32,
    /// Set after a worker has died in this database, perhaps because a command such as
    /// `DROP DATABASE` terminated it, and while a command needs it without connections. No
    /// worker is started in it before this time, and other databases come first until a worker
    /// has connected to it again.
    set_aside_until: Option<Instant>,
    /// Since when a command has needed this database without connections.
    wanted_alone_since: Option<Instant>,
    /// Whether the rest of this database was skipped, so that no worker is started in it.
    given_up: bool,
    /// Where its chunks of the first tier end.
    first_tier_end: u32,
}

impl LoadedDatabase {
    /// Starts no worker here for a second, and other databases come first until one has
    /// connected.
    fn set_aside(&mut self) {
        self.set_aside_until = Some(Instant::now() + RETRY);
    }

    fn end_set_aside(&mut self) {
        self.set_aside_until = None;
        self.wanted_alone_since = None;
    }

    /// Whether a worker may be started here.
    fn is_due(&self) -> bool {
        self.set_aside_until <= Some(Instant::now())
    }

    /// Whether held sessions wait for its first tier. A command that takes longer than a
    /// moment does not keep them waiting.
    fn is_waited_for(&self) -> bool {
        let since = self.wanted_alone_since;
        !self.given_up && since.is_none_or(|since| since.elapsed() < RETRY)
    }
}

/// A worker that was started.
struct Worker {
    handle: Handle,
    slot: usize,
    database: usize,
    /// Since when it has been asked to leave its database.
    asked_since: Option<Instant>,
}

/// Why a load stops before its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Halt {
    ShuttingDown,
    /// Workers keep exiting before loading any block.
    NoProgress,
    /// No background worker slot has been free for a whole interval.
    NoSlot,
}

impl Supervisor {
    /// Supervises the load in that segment, whose cursors are of these databases. The list
    /// may have a first tier that the plan lacks: one that was cached already.
    pub fn new(
        state: &'static State,
        segment: Segment<Load, Cursor>,
        databases: impl Iterator<Item = Oid>,
        has_first_tier: bool,
    ) -> Self {
        let plan = PlanView::new(segment.words());
        let cells = segment.cells();
        let first_tier_end = |chunks: Range<u32>| match has_first_tier {
            true => chunks
                .clone()
                .find(|&chunk| !plan.is_first_tier(chunk))
                .unwrap_or(chunks.end),
            false => chunks.end,
        };
        let databases = databases
            .zip(cells)
            .map(|(oid, cursor)| LoadedDatabase {
                oid,
                failed_connects: 0,
                set_aside_until: None,
                wanted_alone_since: None,
                given_up: false,
                first_tier_end: first_tier_end(cursor.unclaimed()),
            })
            .collect();
        let shared_first_tier_end = first_tier_end(segment.header().shared_unclaimed());
        Self {
            state,
            databases,
            has_first_tier,
            shared_first_tier_end,
            abandoned: Vec::new(),
            died_at: Vec::new(),
            workers: Vec::new(),
            futile_exits: 0,
            rest_at_last_exit: segment.header().purpose().stats(state).counts().rest(),
            next_start: Instant::now(),
            cancelled_since: None,
            no_slot_since: None,
            waiting_was_logged: false,
            next_look: Instant::now(),
            segment,
        }
    }

    /// Prepares for a try of what the load has set aside. No worker may be running.
    pub fn begin_later_try(&mut self) {
        let databases = self.databases.iter().map(|database| !database.given_up);
        self.segment.header().begin_later_try(
            self.stats().number(),
            self.segment.cells(),
            databases,
        );
        for database in &mut self.databases {
            database.end_set_aside();
            database.failed_connects = 0;
        }
        self.abandoned.clear();
        self.died_at.clear();
        self.futile_exits = 0;
        self.next_start = Instant::now();
    }

    /// How many blocks are set aside because their relations are locked.
    pub fn count_set_aside(&self) -> u64 {
        self.segment.header().count_set_aside(self.segment.cells())
    }

    /// What the load may fill.
    pub fn room(&self) -> &LoadRoom {
        &self.segment.header().room
    }

    /// Has the workers finish within a moment, and skips what is left, unless the load was
    /// ended before.
    pub fn interrupt(&self) {
        self.segment.header().end_for(SkipReason::Interrupted);
    }

    /// Has workers finish after the load was ended, for which one may have to give up its wait for
    /// a lock, and waits for that.
    pub fn finish_workers(&self, limit: Duration) {
        let since = Instant::now();
        let is_at_work = |worker: &Worker| {
            let stage = self.segment.header().workers[worker.slot].stage();
            matches!(stage, Stage::Connected | Stage::Retrying)
                && worker.handle.status() != Status::Stopped
        };
        for worker in self.workers.iter().filter(|worker| is_at_work(worker)) {
            worker.handle.interrupt();
        }
        while self.workers.iter().any(is_at_work)
            && since.elapsed() < limit
            && !background::shutdown_requested()
        {
            latch::sleep_as_worker(Some(Duration::from_millis(10)), &wait_events::LOAD);
        }
    }

    pub fn terminate_workers(&self) {
        for worker in &self.workers {
            worker.handle.terminate();
        }
    }

    /// Starts workers, and restarts those that die, until no blocks are left to be
    /// loaded.
    pub fn keep_workers_running(&mut self) -> Result<(), Halt> {
        while let Some(timeout) = self.advance()? {
            self.show_progress();
            latch::sleep_as_worker(Some(timeout), &wait_events::LOAD);
            process::reload_configuration_if_due();
        }
        Ok(())
    }

    /// Handles what has happened, and starts workers. Returns how long to wait before the
    /// next call, or until the latch is set: it is when a worker starts, finishes or
    /// exits, when the load is cancelled, and when the configuration is reloaded. `None`
    /// if no blocks are left to be loaded.
    pub fn advance(&mut self) -> Result<Option<Duration>, Halt> {
        let rate = match self.is_top_up() {
            true => self.state.follow.rate(),
            false => settings::autoprewarm_max_rate(),
        };
        let now = process::monotonic_micros();
        self.segment.header().rate_limit.set(rate, now);
        self.reap();
        // At shutdown, workers are terminated, which is not a failure, and their
        // chunks need not be handed out again.
        if background::shutdown_requested() {
            return Err(Halt::ShuttingDown);
        }
        if !self.is_top_up() && self.state.follow.list_comes_first() {
            self.interrupt();
        }
        if !self.is_top_up() && self.state.cancel_is_requested() {
            self.end_because_cancelled();
        } else if self.futile_exits >= FUTILE_EXITS + self.max_workers() {
            return Err(Halt::NoProgress);
        }
        if Instant::now() >= self.next_look {
            self.next_look = Instant::now() + LOOK;
            self.leave_databases();
        }
        let is_paused = Instant::now() < self.next_start;
        let slots_are_short = !is_paused && self.start_workers();
        self.end_hold_if_due();
        if self.workers.is_empty() {
            let is_waiting = is_paused || slots_are_short || self.has_set_aside();
            if self.segment.header().has_ended() || !is_waiting {
                return Ok(None);
            }
            if slots_are_short {
                self.wait_for_slot()?;
            }
        } else {
            self.no_slot_since = None;
        }
        Ok(Some(match self.cancelled_since {
            Some(_) => CANCEL_TIMEOUT,
            None if !self.workers.is_empty() || self.has_set_aside() => LOOK,
            None if is_paused => self.next_start - Instant::now(),
            None => RETRY,
        }))
    }

    /// Whether this is a top-up, which must not disturb a standby.
    fn is_top_up(&self) -> bool {
        self.segment.header().purpose() == Purpose::TopUp
    }

    /// Lets new sessions go on when the first tier is done, and when they have waited for long
    /// enough. Until then, has workers leave databases whose first tier is claimed for the one
    /// that has the most of it left for each worker.
    fn end_hold_if_due(&self) {
        let limit = settings::autoprewarm_hold_connections();
        if self.sessions_are_held()
            && (self.first_tier_is_done() || self.state.hold.load_time() >= limit)
        {
            self.state.hold.end();
        }
        let may_wait = |&index: &usize| {
            let database = &self.databases[index];
            database.is_waited_for() && database.is_due()
        };
        let left = |index: usize| self.first_tier_left(index);
        let waiting: Vec<usize> = match self.has_first_tier && self.sessions_are_held() {
            true => (0..self.databases.len()).filter(may_wait).collect(),
            false => Vec::new(),
        };
        let has_no_worker = |&index: &usize| left(index) > 0 && self.workers_in(index) == 0;
        // A chunk that a worker has left is for a new one.
        let mut abandoned = self.abandoned.iter().filter_map(|&(index, claim)| {
            (waiting.contains(&index) && self.is_of_first_tier(claim)).then_some(index)
        });
        let left_by_worker = abandoned.next();
        let header = self.segment.header();
        header.set_first_tier_has_no_worker(
            left_by_worker.is_some() || waiting.iter().any(has_no_worker),
        );
        header.set_first_tier_waits(
            left_by_worker.or_else(|| self.with_most(waiting.iter().copied(), left)),
        );
    }

    /// Whether new sessions wait for the first tier.
    fn sessions_are_held(&self) -> bool {
        !settings::autoprewarm_hold_connections().is_zero() && !self.state.hold.is_over()
    }

    /// How many chunks of a database's first tier no worker has claimed.
    fn first_tier_left(&self, index: usize) -> usize {
        let next = self.segment.cells()[index].unclaimed().start;
        self.databases[index].first_tier_end.saturating_sub(next) as usize
    }

    /// Whether all blocks of the first tier are loaded, skipped or set aside.
    fn first_tier_is_done(&self) -> bool {
        let header = self.segment.header();
        let is_at_it = |worker: &Worker| {
            let slot = &header.workers[worker.slot];
            // The stage is read first, since the worker leaves nothing claimed later.
            match (slot.stage(), slot.claim()) {
                // It is about to claim a chunk.
                (Stage::Connected, None) => true,
                (Stage::Finished, _) | (_, None) => false,
                (Stage::Retrying, Some(_)) if !slot.is_asked_to_leave() => false,
                (_, Some(claim)) => self.is_of_first_tier(claim),
            }
        };
        let is_waited_for = |index: usize| self.databases[index].is_waited_for();
        let is_claimed = |index| !is_waited_for(index) || self.first_tier_left(index) == 0;
        let is_abandoned =
            |&(index, claim): &(usize, Claim)| is_waited_for(index) && self.is_of_first_tier(claim);
        // Shared catalogs are loaded by a worker in any database.
        let shared_is_claimed = header.shared_unclaimed().start >= self.shared_first_tier_end
            || !(0..self.databases.len()).any(is_waited_for);
        shared_is_claimed
            && (0..self.databases.len()).all(is_claimed)
            && !self.workers.iter().any(is_at_it)
            && !self.abandoned.iter().any(is_abandoned)
    }

    fn is_of_first_tier(&self, claim: Claim) -> bool {
        let plan = PlanView::new(self.segment.words());
        !self.has_first_tier || plan.is_first_tier(claim.chunk)
    }

    fn end_because_cancelled(&mut self) {
        self.segment.header().end_for(SkipReason::Cancelled);
        self.state.hold.end();
        let since = *self.cancelled_since.get_or_insert_with(Instant::now);
        if since.elapsed() >= CANCEL_TIMEOUT {
            self.terminate_workers();
        } else {
            for worker in &self.workers {
                worker.handle.interrupt();
            }
        }
    }

    /// Notes that there is no slot for a worker. An error if that has lasted too long. A
    /// later try or a top-up does not wait: there is another one.
    fn wait_for_slot(&mut self) -> Result<(), Halt> {
        if self.segment.header().is_later_try() || self.is_top_up() {
            return Err(Halt::NoSlot);
        }
        // Sessions must not wait in vain.
        self.state.hold.end();
        let timeout = settings::autoprewarm_interval().unwrap_or(SLOT_TIMEOUT_WITHOUT_INTERVAL);
        let since = *self.no_slot_since.get_or_insert_with(Instant::now);
        if since.elapsed() >= timeout {
            return Err(Halt::NoSlot);
        }
        if !std::mem::replace(&mut self.waiting_was_logged, true) {
            log_message(
                PgLogLevel::LOG,
                Message::new(
                    PgSqlErrorCode::ERRCODE_INSUFFICIENT_RESOURCES,
                    "autoprewarm is waiting for a background worker slot",
                )
                .hint("You may need to increase \"max_worker_processes\"."),
            );
        }
        Ok(())
    }

    /// Has workers leave the databases that commands need without connections, and sets
    /// these databases aside.
    fn leave_databases(&mut self) {
        for index in 0..self.databases.len() {
            let was_wanted_alone = self.databases[index].wanted_alone_since.is_some();
            if self.workers_in(index) == 0 && !was_wanted_alone {
                continue;
            }
            if !self.set_aside_if_wanted_alone(index) {
                continue;
            }
            let header = self.segment.header();
            let workers = self.workers.iter_mut();
            for worker in workers.filter(|worker| worker.database == index) {
                header.workers[worker.slot].ask_to_leave();
                let since = *worker.asked_since.get_or_insert_with(Instant::now);
                if since.elapsed() < LEAVE_TIMEOUT {
                    worker.handle.interrupt();
                } else {
                    worker.handle.terminate();
                }
            }
        }
    }

    /// Sets a database aside if a command needs it without connections. Returns whether one
    /// does.
    fn set_aside_if_wanted_alone(&mut self, index: usize) -> bool {
        let database = &mut self.databases[index];
        let oid = database.oid;
        // Without room in the lock table, the leader looks again soon.
        let is_wanted_alone =
            transaction::run(|transaction| database::is_wanted_alone(transaction, oid))
                .unwrap_or(false);
        if is_wanted_alone {
            database.set_aside();
            database.wanted_alone_since.get_or_insert_with(Instant::now);
        } else {
            database.wanted_alone_since = None;
        }
        is_wanted_alone
    }

    /// Whether two slots stay free for others when one more worker is started. Workers
    /// that are not connected yet have slots that are not counted as taken.
    fn leaves_slots_to_others(&self) -> bool {
        let is_pending = |worker: &&Worker| {
            self.segment.header().workers[worker.slot].stage() < Stage::Connected
        };
        let pending = self.workers.iter().filter(is_pending).count();
        slots::count_free() > FREE_SLOTS + pending
    }

    /// The maximum number of workers at once. A later try or a top-up needs no speed.
    fn max_workers(&self) -> usize {
        match self.segment.header().is_later_try() || self.is_top_up() {
            true => 1,
            false => settings::autoprewarm_workers().min(MAX_WORKERS),
        }
    }

    /// Removes the workers that have finished or exited, and handles their chunks.
    fn reap(&mut self) {
        let mut unconnected = Vec::new();
        let mut index = 0;
        while index < self.workers.len() {
            // The status is read before the slot, which a running worker still changes.
            let stopped = self.workers[index].handle.status() == Status::Stopped;
            let slot = &self.segment.header().workers[self.workers[index].slot];
            let (stage, claim) = (slot.stage(), slot.claim());
            // The exit of a finished worker is not waited for: releasing its memory takes
            // a process some time.
            if !stopped && !matches!(stage, Stage::Left | Stage::Finished) {
                let database = &mut self.databases[self.workers[index].database];
                if stage >= Stage::Connected && database.is_due() {
                    database.end_set_aside();
                }
                index += 1;
                continue;
            }
            let worker = self.workers.swap_remove(index);
            match stage {
                Stage::Finished => {}
                // The database was set aside when the worker was asked to leave.
                Stage::Left => {
                    let claim = claim.map(|claim| (worker.database, claim));
                    self.abandoned.extend(claim);
                }
                Stage::Connected | Stage::Retrying => {
                    self.count_exit();
                    match claim {
                        Some(claim) if self.is_tried_later(stage) => self.set_aside(claim),
                        claim => self.requeue(worker.database, claim),
                    }
                    self.databases[worker.database].set_aside();
                }
                // It could not start or connect, most likely for a temporary reason, so it
                // is not held against the chunk.
                Stage::NotStarted | Stage::Attached => {
                    let claim = claim.map(|claim| (worker.database, claim));
                    self.abandoned.extend(claim);
                    self.pause();
                    if stage == Stage::NotStarted {
                        self.count_exit();
                    } else if !unconnected.contains(&worker.database) {
                        unconnected.push(worker.database);
                    }
                }
            }
        }
        self.segment.header().set_readers(self.workers.len());
        for database in unconnected {
            self.could_not_connect(database);
        }
    }

    /// Whether the chunk of a worker that died in this stage is tried later rather than
    /// handed out again.
    fn is_tried_later(&self, stage: Stage) -> bool {
        stage == Stage::Retrying || self.segment.header().is_later_try()
    }

    fn set_aside(&self, claim: Claim) {
        let (header, cells) = (self.segment.header(), self.segment.cells());
        header.set_aside(cells, claim);
    }

    /// Delays the start of the next worker.
    fn pause(&mut self) {
        self.next_start = Instant::now() + RETRY;
    }

    /// Counts a worker that died. The count starts over if a block was done since the
    /// previous one died.
    fn count_exit(&mut self) {
        let rest = self.stats().counts().rest();
        if rest == std::mem::replace(&mut self.rest_at_last_exit, rest) {
            self.futile_exits += 1;
            self.pause();
        } else {
            self.futile_exits = 0;
        }
    }

    /// Hands out the rest of a dead worker's chunk again, unless an earlier worker died
    /// at the same block.
    fn requeue(&mut self, database: usize, claim: Option<Claim>) {
        if let Some(claim) = claim
            && !self.died_at.contains(&claim)
        {
            self.died_at.push(claim);
            self.abandoned.push((database, claim));
        }
    }

    /// Skips a database that no worker can connect to, after some tries.
    fn could_not_connect(&mut self, index: usize) {
        let reason = self.reason_to_skip_now(index);
        let database = &mut self.databases[index];
        database.failed_connects += 1;
        let tried_enough = database.failed_connects >= CONNECT_TRIES;
        if let Some(reason) = reason.or(tried_enough.then_some(SkipReason::NoDatabase)) {
            if !database.given_up {
                log(&format!(
                    "autoprewarm worker could not connect to database with OID {}",
                    database.oid
                ));
            }
            self.give_up(index, reason);
        }
    }

    /// Why no worker is to be started in a database any more, by what `pg_database` says
    /// now. `None` if it can be loaded.
    fn reason_to_skip_now(&self, index: usize) -> Option<SkipReason> {
        match transaction::run(Database::all) {
            Ok(existing) => reason_to_skip(existing.get(&self.databases[index].oid)),
            Err(caught) => {
                self.state.warn(caught);
                None
            }
        }
    }

    /// Skips all blocks of a database that are left.
    fn give_up(&mut self, index: usize, reason: SkipReason) {
        self.databases[index].given_up = true;
        self.databases[index].end_set_aside();
        let unclaimed = self.blocks_left_of(self.segment.cells()[index].close());
        self.skip(reason, unclaimed);
        let abandoned: Vec<_> = self
            .abandoned
            .extract_if(.., |(database, _)| *database == index)
            .collect();
        let plan = PlanView::new(self.segment.words());
        for (_, claim) in abandoned {
            self.skip(reason, claim.blocks_left(plan) as u64);
        }
    }

    /// Starts as many workers as are allowed. Returns true if there are too few
    /// background worker slots.
    fn start_workers(&mut self) -> bool {
        while self.workers.len() < self.max_workers() {
            let Some((database, first)) = self.next_database() else {
                return false;
            };
            if self.databases[database].set_aside_until.is_some()
                && let Some(reason) = self.reason_to_skip_now(database)
            {
                self.give_up(database, reason);
                continue;
            }
            if self.set_aside_if_wanted_alone(database) {
                continue;
            }
            if !self.workers.is_empty() && !self.leaves_slots_to_others() {
                return false;
            }
            let load = self.segment.header();
            let readers = self.workers.len() + 1;
            // An interrupt may be served meanwhile, and raise an ERROR, which must not end the
            // leader.
            if catch(|| load.room.ahead(1, readers)).is_ok_and(|blocks| blocks == 0) {
                load.end_for(SkipReason::NoFreeBuffer);
                return false;
            }
            let taken: Vec<_> = self.workers.iter().map(|worker| worker.slot).collect();
            let slot = (0..MAX_WORKERS)
                .find(|slot| !taken.contains(slot))
                .expect("there are as many slots as workers");
            self.segment.header().workers[slot].assign(
                self.databases[database].oid,
                database,
                first,
            );
            let argument = WorkerArgument {
                segment: self.segment.handle(),
                slot,
            };
            let Some(handle) = WORKER.start(argument.into()) else {
                return true;
            };
            self.abandoned.retain(|(_, claim)| Some(*claim) != first);
            self.workers.push(Worker {
                handle,
                slot,
                database,
                asked_since: None,
            });
            self.segment.header().set_readers(self.workers.len());
        }
        false
    }

    /// The index of the database for the next worker, and the abandoned chunk that it
    /// begins with, if any. `None` if another worker would have nothing to do now.
    fn next_database(&self) -> Option<(usize, Option<Claim>)> {
        if self.segment.header().has_ended() {
            return None;
        }
        let is_due = |&index: &usize| self.databases[index].is_due();
        let is_set_aside = |&index: &usize| self.databases[index].set_aside_until.is_some();
        let (set_aside, others): (Vec<_>, Vec<_>) = (0..self.databases.len())
            .filter(is_due)
            .partition(is_set_aside);
        let of_tier = |first_only: bool| {
            self.next_of(&others, first_only)
                .or_else(|| self.next_of(&set_aside, first_only))
        };
        let first_tier = self.sessions_are_held().then(|| of_tier(true));
        first_tier.flatten().or_else(|| of_tier(false))
    }

    /// Like [`Self::next_database`], but chooses among the given databases, and perhaps among
    /// the chunks of the first tier only.
    fn next_of(&self, databases: &[usize], first_only: bool) -> Option<(usize, Option<Claim>)> {
        let mut abandoned = self.abandoned.iter().rev();
        if let Some(&(database, claim)) = abandoned.find(|(database, claim)| {
            databases.contains(database) && (!first_only || self.is_of_first_tier(*claim))
        }) {
            return Some((database, Some(claim)));
        }
        let chunks = |index: usize| match first_only {
            true => self.first_tier_left(index),
            false => self.segment.cells()[index].unclaimed().len(),
        };
        let database = self.with_most(databases.iter().copied(), chunks);
        database.map(|index| (index, None))
    }

    /// The one of these databases that would have the most chunks for each worker, with another
    /// worker. `None` if none has a chunk for that.
    fn with_most(
        &self,
        databases: impl Iterator<Item = usize>,
        chunks: impl Fn(usize) -> usize,
    ) -> Option<usize> {
        let for_each = |&index: &usize| chunks(index) / (self.workers_in(index) + 1);
        databases
            .max_by_key(for_each)
            .filter(|index| for_each(index) > 0)
    }

    fn workers_in(&self, index: usize) -> usize {
        let workers = self.workers.iter();
        workers.filter(|worker| worker.database == index).count()
    }

    /// Whether a database that is set aside has blocks left.
    fn has_set_aside(&self) -> bool {
        self.databases.iter().enumerate().any(|(index, database)| {
            database.set_aside_until.is_some()
                && (!self.segment.cells()[index].unclaimed().is_empty()
                    || self.abandoned.iter().any(|(of, _)| *of == index))
        })
    }

    /// How many blocks these chunks have left that no worker has claimed. In a later try
    /// those are the blocks that were set aside, which are not set aside any more then.
    fn blocks_left_of(&self, chunks: Range<u32>) -> u64 {
        let plan = PlanView::new(self.segment.words());
        let (header, cells) = (self.segment.header(), self.segment.cells());
        chunks
            .filter_map(|chunk| match header.is_later_try() {
                true => header.take_set_aside(cells, chunk),
                false => Some(Claim { chunk, done: 0 }),
            })
            .map(|claim| claim.blocks_left(plan) as u64)
            .sum()
    }

    fn stats(&self) -> &LoadStats {
        self.segment.header().purpose().stats(self.state)
    }

    fn skip(&self, reason: SkipReason, blocks: u64) {
        let header = self.segment.header();
        self.stats().skip(header.number(), reason, blocks);
        if header.is_later_try() {
            self.stats()
                .take_back(header.number(), SkipReason::Locked, blocks);
        }
    }

    fn show_progress(&self) {
        let counts = self.stats().counts();
        let done = counts.total - counts.rest();
        activity::report(format!("loading, {done} of {} blocks", counts.total).into_bytes());
    }

    /// Why the load was ended before all blocks were loaded, if it was.
    pub fn ended_for(&self) -> Option<SkipReason> {
        self.segment.header().ended_for()
    }

    /// Counts the blocks that are set aside as skipped for another reason than a lock, and
    /// does not try them again.
    pub fn give_up_set_aside(&self, reason: SkipReason) {
        let chunks = PlanView::new(self.segment.words()).chunks();
        let blocks = self.blocks_left_of(0..chunks);
        self.skip(reason, blocks);
    }

    /// The records of blocks that were neither loaded nor skipped for good. The workers
    /// are done.
    pub fn left(&self) -> impl Iterator<Item = (Record, UsageCount, Age)> {
        let settled = Settled::of(&self.segment);
        let plan = PlanView::new(self.segment.words());
        // No database of the list can be loaded, so blocks of shared catalogs cannot.
        if self.ended_for().is_none() {
            for chunk in self.segment.header().shared_unclaimed() {
                settled.settle(chunk, plan.chunk(chunk).1.numbers().len());
            }
        }
        settled.rest(plan)
    }

    /// Counts the blocks that are left as skipped.
    pub fn skip_rest(&self) {
        if self.ended_for().is_none() {
            self.skip(SkipReason::Locked, self.count_set_aside());
        }
        let rest = self.stats().counts().rest();
        if let Some(reason) = self.ended_for() {
            self.skip(reason, rest);
        } else {
            let shared = self.segment.header().shared_unclaimed();
            let shared = self.blocks_left_of(shared).min(rest);
            self.skip(SkipReason::NoDatabase, shared);
            self.skip(SkipReason::Interrupted, rest - shared);
        }
    }
}

/// Why no worker is to be started in a database, given its row in `pg_database`. `None`
/// if it can be loaded.
pub fn reason_to_skip(database: Option<&Database>) -> Option<SkipReason> {
    match database {
        Some(database) if database.is_template => Some(SkipReason::TemplateDatabase),
        Some(database) if database.accepts_connections => None,
        _ => Some(SkipReason::NoDatabase),
    }
}
