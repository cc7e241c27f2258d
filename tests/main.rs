//! Tests with real servers: each makes clusters of its own and throws them away.
//!
//! They need an installation of PostgreSQL with this extension in it, which
//! `make test` prepares. One file a capability; what they share is in `common`.

mod common;

mod bad_files;
mod carry;
mod discard;
mod functions;
mod list;
mod load;
mod neighbour;
mod relations;
mod resources;
mod restart;
mod security;
mod settings;
mod slow_disk;
mod standby;
mod stat;
mod steer;
mod upgrade;
mod usage_count;
