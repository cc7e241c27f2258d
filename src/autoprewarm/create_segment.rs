//! Puts a plan into shared memory, for its workers: all of it, or the part with the highest
//! usage counts that fits.
//!
//! Dynamic shared memory may be shorter than memory: containers, for example, have 64 MB
//! of `/dev/shm`. The server then raises an ERROR when the segment is made. A plan of half
//! the blocks is tried next. It may leave some of the shared memory unused; but parallel
//! queries need some, too, while the load runs.

use std::collections::HashMap;

use pgrx::PgLogLevel;

use super::load::Prepared;
use super::load_segment::{Cursor, Load, Purpose};
use super::state::State;
use super::supervise::{Supervisor, reason_to_skip};
use crate::blocks::{CHUNK_BLOCKS, Oid, OverBudget, Plan, SkipReason};
use crate::pg::process::error::{Caught, log_message};
use crate::pg::process::memory::{or_raise, room_for};
use crate::pg::process::report::Message;
use crate::pg::process::transaction;
use crate::pg::shared::segment::Segment;
use crate::pg::storage::database::Database;
use crate::pg::storage::room::LoadRoom;

/// Puts the plan, or the part with the highest usage counts that fits, into shared memory.
/// Also returns what is left out.
pub fn create_segment(
    prepared: Prepared,
    state: &'static State,
) -> Result<(Supervisor, OverBudget), Caught> {
    let Prepared {
        mut plan,
        budget,
        purpose,
        existing,
    } = prepared;
    let stats = purpose.stats(state);
    let number = stats.number();
    let planned = plan.blocks();
    let mut refusal: Option<Caught> = None;
    let (layout, segment) = loop {
        let layout = Layout::of(&plan, &existing);
        let cursors = transaction::run(|_| layout.cursors(&plan))?;
        let room = match purpose {
            Purpose::List => LoadRoom::new(budget),
            Purpose::TopUp => LoadRoom::keeping_usage_counts(budget, state.follow.raised_until()),
        };
        let (shared, databases) = (layout.shared.clone(), layout.databases.len());
        let load = Load::new(number, purpose, shared, databases, room);
        // An ERROR leaves the segment's descriptor to the end of the transaction.
        let segment = transaction::run(|_| {
            let chunks = plan.chunk_sizes().len();
            Segment::create(load, &cursors, chunks, plan.words(), |words| {
                plan.encode(words)
            })
        });
        match segment {
            Ok(segment) => break (layout, segment),
            Err(caught)
                if caught.is_shortage_of_shared_memory()
                    && plan.blocks() / 2 >= CHUNK_BLOCKS.into() =>
            {
                refusal.get_or_insert(caught);
                let half = plan.blocks() / 2;
                transaction::run(|_| or_raise(|| plan.shrink(half)))?;
            }
            Err(caught) => return Err(refusal.unwrap_or(caught)),
        }
    };
    if let Some(refusal) = refusal {
        report_part(purpose, state, plan.blocks(), planned, &refusal);
        let left_out = planned - plan.blocks();
        stats.skip(number, SkipReason::NoSharedMemory, left_out);
    }
    for &(reason, blocks) in &layout.skipped {
        stats.skip(number, reason, blocks);
    }
    let databases = layout.databases.into_iter().map(|(database, _)| database);
    let supervisor = Supervisor::new(state, segment, databases, plan.list_has_first_tier());
    Ok((supervisor, plan.into_over_budget()))
}

/// Which chunks of a plan are loaded, and by which workers.
struct Layout {
    /// The chunks of shared catalogs. They can be read from any database, so they need
    /// no worker of their own.
    shared: std::ops::Range<u32>,
    /// The databases in which workers are started, and their chunks.
    databases: Vec<(Oid, std::ops::Range<u32>)>,
    /// The blocks of the other databases.
    skipped: Vec<(SkipReason, u64)>,
}

impl Layout {
    fn of(plan: &Plan, existing: &HashMap<Oid, Database>) -> Self {
        let mut layout = Self {
            shared: 0..0,
            databases: Vec::new(),
            skipped: Vec::new(),
        };
        for database in plan.databases() {
            if database.database == 0 {
                layout.shared = database.chunks;
            } else if let Some(reason) = reason_to_skip(existing.get(&database.database)) {
                layout.skipped.push((reason, database.blocks));
            } else {
                layout.databases.push((database.database, database.chunks));
            }
        }
        layout
    }

    /// The cursors of the databases, and then those of the chunks. Raises an ERROR if there
    /// is no memory for them.
    fn cursors(&self, plan: &Plan) -> Vec<Cursor> {
        let chunks = plan.chunk_sizes();
        let mut cursors = room_for(self.databases.len() + chunks.len());
        let of_databases = self.databases.iter().map(|(_, chunks)| chunks.clone());
        cursors.extend(of_databases.map(Cursor::new));
        cursors.extend(chunks.map(Cursor::new_of_chunk));
        cursors
    }
}

/// Says that only a part of the plan is loaded, and what the system has refused.
fn report_part(purpose: Purpose, state: &State, part: u64, planned: u64, refusal: &Caught) {
    let message = format!(
        "loading only {part} of {planned} blocks because of insufficient dynamic shared memory"
    );
    match purpose {
        Purpose::List => state.last_error.record(&message),
        Purpose::TopUp => {
            state.follow.error.record(&message);
            if !state.follow.may_warn() {
                return;
            }
        }
    }
    let detail = format!(
        "Shared memory for all blocks was refused: {}. The blocks with the highest usage counts \
         are loaded.",
        refusal.message
    );
    log_message(
        PgLogLevel::WARNING,
        Message::new(refusal.sqlstate, &message)
            .detail(&detail)
            .hint("You may need to provide more shared memory, for example a larger \"/dev/shm\"."),
    );
}
