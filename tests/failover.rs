//! Following and promotion when something is in their way: an upstream server that cannot
//! be reached or has no list, a list that cannot be read, crashes, a slow disk, sessions that
//! need the buffers, and a promotion that must be noticed at once.

use std::ffi::CString;
use std::fs;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use postgres::Client;

use crate::common::{
    Block, Cluster, Fault, Installation, LIST, PATIENCE, Shutdown, error, give_to_server, signal,
    value, wait_until,
};
use crate::follow::{
    UPSTREAM, cached, follow_now, follower_of, heat, pair, primary, promote, refusal, shown,
    slow_pair, wait_for_state,
};

/// Each line of the log begins with the time, in seconds.
const TIMED: &str = "log_line_prefix = '%n %b[%p] '";

/// The time of a line of the log of a server with [`TIMED`].
fn time_of(line: &str) -> f64 {
    line.split_once(' ').unwrap().0.parse().unwrap()
}

/// The mark of a load after a promotion.
const PROMOTING: &str = "pg_stat_tmp/autoprewarm.promoting";

/// How many warnings with that text were logged after `mark`.
fn warnings(server: &Cluster, mark: usize, text: &str) -> usize {
    let log = server.log_since(mark);
    let lines = log.lines().filter(|line| line.contains("WARNING:"));
    lines.filter(|line| line.contains(text)).count()
}

/// Has a standby fetch lists from another server, and waits until new processes know.
fn fetch_from(standby: &Cluster, conninfo: &str) {
    standby.configure(&format!(
        "pg_prewarm.autoprewarm_follow_conninfo = '{conninfo}'"
    ));
    standby.reload();
    wait_until("the reload", || {
        standby.value::<String>("SHOW pg_prewarm.autoprewarm_follow_conninfo") == conninfo
    });
}

/// Makes each read of a block take so many milliseconds, on a standby that was not started
/// yet.
fn slow_disk(standby: &Cluster, milliseconds: u32) {
    if standby.major() >= 17 {
        standby.configure("io_combine_limit = 1");
    }
    standby.slow_reads(milliseconds);
}

const WORKERS: &str =
    "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'autoprewarm worker'";

/// How to connect to something that knows of no encryption.
fn conninfo_of(port: u16) -> String {
    format!("host=127.0.0.1 port={port} user=postgres sslmode=disable gssencmode=disable")
}

/// A server that begins no session, notes when somebody has tried, and answers with the
/// message, or not at all if that is empty.
struct Unwilling {
    port: u16,
    tries: Arc<Mutex<Vec<Instant>>>,
    message: Arc<Mutex<&'static str>>,
}

impl Unwilling {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = Self {
            port: listener.local_addr().unwrap().port(),
            tries: Arc::default(),
            message: Arc::default(),
        };
        let (tries, message) = (server.tries.clone(), server.message.clone());
        std::thread::spawn(move || {
            for connection in listener.incoming() {
                tries.lock().unwrap().push(Instant::now());
                let message = *message.lock().unwrap();
                // The standby may be stopped meanwhile.
                let _ = refuse(connection.unwrap(), message);
            }
        });
        server
    }

    fn conninfo(&self) -> String {
        conninfo_of(self.port)
    }

    /// When somebody has tried, in seconds after `start`.
    fn tries_since(&self, start: Instant) -> Vec<f64> {
        let tries = self.tries.lock().unwrap();
        let since = |at: &Instant| at.duration_since(start).as_secs_f64();
        tries.iter().map(since).collect()
    }
}

/// The contents of a packet, which begins with its length.
fn packet(connection: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut length = [0; 4];
    connection.read_exact(&mut length)?;
    let mut packet = vec![0; u32::from_be_bytes(length) as usize - 4];
    connection.read_exact(&mut packet)?;
    Ok(packet)
}

fn refuse(mut connection: TcpStream, message: &str) -> io::Result<()> {
    // If the startup packet is not read, the connection is reset.
    packet(&mut connection)?;
    match message {
        "" => Ok(()),
        // As a postmaster says that it cannot fork.
        _ => connection.write_all(format!("E{message}\n\0").as_bytes()),
    }
}

/// Waits until there were four tries, and asserts that the pauses between them were those of
/// an interval of one second.
fn assert_growing_pauses(tries: impl Fn() -> Vec<f64>) {
    wait_until("four tries", || tries().len() >= 4);
    let tries = tries();
    let expected = [1.0, 2.0, 4.0];
    let excess = tries.windows(2).zip(expected);
    let mut excess: Vec<_> = excess
        .map(|(pause, expected)| pause[1] - pause[0] - expected)
        .collect();
    excess.sort_by(f64::total_cmp);
    // One may be longer: a process may have to wait for a processor.
    assert!(
        excess[0] > -0.3 && excess[1] < 2.0 && excess[2] < 3.0,
        "not {expected:?} s: {tries:?}"
    );
}

#[test]
fn pauses_grow_until_a_reload_and_each_reason_is_logged_once() {
    const COULD_NOT: &str = "autoprewarm could not follow the upstream server";
    let (_primary, standby) = pair(&[]);
    let unwilling = Unwilling::start();
    standby.configure("pg_prewarm.autoprewarm_follow_interval = 1");
    let mark = standby.log_end();
    let start = Instant::now();
    fetch_from(&standby, &unwilling.conninfo());
    assert_growing_pauses(|| unwilling.tries_since(start));
    // When this returns, the next pause has begun, which is one of sixteen seconds.
    refusal(&standby);
    let tries = || unwilling.tries_since(start).len();
    let before = tries();
    let reload = Instant::now();
    standby.reload();
    wait_until("a try after the reload", || tries() > before);
    let took = reload.elapsed();
    assert!(took < Duration::from_secs(5), "{took:?}");
    refusal(&standby);
    assert_eq!(warnings(&standby, mark, COULD_NOT), 1);
    *unwilling.message.lock().unwrap() = "it is full";
    for _ in 0..2 {
        let refused = refusal(&standby).message;
        assert!(refused.contains("it is full"), "{refused}");
    }
    assert_eq!(warnings(&standby, mark, COULD_NOT), 2);

    // After a success they begin anew.
    fetch_from(&standby, "");
    wait_for_state(&standby, "following");
    follow_now(&standby);
    let unloaded = Cluster::build().not_preloaded().setting(TIMED).start();
    let mark = standby.log_end();
    let host = unloaded.path("");
    fetch_from(&standby, &format!("host={} user=postgres", host.display()));
    assert_growing_pauses(|| {
        let log = unloaded.log();
        let is_try = |line: &&str| {
            line.contains("received replication command: SHOW pg_prewarm.autoprewarm_list")
        };
        log.lines().filter(is_try).map(time_of).collect()
    });
    wait_for_state(&standby, "upstream has no list");
    assert_eq!(warnings(&standby, mark, COULD_NOT), 1);
}

/// The contents of the mark of the load after a promotion.
fn crashes(standby: &Cluster) -> Option<String> {
    fs::read_to_string(standby.data(PROMOTING)).ok()
}

/// A standby that was promoted, and loads the rest of its upstream's list for minutes.
fn slowly_promoted() -> (Cluster, Block) {
    let (_, standby, table) = slow_pair(8);
    standby.configure("pg_prewarm.autoprewarm_max_rate = 8");
    standby.reload();
    standby.promote();
    // A server that crashes before that is a standby again.
    wait_until("the end of recovery", || {
        !standby.value::<bool>("SELECT pg_is_in_recovery()")
    });
    (standby, table)
}

#[test]
fn a_load_after_the_promotion_that_crashes_the_server_three_times_is_given_up() {
    let (mut standby, table) = slowly_promoted();
    standby.expect_crash();
    let mut mark = 0;
    for crash in 1..=3 {
        let mut client = standby.connect("postgres");
        wait_until("the mark", || {
            crashes(&standby) == Some(format!("{crash}\n"))
        });
        let worker = "SELECT max(pid) FROM pg_stat_progress_prewarm";
        let mut pid = None;
        wait_until("a worker", || {
            pid = value(&mut client, worker);
            pid.is_some()
        });
        mark = standby.log_end();
        signal(pid.unwrap(), libc::SIGKILL);
        standby.wait_for_log(mark, "database system is ready to accept connections");
    }
    let why = "could not load blocks after the promotion: the server crashed during the last 3 \
               loads after the promotion";
    standby.wait_for_log(mark, why);
    let mut client = standby.connect("postgres");
    assert!(value::<bool>(
        &mut client,
        "SELECT autoprewarm_wait('1 min')"
    ));
    wait_until("the end of the list", || !standby.data(UPSTREAM).exists());
    wait_until("the end of the mark", || crashes(&standby).is_none());
    assert_eq!(warnings(&standby, mark, why), 1);
    let log = standby.log_since(mark);
    assert!(log.contains("DETAIL:  The list is removed."), "{log}");
    let (_, restarted) = log.rsplit_once("ready to accept connections").unwrap();
    assert!(
        !restarted.contains("process \"autoprewarm worker\""),
        "{log}"
    );
    let row = client
        .query_one("SELECT * FROM pg_stat_autoprewarm", &[])
        .unwrap();
    assert_eq!(row.get::<_, Option<&str>>("load_result"), Some("suspended"));
    assert_eq!(row.get::<_, Option<&str>>("last_error"), Some(why));
    assert!(cached(&standby, table).0 < 100);

    // From now on it is a server like any other.
    standby.configure("pg_prewarm.autoprewarm_max_rate = 0");
    let mark = standby.log_end();
    standby.restart();
    standby.wait_for_load(mark);
    assert!(!standby.log_since(mark).contains("after the promotion"));
}

#[test]
fn a_load_after_the_promotion_that_ends_leaves_no_mark() {
    for how in ["end", "cancel", "shutdown"] {
        let (standby, _) = slowly_promoted();
        wait_until("the mark", || crashes(&standby).as_deref() == Some("1\n"));
        let mark = standby.log_end();
        standby.configure("pg_prewarm.autoprewarm_max_rate = 0");
        match how {
            "end" => standby.reload(),
            "cancel" => assert!(standby.value::<bool>("SELECT autoprewarm_cancel()")),
            _ => {
                standby.stop(Shutdown::Fast);
                assert_eq!(crashes(&standby), None);
                standby.start();
            }
        }
        standby.wait_for_log(mark, "blocks after the promotion;");
        wait_until("the end of the list", || !standby.data(UPSTREAM).exists());
        assert_eq!(crashes(&standby), None, "{how}");
    }
}

#[test]
fn a_top_up_uses_one_worker_and_the_load_after_the_promotion_as_many_as_allowed() {
    let primary = primary(&[]);
    let tables = ["a", "b", "c", "d"].map(|name| {
        let table = primary.table(name, 500);
        heat(&primary, name);
        table
    });
    let standby = follower_of(&primary);
    standby.configure("pg_prewarm.autoprewarm_workers = 3");
    // One worker takes 40 seconds.
    slow_disk(&standby, 20);
    standby.start();
    let mut client = standby.connect("postgres");
    wait_until("a worker", || value::<i64>(&mut client, WORKERS) > 0);
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(2) {
        assert!(value::<i64>(&mut client, WORKERS) <= 1);
    }
    assert_eq!(shown(&mut client).0, "topping up");
    let mark = standby.log_end();
    standby.promote();
    let at_work = "SELECT count(*) FROM pg_stat_progress_prewarm WHERE blocks_done > 0";
    wait_until("three workers", || value::<i64>(&mut client, at_work) == 3);
    standby.slow_reads(0);
    standby.wait_for_log(mark, "blocks after the promotion;");
    for table in tables {
        assert_eq!(cached(&standby, table), (500, 2500));
    }
}

const FETCHES: &str =
    "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'autoprewarm follower'";

/// Has a standby fetch from a server that accepts connections and says nothing.
fn hanging_fetch(standby: &Cluster) -> (TcpListener, JoinHandle<bool>) {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = silent.local_addr().unwrap().port();
    fetch_from(
        standby,
        &format!("host=127.0.0.1 port={port} user=postgres"),
    );
    let mut client = standby.connect("postgres");
    let request = std::thread::spawn(move || {
        let refused = client.batch_execute("SELECT autoprewarm_follow_now()");
        refused.is_err()
    });
    wait_until("a fetch", || standby.value::<i64>(FETCHES) == 1);
    (silent, request)
}

#[test]
fn a_fetch_that_is_not_wanted_any_more_ends_at_once() {
    for promotes in [false, true] {
        let (_primary, standby) = pair(&[("t", 100)]);
        let table = standby.file_of("postgres", "t");
        let (_silent, request) = hanging_fetch(&standby);
        let mark = standby.log_end();
        let start = Instant::now();
        if promotes {
            standby.promote();
            standby.wait_for_log(mark, "blocks after the promotion;");
        } else {
            standby.configure("pg_prewarm.autoprewarm_follow = off");
            standby.reload();
        }
        wait_until("the end of the fetch", || {
            standby.value::<i64>(FETCHES) == 0
        });
        // Otherwise it would wait for a minute, as `wal_receiver_timeout` says.
        assert!(start.elapsed() < Duration::from_secs(20));
        assert!(request.join().unwrap());
        assert_eq!(cached(&standby, table).0, 100);
        let log = standby.log_since(mark);
        for unwanted in ["terminating background worker", "exited with exit code 1"] {
            assert!(!log.contains(unwanted), "{log}");
        }
    }
}

/// Waits for a connection, from which reads do not wait for ever either.
fn accept(listener: &TcpListener) -> TcpStream {
    listener.set_nonblocking(true).unwrap();
    let mut accepted = None;
    wait_until("a connection", || {
        accepted = listener.accept().ok();
        accepted.is_some()
    });
    let (connection, _) = accepted.unwrap();
    connection.set_nonblocking(false).unwrap();
    connection.set_read_timeout(Some(PATIENCE)).unwrap();
    connection
}

#[test]
fn an_upstream_server_may_compose_its_list_for_longer_than_wal_receiver_timeout() {
    const AUTHENTICATED: &[u8] = b"R\0\0\0\x08\0\0\0\0";
    const READY: &[u8] = b"Z\0\0\0\x05I";
    let (_primary, standby) = pair(&[]);
    standby.configure("pg_prewarm.autoprewarm_follow_interval = 1");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mark = standby.log_end();
    fetch_from(
        &standby,
        &conninfo_of(listener.local_addr().unwrap().port()),
    );
    let mut connection = accept(&listener);
    packet(&mut connection).unwrap();
    connection
        .write_all(&[AUTHENTICATED, READY].concat())
        .unwrap();
    let mut kind = [0];
    connection.read_exact(&mut kind).unwrap();
    let query = packet(&mut connection).unwrap();
    assert_eq!(
        (kind, &*query),
        (*b"Q", &b"SHOW pg_prewarm.autoprewarm_list\0"[..])
    );
    standby.configure("wal_receiver_timeout = 1s");
    standby.reload();
    std::thread::sleep(Duration::from_secs(5));
    assert_eq!(standby.value::<i64>(FETCHES), 1);
    assert_eq!(warnings(&standby, mark, "autoprewarm"), 0);
    standby.configure("wal_receiver_timeout = 1min");
    standby.reload();
    drop((connection, listener));
    standby.wait_for_log(mark, "could not fetch the block list");
    fetch_from(&standby, "");
    follow_now(&standby);
}

/// Promotes a standby that loads at that rate and is in that state, and returns how many
/// seconds after the request, and after the end of recovery, the leader noticed it.
fn time_to_notice(rate: u32, state: &str) -> [f64; 2] {
    let primary = primary(&[TIMED]);
    primary.table("t", 400);
    heat(&primary, "t");
    let standby = follower_of(&primary);
    standby.configure(&format!("pg_prewarm.autoprewarm_follow_max_rate = {rate}"));
    standby.start();
    standby.wait_for_replay(&primary);
    wait_until("the list", || standby.data(UPSTREAM).exists());
    wait_for_state(&standby, state);
    let mark = standby.log_end();
    assert!(standby.value::<bool>("SELECT pg_promote()"));
    let logged = |text: &str| time_of(&standby.wait_for_log(mark, text));
    let noticed = logged("autoprewarm loads the block list of the former upstream server");
    let since = ["received promote request", "archive recovery complete"];
    let took = since.map(|event| noticed - logged(event));
    standby.wait_for_log(mark, "blocks after the promotion;");
    took
}

/// The leader looks for a promotion four times a second. The rest is for a busy machine, and
/// for the server, which ends its recovery meanwhile. The next fetch is due in an hour.
const NOTICED: f64 = 2.0;

#[test]
fn a_promotion_is_noticed_within_a_second() {
    for (rate, state) in [(0, "following"), (8, "topping up")] {
        // Once at least, since a process may have to wait for a processor.
        let mut tried = Vec::new();
        let is_noticed = (0..3).any(|_| {
            let took = time_to_notice(rate, state);
            tried.push(took);
            took.iter().all(|&took| took < NOTICED)
        });
        assert!(is_noticed, "{state}: {tried:?}");
    }
}

#[test]
fn replay_that_needs_a_relation_does_not_wait_for_a_top_up_from_a_slow_disk() {
    let primary = primary(&[]);
    let mut tables: Vec<(Block, &str)> = Vec::new();
    for (name, command) in [
        ("a", "TRUNCATE a"),
        ("b", "DROP TABLE b"),
        ("c", "VACUUM FULL c"),
        ("d", "TRUNCATE d"),
        ("e", "ALTER TABLE e ALTER id TYPE int8"),
        ("f", "DROP TABLE f"),
    ] {
        tables.push((primary.table(name, 400), command));
        heat(&primary, name);
    }
    let standby = follower_of(&primary);
    // Each table takes sixteen seconds. Replay waits for as long as it has to.
    standby.configure("max_standby_streaming_delay = -1");
    slow_disk(&standby, 40);
    standby.start();
    let mut client = standby.connect("postgres");
    let is_locked = "SELECT EXISTS (SELECT FROM pg_locks JOIN pg_stat_activity USING (pid) \
                                    WHERE backend_type = 'autoprewarm worker' \
                                      AND locktype = 'relation' AND relation >= 16384 AND granted)";
    wait_until("a worker that reads", || value(&mut client, is_locked));
    let looks = (0..100).filter(|_| {
        std::thread::sleep(Duration::from_millis(3));
        value::<bool>(&mut client, is_locked)
    });
    let locked = looks.count();
    assert!(locked > 20, "a table was locked in {locked} of 100 looks");

    while !tables.is_empty() {
        // At least eight seconds' worth of blocks are left.
        let is_amid = |&(table, _): &(Block, &str)| (10..200).contains(&cached(&standby, table).0);
        let mut amid = None;
        wait_until("a table that is being loaded", || {
            amid = tables.iter().position(is_amid);
            amid.is_some()
        });
        let (table, command) = tables.remove(amid.unwrap());
        primary.sql(command);
        let start = Instant::now();
        let end: String = primary.value("SELECT pg_current_wal_lsn()::text");
        let replayed = format!("SELECT pg_last_wal_replay_lsn() >= '{end}'");
        wait_until("replay", || value(&mut client, &replayed));
        // Promised are 100 ms, of which a read takes 40.
        let took = start.elapsed();
        assert!(took < Duration::from_secs(3), "{command}: {took:?}");
        assert_eq!(cached(&standby, table).0, 0, "{command}");
    }
    standby.slow_reads(0);
    follow_now(&standby);
}

/// What may be in the place of the upstream's list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bad {
    Directory,
    Pipe,
    NoPermission,
    Empty,
    CutShort,
}

impl Bad {
    const ALL: [Self; 5] = [
        Self::Directory,
        Self::Pipe,
        Self::NoPermission,
        Self::Empty,
        Self::CutShort,
    ];

    /// Replaces the list.
    fn put(self, standby: &Cluster) {
        let path = standby.data(UPSTREAM);
        let good = fs::read(&path).unwrap();
        fs::remove_file(&path).unwrap();
        match self {
            Self::Directory => fs::create_dir(&path).unwrap(),
            Self::Pipe => {
                let name = CString::new(path.as_os_str().as_bytes()).unwrap();
                // SAFETY: it is a C string that outlives the call.
                assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
            }
            Self::NoPermission => {
                fs::write(&path, good).unwrap();
                fs::set_permissions(&path, fs::Permissions::from_mode(0o000)).unwrap();
            }
            Self::Empty => fs::write(&path, "").unwrap(),
            Self::CutShort => fs::write(&path, &good[..good.len() / 2]).unwrap(),
        }
        give_to_server(&path);
    }

    fn remove(self, standby: &Cluster) {
        let path = standby.data(UPSTREAM);
        match self {
            Self::Directory => fs::remove_dir(path).unwrap(),
            _ => fs::remove_file(path).unwrap(),
        }
    }

    /// Asserts that the standby follows in spite of what was put after `mark`, or says once
    /// why it cannot, and follows when it is gone.
    fn check(self, standby: &Cluster, mark: usize) {
        let mut client = standby.connect("postgres");
        let followed: Vec<_> = (0..2)
            .map(|_| client.batch_execute("SELECT autoprewarm_follow_now()"))
            .collect();
        let lines = warnings(standby, mark, UPSTREAM);
        if followed[1].is_ok() {
            assert_eq!(lines, 0, "{self:?}");
        } else {
            // Any other file is replaced.
            assert!(
                matches!(self, Self::Directory | Self::NoPermission),
                "{self:?}"
            );
            assert_eq!(lines, 1, "{self:?}");
            self.remove(standby);
            follow_now(standby);
        }
        let list = fs::read(standby.data(UPSTREAM)).unwrap();
        assert!(
            list.starts_with(b"pg_prewarm upstream list 1\n"),
            "{self:?}"
        );
        assert_eq!(shown(&mut client).0, "following", "{self:?}");
    }
}

#[test]
fn a_standby_follows_whatever_is_in_the_place_of_the_list() {
    let (primary, standby) = pair(&[("t", 100)]);
    for bad in Bad::ALL {
        let mark = standby.log_end();
        standby.stop(Shutdown::Fast);
        bad.put(&standby);
        standby.start();
        bad.check(&standby, mark);
        let mark = standby.log_end();
        bad.put(&standby);
        bad.check(&standby, mark);
        primary.sql("CREATE TABLE IF NOT EXISTS replayed (); DROP TABLE replayed");
        standby.wait_for_replay(&primary);
    }
}

/// Asserts that a promotion goes through, with one line about the list, and that the server
/// is like any other after that.
fn promote_with(bad: Bad) {
    let (_primary, standby) = pair(&[("t", 100)]);
    let table = standby.file_of("postgres", "t");
    bad.put(&standby);
    let mark = standby.log_end();
    standby.promote();
    standby.sql("CREATE TABLE written ()");
    wait_until("a warning", || warnings(&standby, mark, UPSTREAM) > 0);
    assert!(standby.value::<bool>("SELECT autoprewarm_wait('1 min')"));
    // The dump comes after the load.
    wait_until("the dump", || standby.data(LIST).exists());
    assert_eq!(warnings(&standby, mark, UPSTREAM), 1, "{bad:?}");
    assert_eq!(cached(&standby, table).0, 100, "{bad:?}");
    let mark = standby.log_end();
    standby.restart();
    standby.wait_for_load(mark);
    assert!(standby.value::<bool>("SELECT autoprewarm_wait('1 min')"));
    assert!(warnings(&standby, mark, UPSTREAM) <= 1, "{bad:?}");
    assert_eq!(cached(&standby, table).0, 100, "{bad:?}");
}

#[test]
fn a_promotion_goes_through_whatever_is_in_the_place_of_the_list() {
    for bad in [Bad::Pipe, Bad::NoPermission, Bad::Empty, Bad::CutShort] {
        promote_with(bad);
    }
}

#[test]
fn a_promotion_goes_through_with_a_directory_in_the_place_of_the_list() {
    promote_with(Bad::Directory);
}

#[test]
fn a_full_disk_keeps_the_former_list() {
    let primary = primary(&[]);
    primary.table("t", 100);
    let standby = follower_of(&primary);
    standby.set_fault(Fault::ListWrite, 0);
    standby.start();
    standby.wait_for_replay(&primary);
    follow_now(&standby);
    for fault in [Fault::ListWrite, Fault::ListClose, Fault::ListRename] {
        let good = fs::read(standby.data(UPSTREAM)).unwrap();
        let mark = standby.log_end();
        standby.set_fault(fault, libc::ENOSPC.into());
        for _ in 0..2 {
            let refused = refusal(&standby).message;
            assert!(
                refused.contains("autoprewarm.upstream.tmp")
                    && refused.contains("No space left on device"),
                "{fault:?}: {refused}"
            );
        }
        assert_eq!(shown(&mut standby.connect("postgres")).0, "failed");
        assert!(
            fs::read(standby.data(UPSTREAM)).unwrap() == good,
            "{fault:?}"
        );
        assert_eq!(warnings(&standby, mark, ""), 1, "{fault:?}");
        // Replay does not need it.
        primary.sql("CREATE TABLE IF NOT EXISTS replayed (); DROP TABLE replayed");
        standby.wait_for_replay(&primary);
        standby.set_fault(fault, 0);
        follow_now(&standby);
        assert!(
            fs::read(standby.data(UPSTREAM)).unwrap() != good,
            "{fault:?}"
        );
        assert!(!standby.data("autoprewarm.upstream.tmp").exists());
    }
    promote(&standby);
}

#[test]
fn an_upstream_server_with_contribs_library_has_no_list_until_it_has_ours() {
    let Some(contrib) = Installation::contrib() else {
        println!("no installation with contrib's module: nothing tested");
        return;
    };
    let mut primary = primary(&[]);
    let table = primary.table("t", 100);
    primary.stop(Shutdown::Fast);
    primary.switch_to(contrib);
    primary.start();
    let mut standby = follower_of(&primary);
    standby.switch_to(Installation::ours());
    standby.start();
    wait_for_state(&standby, "upstream has no list");
    let leader = standby.leader();
    let refused = refusal(&standby).message;
    assert!(
        refused.contains("it has not preloaded this library"),
        "{refused}"
    );
    assert_eq!(
        warnings(&standby, 0, "it has not preloaded this library"),
        1
    );
    primary.sql("CREATE TABLE replayed ()");
    standby.wait_for_replay(&primary);

    primary.stop(Shutdown::Fast);
    primary.switch_to(Installation::ours());
    primary.start();
    // It gives none while it loads its own.
    assert!(primary.value::<bool>("SELECT autoprewarm_wait('1 min')"));
    heat(&primary, "t");
    standby.reload();
    wait_for_state(&standby, "following");
    wait_until("the table", || cached(&standby, table).0 == 100);
    assert_eq!(standby.leader(), leader);
    promote(&standby);
    assert_eq!(cached(&standby, table), (100, 500));
}

#[test]
fn a_standby_whose_primary_conninfo_is_changed_follows_the_other_server() {
    let (primary, standby) = pair(&[("t", 100)]);
    let other = follower_of(&primary);
    other.start();
    other.wait_for_replay(&primary);
    follow_now(&other);
    let served = |server: &Cluster| {
        server.value::<i64>("SELECT lists_served FROM pg_stat_autoprewarm_follow")
    };
    let before = (served(&primary), served(&other));
    // pg_basebackup has written it into the file that ALTER SYSTEM writes.
    let conninfo = format!("host={} user=postgres", other.path("").display());
    standby.sql(&format!("ALTER SYSTEM SET primary_conninfo = '{conninfo}'"));
    let mark = standby.log_end();
    standby.reload();
    wait_until("the reload", || {
        standby.value::<String>("SHOW primary_conninfo") == conninfo
    });
    follow_now(&standby);
    let (host, port): (String, i32) = {
        let sql = "SELECT upstream_host, upstream_port FROM pg_stat_autoprewarm_follow";
        let row = standby.connect("postgres").query_one(sql, &[]).unwrap();
        (row.get(0), row.get(1))
    };
    assert_eq!((host, port), (other.path("").display().to_string(), 5432));
    assert_eq!((served(&primary), served(&other)), (before.0, before.1 + 1));
    standby.wait_for_log(
        mark,
        &format!(
            "autoprewarm follows the upstream server at host \"{}\"",
            other.path("").display()
        ),
    );
    // Replication has gone there as well.
    primary.sql("CREATE TABLE replayed ()");
    standby.wait_for_replay(&primary);
}

/// Leaves nothing of the tables cached or listed.
fn cool_down(primary: &Cluster) {
    primary.sql("VACUUM FREEZE");
    primary.stop(Shutdown::Fast);
    fs::remove_file(primary.data(LIST)).unwrap();
    primary.start();
}

#[test]
fn with_few_buffers_the_blocks_with_the_highest_usage_counts_are_cached() {
    let primary = primary(&[]);
    // In the order of the files, the hottest blocks would come last.
    let tables = [("tepid", 2000, 2), ("warm", 500, 3), ("hot", 500, 5)];
    let files = tables.map(|(name, blocks, _)| primary.table(name, blocks));
    cool_down(&primary);
    for (name, _, usage_count) in tables {
        for _ in 0..usage_count {
            primary.sql(&format!("SELECT pg_prewarm('{name}')"));
        }
    }
    let standby = follower_of(&primary);
    // 1024 buffers, of which a few are left to others, or taken by them.
    standby.configure("shared_buffers = 8MB");
    standby.start();
    standby.wait_for_replay(&primary);
    for _ in 0..2 {
        follow_now(&standby);
        let [tepid, warm, hot] = files.map(|file| cached(&standby, file).0);
        assert!(
            hot >= 450 && warm >= 100 && tepid <= 20,
            "{hot}, {warm}, {tepid}"
        );
    }
    assert!(!standby.value::<bool>("SELECT autoprewarm_failover_ready()"));
    promote(&standby);
    let [tepid, warm, hot] = files.map(|file| cached(&standby, file).0);
    assert!(
        hot >= 450 && warm >= 100 && tepid <= 50,
        "{hot}, {warm}, {tepid}"
    );
}

/// How many blocks can be replaced at once.
const REPLACEABLE: &str = "SELECT count(*) FROM pg_buffercache \
                           WHERE usagecount = 0 AND NOT isdirty AND pinning_backends = 0 \
                             AND relfilenode IS NOT NULL";

/// Reads a large table, piece by piece, until no block of `table` is cached and most blocks
/// can be replaced. Returns how many that are.
fn sweep(client: &mut Client, standby: &Cluster, table: Block, next: &mut u32) -> i64 {
    let mut replaceable = 0;
    wait_until("buffers that were swept", || {
        let first = *next % 6000;
        *next += 100;
        let last = first + 99;
        let sql = format!("SELECT pg_prewarm('filler', 'buffer', 'main', {first}, {last})");
        value::<i64>(client, &sql);
        replaceable = value(client, REPLACEABLE);
        replaceable >= 1200 && cached(standby, table).0 == 0
    });
    replaceable
}

#[test]
fn less_is_replaced_while_others_take_the_buffers_again() {
    let primary = primary(&[]);
    let table = primary.table("t", 1600);
    primary.table("filler", 6000);
    cool_down(&primary);
    heat(&primary, "t");
    let standby = follower_of(&primary);
    // 2048 buffers.
    standby.configure("shared_buffers = 16MB");
    standby.start();
    standby.wait_for_replay(&primary);
    // This fills empty buffers.
    follow_now(&standby);
    let mut client = standby.connect("postgres");
    let mut next = 0;
    let mut shares = Vec::new();
    let replaced = "SELECT blocks_replaced FROM pg_stat_autoprewarm_follow";
    for _ in 0..4 {
        let replaceable = sweep(&mut client, &standby, table, &mut next);
        let before: i64 = value(&mut client, replaced);
        follow_now(&standby);
        let after: i64 = value(&mut client, replaced);
        shares.push((after - before) as f64 / replaceable as f64);
    }
    assert!(shares[0] > 0.6, "{shares:?}");
    for pair in shares.windows(2) {
        assert!(pair[1] > 0.0 && pair[1] < 0.8 * pair[0], "{shares:?}");
    }
    assert!(shares[3] < 0.4 * shares[0], "{shares:?}");
    // It is doubled again when nothing is lost any more.
    for _ in 0..10 {
        follow_now(&standby);
    }
    let cached = cached(&standby, table).0;
    assert!(cached > 1200, "{cached} after {shares:?}");
}

#[test]
fn the_connection_string_is_shown_to_those_who_may_read_all_settings() {
    const SETTING: &str = "pg_prewarm.autoprewarm_follow_conninfo";
    let cluster = Cluster::build()
        .setting(&format!("{SETTING} = 'password=secret'"))
        .start();
    cluster.sql(
        "CREATE EXTENSION pg_prewarm; CREATE ROLE plain LOGIN; \
         CREATE ROLE reader LOGIN IN ROLE pg_read_all_settings; \
         CREATE ROLE watcher LOGIN IN ROLE pg_monitor",
    );
    let rows = format!("SELECT count(*) FROM pg_settings WHERE name = '{SETTING}'");
    for (role, may) in [("plain", false), ("reader", true), ("watcher", true)] {
        let mut client = cluster.connect_as(role, "postgres");
        assert_eq!(value::<i64>(&mut client, &rows), i64::from(may), "{role}");
        let shown = client.query("SHOW ALL", &[]).unwrap();
        let is_shown = shown.iter().any(|row| row.get::<_, &str>(0) == SETTING);
        assert_eq!(is_shown, may, "{role}");
        let current = format!("SELECT current_setting('{SETTING}')");
        if may {
            assert_eq!(value::<String>(&mut client, &current), "password=secret");
        } else {
            assert_eq!(error(&mut client, &current).sqlstate, "42501");
            // Nor who is followed, and what libpq has said about it.
            let view = "SELECT last_error FROM pg_stat_autoprewarm_follow";
            assert_eq!(error(&mut client, view).sqlstate, "42501");
        }
        // Nobody changes it in a session.
        let set = format!("SET {SETTING} = ''");
        assert!(client.batch_execute(&set).is_err(), "{role}");
    }
}
