-- From contrib's last version. What acts on the whole server is no longer
-- everybody's to call.

\echo Use "ALTER EXTENSION pg_prewarm UPDATE TO '2.0'" to load this file. \quit

REVOKE ALL ON FUNCTION autoprewarm_start_worker() FROM PUBLIC;
REVOKE ALL ON FUNCTION autoprewarm_dump_now() FROM PUBLIC;

CREATE FUNCTION autoprewarm_blocks()
RETURNS TABLE (database oid, tablespace oid, filenumber oid,
               fork int2, block int8, heat int2)
STRICT
AS 'MODULE_PATHNAME', 'autoprewarm_blocks'
LANGUAGE C PARALLEL RESTRICTED ROWS 10000;
REVOKE ALL ON FUNCTION autoprewarm_blocks() FROM PUBLIC;
GRANT EXECUTE ON FUNCTION autoprewarm_blocks() TO pg_monitor;
