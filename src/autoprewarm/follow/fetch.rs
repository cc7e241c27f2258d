//! Fetching the upstream's list: a background worker that connects, fetches, checks and
//! stores it, and ends.
//!
//! It is connected to a database that nobody drops, since the server's client for
//! replication connections needs one, and for as short as possible. The upstream server
//! has a walsender for it meanwhile, one of `max_wal_senders`.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use pgrx::PgSqlErrorCode;

use super::state::FetchResult;
use super::{LIST_SETTING, stored};
use crate::autoprewarm::state::State;
use crate::blocks::{Oid, Origin, UpstreamList};
use crate::error::Error;
use crate::pg::process::error::Caught;
use crate::pg::process::memory::{fallible, or_raise};
use crate::pg::process::transaction::{self, Transaction};
use crate::pg::process::upstream::{Upstream, is_syntax_error, primary_conninfo};
use crate::pg::process::{activity, background, recovery};
use crate::pg::storage::BLOCK_SIZE;
use crate::settings;

/// Why no list was fetched.
struct Failure {
    result: FetchResult,
    sqlstate: PgSqlErrorCode,
    message: String,
}

impl Failure {
    fn new(sqlstate: PgSqlErrorCode, message: impl Into<String>) -> Self {
        Self {
            result: FetchResult::Failed,
            sqlstate,
            message: message.into(),
        }
    }

    /// The upstream server has none.
    fn no_list(why: &str) -> Self {
        Self {
            result: FetchResult::NoList,
            sqlstate: PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            message: format!("the upstream server has no block list: {why}"),
        }
    }

    /// It is not one for this server.
    fn refused(why: &str) -> Self {
        Self {
            result: FetchResult::Refused,
            sqlstate: PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            message: format!("the block list of the upstream server cannot be used: {why}"),
        }
    }
}

impl From<Caught> for Failure {
    fn from(caught: Caught) -> Self {
        let message = match caught.detail {
            // Its message may have a part of a password.
            _ if is_syntax_error(caught.sqlstate) => {
                let setting = match settings::autoprewarm_follow_conninfo() {
                    Some(_) => "pg_prewarm.autoprewarm_follow_conninfo",
                    None => "primary_conninfo",
                };
                format!("\"{setting}\" cannot be parsed as a connection string")
            }
            // libpq's reason, for example.
            Some(detail) => format!("{}: {detail}", caught.message),
            None => caught.message,
        };
        Self::new(caught.sqlstate, message)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::new(error.sqlstate(), error.to_string())
    }
}

/// The worker's argument, which has to fit into one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FetchArgument {
    /// The number of the fetch.
    pub fetch: u32,
    /// The database that the worker is connected to.
    pub database: Oid,
}

impl From<FetchArgument> for u64 {
    fn from(argument: FetchArgument) -> Self {
        u64::from(argument.fetch) << 32 | u64::from(argument.database)
    }
}

impl From<u64> for FetchArgument {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the lower 32 bits are the database, the upper ones the fetch"
    )]
    fn from(number: u64) -> Self {
        Self {
            fetch: (number >> 32) as u32,
            database: number as u32,
        }
    }
}

/// Runs the worker.
pub fn main(argument: FetchArgument) {
    let FetchArgument {
        fetch: number,
        database,
    } = argument;
    background::handle_signals_as_worker();
    background::connect_to_database(database);
    let state = State::attach();
    // The worker of a former leader writes the same file.
    let fetched = match state.follow.become_fetcher() {
        true => {
            activity::report(b"fetching the block list of the upstream server".to_vec());
            background::run_cancellable(|| {
                transaction::run(|transaction| fetch(transaction, number, state))
            })
        }
        false => Ok(Err(Failure::new(
            PgSqlErrorCode::ERRCODE_OBJECT_IN_USE,
            "another fetch is still under way",
        ))),
    };
    match fetched.map_err(Failure::from).flatten() {
        Ok(()) => state.follow.report_fetch(number, FetchResult::Fetched),
        // The leader has cancelled it.
        Err(_) if !state.follow.is_wanted(number) => {}
        Err(failure) => {
            state.follow.error.record(&failure.message);
            state.follow.record_sqlstate(failure.sqlstate);
            state.follow.report_fetch(number, failure.result);
        }
    }
    state.wake_leader();
}

fn fetch(transaction: &Transaction, number: u32, state: &State) -> Result<(), Failure> {
    // Until now, a cancel had no effect.
    if !state.follow.is_wanted(number) {
        return Ok(());
    }
    let conninfo = match settings::autoprewarm_follow_conninfo() {
        Some(conninfo) => conninfo,
        None => primary_conninfo(),
    };
    if conninfo.trim().is_empty() {
        return Err(Failure::new(
            PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            "\"primary_conninfo\" is not set",
        ));
    }
    let upstream = Upstream::connect(transaction, &conninfo).map_err(|message| {
        Failure::new(
            PgSqlErrorCode::ERRCODE_CONNECTION_FAILURE,
            format!("could not connect to the upstream server: {message}"),
        )
    })?;
    let (host, port) = upstream.host_and_port();
    state.follow.set_upstream(&host, port);
    state.follow.report_progress(number, 0);
    let bytes = receive(&upstream, number, state)?;
    drop(upstream);
    fallible(|| UpstreamList::read(&bytes))
        .map_err(|error| Failure::refused(&error.to_string()))?;
    stored::write(&bytes, || state.follow.is_wanted(number))?;
    Ok(())
}

/// Receives the chunks of the list. It is of this cluster, which is known before all of it is
/// here.
fn receive(upstream: &Upstream, number: u32, state: &State) -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    for chunks in 1.. {
        let text =
            upstream
                .show(LIST_SETTING)
                .map_err(|refusal| match refusal.is_unknown_setting() {
                    true => Failure::no_list("it has not preloaded this library"),
                    false => Failure::new(
                        refusal.sqlstate(),
                        format!(
                            "could not fetch the block list: {}",
                            refusal.message.trim_end()
                        ),
                    ),
                })?;
        if text.is_empty() {
            break;
        }
        let chunk = STANDARD
            .decode(&text)
            .map_err(|error| Failure::refused(&error.to_string()))?;
        or_raise(|| bytes.try_reserve(chunk.len()));
        bytes.extend_from_slice(&chunk);
        state.follow.count_received(chunk.len());
        state.follow.report_progress(number, chunks);
        // The upstream server may be anything.
        let announced = UpstreamList::announced(&bytes);
        if let Some(list) = announced.map_err(|error| Failure::refused(&error.to_string()))? {
            check(&list.origin)?;
            if bytes.len() as u64 > list.length {
                return Err(Failure::refused("it is longer than it says"));
            }
        }
    }
    match bytes.is_empty() {
        true => Err(Failure::no_list(
            "it is loading one itself, or has not fetched one yet",
        )),
        false => Ok(bytes),
    }
}

/// Whether the list is of this cluster, and of a server that this one can follow.
fn check(origin: &Origin) -> Result<(), Failure> {
    let (mine, timeline) = (recovery::system_identifier(), recovery::timeline());
    if origin.system_identifier != mine {
        return Err(Failure::refused(&format!(
            "its system identifier is {}, and that of this server is {mine}",
            origin.system_identifier
        )));
    }
    if origin.block_size != BLOCK_SIZE {
        return Err(Failure::refused(&format!(
            "its block size is {}, and that of this server is {BLOCK_SIZE}",
            origin.block_size
        )));
    }
    if origin.timeline < timeline {
        return Err(Failure::refused(&format!(
            "its timeline is {}, and this server is on timeline {timeline}",
            origin.timeline
        )));
    }
    Ok(())
}
