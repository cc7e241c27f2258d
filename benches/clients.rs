//! Clients at work: each is a pgbench, and another one after so many transactions, which
//! connects as soon as it is let in. Their logs tell when each transaction has ended, and
//! how long it took.

use std::collections::HashMap;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, Ordering::SeqCst};
use std::time::{Duration, SystemTime};

use postgres::config::Host;

use crate::common::Cluster;
use crate::side::Side;

/// The steps of a curve, in seconds.
pub const STEP: f64 = 0.25;

/// After so many transactions a client connects again.
const TRANSACTIONS_OF_A_SESSION: usize = 10_000;

/// How often clients have begun to work.
static BEGUN: AtomicU32 = AtomicU32::new(0);

/// A transaction: when it ended, in seconds since 1970, and how long it took, in seconds.
pub type Transaction = (f64, f64);

/// Clients at work, each in a thread that runs one pgbench after another, and the processor
/// time of the server's processes.
pub struct Clients {
    stop: Arc<AtomicBool>,
    clients: Vec<Client>,
    sampled: Arc<AtomicBool>,
    sampler: std::thread::JoinHandle<ProcessorTimes>,
    /// Where the scripts and the logs of transactions are.
    directory: PathBuf,
}

struct Client {
    /// The pgbench that runs; 0 if none does.
    process: Arc<AtomicI32>,
    /// Returns when each pgbench was started, in seconds since 1970, by process ID.
    thread: std::thread::JoinHandle<HashMap<u32, f64>>,
}

/// So that no two clients have the same seed.
const MOST_CLIENTS: usize = 1000;
const SEEDS_OF_A_CLIENT: usize = 1_000_000;

impl Clients {
    /// They connect as that role as soon as the server lets them. Each script is run as often
    /// as its weight says. With the same number of a draw, clients want the same rows.
    pub fn begin(
        cluster: &Cluster,
        number: usize,
        role: &str,
        scripts: &[(&str, u32)],
        draw: usize,
    ) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        // In memory, if there is a file system for that: the disk is what is measured.
        let memory = Path::new("/dev/shm");
        let parent = match memory.is_dir() {
            true => memory.to_owned(),
            false => std::env::temp_dir(),
        };
        let process = std::process::id();
        let begun = BEGUN.fetch_add(1, SeqCst);
        let directory = parent.join(format!("pg_prewarm-clients-{process}-{begun}"));
        fs::create_dir_all(&directory).unwrap();
        let files: Vec<String> = scripts
            .iter()
            .enumerate()
            .map(|(index, (script, weight))| {
                let file = directory.join(format!("script{index}"));
                fs::write(&file, script).unwrap();
                format!("--file={}@{weight}", file.display())
            })
            .collect();
        let config = cluster.config();
        let [Host::Unix(socket)] = config.get_hosts() else {
            unreachable!("clusters listen on a socket only");
        };
        let pgbench = Side::Ours.installation().bin().join("pgbench");
        let clients = (0..number)
            .map(|number| {
                let mut command = Command::new(&pgbench);
                command
                    .args(["--no-vacuum", "--protocol=prepared", "--log"])
                    .arg(format!("--transactions={TRANSACTIONS_OF_A_SESSION}"))
                    .arg(format!("--log-prefix={}", directory.join("log").display()))
                    .arg(format!("--host={}", socket.display()))
                    .arg(format!("--username={role}"))
                    .args(&files)
                    .arg("postgres")
                    .stdout(Stdio::null())
                    .stderr(Stdio::null());
                // Where `sched_autogroup_enabled` is on, Linux shares the processors among
                // sessions of processes. Each process of the server is one. So is each client
                // then, as if it were alone on its machine.
                // SAFETY: it may be called between fork and exec.
                unsafe {
                    command.pre_exec(|| match libc::setsid() {
                        -1 => Err(std::io::Error::last_os_error()),
                        _ => Ok(()),
                    });
                }
                let process = Arc::new(AtomicI32::new(0));
                let (stop, running) = (stop.clone(), process.clone());
                let first_seed = (draw * MOST_CLIENTS + number) * SEEDS_OF_A_CLIENT;
                let thread =
                    std::thread::spawn(move || client(first_seed, command, &running, &stop));
                Client { process, thread }
            })
            .collect();
        let data = cluster.data("");
        let sampled = Arc::new(AtomicBool::new(false));
        let end = sampled.clone();
        let mine = format!(" {role} ");
        let sampler = std::thread::spawn(move || ProcessorTimes::sample(&data, &mine, &end));
        Self {
            stop,
            clients,
            sampled,
            sampler,
            directory,
        }
    }

    /// Ends the measurement of processor time.
    pub fn end_sampling(&self) {
        self.sampled.store(true, SeqCst);
    }

    /// Stops them. Their transactions are in the order in which they ended.
    pub fn end(self) -> (Vec<Transaction>, ProcessorTimes) {
        self.end_sampling();
        self.stop.store(true, SeqCst);
        let mut begins = HashMap::new();
        for client in self.clients {
            let process = client.process.load(SeqCst);
            if process != 0 {
                // SAFETY: a signal to a child. It fails if that has just ended.
                unsafe { libc::kill(process, libc::SIGTERM) };
            }
            begins.extend(client.thread.join().unwrap());
        }
        let mut all = Vec::new();
        for (process, begin) in begins {
            // The log of a pgbench that could not connect does not exist.
            let log = self.directory.join(format!("log.{process}"));
            let log = fs::read_to_string(log).unwrap_or_default();
            // The last line may not have been written to its end.
            let mut transactions = log.lines().map_while(transaction);
            if let Some((end, _)) = transactions.next() {
                all.push((end, end - begin));
            }
            all.extend(transactions);
        }
        fs::remove_dir_all(&self.directory).expect("the clients' logs can be removed");
        all.sort_by(|one, other| one.0.total_cmp(&other.0));
        (all, self.sampler.join().unwrap())
    }
}

/// Runs one pgbench after another until it is told to stop. Each wants other rows, by seeds
/// from the first on.
fn client(
    first_seed: usize,
    mut command: Command,
    running: &AtomicI32,
    stop: &AtomicBool,
) -> HashMap<u32, f64> {
    let mut begins = HashMap::new();
    let mut sessions = 0;
    while !stop.load(SeqCst) {
        command.env("PGBENCH_RANDOM_SEED", (first_seed + sessions).to_string());
        let begin = now();
        let mut pgbench = command.spawn().expect("pgbench cannot be started");
        running.store(pgbench.id().cast_signed(), SeqCst);
        if stop.load(SeqCst) {
            let _ = pgbench.kill();
        }
        begins.insert(pgbench.id(), begin);
        if pgbench.wait().unwrap().success() {
            sessions += 1;
        } else {
            // The server does not accept connections yet.
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    begins
}

/// A line of pgbench's log: client, transaction, microseconds, script, and when it ended, in
/// seconds and microseconds.
fn transaction(line: &str) -> Option<Transaction> {
    let fields: Vec<f64> = line
        .split(' ')
        .map_while(|field| field.parse().ok())
        .collect();
    let &[_, _, took, _, seconds, micros] = &fields[..] else {
        return None;
    };
    Some((seconds + micros / 1e6, took / 1e6))
}

/// Seconds of processor time that processes of the server have used.
#[derive(Clone, Copy, Debug, Default)]
pub struct ProcessorTimes {
    /// Autoprewarm's processes, and the server's I/O workers.
    pub load: f64,
    /// The clients' sessions.
    pub clients: f64,
}

impl ProcessorTimes {
    /// Looks at the processes of a cluster until it is told to stop; the clients' have `mine`
    /// in their titles. What a process uses between the last look and its end is missed.
    fn sample(data: &Path, mine: &str, stop: &AtomicBool) -> Self {
        let mut seen: HashMap<i32, (bool, f64)> = HashMap::new();
        while !stop.load(SeqCst) {
            for (pid, title, time) in processes(data) {
                // A session that is held has "autoprewarm" in its title, too.
                let is_client = title.contains(mine);
                let is_load = ["autoprewarm", "io worker"]
                    .iter()
                    .any(|text| title.contains(text));
                if is_client || is_load {
                    seen.insert(pid, (!is_client, time));
                }
            }
            std::thread::sleep(Duration::from_millis(200));
        }
        let mut times = Self::default();
        for (is_load, time) in seen.into_values() {
            *(if is_load {
                &mut times.load
            } else {
                &mut times.clients
            }) += time;
        }
        times
    }
}

/// The processes of a cluster: process ID, title, and seconds of processor time.
fn processes(data: &Path) -> Vec<(i32, String, f64)> {
    let Some(postmaster) = fs::read_to_string(data.join("postmaster.pid"))
        .ok()
        .and_then(|text| text.lines().next()?.parse::<i32>().ok())
    else {
        return Vec::new();
    };
    let children = format!("/proc/{postmaster}/task/{postmaster}/children");
    let children = fs::read_to_string(children).unwrap_or_default();
    let ticks = rustix::param::clock_ticks_per_second() as f64;
    children
        .split_whitespace()
        .filter_map(|pid| {
            let title = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            let mut fields = stat.rsplit_once(") ")?.1.split(' ');
            let user: f64 = fields.nth(11)?.parse().ok()?;
            let system: f64 = fields.next()?.parse().ok()?;
            Some((
                pid.parse().ok()?,
                String::from_utf8_lossy(&title).into_owned(),
                (user + system) / ticks,
            ))
        })
        .collect()
}

/// Transactions per second in each step, at the end of the step.
pub fn curve(transactions: &[Transaction], start: f64, time: f64) -> Vec<(f64, f64)> {
    let mut counts = vec![0u32; (time / STEP) as usize];
    for (end, _) in transactions.iter().filter(|(end, _)| *end >= start) {
        if let Some(count) = counts.get_mut(((end - start) / STEP) as usize) {
            *count += 1;
        }
    }
    (1..)
        .zip(counts)
        .map(|(step, count)| (f64::from(step) * STEP, f64::from(count) / STEP))
        .collect()
}

/// Seconds since 1970.
pub fn now() -> f64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.expect("1970 is over").as_secs_f64()
}

/// The time of a line of the log, in seconds since 1970.
pub fn logged_time(log: &str, text: &str) -> Option<f64> {
    let line = log.lines().find(|line| line.contains(text))?;
    line.split_whitespace().next()?.parse().ok()
}
