//! Loading the list: the leader's side.
//!
//! The leader reads the list, makes the plan, puts it into shared memory, and
//! starts workers until all of it is claimed: as many at once as the settings and
//! the free slots allow, each in the database that has most left for it to do.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::time::Duration;

use pgrx::{PgLogLevel, PgSqlErrorCode, log};

use super::shared::{Claim, Cursor, Load as SharedLoad, MAX_WORKERS, Stage, WorkerArgument};
use super::state::State;
use super::{DUMP_FILE, WORKER};
use crate::blocks::list::{BlockList, ReadError};
use crate::blocks::plan::{Plan, PlanView};
use crate::blocks::trailer::Heats;
use crate::blocks::{Oid, SkipCounts, SkipReason};
use crate::error::Error;
use crate::pg::database::Database;
use crate::pg::dsm::Segment;
use crate::pg::error::new_report;
use crate::pg::worker::{Handle, Status};
use crate::pg::{buffer, file, process, transaction};
use crate::settings;

/// How long to wait before a worker that could not be started is tried again,
/// unless something happens before.
const RETRY: Duration = Duration::from_secs(1);

/// How often workers may fail to connect to a database; and how often, one after
/// another, to come that far.
const CONNECT_TRIES: u32 = 3;
const START_TRIES: u32 = 10;

/// Free buffers that are left alone. Several blocks are read at once, and which
/// buffers they take is settled later than that there are some: without a reserve
/// the last of a load could evict others.
const RESERVE: usize = 64;

/// What becomes of a list that cannot be loaded now.
const RETRIED: &str = "It is tried again after \"pg_prewarm.autoprewarm_interval\" and when the \
                       configuration is reloaded, and the list is not replaced before.";

/// Whether the list may be replaced by a new one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The load has ended: there is nothing more to be had from the list.
    Ended,
    /// The list is still to be loaded: the server shuts down in mid-load, or the
    /// list cannot be read as things are, which has been logged.
    StillDue,
}

/// Loads the list.
pub fn run(state: &State) -> Outcome {
    let _in_use = match state.use_dump_file() {
        Ok(in_use) => in_use,
        Err(pid) => {
            log!("skipping prewarm because block dump file is being written by PID {pid}");
            return Outcome::Ended;
        }
    };
    match transaction::run(Load::prepare) {
        Ok(Ok(Some(mut load))) => load.run(),
        Ok(Ok(None)) => Outcome::Ended,
        Ok(Err(error)) => {
            error.warn(&format!("{RETRIED} To go on without it, remove it."));
            Outcome::StillDue
        }
        Err(caught) => {
            caught.warn();
            Outcome::StillDue
        }
    }
}

/// A load under way.
struct Load {
    segment: Segment<SharedLoad, Cursor>,
    databases: Vec<LoadedDatabase>,
    /// Chunks that a dead worker has left, each with the index of its database.
    left_behind: Vec<(usize, Claim)>,
    /// Chunks that were handed out a second time.
    second_tries: Vec<u32>,
    workers: Vec<Worker>,
    /// Workers that died before they could do anything, one after another.
    failed_starts: u32,
    /// What the leader itself had to skip.
    skipped: SkipCounts,
    /// Records in the list.
    total: usize,
}

/// A database of the plan.
struct LoadedDatabase {
    oid: Oid,
    failed_connects: u32,
    /// No worker is started in it any more.
    given_up: bool,
}

/// A worker that was started.
struct Worker {
    handle: Handle,
    slot: usize,
    database: usize,
}

/// Why a load does not go on to its end.
enum Halt {
    ShuttingDown,
    /// Workers are started and die before they can do anything.
    NoWorkerLives,
}

impl Load {
    /// Reads the list and puts its plan into shared memory; nothing where there
    /// is no list.
    fn prepare() -> Result<Option<Self>, Error> {
        let Some(list) = read_list()? else {
            return Ok(None);
        };
        report_oddities(&list);
        let total = list.entries.len();
        let budget = buffer::count_free().saturating_sub(RESERVE);
        let plan = Plan::new(list, budget as u64)
            .map_err(|error| Error::ListTooLarge(error.to_string()))?;
        let mut skipped = SkipCounts::default();
        skipped.count(SkipReason::Illegal, plan.illegal());
        skipped.count(SkipReason::NoFreeBuffer, plan.over_budget());

        // Nothing is looked up, and so cached, for an empty list.
        let any = plan.databases().next();
        let existing = any.map_or_else(HashMap::new, |_| Database::all());
        let mut shared = None;
        let mut databases = Vec::new();
        for database in plan.databases() {
            if database.database == 0 {
                // Shared catalogs can be read from any database.
                shared = Some(database);
            } else if let Some(reason) = reason_to_skip(existing.get(&database.database)) {
                skipped.count(reason, database.blocks);
            } else {
                databases.push(database);
            }
        }
        let words = plan.words();
        let segment = Segment::<SharedLoad, Cursor>::create(databases.len(), words, |words| {
            plan.encode(words);
        });
        segment
            .header()
            .set_work(shared.as_ref(), segment.cells(), &databases);
        Ok(Some(Self {
            segment,
            databases: databases
                .iter()
                .map(|database| LoadedDatabase {
                    oid: database.database,
                    failed_connects: 0,
                    given_up: false,
                })
                .collect(),
            left_behind: Vec::new(),
            second_tries: Vec::new(),
            workers: Vec::new(),
            failed_starts: 0,
            skipped,
            total,
        }))
    }

    fn run(&mut self) -> Outcome {
        match self.keep_workers_running() {
            Ok(()) => {
                self.report();
                Outcome::Ended
            }
            Err(halt) => {
                for worker in &self.workers {
                    worker.handle.terminate();
                }
                if let Halt::NoWorkerLives = halt {
                    new_report(
                        PgSqlErrorCode::ERRCODE_INSUFFICIENT_RESOURCES,
                        "could not load blocks: autoprewarm workers do not come to work".to_owned(),
                        Some(format!("The server log may tell why. {RETRIED}")),
                    )
                    .report(PgLogLevel::WARNING);
                }
                Outcome::StillDue
            }
        }
    }

    /// Starts workers, and looks after them, until nothing is left to do.
    fn keep_workers_running(&mut self) -> Result<(), Halt> {
        let mut waiting_was_logged = false;
        loop {
            let failed = self.reap();
            // One that ended because everything does is no failure, and what it
            // left is no loss.
            if process::shutdown_requested() {
                return Err(Halt::ShuttingDown);
            }
            if self.failed_starts >= START_TRIES {
                return Err(Halt::NoWorkerLives);
            }
            let slots_are_short = !failed && self.start_workers();
            if self.workers.is_empty() {
                if !failed && !slots_are_short {
                    return Ok(());
                }
                if slots_are_short && !std::mem::replace(&mut waiting_was_logged, true) {
                    new_report(
                        PgSqlErrorCode::ERRCODE_INSUFFICIENT_RESOURCES,
                        "autoprewarm is waiting for a background worker slot".to_owned(),
                        Some("You may need to increase \"max_worker_processes\".".to_owned()),
                    )
                    .report(PgLogLevel::LOG);
                }
            }
            // A worker that finishes, starts or ends sets the latch.
            process::reload_configuration_if_due();
            process::sleep(Some(RETRY));
        }
    }

    /// Lets go of the workers that have finished or ended. True where one could
    /// not do its work, and another should not be started at once.
    fn reap(&mut self) -> bool {
        let mut failed = false;
        let mut deserted = Vec::new();
        let mut unconnected = Vec::new();
        let mut index = 0;
        while index < self.workers.len() {
            // Read first: a worker goes on while it has not stopped.
            let stopped = self.workers[index].handle.status() == Status::Stopped;
            let slot = &self.segment.header().workers[self.workers[index].slot];
            let (stage, claim) = (slot.stage(), slot.claim());
            // One that has finished need not be waited for: giving back all its
            // memory takes a process some time.
            if !stopped && stage != Stage::Finished {
                index += 1;
                continue;
            }
            let worker = self.workers.swap_remove(index);
            if stage >= Stage::Connected {
                self.failed_starts = 0;
            }
            match stage {
                Stage::Finished => {}
                Stage::Connected => {
                    self.leave_behind(worker.database, claim);
                    deserted.push(worker.database);
                }
                // That passes, most likely.
                Stage::NotStarted | Stage::Attached => {
                    let claim = claim.map(|claim| (worker.database, claim));
                    self.left_behind.extend(claim);
                    failed = true;
                    if stage == Stage::NotStarted {
                        self.failed_starts += 1;
                    } else if !unconnected.contains(&worker.database) {
                        unconnected.push(worker.database);
                    }
                }
            }
        }
        for database in deserted {
            if let Some(reason) = self.reason_to_skip_now(database) {
                self.give_up(database, reason);
            }
        }
        for database in unconnected {
            self.could_not_connect(database);
        }
        failed
    }

    /// A worker died at that chunk, which another may try once more.
    fn leave_behind(&mut self, database: usize, claim: Option<Claim>) {
        if let Some(claim) = claim
            && !self.second_tries.contains(&claim.chunk)
        {
            self.second_tries.push(claim.chunk);
            self.left_behind.push((database, claim));
        }
    }

    fn could_not_connect(&mut self, index: usize) {
        let reason = self.reason_to_skip_now(index);
        let database = &mut self.databases[index];
        database.failed_connects += 1;
        let tried_enough = database.failed_connects >= CONNECT_TRIES;
        if let Some(reason) = reason.or(tried_enough.then_some(SkipReason::NoDatabase)) {
            if !database.given_up {
                log!(
                    "autoprewarm could not connect to the database with OID {}",
                    database.oid
                );
            }
            self.give_up(index, reason);
        }
    }

    /// Why no worker is to be started in a database in which one has died: it may
    /// have been dropped meanwhile.
    fn reason_to_skip_now(&self, index: usize) -> Option<SkipReason> {
        match transaction::run(Database::all) {
            Ok(existing) => reason_to_skip(existing.get(&self.databases[index].oid)),
            Err(caught) => {
                caught.warn();
                None
            }
        }
    }

    /// Skips whatever of a database is left to be loaded.
    fn give_up(&mut self, index: usize, reason: SkipReason) {
        self.databases[index].given_up = true;
        let unclaimed = self.blocks_of(self.segment.cells()[index].close());
        self.skipped.count(reason, unclaimed);
        let plan = PlanView::new(self.segment.words());
        for (_, claim) in self
            .left_behind
            .extract_if(.., |(database, _)| *database == index)
        {
            let blocks = plan.chunk(claim.chunk).1.numbers().len() as u64;
            self.skipped.count(reason, blocks - u64::from(claim.done));
        }
    }

    /// Starts as many workers as there may be. True where there are too few
    /// slots for that.
    fn start_workers(&mut self) -> bool {
        while self.workers.len() < settings::autoprewarm_workers().min(MAX_WORKERS) {
            if !buffer::have_free_buffer() {
                self.segment.header().set_full();
            }
            let Some((database, first)) = self.next_database() else {
                return false;
            };
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
            self.left_behind.retain(|(_, claim)| Some(*claim) != first);
            self.workers.push(Worker {
                handle,
                slot,
                database,
            });
        }
        false
    }

    /// The database that the next worker is to be started in, and the chunk it is
    /// to begin with, if one was left behind; nothing where no further worker
    /// would have anything to do.
    fn next_database(&self) -> Option<(usize, Option<Claim>)> {
        if self.segment.header().is_full() {
            return None;
        }
        if let Some(&(database, claim)) = self.left_behind.last() {
            return Some((database, Some(claim)));
        }
        let mut workers = vec![0; self.databases.len()];
        for worker in &self.workers {
            workers[worker.database] += 1;
        }
        let chunks_for_each = |index: usize| {
            let cursor: &Cursor = &self.segment.cells()[index];
            cursor.unclaimed().len() / (workers[index] + 1)
        };
        (0..self.databases.len())
            .max_by_key(|&index| chunks_for_each(index))
            .filter(|&index| chunks_for_each(index) > 0)
            .map(|index| (index, None))
    }

    fn blocks_of(&self, chunks: Range<u32>) -> u64 {
        let plan = PlanView::new(self.segment.words());
        chunks
            .map(|index| plan.chunk(index).1.numbers().len() as u64)
            .sum()
    }

    /// The lines that end a load in the server's log.
    fn report(&self) {
        let load = self.segment.header();
        let counts = load.counts();
        let mut skipped = self.skipped + counts.skipped;
        let loaded = counts.loaded + counts.cached;
        let mut rest = self.total as u64 - (loaded + skipped.total()).min(self.total as u64);
        if load.is_full() {
            skipped.count(SkipReason::NoFreeBuffer, rest);
        } else {
            let shared = self.blocks_of(load.shared_unclaimed()).min(rest);
            skipped.count(SkipReason::NoDatabase, shared);
            rest -= shared;
            skipped.count(SkipReason::Interrupted, rest);
        }
        log!(
            "autoprewarm successfully prewarmed {loaded} of {} previously-loaded blocks",
            self.total
        );
        if skipped.total() > 0 {
            log!("autoprewarm skipped {skipped}");
        }
    }
}

/// Logs what is odd about a list, of which the rest is loaded.
fn report_oddities(list: &BlockList) {
    if let Some(line) = list.first_bad_line {
        new_report(
            PgSqlErrorCode::ERRCODE_DATA_CORRUPTED,
            format!("autoprewarm block dump file is corrupted at line {line}"),
            Some(format!(
                "Whatever else \"{DUMP_FILE}\" lists is loaded, and the next block dump replaces \
                 it."
            )),
        )
        .report(PgLogLevel::WARNING);
    }
    match list.heats {
        Heats::LeftAside(reason) => {
            log!("the heat of blocks in \"{DUMP_FILE}\" is left aside: {reason}");
        }
        Heats::Missing if !list.entries.is_empty() => {
            log!("\"{DUMP_FILE}\" does not tell the heat of blocks: all count as equally hot");
        }
        Heats::Missing | Heats::Saved => {}
    }
}

/// Reads the list; nothing where there is no file.
fn read_list() -> Result<Option<BlockList>, Error> {
    let failed = |source| Error::File {
        action: "read",
        path: DUMP_FILE,
        source,
    };
    let (file, size) = match file::open(DUMP_FILE) {
        Ok(opened) => opened,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    match BlockList::read(file::Interruptible(file), size) {
        Ok(list) => Ok(Some(list)),
        Err(ReadError::Io(error)) => Err(failed(error)),
        Err(error) => Err(Error::ListTooLarge(error.to_string())),
    }
}

/// Why no worker is to be started in a database, as `pg_database` has it.
fn reason_to_skip(database: Option<&Database>) -> Option<SkipReason> {
    match database {
        Some(database) if database.is_template => Some(SkipReason::TemplateDatabase),
        Some(database) if database.accepts_connections => None,
        _ => Some(SkipReason::NoDatabase),
    }
}
