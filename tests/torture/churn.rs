//! Sessions that run statements during a round, in tables of their own, or in tables
//! whose content they do not change.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::JoinHandle;

use postgres::{Config, NoTls};
use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;

use super::arena::{Arena, DATABASES, rng};

/// Generates the next statement for the session of that number.
type Statements = fn(&mut StdRng, usize, &[(&'static str, String)]) -> (&'static str, String);

/// Running sessions. They end when `end` is called.
pub struct Churn {
    stop: Arc<AtomicBool>,
    sessions: Vec<JoinHandle<Vec<String>>>,
}

impl Churn {
    pub fn begin(arena: &mut Arena, statements: Statements, sessions: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let tables: Vec<_> = arena
            .tables
            .iter()
            .filter(|table| table.name != "anchor")
            .map(|table| (table.database, table.name.clone()))
            .collect();
        let sessions = (0..sessions)
            .map(|number| {
                let (stop, tables) = (stop.clone(), tables.clone());
                let config = arena.cluster.config();
                let mut rng = rng(arena.round.rng.random(), number as u64);
                std::thread::spawn(move || {
                    let mut wrong = Vec::new();
                    while !stop.load(Relaxed) {
                        let (database, sql) = statements(&mut rng, number, &tables);
                        wrong.extend(run(&config, database, &sql));
                    }
                    wrong
                })
            })
            .collect();
        Self { stop, sessions }
    }

    /// Ends them, and panics if one received an error that should not occur.
    pub fn end(mut self) {
        self.stop.store(true, Relaxed);
        let wrong: Vec<String> = std::mem::take(&mut self.sessions)
            .into_iter()
            .flat_map(|session| session.join().unwrap())
            .collect();
        assert!(wrong.is_empty(), "{wrong:#?}");
    }
}

/// A round that has failed does not wait for them.
impl Drop for Churn {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
    }
}

/// Runs one statement in a new session, and describes its error if that is not an
/// ordinary one.
fn run(config: &Config, database: &str, sql: &str) -> Option<String> {
    let mut config = config.clone();
    let connected = config.dbname(database).options("-c statement_timeout=30s");
    let error = match connected.connect(NoTls) {
        // The server may be restarting, or have no free connection.
        Err(_) => {
            std::thread::sleep(std::time::Duration::from_millis(10));
            return None;
        }
        Ok(mut client) => client.batch_execute(sql).err()?,
    };
    let code = error.as_db_error()?.code().code();
    let internal = code.starts_with("XX") && !is_known(&error);
    (internal || code == "57014").then(|| format!("{sql}: {error:?}"))
}

/// Errors without SQLSTATEs of their own: PostgreSQL raises them if two sessions run
/// DDL at the same time, and contrib's module and ours if two dump.
fn is_known(error: &postgres::Error) -> bool {
    error.as_db_error().is_some_and(|error| {
        [
            "could not perform block dump",
            "tuple concurrently",
            "cache lookup failed",
            "could not open relation with OID",
        ]
        .iter()
        .any(|text| error.message().starts_with(text))
    })
}

/// What any application may do, and queries of autoprewarm's views.
pub fn ordinary(
    rng: &mut StdRng,
    number: usize,
    tables: &[(&'static str, String)],
) -> (&'static str, String) {
    let database = *DATABASES.choose(rng).unwrap();
    let own = format!("churn_{number}");
    let rows = rng.random_range(1..500);
    let sql = match rng.random_range(0..9) {
        0 => format!("CREATE TABLE IF NOT EXISTS {own} (id int, filler text)"),
        1 => format!(
            "INSERT INTO {own} SELECT g, repeat('x', 500) FROM generate_series(1, {rows}) g"
        ),
        2 => format!("DROP TABLE IF EXISTS {own}"),
        3 => format!("CREATE TEMP TABLE {own}_temp AS SELECT g FROM generate_series(1, {rows}) g"),
        4 => format!("CREATE INDEX IF NOT EXISTS {own}_id ON {own} (id)"),
        5 => format!("UPDATE {own} SET id = id + 1; DELETE FROM {own} WHERE id % 3 = 0"),
        6 => format!("VACUUM {own}"),
        7 => "SELECT * FROM pg_stat_autoprewarm, pg_stat_progress_prewarm".to_owned(),
        _ => {
            let (database, name) = tables.choose(rng).unwrap();
            return (database, format!("SELECT pg_prewarm('{name}')"));
        }
    };
    (database, sql)
}

/// DDL that moves a table's content to another file or tablespace.
pub fn rewrites(
    rng: &mut StdRng,
    _number: usize,
    tables: &[(&'static str, String)],
) -> (&'static str, String) {
    let (database, name) = tables.choose(rng).unwrap();
    let sql = match rng.random_range(0..8) {
        0 => format!("VACUUM FULL {name}"),
        1 => format!("REINDEX TABLE {name}"),
        2 => format!("REINDEX TABLE CONCURRENTLY {name}"),
        3 => format!("ALTER TABLE {name} SET TABLESPACE space"),
        4 => format!("ALTER TABLE {name} SET TABLESPACE pg_default"),
        5 => format!("CLUSTER {name} USING {name}_id_idx"),
        6 => format!("BEGIN; LOCK TABLE {name}; SELECT pg_sleep(0.05); COMMIT"),
        _ => format!("VACUUM (TRUNCATE) {name}"),
    };
    (database, sql)
}

/// Creates and drops databases.
pub fn databases(
    rng: &mut StdRng,
    number: usize,
    _tables: &[(&'static str, String)],
) -> (&'static str, String) {
    let name = format!("passing_{number}");
    let sql = match rng.random_range(0..6) {
        0 | 1 => {
            let strategy = ["wal_log", "file_copy"].choose(rng).unwrap();
            format!("CREATE DATABASE {name} STRATEGY {strategy}")
        }
        2 => format!("DROP DATABASE IF EXISTS {name} WITH (FORCE)"),
        3 => format!("DROP DATABASE IF EXISTS {name}"),
        4 => format!("ALTER DATABASE {name} SET TABLESPACE space"),
        _ => format!("ALTER DATABASE {name} IS_TEMPLATE {}", rng.random_bool(0.3)),
    };
    ("postgres", sql)
}

impl Arena {
    /// Drops what sessions have left.
    pub fn clear_up(&self) {
        for database in DATABASES {
            let tables = self.query(
                database,
                "SELECT relname::text FROM pg_class WHERE relname LIKE 'churn%' AND relkind = 'r' \
                    AND relpersistence = 'p'",
            );
            for row in tables {
                self.run(database, &format!("DROP TABLE {}", row.get::<_, &str>(0)));
            }
        }
        let passing = self.query(
            "postgres",
            "SELECT datname::text FROM pg_database WHERE datname LIKE 'passing%'",
        );
        for row in passing {
            let name: &str = row.get(0);
            self.run(
                "postgres",
                &format!("ALTER DATABASE {name} IS_TEMPLATE false"),
            );
            self.run("postgres", &format!("DROP DATABASE {name} WITH (FORCE)"));
        }
    }
}
