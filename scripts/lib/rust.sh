# Which Rust is used: the first of these that is as new as Cargo.toml's
# rust-version says, and has rustfmt, which pgrx's build script calls. PATH's own,
# be it rustup's or not; Debian's, whose packages scripts/prepare installs where
# neither is there. Sourced, never run.

rust_needed() { sed -n 's/^rust-version = "\(.*\)"/\1/p' "$project/Cargo.toml"; }

# The older version of what `cargo` and `rustc` in PATH (or in the folder $1) say;
# nothing where one of these or rustfmt is missing or does not run.
rust_version() {
    local folder=${1:+$1/} cargo rustc
    cargo=$("${folder}cargo" --version 2>/dev/null | awk '{ print $2 }') || return 0
    rustc=$("${folder}rustc" --version 2>/dev/null | awk '{ print $2 }') || return 0
    "${folder}rustfmt" --version >/dev/null 2>&1 || return 0
    [ -z "$cargo" ] || [ -z "$rustc" ] || printf '%s\n%s\n' "$cargo" "$rustc" | sort -V | head -1
}

rust_is_new_enough() {
    local found
    found=$(rust_version "$@")
    [ -n "$found" ] && printf '%s\n%s\n' "$(rust_needed)" "$found" | sort -V -C
}

# Puts a Rust that is new enough first in PATH; fails where there is none.
# Debian's programs get a folder of their own, since the rest of /usr/bin is not
# to come before what the caller has put there.
find_rust() {
    local program links=$cache/rust/bin debian=${DEBIAN_RUST:-/usr/bin}
    ! rust_is_new_enough || return 0
    rust_is_new_enough "$debian" || return 1
    mkdir -p "$links" || die "no folder can be made in $cache: name another in PG_PREWARM_CACHE"
    for program in cargo rustc rustdoc rustfmt cargo-fmt cargo-clippy clippy-driver; do
        ln -sfn "$debian/$program" "$links/$program"
    done
    export PATH=$links:$PATH
    # What a cargo of rustup's told its children.
    unset RUSTUP_TOOLCHAIN CARGO RUSTC RUSTDOC
}

# Whether that is Debian's, whose packages each have a part of it.
is_debians_rust() { case $(command -v cargo) in "$cache/rust/bin/cargo" | /usr/bin/cargo) ;; *) return 1 ;; esac; }

use_rust() {
    local found
    find_rust && return
    found=$(rust_version)
    die "Rust $(rust_needed) or newer with rustfmt is needed, and PATH has ${found:-none}:" \
        "apt-get install cargo-web rustc-web rustfmt-web (Debian 12), or rustup update stable"
}
