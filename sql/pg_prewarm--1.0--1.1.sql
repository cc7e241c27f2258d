-- From pg_prewarm 1.0, whose function was not marked as parallel safe.

\echo Use "ALTER EXTENSION pg_prewarm UPDATE TO '1.1'" to load this file. \quit

ALTER FUNCTION pg_prewarm(regclass, text, text, int8, int8) PARALLEL SAFE;
