-- From contrib's last version. What acts on the whole server is no longer
-- everybody's to call.

\echo Use "ALTER EXTENSION pg_prewarm UPDATE TO '2.0'" to load this file. \quit

REVOKE ALL ON FUNCTION autoprewarm_start_worker() FROM PUBLIC;
REVOKE ALL ON FUNCTION autoprewarm_dump_now() FROM PUBLIC;
