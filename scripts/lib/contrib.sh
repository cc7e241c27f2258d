# Contrib's files, which `make install` replaces: it keeps them beside ours, with .contrib at the
# end of their names, and `make uninstall` puts them back. Sourced, never run.
#
# The library tells whose files are in place: ours is installed when all copies have been made
# and before the other files are, and contrib's is put back after the others. So a call that was
# interrupted can be repeated, or followed by the other one, and a server finds a library at any
# moment.

# Of the files that we install, those that contrib has as well, other than the library.
contrib_files=(pg_prewarm.control pg_prewarm--1.0--1.1.sql pg_prewarm--1.1.sql pg_prewarm--1.1--1.2.sql)

# Sets the directories of the PostgreSQL in use, below DESTDIR if that is set, and the files
# there that are not SQL's.
find_installation() {
    local owner
    libraries=${DESTDIR:-}$("$PG_CONFIG" --pkglibdir)
    extension=${DESTDIR:-}$("$PG_CONFIG" --sharedir)/extension
    installed=$libraries/pg_prewarm.so
    # With this file, JIT would inline the functions of contrib's module.
    bitcode=$libraries/bitcode/pg_prewarm.index.bc
    owner=$(dpkg-divert --listpackage "$installed" 2>/dev/null) || true
    case $owner in
        '') ;;
        LOCAL) die "$installed is diverted by a local diversion: move it away if it exists, and use dpkg-divert --rename --remove $installed" ;;
        *) die "$installed belongs to package $owner: use apt-get to update or remove it" ;;
    esac
}

# Whether the library there is not ours.
has_contrib() {
    [ -s "$installed" ] || return
    [ -r "$installed" ] || die "cannot read $installed"
    ! grep -aq pg_finfo_autoprewarm_cancel "$installed"
}

# The Debian package that has that file, if there is one.
package_of() { { dpkg-query --search "$1" 2>/dev/null || true; } | sed -n 's/:.*//p'; }

# An update of contrib's package has brought newer files than those that were kept before.
keep_contrib() {
    local file
    if has_contrib; then
        for file in "${contrib_files[@]/#/$extension/}"; do
            [ ! -e "$file" ] || copy_file "$file" "$file.contrib"
        done
        copy_file "$installed" "$installed.contrib"
        say "contrib's files are kept with .contrib at the end of their names"
    fi
    [ ! -e "$bitcode" ] || mv -f "$bitcode" "$bitcode.contrib" || die "cannot move $bitcode away"
}

put_contrib_back() {
    local file ours=yes
    ! has_contrib || ours=
    for file in "${contrib_files[@]/#/$extension/}"; do
        [ -z "$ours" ] || put_back "$file"
    done
    for file in "$project"/sql/*.sql; do
        file=${file##*/}
        case " ${contrib_files[*]} " in
            *" $file "*) ;;
            *) remove "$extension/$file" "$extension/$file.new" ;;
        esac
    done
    [ -z "$ours" ] || put_back "$installed"
    if [ -e "$bitcode.contrib" ] && [ ! -e "$bitcode" ]; then
        mv "$bitcode.contrib" "$bitcode" || die "cannot put $bitcode back"
    fi
    for file in "${contrib_files[@]/#/$extension/}" "$bitcode" "$installed"; do
        remove "$file.contrib" "$file.contrib.new" "$file.new"
    done
}

put_back() {
    if [ -e "$1.contrib" ]; then
        copy_file "$1.contrib" "$1"
    else
        remove "$1"
    fi
}

# Durably, since the other file is replaced then.
copy_file() { cp -dp "$1" "$2.new" && sync "$2.new" && mv -f "$2.new" "$2" || die "cannot write $2"; }
remove() { rm -f "$@" || die "cannot remove $1"; }
