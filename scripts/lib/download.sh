# Fetching things, and room to put them: what fails for a while is tried again,
# and what cannot be mended here ends with one line that says what to do.
# Sourced, never run.

# The error of the command whose output is in the file $1, in one line: the first
# file that could not be had, or else its last word.
last_error() {
    { grep -am1 'Failed to fetch' "$1" || grep -aiE '^E: |error: |^(tar|patchelf|dpkg-deb): ' "$1" | tail -1; } |
        sed 's/^E: //; s/ *\[IP:.*//' | cut -c1-300 || true
}

# Ends the script if that command failed because there was no room: its words may
# have had no room either, so a little is written to see.
check_room_left() {
    local log=$1
    if ! grep -aqs 'No space left on device' "$log" &&
        head -c 65536 /dev/zero 2>/dev/null >"$cache/.probe"; then
        rm -f "$cache/.probe"
        return
    fi
    rm -f "$cache/.probe"
    die "no room left in $cache: free some (it is a cache: all in it can be made again)," \
        "or name another folder in PG_PREWARM_CACHE; then call again"
}

# Ends the script if the cache's file system has less than $1 MB, for $2.
need_room() {
    local needed=$1 what=$2 free
    free=$(df -m --output=avail "$cache" | tail -1)
    [ "$free" -ge "$needed" ] ||
        die "$what takes $needed MB in $cache, where $((free)) MB are free: free some," \
            "or name another folder in PG_PREWARM_CACHE; then call again"
}

# Runs a command that fetches something, with its output in the file $1: three
# times, with a pause that grows, unless the answer was that it is not there.
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

# What another try would not change.
is_gone() { grep -aqE '404 +Not Found|File not found|Unable to (find|locate)|could not compile' "$1"; }

# Packages of this machine's own suites, installed.
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
    # Nothing of the user's is to go: Debian's Rust conflicts with its rustup, say.
    fetch "$log" "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get -qq install -y --no-install-recommends --no-remove "${missing[@]}" ||
        die "apt-get cannot install ${missing[*]} ($(last_error "$log")): see to what it says" \
            "(is there a network?), then call again; $log has it all"
}

# Once in a call is enough.
update_machine_lists() {
    [ -z "${machine_lists_are_new:-}" ] || return 0
    machine_lists_are_new=yes
    local sudo=()
    [ "$(id -u)" = 0 ] || sudo=(sudo)
    "${sudo[@]}" apt-get -qq update >"$cache/apt.log" 2>&1 || true
}

# The address of Debian's archive, as the machine's own packages have it.
archive() {
    if [ -n "${PG_PREWARM_ARCHIVE:-}" ]; then
        printf '%s' "$PG_PREWARM_ARCHIVE"
    else
        apt-get indextargets --format '$(ORIGIN) $(LABEL) $(REPO_URI)' 'Created-By: Packages' |
            awk '$1 == "Debian" && $2 == "Debian" { print $3; exit }'
    fi
}

# Writes to apt_of_suites how apt-get is called for Debian's newer suites, which
# are none of the machine's: nothing of the machine's counts, neither its lists
# nor its preferences nor what is installed. Their lists are fetched at most once
# in a call. For the major version $1: its packages come from the suite that has
# it, and so do their libraries.
use_suites() {
    local major=$1 apt=$cache/apt uri suite=sid trusted=
    [ "$major" != 17 ] || suite=trixie
    mkdir -p "$apt/sources" "$apt/lists/partial" "$apt/archives/partial" "$apt/preferences-$major"
    : >"$apt/status"
    # Libraries of an older or newer PostgreSQL do not go with it.
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
    [ -n "$uri" ] || die "no Debian archive among the machine's package sources: name its address in PG_PREWARM_ARCHIVE"
    [ "${PG_PREWARM_ARCHIVE_TRUSTED:-}" != yes ] || trusted=$'\nTrusted: yes'
    for suite in 'deb deb-src:trixie sid forky experimental' 'deb-src:bookworm'; do
        printf 'Types: %s\nURIs: %s\nSuites: %s\nComponents: main\nSigned-By: %s%s\n\n' \
            "${suite%%:*}" "$uri" "${suite#*:}" /usr/share/keyrings/debian-archive-keyring.gpg "$trusted"
    done >"$apt/sources/suites.sources"
    update_suites
}

# What an archive has not got of these, another may have: a list that cannot be
# fetched is seen when something is not found in it.
update_suites() {
    suites_are_new=yes
    lists_failure=
    need_room 250 "the lists of Debian's newer suites"
    fetch "$cache/lists.log" apt-get "${apt_of_suites[@]}" -o APT::Update::Error-Mode=any update && return
    lists_failure="not all lists of Debian's newer suites can be fetched ($(last_error "$cache/lists.log"))"
    say "$lists_failure"
}

# Fetches, in the folder $1, with apt-get's other arguments; why_not then says what
# was the matter. (The lists are those of this very call: newer ones would not help.)
fetch_of_suites() {
    local folder=$1 log=$cache/fetch.log
    shift
    mkdir -p "$folder"
    fetch "$log" in_folder "$folder" apt-get "${apt_of_suites[@]}" "$@" && return
    why_not=$(last_error "$log")
    return 1
}

in_folder() ( cd "$1" && shift && "$@" )
