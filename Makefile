# The tasks of this project. Each calls scripts/prepare for what it needs, so all of them
# work on a fresh machine.
#
#   make demo              restart a server with a warm cache
#   make demo-failover     promote a standby without and with a warm cache
#   make test [PG=16]      all tests, on one major version (default 15)
#   make test-all          all tests, on every supported version
#   make torture [PG=18]   faults, with a check after each: 100 rounds (ROUNDS=n), or
#                          for some time (SECONDS=n); SEED=n repeats a run, ROUND=n
#                          runs one round, ONLY=kill only faults with that in their
#                          name
#   make restarts [PG=18]  1000 restarts with a changing workload (ROUNDS=n)
#   make bench [PG=18]     contrib and this, side by side (SIZE=smoke: a minute)
#   make test-scripts      the scripts' error handling
#   make check             formatting, lints, documentation, dependencies
#   make fuzz [TIME=60]    fuzzing, so many seconds for each target
#   make valgrind [PG=18]  a load, a dump and every function under valgrind
#   make install PG_CONFIG=/path/to/pg_config
#                          install into that PostgreSQL
#   make clean             remove all build results
#
# TESTS=name runs only the tests with that in their name.

PG ?= 15
PG_CONFIG ?= pg_config

.PHONY: demo demo-failover test test-all test-scripts torture restarts bench check fuzz valgrind install clean

demo:
	@scripts/demo

demo-failover:
	@scripts/demo-failover

test:
	@scripts/test $(PG)

test-all:
	@scripts/test all

test-scripts:
	@tests/scripts.sh

# SECONDS is a variable of the shell.
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
