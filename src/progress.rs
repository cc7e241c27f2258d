//! Progress reporting: the rows of `pg_stat_progress_prewarm`.

use std::cell::Cell;

use crate::blocks::{Fork, Oid};
use crate::pg::process::activity;

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

/// How many numbers a row is kept as.
const VALUES: usize = 7;

impl Progress {
    fn show(&self) {
        activity::show_progress::<VALUES>(&[
            self.kind as i64,
            i64::from(self.relation),
            self.fork as i64,
            self.total as i64,
            self.done as i64,
            self.skipped as i64,
            self.start,
        ]);
    }

    /// Removes the row of this process.
    pub fn end() {
        activity::end_progress();
    }

    /// All rows: process ID, database and progress.
    pub fn all() -> impl Iterator<Item = (i32, Oid, Self)> {
        let all = activity::all_progress().into_iter();
        all.filter_map(|(pid, database, values)| Some((pid, database, Self::from_values(values)?)))
    }

    fn from_values(
        [kind, relation, fork, total, done, skipped, start]: [i64; VALUES],
    ) -> Option<Self> {
        Some(Self {
            kind: *Kind::ALL.get(usize::try_from(kind).ok()?)?,
            relation: Oid::try_from(relation).ok()?,
            fork: Fork::from_number(u32::try_from(fork).ok()?)?,
            total: total as u64,
            done: done as u64,
            skipped: skipped as u64,
            start,
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
