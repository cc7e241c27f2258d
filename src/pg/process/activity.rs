//! What this process shows of itself: in `pg_stat_activity`, in its title, and in
//! `pg_stat_progress_prewarm`.

use std::cell::Cell;
use std::ffi::CString;

use pgrx::pg_sys;

use crate::blocks::{Fork, Oid};
use crate::pg::sys::version;

/// Shows what this process is doing, as its query and in its title. The text is in the
/// server's encoding, since it may have the name of a database.
pub fn report(text: Vec<u8>) {
    let text = CString::new(text).unwrap_or_default();
    // SAFETY: a C string, which both functions copy.
    unsafe {
        pg_sys::pgstat_report_activity(pg_sys::BackendState::STATE_RUNNING, text.as_ptr());
        pg_sys::set_ps_display(text.as_ptr());
    }
}

/// Shows that this process is idle.
pub fn report_idle() {
    // SAFETY: a C string, which both functions copy.
    unsafe {
        pg_sys::pgstat_report_activity(pg_sys::BackendState::STATE_IDLE, c"".as_ptr());
        pg_sys::set_ps_display(c"".as_ptr());
    }
}

/// The column `kind` of `pg_stat_progress_prewarm`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    LoadWorker,
    Prewarm,
    PrewarmRelation,
    PrewarmSchema,
    PrewarmDatabase,
    PrewarmWorker,
}

impl Kind {
    const ALL: [Self; 6] = [
        Self::LoadWorker,
        Self::Prewarm,
        Self::PrewarmRelation,
        Self::PrewarmSchema,
        Self::PrewarmDatabase,
        Self::PrewarmWorker,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::LoadWorker => "autoprewarm worker",
            Self::Prewarm => "pg_prewarm",
            Self::PrewarmRelation => "pg_prewarm_relation",
            Self::PrewarmSchema => "pg_prewarm_schema",
            Self::PrewarmDatabase => "pg_prewarm_database",
            Self::PrewarmWorker => "pg_prewarm worker",
        }
    }
}

/// A row of `pg_stat_progress_prewarm`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    pub kind: Kind,
    /// The OID of the relation that is being read; 0 if none is.
    pub relation: Oid,
    /// The fork that is being read.
    pub fork: Fork,
    /// Blocks to be read, read, and skipped.
    pub total: u64,
    pub done: u64,
    pub skipped: u64,
    /// When the process began, as a timestamp of the server.
    pub start: i64,
}

/// The command number of our progress, which no command of the server has. Progress is
/// kept where the server keeps that of its own commands. So other processes read a row as
/// a whole, a row is removed if the process or its transaction fails, and there is none if
/// `track_activities` is off.
const COMMAND: pg_sys::ProgressCommandType::Type = 0x5057;

impl Progress {
    const FIELDS: [i32; 7] = [0, 1, 2, 3, 4, 5, 6];

    /// Shows it to other processes, unless another command of this process shows its own
    /// progress: `COPY (SELECT pg_prewarm(…)) TO …` does.
    #[expect(
        clippy::cast_possible_truncation,
        reason = "there are fewer than PGSTAT_NUM_PROGRESS_PARAM values"
    )]
    pub fn show(&self) {
        let values = [
            self.kind as i64,
            i64::from(self.relation),
            self.fork as i64,
            self.total as i64,
            self.done as i64,
            self.skipped as i64,
            self.start,
        ];
        // SAFETY: as many fields as values, fewer than `PGSTAT_NUM_PROGRESS_PARAM`.
        unsafe {
            match shown_command() {
                Some(COMMAND) => {}
                Some(pg_sys::ProgressCommandType::PROGRESS_COMMAND_INVALID) => {
                    pg_sys::pgstat_progress_start_command(COMMAND, pg_sys::InvalidOid);
                }
                _ => return,
            }
            pg_sys::pgstat_progress_update_multi_param(
                values.len() as i32,
                Self::FIELDS.as_ptr(),
                values.as_ptr(),
            );
        }
    }

    /// Removes the row of this process.
    pub fn end() {
        // SAFETY: it changes this process's own entry.
        unsafe {
            if shown_command() == Some(COMMAND) {
                pg_sys::pgstat_progress_end_command();
            }
        }
    }

    fn from_values(values: &[i64]) -> Option<Self> {
        Some(Self {
            kind: *Kind::ALL.get(usize::try_from(values[0]).ok()?)?,
            relation: Oid::try_from(values[1]).ok()?,
            fork: Fork::from_number(u32::try_from(values[2]).ok()?)?,
            total: values[3] as u64,
            done: values[4] as u64,
            skipped: values[5] as u64,
            start: values[6],
        })
    }
}

/// The progress of this process, shown again after each change.
pub struct ShownProgress(Cell<Progress>);

impl ShownProgress {
    /// Nothing is shown before the first change.
    pub fn new(progress: Progress) -> Self {
        Self(Cell::new(progress))
    }

    pub fn get(&self) -> Progress {
        self.0.get()
    }

    pub fn change(&self, change: impl FnOnce(&mut Progress)) {
        let mut progress = self.0.get();
        change(&mut progress);
        self.0.set(progress);
        // After an ERROR the end of the transaction removes the row.
        if !std::thread::panicking() {
            progress.show();
        }
    }
}

/// The command whose progress this process shows. `None` if it has no entry among the
/// server's processes.
fn shown_command() -> Option<pg_sys::ProgressCommandType::Type> {
    // SAFETY: a non-null entry is this process's own, which no other process changes.
    unsafe {
        let entry = pg_sys::MyBEEntry;
        (!entry.is_null()).then(|| (&raw const (*entry).st_progress_command).read_volatile())
    }
}

/// All rows of `pg_stat_progress_prewarm`: process ID, database and progress.
pub fn all_progress() -> Vec<(i32, Oid, Progress)> {
    // SAFETY: as many entries as were counted. They are the server's copies, which stay
    // the same until the end of the transaction.
    unsafe {
        (1..=pg_sys::pgstat_fetch_stat_numbackends())
            .filter_map(|index| {
                let local = version::backend_entry(index);
                if local.is_null() {
                    return None;
                }
                let entry = &(*local).backendStatus;
                if entry.st_progress_command != COMMAND {
                    return None;
                }
                let progress = Progress::from_values(&entry.st_progress_param)?;
                Some((entry.st_procpid, entry.st_databaseid.to_u32(), progress))
            })
            .collect()
    }
}
