# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# Helpers for the shell tests; source it first. It owns the scratch directory $W and every process started through
# it: whatever way a test ends, its processes are ended by their id, last started first, and $W is removed
# (QLEAN_KEEP=1 keeps it). A test fails with a sentence on stderr; 77 means that this machine cannot run it.
#
# shellcheck shell=bash disable=SC2034
set -euo pipefail

TESTS=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
BUILD=${QLEAN_BUILD:-$TESTS/../build}
BUILD=$(cd "$BUILD" && pwd)
PLUGIN=$BUILD/plugin/nbdkit-qcow2-plugin.so
FILTER=$BUILD/filter/nbdkit-reclaim-filter.so
QLEAN=$BUILD/client/qlean
PYTHON=/usr/bin/python3 # Debian's own: python3-libnbd is not visible to any other
PATH=/usr/bin:/usr/sbin:$PATH
[ -z "${QLEAN_TEST_PATH:-}" ] || PATH=$QLEAN_TEST_PATH:$PATH
export LC_ALL=C

NAME=$(basename "$0" .sh)
# The path of a socket stands in URIs, and has at most 107 characters.
[[ ${TMPDIR:-/tmp} =~ ^/[A-Za-z0-9/._-]{1,60}$ ]] || export TMPDIR=/tmp
W=$(mktemp -d "${TMPDIR:-/tmp}/qlean-$NAME.XXXXXX")
SECONDS=0

# --- ending -----------------------------------------------------------------------------------------------------

CLEANUPS=()
PIDS=()

# on_exit COMMAND...: runs when the test ends, the last one registered first
on_exit() { CLEANUPS+=("$(printf '%q ' "$@")"); }

finish() {
    local rc=$? i pid
    trap - EXIT INT TERM
    set +e
    if [ $rc != 0 ] && [ $rc != 77 ]; then
        for i in "$W"/*.log; do
            [ -s "$i" ] && { echo "--- last lines of $(basename "$i")"; tail -n 15 "$i"; } >&2
        done
    fi
    for ((i = ${#CLEANUPS[@]} - 1; i >= 0; i--)); do eval "${CLEANUPS[$i]}" >/dev/null 2>&1; done
    for ((i = ${#PIDS[@]} - 1; i >= 0; i--)); do end_pid "${PIDS[$i]}"; done
    if [ -n "${QLEAN_KEEP:-}" ]; then echo "kept: $W" >&2; else rm -rf --one-file-system "$W"; fi
    [ $rc = 0 ] && echo "ok: $NAME, $SECONDS s"
    exit $rc
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# gone PID: it has ended, or does within 10 s
gone() { timeout 10 tail -s 0.02 --pid="$1" -f /dev/null; }

# end_pid PID: asks, waits two seconds, insists
end_pid() {
    local _
    kill "$1" 2>/dev/null || return 0
    for _ in $(seq 40); do kill -0 "$1" 2>/dev/null || return 0; sleep 0.05; done
    kill -KILL "$1" 2>/dev/null
}

fail() { echo "FAIL: $*" >&2; exit 1; }
skip() { echo "SKIP: $*" >&2; exit 77; }
say() { echo "[$SECONDS s] $*"; }

need() { local t; for t; do command -v "$t" >/dev/null || skip "$t is not installed"; done; }
need_root() { [ "$(id -u)" = 0 ] || skip "needs root (loop devices, mounts)"; }

# expect_failure WHAT COMMAND...: the command must end by itself with an error; its output goes to $W/failed.txt
expect_failure() {
    local what=$1 rc=0
    shift
    timeout 30 "$@" >"$W/failed.txt" 2>&1 </dev/null || rc=$?
    [ $rc != 0 ] || { cat "$W/failed.txt" >&2; fail "$what succeeded: $*"; }
    [ $rc != 124 ] || fail "$what hung for 30 s instead of failing: $*"
    [ $rc -lt 128 ] || fail "$what was killed by signal $((rc - 128)): $*"
}

# eventually SECONDS COMMAND...: repeats the command until it succeeds
eventually() {
    local end=$((SECONDS + $1))
    shift
    until "$@"; do
        [ $SECONDS -lt $end ] || return 1
        sleep 0.05
    done
}

# refused IMAGE PATTERN [PARAMETERS]: nbdkit does not serve it, and says why in one line that matches; the image stays as it is
refused() {
    local image=$1 pattern=$2 before='' rc=0
    shift 2
    [ ! -f "$image" ] || before=$(sha "$image")
    timeout 20 nbdkit -U - "$PLUGIN" file="$image" "$@" --run true >"$W/out.txt" 2>"$W/err.txt" </dev/null || rc=$?
    { [ $rc != 0 ] && [ $rc -lt 124 ]; } || fail "$image $*: status $rc instead of a refusal: $(cat "$W/err.txt")"
    [ "$(wc -l <"$W/err.txt")" = 1 ] || fail "$image $*: not one line but: $(cat "$W/err.txt")"
    grep -Eqi -- "$pattern" "$W/err.txt" || fail "$image $*: the sentence does not say '$pattern': $(cat "$W/err.txt")"
    [ -z "$before" ] || [ "$(sha "$image")" = "$before" ] || fail "$image $*: the image was changed"
    echo "  ${image##*/}${*:+ $*}: $(sed 's/^nbdkit: error: //' "$W/err.txt")"
}

# --- images -----------------------------------------------------------------------------------------------------

create() { qemu-img create -q -f qcow2 "$@"; } # create [-o OPTIONS] FILE SIZE
# create_luks FILE SIZE [-o OPTIONS]: encrypted, with the passphrase open-sesame. qemu-img measures the processor to choose the
# cost of the key, and gives up by chance where the host's clock is coarse ("Unable to get accurate CPU usage").
create_luks() {
    local try file=$1 size=$2
    shift 2
    for try in $(seq 40); do
        create --object secret,id=k,data=open-sesame -o encrypt.format=luks,encrypt.key-secret=k,encrypt.iter-time=10 "$@" "$file" "$size" 2>"$W/create_luks.txt" && return 0
    done
    fail "no LUKS image after $try attempts: $(cat "$W/create_luks.txt")"
}
mark() { printf %b "\\x0$2" | dd of="$1" bs=1 seek=79 conv=notrunc status=none; } # mark IMAGE BITS: incompatible features
length() { stat -c %s "$1"; }
allocated() { echo $(($(stat -c '%b * %B' "$1"))); }
sha() { sha256sum <"$1" | cut -d' ' -f1; }
random_file() { head -c "$2" /dev/urandom >"$1"; }

# converted_length IMAGE: how long `qemu-img convert` makes a copy with the same cluster size: what is ideal
converted_length() {
    local cluster compat
    cluster=$(qemu-img info -U --output=json "$1" | jq '."cluster-size"')
    compat=$(qemu-img info -U --output=json "$1" | jq -r '."format-specific".data.compat')
    qemu-img convert -U -f qcow2 -O qcow2 -o "cluster_size=$cluster,compat=$compat" "$1" "$W/converted.qcow2"
    echo $((($(length "$W/converted.qcow2") + cluster - 1) / cluster * cluster)) # it may end within a cluster; ours do not
    rm "$W/converted.qcow2"
}

# judge IMAGE [RAW]: no corruption and no leak, and the same bytes as the raw file
judge() {
    qemu-img check -f qcow2 "$1" >"$W/judge.txt" 2>&1 || { cat "$W/judge.txt" >&2; fail "qemu-img check of $1"; }
    [ $# -lt 2 ] || same_bytes "$1" "$2"
}

# judge_killed IMAGE: after a kill leaked clusters (3) are allowed, corruption (2) is not
judge_killed() {
    local rc=0
    qemu-img check -f qcow2 "$1" >"$W/judge.txt" 2>&1 || rc=$?
    [ $rc = 0 ] || [ $rc = 3 ] || { cat "$W/judge.txt" >&2; fail "qemu-img check of $1 after a kill: $rc"; }
}

same_bytes() {
    qemu-img compare -f qcow2 -F raw "$1" "$2" >"$W/compare.txt" 2>&1 ||
        { cat "$W/compare.txt" >&2; fail "$1 and its model $2 differ"; }
}

# lean IMAGE PERCENT: the file is at most so many percent of what qemu-img convert makes of it
lean() {
    local have ideal
    have=$(length "$1")
    ideal=$(converted_length "$1")
    say "length $have, qemu-img convert $ideal"
    [ $((have * 100)) -le $((ideal * $2)) ] || fail "$1 is $have bytes long, more than $2 % of $ideal"
}

# --- servers ----------------------------------------------------------------------------------------------------

SERVERS=0

# run_pid LOG COMMAND...: starts a process of this test in the background; its id is in $PID
run_pid() {
    local log=$1
    shift
    "$@" >>"$log" 2>&1 </dev/null &
    PID=$!
    PIDS+=("$PID")
}

# start_server [--reclaim] [--socket PATH] IMAGE [NBDKIT ARGUMENTS]: sets SERVER (its id), SOCK and URI
start_server() {
    local filter=() sock='' image options=() parameters=() a
    while [[ $1 == --* ]]; do
        case $1 in
        --reclaim) filter=(--filter="$FILTER"); shift ;;
        --socket) sock=$2; shift 2 ;;
        *) break ;;
        esac
    done
    image=$1
    shift
    for a; do # nbdkit's options go before the plugin, parameters (a filter's too) after it
        if [[ $a != -* && $a == *=* ]]; then parameters+=("$a"); else options+=("$a"); fi
    done
    SERVERS=$((SERVERS + 1))
    SOCK=${sock:-$W/s$SERVERS}
    rm -f "$SOCK" "$W/pid" # nbdkit leaves its socket behind when it is killed
    run_pid "$W/server$SERVERS.log" nbdkit -f -P "$W/pid" -U "$SOCK" "${options[@]}" "${filter[@]}" "$PLUGIN" file="$image" \
        "${parameters[@]}"
    SERVER=$PID
    URI="nbd+unix:///?socket=$SOCK"
    server_ready || fail "the server did not start: $(cat "$W/server$SERVERS.log")"
}

server_ready() {
    local _
    for _ in $(seq 400); do
        [ ! -s "$W/pid" ] || return 0
        kill -0 "$SERVER" 2>/dev/null || return 1
        sleep 0.025
    done
    return 1
}

# threads_of PID: where each of its threads waits in the kernel
threads_of() {
    local t
    for t in "/proc/$1/task"/*; do echo -n "$(cat "$t/comm"):$(cat "$t/wchan" 2>/dev/null || true) "; done
}

# stop_server [PID]: SIGTERM; the server must end within 10 s, with exit status 0
stop_server() {
    local pid=${1:-$SERVER} rc=0
    kill "$pid" || fail "the server $pid is gone"
    gone "$pid" || fail "the server still runs 10 s after SIGTERM; its threads: $(threads_of "$pid")"
    wait "$pid" || rc=$?
    [ $rc = 0 ] || fail "the server ended with status $rc after SIGTERM"
}

# kill_server: SIGKILL
kill_server() {
    kill -KILL "$SERVER"
    wait "$SERVER" 2>/dev/null || true
}

export_uri() { echo "nbd+unix:///$1?socket=$SOCK"; }

# status [JQ FILTER]: one snapshot of the status export
status() { nbdcopy "$(export_uri status)" - | cat | jq -c "${1:-.}"; }

# compact: as fast as it can; compact_kindly: with consideration for the guest, as users do it, which takes its time
compact() { compact_kindly --fast "$@"; }
compact_kindly() { "$QLEAN" compact "$@" "$SOCK" >>"$W/qlean.log" 2>&1 || fail "qlean compact: $(tail -n 3 "$W/qlean.log")"; }

# guest ARGUMENTS: random guest I/O checked against a raw model (guest_io.py)
guest() { "$PYTHON" "$TESTS/guest_io.py" --uri "$URI" "$@"; }

# guest_beside ARGUMENTS: such a guest in the background, at work when this returns, until guest_end; it must not have
# ended or failed by then
guest_beside() {
    rm -f "$W/guest-stop" "$W/guest-started"
    run_pid "$W/guest.log" "$PYTHON" "$TESTS/guest_io.py" --uri "$URI" --until "$W/guest-stop" \
        --started "$W/guest-started" "$@"
    GUEST=$PID
    eventually 20 test -e "$W/guest-started" || fail "the guest does not start: $(tail -n 3 "$W/guest.log")"
}

guest_end() {
    kill -0 "$GUEST" 2>/dev/null || fail "the guest ended by itself: $(tail -n 3 "$W/guest.log")"
    touch "$W/guest-stop"
    wait "$GUEST" || fail "the guest failed: $(tail -n 3 "$W/guest.log")"
    tail -n 1 "$W/guest.log"
}

# busy WHAT REQUESTS [GUEST'S ARGUMENTS]: a guest alone, then one beside compaction (twice, so that they meet for a
# while), then compaction alone; the model is $W/model
busy() {
    local what=$1 requests=$2
    shift 2
    guest --model "$W/model" --requests "$requests" "$@" >"$W/guest.log" 2>&1 || fail "$what: $(cat "$W/guest.log")"
    guest_beside --model "$W/model" "$@"
    compact
    compact
    guest_end
    compact
}

# again IMAGE WHAT REQUESTS [GUEST'S ARGUMENTS]: QEMU has written to the image: it is clean, and served once more
again() {
    local image=$1 what=$2 requests=$3
    shift 3
    judge "$image"
    qemu-img convert -f qcow2 -O raw "$image" "$W/model"
    start_server "$image"
    guest --model "$W/model" --requests "$requests" "$@" >"$W/guest.log" 2>&1 || fail "$what: after QEMU: $(cat "$W/guest.log")"
    stop_server
    judge "$image" "$W/model"
}

# nbdsh_do URI PYTHON: a few lines over libnbd, connected as h; nbdsh_beside does it in the background, as $PID
nbdsh=("$PYTHON" -c 'import nbdsh; nbdsh.shell()')
nbdsh_do() { "${nbdsh[@]}" -u "$1" -c "$2"; }
nbdsh_beside() { run_pid "$W/nbdsh.log" "${nbdsh[@]}" -u "$1" -c "$2"; }
