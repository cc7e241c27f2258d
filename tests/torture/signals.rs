//! Signals that do not kill: processes are terminated, cancelled, made to reload the
//! configuration, or stopped for a while.

use std::time::Duration;

use rand::Rng;

use super::arena::Arena;
use super::crash::begin_call;
use super::process;
use crate::common::wait_until;

pub const FAULTS: &[super::Kind] = &[
    ("end-leader-in-load", end_leader_in_load),
    ("end-leader-at-rest", end_leader_at_rest),
    ("end-workers", end_workers),
    ("end-caller", end_caller),
    ("interrupt-all", interrupt_all),
    ("freeze", freeze),
    ("reload-storm", reload_storm),
];

fn end_leader_in_load(arena: &mut Arena) {
    arena.begin_slow_load();
    end_leader(arena);
    arena.back_to_normal();
}

fn end_leader_at_rest(arena: &mut Arena) {
    arena.settle();
    end_leader(arena);
}

/// The server does not start a leader again that was terminated.
fn end_leader(arena: &mut Arena) {
    let mut leader = None;
    wait_until("the leader", || {
        leader = arena.find("autoprewarm leader");
        leader.is_some()
    });
    let pid = leader.unwrap();
    let mark = arena.cluster.log_end();
    process::signal(pid, libc::SIGTERM);
    process::wait_for_end(pid);
    // A leader that was just starting had no handler yet; it is started again.
    let log = arena.cluster.log_since(mark);
    arena
        .round
        .allowed
        .push("terminating background worker \"autoprewarm leader\"");
    if log.contains(&format!("(PID {pid}) exited with exit code 1")) {
        return;
    }
    let error = arena
        .call("postgres", "SELECT autoprewarm_start_worker()")
        .wait();
    // A new one may be running already.
    assert!(
        error.as_ref().is_none_or(|state| state == "55000"),
        "{error:?}"
    );
}

/// Their chunks are tried a second time, but not a third.
fn end_workers(arena: &mut Arena) {
    arena.round.may_skip = true;
    arena.begin_slow_load();
    for _ in 0..arena.round.rng.random_range(1..10) {
        for pid in process::named(&arena.cluster.data(""), "autoprewarm worker") {
            process::signal(pid, libc::SIGTERM);
        }
        arena.round.pause(50);
    }
    arena.back_to_normal();
}

/// A call is cancelled, or its session terminated.
fn end_caller(arena: &mut Arena) {
    let workers = arena.round.coin();
    let call = begin_call(arena, workers);
    arena.round.pause(200);
    let how = arena.round.choose(&[libc::SIGINT, libc::SIGTERM]);
    process::signal(call.pid, how);
    arena.back_to_normal();
    let state = call.wait();
    // A client whose session is terminated may only see that the connection is lost.
    assert!(
        matches!(state.as_deref(), None | Some("57014" | "57P01"))
            || how == libc::SIGTERM && state.as_deref() == Some(""),
        "{state:?}"
    );
}

/// The leader and its workers ignore a cancel.
fn interrupt_all(arena: &mut Arena) {
    arena.begin_slow_load();
    for _ in 0..100 {
        for process in process::all(&arena.cluster.data("")) {
            if process.title.contains("autoprewarm ") {
                let signal = arena
                    .round
                    .choose(&[libc::SIGINT, libc::SIGUSR1, libc::SIGUSR1]);
                process::signal(process.pid, signal);
            }
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    arena.back_to_normal();
}

/// The leader or a worker is stopped for a while, as if it got no processor time.
fn freeze(arena: &mut Arena) {
    arena.begin_slow_load();
    let name = arena
        .round
        .choose(&["autoprewarm leader", "autoprewarm worker"]);
    if let Some(pid) = arena.find(name) {
        process::signal(pid, libc::SIGSTOP);
        arena.round.pause(500);
        arena.back_to_normal();
        arena.round.pause(500);
        process::signal(pid, libc::SIGCONT);
    }
    arena.back_to_normal();
}

fn reload_storm(arena: &mut Arena) {
    arena.begin_slow_load();
    for _ in 0..60 {
        let workers = arena.round.rng.random_range(1..5);
        arena.set("pg_prewarm.autoprewarm_workers", &workers.to_string());
        let rate = arena.round.choose(&["0", "1", "100", "5000", "2147483647"]);
        arena.set("pg_prewarm.autoprewarm_max_rate", rate);
        let interval = arena.round.choose(&["0", "1", "2147483"]);
        arena.set("pg_prewarm.autoprewarm_interval", interval);
        for _ in 0..10 {
            arena.reload();
        }
        arena.round.pause(10);
    }
    arena.reset("pg_prewarm.autoprewarm_workers");
    arena.set("pg_prewarm.autoprewarm_interval", "0");
    arena.back_to_normal();
}
