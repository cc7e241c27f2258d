-- Downgrade to 1.2. Run it before contrib's library replaces this one. Contrib has
-- only pg_prewarm(), autoprewarm_start_worker() and autoprewarm_dump_now(), whose
-- privileges are kept. Objects that depend on the other functions, such as a
-- user's view, make the downgrade fail.

\echo Use "ALTER EXTENSION pg_prewarm UPDATE TO '1.2'" to load this file. \quit

DROP VIEW pg_stat_autoprewarm_follow;
DROP VIEW pg_stat_progress_prewarm;
DROP VIEW pg_stat_autoprewarm;
DROP FUNCTION pg_stat_get_autoprewarm_follow();
DROP FUNCTION autoprewarm_failover_ready(double precision, interval);
DROP FUNCTION autoprewarm_follow_now();
DROP FUNCTION pg_stat_get_progress_prewarm();
DROP FUNCTION pg_stat_get_autoprewarm();
DROP FUNCTION autoprewarm_blocks();
DROP FUNCTION autoprewarm_wait(interval);
DROP FUNCTION autoprewarm_cancel();
DROP FUNCTION autoprewarm_load_now();
DROP FUNCTION pg_prewarm_database(text, boolean, boolean, text[], bigint, integer, boolean);
DROP FUNCTION pg_prewarm_schema(regnamespace, text, boolean, boolean, text[], bigint, integer);
DROP FUNCTION pg_prewarm_relation(regclass, text, boolean, boolean, boolean, text[], bigint, integer);

GRANT EXECUTE ON FUNCTION autoprewarm_start_worker() TO PUBLIC;
GRANT EXECUTE ON FUNCTION autoprewarm_dump_now() TO PUBLIC;
