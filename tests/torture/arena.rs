//! The cluster of all rounds, its content, and what a round has done to it.
//!
//! Each row can be checked by itself: a table has the ids from `low` up to `high`, each
//! with a filler that is computed from it. The tables named `anchor` never change, so a
//! list must not lose their blocks without a reason.

use std::collections::BTreeMap;
use std::fs;
use std::thread::JoinHandle;
use std::time::Duration;

use postgres::{Client, Row};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

use super::census::Census;
use super::list::List;
use super::process;
use crate::common::{
    Block, Cluster, Fault, LIST, PATIENCE, Shutdown, give_to_server, value, wait_until,
};

pub const DATABASES: [&str; 3] = ["postgres", "one", "two"];

/// Longer than anything that the server does should take.
pub const STATEMENT_TIMEOUT: &str = "SET statement_timeout = '30s'";

pub struct Arena {
    pub cluster: Cluster,
    pub tables: Vec<Table>,
    pub anchors: Vec<Block>,
    /// The list as of the last check, or as a round has replaced it.
    pub list: Option<List>,
    /// The last error that `pg_stat_autoprewarm` has reported.
    pub last_error: Option<String>,
    pub census: Census,
    pub round: Round,
    settings: BTreeMap<&'static str, String>,
    tables_made: u32,
}

/// A table whose content is known.
#[derive(Clone, Debug)]
pub struct Table {
    pub database: &'static str,
    pub name: String,
    pub low: i64,
    pub high: i64,
    pub unlogged: bool,
}

/// What a round has done, and therefore what may differ after it.
pub struct Round {
    pub rng: StdRng,
    /// The end of the log before the round.
    pub mark: usize,
    /// How many buffers the server had allocated before the round.
    pub allocated: i64,
    /// The processes that the round has killed.
    pub killed: Vec<i32>,
    /// Texts that autoprewarm's warnings and errors may have, besides those that are
    /// always allowed.
    pub allowed: Vec<&'static str>,
    /// Readable blocks may have been skipped, and may be missing in the list.
    pub may_skip: bool,
    /// The round has written the list itself.
    pub list_replaced: bool,
    /// The round has set the clock.
    pub clock_set: bool,
    /// Sessions are busy during the whole round.
    pub is_busy: bool,
}

impl Round {
    pub fn new(seed: u64, number: u64, mark: usize) -> Self {
        Self {
            rng: rng(seed, number),
            mark,
            allocated: 0,
            killed: Vec::new(),
            allowed: Vec::new(),
            may_skip: false,
            list_replaced: false,
            clock_set: false,
            is_busy: false,
        }
    }

    /// A random one of `from`.
    pub fn choose<T: Clone>(&mut self, from: &[T]) -> T {
        from.choose(&mut self.rng).unwrap().clone()
    }

    pub fn coin(&mut self) -> bool {
        self.rng.random()
    }

    /// Waits for a random time of up to so many milliseconds.
    pub fn pause(&mut self, milliseconds: u64) {
        let micros = self.rng.random_range(0..=milliseconds * 1000);
        std::thread::sleep(Duration::from_micros(micros));
    }

    pub fn kill(&mut self, pid: i32) {
        self.killed.push(pid);
        process::signal(pid, libc::SIGKILL);
    }
}

/// The random numbers of a round, or of the order of rounds.
pub fn rng(seed: u64, number: u64) -> StdRng {
    StdRng::seed_from_u64(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ number)
}

/// The number of shared buffers, far more than the anchors need.
pub const BUFFERS: i64 = 8192;

/// A call in a session of its own.
pub struct Call {
    pub pid: i32,
    thread: JoinHandle<Result<(), postgres::Error>>,
}

impl Call {
    /// Waits for its end, and returns its SQLSTATE: `None` if it succeeded, and an
    /// empty string if the connection was lost.
    pub fn wait(self) -> Option<String> {
        let error = self.thread.join().unwrap().err()?;
        let state = error.code().map(|code| code.code().to_owned());
        Some(state.unwrap_or_default())
    }
}

impl Arena {
    pub fn new() -> Self {
        let mut cluster = Cluster::build()
            .checksums()
            .setting(&format!("shared_buffers = {BUFFERS}"))
            .setting("dynamic_shared_memory_type = mmap")
            .setting("max_connections = 20")
            .setting("max_worker_processes = 6")
            .setting("max_logical_replication_workers = 0")
            .setting("max_locks_per_transaction = 20")
            .setting("allow_in_place_tablespaces = on")
            .setting("include_if_exists = 'torture.conf'")
            .create();
        cluster.expect_crash();
        cluster.set_fault(Fault::ReadDelay, 0);
        let mut arena = Self {
            cluster,
            tables: Vec::new(),
            anchors: Vec::new(),
            list: None,
            last_error: None,
            census: Census::default(),
            round: Round::new(0, 0, 0),
            settings: BTreeMap::new(),
            tables_made: 0,
        };
        arena.set("pg_prewarm.autoprewarm_interval", "0");
        arena.cluster.start();
        arena.furnish();
        arena.warm();
        arena
    }

    fn furnish(&mut self) {
        self.cluster.sql("CREATE TABLESPACE space LOCATION ''");
        self.cluster.sql("CREATE EXTENSION pg_buffercache");
        self.cluster.sql("CREATE DATABASE one");
        self.cluster.sql("CREATE DATABASE two TABLESPACE space");
        for database in DATABASES {
            let mut client = self.cluster.connect(database);
            client.batch_execute("CREATE EXTENSION pg_prewarm").unwrap();
            if has_amcheck(&self.cluster) {
                client.batch_execute("CREATE EXTENSION amcheck").unwrap();
            }
            client
                .batch_execute(&format!(
                    "CREATE TABLE anchor (id bigint PRIMARY KEY, filler text); \
                     INSERT INTO anchor {}; \
                     CREATE TABLE anchor_toast (id bigint, filler text); \
                     ALTER TABLE anchor_toast ALTER filler SET STORAGE EXTERNAL; \
                     INSERT INTO anchor_toast {}; \
                     ALTER TABLE anchor_toast ALTER filler SET STORAGE EXTENDED",
                    rows(0, 1500),
                    "SELECT g, repeat(md5(g::text), 100) FROM generate_series(0, 49) g",
                ))
                .unwrap();
            client
                .batch_execute("VACUUM (FREEZE, ANALYZE) anchor, anchor_toast")
                .unwrap();
            self.tables.push(Table {
                database,
                name: "anchor".to_owned(),
                low: 0,
                high: 1500,
                unlogged: false,
            });
            self.anchors.extend(
                client
                    .query(
                        "SELECT d.oid, d.dattablespace, pg_relation_filenode(c.oid), \
                                pg_relation_size(c.oid) / 8192 \
                         FROM pg_class c, pg_database d, pg_class t \
                         WHERE d.datname = current_database() \
                           AND t.relname = 'anchor_toast' \
                           AND (c.relname LIKE 'anchor%' OR c.oid = t.reltoastrelid \
                                OR c.oid IN (SELECT indexrelid FROM pg_index \
                                             WHERE indrelid = t.reltoastrelid))",
                        &[],
                    )
                    .unwrap()
                    .iter()
                    .flat_map(|row| {
                        let relation = Block {
                            database: row.get(0),
                            tablespace: row.get(1),
                            filenumber: row.get(2),
                            fork: 0,
                            block: 0,
                        };
                        relation.first(row.get::<_, i64>(3) as u32)
                    }),
            );
            for _ in 0..3 {
                self.make_table(database);
            }
        }
        self.cluster.sql("CHECKPOINT");
    }

    fn make_table(&mut self, database: &'static str) {
        self.tables_made += 1;
        let table = Table {
            database,
            name: format!("work_{}", self.tables_made),
            low: 0,
            high: self.round.rng.random_range(1..400),
            unlogged: self.round.rng.random_ratio(1, 4),
        };
        let unlogged = if table.unlogged { "UNLOGGED" } else { "" };
        let space = self.round.choose(&["pg_default", "space"]);
        self.run(
            database,
            &format!(
                "CREATE {unlogged} TABLE {0} (id bigint, filler text) TABLESPACE {space}; \
                 INSERT INTO {0} {1}; CREATE INDEX ON {0} (id)",
                table.name,
                rows(table.low, table.high),
            ),
        );
        self.tables.push(table);
    }

    /// Changes a few tables, and records what they have then.
    pub fn work(&mut self) {
        for _ in 0..self.round.rng.random_range(1..=3) {
            let changeable: Vec<usize> = (0..self.tables.len())
                .filter(|&index| self.tables[index].name != "anchor")
                .collect();
            let index = self.round.choose(&changeable);
            let Table {
                database,
                name,
                low,
                high,
                ..
            } = self.tables[index].clone();
            let some = self.round.rng.random_range(1..200);
            match self.round.rng.random_range(0..8) {
                0 | 1 if high - low < 2000 => {
                    self.run(
                        database,
                        &format!("INSERT INTO {name} {}", rows(high, high + some)),
                    );
                    self.tables[index].high += some;
                }
                2 => {
                    let low = high.min(low + some);
                    self.run(database, &format!("DELETE FROM {name} WHERE id < {low}"));
                    self.tables[index].low = low;
                }
                3 => self.run(database, &format!("VACUUM {name}")),
                4 => self.run(database, &format!("UPDATE {name} SET filler = filler")),
                5 => {
                    self.run(database, &format!("TRUNCATE {name}"));
                    self.tables[index].low = high;
                }
                6 => {
                    self.run(database, &format!("DROP TABLE {name}"));
                    self.tables.remove(index);
                    self.make_table(database);
                }
                _ => self.run(database, &format!("CREATE INDEX ON {name} (filler, id)")),
            }
        }
    }

    /// Runs SQL, which must succeed, though it may have to be repeated.
    pub fn run(&self, database: &str, sql: &str) {
        let mut client = self.connect(database);
        wait_until(sql, || match client.batch_execute(sql) {
            Ok(()) => true,
            Err(error) => match error.code().map(|code| code.code()) {
                Some("40P01" | "55P03") => false,
                _ => panic!("{sql}: {error:?}"),
            },
        });
    }

    pub fn connect(&self, database: &str) -> Client {
        let mut client = self.cluster.connect(database);
        client.batch_execute(STATEMENT_TIMEOUT).unwrap();
        client
    }

    pub fn query(&self, database: &str, sql: &str) -> Vec<Row> {
        match self.connect(database).query(sql, &[]) {
            Ok(rows) => rows,
            Err(error) => panic!("{sql}: {error:?}"),
        }
    }

    /// Starts a call in a session of its own, and does not wait for it.
    pub fn call(&self, database: &str, sql: &str) -> Call {
        let mut client = self.connect(database);
        let sql = sql.to_owned();
        Call {
            pid: value(&mut client, "SELECT pg_backend_pid()"),
            thread: std::thread::spawn(move || client.batch_execute(&sql)),
        }
    }

    /// Sets a setting in the configuration, which the server has to reload.
    pub fn set(&mut self, name: &'static str, value: &str) {
        self.settings.insert(name, value.to_owned());
        self.write_settings();
    }

    pub fn reset(&mut self, name: &str) {
        self.settings.remove(name);
        self.write_settings();
    }

    fn write_settings(&self) {
        let lines: String = self
            .settings
            .iter()
            .map(|(name, value)| format!("{name} = {value}\n"))
            .collect();
        // Atomically, so that the server never reads half of it.
        let new = self.cluster.data("torture.conf.new");
        fs::write(&new, lines).unwrap();
        give_to_server(&new);
        fs::rename(&new, self.cluster.data("torture.conf")).unwrap();
    }

    /// Makes the running server reload its configuration.
    pub fn reload(&self) {
        process::signal(self.cluster.postmaster(), libc::SIGHUP);
    }

    /// Makes loads take seconds, by slow reads or by a rate limit.
    pub fn slow_down(&mut self) {
        match self.round.rng.random_range(0..3) {
            0 => {
                let delay = self.round.rng.random_range(2..=10);
                self.cluster.set_fault(Fault::ReadDelay, delay);
            }
            1 => self.limit_rate(),
            _ => {
                let delay = self.round.rng.random_range(1..=3);
                self.cluster.set_fault(Fault::ReadDelay, delay);
                self.limit_rate();
            }
        }
    }

    fn limit_rate(&mut self) {
        let rate = self.round.rng.random_range(2000..8000);
        self.set("pg_prewarm.autoprewarm_max_rate", &rate.to_string());
    }

    /// Removes all faults and limits.
    pub fn back_to_normal(&mut self) {
        for fault in Fault::ALL {
            self.cluster.set_fault(fault, 0);
        }
        self.reset("pg_prewarm.autoprewarm_max_rate");
        if !process::all(&self.cluster.data("")).is_empty() {
            self.reload();
        }
    }

    /// Restarts the server in one of all ways, with a load that takes seconds, and
    /// waits for a random time.
    pub fn begin_slow_load(&mut self) {
        self.slow_down();
        match self.round.rng.random_range(0..4) {
            0 => self.restart(Shutdown::Fast),
            1 => self.restart(Shutdown::Smart),
            2 => self.restart(Shutdown::Immediate),
            _ => {
                self.reload();
                self.crash();
            }
        }
        self.round.pause(600);
    }

    pub fn restart(&mut self, how: Shutdown) {
        self.cluster.stop(how);
        self.cluster.start();
    }

    /// Kills a backend, after which the server reinitializes.
    pub fn crash(&mut self) {
        let mut client = self.connect("postgres");
        let pid = value(&mut client, "SELECT pg_backend_pid()");
        self.kill_and_recover(pid);
    }

    /// Kills a server process, and waits until the server reinitializes.
    pub fn kill_and_recover(&mut self, pid: i32) {
        let mark = self.cluster.log_end();
        self.round.kill(pid);
        self.cluster
            .wait_for_log(mark, "all server processes terminated; reinitializing");
    }

    /// The process ID of a process of that name, once it exists. `None` if none is
    /// started within a second.
    pub fn find(&mut self, name: &str) -> Option<i32> {
        let data = self.cluster.data("");
        for _ in 0..200 {
            let pids = process::named(&data, name);
            if !pids.is_empty() {
                return Some(self.round.choose(&pids));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        None
    }

    /// Waits until the leader is running and its load has ended, and returns its
    /// process ID.
    pub fn settle(&self) -> i32 {
        let mut leader = None;
        let start = std::time::Instant::now();
        while leader.is_none() {
            assert!(start.elapsed() < PATIENCE, "the load does not end");
            leader = self.try_to_settle();
        }
        leader.unwrap()
    }

    fn try_to_settle(&self) -> Option<i32> {
        let mut client = self.connect("postgres");
        // The server may be about to crash.
        let done: bool = client
            .query_one("SELECT autoprewarm_wait('20s')", &[])
            .ok()?
            .get(0);
        let row = client
            .query_one("SELECT pid, state FROM pg_stat_autoprewarm", &[])
            .ok()?;
        let leader: Option<i32> = row.get(0);
        if row.get::<_, &str>(1) == "load suspended" {
            client.batch_execute("SELECT autoprewarm_load_now()").ok()?;
        }
        if done && row.get::<_, &str>(1) == "idle" && leader.is_some() {
            return leader;
        }
        std::thread::sleep(Duration::from_millis(20));
        None
    }

    /// Loads and dumps, so that all tables are cached and listed.
    pub fn warm(&mut self) {
        self.settle();
        for database in DATABASES {
            self.query(database, "SELECT pg_prewarm_database(catalogs => true)");
        }
        self.cluster.dump();
        self.cluster.sql("SELECT autoprewarm_load_now()");
        self.settle();
        self.list = Some(self.read_list());
        self.round.list_replaced = true;
    }

    /// How many buffers the server has allocated since its statistics began.
    pub fn count_allocated(&self) -> i64 {
        let row = self.query("postgres", "SELECT buffers_alloc FROM pg_stat_bgwriter");
        row[0].get(0)
    }

    pub fn read_list(&self) -> List {
        List::read(&self.cluster.data(LIST))
    }
}

/// A query for the rows with these ids.
fn rows(low: i64, high: i64) -> String {
    format!(
        "SELECT g, repeat(md5(g::text), 20) FROM generate_series({low}, {}) g",
        high - 1
    )
}

/// The wheel from which 16 is installed has no contrib modules.
pub fn has_amcheck(cluster: &Cluster) -> bool {
    cluster.major() != 16
}
