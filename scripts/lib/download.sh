# Fetching, and disk space. Failed downloads are tried again; other failures end the script
# with one line that says what to do. Sourced, never run.

# The error of the command whose output is in the file $1, in one line: the first file
# that could not be fetched, or else the last error.
last_error() {
    { grep -am1 'Failed to fetch' "$1" || grep -aiE '^E: |error: |^(tar|patchelf|dpkg-deb): ' "$1" | tail -1; } |
        sed 's/^E: //; s/ *\[IP:.*//' | cut -c1-300 || true
}

# Ends the script if a command failed because the disk is full. There may have been no
# space for its output either, so this tries to write a little.
check_room_left() {
    local log=$1
    if ! grep -aqs 'No space left on device' "$log" &&
        head -c 65536 /dev/zero 2>/dev/null >"$cache/.probe"; then
        rm -f "$cache/.probe"
        return
    fi
    rm -f "$cache/.probe"
    die "no space left in $cache: free some (everything in the cache can be made again)," \
        "or set PG_PREWARM_CACHE to another directory; then call again"
}

# Ends the script if the cache's file system has less than the $1 MB that $2 needs.
need_room() {
    local needed=$1 what=$2 free
    free=$(df -m --output=avail "$cache" | tail -1)
    [ "$free" -ge "$needed" ] ||
        die "$what needs $needed MB in $cache, which has $((free)) MB: free some," \
            "or set PG_PREWARM_CACHE to another directory; then call again"
}

# Runs a command with its output in the file $1. If it fails, $2 is the error.
logged() {
    local log=$1 failure=$2
    shift 2
    "$@" >"$log" 2>&1 && return
    check_room_left "$log"
    tail -20 "$log" >&2
    die "$failure; the whole output is in $log"
}

# Runs a command that fetches something, with its output in the file $1. Tries it three
# times, with growing pauses, unless the answer is that the file does not exist.
fetch() {
    local log=$1 try
    shift
    for try in 1 2 3; do
        ! "$@" >"$log" 2>&1 || return 0
        check_room_left "$log"
        ! is_gone "$log" || return 1
        [ "$try" = 3 ] || { say "fetching fails ($(last_error "$log")); trying again"; sleep $((try * ${PG_PREWARM_PAUSE:-4})); }
    done
    return 1
}

# Errors that another try would not change.
is_gone() { grep -aqE '404 +Not Found|File not found|Unable to (find|locate)|could not compile' "$1"; }

# Installs packages from this machine's own suites.
install_packages() {
    local missing=() package sudo=() log=$cache/apt.log
    for package in "$@"; do
        dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' ||
            missing+=("$package")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    say "installing ${missing[*]}"
    if [ "$(id -u)" != 0 ]; then
        command -v sudo >/dev/null && sudo -n true 2>/dev/null ||
            die "these packages are missing: ${missing[*]}; install them as root, then call again"
        sudo=(sudo)
    fi
    update_machine_lists
    # No package may be removed: Debian's Rust conflicts with its rustup, for example.
    fetch "$log" "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get -qq install -y --no-install-recommends --no-remove "${missing[@]}" ||
        die "apt-get cannot install ${missing[*]} ($(last_error "$log")): fix that (is there" \
            "a network?), then call again; the whole output is in $log"
}

# Once in a call is enough.
update_machine_lists() {
    [ -z "${machine_lists_are_new:-}" ] || return 0
    machine_lists_are_new=yes
    local sudo=()
    [ "$(id -u)" = 0 ] || sudo=(sudo)
    "${sudo[@]}" apt-get -qq update >"$cache/apt.log" 2>&1 || true
}

# The address of the Debian archive in the machine's package sources.
archive() {
    if [ -n "${PG_PREWARM_ARCHIVE:-}" ]; then
        printf '%s' "$PG_PREWARM_ARCHIVE"
    else
        apt-get indextargets --format '$(ORIGIN) $(LABEL) $(REPO_URI)' 'Created-By: Packages' |
            awk '$1 == "Debian" && $2 == "Debian" { print $3; exit }'
    fi
}

# Sets apt_of_suites to apt-get's options for Debian's newer suites. The machine's own
# lists, preferences and installed packages are ignored. The suites' lists are fetched at
# most once in a call. Packages of major version $1 come from the suite that has it, and
# so do their libraries.
use_suites() {
    local major=$1 apt=$cache/apt uri suite=sid trusted=
    [ "$major" != 17 ] || suite=trixie
    mkdir -p "$apt/sources" "$apt/lists/partial" "$apt/archives/partial" "$apt/preferences-$major"
    : >"$apt/status"
    # Libraries of another PostgreSQL do not fit.
    printf 'Package: src:postgresql-%s\nPin: version %s*\nPin-Priority: 995\n' "$major" "$major" \
        >"$apt/preferences-$major/major"
    apt_of_suites=(-qq -o Dir::Etc::SourceList=/dev/null -o Dir::Etc::SourceParts="$apt/sources"
        -o Dir::Etc::Preferences=/dev/null -o Dir::Etc::PreferencesParts="$apt/preferences-$major"
        -o Dir::State="$apt" -o Dir::State::lists="$apt/lists" -o Dir::State::status="$apt/status"
        -o Dir::Cache="$apt" -o APT::Default-Release="$suite" -o APT::Install-Recommends=no
        -o APT::Sandbox::User=root -o Debug::NoLocking=1 -o Acquire::Languages=none
        -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false
        -o Acquire::Retries=0 -o Acquire::http::Timeout=30 -o Acquire::Check-Valid-Until=false)
    [ -z "${suites_are_new:-}" ] || return 0
    uri=$(archive)
    if [ -z "$uri" ]; then
        update_machine_lists
        uri=$(archive)
    fi
    [ -n "$uri" ] || die "no Debian archive among the machine's package sources: set PG_PREWARM_ARCHIVE to its address"
    [ "${PG_PREWARM_ARCHIVE_TRUSTED:-}" != yes ] || trusted=$'\nTrusted: yes'
    for suite in 'deb deb-src:trixie sid forky experimental' 'deb-src:bookworm'; do
        printf 'Types: %s\nURIs: %s\nSuites: %s\nComponents: main\nSigned-By: %s%s\n\n' \
            "${suite%%:*}" "$uri" "${suite#*:}" /usr/share/keyrings/debian-archive-keyring.gpg "$trusted"
    done >"$apt/sources/suites.sources"
    update_suites
}

# A list that cannot be fetched is no error yet: the packages may be in others.
update_suites() {
    suites_are_new=yes
    lists_failure=
    need_room 250 "the lists of Debian's newer suites"
    fetch "$cache/lists.log" apt-get "${apt_of_suites[@]}" -o APT::Update::Error-Mode=any update && return
    lists_failure="not all lists of Debian's newer suites can be fetched ($(last_error "$cache/lists.log"))"
    say "$lists_failure"
}

# Runs apt-get in the directory $1 with the other arguments. If that fails, why_not has the
# reason. (The lists were fetched in this call, so newer ones would not help.)
fetch_of_suites() {
    local directory=$1 log=$cache/fetch.log
    shift
    mkdir -p "$directory"
    fetch "$log" in_directory "$directory" apt-get "${apt_of_suites[@]}" "$@" && return
    why_not=$(last_error "$log")
    return 1
}

in_directory() ( cd "$1" && shift && "$@" )
