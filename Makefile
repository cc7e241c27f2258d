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
#   make all PG_CONFIG=/path/to/pg_config
#                          build for release, for that PostgreSQL
#   make install PG_CONFIG=/path/to/pg_config
#                          the same, and install into it (with DESTDIR=/path, below that)
#   make uninstall PG_CONFIG=/path/to/pg_config
#                          remove it, and put contrib's files back
#   make deb [PG=18]       a Debian package
#   make apt-repo          an apt repository of the Debian packages that were built
#                          (SIGN_WITH=KEY signs it; URL=https://HOST/PATH, where it is served)
#   make archive [PG=18]   a tar file that is used from any directory (18 and later)
#   make image [PG=18]     the same as an OCI image
#   make dist              archives of the source: for PGXN, and with all crates
#   make test-packages     tests of all these
#   make clean             remove all build results
#
# TESTS=name runs only the tests with that in their name.

PG ?= 15
PG_CONFIG ?= pg_config

.PHONY: demo demo-failover test test-all test-scripts test-packages torture restarts bench check \
	fuzz valgrind all install uninstall deb apt-repo archive image dist clean

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

test-packages:
	@tests/packages.sh

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

all:
	@scripts/install --only-build $(PG_CONFIG)

install:
	@scripts/install $(PG_CONFIG)

uninstall:
	@scripts/uninstall $(PG_CONFIG)

deb:
	@scripts/deb $(PG)

apt-repo:
	@SIGN_WITH="$(SIGN_WITH)" URL="$(URL)" scripts/apt-repo

# Only a PG that was given counts.
archive:
	@scripts/archive $(if $(filter file,$(origin PG)),18,$(PG))

image:
	@scripts/archive $(if $(filter file,$(origin PG)),18,$(PG)) image

dist:
	@scripts/dist

clean:
	cargo clean
