//! A temporary PostgreSQL cluster.
//!
//! [`Cluster::build`] makes one from a copy of a freshly initialised data directory.
//! Dropping it stops the server, removes the directory, and fails the test if a server
//! process was terminated by a signal that the test did not send. If the tests run as
//! root, servers run as user `postgres`, since PostgreSQL refuses to run as root.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use postgres::types::FromSqlOwned;
use postgres::{CancelToken, Client, Config, NoTls};

/// How long a test waits for anything: far longer than it should take, so that a busy
/// machine fails no test.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The list, in the data directory.
pub const LIST: &str = "autoprewarm.blocks";

/// The file with the server's faults, beside the data directory; see
/// [`Cluster::set_fault`].
const FAULTS: &str = "faults";

/// The faults that a server's disk, clock and memory can have. Each is a number in the
/// file [`FAULTS`], in this order; 0 means no fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Microseconds that are added to the time of day.
    Clock,
    /// Seconds that are added to the monotonic clock.
    Uptime,
    /// Milliseconds that a read of a user relation's file takes. It has no effect with
    /// `io_method = io_uring`.
    ReadDelay,
    /// One of so many such reads fails.
    ReadErrors,
    /// Milliseconds that `autoprewarm_blocks()` takes to find the end of the list.
    ListEnd,
    /// Milliseconds that a write to the new list takes.
    ListDelay,
    /// Milliseconds that flushing the new list takes, if `fsync` is on.
    FlushDelay,
    /// The error number with which writing, closing, flushing or renaming the new list
    /// fails.
    ListWrite,
    ListClose,
    ListFlush,
    ListRename,
    /// One of so many memory requests of the library fails.
    RefusedMemory,
    /// The ID of a process whose memory is limited.
    LimitedProcess,
    /// How many bytes more than now that process can have.
    MemoryLeft,
    /// A new segment of dynamic shared memory may have so many bytes.
    SegmentSize,
    /// What a larger one fails with.
    SegmentError,
}

impl Fault {
    pub const ALL: [Self; 16] = [
        Self::Clock,
        Self::Uptime,
        Self::ReadDelay,
        Self::ReadErrors,
        Self::ListEnd,
        Self::ListDelay,
        Self::FlushDelay,
        Self::ListWrite,
        Self::ListClose,
        Self::ListFlush,
        Self::ListRename,
        Self::RefusedMemory,
        Self::LimitedProcess,
        Self::MemoryLeft,
        Self::SegmentSize,
        Self::SegmentError,
    ];
}

/// A PostgreSQL installation.
#[derive(Clone, Debug)]
pub struct Installation {
    bin: PathBuf,
    name: &'static str,
}

impl Installation {
    /// The installation with this extension.
    pub fn ours() -> Self {
        Self::from_env("PG_CONFIG", "ours")
            .expect("PG_CONFIG must name an installation with this extension: run `make test`")
    }

    /// An installation of the same major version with contrib's module. `None` if there
    /// is none (for 16).
    pub fn contrib() -> Option<Self> {
        Self::from_env("CONTRIB_PG_CONFIG", "contrib")
    }

    /// An installation of an older major version with this extension, from which
    /// `pg_upgrade` upgrades to ours.
    pub fn old() -> Option<Self> {
        Self::from_env("OLD_PG_CONFIG", "old")
    }

    fn from_env(variable: &str, name: &'static str) -> Option<Self> {
        let pg_config = std::env::var_os(variable).filter(|value| !value.is_empty())?;
        let bin = run(Command::new(pg_config).arg("--bindir"));
        Some(Self {
            bin: PathBuf::from(bin.trim()),
            name,
        })
    }

    /// A program of this installation, run as the server's user.
    pub fn program(&self, name: &str) -> Command {
        as_server_user(self.bin.join(name))
    }

    /// Whether it has that library.
    pub fn has_library(&self, name: &str) -> bool {
        let directory = run(self.program("pg_config").arg("--pkglibdir"));
        let file = format!("{name}.so");
        Path::new(directory.trim()).join(file).exists()
    }

    /// The directory of its programs.
    pub fn bin(&self) -> &Path {
        &self.bin
    }

    pub fn major(&self) -> u32 {
        let version = run(Command::new(self.bin.join("postgres")).arg("--version"));
        let number = version.split_whitespace().nth(2).unwrap();
        // The version may be "19rc1".
        let digits = number.find(|c: char| !c.is_ascii_digit());
        number[..digits.unwrap_or(number.len())].parse().unwrap()
    }

    /// A freshly initialised data directory, which is copied for each cluster.
    fn template(&self, checksums: bool) -> &'static Path {
        static TEMPLATES: [OnceLock<PathBuf>; 6] = [const { OnceLock::new() }; 6];
        let kind = ["ours", "contrib", "old"]
            .iter()
            .position(|&name| name == self.name);
        TEMPLATES[kind.unwrap() * 2 + usize::from(checksums)].get_or_init(|| {
            let directory = new_directory("template");
            let mut initdb = self.program("initdb");
            initdb.args([
                "-A",
                "trust",
                "-N",
                "-U",
                "postgres",
                "--locale=C",
                "-E",
                "UTF8",
            ]);
            if checksums {
                initdb.arg("-k");
            } else if self.major() >= 18 {
                initdb.arg("--no-data-checksums");
            }
            run(initdb.arg("-D").arg(directory.join("data")));
            directory.join("data")
        })
    }
}

/// A command that runs as the server's user.
fn as_server_user(program: impl AsRef<OsStr>) -> Command {
    let mut command = if is_root() {
        let mut command = Command::new("setpriv");
        command.args([
            "--reuid=postgres",
            "--regid=postgres",
            "--init-groups",
            "--",
        ]);
        command.arg(program);
        command
    } else {
        Command::new(program)
    };
    // Users' servers have no backtrace in the DETAIL of every error.
    command.env_remove("RUST_BACKTRACE").current_dir("/");
    command
}

fn is_root() -> bool {
    // SAFETY: `geteuid` has no preconditions and cannot fail.
    unsafe { libc::geteuid() == 0 }
}

/// Makes the server's user the owner of a file that this process created.
pub fn give_to_server(path: &Path) {
    if is_root() {
        static OWNER: OnceLock<(u32, u32)> = OnceLock::new();
        let (user, group) = *OWNER.get_or_init(|| {
            let id = |flag| run(Command::new("id").args([flag, "postgres"]));
            (
                id("-u").trim().parse().unwrap(),
                id("-g").trim().parse().unwrap(),
            )
        });
        chown(path, Some(user), Some(group)).unwrap();
    }
}

/// Creates a directory of the server's user in the cache. Its path is short, since the
/// length of a socket's path is limited.
fn new_directory(kind: &str) -> PathBuf {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let cache = std::env::var_os("PG_PREWARM_CACHE").expect(
        "PG_PREWARM_CACHE must name a directory that the server's user can enter: run `make test`",
    );
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let directory = Path::new(&cache)
        .join("clusters")
        .join(format!("{}-{kind}-{number}", std::process::id()));
    fs::create_dir_all(&directory).unwrap();
    give_to_server(&directory);
    directory
}

/// The library that injects the faults, compiled once.
fn faults_library() -> &'static Path {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let library = new_directory("library").join("faults.so");
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/common/faults.c");
        run(Command::new("cc")
            .args(["-O1", "-shared", "-fPIC", "-o"])
            .arg(&library)
            .args([source, "-ldl"]));
        library
    })
}

/// Runs a command that must succeed, and returns what it printed.
pub fn run(command: &mut Command) -> String {
    let output = output(command);
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

fn output(command: &mut Command) -> Output {
    command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"))
}

/// Waits until `condition` holds.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "timed out waiting for: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A process that is stopped until this is dropped.
pub struct Paused(i32);

impl Paused {
    pub fn new(pid: i32) -> Self {
        signal(pid, libc::SIGSTOP);
        Self(pid)
    }
}

impl Drop for Paused {
    fn drop(&mut self) {
        signal(self.0, libc::SIGCONT);
    }
}

/// How a server is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shutdown {
    Smart,
    Fast,
    Immediate,
}

/// How a cluster is set up.
pub struct Builder {
    installation: Installation,
    checksums: bool,
    preload: bool,
    settings: Vec<String>,
}

impl Builder {
    /// With this installation instead of ours.
    pub fn installation(mut self, installation: Installation) -> Self {
        self.installation = installation;
        self
    }

    /// With data checksums.
    pub fn checksums(mut self) -> Self {
        self.checksums = true;
        self
    }

    /// Without the library in `shared_preload_libraries`.
    pub fn not_preloaded(mut self) -> Self {
        self.preload = false;
        self
    }

    /// With this line in `postgresql.conf`.
    pub fn setting(mut self, line: &str) -> Self {
        self.settings.push(line.to_owned());
        self
    }

    /// Creates the cluster, but does not start it.
    pub fn create(self) -> Cluster {
        let directory = new_directory("cluster");
        let template = self.installation.template(self.checksums);
        let data = directory.join("data");
        run(as_server_user("cp").arg("-a").arg(template).arg(&data));
        let cluster = Cluster {
            installation: self.installation,
            directory,
            crash_expected: false,
        };
        // Autovacuum would read blocks into shared buffers during a test.
        cluster.configure(&format!(
            "listen_addresses = ''\n\
             unix_socket_directories = '{}'\n\
             fsync = off\n\
             shared_buffers = 32MB\n\
             autovacuum = off\n\
             log_min_messages = debug1\n\
             log_line_prefix = '%b[%p] '\n\
             max_wal_senders = 4\n\
             wal_level = replica\n\
             hot_standby = on\n\
             restart_after_crash = on",
            cluster.directory.display()
        ));
        if self.preload {
            cluster.configure("shared_preload_libraries = 'pg_prewarm'");
        }
        for line in &self.settings {
            cluster.configure(line);
        }
        cluster
    }

    /// Creates the cluster and starts it.
    pub fn start(self) -> Cluster {
        let cluster = self.create();
        cluster.start();
        cluster
    }
}

/// The cluster of a test.
pub struct Cluster {
    installation: Installation,
    directory: PathBuf,
    crash_expected: bool,
}

impl Cluster {
    /// A cluster with our module preloaded, and PostgreSQL's defaults otherwise.
    pub fn build() -> Builder {
        Builder {
            installation: Installation::ours(),
            checksums: false,
            preload: true,
            settings: Vec::new(),
        }
    }

    /// Uses another installation's programs and libraries for the same data.
    pub fn switch_to(&mut self, installation: Installation) {
        self.installation = installation;
    }

    /// The test terminates a server process, or expects one to die.
    pub fn expect_crash(&mut self) {
        self.crash_expected = true;
    }

    pub fn major(&self) -> u32 {
        self.installation.major()
    }

    /// A file in the cluster's own directory, beside the data directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// A file in the data directory.
    pub fn data(&self, name: &str) -> PathBuf {
        self.directory.join("data").join(name)
    }

    /// Appends to `postgresql.conf`.
    pub fn configure(&self, lines: &str) {
        let path = self.data("postgresql.conf");
        let mut text = fs::read_to_string(&path).unwrap();
        text.push_str(lines);
        text.push('\n');
        fs::write(&path, text).unwrap();
    }

    fn pg_ctl(&self) -> Command {
        let mut command = self.installation.program("pg_ctl");
        command
            .arg("-D")
            .arg(self.data(""))
            .args(["-s", "-w", "-t", "60"]);
        command.arg("-l").arg(self.path("log"));
        command
    }

    /// Sets a fault of the server's disk, clock or memory. The first call must precede
    /// the start of the server.
    pub fn set_fault(&self, fault: Fault, number: i64) {
        let path = self.path(FAULTS);
        if !path.exists() {
            fs::write(&path, [0; size_of::<i64>() * Fault::ALL.len()]).unwrap();
        }
        let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
        let at = size_of::<i64>() * fault as usize;
        file.write_all_at(&number.to_ne_bytes(), at as u64).unwrap();
    }

    /// Makes every read of a user relation's file take so long.
    pub fn slow_reads(&self, milliseconds: u32) {
        self.set_fault(Fault::ReadDelay, milliseconds.into());
    }

    pub fn start(&self) {
        assert!(
            self.try_start(),
            "the server does not start:\n{}",
            self.log()
        );
    }

    /// Returns false if the server does not start.
    pub fn try_start(&self) -> bool {
        // The server inherits the output of pg_ctl.
        let mut command = self.pg_ctl();
        if self.path(FAULTS).exists() {
            command
                .env("LD_PRELOAD", faults_library())
                .env("FAULTS", self.path(FAULTS));
        }
        command
            .stdin(std::process::Stdio::null())
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null());
        command.arg("start").status().unwrap().success()
    }

    pub fn stop(&self, how: Shutdown) {
        let mode = match how {
            Shutdown::Smart => "smart",
            Shutdown::Fast => "fast",
            Shutdown::Immediate => "immediate",
        };
        run(self.pg_ctl().args(["-m", mode, "stop"]));
    }

    /// Stops the server in fast mode, and starts it.
    pub fn restart(&self) {
        self.stop(Shutdown::Fast);
        self.start();
    }

    /// Makes the server reload its configuration.
    pub fn reload(&self) {
        run(self.pg_ctl().arg("reload"));
    }

    pub fn promote(&self) {
        run(self.pg_ctl().arg("promote"));
    }

    /// The postmaster's process ID.
    pub fn postmaster(&self) -> i32 {
        let text = fs::read_to_string(self.data("postmaster.pid")).unwrap();
        text.lines().next().unwrap().parse().unwrap()
    }

    /// The process ID of the server's process that has this in its title. Waits for it.
    pub fn process_with_title(&self, text: &str) -> i32 {
        let postmaster = self.postmaster();
        let children = format!("/proc/{postmaster}/task/{postmaster}/children");
        let has_title = |pid: &&str| {
            let title = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&title).contains(text)
        };
        let mut found = None;
        wait_until("a process with that title", || {
            let children = fs::read_to_string(&children).unwrap();
            let process = children.split_whitespace().find(has_title);
            found = process.map(|pid| pid.parse().unwrap());
            found.is_some()
        });
        found.unwrap()
    }

    pub fn config(&self) -> Config {
        let mut config = Config::new();
        config
            .host_path(&self.directory)
            .user("postgres")
            .dbname("postgres");
        config
    }

    /// A connection as superuser.
    pub fn connect(&self, database: &str) -> Client {
        self.connect_as("postgres", database)
    }

    pub fn connect_as(&self, user: &str, database: &str) -> Client {
        let mut config = self.config();
        config.user(user).dbname(database);
        let start = Instant::now();
        loop {
            match config.connect(NoTls) {
                Ok(client) => return client,
                // The server may be restarting after a crash.
                Err(error) if start.elapsed() > PATIENCE => panic!("{error}\n{}", self.log()),
                Err(error)
                    if error
                        .as_db_error()
                        .is_none_or(|error| error.code().code().starts_with("57P")) =>
                {
                    std::thread::sleep(Duration::from_millis(20));
                }
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// Runs SQL in database `postgres`.
    pub fn sql(&self, sql: &str) {
        self.sql_in("postgres", sql);
    }

    pub fn sql_in(&self, database: &str, sql: &str) {
        if let Err(error) = self.connect(database).batch_execute(sql) {
            panic!("{sql}: {error:?}");
        }
    }

    /// The value of a query that returns one row with one column.
    pub fn value<T: FromSqlOwned>(&self, sql: &str) -> T {
        value(&mut self.connect("postgres"), sql)
    }

    /// Writes the list by `autoprewarm_dump_now()`, as soon as neither a load nor another dump
    /// uses the file, and returns how many blocks it has.
    pub fn dump(&self) -> i64 {
        let mut client = self.connect("postgres");
        let mut blocks = None;
        wait_until("a dump on demand", || {
            match client.query_one("SELECT autoprewarm_dump_now()", &[]) {
                Ok(row) => blocks = Some(row.get(0)),
                Err(error) => {
                    let error = SqlError::from(error);
                    let in_use = "could not perform block dump because dump file is being used";
                    assert!(error.message.starts_with(in_use), "{error:?}");
                }
            }
            blocks.is_some()
        });
        blocks.unwrap()
    }

    /// All of the server's log.
    pub fn log(&self) -> String {
        self.log_since(0)
    }

    /// The current end of the log; see [`Cluster::log_since`].
    pub fn log_end(&self) -> usize {
        fs::metadata(self.path("log")).map_or(0, |metadata| metadata.len() as usize)
    }

    pub fn log_since(&self, mark: usize) -> String {
        let mut bytes = Vec::new();
        if let Ok(mut file) = fs::File::open(self.path("log")) {
            file.seek(SeekFrom::Start(mark as u64)).unwrap();
            file.read_to_end(&mut bytes).unwrap();
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Waits until a line with that text has been logged after `mark`, and returns it.
    pub fn wait_for_log(&self, mark: usize, text: &str) -> String {
        let mut found = None;
        let start = Instant::now();
        while found.is_none() {
            assert!(
                start.elapsed() < PATIENCE,
                "timed out waiting for \"{text}\" in the log:\n{}",
                self.log_since(mark)
            );
            std::thread::sleep(Duration::from_millis(10));
            // The last line may not have been written to its end.
            found = self
                .log_since(mark)
                .split_inclusive('\n')
                .find_map(|line| line.strip_suffix('\n').filter(|line| line.contains(text)))
                .map(str::to_owned);
        }
        found.unwrap()
    }

    /// Waits until a load has ended after `mark`, and returns how many blocks were
    /// loaded and how many the list had.
    pub fn wait_for_load(&self, mark: usize) -> (u64, u64) {
        let line = self.wait_for_log(mark, "autoprewarm successfully prewarmed");
        let numbers: Vec<u64> = line
            .rsplit_once("prewarmed")
            .unwrap()
            .1
            .split_whitespace()
            .filter_map(|word| word.parse().ok())
            .collect();
        (numbers[0], numbers[1])
    }

    /// What a load that ended after `mark` has logged about skipped blocks.
    pub fn wait_for_skipped(&self, mark: usize) -> String {
        let line = self.wait_for_log(mark, "autoprewarm skipped ");
        line.split_once("skipped ").unwrap().1.to_owned()
    }

    /// Occupies a background worker slot with a parallel query until the guard is
    /// dropped.
    pub fn take_worker_slot(&self) -> WorkerSlot {
        let mut client = self.connect("postgres");
        let forced = match self.major() {
            15 => "force_parallel_mode",
            _ => "debug_parallel_query",
        };
        client.batch_execute(&format!("SET {forced} = on")).unwrap();
        let cancel = client.cancel_token();
        let query = std::thread::spawn(move || client.simple_query("SELECT pg_sleep(600)").is_ok());
        wait_until("the parallel worker", || {
            self.value(
                "SELECT EXISTS (SELECT FROM pg_stat_activity \
                                WHERE backend_type = 'parallel worker' \
                                  AND wait_event = 'PgSleep')",
            )
        });
        WorkerSlot {
            cancel,
            query: Some(query),
        }
    }

    /// The leader's process ID. `None` if no leader is running.
    pub fn leader(&self) -> Option<i32> {
        let rows = self
            .connect("postgres")
            .query(
                "SELECT pid FROM pg_stat_activity WHERE backend_type = 'autoprewarm leader'",
                &[],
            )
            .unwrap();
        rows.first().map(|row| row.get(0))
    }

    /// Waits until a leader is running and waits for something, and returns its process
    /// ID.
    pub fn wait_for_leader(&self) -> i32 {
        let mut client = self.connect("postgres");
        let mut leader = None;
        wait_until("the leader", || {
            leader = value(
                &mut client,
                "SELECT max(pid) FROM pg_stat_activity \
                 WHERE backend_type = 'autoprewarm leader' AND wait_event_type = 'Extension'",
            );
            leader.is_some()
        });
        leader.unwrap()
    }

    /// Writes a list for the next start to load.
    pub fn write_list(&self, text: impl AsRef<[u8]>) {
        let path = self.data(LIST);
        let _ = fs::remove_file(&path);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        give_to_server(&path);
    }

    /// The text of the list.
    pub fn list(&self) -> String {
        fs::read_to_string(self.data(LIST)).unwrap()
    }

    /// The records of the list.
    pub fn listed(&self) -> BTreeSet<Block> {
        let list = self.list();
        let blocks: BTreeSet<Block> = list
            .lines()
            .skip(1)
            .take_while(|line| !line.starts_with('#'))
            .map(Block::parse)
            .collect();
        let header = list.lines().next().unwrap();
        let claimed = header
            .trim_start_matches("<<")
            .trim_end_matches(">>")
            .trim();
        assert_eq!(claimed.parse::<usize>().unwrap(), blocks.len(), "{header}");
        blocks
    }

    /// Whether the list has a block of that relation.
    pub fn lists(&self, relation: Block) -> bool {
        let listed = self.listed();
        listed.iter().any(|block| block.same_relation(&relation))
    }

    /// The blocks in shared buffers, according to `pg_buffercache`.
    pub fn cached(&self) -> BTreeSet<Block> {
        self.sql("CREATE EXTENSION IF NOT EXISTS pg_buffercache");
        self.cached_without_extension()
    }

    /// The same if the extension exists already, as it must on a standby.
    pub fn cached_without_extension(&self) -> BTreeSet<Block> {
        self.connect("postgres")
            .query(
                "SELECT reldatabase, reltablespace, relfilenode, relforknumber::int8, relblocknumber \
                 FROM pg_buffercache WHERE relfilenode IS NOT NULL",
                &[],
            )
            .unwrap()
            .iter()
            .map(|row| Block {
                database: row.get(0),
                tablespace: row.get(1),
                filenumber: row.get(2),
                fork: row.get::<_, i64>(3) as u32,
                block: row.get::<_, i64>(4) as u32,
            })
            .collect()
    }

    /// Creates a tablespace, in a directory beside the data directory.
    pub fn create_tablespace(&self, name: &str) {
        let directory = self.path(name);
        fs::create_dir(&directory).unwrap();
        give_to_server(&directory);
        self.sql(&format!(
            "CREATE TABLESPACE {name} LOCATION '{}'",
            directory.display()
        ));
    }

    /// Creates a table of so many blocks with one row each, and returns its file. Its
    /// blocks are cached, if they fit.
    pub fn table_of_blocks(&self, database: &str, name: &str, blocks: u32) -> Block {
        self.sql_in(
            database,
            &format!(
                "CREATE TABLE {name} (id int, filler text) WITH (fillfactor = 10); \
                 INSERT INTO {name} SELECT g, repeat('x', 700) FROM generate_series(1, {blocks}) g"
            ),
        );
        self.file_of(database, name)
    }

    /// The same in database `postgres`.
    pub fn table(&self, name: &str, blocks: u32) -> Block {
        self.table_of_blocks("postgres", name, blocks)
    }

    /// Starts the server, and has a session fill buffers at the beginning of the load: from 18
    /// on, the rest is read by `io_method` as well. Needs the extension.
    pub fn start_with_shared_buffers_in_use(&self) {
        self.configure("pg_prewarm.autoprewarm_max_rate = 80");
        self.start();
        let mut client = self.connect("postgres");
        LoadStats::wait_for(&mut client, |stats| stats.loaded > 0);
        self.fill_buffers();
        let loaded = LoadStats::get(&mut client).loaded;
        LoadStats::wait_for(&mut client, |stats| stats.loaded > loaded);
        self.configure("pg_prewarm.autoprewarm_max_rate = 0");
        self.reload();
    }

    /// Has a session fill buffers without reading any block.
    pub fn fill_buffers(&self) {
        static FILLERS: AtomicU32 = AtomicU32::new(0);
        // A new table each time: what a dropped one leaves would be filled first.
        let number = FILLERS.fetch_add(1, Ordering::Relaxed);
        self.table(&format!("filler{number}"), 1000);
    }

    /// The current file of a relation, as a block of which the first four fields are
    /// set.
    pub fn file_of(&self, database: &str, relation: &str) -> Block {
        let row = self
            .connect(database)
            .query_one(
                "SELECT d.oid, COALESCE(NULLIF(c.reltablespace, 0), d.dattablespace), \
                        pg_relation_filenode(c.oid) \
                 FROM pg_class c, pg_database d \
                 WHERE c.oid = $1::text::regclass AND d.datname = current_database()",
                &[&relation],
            )
            .unwrap();
        Block {
            database: row.get(0),
            tablespace: row.get(1),
            filenumber: row.get(2),
            fork: 0,
            block: 0,
        }
    }

    /// The output of a client program of this installation, connected to this cluster.
    pub fn run_client(&self, program: &str, arguments: &[&str]) -> String {
        let mut command = self.installation.program(program);
        command
            .arg("-h")
            .arg(&self.directory)
            .args(["-U", "postgres"]);
        run(command.args(arguments))
    }

    /// Runs `pg_upgrade` from `old` to this cluster, which must be new. Both are
    /// stopped.
    pub fn upgrade_from(&self, old: &Cluster) {
        let mut command = self.installation.program("pg_upgrade");
        command
            .current_dir(&self.directory)
            .args(["-U", "postgres"]);
        for (option, path) in [
            ("-b", old.installation.bin()),
            ("-B", self.installation.bin()),
            ("-d", &old.data("")),
            ("-D", &self.data("")),
            ("-s", &self.directory),
        ] {
            command.arg(option).arg(path);
        }
        run(&mut command);
    }

    /// Creates a standby of this cluster, but does not start it.
    pub fn standby(&self) -> Cluster {
        let directory = new_directory("standby");
        let mut backup = self.installation.program("pg_basebackup");
        backup.arg("-h").arg(&self.directory);
        backup.args([
            "-U", "postgres", "-R", "-N", "-c", "fast", "-X", "stream", "-D",
        ]);
        run(backup.arg(directory.join("data")));
        let standby = Cluster {
            installation: self.installation.clone(),
            directory,
            crash_expected: false,
        };
        standby.configure(&format!(
            "unix_socket_directories = '{}'",
            standby.directory.display()
        ));
        standby
    }

    /// Waits until this standby has replayed what its upstream server has written, or, if
    /// that is a standby itself, replayed.
    pub fn wait_for_replay(&self, upstream: &Cluster) {
        let end: String = upstream.value(
            "SELECT CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() \
                         ELSE pg_current_wal_lsn() END::text",
        );
        let sql = format!("SELECT pg_last_wal_replay_lsn() >= '{end}'");
        wait_until("replay", || self.value(&sql));
    }
}

/// A background worker slot that a parallel query occupies.
pub struct WorkerSlot {
    cancel: CancelToken,
    query: Option<JoinHandle<bool>>,
}

impl Drop for WorkerSlot {
    fn drop(&mut self) {
        // If the server has stopped, so has the query.
        let _ = self.cancel.cancel_query(NoTls);
        let _ = self.query.take().unwrap().join();
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let _ = output(self.pg_ctl().args(["-m", "immediate", "stop"]));
        if std::thread::panicking() {
            eprintln!("the server's log:\n{}", self.log());
        } else if !self.crash_expected {
            let log = self.log();
            for sign in ["terminated by signal", "PANIC:", "TRAP:"] {
                assert!(!log.contains(sign), "a server process died:\n{log}");
            }
        }
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// Which pages of a file the operating system has cached.
pub fn cached_pages(file: &fs::File) -> Vec<bool> {
    let size = file.metadata().unwrap().len() as usize;
    let mut pages = vec![0u8; size.div_ceil(4096)];
    // SAFETY: the mapping is of the whole file and is not accessed, and `pages` has a
    // byte for each of its pages.
    unsafe {
        let start = libc::mmap(
            std::ptr::null_mut(),
            size,
            libc::PROT_READ,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        );
        assert_ne!(start, libc::MAP_FAILED);
        assert_eq!(libc::mincore(start, size, pages.as_mut_ptr()), 0);
        assert_eq!(libc::munmap(start, size), 0);
    }
    pages.into_iter().map(|page| page & 1 == 1).collect()
}

/// Removes blocks of a file from the operating system's cache. They must have been
/// flushed.
pub fn drop_pages(file: &fs::File, first: i64, blocks: i64) {
    let (offset, size) = (first * 8192, blocks * 8192);
    // SAFETY: the file is open.
    let result =
        unsafe { libc::posix_fadvise(file.as_raw_fd(), offset, size, libc::POSIX_FADV_DONTNEED) };
    assert_eq!(result, 0);
}

/// Sets the rate limit of loads, in kB a second, while the server is running.
pub fn set_rate(cluster: &Cluster, rate: u32) {
    cluster.configure(&format!("pg_prewarm.autoprewarm_max_rate = {rate}"));
    cluster.reload();
}

/// The value of a query that returns one row with one column.
pub fn value<T: FromSqlOwned>(client: &mut Client, sql: &str) -> T {
    match client.query_one(sql, &[]) {
        Ok(row) => row.get(0),
        Err(error) => panic!("{sql}: {error:?}"),
    }
}

/// Looks at the rows of `pg_stat_activity` that `from` selects until it has seen 20, and
/// asserts that these processes hold no snapshot. Some rows may have one: a process has it
/// for a moment while it looks something up, and the server reads `backend_xmin` and the
/// wait event one after the other.
pub fn assert_holds_no_snapshot(client: &mut Client, from: &str) {
    let sql = format!("SELECT count(*), count(backend_xmin) {from}");
    let (mut seen, mut with_snapshot) = (0, 0);
    wait_until("processes to look at", || {
        let row = client.query_one(&sql, &[]).unwrap();
        seen += row.get::<_, i64>(0);
        with_snapshot += row.get::<_, i64>(1);
        seen >= 20
    });
    assert!(with_snapshot <= 2, "{with_snapshot} of {seen}: {from}");
}

/// The error that a query must raise: SQLSTATE, message, detail, hint.
pub fn error(client: &mut Client, sql: &str) -> SqlError {
    match client.simple_query(sql) {
        Ok(_) => panic!("{sql}: succeeded"),
        Err(error) => error.into(),
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SqlError {
    pub sqlstate: String,
    pub message: String,
    pub detail: Option<String>,
    pub hint: Option<String>,
}

impl SqlError {
    /// An error without detail and hint.
    pub fn new(sqlstate: &str, message: impl Into<String>) -> Self {
        Self {
            sqlstate: sqlstate.to_owned(),
            message: message.into(),
            detail: None,
            hint: None,
        }
    }

    pub fn detail(self, detail: &str) -> Self {
        Self {
            detail: Some(detail.to_owned()),
            ..self
        }
    }

    pub fn hint(self, hint: &str) -> Self {
        Self {
            hint: Some(hint.to_owned()),
            ..self
        }
    }
}

impl From<postgres::Error> for SqlError {
    fn from(error: postgres::Error) -> Self {
        let error = error
            .as_db_error()
            .unwrap_or_else(|| panic!("not the server's: {error:?}"));
        Self {
            sqlstate: error.code().code().to_owned(),
            message: error.message().to_owned(),
            detail: error.detail().map(str::to_owned),
            hint: error.hint().map(str::to_owned),
        }
    }
}

/// The columns of `pg_stat_autoprewarm` about a load.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadStats {
    pub state: String,
    pub result: Option<String>,
    pub total: i64,
    pub loaded: i64,
    pub cached: i64,
    pub skipped: i64,
}

impl LoadStats {
    pub fn get(client: &mut Client) -> Self {
        let row = client
            .query_one("SELECT * FROM pg_stat_autoprewarm", &[])
            .unwrap();
        Self {
            state: row.get("state"),
            result: row.get("load_result"),
            total: row.get("blocks_total"),
            loaded: row.get("blocks_loaded"),
            cached: row.get("blocks_cached"),
            skipped: row.get("blocks_skipped"),
        }
    }

    /// Waits until `condition` is true.
    pub fn wait_for(client: &mut Client, mut condition: impl FnMut(&Self) -> bool) -> Self {
        let mut stats = Self::get(client);
        let start = Instant::now();
        while !condition(&stats) {
            assert!(start.elapsed() < PATIENCE, "timed out: {stats:?}");
            std::thread::sleep(Duration::from_millis(5));
            stats = Self::get(client);
        }
        stats
    }

    /// Waits until the load that is running or has been requested has ended.
    pub fn wait_for_end(client: &mut Client) -> Self {
        assert!(value::<bool>(client, "SELECT autoprewarm_wait('1 min')"));
        let stats = Self::get(client);
        assert_eq!(
            stats.loaded + stats.cached + stats.skipped,
            stats.total,
            "{stats:?}"
        );
        stats
    }

    pub fn result(&self) -> &str {
        self.result.as_deref().unwrap_or("none")
    }
}

/// Sends a signal to a process.
pub fn signal(pid: i32, signal: i32) {
    // SAFETY: it is a process of this test's cluster.
    let result = unsafe { libc::kill(pid, signal) };
    assert_eq!(result, 0, "process {pid} is gone");
}

/// Limits the size of files that a server process can write. `None` removes the limit.
pub fn limit_file_size(pid: i32, bytes: Option<u64>) {
    assert!(limit(pid, "fsize", bytes), "process {pid} is gone");
}

/// Limits a resource of a server process, by its name in `prlimit`. `None` removes the
/// limit. Returns false if the process does not exist any more.
pub fn limit(pid: i32, resource: &str, number: Option<u64>) -> bool {
    let limit = number.map_or("unlimited".to_owned(), |number| number.to_string());
    let mut command = as_server_user("prlimit");
    command.args([format!("--pid={pid}"), format!("--{resource}={limit}:")]);
    output(&mut command).status.success()
}

/// A block, with the fields of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Block {
    pub database: u32,
    pub tablespace: u32,
    pub filenumber: u32,
    pub fork: u32,
    pub block: u32,
}

impl Block {
    fn parse(line: &str) -> Self {
        let mut fields = line.split(',').map(|field| field.parse().unwrap());
        let mut field = || fields.next().unwrap();
        Self {
            database: field(),
            tablespace: field(),
            filenumber: field(),
            fork: field(),
            block: field(),
        }
    }

    /// Whether both blocks are of the same relation.
    pub fn same_relation(&self, other: &Self) -> bool {
        (self.database, self.tablespace, self.filenumber)
            == (other.database, other.tablespace, other.filenumber)
    }

    /// Another block of the same fork.
    pub fn at(self, block: u32) -> Self {
        Self { block, ..self }
    }

    /// The first blocks of its fork.
    pub fn first(self, count: u32) -> impl Iterator<Item = Self> {
        (0..count).map(move |block| self.at(block))
    }

    pub fn record(&self) -> String {
        format!(
            "{},{},{},{},{}",
            self.database, self.tablespace, self.filenumber, self.fork, self.block
        )
    }
}

/// A list of these blocks.
pub fn list_of(blocks: impl IntoIterator<Item = Block>) -> String {
    let records: Vec<_> = blocks.into_iter().map(|block| block.record()).collect();
    let mut text = format!("<<{}>>\n", records.len());
    for record in records {
        text.push_str(&record);
        text.push('\n');
    }
    text
}

/// The same with a trailer. `digits` has the usage counts of all blocks, in one line.
pub fn list_with_usage_counts(blocks: impl IntoIterator<Item = Block>, digits: &str) -> String {
    let mut list = list_of(blocks);
    list.push_str("# pg_prewarm 2.0\n# usage counts\n");
    for line in digits.as_bytes().chunks(120) {
        list.push_str(&format!("{}\n", std::str::from_utf8(line).unwrap()));
    }
    list.push_str(&format!(
        "# crc32c 0x{:08x}\n",
        crc32c::crc32c(list.as_bytes())
    ));
    list
}
