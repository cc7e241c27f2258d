//! Processes that are killed, and immediate shutdowns, at random times.

use super::arena::{Arena, Call, DATABASES};
use super::process;
use crate::common::{Fault, Shutdown, value};

pub const FAULTS: &[super::Kind] = &[
    ("kill-leader-in-load", kill_leader_in_load),
    ("kill-worker-in-load", kill_worker_in_load),
    ("kill-leader-in-dump", kill_leader_in_dump),
    ("kill-leader-at-rest", kill_leader_at_rest),
    ("kill-again-and-again", kill_again_and_again),
    ("crash-loop", crash_loop),
    ("kill-caller", kill_caller),
    ("kill-caller-in-dump", kill_caller_in_dump),
    ("kill-parallel-worker", kill_parallel_worker),
    ("kill-any", kill_any),
    ("kill-postmaster-in-load", kill_postmaster_in_load),
    ("kill-postmaster-in-dump", kill_postmaster_in_dump),
    ("kill-postmaster-in-call", kill_postmaster_in_call),
    ("stop-in-load", stop_in_load),
    ("stop-in-dump", stop_in_dump),
    ("stop-in-call", stop_in_call),
];

const SHUTDOWNS: [Shutdown; 3] = [Shutdown::Smart, Shutdown::Fast, Shutdown::Immediate];

fn kill_leader_in_load(arena: &mut Arena) {
    arena.begin_slow_load();
    kill(arena, "autoprewarm leader");
    arena.round.pause(300);
    arena.back_to_normal();
}

fn kill_worker_in_load(arena: &mut Arena) {
    arena.begin_slow_load();
    kill(arena, "autoprewarm worker");
    arena.round.pause(300);
    arena.back_to_normal();
}

fn kill_leader_at_rest(arena: &mut Arena) {
    arena.settle();
    kill(arena, "autoprewarm leader");
}

/// The next process is killed once it exists, or soon after.
fn kill_again_and_again(arena: &mut Arena) {
    arena.begin_slow_load();
    for _ in 0..3 {
        let victim = arena
            .round
            .choose(&["autoprewarm leader", "autoprewarm worker"]);
        kill(arena, victim);
        arena.round.pause(100);
    }
    arena.back_to_normal();
}

/// Each load is killed, until none is begun any more.
fn crash_loop(arena: &mut Arena) {
    arena.settle();
    arena.begin_slow_load();
    let list = arena.cluster.list();
    let victim = arena
        .round
        .choose(&["autoprewarm leader", "autoprewarm worker"]);
    for _ in 0..arena.round.choose(&[2, 3, 5]) {
        kill(arena, victim);
        arena.round.pause(300);
    }
    if arena.round.coin() {
        arena.restart(Shutdown::Immediate);
    }
    let mut client = arena.connect("postgres");
    let state: String = value(&mut client, "SELECT state FROM pg_stat_autoprewarm");
    if state == "load suspended" {
        arena.reload();
        arena.round.pause(300);
        assert_eq!(arena.cluster.list(), list);
    }
    arena.back_to_normal();
}

fn kill(arena: &mut Arena, name: &str) {
    if let Some(pid) = arena.find(name) {
        kill_if_there(arena, pid);
    }
}

/// Kills a process that may be about to exit.
fn kill_if_there(arena: &mut Arena, pid: i32) {
    let mark = arena.cluster.log_end();
    arena.round.kill(pid);
    let died = format!("(PID {pid}) was terminated by signal 9");
    process::wait_for_end(pid);
    // Its exit is logged before the next connection is accepted.
    drop(arena.connect("postgres"));
    if arena.cluster.log_since(mark).contains(&died) {
        arena
            .cluster
            .wait_for_log(mark, "all server processes terminated; reinitializing");
    }
}

/// Makes dumps take some tenths of a second.
fn slow_dumps(arena: &mut Arena) {
    let delay = arena.round.choose(&[10, 50, 100]);
    arena.cluster.set_fault(Fault::ListDelay, delay);
}

/// Makes the leader dump every second, slowly, and returns at a random time.
fn begin_dumps(arena: &mut Arena) {
    arena.settle();
    slow_dumps(arena);
    arena.set("pg_prewarm.autoprewarm_interval", "1");
    arena.reload();
    arena.round.pause(1500);
}

fn end_dumps(arena: &mut Arena) {
    arena.set("pg_prewarm.autoprewarm_interval", "0");
    arena.back_to_normal();
}

fn kill_leader_in_dump(arena: &mut Arena) {
    begin_dumps(arena);
    kill(arena, "autoprewarm leader");
    end_dumps(arena);
}

/// Starts one of the calls, with blocks to read that are not cached.
pub fn begin_call(arena: &mut Arena, workers: bool) -> Call {
    arena.slow_down();
    arena.restart(Shutdown::Immediate);
    let mode = arena
        .round
        .choose(&["buffer", "buffer", "read", "prefetch"]);
    let database = arena.round.choose(&DATABASES);
    let workers = if workers { 2 } else { 0 };
    let sql = match arena.round.choose(&[0, 1, 2, 3]) {
        0 if workers == 0 => format!("SELECT pg_prewarm('anchor', '{mode}')"),
        1 => format!("SELECT pg_prewarm_relation('anchor', '{mode}', workers => {workers})"),
        2 => format!("SELECT pg_prewarm_schema('public', '{mode}', workers => {workers})"),
        _ => {
            format!("SELECT pg_prewarm_database('{mode}', workers => {workers}, catalogs => true)")
        }
    };
    arena.call(database, &sql)
}

fn kill_caller(arena: &mut Arena) {
    let call = begin_call(arena, false);
    arena.round.pause(200);
    kill_if_there(arena, call.pid);
    arena.back_to_normal();
    call.wait();
}

fn kill_parallel_worker(arena: &mut Arena) {
    let call = begin_call(arena, true);
    arena.round.pause(100);
    let data = arena.cluster.data("");
    let workers = process::named(&data, &format!("parallel worker for PID {}", call.pid));
    if let Some(&pid) = workers.first() {
        kill_if_there(arena, pid);
    }
    arena.back_to_normal();
    call.wait();
}

fn kill_caller_in_dump(arena: &mut Arena) {
    arena.settle();
    slow_dumps(arena);
    let call = arena.call("postgres", "SELECT autoprewarm_dump_now()");
    arena.round.pause(400);
    kill_if_there(arena, call.pid);
    arena.back_to_normal();
    call.wait();
}

/// Kills a random process: the server reinitializes.
fn kill_any(arena: &mut Arena) {
    arena.begin_slow_load();
    // The startup process does not belong to a running server.
    drop(arena.connect("postgres"));
    let postmaster = arena.cluster.postmaster();
    let pids: Vec<i32> = process::all(&arena.cluster.data(""))
        .into_iter()
        .filter(|process| process.pid != postmaster && !process.title.contains("startup"))
        .map(|process| process.pid)
        .collect();
    let pid = arena.round.choose(&pids);
    kill_if_there(arena, pid);
    arena.back_to_normal();
}

/// The remaining processes notice it and exit before the next server can start.
fn kill_postmaster(arena: &mut Arena) {
    let postmaster = arena.cluster.postmaster();
    arena.round.kill(postmaster);
    let data = arena.cluster.data("");
    arena.round.pause(200);
    for fault in Fault::ALL {
        arena.cluster.set_fault(fault, 0);
    }
    process::wait_for_none(&data);
    // The system keeps the process ID until the parent has waited for the process.
    process::wait_for_end(postmaster);
    arena.cluster.start();
}

fn kill_postmaster_in_load(arena: &mut Arena) {
    arena.begin_slow_load();
    kill_postmaster(arena);
    arena.back_to_normal();
}

fn kill_postmaster_in_dump(arena: &mut Arena) {
    begin_dumps(arena);
    kill_postmaster(arena);
    end_dumps(arena);
}

fn kill_postmaster_in_call(arena: &mut Arena) {
    let workers = arena.round.coin();
    let call = begin_call(arena, workers);
    arena.round.pause(300);
    kill_postmaster(arena);
    arena.back_to_normal();
    call.wait();
}

fn stop_in_load(arena: &mut Arena) {
    arena.begin_slow_load();
    let before = arena.read_list();
    let how = arena.round.choose(&SHUTDOWNS);
    let mark = arena.cluster.log_end();
    let loads = arena
        .query("postgres", "SELECT state FROM pg_stat_autoprewarm")
        .remove(0)
        .get::<_, &str>(0)
        == "loading";
    arena.cluster.stop(how);
    let completed = arena
        .cluster
        .log_since(mark)
        .contains("autoprewarm successfully");
    if loads && !completed {
        assert!(
            arena.read_list() == before,
            "a load was cut short, and so was the list"
        );
    }
    arena.cluster.start();
    arena.round.pause(200);
    arena.back_to_normal();
}

/// Interrupts dumps, and the one at shutdown.
fn stop_in_dump(arena: &mut Arena) {
    begin_dumps(arena);
    let how = arena.round.choose(&SHUTDOWNS);
    arena.restart(how);
    end_dumps(arena);
}

fn stop_in_call(arena: &mut Arena) {
    let workers = arena.round.coin();
    let call = begin_call(arena, workers);
    arena.round.pause(300);
    // A smart shutdown would wait for the caller.
    let how = arena.round.choose(&[Shutdown::Fast, Shutdown::Immediate]);
    arena.restart(how);
    arena.back_to_normal();
    call.wait();
}
