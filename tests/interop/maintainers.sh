#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# maintenance=: who may open more than the disk and the status page. Another user than the one who serves is `nobody`.
. "$(dirname "$0")/../lib.sh"
need_root
need setpriv nbdinfo

chmod 711 "$W"
random_file "$W/data" 4M
create "$W/disk.qcow2" 64M
qemu-io -c "write -s $W/data 0 4M" -c "write -s $W/data 8M 4M" -c 'discard 0 4M' "$W/disk.qcow2" >/dev/null
qemu-img convert -f qcow2 -O raw "$W/disk.qcow2" "$W/model"
qemu-img snapshot -c kept "$W/disk.qcow2"

everything=(compact zeroes reclaim check snapshots snapshot/kept snapshot-delete/kept resize/134217728)
as() { # USER COMMAND...
    local user=$1
    shift
    if [ "$user" = root ]; then "$@"; else setpriv --reuid="$user" --regid=65534 --clear-groups "$@"; fi
}
opens() { as "$1" nbdinfo --no-content "$(export_uri "$2")" >"$W/opens.txt" 2>&1; }
listed() { as "$1" nbdinfo --no-content --list "$URI" | sed -n 's/^export="\(.*\)":$/\1/p' | sort | tr '\n' ' '; }
may() { # USER: all of it
    local e
    for e in "" status "${everything[@]}"; do opens "$1" "$e" || fail "$1 cannot open '$e': $(cat "$W/opens.txt")"; done
    [ "$(listed "$1")" = " check compact reclaim snapshot/kept snapshots status zeroes " ] || fail "$1 sees: $(listed "$1")"
}
may_not() { # USER: but the disk, and how it fares
    local e
    for e in "" status; do opens "$1" "$e" || fail "$1 cannot open '$e': $(cat "$W/opens.txt")"; done
    for e in "${everything[@]}"; do
        ! opens "$1" "$e" || fail "$1 could open '$e'"
    done
    [ "$(listed "$1")" = " status " ] || fail "$1 sees: $(listed "$1")"
}
serve() { # PARAMETERS
    start_server --reclaim "$W/disk.qcow2" "$@"
    chmod 666 "$SOCK"
}

serve
may root && may nobody
stop_server
for all in maintenance=yes maintenance=root,nobody maintenance=0,65534; do
    serve $all
    may root && may nobody
    stop_server
done
serve maintenance=root
may root && may_not nobody
grep -q "export 'compact' is not for this client (maintenance=)" "$W/server$SERVERS.log" || fail "the log does not say why"
grep -q "export 'reclaim' is not for this client (maintenance=)" "$W/server$SERVERS.log" || fail "the log does not say why"
for command in "compact" "compact -n" "check" "snapshot list" "resize" "plan"; do
    size=
    [ "$command" = resize ] && size=+1M
    # shellcheck disable=SC2086
    expect_failure "nobody's qlean $command" \
        setpriv --reuid=nobody --regid=65534 --clear-groups "$QLEAN" $command "$SOCK" $size
    grep -q "this server does not let you maintain the disk" "$W/failed.txt" || fail "it says: $(cat "$W/failed.txt")"
    [ "$(grep -c . "$W/failed.txt")" = 1 ] || fail "it says more than one sentence: $(cat "$W/failed.txt")"
done
"$QLEAN" compact -q "$SOCK" >/dev/null
stop_server
serve maintenance=no
may_not root && may_not nobody
stop_server
judge "$W/disk.qcow2" "$W/model"

# Over TCP nobody is known.
port=$((20000 + RANDOM % 20000))
run_pid "$W/tcp.log" nbdkit -f -P "$W/tcp.pid" -i 127.0.0.1 -p $port "$PLUGIN" "$W/disk.qcow2" maintenance=root
eventually 10 test -s "$W/tcp.pid" || fail "no server on port $port"
nbdinfo --no-content "nbd://127.0.0.1:$port/" >/dev/null
expect_failure "compact over TCP" nbdinfo --no-content "nbd://127.0.0.1:$port/compact"
stop_server "$PID"

for bad in maintenance= maintenance=no-such-user maintenance=root, maintenance=4294967295; do
    refused "$W/disk.qcow2" "there is no user" $bad
done
