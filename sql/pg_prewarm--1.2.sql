-- pg_prewarm 1.2, the same as contrib's, so that CREATE EXTENSION pg_prewarm
-- VERSION '1.2' creates contrib's objects directly, not through 2.0 and a downgrade.

\echo Use "CREATE EXTENSION pg_prewarm VERSION '1.2'" to load this file. \quit

CREATE FUNCTION pg_prewarm(regclass,
                           mode text DEFAULT 'buffer',
                           fork text DEFAULT 'main',
                           first_block int8 DEFAULT NULL,
                           last_block int8 DEFAULT NULL)
RETURNS int8
AS 'MODULE_PATHNAME', 'pg_prewarm'
LANGUAGE C PARALLEL SAFE;

CREATE FUNCTION autoprewarm_start_worker()
RETURNS void STRICT
AS 'MODULE_PATHNAME', 'autoprewarm_start_worker'
LANGUAGE C;

CREATE FUNCTION autoprewarm_dump_now()
RETURNS pg_catalog.int8 STRICT
AS 'MODULE_PATHNAME', 'autoprewarm_dump_now'
LANGUAGE C;
