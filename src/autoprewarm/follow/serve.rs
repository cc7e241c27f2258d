//! The upstream's side: a list of what is in shared buffers, as the value of the setting
//! `pg_prewarm.autoprewarm_list`.
//!
//! Replication connections cannot run queries, but they can `SHOW` settings. The first
//! `SHOW` looks through the buffers and returns the first chunk of the list in base64, each
//! further one returns the next chunk, and an empty one is the end. All other connections
//! are shown nothing.
//!
//! A standby that follows an upstream server itself passes that server's list on, as it
//! got it: its own usage counts are those of blocks that it has loaded for the list, which
//! would then feed itself.

use std::ffi::CString;
use std::sync::{Mutex, PoisonError};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use pgrx::PgSqlErrorCode;

use super::stored;
use crate::autoprewarm::state::State;
use crate::blocks::{Origin, UpstreamListBuilder};
use crate::error::Error;
use crate::pg::process::memory::{Infallible, fallible, infallible, room_for};
use crate::pg::process::report::{Message, raise};
use crate::pg::process::{self, check_for_interrupts, recovery};
use crate::pg::storage::{BLOCK_SIZE, buffer};
use crate::settings;

/// How many bytes of the list are shown at once: 3 MB in base64, which fit into the memory
/// that the standby's server has for them by default.
const CHUNK: usize = 9 << 18;

/// The list that is being shown.
struct Serving {
    list: Vec<u8>,
    shown: usize,
}

static SERVING: Mutex<Option<Serving>> = Mutex::new(None);

/// The next chunk of the list. Raises an ERROR if there is no memory for it.
pub fn next_chunk() -> CString {
    if !process::is_walsender() {
        return CString::default();
    }
    let state = State::attach();
    // Not while the list is composed, which may raise an ERROR.
    let serving = SERVING
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .take();
    let mut serving = serving.unwrap_or_else(|| Serving {
        list: list(state),
        shown: 0,
    });
    let rest = &serving.list[serving.shown..];
    if rest.is_empty() {
        if serving.shown > 0 {
            state.follow.count_served();
        }
        return CString::default();
    }
    let chunk = &rest[..rest.len().min(CHUNK)];
    let text = encode(chunk);
    serving.shown += chunk.len();
    *SERVING.lock().unwrap_or_else(PoisonError::into_inner) = Some(serving);
    text
}

fn encode(chunk: &[u8]) -> CString {
    let length = base64::encoded_len(chunk.len(), true).expect("a chunk is small");
    let mut text: Vec<u8> = room_for(length + 1);
    text.resize(length, 0);
    let encoded = STANDARD.encode_slice(chunk, &mut text);
    encoded.expect("there is room for it");
    CString::new(text).expect("base64 has no NUL")
}

/// The list. Empty if this is a standby that follows, and has none yet; and while a load of
/// this server's own is pending or running, since what is cached then is not what is used.
fn list(state: &State) -> Vec<u8> {
    if recovery::is_in_progress() && settings::autoprewarm_follow() {
        return match stored::read() {
            Ok(stored) => stored.map_or_else(Vec::new, |stored| stored.bytes),
            Err(error) => error.raise(),
        };
    }
    if state.load_is_pending() {
        return Vec::new();
    }
    let origin = Origin {
        system_identifier: recovery::system_identifier(),
        timeline: recovery::timeline(),
        time: process::now(),
        block_size: BLOCK_SIZE,
    };
    let list = fallible(|| {
        let mut builder = UpstreamListBuilder::default();
        // Unlogged relations are empty on a standby.
        for block in Infallible(buffer::cached_blocks()).filter(|block| block.permanent) {
            builder
                .push(&block.record, block.usage_count)
                .map_err(Error::from)?;
        }
        let mut tick = || infallible(check_for_interrupts);
        builder
            .finish(&origin, &mut tick)
            .map_err(|error| Error::ListTooLarge(error.to_string()))
    });
    list.unwrap_or_else(|error| {
        raise(Message::new(
            PgSqlErrorCode::ERRCODE_OUT_OF_MEMORY,
            &format!("could not compose the list of cached blocks: {error}"),
        ))
    })
}
