-- All of pg_prewarm 2.0. An update from 1.2 gives the same objects with the same
-- privileges, and so does the script that pgrx generates from the library; tests
-- compare the three.

\echo Use "CREATE EXTENSION pg_prewarm" to load this file. \quit

-- Blocks of one fork of a relation.

CREATE FUNCTION pg_prewarm(regclass,
                           mode text DEFAULT 'buffer',
                           fork text DEFAULT 'main',
                           first_block int8 DEFAULT NULL,
                           last_block int8 DEFAULT NULL)
RETURNS int8
AS 'MODULE_PATHNAME', 'pg_prewarm'
LANGUAGE C PARALLEL SAFE;

-- A table with its indexes, TOAST table and partitions; a schema; a database. The
-- privileges checked are those on the relations.

CREATE FUNCTION pg_prewarm_relation(
    relation regclass,
    mode text DEFAULT 'buffer',
    indexes boolean DEFAULT true,
    toast boolean DEFAULT true,
    partitions boolean DEFAULT true,
    forks text[] DEFAULT '{main}',
    max_blocks bigint DEFAULT NULL,
    workers integer DEFAULT 0)
RETURNS TABLE (relation regclass, fork text, blocks bigint, already_cached bigint, elapsed interval)
AS 'MODULE_PATHNAME', 'pg_prewarm_relation'
LANGUAGE C PARALLEL UNSAFE;

CREATE FUNCTION pg_prewarm_schema(
    schema regnamespace,
    mode text DEFAULT 'buffer',
    indexes boolean DEFAULT true,
    toast boolean DEFAULT true,
    forks text[] DEFAULT '{main}',
    max_blocks bigint DEFAULT NULL,
    workers integer DEFAULT 0)
RETURNS TABLE (relation regclass, fork text, blocks bigint, already_cached bigint, elapsed interval)
AS 'MODULE_PATHNAME', 'pg_prewarm_schema'
LANGUAGE C PARALLEL UNSAFE;

CREATE FUNCTION pg_prewarm_database(
    mode text DEFAULT 'buffer',
    indexes boolean DEFAULT true,
    toast boolean DEFAULT true,
    forks text[] DEFAULT '{main}',
    max_blocks bigint DEFAULT NULL,
    workers integer DEFAULT 0,
    catalogs boolean DEFAULT false)
RETURNS TABLE (relation regclass, fork text, blocks bigint, already_cached bigint, elapsed interval)
AS 'MODULE_PATHNAME', 'pg_prewarm_database'
LANGUAGE C PARALLEL UNSAFE;

-- Functions that act on the whole server are superuser-only by default.

CREATE FUNCTION autoprewarm_start_worker()
RETURNS void STRICT
AS 'MODULE_PATHNAME', 'autoprewarm_start_worker'
LANGUAGE C;

CREATE FUNCTION autoprewarm_dump_now()
RETURNS pg_catalog.int8 STRICT
AS 'MODULE_PATHNAME', 'autoprewarm_dump_now'
LANGUAGE C;

REVOKE ALL ON FUNCTION autoprewarm_start_worker() FROM PUBLIC;
REVOKE ALL ON FUNCTION autoprewarm_dump_now() FROM PUBLIC;

CREATE FUNCTION autoprewarm_load_now()
RETURNS void
AS 'MODULE_PATHNAME', 'autoprewarm_load_now'
LANGUAGE C STRICT;

CREATE FUNCTION autoprewarm_cancel()
RETURNS boolean
AS 'MODULE_PATHNAME', 'autoprewarm_cancel'
LANGUAGE C STRICT;

CREATE FUNCTION autoprewarm_wait(timeout interval DEFAULT NULL)
RETURNS boolean
AS 'MODULE_PATHNAME', 'autoprewarm_wait'
LANGUAGE C;

REVOKE ALL ON FUNCTION autoprewarm_load_now() FROM PUBLIC;
REVOKE ALL ON FUNCTION autoprewarm_cancel() FROM PUBLIC;
REVOKE ALL ON FUNCTION autoprewarm_wait(interval) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION autoprewarm_wait(interval) TO pg_monitor;

-- Statistics, for superusers and members of pg_monitor.

CREATE FUNCTION pg_stat_get_autoprewarm(
    OUT pid integer,
    OUT state text,
    OUT load_start_time timestamp with time zone,
    OUT load_end_time timestamp with time zone,
    OUT load_result text,
    OUT blocks_total bigint,
    OUT blocks_loaded bigint,
    OUT blocks_cached bigint,
    OUT blocks_skipped bigint,
    OUT skipped_illegal bigint,
    OUT skipped_template_database bigint,
    OUT skipped_no_database bigint,
    OUT skipped_no_relation bigint,
    OUT skipped_no_block bigint,
    OUT skipped_unreadable bigint,
    OUT skipped_locked bigint,
    OUT skipped_no_free_buffer bigint,
    OUT skipped_no_shared_memory bigint,
    OUT skipped_interrupted bigint,
    OUT skipped_cancelled bigint,
    OUT blocks_carried bigint,
    OUT connections_held bigint,
    OUT last_dump_time timestamp with time zone,
    OUT last_dump_blocks bigint,
    OUT last_dump_duration interval,
    OUT last_error text,
    OUT last_error_time timestamp with time zone)
RETURNS SETOF record
AS 'MODULE_PATHNAME', 'pg_stat_get_autoprewarm'
LANGUAGE C STRICT ROWS 1;

CREATE FUNCTION pg_stat_get_progress_prewarm(
    OUT pid integer,
    OUT datid oid,
    OUT kind text,
    OUT relid oid,
    OUT fork text,
    OUT blocks_total bigint,
    OUT blocks_done bigint,
    OUT blocks_skipped bigint,
    OUT start_time timestamp with time zone)
RETURNS SETOF record
AS 'MODULE_PATHNAME', 'pg_stat_get_progress_prewarm'
LANGUAGE C STRICT ROWS 10;

CREATE VIEW pg_stat_autoprewarm AS
    SELECT * FROM pg_stat_get_autoprewarm();

CREATE VIEW pg_stat_progress_prewarm AS
    SELECT p.pid, p.datid, d.datname, p.kind, p.relid, p.fork,
           p.blocks_total, p.blocks_done, p.blocks_skipped, p.start_time
    FROM pg_stat_get_progress_prewarm() p
    LEFT JOIN pg_catalog.pg_database d ON d.oid OPERATOR(pg_catalog.=) p.datid;

REVOKE ALL ON FUNCTION pg_stat_get_autoprewarm() FROM PUBLIC;
REVOKE ALL ON FUNCTION pg_stat_get_progress_prewarm() FROM PUBLIC;
GRANT EXECUTE ON FUNCTION pg_stat_get_autoprewarm() TO pg_monitor;
GRANT EXECUTE ON FUNCTION pg_stat_get_progress_prewarm() TO pg_monitor;
REVOKE ALL ON pg_stat_autoprewarm FROM PUBLIC;
REVOKE ALL ON pg_stat_progress_prewarm FROM PUBLIC;
GRANT SELECT ON pg_stat_autoprewarm TO pg_monitor;
GRANT SELECT ON pg_stat_progress_prewarm TO pg_monitor;

-- Following an upstream server, on a standby. Failover managers are often members of
-- pg_monitor.

CREATE FUNCTION autoprewarm_follow_now()
RETURNS void
AS 'MODULE_PATHNAME', 'autoprewarm_follow_now'
LANGUAGE C STRICT;

CREATE FUNCTION autoprewarm_failover_ready(
    coverage double precision DEFAULT 0.9,
    max_age interval DEFAULT '5 min')
RETURNS boolean
AS 'MODULE_PATHNAME', 'autoprewarm_failover_ready'
LANGUAGE C STRICT;

CREATE FUNCTION pg_stat_get_autoprewarm_follow(
    OUT pid integer,
    OUT state text,
    OUT upstream_host text,
    OUT upstream_port integer,
    OUT list_time timestamp with time zone,
    OUT list_blocks bigint,
    OUT hot_blocks bigint,
    OUT hot_cached bigint,
    OUT blocks_loaded bigint,
    OUT blocks_replaced bigint,
    OUT bytes_received bigint,
    OUT lists_served bigint,
    OUT last_served_time timestamp with time zone,
    OUT last_error text,
    OUT last_error_time timestamp with time zone)
RETURNS SETOF record
AS 'MODULE_PATHNAME', 'pg_stat_get_autoprewarm_follow'
LANGUAGE C STRICT ROWS 1;

CREATE VIEW pg_stat_autoprewarm_follow AS
    SELECT * FROM pg_stat_get_autoprewarm_follow();

REVOKE ALL ON FUNCTION autoprewarm_follow_now() FROM PUBLIC;
REVOKE ALL ON FUNCTION autoprewarm_failover_ready(double precision, interval) FROM PUBLIC;
REVOKE ALL ON FUNCTION pg_stat_get_autoprewarm_follow() FROM PUBLIC;
REVOKE ALL ON pg_stat_autoprewarm_follow FROM PUBLIC;
GRANT EXECUTE ON FUNCTION autoprewarm_failover_ready(double precision, interval) TO pg_monitor;
GRANT EXECUTE ON FUNCTION pg_stat_get_autoprewarm_follow() TO pg_monitor;
GRANT SELECT ON pg_stat_autoprewarm_follow TO pg_monitor;

-- The contents of the block dump file.

CREATE FUNCTION autoprewarm_blocks()
RETURNS TABLE (database oid, tablespace oid, filenumber oid,
               fork int2, block int8, usagecount int2)
STRICT
AS 'MODULE_PATHNAME', 'autoprewarm_blocks'
LANGUAGE C PARALLEL RESTRICTED ROWS 10000;

REVOKE ALL ON FUNCTION autoprewarm_blocks() FROM PUBLIC;
GRANT EXECUTE ON FUNCTION autoprewarm_blocks() TO pg_monitor;
