# What there is to do here; each goal says what it needs by calling
# scripts/prepare, so that every one works on a fresh machine.
#
#   make demo              watch a server come back warm
#   make test [PG=16]      all tests, on one major version (default 15)
#   make test-all          all tests, on every supported version
#   make torture [PG=18]   one fault after another, with a check after each: 100
#                          (ROUNDS=n), or as many as fit (SECONDS=n); SEED=n for
#                          the same again, ROUND=n for one of them, ONLY=kill for
#                          faults with that in their name
#   make restarts [PG=18]  1000 restarts with a changing workload (ROUNDS=n)
#   make bench [PG=18]     contrib and this, side by side (SIZE=smoke: a minute)
#   make test-scripts      what the scripts say where something is wrong
#   make check             formatting, lints, documentation, dependencies
#   make fuzz [TIME=60]    inputs that a fuzzer makes up, so many seconds each
#   make valgrind [PG=18]  a load, a dump and every function under valgrind
#   make install PG_CONFIG=/path/to/pg_config
#                          install into a PostgreSQL of yours
#   make clean             remove what was built here
#
# TESTS=name runs the tests with that in their name only.

PG ?= 15
PG_CONFIG ?= pg_config

.PHONY: demo test test-all test-scripts torture restarts bench check fuzz valgrind install clean

demo:
	@scripts/demo

test:
	@scripts/test $(PG)

test-all:
	@scripts/test all

test-scripts:
	@tests/scripts.sh

# The shell has a SECONDS of its own.
torture:
	@ROUNDS=$(ROUNDS) ROUND=$(ROUND) DURATION=$(SECONDS) SEED=$(SEED) ONLY=$(ONLY) scripts/torture $(PG) torture

restarts:
	@ROUNDS=$(or $(ROUNDS),1000) SEED=$(SEED) scripts/torture $(PG) restarts

bench:
	@scripts/bench $(PG) $(SCENARIOS)

check:
	@scripts/check

fuzz:
	@scripts/fuzz

valgrind:
	@scripts/valgrind $(PG)

install:
	@scripts/install $(PG_CONFIG)

clean:
	cargo clean
