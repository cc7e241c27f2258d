//! What must be true after every round.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use postgres::{Client, Row};

use super::arena::{Arena, BUFFERS, DATABASES, STATEMENT_TIMEOUT, has_amcheck};
use super::census::{Census, Count};
use super::process;
use crate::common::{Block, Cluster, Installation, PATIENCE, Shutdown, run, value};

/// Reasons for skipped blocks that are always allowed: relations may have changed since
/// the dump, and template databases are never loaded.
const ALWAYS_EXCUSED: [&str; 4] = [
    "skipped_template_database",
    "skipped_no_database",
    "skipped_no_relation",
    "skipped_no_block",
];

const OTHER_REASONS: [&str; 7] = [
    "skipped_illegal",
    "skipped_unreadable",
    "skipped_locked",
    "skipped_no_free_buffer",
    "skipped_no_shared_memory",
    "skipped_interrupted",
    "skipped_cancelled",
];

/// After three crashes during loads, whatever has caused them, the next load is not begun.
const CRASHED: &str = "skipping prewarm because the server crashed during the last 3 loads";

/// What autoprewarm's processes may log at any time, since they may be terminated or
/// the server may go down.
const ALWAYS_ALLOWED: [&str; 4] = [
    "due to administrator command",
    "because of crash of another server process",
    "due to unexpected postmaster exit",
    CRASHED,
];

impl Arena {
    /// Checks everything, and loads everything again for the next round. Panics if a
    /// check fails.
    pub fn check(&mut self) {
        let leader = self.settle();
        self.check_processes(leader);
        let stats = self.check_stats(leader);
        let missing = self.check_cache();
        self.check_list(&stats, missing);
        self.check_data();
        self.check_census(leader);
        self.check_log();
        if self.round.may_skip || missing {
            self.warm();
        }
    }

    /// Whether the server may have evicted any block: on 19, which has no list of free
    /// buffers, the clock hand passes all blocks when as many buffers have been used as there
    /// are.
    fn may_have_evicted(&self) -> bool {
        let now = self.count_allocated();
        // A crash resets the statistics.
        let since = match now >= self.round.allocated {
            true => now - self.round.allocated,
            false => now,
        };
        self.cluster.major() >= 19 && since > BUFFERS
    }

    fn check_processes(&self, leader: i32) {
        let data = self.cluster.data("");
        assert_eq!(process::named(&data, "autoprewarm leader"), [leader]);
        let rows = self.query(
            "postgres",
            "SELECT pid FROM pg_stat_activity WHERE backend_type = 'autoprewarm leader'",
        );
        let shown: Vec<i32> = rows.iter().map(|row| row.get(0)).collect();
        assert_eq!(shown, [leader], "pg_stat_activity's leader");
    }

    /// `pg_stat_autoprewarm` must be right about a load that has ended.
    fn check_stats(&mut self, leader: i32) -> Row {
        let (row, log) = self.stats_and_log();
        let count = |name: &str| row.get::<_, i64>(name);
        assert_eq!(row.get::<_, Option<i32>>("pid"), Some(leader));
        let result: Option<&str> = row.get("load_result");
        if !self.round.may_skip {
            assert_eq!(result, Some("completed"), "the load's result");
        }
        let [total, loaded, cached, skipped] =
            ["total", "loaded", "cached", "skipped"].map(|name| count(&format!("blocks_{name}")));
        assert_eq!(loaded + cached + skipped, total, "blocks of the load");
        // If the list fills shared buffers, it does not fit completely: a few buffers
        // stay free.
        let is_long = total > BUFFERS - 1000;
        // Clients have waited for each other until the server resolved the deadlock.
        let was_deadlocked = log.contains("deadlock detected");
        let has_excuse = |name| match name {
            "skipped_no_free_buffer" => is_long,
            "skipped_locked" => was_deadlocked,
            _ => false,
        };
        let excused: i64 = ALWAYS_EXCUSED.into_iter().map(count).sum();
        let others: Vec<(&str, i64)> = OTHER_REASONS
            .into_iter()
            .map(|name| (name, count(name)))
            .filter(|&(_, blocks)| blocks != 0)
            .collect();
        let unexcused: i64 = others.iter().map(|(_, blocks)| blocks).sum();
        assert_eq!(excused + unexcused, skipped, "skipped by reason");
        assert!(
            self.round.may_skip || others.iter().all(|(name, _)| has_excuse(name)),
            "skipped without an excuse: {others:?}"
        );
        // Then not all of it has to be cached.
        self.round.may_skip |= is_long && unexcused > 0;
        assert_eq!(wrong_in_log(&row, &log), None);
        let times = self.query(
            "postgres",
            "SELECT load_start_time <= load_end_time AND load_end_time <= now() \
                AND COALESCE(last_dump_time <= now(), true) FROM pg_stat_autoprewarm",
        );
        assert!(
            self.round.clock_set || times[0].get(0),
            "the times are not in order: {row:?}"
        );
        let error: Option<String> = row.get("last_error");
        if error != self.last_error {
            if let Some(text) = &error {
                assert!(
                    is_allowed(text, &[CRASHED]) || is_allowed(text, &self.round.allowed),
                    "the last error is {text:?}"
                );
            }
            self.last_error.clone_from(&error);
        }
        row
    }

    /// The statistics, and what the round has logged. If blocks that were locked are loaded
    /// later, they are counted before that is logged.
    fn stats_and_log(&self) -> (Row, String) {
        let start = Instant::now();
        loop {
            let row = self
                .query("postgres", "SELECT * FROM pg_stat_autoprewarm")
                .remove(0);
            let log = self.cluster.log_since(self.round.mark);
            if wrong_in_log(&row, &log).is_none() || start.elapsed() > PATIENCE / 6 {
                return (row, log);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// The listed blocks that still exist must be cached, and no process may hold anything.
    /// Returns whether a block of an anchor is missing.
    fn check_cache(&self) -> bool {
        let cached = self.cluster.cached_without_extension();
        let missing = self.missing_anchors(&cached);
        assert!(
            missing == 0 || self.round.may_skip || self.may_have_evicted(),
            "{missing} blocks that nothing was done to are not cached"
        );
        check_at_rest(&self.cluster);
        missing > 0
    }

    /// The number of the anchors' blocks that are not among `blocks`.
    pub fn missing_anchors(&self, blocks: &BTreeSet<Block>) -> usize {
        let missing = self.anchors.iter().filter(|block| !blocks.contains(block));
        missing.count()
    }

    /// The list must be complete, be the last one that was written, and have all the
    /// blocks that it should.
    fn check_list(&mut self, stats: &Row, anchors_were_missing: bool) {
        let list = self.read_list();
        let records = list.blocks.len();
        if !self.round.list_replaced {
            let shown: Option<i64> = stats.get("last_dump_blocks");
            let log = self.cluster.log_since(self.round.mark);
            let logged = log
                .rsplit_once("wrote block details for ")
                .and_then(|(_, rest)| rest.split_once(' '))
                .map(|(number, _)| number.parse::<usize>().unwrap());
            let unchanged = self.list.as_ref() == Some(&list);
            // A process may exit after it has written the list and before it logs that.
            let ended = !self.round.killed.is_empty() || log.contains("FATAL:  out of memory");
            if !ended || unchanged && logged.is_none() {
                assert!(
                    logged.map_or(unchanged, |logged| logged == records),
                    "{logged:?} were logged to be dumped last, the list has {records} records"
                );
                assert!(
                    shown.is_none_or(|shown| shown == records as i64),
                    "{shown:?} are said to be dumped last, the list has {records} records"
                );
            }
        }
        let missing = self.missing_anchors(&list.blocks);
        assert!(
            missing == 0 || anchors_were_missing || self.round.may_skip,
            "the list has shrunk to {records} records and lacks {missing} that it should have"
        );
        self.list = Some(list);
    }

    /// All rows must exist and be right, and pages and indexes must be sound.
    fn check_data(&mut self) {
        let log = self.cluster.log_since(self.round.mark);
        // Either empties the unlogged tables.
        let recovered = ["automatic recovery in progress", "entering standby mode"]
            .iter()
            .any(|sign| log.contains(sign));
        for database in DATABASES {
            let mut client = self.connect(database);
            for table in self
                .tables
                .iter_mut()
                .filter(|table| table.database == database)
            {
                let row = client
                    .query_one(
                        &format!(
                            "SELECT count(*), COALESCE(min(id), {1}), COALESCE(max(id) + 1, {1}), \
                                    count(*) FILTER (WHERE filler <> repeat(md5(id::text), 20)) \
                             FROM {0}",
                            table.name, table.high
                        ),
                        &[],
                    )
                    .unwrap_or_else(|error| panic!("{table:?}: {error:?}"));
                let found: [i64; 4] = [0, 1, 2, 3].map(|index| row.get(index));
                // Of an unlogged table, the rows inserted since the recovery exist.
                if recovered && table.unlogged && (table.low..=table.high).contains(&found[1]) {
                    table.low = found[1];
                }
                assert_eq!(
                    found,
                    [table.high - table.low, table.low, table.high, 0],
                    "{table:?}"
                );
            }
            let bad: i64 = client
                .query_one(
                    "SELECT count(*) FROM anchor_toast \
                     WHERE filler IS DISTINCT FROM repeat(md5(id::text), 100)",
                    &[],
                )
                .unwrap_or_else(|error| panic!("{error:?}"))
                .get(0);
            assert_eq!(bad, 0, "TOAST values");
            if has_amcheck(&self.cluster) {
                amcheck(&mut client);
            }
        }
    }

    /// No files, memory or segments may have leaked.
    fn check_census(&mut self, leader: i32) {
        check_census(&mut self.census, &self.cluster, leader);
    }

    /// No process may have died of anything but what the round has done, and
    /// autoprewarm's processes may have complained about nothing else.
    pub fn check_log(&self) {
        check_log(&self.cluster.log_since(self.round.mark), &self.round);
    }

    /// The server's own programs must find nothing wrong either. The server is stopped
    /// after that.
    pub fn check_thoroughly(&mut self) {
        if has_amcheck(&self.cluster) {
            run(Installation::ours()
                .program("pg_amcheck")
                .arg("-h")
                .arg(self.cluster.path(""))
                .args(["-U", "postgres", "--all", "--heapallindexed"]));
        }
        self.cluster.stop(Shutdown::Fast);
        run(Installation::ours()
            .program("pg_checksums")
            .args(["--check", "-D"])
            .arg(self.cluster.data("")));
        let data = self.cluster.data("");
        process::wait_for_none(&data);
        assert_eq!(super::census::segments(&self.cluster), 0);
        assert!(!Path::new(&data.join("autoprewarm.blocks.tmp")).exists());
    }
}

/// What the log says about the last load, if it is not what the statistics say.
fn wrong_in_log(stats: &Row, log: &str) -> Option<String> {
    let (_, line) = log.rsplit_once("autoprewarm successfully prewarmed ")?;
    let result: Option<&str> = stats.get("load_result");
    if result != Some("completed") || line.contains("after the promotion") {
        return None;
    }
    // What was locked then was loaded later.
    let later: i64 = line
        .lines()
        .filter_map(|line| line.split_once("autoprewarm prewarmed ")?.1.split_once(' '))
        .map(|(blocks, _)| blocks.parse::<i64>().unwrap())
        .sum();
    let count = |name: &str| stats.get::<_, i64>(name);
    let then = count("blocks_loaded") + count("blocks_cached") - later;
    let total = count("blocks_total");
    let logged = format!("{then} of {total} previously-loaded blocks\n");
    (!line.starts_with(&logged)).then(|| format!("not {logged:?} but {line}"))
}

/// Counts what a server at rest has, which may not be more than before.
pub fn check_census(census: &mut Census, server: &Cluster, leader: i32) {
    let start = Instant::now();
    loop {
        let count = Count::take(server, leader);
        let Some(wrong) = census.judge(&count, 0) else {
            census.note(&count);
            return;
        };
        assert!(start.elapsed() < PATIENCE / 6, "{wrong}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// When nothing is loaded, no process may hold a buffer pin or a lock, or report progress.
pub fn check_at_rest(server: &Cluster) {
    for (what, sql) in [
        (
            "buffer pins",
            "SELECT count(*) FROM pg_buffercache WHERE pinning_backends > 0",
        ),
        (
            "locks of processes that are gone, or at rest",
            "SELECT count(*) FROM pg_locks l LEFT JOIN pg_stat_activity a USING (pid) \
             WHERE l.pid <> pg_backend_pid() \
               AND (a.pid IS NULL OR a.backend_type LIKE 'autoprewarm%')",
        ),
        (
            "rows of progress",
            "SELECT count(*) FROM pg_stat_progress_prewarm",
        ),
        (
            "workers at rest",
            "SELECT count(*) FROM pg_stat_activity \
             WHERE backend_type IN ('autoprewarm worker', 'autoprewarm follower')",
        ),
    ] {
        wait_for_zero(server, what, sql);
    }
}

/// Waits until the count is zero.
pub fn wait_for_zero(server: &Cluster, what: &str, sql: &str) {
    let mut client = server.connect("postgres");
    client.batch_execute(STATEMENT_TIMEOUT).unwrap();
    let start = Instant::now();
    loop {
        let left: i64 = value(&mut client, sql);
        if left == 0 {
            return;
        }
        // A process that exits takes a while.
        assert!(start.elapsed() < PATIENCE / 6, "{left} {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Checks all tables and indexes of a database.
fn amcheck(client: &mut Client) {
    amcheck_of(client, "true");
}

/// The same for those of which a condition on `pg_class c` is true. The server may be a
/// standby.
pub fn amcheck_of(client: &mut Client, condition: &str) {
    client
        .batch_execute(&format!(
            "SELECT bt_index_check(indexrelid, true) FROM pg_index i JOIN pg_class c \
                ON c.oid = i.indexrelid \
             WHERE c.relam = 403 AND i.indisvalid AND c.oid >= 16384 \
               AND c.relpersistence <> 't' AND {condition}"
        ))
        .unwrap_or_else(|error| panic!("{error:?}"));
    let corrupt = client
        .query(
            &format!(
                "SELECT c.relname, v.msg FROM pg_class c, verify_heapam(c.oid) v \
                 WHERE c.relkind IN ('r', 't') AND c.oid >= 16384 AND c.relpersistence <> 't' \
                   AND {condition}"
            ),
            &[],
        )
        .unwrap_or_else(|error| panic!("{error:?}"));
    assert!(corrupt.is_empty(), "{corrupt:?}");
}

fn is_allowed(text: &str, allowed: &[&str]) -> bool {
    allowed.iter().any(|allowed| text.contains(allowed))
}

/// See [`Arena::check_log`].
pub fn check_log(log: &str, round: &super::arena::Round) {
    for line in log.lines() {
        for sign in ["PANIC:", "TRAP:", "panicked at", "memory allocation of"] {
            assert!(
                !line.contains(sign) || is_trap_of_any_parallel_query(line, log),
                "{line}"
            );
        }
        if line.contains("terminated by signal") {
            let pid = line
                .split_once("(PID ")
                .and_then(|(_, rest)| rest.split_once(')'))
                .and_then(|(pid, _)| pid.parse::<i32>().ok());
            assert!(
                pid.is_some_and(|pid| round.killed.contains(&pid)),
                "a process died that was not killed: {line}"
            );
        }
        let leader_failed =
            line.contains("\"autoprewarm leader\"") && line.contains("exited with exit code 1");
        if is_complaint(line) || leader_failed {
            assert!(
                is_allowed(line, &ALWAYS_ALLOWED) || is_allowed(line, &round.allowed),
                "unexpected: {line}"
            );
        }
    }
}

/// A client whose parallel workers are waiting when the postmaster dies exits in a
/// second FATAL while it handles the first, with any query: `DestroyParallelContext`
/// raises one while the transaction is aborted. A server with assertions fails one.
fn is_trap_of_any_parallel_query(line: &str, log: &str) -> bool {
    line.contains("!IsTransactionOrTransactionBlock()")
        && line.rsplit_once("PID: ").is_some_and(|(_, pid)| {
            let died = format!("[{pid}] FATAL:  postmaster exited during a parallel transaction");
            log.contains(&died)
        })
}

/// A warning or an error of one of autoprewarm's processes.
fn is_complaint(line: &str) -> bool {
    line.starts_with("autoprewarm ")
        && [" WARNING: ", " ERROR: ", " FATAL: "]
            .iter()
            .any(|level| line.contains(level))
}

pub fn complaints(log: &str) -> usize {
    log.lines().filter(|line| is_complaint(line)).count()
}
