//! Later tries of what a load had to leave because it was locked.
//!
//! A lock may be held for hours, and the load does not stay open for it. The leader keeps
//! the load's segment, where the chunks are that are still set aside, and from time to
//! time it starts one worker for them, in growing pauses. Meanwhile the load counts as
//! completed, and dumps go on. What is loaded then moves in the statistics from the
//! locked blocks to the loaded ones. The tries end when nothing is left, or when another
//! load begins.

use std::time::{Duration, Instant};

use super::state::State;
use super::supervise::Supervisor;
use crate::pg::process::error::log;
use crate::settings;

/// How long to wait after the load before the first try.
const FIRST_PAUSE: Duration = Duration::from_secs(5);

/// The longest pause if there are no dumps at intervals.
const LONGEST_PAUSE: Duration = Duration::from_secs(300);

/// What a load has left, and when it is tried again.
pub struct Later {
    supervisor: Supervisor,
    pause: Duration,
    stage: Stage,
}

#[derive(Clone, Copy)]
enum Stage {
    /// The next try begins at this time.
    Waiting(Instant),
    /// A try is under way, before which so many blocks had been loaded.
    Trying(u64),
}

impl Later {
    /// What this load, which has ended, has left. `None` if nothing was locked.
    pub fn of(supervisor: Supervisor) -> Option<Self> {
        let pause = pause_of(FIRST_PAUSE);
        (supervisor.count_set_aside() > 0).then(|| Self {
            supervisor,
            pause,
            stage: Stage::Waiting(Instant::now() + pause),
        })
    }

    /// Begins a try if one is due, and continues the one that is under way. Returns how
    /// long to wait before the next call, or until the latch is set. `None` if nothing is
    /// left to be tried.
    pub fn advance(&mut self, state: &State) -> Option<Duration> {
        let before = match self.stage {
            Stage::Waiting(next) if Instant::now() < next => return Some(next - Instant::now()),
            Stage::Waiting(_) => {
                self.supervisor.begin_later_try();
                loaded(state)
            }
            Stage::Trying(before) => before,
        };
        self.stage = Stage::Trying(before);
        match self.supervisor.advance() {
            Ok(Some(timeout)) => return Some(timeout),
            Ok(None) => {}
            Err(_) => self.supervisor.terminate_workers(),
        }
        if let Some(reason) = self.supervisor.ended_for() {
            self.supervisor.give_up_set_aside(reason);
        }
        let blocks = loaded(state) - before;
        if blocks > 0 {
            log(&format!(
                "autoprewarm prewarmed {blocks} blocks of relations that had been locked"
            ));
        }
        if self.supervisor.count_set_aside() == 0 {
            return None;
        }
        self.pause = pause_of(self.pause * 2);
        self.stage = Stage::Waiting(Instant::now() + self.pause);
        Some(self.pause)
    }

    /// Ends the tries, as another load begins.
    pub fn end(self) {
        self.supervisor.terminate_workers();
    }
}

/// A pause of that length, unless dumps come more often: they show what is loaded then.
fn pause_of(pause: Duration) -> Duration {
    pause.min(settings::autoprewarm_interval().unwrap_or(LONGEST_PAUSE))
}

/// How many blocks of the load are in shared buffers.
fn loaded(state: &State) -> u64 {
    let counts = state.load.counts();
    counts.loaded + counts.cached
}
