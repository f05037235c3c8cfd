#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# The image is locked as QEMU locks it: whoever could do harm is refused, and -U looks in.
. "$(dirname "$0")/../lib.sh"
need qemu-img qemu-nbd qemu-io
image=$W/disk.qcow2
create "$image" 64M
qemu-io -c 'write -P 1 0 1M' "$image" >/dev/null

rw=(nbdkit -U - "$PLUGIN" file="$image" --run true)
ro=(nbdkit -r -U - "$PLUGIN" file="$image" --run true)
reads() { "$@" >"$W/out.txt" 2>&1 || fail "refused but harmless while $state: $*: $(cat "$W/out.txt")"; }
shut_out() { expect_failure "$state: $1" "$@"; }
locked() {
    shut_out "$@"
    grep -qi 'write. lock\|shared .* lock\|in use by another' "$W/failed.txt" || fail "no word of a lock: $(cat "$W/failed.txt")"
}
write=(qemu-io -f qcow2 -c 'write -P 2 0 64k')

state="served for writing"
start_server "$image"
locked qemu-img info "$image"
reads qemu-img info -U "$image"
locked qemu-img check "$image"
reads qemu-img check -U "$image"
locked qemu-img convert -O raw "$image" "$W/raw"
locked "${write[@]}" "$image"
locked "${rw[@]}"
locked "${ro[@]}"
nbdsh_do "$URI" 'assert h.pread(512, 0) == b"\1" * 512'
stop_server
reads qemu-img info "$image"

state="served read-only"
start_server "$image" -r
reads qemu-img info "$image"
reads qemu-img check "$image"
reads "${ro[@]}"
locked "${write[@]}" "$image"
locked "${rw[@]}"
stop_server
reads "${write[@]}" "$image"

hold() { # qemu-nbd with these options holds the image
    rm -f "$W/q"
    run_pid "$W/qemu-nbd.log" qemu-nbd -t -k "$W/q" -f qcow2 "$@" "$image"
    eventually 10 test -S "$W/q" || fail "qemu-nbd did not start"
}
state="open for writing in QEMU"
hold
locked "${rw[@]}"
locked "${ro[@]}"
end_pid "$PID"
wait "$PID" || true

state="open for reading in QEMU"
hold -r
reads "${ro[@]}"
locked "${rw[@]}"
end_pid "$PID"
wait "$PID" || true

state="served and killed"
start_server "$image"
kill_server
reads qemu-img info "$image"

state="left to a child of --run" # a descriptor passed on to a child would keep the lock
nbdkit -U - "$PLUGIN" file="$image" --run "sleep 20 >/dev/null 2>&1 & echo \$! >$W/child"
kill -0 "$(cat "$W/child")" || fail "the child is gone: nothing was tested"
reads "${write[@]}" "$image"
kill "$(cat "$W/child")"
judge "$image"

state="on a host without such locks"
before=$(sha "$image")
for number in 37 22 95; do # ENOLCK, EINVAL, EOPNOTSUPP
    for command in rw ro; do
        declare -n words=$command
        LD_PRELOAD=$BUILD/tests/interop/no-locks.so NO_LOCKS=$number expect_failure "$state" "${words[@]}"
        grep -q "cannot lock '$image', so others could change it meanwhile; its file system must support" "$W/failed.txt" ||
            fail "$state: $(cat "$W/failed.txt")"
    done
done
LD_PRELOAD=$BUILD/tests/interop/no-locks.so expect_failure "$state" "$QLEAN" compact "$image"
grep -q "cannot lock '$image'.*(NFS 3 needs rpc.statd running.*No locks available" "$W/failed.txt" || fail "$state: $(cat "$W/failed.txt")"
[ "$(sha "$image")" = "$before" ] || fail "$state: the image was changed"
