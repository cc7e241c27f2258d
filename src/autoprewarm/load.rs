//! Loading the list: the leader's side.

use std::io;
use std::time::Duration;

use pgrx::{PgLogLevel, PgSqlErrorCode, log};

use super::state::State;
use super::worker::{Assignment, Stage};
use super::{DUMP_FILE, WORKER};
use crate::blocks::list::{BlockList, ReadError};
use crate::blocks::plan::{DatabasePlan, Plan};
use crate::blocks::{SkipCounts, SkipReason};
use crate::error::Error;
use crate::pg::database::Database;
use crate::pg::dsm::Segment;
use crate::pg::error::new_report;
use crate::pg::shmem::Shared;
use crate::pg::worker::{Handle, Status};
use crate::pg::{buffer, file, process, transaction};

/// How long to wait before a worker that could not be started is tried again,
/// unless something happens before.
const RETRY: Duration = Duration::from_secs(1);

/// How often a worker may fail to connect to its database.
const CONNECT_TRIES: u32 = 3;

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
        Ok(Ok(Some(load))) => load.run(),
        Ok(Ok(None)) => Outcome::Ended,
        Ok(Err(error)) => {
            error.warn(
                "It is tried again after \"pg_prewarm.autoprewarm_interval\" and when the \
                 configuration is reloaded, and not replaced before. To go on without it, \
                 remove it.",
            );
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
    /// The plan, and the assignment of the worker that is at it.
    segment: Segment<Assignment>,
    databases: Vec<DatabasePlan>,
    /// What the leader itself had to skip.
    skipped: SkipCounts,
    /// Records in the list.
    total: usize,
}

/// The server shuts down.
struct ShuttingDown;

impl Load {
    /// Reads the list and puts its plan into shared memory; nothing where there
    /// is no list.
    fn prepare() -> Result<Option<Self>, Error> {
        let Some(list) = read_list()? else {
            return Ok(None);
        };
        if let Some(line) = list.first_bad_line {
            new_report(
                PgSqlErrorCode::ERRCODE_DATA_CORRUPTED,
                format!("autoprewarm block dump file is corrupted at line {line}"),
                Some(format!(
                    "Whatever else \"{DUMP_FILE}\" lists is loaded, and the next block dump \
                     replaces it."
                )),
            )
            .report(PgLogLevel::WARNING);
        }
        let total = list.records.len();
        let plan = Plan::new(list.records).map_err(|_| Error::ListTooLarge)?;
        let mut skipped = SkipCounts::default();
        skipped.count(SkipReason::Illegal, plan.illegal());
        Ok(Some(Self {
            segment: Segment::create(Assignment::INITIAL, plan.words(), |words| {
                plan.encode(words);
            }),
            databases: plan.databases(),
            skipped,
            total,
        }))
    }

    fn run(mut self) -> Outcome {
        match self.load_databases() {
            Ok(()) => {
                self.report();
                Outcome::Ended
            }
            Err(ShuttingDown) => Outcome::StillDue,
        }
    }

    /// Loads one database after another.
    fn load_databases(&mut self) -> Result<(), ShuttingDown> {
        let mut databases = std::mem::take(&mut self.databases).into_iter().peekable();
        // Shared catalogs can be read from any database, so they ride with the
        // first that a worker connects to.
        let mut shared = databases.next_if(|database| database.database == 0);
        for database in databases {
            if process::shutdown_requested() {
                return Err(ShuttingDown);
            }
            if !buffer::have_free_buffer() {
                self.skipped
                    .count(SkipReason::NoFreeBuffer, database.blocks);
            } else if let Some(reason) = reason_to_skip(&database) {
                self.skipped.count(reason, database.blocks);
            } else if self.load_database(&database, shared.as_ref())? {
                shared = None;
            }
        }
        if let Some(shared) = shared {
            self.skipped.count(SkipReason::NoDatabase, shared.blocks);
        }
        Ok(())
    }

    /// Has a worker load a database, and the shared catalogs with it. False where
    /// no worker could connect to the database.
    fn load_database(
        &mut self,
        database: &DatabasePlan,
        shared: Option<&DatabasePlan>,
    ) -> Result<bool, ShuttingDown> {
        let assignment = self.segment.header();
        let blocks = database.blocks + shared.map_or(0, |shared| shared.blocks);
        let done_before = assignment.done();
        let mut failures = 0;
        loop {
            assignment.assign(
                database.database,
                shared.map_or(0..0, |shared| shared.segments.clone()),
                database.segments.clone(),
            );
            let worker = start_worker(self.segment.handle())?;
            wait_until_stopped(&worker)?;
            match assignment.stage() {
                Stage::Finished => return Ok(true),
                Stage::Connected => {
                    let rest = blocks.saturating_sub(assignment.done() - done_before);
                    self.skipped.count(SkipReason::Interrupted, rest);
                    return Ok(true);
                }
                // The postmaster could not start it: that passes.
                Stage::NotStarted => pause()?,
                Stage::Attached => {
                    failures += 1;
                    if let Some(reason) = reason_to_skip(database)
                        .or((failures == CONNECT_TRIES).then_some(SkipReason::NoDatabase))
                    {
                        log!(
                            "autoprewarm could not connect to the database with OID {}",
                            database.database
                        );
                        self.skipped.count(reason, database.blocks);
                        return Ok(false);
                    }
                    pause()?;
                }
            }
        }
    }

    /// The lines that end a load in the server's log.
    fn report(&self) {
        let assignment = self.segment.header();
        log!(
            "autoprewarm successfully prewarmed {} of {} previously-loaded blocks",
            assignment.loaded(),
            self.total
        );
        let skipped = self.skipped + assignment.skipped();
        if skipped.total() > 0 {
            log!("autoprewarm skipped {skipped}");
        }
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
        Err(ReadError::OutOfMemory(_)) => Err(Error::ListTooLarge),
    }
}

/// Why no worker is to be started in a database, as `pg_database` has it now.
fn reason_to_skip(database: &DatabasePlan) -> Option<SkipReason> {
    match transaction::run(|| Database::look_up(database.database)) {
        Ok(Some(found)) if found.is_template => Some(SkipReason::TemplateDatabase),
        Ok(Some(found)) if found.accepts_connections => None,
        Ok(_) => Some(SkipReason::NoDatabase),
        // Whether it can be connected to, the worker will find out.
        Err(caught) => {
            caught.warn();
            None
        }
    }
}

/// Starts a worker, waiting for a free slot for as long as it takes.
fn start_worker(segment: u32) -> Result<Handle, ShuttingDown> {
    let mut first_try = true;
    loop {
        if let Some(worker) = WORKER.start(segment) {
            return Ok(worker);
        }
        if first_try {
            new_report(
                PgSqlErrorCode::ERRCODE_INSUFFICIENT_RESOURCES,
                "autoprewarm is waiting for a background worker slot".to_owned(),
                Some("You may need to increase \"max_worker_processes\".".to_owned()),
            )
            .report(PgLogLevel::LOG);
            first_try = false;
        }
        pause()?;
    }
}

fn wait_until_stopped(worker: &Handle) -> Result<(), ShuttingDown> {
    while worker.status() != Status::Stopped {
        if process::shutdown_requested() {
            worker.terminate();
            return Err(ShuttingDown);
        }
        // The worker's end sets the latch.
        process::reload_configuration_if_due();
        process::sleep(Some(RETRY));
    }
    Ok(())
}

fn pause() -> Result<(), ShuttingDown> {
    process::reload_configuration_if_due();
    process::sleep(Some(RETRY));
    if process::shutdown_requested() {
        return Err(ShuttingDown);
    }
    Ok(())
}
