-- pg_prewarm 1.1, the same as contrib's, so that CREATE EXTENSION pg_prewarm
-- VERSION '1.1' creates contrib's objects.

\echo Use "CREATE EXTENSION pg_prewarm VERSION '1.1'" to load this file. \quit

CREATE FUNCTION pg_prewarm(regclass,
                           mode text DEFAULT 'buffer',
                           fork text DEFAULT 'main',
                           first_block int8 DEFAULT NULL,
                           last_block int8 DEFAULT NULL)
RETURNS int8
AS 'MODULE_PATHNAME', 'pg_prewarm'
LANGUAGE C PARALLEL SAFE;
