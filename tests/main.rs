//! Tests with real servers. Each test creates its own clusters and removes them.
//!
//! They need an installation of PostgreSQL with this extension, which `make test`
//! prepares. There is one file for each feature; `common` has what they share.

#![allow(clippy::cast_possible_truncation)]

mod common;

mod bad_files;
mod carry;
mod crash_loop;
mod discard;
mod failover;
mod follow;
mod functions;
mod give_way;
mod hold;
mod large;
mod list;
mod load;
mod neighbour;
mod relations;
mod resources;
mod restart;
mod room;
mod security;
mod settings;
mod short_memory;
mod shutdown;
mod slow_disk;
mod standby;
mod stat;
mod steer;
mod upgrade;
mod usage_count;
