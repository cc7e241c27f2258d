//! What this process shows of itself: in `pg_stat_activity`, in its title, and in
//! `pg_stat_progress_prewarm`.

use std::cell::Cell;
use std::ffi::{CStr, CString};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use pgrx::pg_sys;

use super::compat;
use crate::blocks::{Fork, Oid};

/// What a process is waiting for. On 17 and later each has a name of its own in
/// `pg_stat_activity`, before they are all called `Extension`.
#[derive(Clone, Copy, Debug)]
pub enum WaitEvent {
    /// The leader, for the next dump or whatever it is asked for.
    Leader,
    /// The leader, for its workers.
    Load,
    /// A worker, for locked relations.
    LockedRelation,
    /// A worker, for what the rate limit allows.
    RateLimit,
    /// A caller, for the end of a load.
    LoadEnd,
    /// A caller or a parallel worker of it, for the others, so that somebody who
    /// waits for a relation can have it.
    Pause,
}

impl WaitEvent {
    fn name(self) -> &'static CStr {
        match self {
            Self::Leader => c"AutoprewarmLeaderMain",
            Self::Load => c"AutoprewarmLoad",
            Self::LockedRelation => c"AutoprewarmLockedRelation",
            Self::RateLimit => c"AutoprewarmRateLimit",
            Self::LoadEnd => c"AutoprewarmLoadEnd",
            Self::Pause => c"PrewarmPause",
        }
    }

    /// Its number in this server.
    pub fn id(self) -> u32 {
        static IDS: [AtomicU32; 6] = [const { AtomicU32::new(0) }; 6];
        let id = &IDS[self as usize];
        if id.load(Relaxed) == 0 {
            id.store(compat::wait_event(self.name()), Relaxed);
        }
        id.load(Relaxed)
    }
}

/// Shows what this process does, as its query and in its title. The text is in
/// the server's encoding, since it may name a database.
pub fn report(text: Vec<u8>) {
    let text = CString::new(text).unwrap_or_default();
    // SAFETY: a C string, which both copy.
    unsafe {
        pg_sys::pgstat_report_activity(pg_sys::BackendState::STATE_RUNNING, text.as_ptr());
        pg_sys::set_ps_display(text.as_ptr());
    }
}

/// Shows that this process does nothing but wait.
pub fn report_idle() {
    // SAFETY: as above.
    unsafe {
        pg_sys::pgstat_report_activity(pg_sys::BackendState::STATE_IDLE, c"".as_ptr());
        pg_sys::set_ps_display(c"".as_ptr());
    }
}

/// What a row of `pg_stat_progress_prewarm` is about.
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

/// How far a process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    pub kind: Kind,
    /// The relation being read, and its fork; 0 for none.
    pub relation: Oid,
    pub fork: Fork,
    pub total: u64,
    pub done: u64,
    pub skipped: u64,
    /// The server's timestamp of the beginning.
    pub start: i64,
}

/// Progress is kept where the server's own commands keep theirs, under a number
/// that is none of theirs: so the server sees to it that other processes read it
/// as a whole, and that it goes when the process or its transaction fails. With
/// `track_activities` off there is none, as there.
const COMMAND: pg_sys::ProgressCommandType::Type = 0x5057;

impl Progress {
    const FIELDS: [i32; 7] = [0, 1, 2, 3, 4, 5, 6];

    /// Shows it to others; but not within another command that shows its own,
    /// such as a COPY of a query that calls a function of ours.
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
        // SAFETY: as many fields as values, both fewer than the server keeps.
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

    /// Shows nothing any more.
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
            relation: values[1] as Oid,
            fork: Fork::from_number(values[2] as u32)?,
            total: values[3] as u64,
            done: values[4] as u64,
            skipped: values[5] as u64,
            start: values[6],
        })
    }
}

/// The progress of this process, which is shown anew whenever it changes.
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
        // An ERROR takes the row away with the transaction.
        if !std::thread::panicking() {
            progress.show();
        }
    }
}

/// Which command this process shows the progress of; nothing where it shows
/// nothing at all.
fn shown_command() -> Option<pg_sys::ProgressCommandType::Type> {
    // SAFETY: this process's own entry, where it has one, which no other changes.
    unsafe {
        let entry = pg_sys::MyBEEntry;
        (!entry.is_null()).then(|| (&raw const (*entry).st_progress_command).read_volatile())
    }
}

/// Every process that shows progress of ours: its ID, its database, and how far
/// it is.
pub fn all_progress() -> Vec<(i32, Oid, Progress)> {
    // SAFETY: the server's entries, copied for this transaction, counted from 1.
    unsafe {
        (1..=pg_sys::pgstat_fetch_stat_numbackends())
            .filter_map(|index| {
                let local = compat::backend_entry(index);
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
