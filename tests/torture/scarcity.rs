//! Shortages: worker slots, connections, locks, memory.

use postgres::{Client, NoTls};
use rand::Rng;

use super::arena::{Arena, Call, DATABASES};
use super::process;
use crate::common::{Fault, Shutdown, limit, value, wait_until};

pub const FAULTS: &[super::Kind] = &[
    ("no-worker-slots", no_worker_slots),
    ("no-connections", no_connections),
    ("little-shared-memory", little_shared_memory),
    ("no-locks", no_locks),
    ("little-memory-for-one", little_memory_for_one),
    ("little-memory-for-all", little_memory_for_all),
    ("refused-memory", refused_memory),
];

/// Queries take slots during a load, some for longer than others.
fn no_worker_slots(arena: &mut Arena) {
    arena.begin_slow_load();
    let slots: Vec<_> = (0..arena.round.rng.random_range(1..=4))
        .map(|_| take_slot(arena))
        .collect();
    let pids = process::named(&arena.cluster.data(""), "autoprewarm worker");
    if arena.round.coin() {
        // Their slots are free until other processes take them.
        arena.round.may_skip = true;
        for pid in pids {
            process::signal(pid, libc::SIGTERM);
        }
    }
    arena.back_to_normal();
    arena.round.pause(300);
    for slot in slots {
        process::signal(slot.pid, libc::SIGTERM);
        slot.wait();
    }
}

/// A query whose parallel worker sleeps.
fn take_slot(arena: &Arena) -> Call {
    let forced = match arena.cluster.major() {
        15 => "force_parallel_mode",
        _ => "debug_parallel_query",
    };
    let sql = format!("SET {forced} = on; SELECT pg_sleep(25)");
    arena.call("postgres", &sql)
}

/// All connections are in use when the list is loaded, and when a session requests a
/// load.
fn no_connections(arena: &mut Arena) {
    arena.begin_slow_load();
    let mut first = arena.connect("postgres");
    let clients = all_connections(arena);
    first
        .batch_execute("SELECT autoprewarm_wait('1 s')")
        .unwrap();
    if arena.round.coin() {
        let _ = first.batch_execute("SELECT autoprewarm_cancel()");
        let _ = first.batch_execute("SELECT autoprewarm_load_now()");
        arena.round.may_skip = true;
    }
    arena.back_to_normal();
    first.batch_execute("SELECT autoprewarm_wait()").unwrap();
    drop(clients);
    drop(first);
    // Sessions that are about to exit still count. Others may be busy.
    let sessions = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'";
    wait_until("connections to be free", || {
        let client = arena.cluster.config().connect(NoTls);
        client.is_ok_and(|mut client| value::<i64>(&mut client, sessions) < 5)
    });
}

fn all_connections(arena: &Arena) -> Vec<Client> {
    std::iter::from_fn(|| arena.cluster.config().connect(NoTls).ok())
        .take(100)
        .collect()
}

/// Dynamic shared memory suffices for a part of the load, or not even for that.
fn little_shared_memory(arena: &mut Arena) {
    arena.round.may_skip = true;
    arena.round.allowed.extend([
        "because of insufficient dynamic shared memory",
        "could not resize shared memory segment",
    ]);
    arena.begin_slow_load();
    let mut client = arena.connect("postgres");
    let _ = client.batch_execute("SELECT autoprewarm_cancel()");
    let size = arena.round.choose(&[100, 2000, 4000, 8000]);
    let error = arena.round.choose(&[libc::ENOSPC, libc::ENOMEM]);
    arena.cluster.set_fault(Fault::SegmentError, error.into());
    arena.cluster.set_fault(Fault::SegmentSize, size);
    let _ = client.batch_execute("SELECT autoprewarm_load_now()");
    client
        .batch_execute("SELECT autoprewarm_wait('10 s')")
        .unwrap();
    arena.back_to_normal();
}

/// A session has all the locks for which the lock table has space.
fn no_locks(arena: &mut Arena) {
    arena.round.may_skip = true;
    arena.round.allowed.push("out of shared memory");
    arena.begin_slow_load();
    let mut greedy = arena.connect("postgres");
    let pid = value(&mut greedy, "SELECT pg_backend_pid()");
    let error = greedy
        .batch_execute("SELECT pg_advisory_lock(g) FROM generate_series(1, 1000000) g")
        .unwrap_err();
    assert_eq!(error.code().unwrap().code(), "53200");
    // There is no lock left to look up a name either.
    let sql = format!(
        "SELECT pg_prewarm_database(workers => {})",
        arena.round.choose(&[0, 2])
    );
    let call = arena
        .cluster
        .config()
        .connect(NoTls)
        .map(|mut client| std::thread::spawn(move || client.batch_execute(&sql)));
    arena.back_to_normal();
    arena.round.pause(1000);
    drop(greedy);
    process::wait_for_end(pid);
    if let Ok(call) = call {
        let state = call
            .join()
            .unwrap()
            .err()
            .map(|error| error.code().unwrap().code().to_owned());
        assert!(
            matches!(state.as_deref(), None | Some("53200")),
            "{state:?}"
        );
    }
}

/// The process may have exited.
fn limit_memory(pid: i32, kilobytes: Option<u64>) {
    let limited = limit(pid, "as", kilobytes.map(|kilobytes| kilobytes << 10));
    assert!(limited || process::status(pid, "VmSize").is_none());
}

/// Autoprewarm's processes and callers may report that they are out of memory.
fn allow_out_of_memory(arena: &mut Arena) {
    arena.round.may_skip = true;
    arena.round.allowed.extend([
        "out of memory",
        "could not map",
        "could not resize",
        "could not fork",
        "could not load library",
        "could not read file",
        "could not write to file",
        "keep exiting before loading any block",
        "could not access file",
        "exited with exit code 1",
    ]);
}

/// The leader, a worker or a caller can have hardly more memory than it has.
fn little_memory_for_one(arena: &mut Arena) {
    allow_out_of_memory(arena);
    arena.begin_slow_load();
    let call = arena.call("postgres", "SELECT pg_sleep(0.2); SELECT pg_prewarm_database('read', workers => 2); SELECT autoprewarm_dump_now()");
    let name = arena
        .round
        .choose(&["autoprewarm leader", "autoprewarm worker", "caller"]);
    let pid = match name {
        "caller" => Some(call.pid),
        _ => arena.find(name),
    };
    if let Some(pid) = pid
        && let Some(size) = process::status(pid, "VmSize")
    {
        let more = arena.round.rng.random_range(0..500);
        limit_memory(pid, Some(size + more));
        arena.back_to_normal();
        arena
            .call("postgres", "SELECT autoprewarm_wait('3 s')")
            .wait();
        arena
            .call("postgres", "SELECT autoprewarm_load_now()")
            .wait();
        arena
            .call("postgres", "SELECT autoprewarm_wait('3 s')")
            .wait();
        limit_memory(pid, None);
    }
    arena.back_to_normal();
    let state = call.wait();
    assert!(
        matches!(
            state.as_deref(),
            None | Some("53200" | "XX000" | "58030" | "57014")
        ),
        "{state:?}"
    );
    arena.restart(Shutdown::Immediate);
}

/// `ulimit -v` for the server: each process can have a little more than the postmaster
/// has, which may not be enough for much.
fn little_memory_for_all(arena: &mut Arena) {
    allow_out_of_memory(arena);
    arena.settle();
    let postmaster = arena.cluster.postmaster();
    let size = process::status(postmaster, "VmSize").unwrap();
    let more = arena.round.rng.random_range(100..4000);
    // Processes inherit the limit.
    limit_memory(postmaster, Some(size + more));
    let pid = arena.find("autoprewarm leader").unwrap();
    process::signal(pid, libc::SIGTERM);
    call_whatever_can_be_called(arena);
    limit_memory(postmaster, None);
    arena.restart(Shutdown::Immediate);
}

/// One of so many memory requests of the library is refused, in any process.
fn refused_memory(arena: &mut Arena) {
    allow_out_of_memory(arena);
    arena.begin_slow_load();
    let one_of = 1 << arena.round.rng.random_range(0..10);
    arena.cluster.set_fault(Fault::RefusedMemory, one_of);
    call_whatever_can_be_called(arena);
    arena.back_to_normal();
    arena.restart(Shutdown::Immediate);
}

/// Makes calls while there is hardly any memory; often there is not enough for a
/// session.
fn call_whatever_can_be_called(arena: &mut Arena) {
    for _ in 0..4 {
        let database = arena.round.choose(&DATABASES);
        let sql = arena.round.choose(&[
            "SELECT autoprewarm_start_worker()",
            "SELECT autoprewarm_load_now()",
            "SELECT autoprewarm_dump_now()",
            "SELECT count(*) FROM autoprewarm_blocks()",
            "SELECT pg_prewarm_database('read', workers => 2)",
            "SELECT pg_prewarm_database('buffer', workers => 2)",
            "SELECT autoprewarm_wait('1 s')",
        ]);
        let mut config = arena.cluster.config();
        if let Ok(mut client) = config.dbname(database).connect(NoTls) {
            let _ = client.batch_execute(sql);
        }
    }
}
