//! Following in SQL: the control functions, and the function behind the view
//! `pg_stat_autoprewarm_follow`, whose columns docs/reference.md describes.

use std::time::Duration;

use pgrx::prelude::*;

use super::state::Stage;
use crate::autoprewarm::sql::{duration, leader_is_coming};
use crate::autoprewarm::state::State;
use crate::autoprewarm::views::time;
use crate::error::Error;
use crate::pg::process::report::in_server_encoding;
use crate::pg::process::{self, latch, recovery};
use crate::{settings, wait_events};

/// How often a waiting caller checks the state.
const POLL: Duration = Duration::from_millis(50);

/// Has the leader fetch the upstream's list and load what is missing, and returns when that
/// is done. An error if it is not possible.
#[pg_extern(sql = false)]
fn autoprewarm_follow_now() {
    follow_now().unwrap_or_else(|error| error.raise());
}

fn follow_now() -> Result<(), Error> {
    let state = State::attach();
    if !recovery::is_in_progress() {
        return Err(Error::NotAStandby);
    }
    if !settings::autoprewarm_follow() {
        return Err(Error::NotFollowing);
    }
    let _waiting = state.follow.wait();
    let request = state.follow.request();
    while !state.follow.is_fulfilled(request) {
        // In this order: it may come in between.
        if !leader_is_coming(state) && state.leader().is_none() {
            return Err(Error::NoLeader);
        }
        state.wake_leader();
        latch::sleep(Some(POLL), &wait_events::FOLLOW);
    }
    match state.follow.has_succeeded() {
        true => Ok(()),
        false => {
            let error = state.follow.error.last();
            let message = error.map_or_else(String::new, |(message, _)| message);
            Err(Error::CouldNotFollow(in_server_encoding(&message)))
        }
    }
}

/// Whether that share of the upstream's hot blocks is cached here, by a list that is no
/// older than that: whether a promotion would find this standby warm. False where this is
/// no standby that follows.
#[pg_extern(sql = false)]
fn autoprewarm_failover_ready(coverage: f64, max_age: Interval) -> bool {
    failover_ready(coverage, max_age).unwrap_or_else(|error| error.raise())
}

fn failover_ready(coverage: f64, max_age: Interval) -> Result<bool, Error> {
    if !(0.0..=1.0).contains(&coverage) {
        return Err(Error::CoverageOutOfRange);
    }
    let max_age = duration(max_age, "max_age")?;
    let state = State::attach();
    let follows = state.follow.stage().follows();
    let list = state.follow.list();
    let age = u64::try_from(process::now().saturating_sub(list.time)).unwrap_or(0);
    let is_recent = max_age.is_none_or(|max_age| Duration::from_micros(age) <= max_age);
    let is_covered = list.hot_cached as f64 >= list.hot as f64 * coverage;
    Ok(follows && recovery::is_in_progress() && list.time != 0 && is_recent && is_covered)
}

/// The one row of `pg_stat_autoprewarm_follow`.
#[pg_extern(sql = false)]
#[allow(clippy::type_complexity)]
fn pg_stat_get_autoprewarm_follow() -> TableIterator<
    'static,
    (
        name!(pid, Option<i32>),
        name!(state, &'static str),
        name!(upstream_host, Option<String>),
        name!(upstream_port, Option<i32>),
        name!(list_time, Option<TimestampWithTimeZone>),
        name!(list_blocks, Option<i64>),
        name!(hot_blocks, Option<i64>),
        name!(hot_cached, Option<i64>),
        name!(blocks_loaded, i64),
        name!(blocks_replaced, i64),
        name!(bytes_received, i64),
        name!(lists_served, i64),
        name!(last_served_time, Option<TimestampWithTimeZone>),
        name!(last_error, Option<String>),
        name!(last_error_time, Option<TimestampWithTimeZone>),
    ),
> {
    let state = State::attach();
    let follow = &state.follow;
    let stage = match state.leader() {
        Some(_) => follow.stage(),
        None => Stage::Off,
    };
    let (list, totals, error) = (follow.list(), follow.totals(), follow.error.last());
    let list_time = time(list.time);
    let of_list = |number: u64| list_time.is_some().then_some(number as i64);
    let (host, port) = follow.upstream().unzip();
    // The blocks of the top-up that is under way are not in the total yet.
    let running = match follow.top_up.has_begun() {
        true => follow.top_up.counts().loaded,
        false => 0,
    };
    TableIterator::once((
        state.leader(),
        stage.name(),
        host.map(|host| in_server_encoding(&host)),
        port,
        list_time,
        of_list(list.blocks),
        of_list(list.hot),
        of_list(list.hot_cached),
        (totals.blocks_loaded + running) as i64,
        totals.blocks_replaced as i64,
        totals.bytes_received as i64,
        totals.lists_served as i64,
        time(totals.last_served_time),
        error
            .as_ref()
            .map(|(message, _)| in_server_encoding(message)),
        error.and_then(|(_, when)| time(when)),
    ))
}
