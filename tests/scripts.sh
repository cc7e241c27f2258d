#!/usr/bin/env bash
# Tests the scripts' error handling, and that they succeed once the fault is fixed: with an
# archive of toy packages on this machine, fake programs, and full caches. Needs no network,
# and less than a minute on a prepared machine. Tests that only root can set up are skipped
# for others, with a note.
set -euo pipefail
cd "$(dirname "$0")/.."

directory=$(mktemp -d)
chmod a+rx "$directory"
server=
clean_up() {
    [ -z "$server" ] || kill "$server" 2>/dev/null || true
    ! mountpoint -q "$directory/small" || umount "$directory/small"
    rm -rf "$directory"
}
trap clean_up EXIT
export PG_PREWARM_CACHE=$directory/cache PG_PREWARM_PAUSE=0
unset PG_FROM PG_PREWARM_ARCHIVE
passed=0

# Runs the command after --. It must exit with that status and print each of the texts
# before --, and no error of bash or panic of Rust.
expect() {
    local name=$1 status=$2 got=0 texts=() text output
    shift 2
    while [ "$1" != -- ]; do texts+=("$1"); shift; done
    shift
    "$@" >"$directory/output" 2>&1 </dev/null || got=$?
    output=$(cat "$directory/output")
    [ "$got" = "$status" ] || fail "$name" "status $got, not $status"
    for text in "${texts[@]}"; do
        grep -qF -- "$text" <<<"$output" || fail "$name" "it does not print '$text'"
    done
    [ "$status" = 0 ] || [ "$(grep -c '^error: ' <<<"$output")" = 1 ] || fail "$name" "not one line of error"
    ! grep -qE 'unbound variable|line [0-9]+:|panicked' <<<"$output" || fail "$name" "it fails by accident"
    echo "ok: $name"
    passed=$((passed + 1))
}
fail() { printf 'FAILED: %s: %s\n' "$1" "$2"; sed 's/^/    /' "$directory/output"; exit 1; }
must_be() { [ "$@" ] || { : >>"$directory/output"; fail "after that" "not so: [ $* ]"; }; }

# Creates a fake program in a directory of that name, with its output and exit status.
fake() {
    mkdir -p "$directory/$1"
    printf '#!/bin/sh\necho "%s"\nexit %s\n' "$3" "${4:-0}" >"$directory/$1/$2"
    chmod a+x "$directory/$1/$2"
}
with() { PATH=$directory/$1:$PATH "${@:2}"; }

# --- Rust
fake old cargo 'cargo 1.70.0'; fake old rustc 'rustc 1.70.0'; fake old rustfmt 'rustfmt 1.70.0'
fake new cargo 'cargo 9.0.0'; fake new rustc 'rustc 9.0.0'; fake new rustfmt 'rustfmt 9.0.0'
fake bare cargo 'cargo 9.0.0'; fake bare rustc 'rustc 9.0.0'; fake bare rustfmt 'no rustfmt' 1
fake none cargo 'no toolchain' 1; fake none rustc 'no toolchain' 1
rust() { bash -c 'source scripts/lib.sh; use_rust; cargo --version'; }
DEBIAN_RUST=$directory/none expect "a Rust that is too old" 1 'PATH has 1.70.0: apt-get install cargo-web' -- with old rust
DEBIAN_RUST=$directory/none expect "no Rust" 1 'PATH has none: apt-get install cargo-web' -- with none rust
DEBIAN_RUST=$directory/none expect "a Rust without rustfmt" 1 'with rustfmt is needed' -- with bare rust
DEBIAN_RUST=$directory/new expect "Debian's Rust if PATH's is too old" 0 'cargo 9.0.0' -- with old rust
DEBIAN_RUST=$directory/none expect "PATH's Rust if it is new enough" 0 'cargo 9.0.0' -- with new rust

fake minimal cargo 'cargo 9.0.0'; fake minimal rustc 'rustc 9.0.0'; fake minimal rustfmt 'no rustfmt' 1
printf '#!/bin/sh\ncp "%s/new/rustfmt" "%s/minimal/rustfmt"\n' "$directory" "$directory" >"$directory/minimal/rustup"
chmod a+x "$directory/minimal/rustup"
add_components() { bash -c 'source scripts/lib.sh; source scripts/lib/download.sh; add_rust_components; use_rust; cargo --version'; }
DEBIAN_RUST=$directory/none expect "rustup's Rust that was installed without rustfmt" 0 'adding rustfmt and clippy to Rust 9.0.0' 'cargo 9.0.0' -- with minimal add_components

# --- packages
expect "an archive for a version that needs its own directories" 2 'use make deb PG=16' -- make -s archive PG=16
expect "no Debian package for the repository" 2 'use make deb PG=15' -- env CARGO_TARGET_DIR="$directory/target" make -s apt-repo

# --- make
make_level() { bash -c 'source scripts/lib.sh; echo "level ${MAKELEVEL:-none}"'; }
MAKELEVEL=2 expect "a script that make has called" 0 'level none' -- make_level

# --- pg_config
for major in 14 20; do
    fake "pg$major" pg_config "PostgreSQL $major.1"
    expect "a pg_config of $major" 2 "error: PostgreSQL $major is not supported: 15 16 17 18 19 are" -- \
        make -s install PG_CONFIG="$directory/pg$major/pg_config"
done
expect "no pg_config" 2 'use PG_CONFIG=/path/to/pg_config' -- make -s install PG_CONFIG="$directory/none/pg_config"
fake broken pg_config 'no library' 1
expect "a pg_config that does not run" 2 'is not a pg_config' -- make -s install PG_CONFIG="$directory/broken/pg_config"
expect "something else for a pg_config" 2 'is not a pg_config' -- make -s install PG_CONFIG="$directory/old/cargo"

# --- make install and make uninstall, with a library that cargo need not build
prefix=$directory/prefix
mkdir -p "$directory"/{builds,stops}
cp "$directory"/new/rust{c,fmt} "$directory/builds/"
cat >"$directory/builds/cargo" <<CARGO
#!/bin/sh
case \$1 in
    --version) echo cargo 9.0.0 ;;
    metadata) echo '{"target_directory":"$directory/built"}' ;;
    build) mkdir -p "$directory/built/release" && echo pg_finfo_autoprewarm_cancel >"$directory/built/release/libpg_prewarm.so" ;;
esac
CARGO
cat >"$directory/builds/pg_config" <<PG_CONFIG
#!/bin/sh
case \$1 in
    --version) echo PostgreSQL 15.1 ;;
    --pkglibdir) echo "$prefix/lib" ;;
    --sharedir) echo "$prefix/share" ;;
    --bindir) echo "$prefix/bin" ;;
esac
PG_CONFIG
# Of these programs, only so many calls succeed.
for program in cp mv rm; do
    cat >"$directory/stops/$program" <<PROGRAM
#!/bin/sh
calls=\$(cat "$directory/calls")
echo \$((calls - 1)) >"$directory/calls"
[ "\$calls" -gt 0 ] || exit 1
exec /bin/$program "\$@"
PROGRAM
done
chmod a+x "$directory"/{builds,stops}/*
make_() { with builds make -s "$1" PG_CONFIG="$directory/builds/pg_config"; }
# What a package of contrib's does.
install_contrib() {
    local file extension=share/extension/pg_prewarm
    mkdir -p "$prefix"/{lib/bitcode,share/extension}
    for file in lib/pg_prewarm.so lib/bitcode/pg_prewarm.index.bc $extension.control $extension--1.0--1.1.sql $extension--1.1.sql $extension--1.1--1.2.sql; do
        echo "contrib's, $1" >"$prefix/$file.dpkg-new"
        mv "$prefix/$file.dpkg-new" "$prefix/$file"
    done
}
files() { (cd "$prefix" && find . -type f -printf '%P %m ' -exec md5sum {} \; | sort); }
with_contrib() { rm -rf "$prefix"; install_contrib "$1"; }
must_be_ours() { must_be "$(cat "$prefix/lib/pg_prewarm.so")" = pg_finfo_autoprewarm_cancel; }

with_contrib 2; after=$(files)
with_contrib 1; before=$(files)
DESTDIR=$directory/destination expect "make install below DESTDIR" 0 "at $directory/destination$prefix/lib" -- make_ install
must_be "$(files)" = "$before"
must_be -e "$directory/destination$prefix/share/extension/pg_prewarm.control"
DESTDIR=$directory/destination expect "make uninstall below DESTDIR" 0 -- make_ uninstall
must_be -z "$(find "$directory/destination" -type f)"
must_be "$(files)" = "$before"
expect "make install over contrib's files" 0 'are kept' -- make_ install
must_be_ours
must_be "$(cat "$prefix/lib/pg_prewarm.so.contrib")" = "contrib's, 1"
must_be ! -e "$prefix/lib/bitcode/pg_prewarm.index.bc"
expect "make install once more" 0 -- make_ install
must_be_ours
expect "make uninstall" 0 "contrib's pg_prewarm is in place in PostgreSQL 15.1" -- make_ uninstall
must_be "$(files)" = "$before"
touch "$prefix/share/extension/pg_prewarm--1.2--mine.sql"
expect "make uninstall leaves scripts that are not ours" 0 -- make_ uninstall
rm "$prefix/share/extension/pg_prewarm--1.2--mine.sql" || fail "make uninstall" "it removes a script that is not ours"
expect "make uninstall once more" 0 "contrib's pg_prewarm is in place" -- make_ uninstall
must_be "$(files)" = "$before"
make_ install 2>/dev/null
install_contrib 2
expect "make install after an update of contrib's" 0 'are kept' -- make_ install
must_be_ours
expect "make uninstall then" 0 "contrib's pg_prewarm is in place" -- make_ uninstall
must_be "$(files)" = "$after"
make_ install 2>/dev/null
install_contrib 1
expect "make uninstall after an update of contrib's" 0 "contrib's pg_prewarm is in place" -- make_ uninstall
must_be "$(files)" = "$before"
rm -rf "$prefix"
expect "make install without contrib's files" 0 -- make_ install
must_be_ours
expect "make uninstall then" 0 'PostgreSQL 15.1 has no pg_prewarm now' "install the contrib modules of PostgreSQL again" -- make_ uninstall
must_be -z "$(files)"
fake packaged dpkg-query "postgresql-15: $prefix/bin/postgres"
expect "make uninstall, of a packaged server" 0 'apt-get install --reinstall postgresql-15' -- with packaged make_ uninstall
fake diverted dpkg-divert postgresql-15-pg-prewarm-rs
fake local dpkg-divert LOCAL
with_contrib 1
expect "make install over a local diversion" 2 'is diverted by a local diversion' -- with local make_ install
for target in install uninstall; do
    expect "make $target with our package" 2 'belongs to package postgresql-15-pg-prewarm-rs' -- with diverted make_ $target
done
must_be "$(files)" = "$before"

interrupted() {
    echo "$1" >"$directory/calls"
    with stops make_ "$2" >"$directory/output" 2>&1
}
for target in install uninstall; do
    stopped=0
    for calls in {0..99}; do
        for then in uninstall 'install uninstall'; do
            with_contrib 1
            [ $target = install ] || make_ install 2>/dev/null
            ! interrupted "$calls" $target || break 2
            stopped=$((stopped + 1))
            must_be -s "$prefix/lib/pg_prewarm.so"
            for next in $then; do
                make_ "$next" >"$directory/output" 2>&1 || fail "make $next after an interrupted make $target" "it fails"
            done
            must_be "$(files)" = "$before"
        done
    done
    must_be "$stopped" -gt 10
    expect "make $target, interrupted anywhere, and what may follow it" 0 -- true
done

# --- which versions were tested
sum_up() { bash -c 'source scripts/lib.sh; sum_up "$@"' - "$@"; }
expect "all tested" 0 'tested: 15 16 17 18 19 (5 of 5)' -- sum_up '15 16 17 18 19' ''
expect "four tested" 0 'tested: 15 16 18 19 (4 of 5); NOT tested: 17 (why)' -- sum_up '15 16 18 19' '17 (why)'
expect "three tested" 1 'fewer than four' -- sum_up '15 16 18' '17,19'
expect "three tested, 15 and 18 among them" 1 'fewer than four' -- sum_up '15 18 19' '16,17'
expect "18 not tested" 1 '15 and 18 must be tested' -- sum_up '15 16 17 19' '18'

# --- the machine's own packages
fake no-apt dpkg-query 'deinstall'; fake no-apt apt-get 'E: Unable to fetch some archives' 100
if [ "$(id -u)" = 0 ]; then
    expect "no network for the machine's packages" 1 'apt-get cannot install' 'call again' -- with no-apt scripts/prepare valgrind
else
    fake no-apt sudo 'a password is required' 1
    expect "packages that only root can install" 1 'these packages are missing' 'call again' -- with no-apt scripts/prepare valgrind
fi

# --- an archive: a PostgreSQL 17 whose postgres is /bin/true
export PG_PREWARM_ARCHIVE_TRUSTED=yes
export PG_PREWARM_ARCHIVE=http://127.0.0.1:9/debian
expect "no network" 3 'trying again' 'error: PostgreSQL 17 is not available: source: not all lists' '; packages: not all lists' 'Could not connect' -- scripts/prepare 17
must_be -s "$PG_PREWARM_CACHE/missing/17"
must_be ! -e "$PG_PREWARM_CACHE/pg17"

architecture=$(dpkg --print-architecture)
multiarch=$(gcc -print-multiarch)
pool=$directory/archive/pool
mkdir -p "$pool"
toy() {
    local name=$1 depends=$2 files=$directory/toy/$1
    mkdir -p "$files/DEBIAN"
    printf 'Package: %s\nVersion: 17.9\nArchitecture: %s\nMaintainer: nobody <nobody@invalid>\nDescription: toy\n%s' \
        "$name" "$architecture" "${depends:+Depends: $depends$'\n'}" >"$files/DEBIAN/control"
    dpkg-deb --build -Znone "$files" "$pool/$name.deb" >/dev/null
}
libraries=$directory/toy/libc6/usr/lib/$multiarch
bin=$directory/toy/postgresql-17/usr/lib/postgresql/17/bin
mkdir -p "$libraries" "$bin" "$directory/toy/postgresql-17/usr/share/postgresql/17" \
    "$directory/toy/postgresql-server-dev-17/usr/include/postgresql/17"
cp -L "$(patchelf --print-interpreter /bin/true)" "/lib/$multiarch/libc.so.6" "$libraries/"
cp /bin/true "$bin/postgres"
cp /bin/true "$bin/pg_ctl"
toy libc6 ''; toy postgresql-client-17 libc6; toy postgresql-server-dev-17 ''; toy postgresql-17 'libc6, postgresql-client-17'
for suite in trixie sid forky experimental bookworm; do
    index=$directory/archive/dists/$suite
    mkdir -p "$index/main/binary-$architecture" "$index/main/source"
    : >"$index/main/binary-$architecture/Packages"
    printf 'Package: postgresql-17\nBinary: postgresql-17\nVersion: 17.9\nFormat: 3.0 (quilt)\nDirectory: pool\nChecksums-Sha256:\n %064d 9 postgresql-17_17.9.dsc\n\n' 1 \
        >"$index/main/source/Sources"
    if [ "$suite" = trixie ]; then
        for deb in "$pool"/*.deb; do
            dpkg-deb -f "$deb"
            printf 'Filename: pool/%s\nSize: %s\nSHA256: %s\n\n' "${deb##*/}" "$(stat -c %s "$deb")" "$(sha256sum <"$deb" | cut -c1-64)"
        done >"$index/main/binary-$architecture/Packages"
    fi
    {
        printf 'Origin: toy\nSuite: %s\nCodename: %s\nComponents: main\nArchitectures: %s\nDate: %s\nSHA256:\n' \
            "$suite" "$suite" "$architecture" "$(LC_ALL=C date -u -R -d yesterday)"
        (cd "$index" && for file in main/*/*; do
            printf ' %s %s %s\n' "$(sha256sum <"$file" | cut -c1-64)" "$(stat -c %s "$file")" "$file"
        done)
    } >"$index/Release"
done
python3 -u -m http.server --bind 127.0.0.1 --directory "$directory/archive" 0 >"$directory/archive.log" 2>&1 &
server=$!
port=
for _ in 1 2 3 4 5 6 7 8 9 10; do
    port=$(sed -n 's/^Serving HTTP on .* port \([0-9]*\) .*/\1/p' "$directory/archive.log")
    [ -z "$port" ] || break
    sleep 0.3
done
[ -n "$port" ] || { cp "$directory/archive.log" "$directory/output"; fail "the archive of this test" "it does not start"; }
export PG_PREWARM_ARCHIVE=http://127.0.0.1:$port

mv "$pool" "$pool.away"
expect "an archive without the files that it names" 3 'is not available: source: ' 'packages: ' '404' -- scripts/prepare 17
mv "$pool.away" "$pool"
must_be ! -e "$PG_PREWARM_CACHE/pg17"
expect "PG_FROM=source, which is not available" 3 'is not available: source: Failed to fetch' '404' -- env PG_FROM=source scripts/prepare 17
cp "$pool/libc6.deb" "$directory/whole"
truncate -s 100000 "$pool/libc6.deb"
expect "a truncated file" 3 'trying again' 'packages: ' -- env PG_FROM=packages scripts/prepare 17
must_be ! -e "$PG_PREWARM_CACHE/packages-17"
cp "$directory/whole" "$pool/libc6.deb"
expect "and then the complete file" 0 'PostgreSQL 17: binary packages 17.9, without assertions' -- scripts/prepare 17
"$PG_PREWARM_CACHE/pg17/bin/postgres"
grep -q "$PG_PREWARM_CACHE/packages-17/lib" <(patchelf --print-rpath "$PG_PREWARM_CACHE/pg17/bin/postgres")
requests=$(wc -l <"$directory/archive.log")
expect "17-test, from the same packages" 0 'PostgreSQL 17-test: binary packages' -- env PG_FROM=packages scripts/prepare 17-test
expect "a second call" 0 -- scripts/prepare 17 17-test
must_be "$(grep -c '\.deb' <(tail -n +$((requests + 1)) "$directory/archive.log"))" = 0
rm "$PG_PREWARM_CACHE/pg17/.key"
expect "an installation that is not complete" 0 'PostgreSQL 17: binary packages' -- env PG_FROM=packages scripts/prepare 17

# --- a cache in which no directory can be created
fake no-mktemp mktemp 'mktemp: failed' 1
rm "$PG_PREWARM_CACHE/pg17/.key"
expect "no temporary directory" 1 'cannot create a directory in' -- with no-mktemp env PG_FROM=packages scripts/prepare 17

# --- two at once
( flock 9; sleep 2 ) 9>"$PG_PREWARM_CACHE/.lock" &
sleep 0.5
expect "another call that is running" 0 'waiting for another' -- scripts/prepare 17

# --- disk space
has_packaged_15() { bash -c 'source scripts/lib.sh; has_packaged_15'; }
if [ "$(id -u)" = 0 ] && has_packaged_15 && mkdir "$directory/small" && mount -t tmpfs -o size=20m none "$directory/small" 2>/dev/null; then
    export PG_PREWARM_CACHE=$directory/small
    expect "no space, noticed before" 1 'needs 150 MB' 'PG_PREWARM_CACHE' -- scripts/prepare 15
    fake full df 9999999
    expect "no space, noticed during the copy" 1 'no space left in' 'PG_PREWARM_CACHE' -- with full scripts/prepare 15
    must_be ! -e "$directory/small/pg15"
    mount -o remount,size=300m "$directory/small"
    expect "and then with enough space" 0 'PostgreSQL 15: ' -- scripts/prepare 15
    "$directory/small/pg15/lib/postgresql/15/bin/postgres" --version >/dev/null
else
    echo "a full file system needs root and the distribution's PostgreSQL 15: NOT tested"
fi
echo "$passed passed, 0 failed"
