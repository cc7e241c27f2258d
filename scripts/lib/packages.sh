# What all packages need: their directory, the time, and the licences. Sourced, never run.

# Where packages are put.
packages=${CARGO_TARGET_DIR:-$project/target}/packages
mkdir -p "$packages"

# The checkout may belong to another user than the one who builds.
git_here() { git -C "$project" -c safe.directory="$project" "$@"; }

# Packages of the same commit do not differ by when they were made.
if [ -e "$project/.git" ]; then
    SOURCE_DATE_EPOCH=$(git_here log -1 --format=%ct)
else
    SOURCE_DATE_EPOCH=$(stat -c %Y "$project/Cargo.toml")
fi
export SOURCE_DATE_EPOCH

# Prepares PostgreSQL of that major, for which the extension is built, Rust, and the named
# packages of this machine.
prepare_packaging() {
    local major=$1
    shift
    is_supported "$major" || not_supported "$major"
    prepare "$major" || exit
    install_packages "$@"
    use_pg_config "$(pg_config_of "$major")"
}

# Makes a tar file of what is in the directory $2 (the other arguments, or all), which does
# not tell when and by whom.
tar_of() {
    local file=$1 directory=$2
    shift 2
    [ $# -gt 0 ] || set -- .
    tar --create --file "$file" --auto-compress --sort=name --mtime="@$SOURCE_DATE_EPOCH" \
        --owner=0 --group=0 --numeric-owner --mode=u=rwX,go=rX --directory "$directory" "$@"
}

# Writes the licences of all that the library is made of, as a Debian copyright file.
copyright() {
    printf 'Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\n'
    printf 'Upstream-Name: pg_prewarm for Rust\n'
    printf 'Comment: The library is linked with the crates below, each under the licence whose text\n'
    printf ' is here. Many can be had under the Apache License, version 2.0, as well, which on\n'
    printf ' Debian is in /usr/share/common-licenses/Apache-2.0.\n\n'
    printf 'Files: *\nCopyright: %s\nLicense: PostgreSQL\n' "$(sed -n 's/^Copyright (c) //p' "$project/LICENSE")"
    sed '1,/^Copyright/d' "$project/LICENSE" | sed '1{/^$/d}' | as_paragraphs
    crates_copyright
    rust_copyright
}

# The part of it that is about the crates that the library is linked with, other than this
# project's own.
crates_copyright() {
    local linked metadata name version licence authors directory
    linked=$(cargo tree --locked --edges normal,no-proc-macro --prefix none --no-dedupe "${pg_features[@]}" \
        --format '{p}' | sed -nE 's/^([^ ]+) v([^ ]+).*/\1 \2/p' | grep -vE '^pg_prewarm(_blocks)? ' | LC_ALL=C sort -u)
    metadata=$(cargo metadata --locked --format-version 1 "${pg_features[@]}" |
        jq -r '.packages[] | [.name, .version, .license // "", (.authors | join(", ")), .manifest_path] | join("\u001f")')
    while IFS=$'\x1f' read -r name version licence authors directory; do
        grep -qxF "$name $version" <<<"$linked" || continue
        [ -n "$authors" ] || authors="the authors of $name"
        printf '\nFiles: vendor/%s-%s/*\nCopyright: %s\n' "$name" "$version" "$authors"
        printf 'Comment: linked into the library; the crate is licensed under\n %s\n' "$licence"
        printf 'License: %s-%s\n' "$name" "$version"
        crate_licence "$name" "$licence" "$authors" "$(dirname "$directory")" | as_paragraphs
    done < <(LC_ALL=C sort <<<"$metadata")
}

# The part about Rust's standard library, which has crates of its own.
rust_copyright() {
    local licenses=$project/packaging/licenses
    cat "$licenses/rust-library"
    printf '\nLicense: MIT\n'
    as_paragraphs <"$licenses/MIT"
    printf '\nLicense: Apache-2.0 with LLVM exception\n The Apache License, version 2.0 (on Debian in\n'
    printf ' /usr/share/common-licenses/Apache-2.0), with this exception:\n .\n'
    as_paragraphs <"$licenses/LLVM-exception"
    printf '\nLicense: Unicode-3.0\n'
    as_paragraphs <"$licenses/Unicode-3.0"
}

# The text of a crate's licence: MIT's, if that is among those to choose from.
crate_licence() {
    local name=$1 licence=$2 authors=$3 directory=$4 pattern file=
    for pattern in 'licen[sc]e-mit*' 'licen[sc]e' 'licen[sc]e.*' 'copying*'; do
        # A short one only names its licences.
        file=$(find "$directory" -maxdepth 1 -type f -size +400c -iname "$pattern" | LC_ALL=C sort | head -1)
        [ -z "$file" ] || break
    done
    # Every Debian has Apache's.
    if [ -n "$file" ] && ! grep -q 'Apache License' "$file"; then
        cat "$file"
    else
        case $licence in
            *MIT*) printf 'Copyright (c) %s\n\n' "$authors"; cat "$project/packaging/licenses/MIT" ;;
            *Apache-2.0*) echo "See /usr/share/common-licenses/Apache-2.0 for the Apache License, version 2.0." ;;
            *) die "crate $name has no file with its licence, which is $licence" ;;
        esac
    fi
    case $licence in
        *"AND Unicode"*) printf '\n'; cat "$directory/LICENSE-UNICODE" ;;
    esac
}

# Text as the continuation of a field in Debian's files.
as_paragraphs() { sed -e 's/[[:space:]]*$//; s/^$/./; s/^/ /'; }
