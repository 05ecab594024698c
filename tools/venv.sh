# shellcheck shell=sh
# Environments of Python in the user's cache folder, each made once and then found: what
# tools/engine-env and tools/dynamo-env have in common. Sourced by them, after they have set
#   root         the checkout
#   me           their name, for messages
#   cannot       a function: says why there can be no such environment here; exits with 77
#   own_setting  what a user sets to do without it
cache=${FLEXKV_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/flexkv}
install_seconds=2400

say() { echo "$me: $*" >&2; }
fail() { say "$*"; exit 1; }

# In the background, so that a signal reaches us at once and what runs by us.
child=
trap '[ -z "$child" ] || kill "$child" 2>/dev/null; exit 143' INT TERM HUP
run() {
    timeout --foreground "$@" &
    child=$!
    status=0
    wait "$child" || status=$?
    child=
    return "$status"
}

# An old or foreign python may print anything: only its exit status counts.
fits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))' >/dev/null 2>&1; }

choose_python() {
    for base in /usr/bin/python3 python3.13 python3.12 python3.11 python3.14 python3; do
        fits "$base" && return
    done
    cannot "it needs Python 3.11 to 3.14; install one, or set $own_setting"
}

# What vLLM needs beyond wheels: pip for the venv, headers for our module, libnuma.
usable() {
    "$base" - >/dev/null 2>&1 <<'END'
import ctypes, ensurepip, pathlib, sysconfig, venv
ctypes.CDLL("libnuma.so.1")
assert pathlib.Path(sysconfig.get_path("include"), "Python.h").exists()
END
}

# Why pip could not, from its log: in one line, with the setting that helps.
why_not() {
    if grep -qE 'No space left on device' "$log"; then
        echo "the disk is full; set FLEXKV_CACHE_DIR and TMPDIR to folders with 5 GB free"
    elif grep -qE 'No matching distribution found for torch' "$log"; then
        echo "pip finds no CPU build of torch; set PIP_FIND_LINKS to a folder with its wheel, or" \
             "PIP_EXTRA_INDEX_URL to an index that has it (https://download.pytorch.org/whl/cpu)"
    elif grep -qE 'NewConnectionError|NameResolutionError|ConnectTimeout|ProxyError|SSLError' "$log"; then
        echo "pip can't reach the package index; set PIP_INDEX_URL or PIP_PROXY"
    elif wanted=$(grep -oE 'No matching distribution found for .*' "$log" | tail -n 1) && [ -n "$wanted" ]; then
        echo "$wanted, on this platform ($(uname -m), $("$base" -V)); set $own_setting"
    else
        echo "pip failed, see $log; to use an environment of your own set $own_setting"
    fi
}

# The environment $1 in the cache folder, which is made by the function $3 unless its marker says
# that this was done by the recipe $2. Sets venv, marker, log and base for that function.
find_venv() {
    venv=$cache/$1
    marker=$venv.complete       # written last: what is there without it was interrupted
    log=$venv.log
    complete "$2" && return
    mkdir -p "$cache" 2>/dev/null && [ -w "$cache" ] || cannot "can't write to $cache; set FLEXKV_CACHE_DIR"
    exec 9>"$venv.lock"
    flock -n 9 || {
        say "waiting for another process that installs into $venv"
        flock -w $((2 * install_seconds)) 9 || fail "it did not end; see $log"
    }
    if ! complete "$2"; then
        choose_python
        usable || "$root/tools/install-deps" --engine >&2 ||
            cannot "Debian packages are missing (see above); install them, or set $own_setting"
        "$3"
        echo "$2" >"$marker"
    fi
    exec 9>&-
}

complete() {
    [ "$(cat "$marker" 2>/dev/null)" = "$1" ] && "$venv/bin/python" -c '' 2>/dev/null
}

# What an install begins with: room on the disk, and an empty environment.
new_venv() {
    rm -rf "$venv" "$marker"
    free=$(df -Pk "$cache" | awk 'NR == 2 { print $4 }')
    [ "$free" -ge "$1" ] ||
        cannot "it needs $(($1 / 1000)) MB in $cache, which has $((free / 1024)) MiB; set FLEXKV_CACHE_DIR"
    "$base" -m venv "$venv" >"$log" 2>&1 || not_installed "$base can't make a venv, see $log; set $own_setting"
}

not_installed() { rm -rf "$venv"; cannot "$*"; }

pip_step() {
    run "$install_seconds" "$venv/bin/python" -m pip "$@" >>"$log" 2>&1 || not_installed "$(why_not)"
}

must_import() {
    "$venv/bin/python" -c "import $1" >>"$log" 2>&1 ||
        not_installed "installed, but \"import $1\" fails: $(tail -n 1 "$log"); the log is $log"
}
