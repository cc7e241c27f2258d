# Selects the Rust: the one in PATH, or else Debian's, whose packages scripts/prepare
# installs if there is neither. It must be at least as new as rust-version in Cargo.toml,
# and have rustfmt, which pgrx's build script calls. Sourced, never run.

rust_needed() { sed -n 's/^rust-version = "\(.*\)"/\1/p' "$project/Cargo.toml"; }

# The version of `cargo` or `rustc` in PATH (or in the directory $1), whichever is older.
# Empty if one of these or rustfmt is missing or does not run.
rust_version() {
    local directory=${1:+$1/} cargo rustc
    cargo=$("${directory}cargo" --version 2>/dev/null | awk '{ print $2 }') || return 0
    rustc=$("${directory}rustc" --version 2>/dev/null | awk '{ print $2 }') || return 0
    "${directory}rustfmt" --version >/dev/null 2>&1 || return 0
    [ -z "$cargo" ] || [ -z "$rustc" ] || printf '%s\n%s\n' "$cargo" "$rustc" | sort -V | head -1
}

rust_is_new_enough() {
    local found
    found=$(rust_version "$@")
    [ -n "$found" ] && printf '%s\n%s\n' "$(rust_needed)" "$found" | sort -V -C
}

# Puts a Rust that is new enough first in PATH. Fails if there is none. Debian's programs
# are linked in a directory of their own, since the rest of /usr/bin must not precede the
# caller's PATH.
find_rust() {
    local program links=$cache/rust/bin debian=${DEBIAN_RUST:-/usr/bin}
    ! rust_is_new_enough || return 0
    rust_is_new_enough "$debian" || return 1
    mkdir -p "$links" || die "cannot create a directory in $cache: set PG_PREWARM_CACHE to another"
    for program in cargo rustc rustdoc rustfmt cargo-fmt cargo-clippy clippy-driver; do
        ln -sfn "$debian/$program" "$links/$program"
    done
    export PATH=$links:$PATH
    # rustup's cargo sets these for its child processes.
    unset RUSTUP_TOOLCHAIN CARGO RUSTC RUSTDOC
}

# Whether it is Debian's Rust, which consists of several packages.
is_debians_rust() { case $(command -v cargo) in "$cache/rust/bin/cargo" | /usr/bin/cargo) ;; *) return 1 ;; esac; }

use_rust() {
    local found
    find_rust && return
    found=$(rust_version)
    die "Rust $(rust_needed) or newer with rustfmt is needed, and PATH has ${found:-none}:" \
        "apt-get install cargo-web rustc-web rustfmt-web (Debian 12), or rustup update stable"
}

# Adds rustfmt and clippy to a toolchain of rustup's that is new enough and has been installed
# without them.
add_rust_components() {
    local found
    command -v rustup >/dev/null && ! rustfmt --version >/dev/null 2>&1 || return 0
    found=$(rustc --version 2>/dev/null | awk '{ print $2 }') || return 0
    printf '%s\n%s\n' "$(rust_needed)" "$found" | sort -V -C || return 0
    say "adding rustfmt and clippy to Rust $found"
    mkdir -p "$cache"
    fetch "$cache/rustup.log" rustup component add rustfmt clippy ||
        die "rustup cannot add rustfmt and clippy ($(last_error "$cache/rustup.log")): fix that, then call again"
}
