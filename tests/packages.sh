#!/usr/bin/env bash
# Tests what is built to be installed: the Debian package in a Debian of its own, the archive
# and the image beside contrib's module, the source archives, and that two builds are the
# same. Needs Debian 12 and root; some 25 minutes on a prepared machine. PARTS selects among
# debian, majors, beside, source and same.
source "$(dirname "$0")/../scripts/lib.sh"
source "$project/scripts/lib/download.sh"
source "$project/scripts/lib/packages.sh"

cd "$project"
[ "$(id -u)" = 0 ] || die "these tests set up a Debian of their own, which only root can do"
grep -qs '^VERSION_CODENAME=bookworm' /etc/os-release || die "these tests need Debian 12"
prepare 15 18 || exit
install_packages debootstrap gnupg jq lintian unzip umoci pgxnclient
# Each build has its own flags.
unset CARGO_ENCODED_RUSTFLAGS

work=$cache/packages-test
root=$work/root
clean_up() {
    stop_servers
    [ -z "$web_server" ] || kill "$web_server" || true
    [ ! -d "$work/gnupg" ] || GNUPGHOME=$work/gnupg gpgconf --kill all
    for mount in dev/shm dev proc; do ! mountpoint -q "$root/$mount" || umount "$root/$mount"; done
    rm -rf --one-file-system "$work"
}
servers=()
web_server=
stop_servers() {
    local data
    for data in "${servers[@]}"; do
        as_server_user "$bin/pg_ctl" -D "$data" -m immediate -s stop >/dev/null 2>&1 || true
    done
    [ ! -d "$root/etc/postgresql" ] || chroot "$root" pg_ctlcluster 15 main stop -m immediate >/dev/null 2>&1 || true
}
clean_up
trap clean_up EXIT
mkdir -p "$work"
chmod a+rwx "$work"
passed=0

# What a check has printed, and that it holds.
output=$work/output
ok() { echo "ok: $1"; passed=$((passed + 1)); }
fail() { printf 'FAILED: %s\n' "$1"; [ ! -s "$output" ] || sed 's/^/    /' "$output"; exit 1; }
expect() {
    local name=$1
    shift
    "$@" >"$output" 2>&1 || fail "$name"
    ok "$name"
}
expect_failure() {
    local name=$1 text=$2
    shift 2
    ! "$@" >"$output" 2>&1 || fail "$name: it succeeds"
    grep -qF -- "$text" "$output" || fail "$name: it does not print '$text'"
    ok "$name"
}
# That a text is what a command prints.
expect_output() {
    local name=$1 wanted=$2 got
    shift 2
    got=$("$@" 2>"$output") || fail "$name"
    [ "$got" = "$wanted" ] || { printf '%s\n' "$got" >>"$output"; fail "$name: not '$wanted'"; }
    ok "$name"
}
# A command of docs/installation.md, word for word, in which the other arguments replace what
# is another name here: each text by the one after it.
documented() {
    local command=$1
    sed -E 's/^ +//; s/ +(#|--) .*$//' docs/installation.md | grep -xF -- "$command" >/dev/null || {
        echo "FAILED: docs/installation.md does not have the command '$command'" >&2
        exit 1
    }
    shift
    while [ $# -gt 0 ]; do
        command=${command//"$1"/"$2"}
        shift 2
    done
    printf '%s\n' "$command"
}
# The same, run in the Debian's server, and in the server here.
sql_documented() { local command; command=$(documented "$@") || exit; sql "$command"; }
query_documented() { local command; command=$(documented "$@") || exit; query "$command"; }
# The same, and that it succeeds: here, and in the Debian of its own.
expect_documented() {
    local name=$1 command
    shift
    command=$(documented "$@") || exit
    expect "$name" sh -ec "$command"
}
expect_documented_in_root() {
    local name=$1 command
    shift
    command=$(documented "$@") || exit
    expect "$name" in_root sh -ec "cd /packages; $command" </dev/null
}
for part in ${PARTS:=debian majors beside source same}; do
    case $part in debian | majors | beside | source | same) ;; *) die "there is no part '$part'" ;; esac
done
runs() { case " $PARTS " in *" $1 "*) ;; *) return 1 ;; esac; }

# --- the Debian package

in_root() { chroot "$root" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root DEBIAN_FRONTEND=noninteractive LC_ALL=C "$@"; }
dpkg_i() { in_root dpkg -i "/packages/$1"; }
library=usr/lib/postgresql/15/lib/pg_prewarm.so
bitcode=usr/lib/postgresql/15/lib/bitcode/pg_prewarm.index.bc

# The module of which package is in place: ours, contrib's, or what is wrong.
in_place() {
    local diverted
    diverted=$(in_root dpkg-divert --list '*pg_prewarm*')
    if cmp -s "$root/$library" "$work/ours/$library"; then
        cmp -s "$root/$library.contrib" "$work/contrib/$library" || { echo "no copy of contrib's"; return; }
        [ ! -e "$root/$bitcode" ] || { echo "contrib's bitcode"; return; }
        # Each file of ours, and the bitcode.
        [ "$(grep -c "by $package" <<<"$diverted")" = $(($(find "$work/ours/usr/lib" "$work/ours/usr/share/postgresql" -type f | wc -l) + 1)) ] ||
            { echo "not all diversions"; return; }
        echo ours
    elif cmp -s "$root/$library" "$work/contrib/$library"; then
        [ -z "$(find "$root/usr/lib/postgresql/15" "$root/usr/share/postgresql/15" -name '*.contrib')" ] ||
            { echo "copies of contrib's files"; return; }
        [ -z "$diverted" ] || { echo "diversions"; return; }
        [ -e "$root/$bitcode" ] || { echo "no bitcode"; return; }
        [ -z "$(in_root dpkg --verify postgresql-15)" ] || { echo "files of contrib's that have changed"; return; }
        echo "contrib's"
    else
        echo neither
    fi
}
sql() { in_root runuser -u postgres -- psql -XAtq -v ON_ERROR_STOP=1 -d postgres -c "$1"; }
cluster() { in_root pg_ctlcluster 15 main "$@"; }
loads() { sed -n 's/.*autoprewarm successfully prewarmed \([0-9]*\) of .*/\1/p' "$root/var/log/postgresql/postgresql-15-main.log"; }
# Restarts the server, which loads the list: the table has more than 400 blocks.
restart() {
    local before try loaded
    before=$(loads | wc -l)
    cluster restart
    for try in $(seq 100); do
        if [ "$(loads | wc -l)" != "$before" ]; then
            loaded=$(loads | tail -1)
            echo "$loaded blocks were loaded"
            [ "$loaded" -ge 400 ]
            return
        fi
        sleep 0.1
    done
    return 1
}

# The inode of the library that the running server has loaded.
loaded_inode() {
    local postmaster
    postmaster=$(head -1 "$root/var/lib/postgresql/15/main/postmaster.pid")
    awk '$6 ~ /\/pg_prewarm\.so/ { print $5; exit }' "/proc/$postmaster/maps"
}

set_up_debian() {
    local base=$cache/debian-bookworm.tar mount
    if [ ! -e "$base" ]; then
        say "setting up a Debian 12 (two minutes, once)"
        debootstrap --variant=minbase bookworm "$root" "$(archive)" >"$output" 2>&1 || fail "debootstrap"
        tar -cf "$base.new" -C "$root" .
        mv "$base.new" "$base"
        rm -rf --one-file-system "$root"
    fi
    mkdir -p "$root"
    tar -xf "$base" -C "$root"
    for mount in proc dev dev/shm; do mount --bind "/$mount" "$root/$mount"; done
    cp /etc/resolv.conf /etc/hosts "$root/etc/"
    printf 'deb %s bookworm main\n' "$(archive)" >"$root/etc/apt/sources.list"
    cp -a /etc/apt/apt.conf.d/. "$root/etc/apt/apt.conf.d/"
    rm -f "$root"/etc/apt/apt.conf.d/docker-*
    printf 'APT::Get::Assume-Yes "true";\n' >"$root/etc/apt/apt.conf.d/assume-yes"
    mkdir -p "$root/etc/ssl"
    [ -e "$root/etc/ssl/certs" ] || cp -rL /etc/ssl/certs "$root/etc/ssl/"
    # The test starts servers itself.
    printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
    chmod +x "$root/usr/sbin/policy-rc.d"
    mkdir -p "$root/packages"
    expect "apt-get update" in_root apt-get -qq update
}

# Makes a package from another one, whose files a function may change: its name, and a sed
# script for its control file.
repack() {
    local from=$1 to=$2 script=$3 change=${4:-true} files=$work/repack
    rm -rf "$files"
    dpkg-deb -R "$from" "$files"
    sed -i "$script" "$files/DEBIAN/control"
    "$change" "$files"
    dpkg-deb -Znone --build "$files" "$root/packages/$to" >/dev/null
}
change_contrib() { printf 'changed' >>"$1/$library"; (cd "$1" && md5sum "$library") >"$work/sum"; sed -i "\|  $library\$|d" "$1/DEBIAN/md5sums"; cat "$work/sum" >>"$1/DEBIAN/md5sums"; }
# Kills dpkg in an installation: at the end of the script, or after the line with that text.
kill_in_preinst() {
    local where='$a'
    [ -z "${kill_after:-}" ] || where="\\|$kill_after|a"
    sed -i "$where kill -9 \$PPID; kill -9 \$\$" "$1/DEBIAN/preinst"
}
kill_in_postinst() { sed -i '2i kill -9 $PPID; kill -9 $$' "$1/DEBIAN/postinst"; }
fail_in_preinst() { echo 'exit 1' >>"$1/DEBIAN/preinst"; }
# Kills dpkg and the script in a removal: at the beginning, or after the line with that text.
kill_in_postrm() {
    local kill='[ "$call" != remove ] || { kill -9 $PPID; kill -9 $$; }'
    local where=2i
    [ -z "${kill_after:-}" ] || where="\\|$kill_after|a"
    sed -i "$where $kill" "$1/DEBIAN/postrm"
    sed -i '2i call=$1' "$1/DEBIAN/postrm"
}
add_file() {
    local sql=/usr/share/postgresql/15/extension/pg_prewarm
    echo "-- new" >"$1$sql--2.0--9.9.sql"
    sed -i "s|$sql.control|$sql--2.0--9.9.sql &|g" "$1/DEBIAN/preinst" "$1/DEBIAN/postrm"
}
state() { in_root dpkg-query -W -f '${db:Status-Status}' "$package"; }

test_debian_package() {
    local ours contrib contrib18 before file key kill_after commands command data
    package=postgresql-15-pg-prewarm-rs
    make -s deb PG=15
    ours=("$packages/${package}"_*.deb)
    expect "lintian finds no error" lintian --fail-on error "${ours[0]}"
    set_up_debian
    cp "${ours[0]}" "$root/packages/ours.deb"
    dpkg-deb -x "${ours[0]}" "$work/ours"

    # Without PostgreSQL, the package waits for it.
    expect_failure "installing it without PostgreSQL" "postgresql-15 is not installed" dpkg_i ours.deb
    expect "apt-get installs what it needs" in_root apt-get -qq install -y --no-install-recommends --fix-broken
    in_root sh -c 'cd /packages && apt-get -qq download postgresql-15' >"$output" 2>&1 || fail "PostgreSQL's own package"
    contrib=("$root"/packages/postgresql-15_*.deb)
    dpkg-deb -x "${contrib[0]}" "$work/contrib"
    expect_output "then ours is in place" ours in_place
    expect "removing it" in_root apt-get -qq remove -y "$package"
    expect_output "then contrib's is in place" "contrib's" in_place

    # A server with contrib's module, and ours installed while it runs.
    in_root pg_lsclusters -h | grep -q . || in_root pg_createcluster 15 main >/dev/null
    printf "shared_preload_libraries = 'pg_prewarm'\n" >>"$root/etc/postgresql/15/main/postgresql.conf"
    expect "a server with contrib's module" cluster start
    sql "CREATE EXTENSION pg_prewarm; CREATE TABLE t AS SELECT generate_series(1, 100000); SELECT pg_prewarm('t')" >/dev/null
    expect "contrib's module loads its list" restart
    before=$(loaded_inode)
    expect "installing it over a running server" dpkg_i ours.deb
    grep -q "in the place of PostgreSQL 15's own" "$output" || fail "it does not say what is in place"
    expect_output "ours is in place" ours in_place
    expect_output "the running server has contrib's loaded" "$before" stat -c %i "$root/$library.contrib"
    expect_output "and works" t sql "SELECT pg_prewarm('t') > 0"
    expect "ours loads the list of contrib's" restart
    expect_output "the restarted server has ours loaded" "$(stat -c %i "$root/$library")" loaded_inode
    sql "ALTER EXTENSION pg_prewarm UPDATE"
    expect_output "it is the new version" completed sql "SELECT load_result FROM pg_stat_autoprewarm"
    sql "CREATE DATABASE another"
    in_root runuser -u postgres -- psql -XAtq -d another -c "CREATE EXTENSION pg_prewarm VERSION '1.2'"
    command=$(documented "$each_database") || exit
    expect "the update of each database" in_root runuser -u postgres -- sh -c "$command; true"
    expect_output "it has the new version" 2.0 in_root runuser -u postgres -- psql -XAtq -d another \
        -c "SELECT extversion FROM pg_extension WHERE extname = 'pg_prewarm'"
    sql "DROP DATABASE another"

    # Updates.
    repack "${contrib[0]}" contrib.deb 's/^Version: .*/&.1/' change_contrib
    rm -rf "$work/contrib"
    dpkg-deb -x "$root/packages/contrib.deb" "$work/contrib"
    expect "an update of PostgreSQL's package" dpkg_i contrib.deb
    expect_output "ours is in place after it, and contrib's new library beside it" ours in_place
    repack "${ours[0]}" new.deb 's/^Version: .*/&.1/'
    expect "an update of ours" dpkg_i new.deb
    expect_output "ours is in place after that" ours in_place
    expect "a downgrade" dpkg_i ours.deb
    grep -q "in the place of PostgreSQL 15's own" "$output" || fail "it does not say what is in place"
    expect_output "ours is in place after a downgrade" ours in_place
    repack "${ours[0]}" new-fails.deb 's/^Version: .*/&.2/' fail_in_preinst
    expect_failure "an update that fails" "stays in the place of PostgreSQL 15's own" dpkg_i new-fails.deb
    expect_output "ours is in place after it" ours in_place
    repack "${ours[0]}" new-killed.deb 's/^Version: .*/&.2/' kill_in_preinst
    expect_failure "an update that is interrupted" "" dpkg_i new-killed.deb
    expect_output "ours is in place after it" ours in_place
    expect "installing it once more" dpkg_i ours.deb
    expect_output "ours is in place after that" ours in_place
    expect "the server starts" restart

    # Back.
    sql_documented "ALTER EXTENSION pg_prewarm UPDATE TO '1.2';"
    expect_documented_in_root "removing it" "apt-get remove $package"
    grep -q "own pg_prewarm is in place again" "$output" || fail "it does not say what is in place"
    grep -q "UPDATE TO '1.2'" "$output" || fail "it does not say what databases need"
    expect_output "contrib's is in place, and the new one" "contrib's" in_place
    expect "contrib's module loads the list of ours" restart
    expect_documented_in_root "purging it" "apt-get purge $package"
    mv "$root/packages/ours.deb" "$root/packages/${ours[0]##*/}"
    expect_documented_in_root "installing the file" "apt-get install ./${ours[0]##*/}"
    expect_output "ours is in place after that" ours in_place
    mv "$root/packages/${ours[0]##*/}" "$root/packages/ours.deb"
    expect_documented_in_root "purging it" "apt-get purge $package"
    expect_output "nothing of it is left" "" in_root find / -xdev -name '*pg-prewarm-rs*'

    # A version with a file that this one does not have.
    repack "${ours[0]}" more.deb 's/^Version: .*/&.3/' add_file
    expect "a version with another file" dpkg_i more.deb
    expect "a downgrade to one without it" dpkg_i ours.deb
    expect "removing it" in_root dpkg --purge "$package"
    expect_output "contrib's is in place after that" "contrib's" in_place

    # Faults.
    repack "${ours[0]}" killed.deb '' kill_in_preinst
    repack "${ours[0]}" failed.deb '' fail_in_preinst
    interrupted_installation() {
        expect_failure "an installation that is interrupted" "" dpkg_i killed.deb
        expect_output "dpkg was killed" half-installed state
        [ "$root/$library" -ef "$root/$library.contrib" ] || fail "contrib's library is not kept"
    }
    interrupted_installation
    expect "the server starts after it" restart
    expect_failure "one that fails after that" "own pg_prewarm is in place again" dpkg_i failed.deb
    expect_output "contrib's is in place after both" "contrib's" in_place
    interrupted_installation
    expect "PostgreSQL's package is installed again" dpkg_i contrib.deb
    expect_failure "an installation that fails after that" "own pg_prewarm is in place again" dpkg_i failed.deb
    expect_output "contrib's is in place, and the new one" "contrib's" in_place
    interrupted_installation
    in_root dpkg --purge --force-remove-reinstreq "$package" >/dev/null 2>&1 || true
    expect "installing it after a forced purge" dpkg_i ours.deb
    expect_output "ours is in place after that" ours in_place
    # At the beginning, and after each step for a file.
    for kill_after in '' '  mv -f' ' --remove ' '  rm "'; do
        repack "${ours[0]}" kills.deb '' kill_in_postrm
        expect "installing one whose removal is interrupted, after '$kill_after'" dpkg_i kills.deb
        expect_failure "a removal that is interrupted" "" in_root dpkg --remove "$package"
        expect_output "dpkg was killed" half-installed state
        expect_failure "an installation that fails then" "" dpkg_i failed.deb
        expect_output "contrib's is in place after that" "contrib's" in_place
        expect "installing it then" dpkg_i ours.deb
        expect_output "ours is in place after that" ours in_place
        expect "installing the other one" dpkg_i kills.deb
        expect_failure "a removal that is interrupted" "" in_root dpkg --remove "$package"
        sed -i '/kill -9/d' "$root/var/lib/dpkg/info/$package.postrm"
        expect_documented_in_root "removing it once more" "dpkg --remove $package"
        expect_output "contrib's is in place after that" "contrib's" in_place
        in_root dpkg --purge "$package" >/dev/null 2>&1
    done
    expect_failure "an installation that fails" "own pg_prewarm is in place again" dpkg_i failed.deb
    in_root dpkg --purge "$package" >/dev/null 2>&1 || true
    expect_output "contrib's is in place after it" "contrib's" in_place
    # After each step for a file, and after unpacking.
    for kill_after in '  ln -f' ' --add ' '  rm -f' unpacked; do
        if [ "$kill_after" = unpacked ]; then
            repack "${ours[0]}" kills.deb '' kill_in_postinst
        else
            repack "${ours[0]}" kills.deb '' kill_in_preinst
        fi
        expect_failure "an installation that is interrupted, after '$kill_after'" "" dpkg_i kills.deb
        expect "the server starts after it" restart
        expect_documented_in_root "installing it once more" "dpkg -i ${ours[0]##*/}" "${ours[0]##*/}" ours.deb
        expect_output "ours is in place after that" ours in_place
        expect "removing it" in_root dpkg --purge "$package"
        expect_output "contrib's is in place after that" "contrib's" in_place
    done
    kill_after=

    in_root dpkg-divert --quiet --local --rename --add "/$library"
    touch "$root/$library"
    expect_failure "a diversion of somebody else" "is diverted by a local diversion already" dpkg_i ours.deb
    grep -q "Nothing was changed" "$output" || fail "it does not say that nothing was changed"
    ! grep -q "in place again" "$output" || fail "it says that something was changed"
    rm "$root/$library"
    expect "what the hint says" in_root dpkg-divert --rename --remove "/$library"
    in_root dpkg --purge "$package" >/dev/null 2>&1 || true
    expect_output "contrib's is in place after that" "contrib's" in_place
    # That of another package, of each file that may be diverted.
    for file in "/$library" "/$bitcode" /usr/share/postgresql/15/extension/pg_prewarm.control; do
        in_root dpkg-divert --quiet --package postgresql-common --no-rename --divert "$file.other" --add "$file"
        expect_failure "a diversion of $file by another package" \
            "$file is diverted by package postgresql-common already" dpkg_i ours.deb
        grep -q "Nothing was changed" "$output" || fail "it does not say that nothing was changed"
        in_root dpkg-divert --quiet --package postgresql-common --no-rename --remove "$file"
        in_root dpkg --purge "$package" >/dev/null 2>&1 || true
        expect_output "contrib's is in place after that" "contrib's" in_place
    done

    # Over files of make install, whose older versions did not keep contrib's.
    cp "$work/ours/$library" "$root/$library"
    cp "$work/ours/usr/share/postgresql/15/extension/"* "$root/usr/share/postgresql/15/extension/"
    rm "$root/$bitcode"
    expect "installing it over files of make install" dpkg_i ours.deb
    grep -q "have been replaced" "$output" || fail "it does not say that they are not contrib's"
    expect "removing it" in_root dpkg --purge "$package"
    grep -q "Run: apt-get install --reinstall postgresql-15" "$output" || fail "it does not say what to do"
    expect "reinstalling PostgreSQL's package" dpkg_i contrib.deb
    expect_output "contrib's is in place after that" "contrib's" in_place
    pg_config_in_root >"$work/pg_config"
    chmod +x "$work/pg_config"
    expect_documented "make install" "make install PG_CONFIG=/usr/lib/postgresql/15/bin/pg_config" \
        /usr/lib/postgresql/15/bin/pg_config "$work/pg_config"
    cp "$root/$library" "$work/installed.so"
    expect_failure "installing it over files of make install, which has kept contrib's" \
        'run "make uninstall" first' dpkg_i ours.deb
    cmp -s "$work/installed.so" "$root/$library" || fail "the library of make install has changed"
    in_root dpkg --purge "$package" >/dev/null 2>&1 || true
    expect_documented "make uninstall" "make uninstall PG_CONFIG=/usr/lib/postgresql/15/bin/pg_config" \
        /usr/lib/postgresql/15/bin/pg_config "$work/pg_config"
    expect_output "contrib's is in place after make uninstall" "contrib's" in_place

    # Two majors, of which this Debian has one: a package with contrib's module stands for the
    # other.
    make -s deb PG=18
    stand_in "$work/pg18" 18
    mv "$packages"/postgresql-18-pg-prewarm-rs_*.deb "$root/packages/ours18.deb"
    dpkg-deb -x "$root/packages/ours18.deb" "$work/ours18"
    contrib18=$("$(contrib_pg_config_of 18)" --pkglibdir)/pg_prewarm.so
    expect "two majors at once" in_root dpkg -i /packages/pg18.deb /packages/ours.deb /packages/ours18.deb
    expect_output "ours is in place for the one" ours in_place
    expect "and for the other" cmp "$root/${library/15/18}" "$work/ours18/${library/15/18}"
    expect "beside contrib's" cmp "$root/${library/15/18}.contrib" "$contrib18"
    expect "without contrib's bitcode" [ ! -e "$root/${bitcode/15/18}" ]
    expect "removing the other" in_root dpkg --purge postgresql-18-pg-prewarm-rs
    expect_output "ours is still in place for the one" ours in_place
    expect "contrib's is in place for the other" cmp "$root/${library/15/18}" "$contrib18"
    expect "and its bitcode" [ -e "$root/${bitcode/15/18}" ]

    # The repository.
    expect "removing it" in_root dpkg --purge "$package"
    expect "installing wget" in_root apt-get -qq install -y --no-install-recommends wget
    serve
    commands=$(sed -n '/^wget -O/,/^apt-get install/p' README.md)
    expect_output "the README has three lines" 3 wc -l <<<"$commands"
    make_repository
    expect_output "a web server can read all of it" "" \
        find "$packages/apt" -type f ! -perm -o=r -o -type d ! -perm -o=rx
    expect "the README's lines, with a repository that is not signed" install_from_repository
    expect_output "ours is in place after that" ours in_place
    expect "removing it" in_root dpkg --purge "$package"
    export GNUPGHOME=$work/gnupg
    mkdir -m 700 "$GNUPGHOME"
    for key in ours another; do
        gpg --batch --quiet --passphrase '' --quick-generate-key "$key@invalid" ed25519 sign never
    done
    make_repository SIGN_WITH=ours@invalid
    expect "the same, with one that is signed" install_from_repository
    expect_output "ours is in place after that" ours in_place
    make -s deb PG=15 REVISION=2
    make_repository SIGN_WITH=ours@invalid
    expect "apt-get update" update
    expect "apt-get upgrade brings a newer revision" in_root apt-get -qq upgrade -y
    expect_output "that is installed" "$version-2" in_root dpkg-query -W -f '${Version}' "$package"
    expect_output "ours is in place after that" ours in_place
    make -s deb PG=15 REVISION=3
    make_repository SIGN_WITH=ours@invalid
    expect "apt-get update" update
    expect_documented_in_root "an update of this package alone" "apt-get install --only-upgrade $package"
    expect_output "that is installed" "$version-3" in_root dpkg-query -W -f '${Version}' "$package"
    cp "$packages/$package"_*-3_*.deb "$root/packages/ours.deb"
    kill_after='  ln -f'
    repack "$root/packages/ours.deb" kills.deb '' kill_in_preinst
    in_root dpkg --purge "$package" >/dev/null 2>&1
    expect_failure "an installation that is interrupted" "" dpkg_i kills.deb
    expect_output "dpkg was killed" half-installed state
    expect_documented_in_root "what apt asks for then" "dpkg --configure -a"
    expect_documented_in_root "installing it again from the repository" "apt-get install --reinstall $package"
    expect_output "ours is in place after that" ours in_place
    make_repository SIGN_WITH=another@invalid
    expect_failure "apt-get update with one that another key has signed" NO_PUBKEY update
    make_repository SIGN_WITH=ours@invalid
    sed -i 's/^Label: .*/&, changed/' "$work/web/dists/bookworm/InRelease"
    expect_failure "apt-get update with one that was changed" BADSIG update

    # Uninstalled.
    expect "the server starts with it" restart
    sql_documented "DROP EXTENSION pg_prewarm;"
    sed -i '/pg_prewarm/d' "$root/etc/postgresql/15/main/postgresql.conf"
    expect_documented_in_root "removing it" "apt-get remove $package"
    cluster restart
    data=/var/lib/postgresql/15/main
    expect_documented_in_root "deleting its files" \
        "rm -f DATA/autoprewarm.blocks* DATA/autoprewarm.upstream* DATA/pg_stat_tmp/autoprewarm.*" DATA "$data"
    expect_documented_in_root "purging it" "apt-get purge $package"
    expect_documented_in_root "and its repository" "rm -f /etc/apt/sources.list.d/pg_prewarm.sources"
    expect_output "contrib's is in place after that" "contrib's" in_place
    expect_output "nothing of ours is left" "" sh -c "find '$root$data' -name '*autoprewarm*'; find '$root/etc' '$root/usr' '$root/var/lib/dpkg' -name '*pg-prewarm-rs*' -o -name 'pg_prewarm.sources'"
    cluster stop

    # Without PostgreSQL's package.
    expect "installing it" dpkg_i ours.deb
    expect "removing PostgreSQL's package" in_root apt-get -qq remove postgresql-15
    expect_output "no library is left" "" find "$root/${library%/*}" -name 'pg_prewarm*'
    expect_failure "installing it then" "postgresql-15 is not installed" dpkg_i ours.deb
    expect "removing it" in_root dpkg --purge "$package"
    grep -q "has no pg_prewarm of its own" "$output" || fail "it does not say that none is in place"
    expect_output "no library is left" "" find "$root/usr/lib/postgresql" -path '*/15/*' -name 'pg_prewarm*'
}

# The update of the extension in all databases.
each_database='psql -XAtc "SELECT datname FROM pg_database WHERE datallowconn" | while read -r d; do psql -X -d "$d" -c "ALTER EXTENSION pg_prewarm UPDATE" </dev/null; done'

# A pg_config of PostgreSQL 15 whose files are in that Debian.
pg_config_in_root() {
    printf '#!/bin/sh\ncase $1 in\n'
    printf '%s) echo "%s" ;;\n' --pkglibdir "$root/${library%/*}" --sharedir "$root/usr/share/postgresql/15"
    printf '*) exec "%s" "$@" ;;\nesac\n' "$(pg_config_of 15)"
}

# Has a web server serve what is in $work/web, at $url.
serve() {
    local log=$work/web.log
    mkdir "$work/web"
    python3 -u -m http.server --bind 127.0.0.1 --directory "$work/web" 0 >"$log" 2>&1 &
    web_server=$!
    until grep -q '^Serving' "$log"; do kill -0 "$web_server" || fail "a web server starts"; sleep 0.1; done
    url=http://127.0.0.1:$(sed -nE 's/^Serving .* port ([0-9]+) .*/\1/p' "$log")
    printf 'Acquire::http::Proxy::127.0.0.1 "DIRECT";\n' >"$root/etc/apt/apt.conf.d/web-server"
}
# The README's three lines.
install_from_repository() {
    in_root sh -exc "${commands//https:\/\/HOST\/PATH/"$url"}" </dev/null
}

# Makes an apt repository with these settings, and serves it.
make_repository() {
    (umask 077 && make -s apt-repo URL="$url" "$@")
    rm -rf "$work/web"/*
    cp -rp "$packages/apt"/* "$work/web/"
}
update() { in_root apt-get -qq -o APT::Update::Error-Mode=any update; }

# A package with the files of contrib's module for that major.
stand_in() {
    local files=$1 major=$2 pg_config
    pg_config=$(contrib_pg_config_of "$major")
    mkdir -p "$files/DEBIAN" "$files/usr/lib/postgresql/$major/lib" "$files/usr/share/postgresql/$major/extension"
    cp "$("$pg_config" --pkglibdir)/pg_prewarm.so" "$files/usr/lib/postgresql/$major/lib/"
    mkdir "$files/usr/lib/postgresql/$major/lib/bitcode"
    echo index >"$files/usr/lib/postgresql/$major/lib/bitcode/pg_prewarm.index.bc"
    cp "$("$pg_config" --sharedir)"/extension/pg_prewarm* "$files/usr/share/postgresql/$major/extension/"
    printf 'Package: postgresql-%s\nVersion: %s.0\nArchitecture: all\nMaintainer: nobody <nobody@invalid>\nDescription: stands for it\n' \
        "$major" "$major" >"$files/DEBIAN/control"
    dpkg-deb --build "$files" "$root/packages/pg$major.deb" >/dev/null
}

# --- beside contrib's module

# Starts a new server of that installation with these settings.
new_server() {
    local data=$1
    shift
    mkdir -p "$data"
    chown postgres: "$data"
    as_server_user "$bin/initdb" -D "$data" -A trust --data-checksums --no-sync >/dev/null
    printf '%s\n' "unix_socket_directories = '$work'" "listen_addresses = ''" "$@" >>"$data/postgresql.conf"
    servers+=("$data")
    start "$data"
}
start() { as_server_user "$bin/pg_ctl" -D "$1" -l "$1/log" -s -w start </dev/null >/dev/null 2>&1 || { cp "$1/log" "$output"; fail "a server starts"; }; }
stop() { as_server_user "$bin/pg_ctl" -D "$1" -s stop; }
query() { "$bin/psql" -XAtq -v ON_ERROR_STOP=1 -h "$work" -U postgres -d postgres -c "$1"; }

# Installs the archive for that major, and leaves the settings of a server that uses it in
# beside, its programs in bin.
use_archive() {
    local major=$1 control_path library_path
    bin=$("$(contrib_pg_config_of "$major")" --bindir)
    name=pg_prewarm-$version-pg$major-$(uname -m)
    make -s archive PG="$major"
    # What the document has for 18 and x86-64.
    here=("pg_prewarm-$version-pg18-x86_64" "$name" /opt/pg_prewarm-18 "$work/pg_prewarm-$major" /opt "$work")
    expect_documented "unpacking the archive for $major" "tar -xf pg_prewarm-$version-pg18-x86_64.tar.gz -C /opt" \
        "pg_prewarm-$version-pg18-x86_64.tar.gz" "$packages/$name.tar.gz" "${here[@]}"
    expect_documented "and its link" "ln -sfn pg_prewarm-$version-pg18-x86_64 /opt/pg_prewarm-18" "${here[@]}"
    files=$work/pg_prewarm-$major
    control_path=$(documented "extension_control_path = '/opt/pg_prewarm-18/share:\$system'" "${here[@]}") || exit
    library_path=$(documented "dynamic_library_path = '/opt/pg_prewarm-18/lib:\$libdir'" "${here[@]}") || exit
    beside=("shared_preload_libraries = 'pg_prewarm'" "$control_path" "$library_path")
}

# A server with the archive for that major, and then with contrib's module again.
test_archive() {
    local major=$1 data=$work/beside-$1 files name here
    use_archive "$major"
    names_licences "$files"
    new_server "$data" "${beside[@]}"
    query "CREATE EXTENSION pg_prewarm; CREATE TABLE t AS SELECT generate_series(1, 100000)"
    stop "$data"
    start "$data"
    expect_output "the archive's extension loads beside contrib's of $major" t query "SELECT autoprewarm_wait('1 min')"
    expect_output "it is the new one" completed query "SELECT load_result FROM pg_stat_autoprewarm"
    cp -r "$(readlink -f "$files")" "$work/update-$major"
    ln -sfn "update-$major" "$files"
    stop "$data"
    start "$data"
    expect_output "after a change of the link, the updated library is loaded" "$work/update-$major/lib/pg_prewarm.so" \
        awk '$6 ~ /pg_prewarm\.so$/ { print $6; exit }' "/proc/$(head -1 "$data/postmaster.pid")/maps"
    query_documented "ALTER EXTENSION pg_prewarm UPDATE TO '1.2';"
    stop "$data"
    sed -i '/^extension_control_path\|^dynamic_library_path/d' "$data/postgresql.conf"
    start "$data"
    expect_output "contrib's goes on with its database" t query "SELECT pg_prewarm('t') > 0"
    stop "$data"
    expect_documented "removing the archive" "rm -r /opt/pg_prewarm-18 /opt/pg_prewarm-$version-pg18-x86_64" "${here[@]}"
    tar -xf "$packages/$name.tar.gz" -C "$work"
    ln -sfn "$name" "$files"
}

test_beside() {
    local contrib major=18 files before name manifest
    contrib=$(contrib_pg_config_of $major)
    before=$(cd "$("$contrib" --pkglibdir)" && sha256sum pg_prewarm.so)
    name=pg_prewarm-$version-pg$major-$(uname -m)
    test_archive $major

    make -s image PG=$major
    mkdir "$work/image"
    tar -xf "$packages/$name.oci.tar" -C "$work/image"
    expect_output "the image's index names one image, and its platform" "[\"linux\",\"$(dpkg --print-architecture)\"]" \
        jq --compact-output '.manifests[] | [.platform.os, .platform.architecture]' "$work/image/index.json"
    blob() { printf '%s/image/blobs/%s' "$work" "${1/://}"; }
    manifest=$(blob "$(jq -r '.manifests[0].digest' "$work/image/index.json")")
    expect_output "so does its configuration" "[\"linux\",\"$(dpkg --print-architecture)\"]" \
        jq --compact-output '[.os, .architecture]' "$(blob "$(jq -r .config.digest "$manifest")")"
    umoci unpack --rootless --image "$work/image:$version-pg$major" "$work/bundle" >"$output" 2>&1 || fail "the image can be unpacked"
    files=$work/bundle/rootfs
    names_licences "$files"
    expect_output "all can read the image's files" "" find "$files/lib" "$files/share" ! -perm -444
    # CloudNativePG's settings have PostgreSQL's own directories first, and later ones win.
    chmod a+rx "$work/bundle" "$files"
    new_server "$work/from-image" "extension_control_path = '\$system:$files/share'" \
        "dynamic_library_path = '\$libdir:$files/lib'"
    query_documented "ALTER SYSTEM SET extension_control_path = '/extensions/pg_prewarm/share:\$system';" /extensions/pg_prewarm "$files"
    query_documented "ALTER SYSTEM SET dynamic_library_path = '/extensions/pg_prewarm/lib:\$libdir';" /extensions/pg_prewarm "$files"
    query "ALTER SYSTEM SET shared_preload_libraries = pg_prewarm"
    stop "$work/from-image"
    start "$work/from-image"
    query "CREATE EXTENSION pg_prewarm"
    expect_output "the image's extension loads" t query "SELECT autoprewarm_wait('1 min')"
    stop "$work/from-image"
    expect_output "contrib's library is unchanged" "$before" sh -c "cd '$("$contrib" --pkglibdir)' && sha256sum pg_prewarm.so"

    make -s install PG_CONFIG="$(pg_config_of 15)"
    documented "pg_upgrade -b OLD_BIN -B NEW_BIN -d OLD_DATA -D NEW_DATA --new-options \"-c shared_preload_libraries=''\"" >/dev/null
    test_upgrade 15 "$("$(pg_config_of 15)" --bindir)" --new-options "-c shared_preload_libraries=''" -- \
        "shared_preload_libraries = 'pg_prewarm'"
}

# That the licences in this directory name the crates whose paths are in its library, and those
# of Rust's standard library: of these, only the part of it that is for tests and macros is
# not linked.
names_licences() {
    local library=$1/lib/pg_prewarm.so copyright=$1/share/doc/pg_prewarm/copyright
    [ -s "$1/share/doc/pg_prewarm/Apache-2.0" ] || fail "the licence that $copyright refers to is missing"
    grep -aoE '/build/registry/src/[^/]+/[^/]+/' "$library" | sed -E 's|.*/([^/]+)/$|Files: vendor/\1/*|' | sort -u >"$work/crates"
    expect "the library has crates" grep -q '/pgrx-[0-9]' "$work/crates"
    grep '^Files: ' "$copyright" | sort -u >"$work/licences"
    expect_output "the licences of ${1##*/} name all of them" "" comm -23 "$work/crates" "$work/licences"
    find "$(rustc --print target-libdir)" -name '*.rlib' -printf '%f\n' | sed -E 's/^lib(.*)-[0-9a-f]+\.rlib$/\1/' |
        grep -vE '^(alloc|core|std|std_detect|panic_.*|unwind|profiler_builtins|sysroot|rustc_std_workspace_.*|proc_macro|rustc_literal_escaper|test|getopts)$' |
        sort >"$work/crates"
    expect "Rust's standard library has crates" grep -qx addr2line "$work/crates"
    sed -nE 's!^Files: rust/(library|vendor)/([a-z0-9_-]+[a-z0-9_])(-\*|/\*)$!\2!p' "$copyright" | tr - _ | sort >"$work/licences"
    expect_output "the licences of ${1##*/} name all of these" "" comm -23 "$work/crates" "$work/licences"
}

# pg_upgrade from that major, with its programs, pg_upgrade's options and -- before the settings
# of its server, to a server with ours beside contrib's, as use_archive has left it.
test_upgrade() {
    local major=$1 old_bin=$2 new_bin=$bin old=$work/old-$1 new=$work/new-$1 options=() command
    shift 2
    while [ "$1" != -- ]; do options+=("$1"); shift; done
    shift
    bin=$old_bin
    new_server "$old" "$@"
    query "CREATE EXTENSION pg_prewarm; CREATE TABLE t AS SELECT generate_series(1, 100000)"
    # See pg_upgrade_keeps_the_extension_… in tests/upgrade.rs.
    [ "$major" != 15 ] || query_documented "UPDATE pg_attribute SET attoptions = NULLIF(ARRAY(SELECT o FROM unnest(attoptions) o WHERE o NOT LIKE 'pg_attver=%'), '{}') WHERE 'pg_attver' IN (SELECT split_part(o, '=', 1) FROM unnest(attoptions) o);"
    stop "$old"
    bin=$new_bin
    new_server "$new" "${beside[@]}"
    stop "$new"
    upgrade() {
        (cd "$work" && as_server_user "$bin/pg_upgrade" -b "$old_bin" -B "$bin" \
            -d "$old" -D "$new" -s "$work" -U postgres "$@")
    }
    expect "pg_upgrade from $major to a server with ours beside contrib's" upgrade "${options[@]}"
    command=$(documented "cp -p OLD_DATA/autoprewarm.blocks NEW_DATA/" OLD_DATA "$old" NEW_DATA "$new") || exit
    expect "copying the list" as_server_user sh -ec "$command"
    start "$new"
    expect_output "the upgraded server has loaded the list" t query "SELECT autoprewarm_wait('1 min')"
    expect_output "its database has 2.0" completed query "SELECT load_result FROM pg_stat_autoprewarm"
    stop "$new"
}

# --- the other majors

files_of_package() {
    local file
    printf 'usr/lib/postgresql/%s/lib/pg_prewarm.so\n' "$1"
    for file in pg_prewarm.control sql/*.sql; do
        printf 'usr/share/postgresql/%s/extension/%s\n' "$1" "${file##*/}"
    done | LC_ALL=C sort
}

test_majors() {
    local major package deb files depends old old_bin
    prepare 16 17 19 || exit
    for major in 16 17 18 19; do
        package=postgresql-$major-pg-prewarm-rs
        make -s deb PG="$major"
        deb=("$packages/${package}"_*.deb)
        expect "lintian finds no error in the package for $major" lintian --fail-on error "${deb[0]}"
        depends="postgresql-$major"
        case $("$(pg_config_of "$major")" --version) in
            *19rc1*) depends='postgresql-19 (>= 19~rc1), postgresql-19 (<< 19~rc1+)' ;;
        esac
        expect "it depends on that PostgreSQL" grep -qF "$depends, libc6" <(dpkg-deb --field "${deb[0]}" Depends)
        dpkg-deb -x "${deb[0]}" "$work/majors"
        expect_output "its files are where Debian's PostgreSQL $major finds them" "$(files_of_package "$major")" \
            sh -c "cd '$work/majors' && find usr/lib usr/share/postgresql -type f | LC_ALL=C sort"
        bin=$("$(pg_config_of "$major")" --bindir)
        new_server "$work/server-$major"
        expect "PostgreSQL $major loads its library" query "LOAD '$work/majors/usr/lib/postgresql/$major/lib/pg_prewarm.so'"
        stop "$work/server-$major"
        rm -rf "$work/majors"
    done
    use_archive 18
    old=("${beside[@]}")
    old_bin=$bin
    test_archive 19
    test_upgrade 18 "$old_bin" -- "${old[@]}"
}

# --- the source archives

test_source() {
    local dist=pg_prewarm_rs-$version pg_config libraries extension contrib
    make -s dist
    expect "META.json is valid for PGXN's client" /usr/bin/python3 tests/pgxn_meta.py "$packages/$dist.zip"
    unzip -q "$packages/$dist.zip" -d "$work"
    sed -i "s/$version/${version%.*}/" "$work/$dist/META.json"
    (cd "$work" && python3 -m zipfile -c bad.zip "$dist")
    expect_failure "one with a version that is not PGXN's" "bad version number" \
        /usr/bin/python3 tests/pgxn_meta.py "$work/bad.zip"
    # A copy, since it is installed into.
    cp -a "$(pg_root 15)" "$work/pg15"
    pg_config=$work/pg15/lib/postgresql/15/bin/pg_config
    libraries=$("$pg_config" --pkglibdir)
    extension=$("$pg_config" --sharedir)/extension
    contrib=$(contrib_pg_config_of 15)
    rm -f "$libraries"/pg_prewarm.so* "$extension"/pg_prewarm*
    cp "$("$contrib" --pkglibdir)/pg_prewarm.so" "$libraries/"
    cp "$("$contrib" --sharedir)"/extension/pg_prewarm* "$extension/"
    # pgxn looks whether it can write there.
    mkdir -p "$("$pg_config" --libdir)" "$work/offline"
    tar -xf "$packages/$dist-vendored.tar.xz" -C "$work/offline"
    without_network() {
        env -u CARGO_TARGET_DIR CARGO_HOME="$work/cargo" unshare --net make -s -C "$work/offline/$dist" install PG_CONFIG="$pg_config"
    }
    expect "the archive with crates is built and installed without a network" without_network
    mv "$libraries/pg_prewarm.so" "$work/offline.so"
    expect "its library is there, and contrib's is kept" cmp "$libraries/pg_prewarm.so.contrib" "$("$contrib" --pkglibdir)/pg_prewarm.so"
    rm -rf "$work/offline" "$work/cargo"
    expect_documented "pgxn installs its archive" \
        "pgxn install --sudo --pg_config /usr/lib/postgresql/15/bin/pg_config target/packages/pg_prewarm_rs-$version.zip" \
        pgxn "env -u CARGO_TARGET_DIR pgxn" --sudo --nosudo \
        /usr/lib/postgresql/15/bin/pg_config "$pg_config" target/packages "$packages"
    expect "it is the same library" cmp "$libraries/pg_prewarm.so" "$work/offline.so"
    bin=$("$pg_config" --bindir)
    new_server "$work/pgxn"
    expect "pgxn creates the extension that META.json names" pgxn load --pg_config "$pg_config" \
        -h "$work" -U postgres -d postgres "$packages/$dist.zip"
    expect_output "it is this version" "${version%.*}" query "SELECT extversion FROM pg_extension WHERE extname = 'pg_prewarm'"
    stop "$work/pgxn"
    expect "pgxn uninstalls it" pgxn uninstall --nosudo --pg_config "$pg_config" "$packages/$dist.zip"
    expect "contrib's library is in place again" cmp "$libraries/pg_prewarm.so" "$("$contrib" --pkglibdir)/pg_prewarm.so"
    expect_output "and so are its other files" "" diff <(cd "$extension" && md5sum pg_prewarm*) \
        <(cd "$("$contrib" --sharedir)/extension" && md5sum pg_prewarm*)
}

# --- two builds are the same

test_same() {
    local folder
    for folder in one another-folder; do
        mkdir "$work/$folder"
        git_here archive HEAD | tar -x -C "$work/$folder"
    done
    expect "a build in one folder" env -u CARGO_TARGET_DIR make -s -C "$work/one" all PG_CONFIG="$(pg_config_of 15)"
    expect "a build in another, with its results in a third" env CARGO_TARGET_DIR="$work/results" \
        make -s -C "$work/another-folder" all PG_CONFIG="$(pg_config_of 15)"
    expect "they are the same" cmp "$work/one/target/release/libpg_prewarm.so" "$work/results/release/libpg_prewarm.so"
}

! runs debian || test_debian_package
! runs majors || test_majors
! runs beside || test_beside
! runs source || test_source
! runs same || test_same
echo "$passed passed, 0 failed"
